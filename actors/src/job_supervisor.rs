//! Owns the one job this agent may run, from its admission to the moment when nothing of it is left.
//!
//! Receives [`StartJob`] and [`StopJob`] from an intake, [`GetStatus`] and [`GetLog`] from anybody;
//! spawns a log buffer and an executor afresh for every job; sends [`JobFinished`] to whoever
//! started the job.
//!
//! What it never breaks:
//! - The reply to a child's running message is the only end of that work. A crashed child closes
//!   its mailbox, so a crash arrives as a failed reply, not by a second path.
//! - It owns the containment, which works when the executor has died.
//! - A job is over only when its outcome is logged, its log sealed, and everything it started gone.
//!
//! A job's task holds all it needs to finish, so that even this actor's own crash ends the job in
//! order: as failed, with a line in its log.

use std::rc::Rc;
use std::time::Duration;

use actix::prelude::*;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::executor::{Discard, Executor};
use crate::job::{Job, JobId, Outcome};
use crate::job_lifecycle::{JobLifecycle, StartRefused, StopDecision};
use crate::job_log::JobLog;
use crate::job_steps::{Interrupts, JobSteps};
use crate::log_buffer::LogBuffer;
use crate::log_event::LogEvent;
use crate::metrics::{Metrics, Time};
use crate::ports::{Containment, JobParts, JobPartsFactory, LeftBehind};

/// Starts a job. The reply is the admission decision, not the outcome.
#[derive(Debug, Message)]
#[rtype(result = "Result<(), StartRefused>")]
pub struct StartJob {
    /// What to run.
    pub job: Job,
    /// Whom to tell when it is over.
    pub finished: Recipient<JobFinished>,
}

/// Stops a job. A stop of any other job than the running one is stale and ignored.
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
    /// The shell runs nothing more; the rest is asked to end and has a short grace.
    Grace,
    /// Everything is killed at once.
    AtOnce,
}

/// Asks for the job that holds the slot.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Option<JobId>")]
pub struct GetStatus;

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

/// A job is over: its log is sealed and everything it started is gone.
#[derive(Clone, Debug, PartialEq, Eq, Message)]
#[rtype(result = "()")]
pub struct JobFinished {
    /// The job.
    pub id: JobId,
    /// Its result.
    pub outcome: Outcome,
}

/// The job's task is done.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
struct JobTornDown;

/// See the module.
pub struct JobSupervisor {
    factory: Box<dyn JobPartsFactory>,
    metrics: Addr<Metrics>,
    grace: Duration,
    lifecycle: JobLifecycle,
    current: Option<Current>,
}

/// The running job, or the last one, whose log is still readable.
struct Current {
    id: JobId,
    log: Rc<JobLog>,
    #[cfg(feature = "testing")]
    executor: Addr<Executor>,
    containment: Rc<dyn Containment>,
    stop: CancellationToken,
    /// Tells the job's task when this actor is gone.
    _alive: DropGuard,
}

impl JobSupervisor {
    /// A supervisor without a job. What a job leaves running has `grace` to end when asked to.
    pub fn new(factory: Box<dyn JobPartsFactory>, metrics: Addr<Metrics>, grace: Duration) -> Self {
        Self { factory, metrics, grace, lifecycle: JobLifecycle::default(), current: None }
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
        let running = actix::spawn(async move { task.run(&this).await });
        ctx.spawn(running.into_actor(self).then(|ended, supervisor, _| {
            let log = supervisor.current.as_ref().map(|current| Rc::clone(&current.log));
            if ended.is_err() {
                supervisor.lifecycle.torn_down();
            }
            async move {
                if let (Err(_), Some(log)) = (ended, log) {
                    // Nobody is to wait for more of it.
                    log.tell_crash("the job's task has crashed").await;
                    log.seal().await;
                }
            }
            .into_actor(supervisor)
        }));
        Ok(())
    }

