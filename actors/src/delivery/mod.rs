//! How a job's log and outcome get to the platform.

pub mod departure;
pub mod pull;
pub mod push;
mod shipper;

use std::rc::Rc;

use futures_util::FutureExt as _;
use futures_util::future::{LocalBoxFuture, ready};
use tokio::sync::watch;

use crate::delivery::pull::{Archive, PullDelivery, PullJob, WaitsFor};
use crate::delivery::push::{PushDelivery, PushJob};
use crate::job::{Job, Outcome};
use crate::log::job_log::JobLog;

/// How logs and outcomes get to the platform; the same for all jobs of an agent.
#[derive(Clone, Default)]
pub enum Delivery {
    /// There is no platform: the sender of `StartJob` reads the log and receives `JobFinished`.
    #[default]
    None,
    /// The platform reads the log from the agent, and callbacks tell it the outcome.
    Pull(Rc<PullDelivery>),
    /// The agent sends the log to the platform; the intake reports the outcome.
    Push(Rc<PushDelivery>),
}

impl Delivery {
    /// Begins the delivery of a job that starts now.
    pub(crate) fn begin(
        &self,
        job: &Rc<Job>,
        log: &Rc<JobLog>,
        archive: watch::Receiver<Archive>,
    ) -> Rc<dyn JobDelivery> {
        match self {
            Self::None => Rc::new(NoDelivery),
            Self::Pull(delivery) => {
                Rc::new(PullJob::new(Rc::clone(delivery), Rc::clone(job), Rc::clone(log), archive))
            }
            Self::Push(delivery) => Rc::new(PushJob::begin(delivery, job, log)),
        }
    }
}

/// The delivery of one job. The methods are called in the order in which they stand here, each
/// once; none of them fails, as a platform that can't be reached must not keep a job from its end.
pub(crate) trait JobDelivery {
    /// Tells the platform the outcome, before `job_finished` is logged.
    fn tell_outcome(&self, _outcome: Outcome) -> LocalBoxFuture<'_, ()> {
        ready(()).boxed_local()
    }

    /// Waits until the platform has the whole log, which is sealed, or a deadline passes.
    fn deliver(&self) -> LocalBoxFuture<'_, ()>;

    /// Called in place of [`Self::deliver`] after a crash of the job's task. By default waits for
    /// nothing.
    fn deliver_after_crash(&self) -> LocalBoxFuture<'_, ()> {
        ready(()).boxed_local()
    }

    /// Tells the platform that nothing of the job is left.
    fn tell_torn_down(&self) -> LocalBoxFuture<'_, ()> {
        ready(()).boxed_local()
    }

    /// Returns what a job whose outcome is known still waits for. Called at any moment.
    fn waits_for(&self) -> Option<WaitsFor> {
        None
    }
}

/// For a job without a platform.
struct NoDelivery;

impl JobDelivery for NoDelivery {
    fn deliver(&self) -> LocalBoxFuture<'_, ()> {
        ready(()).boxed_local()
    }
}
