//! How the platform comes to know a job's log and its end.

pub mod pull;
pub mod push;
mod shipper;

use std::rc::Rc;

use tokio::sync::watch;

use crate::delivery::pull::{Archive, PullDelivery, WaitsFor};
use crate::delivery::push::{PushDelivery, Shipping};
use crate::job::{Job, Outcome};
use crate::log::writer::JobLog;

/// The same for all jobs of an agent.
#[derive(Clone, Default)]
pub enum Delivery {
    /// Who started the job reads its log, and hears of its end.
    #[default]
    None,
    /// The platform reads the log, and is called back.
    Pull(Rc<PullDelivery>),
    /// The log is sent to the platform.
    Push(Rc<PushDelivery>),
}

/// What is on its way, or comes for the log, of one job.
#[derive(Clone)]
pub(crate) struct JobDelivery {
    delivery: Delivery,
    archive: watch::Receiver<Archive>,
    shipping: Option<Rc<Shipping>>,
}

impl Delivery {
    /// Whose doing a job that is over waits for, in a word.
    pub(crate) fn waits_for(&self) -> Option<&'static str> {
        match self {
            Self::Pull(delivery) => delivery.waits_for.get().map(WaitsFor::as_str),
            Self::Push(_) | Self::None => None,
        }
    }

    /// The job begins.
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
    /// What pushes the log, for tests that make it crash.
    #[cfg(feature = "testing")]
    pub(crate) fn shipper(&self) -> Option<crate::delivery::push::CurrentShipper> {
        self.shipping.as_ref().map(|shipping| Rc::clone(&shipping.shipper))
    }

    /// Tells the result before the log does.
    pub(crate) async fn tell_outcome(&self, job: &Job, outcome: Outcome) {
        if let Delivery::Pull(delivery) = &self.delivery {
            delivery.tell_outcome(job, outcome).await;
        }
    }

    /// Waits until the platform has the log, which is sealed.
    pub(crate) async fn deliver(&self, job: &Job, log: &JobLog) {
        match &self.delivery {
            Delivery::None => {}
            Delivery::Pull(delivery) => {
                delivery.deliver(job, log.whole().await, self.archive.clone()).await;
            }
            Delivery::Push(_) => self.deliver_pushed(job, log).await,
        }
    }

    /// The same, if the log is on its way already: nothing else outlives a crash of the job's task.
    pub(crate) async fn deliver_pushed(&self, job: &Job, log: &JobLog) {
        if let Delivery::Push(delivery) = &self.delivery {
            delivery.deliver(job, log, self.shipping.as_ref()).await;
        }
    }

    /// Tells that nothing of the job is left.
    pub(crate) async fn tell_torn_down(&self, job: &Job) {
        if let Delivery::Pull(delivery) = &self.delivery {
            delivery.tell_torn_down(job).await;
        }
    }
}
