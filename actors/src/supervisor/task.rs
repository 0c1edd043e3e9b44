//! One job from its first step to the end of everything that belongs to it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use actix::prelude::*;
use futures_util::future::LocalBoxFuture;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::executor::{Discard, Executor};
use super::steps::{Interrupts, JobSteps};
use super::{JobFinished, JobSupervisor, JobTornDown};
use crate::delivery::JobDelivery;
use crate::job::hooks::JobHooks;
use crate::job::{Job, Outcome};
use crate::log::writer::{Crash, LogWriter};
use crate::metrics::{Metrics, Time};
use crate::ports::{Containment, End, JobPartsFactory, LeftBehind, Place, SshAccessFiles};
use crate::ssh_access::{CloseAccess, JumpPoint};

/// The pause between two checks whether somebody is still logged in to a job that is over.
const LOOK_FOR_LOGINS: Duration = Duration::from_secs(5);

/// SSH access to a running job, which can be closed even after a crash of the jump point.
#[derive(Clone)]
pub(super) struct Access {
    pub(super) jump_point: Addr<JumpPoint>,
    pub(super) files: Rc<dyn SshAccessFiles>,
    /// Closed for good before the job's end, because nobody was logged in.
    pub(super) is_closed: Rc<Cell<bool>>,
}

impl Access {
    pub(super) fn new(files: Rc<dyn SshAccessFiles>) -> Self {
        let jump_point = JumpPoint::new(Rc::clone(&files)).start();
        Self { jump_point, files, is_closed: Rc::default() }
    }
}

