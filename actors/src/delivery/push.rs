//! Delivery of a log that is pushed (docs/protocol.md: "Pushing logs"): lines are sent from the job's start
//! on, and the job is not over before the platform has the last one, as long as there is progress.

use std::cell::Cell;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use actix::Actor as _;
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::delivery::JobDelivery;
use crate::delivery::departure::Urgency;
pub use crate::delivery::shipper::PushPlatform;
use crate::delivery::shipper::{Acknowledged, AwaitShipped, LogShipper, Shipped};
use crate::errors::WithCauses;
use crate::job::{Job, LogMethod, PushTarget};
use crate::log::job_log::JobLog;
use crate::log::writer::OutputShape;
use crate::ports::LogRange;
use crate::ports::LogUploads;

/// How long after the job's end delivery may go without any progress.
const WITHOUT_PROGRESS: Duration = Duration::from_mins(2);

/// How many logs may be pushed on in the background after their jobs' end.
const MOST_IN_BACKGROUND: u32 = 20;
/// How long a log is pushed on in the background.
const BACKGROUND_PATIENCE: Duration = Duration::from_hours(24);

/// How often a job's log shipper may crash before it is not replaced any more.
const MOST_CRASHES: u32 = 10;

/// The pause before a crashed log shipper is replaced.
const AFTER_CRASH: Duration = Duration::from_secs(1);

/// Delivers jobs whose logs are pushed.
pub struct PushDelivery {
    /// Where log lines come from and go to.
    pub platform: PushPlatform,
    /// Stores logs as artifacts.
    pub uploads: Box<dyn LogUploads>,
    /// How long after the job's end delivery may take in all.
    pub patience: Duration,
    /// How soon the agent has to end.
    pub urgency: watch::Receiver<Urgency>,
    /// How many logs are pushed on in the background. Counted here; starts as 0.
    pub in_background: Rc<Cell<u32>>,
}

/// The delivery of one job whose log is pushed, or is not valid: only stored as an artifact then.
pub(crate) struct PushJob {
    delivery: Rc<PushDelivery>,
    job: Rc<Job>,
    log: Rc<JobLog>,
    shipping: Option<Rc<Shipping>>,
}

/// The pushing of one log; ends when this value is dropped.
struct Shipping {
    acknowledged: Acknowledged,
    ended: watch::Receiver<Option<Shipped>>,
    /// Ends the log shipper when dropped.
    _wanted: DropGuard,
}

/// Returns where `job`'s log is pushed; `None` for a log that is pulled or not valid.
pub(crate) fn target_of(job: &Job) -> Option<&PushTarget> {
    match &job.logger.as_ref().ok()?.method {
        LogMethod::Push(target) => Some(target),
        LogMethod::Pull => None,
    }
}

/// Returns the shape of the output in `job`'s log.
pub(crate) fn output_shape(job: &Job) -> OutputShape {
    if target_of(job).is_some() { OutputShape::PUSHED } else { OutputShape::PULLED }
}

impl PushJob {
    /// Begins to push the log while it grows.
    pub(crate) fn begin(delivery: &Rc<PushDelivery>, job: &Rc<Job>, log: &Rc<JobLog>) -> Self {
        let target = target_of(job);
        let shipping = target.map(|target| Rc::new(delivery.ship(target.clone(), log)));
        Self { delivery: Rc::clone(delivery), job: Rc::clone(job), log: Rc::clone(log), shipping }
    }
}

impl JobDelivery for PushJob {
    fn deliver(&self) -> LocalBoxFuture<'_, ()> {
        self.delivery.deliver(&self.job, &self.log, self.shipping.as_ref()).boxed_local()
    }

    fn deliver_after_crash(&self) -> LocalBoxFuture<'_, ()> {
        self.deliver()
    }
}

