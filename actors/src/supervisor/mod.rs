//! Owns the one job this agent may run, from its admission to the moment when nothing of it is left.
//!
//! Receives [`StartJob`] and [`StopJob`] from an intake, [`GetStatus`] and [`GetLog`] from anybody,
//! [`ReportTransfer`] from who serves the log; spawns a log buffer, an executor and, where it is
//! offered, a jump point afresh for every job; sends [`JobFinished`] to whoever started the job.
//!
//! What it never breaks:
//! - The reply to a child's running message is the only end of that work. A crashed child closes
//!   its mailbox, so a crash arrives as a failed reply, not by a second path.
//! - It owns the containment, which works when the executor has died.
//! - A job is over only when its outcome is logged, its log sealed and delivered, and everything it
//!   started gone.
//!
//! A job's task holds all it needs to finish, so that even this actor's own crash ends the job in
//! order: as failed, with a line in its log.

pub mod executor;
pub mod finished_once;
mod steps;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use actix::prelude::*;
use futures_util::future::LocalBoxFuture;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::delivery::pull::{Archive, Transfer};
use crate::delivery::{Delivery, JobDelivery};
pub use crate::job::hooks::{HookFailure, JobHooks, PostJobHook, PreJobHook};
use crate::job::lifecycle::{JobLifecycle, StartRefused, StopDecision};
use crate::job::{Job, JobId, Outcome};
use crate::log::buffer::LogBuffer;
use crate::log::writer::JobLog;
use crate::metrics::{Metrics, Time};
use crate::ports::{
    Containment, JobParts, JobPartsFactory, JumpPointFiles, LeftBehind, SparePlace,
};
use crate::ssh_access::{CloseAccess, JumpPoint};
use crate::supervisor::executor::{Discard, Executor, OutputShape};
use crate::supervisor::steps::{Interrupts, JobSteps};

/// How long to wait between two looks whether somebody is still logged in to a job that is over.
const LOOK_FOR_LOGINS: Duration = Duration::from_secs(5);

/// Starts a job. The reply is the admission decision, not the outcome.
#[derive(Debug, Message)]
#[rtype(result = "Result<(), StartRefused>")]
pub struct StartJob {
    /// What to run.
    pub job: Job,
    /// Whom to tell when it is over.
    pub finished: Recipient<JobFinished>,
}

/// Stops a job. A stop of any other job than the running one is stale and ignored. The reply comes
/// when the stop is recorded, or with [`StopManner::AtOnce`] when everything has ended.
#[derive(Clone, Debug, Message)]
#[rtype(result = "()")]
pub struct StopJob {
    /// Which job; any if absent.
    pub id: Option<JobId>,
    /// How politely.
    pub manner: StopManner,
}

/// How a job's processes are ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopManner {
    /// The shell runs no command any more but its EXIT trap; the rest is asked to end, and all have a short grace.
    Grace,
    /// Everything is killed at once.
    AtOnce,
}

/// Asks for the job that holds the slot.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Option<JobId>")]
pub struct GetStatus;

/// Asks whose doing the job that holds the slot waits for, if it is over but for that.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Option<&'static str>")]
pub struct GetWait;

/// Asks whether a job's parts could be made now; the error says in words why not.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Result<(), String>")]
pub struct CheckReadiness;

/// Asks for the log of the running job, or of the last one.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Option<JobLogAddress>")]
pub struct GetLog;

/// Whose log it is, and who answers for it. Ask again when the address turns out dead: the log
/// outlives a crash of its buffer.
#[derive(Clone, Debug)]
pub struct JobLogAddress {
    /// The job.
    pub id: JobId,
    /// Its log buffer.
    pub buffer: Addr<LogBuffer>,
}

/// Tells how an archivator's transfer of a job's sealed log goes.
#[derive(Clone, Debug, Message)]
#[rtype(result = "()")]
pub struct ReportTransfer {
    /// The job.
    pub id: JobId,
    /// How it goes.
    pub transfer: Transfer,
}

/// Is never answered: the failed reply tells that the supervisor is gone.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct AwaitDeath;

/// A job is over: its log is sealed and everything it started is gone.
#[derive(Clone, Debug, PartialEq, Eq, Message)]
#[rtype(result = "()")]
pub struct JobFinished {
    /// The job.
    pub id: JobId,
    /// Its result.
    pub outcome: Outcome,
}