pub(super) async fn close(access: Option<&Access>) {
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

/// Closes SSH access as soon as nobody is logged in.
pub(super) async fn close_when_unused(access: Option<&Access>) {
    if let Some(access) = access {
        // After an error, `leave` tries again.
        loop {
            match access.files.close_if_unused().await {
                Ok(false) => sleep(LOOK_FOR_LOGINS).await,
                closed => return access.is_closed.set(closed.is_ok()),
            }
        }
    }
}

/// One job from its first event to the last of its processes.
pub(super) struct JobTask {
    pub(super) steps: JobSteps,
    pub(super) after_stop: AfterStop,
    pub(super) metrics: Addr<Metrics>,
    pub(super) end: JobEnd,
}

impl JobTask {
    pub(super) async fn run(self, supervisor: Addr<JobSupervisor>) {
        let Self { steps, after_stop, metrics, end } = self;
        let JobEnd { log, containment, .. } = &end;
        let executor = steps.executor.clone();
        let Interrupts { stop, orphaned } = steps.interrupts.clone();
        let started = Instant::now();

        // In a task of its own, so that a panic becomes a `JoinError`.
        let (outcome, ended_by_itself) = match actix::spawn(steps.run()).await {
            Ok(_) if stop.is_cancelled() => (Outcome::Stopped, false),
            Ok(outcome) => (outcome, true),
            Err(_) => {
                containment.kill_shell();
                log.note_crash(&Crash::Steps).await;
                (Outcome::Failed, false)
            }
        };

        // The outcome is decided. Cleaning up starts now and never waits for the platform.
        let told = async {
            if stop.is_cancelled() {
                after_stop.run_hook(&end, orphaned).await;
            }
            end.tell_outcome(outcome).await;
        };
        let what =
            if ended_by_itself && end.keep_daemons { End::AllButDaemons } else { End::Everything };
        let cleaning = containment.end(what, end.grace);
        let ((), cleaned) = tokio::join!(told, discarding(&executor, cleaning));
        end.report_left(cleaned);
        let tag = format!("result:{outcome}");
        metrics.do_send(Time { name: "job.duration", duration: started.elapsed(), tag });
        let mut delivered = std::pin::pin!(end.delivery.deliver());
        tokio::select! {
            () = &mut delivered => {}
            () = close_when_unused(end.access.as_ref()) => delivered.await,
        }
        end.leave(&supervisor, outcome).await;
    }
}

/// Runs the post-job hook of a stopped job.
pub(super) struct AfterStop {
    pub(super) factory: Rc<dyn JobPartsFactory>,
    pub(super) hooks: JobHooks,
    pub(super) hook_is_due: Rc<Cell<bool>>,
    pub(super) cut_short: CancellationToken,
}

impl AfterStop {
    /// Runs the hook, if it is due, in a spare place: the job's own shell is being ended.
    pub(super) async fn run_hook(self, end: &JobEnd, orphaned: CancellationToken) {
        if self.hooks.post_job.is_none() || !self.hook_is_due.get() {
            return;
        }
        let JobEnd { job, log, grace, .. } = end;
        let Place { backend, containment } = match self.factory.make_spare_place(job) {
            Ok(place) => place,
            Err(error) => {
                return log::error!(job:% = job.id, error:%; "no place for the post-job hook");
            }
        };
        let containment: Rc<dyn Containment> = Rc::from(containment);
        let executor = Executor::new(backend, Rc::clone(log)).start();
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
        // In a task of its own: a panic must not keep the job from its end.
        if actix::spawn(steps.run_post_job_hook_afresh()).await.is_err() {
            log::error!(job:% = job.id; "the post-job hook's steps have crashed");
        }
        end.report_left(discarding(&executor, containment.end(End::Everything, *grace)).await);
    }
}

/// Everything needed to bring a job to its end. Clones share the job.
#[derive(Clone)]
pub(super) struct JobEnd {
    pub(super) job: Rc<Job>,
    pub(super) log: Rc<LogWriter>,
    pub(super) containment: Rc<dyn Containment>,
    pub(super) access: Option<Access>,
    pub(super) finished: Recipient<JobFinished>,
    pub(super) grace: Duration,
    pub(super) keep_daemons: bool,
    pub(super) delivery: Rc<dyn JobDelivery>,
}

impl JobEnd {
    pub(super) async fn tell_outcome(&self, outcome: Outcome) {
        self.delivery.tell_outcome(outcome).await;
        self.log.end_job(outcome).await;
    }

    pub(super) fn report_left(&self, cleaned: Result<(), LeftBehind>) {
        if let Err(left) = cleaned {
            log::error!(job:% = self.job.id, left:%; "parts of a job could not be removed");
        }
    }

    pub(super) async fn leave(&self, supervisor: &Addr<JobSupervisor>, outcome: Outcome) {
        close(self.access.as_ref()).await;
        // Free the slot first: the next job may come in response to the callback.
        let id = self.job.id.clone();
        let _ = supervisor.send(JobTornDown { id: id.clone() }).await;
        self.delivery.tell_torn_down().await;
        self.finished.do_send(JobFinished { id, outcome });
    }

    /// Brings a job whose task has crashed to its end, as failed.
    pub(super) async fn after_crash(&self, supervisor: &Addr<JobSupervisor>) {
        self.containment.kill_shell();
        self.log.note_crash(&Crash::Task).await;
        let (containment, grace) = (Rc::clone(&self.containment), self.grace);
        // In a task of its own: the clean-up may be what crashed.
        let cleaning = actix::spawn(async move { containment.end(End::Everything, grace).await });
        let ((), cleaned) = tokio::join!(self.tell_outcome(Outcome::Failed), cleaning);
        match cleaned {
            Ok(cleaned) => self.report_left(cleaned),
            Err(_) => log::error!(job:% = self.job.id; "a job's clean-up has crashed"),
        }
        self.delivery.deliver_after_crash().await;
        self.leave(supervisor, Outcome::Failed).await;
    }
}

/// Waits for the end of the job's processes while the executor reads the terminal and drops the
/// output. A closed terminal would hang up on processes that are about to get SIGTERM; a full one
/// would keep them from ending.
pub(super) async fn discarding(
    executor: &Addr<Executor>,
    mut ended: LocalBoxFuture<'static, Result<(), LeftBehind>>,
) -> Result<(), LeftBehind> {
    tokio::select! {
        ended = &mut ended => ended,
        _ = executor.send(Discard) => ended.await,
    }
}
