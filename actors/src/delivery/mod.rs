//! How a job's log and outcome get to the platform.

pub mod departure;
pub mod pull;
pub mod push;
mod shipper;

use std::rc::Rc;

use tokio::sync::watch;

use crate::delivery::pull::{Archive, PullDelivery, WaitsFor};
use crate::delivery::push::{PushDelivery, Shipping};
use crate::job::{Job, Outcome};
use crate::log::writer::JobLog;

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

/// The delivery of one job. Clones share it.
#[derive(Clone)]
pub(crate) struct JobDelivery {
    delivery: Delivery,
    archive: watch::Receiver<Archive>,
    shipping: Option<Rc<Shipping>>,
}

impl Delivery {
    /// Returns what a job whose outcome is known still waits for, in the API's word.
    pub(crate) fn waits_for(&self) -> Option<&'static str> {
        match self {
            Self::Pull(delivery) => delivery.waits_for.get().map(WaitsFor::as_str),
            Self::Push(_) | Self::None => None,
        }
    }

    /// Begins the delivery of a job that starts now.
    pub(crate) fn begin(
        &self,
        job: &Job,
        log: &Rc<JobLog>,
        archive: watch::Receiver<Archive>,
    ) -> JobDelivery {
        let shipping = match self {
            Self::Push(delivery) => delivery.begin(job, log).map(Rc::new),
            Self::Pull(_) | Self::None => None,
        };
        JobDelivery { delivery: self.clone(), archive, shipping }
    }
}

impl JobDelivery {
    /// Returns the log shipper, for tests that make it crash.
    #[cfg(feature = "testing")]
    pub(crate) fn shipper(&self) -> Option<crate::delivery::push::CurrentShipper> {
        self.shipping.as_ref().map(|shipping| Rc::clone(&shipping.shipper))
    }

    /// Tells the platform the outcome, before `job_finished` is logged.
    pub(crate) async fn tell_outcome(&self, job: &Job, outcome: Outcome) {
        if let Delivery::Pull(delivery) = &self.delivery {
            delivery.tell_outcome(job, outcome).await;
        }
    }

    /// Waits until the platform has the whole log, which must be sealed, or a deadline passes.
    pub(crate) async fn deliver(&self, job: &Job, log: &JobLog) {
        match &self.delivery {
            Delivery::None => {}
            Delivery::Pull(delivery) => {
                delivery.deliver(job, log.whole().await, self.archive.clone()).await;
            }
            Delivery::Push(_) => self.deliver_pushed(job, log).await,
        }
    }

    /// Waits for a log that is pushed, as [`Self::deliver`] does. A pulled one is not waited for:
    /// after a crash of the job's task nothing but the shipping goes on.
    pub(crate) async fn deliver_pushed(&self, job: &Job, log: &JobLog) {
        if let Delivery::Push(delivery) = &self.delivery {
            delivery.deliver(job, log, self.shipping.as_ref()).await;
        }
    }

    /// Tells the platform that nothing of the job is left.
    pub(crate) async fn tell_torn_down(&self, job: &Job) {
        if let Delivery::Pull(delivery) = &self.delivery {
            delivery.tell_torn_down(job).await;
        }
    }
}