    fn make_task(&mut self, job: Job, finished: Recipient<JobFinished>) -> Result<JobTask, String> {
        let JobParts { backend, containment, spool } =
            self.factory.make(&job).map_err(|error| error.to_string())?;
        let log = Rc::new(JobLog::start(spool).map_err(|error| error.to_string())?);
        let containment: Rc<dyn Containment> = Rc::from(containment);
        let executor = Executor::new(backend, log.buffer()).start();
        let interrupts = Interrupts::default();
        self.current = Some(Current {
            id: job.id.clone(),
            log: Rc::clone(&log),
            #[cfg(feature = "testing")]
            executor: executor.clone(),
            containment: Rc::clone(&containment),
            stop: interrupts.stop.clone(),
            _alive: interrupts.orphaned.clone().drop_guard(),
        });
        let job = Rc::new(job);
        Ok(JobTask {
            steps: JobSteps { job, executor, log, containment, interrupts },
            finished,
            metrics: self.metrics.clone(),
            grace: self.grace,
        })
    }
}

/// One job from its first event to the last of its processes.
struct JobTask {
    steps: JobSteps,
    finished: Recipient<JobFinished>,
    metrics: Addr<Metrics>,
    grace: Duration,
}

impl JobTask {
    async fn run(self, supervisor: &Addr<JobSupervisor>) {
        let Self { steps, finished, metrics, grace } = self;
        let id = steps.job.id.clone();
        let log = Rc::clone(&steps.log);
        let containment = Rc::clone(&steps.containment);
        let executor = steps.executor.clone();
        let stop = steps.interrupts.stop.clone();
        let started = Instant::now();

        // A task of its own, so that its panic is a failed reply here.
        let outcome = match actix::spawn(steps.run()).await {
            Ok(_) if stop.is_cancelled() => Outcome::Stopped,
            Ok(outcome) => outcome,
            Err(_) => {
                containment.kill_shell();
                log.tell_crash("the job's steps have crashed").await;
                Outcome::Failed
            }
        };

        // Outcome decided. Cleaning up starts here and waits for nobody.
        let ((), cleaned) = tokio::join!(
            async {
                if let Err(error) = log.append(LogEvent::job_finished(outcome)).await {
                    log::error!(error:% = error; "the end of a job could not be logged");
                    // The buffer is a new one if the old one had crashed.
                    let _ = log.append(LogEvent::job_finished(outcome)).await;
                }
                log.seal().await;
            },
            end_everything(&*containment, grace, &executor),
        );
        if let Err(left) = cleaned {
            log::error!(job:% = id, left:% = left; "a job left something behind");
        }
        let tag = format!("result:{outcome}");
        metrics.do_send(Time { name: "job.duration", duration: started.elapsed(), tag });
        // The slot is free before anybody is told that it is.
        let _ = supervisor.send(JobTornDown).await;
        finished.do_send(JobFinished { id, outcome });
    }
}

/// Ends everything while the executor still holds the terminal and takes what is printed there:
/// closing it would hang up on processes that are about to be asked to end, and a full one would
/// keep them from ending.
async fn end_everything(
    containment: &dyn Containment,
    grace: Duration,
    executor: &Addr<Executor>,
) -> Result<(), LeftBehind> {
    let mut ended = containment.end_everything(grace);
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
    type Result = ();

    fn handle(&mut self, message: StopJob, ctx: &mut Self::Context) {
        let decision = self.lifecycle.stop(message.id.as_ref());
        let Some(current) = self.current.as_ref().filter(|_| decision != StopDecision::Ignored)
        else {
            return;
        };
        current.stop.cancel();
        if message.manner == StopManner::AtOnce {
            let at_once = current.containment.end_everything(Duration::ZERO);
            // What could not be ended is reported by the job's own clean-up.
            ctx.spawn(at_once.into_actor(self).map(|_, _, _| ()));
        }
    }
}

impl Handler<GetStatus> for JobSupervisor {
    type Result = Option<JobId>;

    fn handle(&mut self, _: GetStatus, _: &mut Self::Context) -> Self::Result {
        self.lifecycle.active().cloned()
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

    fn handle(&mut self, _: JobTornDown, _: &mut Self::Context) {
        self.lifecycle.torn_down();
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
            (PanicIn::Executor | PanicIn::LogBuffer, None) => {}
        }
    }
}
