//! Brings a job whose log is pushed to its end (PROTOCOL: "Pushing logs"): the log is on its way from the
//! job's first line on, and the job is not over before the platform has the last one, as long as there
//! is progress.

use std::cell::Cell;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use actix::Actor as _;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::delivery::shipper::{Acknowledged, AwaitShipped, LogShipper, Shipped};
use crate::job::{Job, LogMethod, PushTarget};
use crate::log::buffer::LogRange;
use crate::log::writer::JobLog;
use crate::ports::{LogUplink, LogUploads};

/// How long after the job's end delivery may go without any progress.
const WITHOUT_PROGRESS: Duration = Duration::from_mins(2);

/// How long it may take when somebody waits for the agent's end: service managers kill after 90 s.
const INTERRUPTED: Duration = Duration::from_mins(1);

/// What an agent that leaves needs after the delivery, to end the job, tell its result and disconnect.
const LAST_WORDS: Duration = Duration::from_secs(15);

/// How many logs of jobs that are over are tried again and again, and how long each.
const MOST_IN_BACKGROUND: u32 = 20;
const IN_BACKGROUND: Duration = Duration::from_hours(24);

/// A shipper that crashes so often is not started again.
const MOST_CRASHES: u32 = 10;

/// Between a crash of a shipper and its successor.
const AFTER_CRASH: Duration = Duration::from_secs(1);

/// How jobs whose logs are pushed are brought to their end.
pub struct PushDelivery {
    /// Reads and sends.
    pub uplink: Rc<dyn LogUplink>,
    /// Keeps logs as artifacts.
    pub uploads: Box<dyn LogUploads>,
    /// How long after the job's end delivery may take in all.
    pub patience: Duration,
    /// Who waits for the agent's end.
    pub urgency: watch::Receiver<Urgency>,
    /// How many logs of jobs that are over are still on their way.
    pub in_background: Rc<Cell<u32>>,
}

/// How much somebody wants the agent to end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Urgency {
    /// Its machine has asked it to.
    pub interrupted_at: Option<Instant>,
    /// It leaves then, whatever is not done.
    pub leave_by: Option<Instant>,
}

/// A log on its way.
pub(crate) struct Shipping {
    acknowledged: Acknowledged,
    shipped: watch::Receiver<Option<Shipped>>,
    /// The one at work.
    #[cfg(feature = "testing")]
    pub(crate) shipper: CurrentShipper,
    /// Ends it when nobody waits any more.
    _wanted: DropGuard,
}

/// The shipper that is at work, for tests that make it crash.
#[cfg(feature = "testing")]
pub(crate) type CurrentShipper = Rc<std::cell::RefCell<Option<actix::Addr<LogShipper>>>>;

/// Where a job's log is pushed, if it is.
pub(crate) fn target_of(job: &Job) -> Option<&PushTarget> {
    match &job.logger.as_ref().ok()?.method {
        LogMethod::Push(target) => Some(target),
        LogMethod::Pull => None,
    }
}

impl PushDelivery {
    /// Sends the log while it grows.
    pub(crate) fn begin(&self, job: &Job, log: &Rc<JobLog>) -> Option<Shipping> {
        let target = target_of(job)?.clone();
        let (log, uplink) = (Rc::clone(log), Rc::clone(&self.uplink));
        let acknowledged: Acknowledged = Rc::default();
        let (end, ended) = watch::channel(None);
        let progress = Rc::clone(&acknowledged);
        #[cfg(feature = "testing")]
        let (shipper_at_work, current) = {
            let current = CurrentShipper::default();
            (Rc::clone(&current), current)
        };
        let unwanted = CancellationToken::new();
        let wanted = unwanted.clone().drop_guard();
        actix::spawn(async move {
            for _ in 0..MOST_CRASHES {
                let shipper = LogShipper {
                    log: Rc::clone(&log),
                    uplink: Rc::clone(&uplink),
                    target: target.clone(),
                    acknowledged: Rc::clone(&progress),
                    unwanted: unwanted.clone(),
                };
                let shipper = shipper.start();
                #[cfg(feature = "testing")]
                current.replace(Some(shipper.clone()));
                if let Ok(shipped) = shipper.send(AwaitShipped).await {
                    end.send_replace(shipped);
                    return;
                }
                log::error!("a log shipper has crashed");
                sleep(AFTER_CRASH).await;
            }
        });
        Some(Shipping {
            acknowledged,
            shipped: ended,
            #[cfg(feature = "testing")]
            shipper: shipper_at_work,
            _wanted: wanted,
        })
    }