/// Nothing of a job is left but what is still to be told about it.
#[derive(Clone, Debug, Message)]
#[rtype(result = "()")]
struct JobTornDown {
    id: JobId,
}

/// What is the same for all jobs of an agent.
#[derive(Default)]
pub struct Config {
    /// What a job leaves running has so long to end when asked to.
    pub grace: Duration,
    /// What has detached itself from the shell of a job that was not stopped stays.
    pub keep_daemons: bool,
    /// What its operator adds to every job.
    pub hooks: JobHooks,
    /// How the platform comes to know a job's log and its end.
    pub delivery: Delivery,
}

/// See the module.
pub struct JobSupervisor {
    factory: Rc<dyn JobPartsFactory>,
    metrics: Addr<Metrics>,
    config: Config,
    lifecycle: JobLifecycle,
    current: Option<Current>,
}

/// The running job, or the last one, whose log is still readable.
struct Current {
    id: JobId,
    log: Rc<JobLog>,
    #[cfg(feature = "testing")]
    executor: Addr<Executor>,
    #[cfg(feature = "testing")]
    shipper: Option<crate::delivery::push::CurrentShipper>,
    containment: Rc<dyn Containment>,
    access: Option<Access>,
    archive: watch::Sender<Archive>,
    stop: CancellationToken,
    cut_short: CancellationToken,
    /// Tells the job's task when this actor is gone.
    _alive: DropGuard,
}

impl JobSupervisor {
    /// A supervisor without a job.
    pub fn new(factory: Box<dyn JobPartsFactory>, metrics: Addr<Metrics>, config: Config) -> Self {
        let factory = Rc::from(factory);
        Self { factory, metrics, config, lifecycle: JobLifecycle::default(), current: None }
    }

    fn start_job(
        &mut self,
        message: StartJob,
        ctx: &mut Context<Self>,
    ) -> Result<(), StartRefused> {
        let StartJob { job, finished } = message;
        self.lifecycle.start(&job.id)?;
        let task = match self.make_task(job, finished) {
            Ok(task) => task,
            Err(why) => {
                self.lifecycle.start_failed();
                return Err(StartRefused::NoParts { why });
            }
        };
        let this = ctx.address();
        let end = task.end.clone();
        // A task of its own, so that its panic is a failed reply here.
        let running = actix::spawn(task.run(this.clone()));
        let watched = async move {
            if running.await.is_err() {
                end.after_crash(&this).await;
            }
        };
        ctx.spawn(watched.into_actor(self));
        Ok(())
    }

    fn make_task(&mut self, job: Job, finished: Recipient<JobFinished>) -> Result<JobTask, String> {
        let parts = self.factory.make(&job).or_else(|_| {
            // The last job's log may be what fills the disk; it has been delivered.
            self.current = None;
            self.factory.make(&job)
        });
        let JobParts { backend, containment, spool, jump_point } =
            parts.map_err(|error| error.to_string())?;
        let shape = OutputShape::for_job(&job);
        let log = JobLog::start(spool, shape.max_line).map_err(|error| error.to_string())?;
        let log = Rc::new(log);
        let containment: Rc<dyn Containment> = Rc::from(containment);
        let executor = Executor::new(backend, log.buffer(), shape).start();
        let interrupts = Interrupts::default();
        let cut_short = CancellationToken::new();
        let hook_is_due = Rc::default();
        let access = jump_point.map(Access::new);
        let archive = watch::Sender::default();
        let archived = archive.subscribe();
        let job = Rc::new(job);
        let delivery = self.config.delivery.begin(&job, &log, archived);
        self.current = Some(Current {
            id: job.id.clone(),
            log: Rc::clone(&log),
            #[cfg(feature = "testing")]
            executor: executor.clone(),
            #[cfg(feature = "testing")]
            shipper: delivery.shipper(),
            containment: Rc::clone(&containment),
            access: access.clone(),
            archive,
            stop: interrupts.stop.clone(),
            cut_short: cut_short.clone(),
            _alive: interrupts.orphaned.clone().drop_guard(),
        });
        Ok(JobTask {
            steps: JobSteps {
                job: Rc::clone(&job),
                hooks: self.config.hooks.clone(),
                hook_is_due: Rc::clone(&hook_is_due),
                executor,
                jump_point: access.as_ref().map(|access| access.jump_point.clone()),
                log: Rc::clone(&log),
                containment: Rc::clone(&containment),
                interrupts,
                access_problem: RefCell::default(),
            },
            after_stop: AfterStop {
                factory: Rc::clone(&self.factory),
                hooks: self.config.hooks.clone(),
                hook_is_due,
                cut_short,
            },
            metrics: self.metrics.clone(),
            end: JobEnd {
                job,
                log,
                containment,
                access,
                finished,
                grace: self.config.grace,
                keep_daemons: self.config.keep_daemons,
                delivery,
            },
        })
    }
}

