//! Owns the one job this agent may run, from its admission until nothing of it is left.
//!
//! Receives [`StartJob`], [`StopJob`] and [`ReportTransfer`] from an intake, [`GetActiveJob`],
//! [`GetWaitsFor`], [`GetLog`], [`CheckReadiness`] and [`AwaitDeath`] from any actor. Spawns a log
//! buffer, an executor and, where SSH access is offered, a jump point for each job. Sends
//! [`JobFinished`] to the recipient named in [`StartJob`].
//!
//! Invariants:
//! - Work that a message starts in a child is over when the reply comes, and not before. A child
//!   that panics closes its mailbox, so its crash arrives as a failed reply.
//! - The job's task and the supervisor share the containment, so it works after a crash of the
//!   executor or of the supervisor.
//! - A job is over only when its outcome is logged, its log sealed and delivered, and everything it
//!   started gone.
//!
//! A job's task holds all it needs to finish: even a crash of the supervisor ends the job in order,
//! as failed and with a line in its log.

pub mod executor;
pub mod finished_once;
mod hooks;
mod steps;
mod task;

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use actix::prelude::*;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::delivery::pull::{Archive, Transfer, WaitsFor};
use crate::delivery::push::output_shape;
use crate::delivery::{Delivery, JobDelivery};
use crate::errors::Cause;
pub use crate::job::hooks::{HookFailure, JobHooks, PostJobHook, PreJobHook};
use crate::job::lifecycle::{JobLifecycle, StartRefused, StopDecision};
use crate::job::{Job, JobId, Outcome};
use crate::log::buffer::LogBuffer;
use crate::log::job_log::JobLog;
use crate::log::writer::LogWriter;
use crate::metrics::Metrics;
use crate::ports::{Containment, End, JobParts, JobPartsFactory};
use crate::supervisor::executor::Executor;
use crate::supervisor::steps::{Interrupts, JobSteps};
use crate::supervisor::task::{Access, AfterStop, JobEnd, JobTask, close};

/// Starts a job. The reply is the admission decision; the outcome comes as [`JobFinished`].
#[derive(Debug, Message)]
#[rtype(result = "Result<(), StartError>")]
pub struct StartJob {
    /// The job to run.
    pub job: Job,
    /// Receives [`JobFinished`] once, unless the job is refused.
    pub finished: Recipient<JobFinished>,
}

/// Why a job was not started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The job slot is taken, or the job was started before.
    #[error(transparent)]
    Refused(#[from] StartRefused),
    /// The job's log file, directory or another part could not be made.
    #[error("the job's parts could not be made")]
    NoParts(#[source] Cause),
}

/// Stops a job. A stop of any job but the running one is stale and ignored. The reply comes when
/// the stop is recorded or, with [`StopManner::AtOnce`], when everything has ended.
#[derive(Clone, Debug, Message)]
#[rtype(result = "()")]
pub struct StopJob {
    /// The job to stop; `None` for whichever runs.
    pub id: Option<JobId>,
    /// How the job's processes are ended.
    pub manner: StopManner,
}

/// How a stop ends a job's processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopManner {
    /// The shell runs nothing more but its EXIT trap, all other processes get SIGTERM, and what is
    /// left after [`Config::grace`] is killed.
    Grace,
    /// Everything is killed without a grace, and SSH access closed.
    AtOnce,
}

/// Returns the id of the job that holds the slot.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Option<JobId>")]
pub struct GetActiveJob;

/// Returns what a job whose outcome is known still waits for; `None` if nothing, or while the job
/// runs.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Option<WaitsFor>")]
pub struct GetWaitsFor;

/// Checks whether a job could be started now. The error is for logs.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "io::Result<()>")]
pub struct CheckReadiness;

/// Returns the log of the running job, else that of the last one; `None` before the first job, or
/// if the last log was dropped to free the disk.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Option<JobLogAddress>")]
pub struct GetLog;

/// The current log buffer of a job. The log outlives a crash of the buffer: when the address is
/// dead, send [`GetLog`] again.
#[derive(Clone, Debug)]
pub struct JobLogAddress {
    /// The job that the log belongs to.
    pub id: JobId,
    /// The actor that owns the log.
    pub buffer: Addr<LogBuffer>,
}

/// Reports the progress of an archivator's transfer of a job's sealed log.
#[derive(Clone, Debug, Message)]
#[rtype(result = "()")]
pub struct ReportTransfer {
    /// The job whose log is transferred. A report on any but the current job is ignored.
    pub id: JobId,
    /// What has happened to the transfer.
    pub transfer: Transfer,
}

/// Has no reply: the request fails when the supervisor has crashed.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct AwaitDeath;

/// A job is over: its log is sealed and delivered, everything it started is gone, and the slot is
/// free.
#[derive(Clone, Debug, PartialEq, Eq, Message)]
#[rtype(result = "()")]
pub struct JobFinished {
    /// The job that is over.
    pub id: JobId,
    /// How the job ended.
    pub outcome: Outcome,
}

/// Frees the slot: all that is left of the job is its `teardown_finished` callback and
/// [`JobFinished`].
#[derive(Clone, Debug, Message)]
#[rtype(result = "()")]
struct JobTornDown {
    id: JobId,
}