    /// Waits until the platform has the whole log, then keeps it as an artifact if that is wanted.
    pub(crate) async fn deliver(&self, job: &Job, log: &JobLog, shipping: Option<&Rc<Shipping>>) {
        let job_ended = Instant::now();
        let mut trimmed = false;
        if let Some(shipping) = shipping {
            let mut shipped = shipping.shipped.clone();
            let shipped = tokio::select! {
                shipped = shipped.wait_for(Option::is_some) => shipped.ok().and_then(|end| *end),
                () = self.no_progress(&shipping.acknowledged) => None,
                () = self.time_is_up(job_ended) => None,
            };
            trimmed = shipped == Some(Shipped::Trimmed);
            if trimmed {
                log::warn!(job:% = job.id; "the platform takes no more of the job's log");
            } else if shipped.is_none() {
                let acknowledged = *shipping.acknowledged.borrow();
                if let Some(kept) = self.keep_undelivered(job, log, acknowledged).await {
                    self.go_on_trying(job, shipping, kept);
                }
            }
        }
        let Some(whole) = log.whole().await else {
            return;
        };
        let uploaded = tokio::select! {
            // One that is not wanted is done at once, however late it is.
            biased;
            uploaded = self.uploads.upload(job, &whole, trimmed) => uploaded,
            () = self.time_is_up(job_ended) => Err("it took too long".to_owned()),
        };
        if let Err(why) = uploaded {
            log::error!(job:% = job.id, why:%; "the job's log was not uploaded");
        }
    }

    /// Resolves when the platform has not taken a line for too long.
    async fn no_progress(&self, acknowledged: &Acknowledged) {
        let mut progress = acknowledged.subscribe();
        let mut last = *progress.borrow_and_update();
        // Starting again from line 0 after an outage is no progress.
        let mut grown = async || {
            while progress.changed().await.is_ok() {
                let before = std::mem::replace(&mut last, *progress.borrow_and_update());
                if last > before {
                    return true;
                }
            }
            false
        };
        while let Ok(true) = timeout(WITHOUT_PROGRESS, grown()).await {}
    }

    /// Resolves when it is time to leave what is not done.
    async fn time_is_up(&self, job_ended: Instant) {
        let mut urgency = self.urgency.clone();
        loop {
            let now = *urgency.borrow_and_update();
            let interrupted = now.interrupted_at.map(|at| at.max(job_ended) + INTERRUPTED);
            let leaving = now.leave_by.map(|by| by - LAST_WORDS);
            let reasons = [interrupted, leaving];
            let in_all = job_ended + self.patience;
            let first = reasons.into_iter().flatten().min().map_or(in_all, |at| at.min(in_all));
            tokio::select! {
                () = sleep_until(first) => return,
                Ok(()) = urgency.changed() => {}
            }
        }
    }

    /// Has the log's way go on in the background as long as the agent lives: the platform may be back later.
    fn go_on_trying(&self, job: &Job, shipping: &Rc<Shipping>, kept: PathBuf) {
        if self.in_background.get() >= MOST_IN_BACKGROUND {
            return;
        }
        self.in_background.update(|count| count + 1);
        let (job, shipping) = (job.id.clone(), Rc::clone(shipping));
        let (uplink, in_background) = (Rc::clone(&self.uplink), Rc::clone(&self.in_background));
        actix::spawn(async move {
            let mut shipped = shipping.shipped.clone();
            let shipped = timeout(IN_BACKGROUND, shipped.wait_for(Option::is_some)).await;
            if shipped.is_ok_and(|shipped| shipped.is_ok()) {
                log::info!(job:%; "the log that was not delivered in time is delivered now");
                if let Err(error) = uplink.remove_kept(&kept) {
                    log::warn!(job:%, error:%; "the kept log can't be removed");
                }
            }
            in_background.update(|count| count - 1);
        });
    }

    /// Puts the log where it stays; answers where that is.
    async fn keep_undelivered(
        &self,
        job: &Job,
        log: &JobLog,
        acknowledged: u64,
    ) -> Option<PathBuf> {
        let Ok(rest) = log.follow(acknowledged).await else {
            log::error!(job:% = job.id; "the job's log was not delivered, and can't be read");
            return None;
        };
        let events = rest.next_line.saturating_sub(acknowledged);
        let bytes = rest.end - rest.start;
        let whole = LogRange { start: 0, ..rest };
        match self.uplink.keep(&job.id, &whole) {
            Ok(kept) => {
                log::error!(job:% = job.id, events, bytes, kept:% = kept.display(); "a part of the job's log was not delivered");
                Some(kept)
            }
            Err(error) => {
                log::error!(job:% = job.id, events, bytes, error:%; "a part of the job's log was not delivered, and can't be kept");
                None
            }
        }
    }
}