impl PushDelivery {
    fn ship(&self, target: PushTarget, log: &Rc<JobLog>) -> Shipping {
        let acknowledged: Acknowledged = Rc::default();
        let (end, ended) = watch::channel(None);
        let unwanted = CancellationToken::new();
        let wanted = unwanted.clone().drop_guard();
        let shipper = LogShipper {
            log: Rc::clone(log),
            platform: self.platform.clone(),
            target,
            acknowledged: Rc::clone(&acknowledged),
            unwanted,
        };
        actix::spawn(async move {
            for _ in 0..MOST_CRASHES {
                if let Ok(shipped) = shipper.clone().start().send(AwaitShipped).await {
                    end.send_replace(shipped);
                    return;
                }
                log::error!("a log shipper has crashed");
                sleep(AFTER_CRASH).await;
            }
        });
        Shipping { acknowledged, ended, _wanted: wanted }
    }

    /// Waits until the platform has the whole log or a deadline passes, then uploads the log as an
    /// artifact if that is asked for. A log that is not delivered is kept on disk, and pushed on in
    /// the background.
    async fn deliver(&self, job: &Job, log: &JobLog, shipping: Option<&Rc<Shipping>>) {
        let job_ended = Instant::now();
        let mut trimmed = false;
        if let Some(shipping) = shipping {
            let mut ended = shipping.ended.clone();
            let shipped = tokio::select! {
                shipped = ended.wait_for(Option::is_some) => shipped.ok().and_then(|end| *end),
                () = self.no_progress(&shipping.acknowledged) => None,
                () = self.time_is_up(job_ended) => None,
            };
            trimmed = shipped == Some(Shipped::Trimmed);
            if trimmed {
                log::warn!(job:% = job.id; "the log server's space for the job's log is used up; the rest is not delivered");
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
            // An upload that is not asked for succeeds at once, even if time is up.
            biased;
            uploaded = self.uploads.upload(job, &whole, trimmed) => uploaded,
            () = self.time_is_up(job_ended) => Err("it took too long".into()),
        };
        if let Err(error) = uploaded {
            log::error!(job:% = job.id, error:% = WithCauses(&*error); "the job's log was not uploaded");
        }
    }

    /// Resolves when the platform has acknowledged no further line for too long.
    async fn no_progress(&self, acknowledged: &Acknowledged) {
        let mut progress = acknowledged.subscribe();
        let mut last = *progress.borrow_and_update();
        // A restart from line 0 after an outage lowers the number, and is no progress.
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

    /// Resolves at the first deadline: that of the delivery, or of an agent that has to end.
    async fn time_is_up(&self, job_ended: Instant) {
        let in_all = job_ended + self.patience;
        let mut urgency = self.urgency.clone();
        loop {
            let now = *urgency.borrow_and_update();
            let first = now.delivers_until(job_ended).map_or(in_all, |at| at.min(in_all));
            tokio::select! {
                () = sleep_until(first) => return,
                Ok(()) = urgency.changed() => {}
            }
        }
    }

    /// Lets the pushing go on in the background while the agent lives, and removes the kept log
    /// once it is delivered.
    fn go_on_trying(&self, job: &Job, shipping: &Rc<Shipping>, kept: PathBuf) {
        if self.in_background.get() >= MOST_IN_BACKGROUND {
            return;
        }
        self.in_background.update(|count| count + 1);
        let (job, shipping) = (job.id.clone(), Rc::clone(shipping));
        let (files, in_background) =
            (Rc::clone(&self.platform.files), Rc::clone(&self.in_background));
        actix::spawn(async move {
            let mut ended = shipping.ended.clone();
            let shipped = timeout(BACKGROUND_PATIENCE, ended.wait_for(Option::is_some)).await;
            if shipped.is_ok_and(|shipped| shipped.is_ok()) {
                log::info!(job:%; "the log that was not delivered in time is delivered now");
                if let Err(error) = files.remove_kept(&kept) {
                    log::warn!(job:%, error:%; "the kept log can't be removed");
                }
            }
            in_background.update(|count| count - 1);
        });
    }

    /// Keeps a log of which `acknowledged` lines were delivered. Returns its path, or `None` (with
    /// a line in the agent's log) if that failed.
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
        match self.platform.files.keep(&job.id, &whole) {
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