/// The way in to a running job, which can be closed even when its actor has died.
#[derive(Clone)]
struct Access {
    jump_point: Addr<JumpPoint>,
    files: Rc<dyn JumpPointFiles>,
    /// It is closed, and nobody opens it again.
    is_closed: Rc<Cell<bool>>,
}

impl Access {
    fn new(files: Rc<dyn JumpPointFiles>) -> Self {
        let jump_point = JumpPoint::new(Rc::clone(&files)).start();
        Self { jump_point, files, is_closed: Rc::default() }
    }
}

async fn close(access: Option<&Access>) {
    let Some(Access { jump_point, files, is_closed }) = access else {
        return;
    };
    if is_closed.get() {
        return;
    }
    let closed = match jump_point.send(CloseAccess).await {
        Ok(closed) => closed,
        Err(_crashed) => files.close().await,
    };
    if let Err(error) = closed {
        log::error!(error:%; "a job's SSH access may still be open");
    }
}

/// Closes the way in as soon as nobody is logged in.
async fn close_when_unused(access: Option<&Access>) {
    if let Some(access) = access {
        // Where it can't be closed now, the job's last moment is another try.
        loop {
            match access.files.close_if_unused().await {
                Ok(false) => sleep(LOOK_FOR_LOGINS).await,
                closed => return access.is_closed.set(closed.is_ok()),
            }
        }
    }
}

/// One job from its first event to the last of its processes.
struct JobTask {
    steps: JobSteps,
    after_stop: AfterStop,
    metrics: Addr<Metrics>,
    end: JobEnd,
}

impl JobTask {
    async fn run(self, supervisor: Addr<JobSupervisor>) {
        let Self { steps, after_stop, metrics, end } = self;
        let JobEnd { job, log, containment, .. } = &end;
        let executor = steps.executor.clone();
        let Interrupts { stop, orphaned } = steps.interrupts.clone();
        let started = Instant::now();

        // A task of its own, so that its panic is a failed reply here.
        let (outcome, ended_by_itself) = match actix::spawn(steps.run()).await {
            Ok(_) if stop.is_cancelled() => (Outcome::Stopped, false),
            Ok(outcome) => (outcome, true),
            Err(_) => {
                containment.kill_shell();
                log.tell_crash("the job's steps have crashed").await;
                (Outcome::Failed, false)
            }
        };

        // Outcome decided. Cleaning up starts here and waits for nobody.
        let told = async {
            if stop.is_cancelled() {
                after_stop.run_hook(&end, orphaned).await;
            }
            end.tell_outcome(outcome).await;
        };
        let cleaning = if ended_by_itself && end.keep_daemons {
            containment.release(end.grace)
        } else {
            containment.end_everything(end.grace)
        };
        let ((), cleaned) = tokio::join!(told, discarding(&executor, cleaning));
        end.report_left(cleaned);
        let tag = format!("result:{outcome}");
        metrics.do_send(Time { name: "job.duration", duration: started.elapsed(), tag });
        let mut delivered = std::pin::pin!(end.delivery.deliver(job, log));
        tokio::select! {
            () = &mut delivered => {}
            () = close_when_unused(end.access.as_ref()) => delivered.await,
        }
        end.leave(&supervisor, outcome).await;
    }
}

/// What is still to run after a stop.
struct AfterStop {
    factory: Rc<dyn JobPartsFactory>,
    hooks: JobHooks,
    hook_is_due: Rc<Cell<bool>>,
    cut_short: CancellationToken,
}