/// The settings that all jobs of an agent share.
#[derive(Default)]
pub struct Config {
    /// How long the processes of a job may take to end after SIGTERM, before they are killed.
    pub grace: Duration,
    /// Spares daemons of a job that was not stopped (see [`End::AllButDaemons`]).
    pub keep_daemons: bool,
    /// The operator's hooks for every job.
    pub hooks: JobHooks,
    /// How logs and outcomes get to the platform.
    pub delivery: Delivery,
}

/// Runs one job at a time. See the [module](self).
pub struct JobSupervisor {
    factory: Rc<dyn JobPartsFactory>,
    metrics: Addr<Metrics>,
    config: Config,
    lifecycle: JobLifecycle,
    current: Option<Current>,
}

/// The running job, or the last one, whose log stays readable until the next job starts.
struct Current {
    id: JobId,
    log: Rc<JobLog>,
    delivery: Rc<dyn JobDelivery>,
    containment: Rc<dyn Containment>,
    access: Option<Access>,
    archive: watch::Sender<Archive>,
    stop: CancellationToken,
    /// Cancelled by [`StopManner::AtOnce`]: ends a post-job hook that runs after the stop.
    cut_short: CancellationToken,
    /// Cancels [`Interrupts::orphaned`] when the supervisor is dropped.
    _alive: DropGuard,
}

impl JobSupervisor {
    /// Creates a supervisor without a job.
    pub fn new(factory: Box<dyn JobPartsFactory>, metrics: Addr<Metrics>, config: Config) -> Self {
        let factory = Rc::from(factory);
        Self { factory, metrics, config, lifecycle: JobLifecycle::default(), current: None }
    }

    fn start_job(&mut self, message: StartJob, ctx: &mut Context<Self>) -> Result<(), StartError> {
        let StartJob { job, finished } = message;
        self.lifecycle.start(&job.id)?;
        let task = match self.make_task(job, finished) {
            Ok(task) => task,
            Err(cause) => {
                self.lifecycle.start_failed();
                return Err(StartError::NoParts(cause));
            }
        };
        let this = ctx.address();
        let end = task.end.clone();
        // In a task of its own, so that a panic becomes a `JoinError`.
        let running = actix::spawn(task.run(this.clone()));
        let watched = async move {
            if running.await.is_err() {
                end.after_crash(&this).await;
            }
        };
        ctx.spawn(watched.into_actor(self));
        Ok(())
    }

    fn make_task(&mut self, job: Job, finished: Recipient<JobFinished>) -> Result<JobTask, Cause> {
        let parts = self.factory.make(&job).or_else(|_| {
            // The last job's log may fill the disk. It has been delivered.
            self.current = None;
            self.factory.make(&job)
        });
        let JobParts { backend, containment, spool, jump_point } = parts?;
        let log = Rc::new(JobLog::start(spool)?);
        let writer = Rc::new(LogWriter::new(Rc::clone(&log), output_shape(&job)));
        let containment: Rc<dyn Containment> = Rc::from(containment);
        let executor = Executor::new(backend, Rc::clone(&writer)).start();
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
            delivery: Rc::clone(&delivery),
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
                log: Rc::clone(&writer),
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
                log: writer,
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

impl Actor for JobSupervisor {
    type Context = Context<Self>;
}

impl Handler<StartJob> for JobSupervisor {
    type Result = Result<(), StartError>;

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
                let ended = current.containment.end(End::Everything, Duration::ZERO);
                let access = current.access.clone();
                // In a task of its own, as the sender may drop the reply.
                let at_once = actix::spawn(async move {
                    // The job's own clean-up reports what could not be ended.
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
    // As a future of this actor, so that the reply fails when the actor crashes.
    type Result = ResponseActFuture<Self, ()>;

    fn handle(&mut self, _: AwaitDeath, _: &mut Self::Context) -> Self::Result {
        Box::pin(std::future::pending().into_actor(self))
    }
}

impl Handler<GetActiveJob> for JobSupervisor {
    type Result = Option<JobId>;

    fn handle(&mut self, _: GetActiveJob, _: &mut Self::Context) -> Self::Result {
        self.lifecycle.active().cloned()
    }
}

impl Handler<GetWaitsFor> for JobSupervisor {
    type Result = Option<WaitsFor>;

    fn handle(&mut self, _: GetWaitsFor, _: &mut Self::Context) -> Self::Result {
        self.current.as_ref()?.delivery.waits_for()
    }
}

impl Handler<CheckReadiness> for JobSupervisor {
    type Result = io::Result<()>;

    fn handle(&mut self, _: CheckReadiness, _: &mut Self::Context) -> Self::Result {
        self.factory.check().or_else(|error| {
            if self.lifecycle.active().is_some() {
                return Err(error);
            }
            // The last job's log may fill the disk. It has been delivered.
            self.current = None;
            self.factory.check()
        })
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
        // Sent twice if the job's task crashes after it has left.
        if self.lifecycle.active() == Some(&message.id) {
            self.lifecycle.torn_down();
        }
    }
}