impl AfterStop {
    /// The post-job hook, in a place of its own: the job's shell is dead.
    async fn run_hook(self, end: &JobEnd, orphaned: CancellationToken) {
        if self.hooks.post_job.is_none() || !self.hook_is_due.get() {
            return;
        }
        let JobEnd { job, log, grace, .. } = end;
        let SparePlace { backend, containment } = match self.factory.make_spare_place(job) {
            Ok(place) => place,
            Err(error) => {
                return log::error!(job:% = job.id, error:%; "no place for the post-job hook");
            }
        };
        let containment: Rc<dyn Containment> = Rc::from(containment);
        let executor = Executor::new(backend, log.buffer(), OutputShape::for_job(job)).start();
        let steps = JobSteps {
            job: Rc::clone(job),
            hooks: self.hooks,
            hook_is_due: self.hook_is_due,
            executor: executor.clone(),
            jump_point: None,
            log: Rc::clone(log),
            containment: Rc::clone(&containment),
            interrupts: Interrupts { stop: self.cut_short, orphaned },
            access_problem: RefCell::default(),
        };
        // A task of its own: a crash in it must not keep the job from its end.
        if actix::spawn(steps.run_post_job_hook_afresh()).await.is_err() {
            log::error!(job:% = job.id; "the post-job hook's steps have crashed");
        }
        end.report_left(discarding(&executor, containment.end_everything(*grace)).await);
    }
}

/// What brings a job to its end. Clones are of the same job.
#[derive(Clone)]
struct JobEnd {
    job: Rc<Job>,
    log: Rc<JobLog>,
    containment: Rc<dyn Containment>,
    access: Option<Access>,
    finished: Recipient<JobFinished>,
    grace: Duration,
    keep_daemons: bool,
    delivery: JobDelivery,
}

impl JobEnd {
    async fn tell_outcome(&self, outcome: Outcome) {
        self.delivery.tell_outcome(&self.job, outcome).await;
        self.log.end(outcome).await;
    }

    fn report_left(&self, cleaned: Result<(), LeftBehind>) {
        if let Err(left) = cleaned {
            log::error!(job:% = self.job.id, left:%; "a job left something behind");
        }
    }

    async fn leave(&self, supervisor: &Addr<JobSupervisor>, outcome: Outcome) {
        close(self.access.as_ref()).await;
        // The slot is free before anybody is told that it is: the next job may come as an answer.
        let id = self.job.id.clone();
        let _ = supervisor.send(JobTornDown { id: id.clone() }).await;
        self.delivery.tell_torn_down(&self.job).await;
        self.finished.do_send(JobFinished { id, outcome });
    }

    /// The job's task has crashed: nobody is to wait for more of the job.
    async fn after_crash(&self, supervisor: &Addr<JobSupervisor>) {
        self.containment.kill_shell();
        self.log.tell_crash("the job's task has crashed").await;
        let (containment, grace) = (Rc::clone(&self.containment), self.grace);
        // A task of its own again: it may be what crashed.
        let cleaning = actix::spawn(async move { containment.end_everything(grace).await });
        let ((), cleaned) = tokio::join!(self.tell_outcome(Outcome::Failed), cleaning);
        match cleaned {
            Ok(cleaned) => self.report_left(cleaned),
            Err(_) => log::error!(job:% = self.job.id; "a job's clean-up has crashed"),
        }
        self.delivery.deliver_pushed(&self.job, &self.log).await;
        self.leave(supervisor, Outcome::Failed).await;
    }
}

/// Waits for the end of the job's processes while the executor still holds the terminal and takes what
/// is printed there: closing it would hang up on processes that are about to be asked to end, and a full
/// one would keep them from ending.
async fn discarding(
    executor: &Addr<Executor>,
    mut ended: LocalBoxFuture<'static, Result<(), LeftBehind>>,
) -> Result<(), LeftBehind> {
    tokio::select! {
        ended = &mut ended => ended,
        _ = executor.send(Discard) => ended.await,
    }
}

impl Actor for JobSupervisor {
    type Context = Context<Self>;
}

impl Handler<StartJob> for JobSupervisor {
    type Result = Result<(), StartRefused>;

    fn handle(&mut self, message: StartJob, ctx: &mut Self::Context) -> Self::Result {
        self.start_job(message, ctx)
    }
}

impl Handler<StopJob> for JobSupervisor {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, message: StopJob, _: &mut Self::Context) -> Self::Result {
        let decision = self.lifecycle.stop(message.id.as_ref());
        let Some(current) = self.current.as_ref().filter(|_| decision != StopDecision::Ignored)
        else {
            return Box::pin(async {});
        };
        current.stop.cancel();
        match message.manner {
            StopManner::Grace => Box::pin(async {}),
            StopManner::AtOnce => {
                current.cut_short.cancel();
                let ended = current.containment.end_everything(Duration::ZERO);
                let access = current.access.clone();
                // A task of its own: nobody has to wait for the reply.
                let at_once = actix::spawn(async move {
                    // What could not be ended is reported by the job's own clean-up.
                    let _ = ended.await;
                    close(access.as_ref()).await;
                });
                Box::pin(async {
                    let _ = at_once.await;
                })
            }
        }
    }
}

impl Handler<ReportTransfer> for JobSupervisor {
    type Result = ();

    fn handle(&mut self, message: ReportTransfer, _: &mut Self::Context) {
        let ReportTransfer { id, transfer } = message;
        if let Some(current) = self.current.as_ref().filter(|current| current.id == id) {
            current.archive.send_modify(|archive| archive.note(transfer));
        }
    }
}

impl Handler<AwaitDeath> for JobSupervisor {
    // In this actor, so that the reply fails with it.
    type Result = ResponseActFuture<Self, ()>;

    fn handle(&mut self, _: AwaitDeath, _: &mut Self::Context) -> Self::Result {
        Box::pin(std::future::pending().into_actor(self))
    }
}

impl Handler<GetStatus> for JobSupervisor {
    type Result = Option<JobId>;

    fn handle(&mut self, _: GetStatus, _: &mut Self::Context) -> Self::Result {
        self.lifecycle.active().cloned()
    }
}

impl Handler<GetWait> for JobSupervisor {
    type Result = Option<&'static str>;

    fn handle(&mut self, _: GetWait, _: &mut Self::Context) -> Self::Result {
        self.config.delivery.waits_for()
    }
}

impl Handler<CheckReadiness> for JobSupervisor {
    type Result = Result<(), String>;

    fn handle(&mut self, _: CheckReadiness, _: &mut Self::Context) -> Self::Result {
        let ready = self.factory.check().or_else(|error| {
            if self.lifecycle.active().is_some() {
                return Err(error);
            }
            // The last job's log may be what fills the disk; it has been delivered.
            self.current = None;
            self.factory.check()
        });
        ready.map_err(|error| error.to_string())
    }
}

impl Handler<GetLog> for JobSupervisor {
    type Result = Option<JobLogAddress>;

    fn handle(&mut self, _: GetLog, _: &mut Self::Context) -> Self::Result {
        let current = self.current.as_ref()?;
        Some(JobLogAddress { id: current.id.clone(), buffer: current.log.buffer() })
    }
}

impl Handler<JobTornDown> for JobSupervisor {
    type Result = ();

    fn handle(&mut self, message: JobTornDown, _: &mut Self::Context) {
        // A job that crashes on its way out may tell it twice.
        if self.lifecycle.active() == Some(&message.id) {
            self.lifecycle.torn_down();
        }
    }
}

/// Which actor a test wants to see crash.
#[cfg(feature = "testing")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Message)]
#[rtype(result = "()")]
pub enum PanicIn {
    /// The supervisor itself.
    JobSupervisor,
    /// The running job's executor.
    Executor,
    /// The running job's log buffer.
    LogBuffer,
    /// The running job's jump point.
    JumpPoint,
    /// What pushes the running job's log.
    LogShipper,
    /// The metrics.
    Metrics,
}

#[cfg(feature = "testing")]
impl Handler<PanicIn> for JobSupervisor {
    type Result = ();

    fn handle(&mut self, which: PanicIn, _: &mut Self::Context) {
        use crate::testing::{PanicNow, panic_as_asked};
        let current = self.current.as_ref();
        match (which, current) {
            (PanicIn::JobSupervisor, _) => panic_as_asked(),
            (PanicIn::Metrics, _) => self.metrics.do_send(PanicNow),
            (PanicIn::Executor, Some(current)) => current.executor.do_send(PanicNow),
            (PanicIn::LogBuffer, Some(current)) => current.log.buffer().do_send(PanicNow),
            (PanicIn::JumpPoint, Some(Current { access: Some(access), .. })) => {
                access.jump_point.do_send(PanicNow);
            }
            (PanicIn::LogShipper, Some(Current { shipper: Some(shipper), .. })) => {
                if let Some(shipper) = &*shipper.borrow() {
                    shipper.do_send(PanicNow);
                }
            }
            _ => {}
        }
    }
}
