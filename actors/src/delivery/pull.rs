//! The end of a job whose log is pulled (docs/protocol.md: "Teardown of a pull job"): sends the
//! callbacks, and waits until an archivator has fetched the whole log.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use crate::delivery::JobDelivery;
use crate::errors::WithCauses;
use crate::job::{Job, Outcome};
use crate::log::job_log::JobLog;
use crate::ports::{Callback, CallbackError, CallbackSender, LogUploads};
use crate::retry::Retry;

/// The pause between two attempts of a callback.
const CALLBACK_PAUSE: Duration = Duration::from_secs(1);

/// How long all attempts of one callback may take together (docs/protocol.md: "The hosted API").
const CALLBACK_PATIENCE: Duration = Duration::from_mins(15);

/// How long callbacks and archiving may take together once the job has ended and the agent was
/// asked to end: service managers kill after 90 s.
const ENDING_PATIENCE: Duration = Duration::from_mins(1);

/// How long an upload may take. The uploader gives up sooner.
const UPLOAD_PATIENCE: Duration = Duration::from_hours(1);

/// How long a callback may take even if `ENDING_PATIENCE` is over.
const CALLBACK_AT_LEAST: Duration = Duration::from_secs(5);

/// How long an archivator whose transfer broke is waited for.
const ARCHIVATOR_PATIENCE: Duration = Duration::from_mins(10);

/// Delivers jobs whose logs are pulled.
pub struct PullDelivery {
    /// Sends callbacks.
    pub callbacks: Box<dyn CallbackSender>,
    /// The most attempts for one callback; 0 counts as 1.
    pub attempts: u32,
    /// Stores logs as artifacts.
    pub uploads: Box<dyn LogUploads>,
    /// How long an archivator is waited for after the job's end.
    pub archive_timeout: Duration,
    /// The time when the agent was asked to end, if it was.
    pub asked_to_end: watch::Receiver<Option<Instant>>,
}

/// The delivery of one job whose log is pulled.
pub(crate) struct PullJob {
    pub(crate) delivery: Rc<PullDelivery>,
    pub(crate) job: Rc<Job>,
    pub(crate) log: Rc<JobLog>,
    /// Closes when the supervisor crashes.
    pub(crate) archive: watch::Receiver<Archive>,
    /// What the job waits for, if anything.
    waits_for: Cell<Option<WaitsFor>>,
    /// The time when the outcome was decided.
    job_ended: Cell<Option<Instant>>,
}

/// What a job whose outcome is known may wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitsFor {
    /// The platform has not accepted a callback yet.
    Callback,
    /// No archivator has fetched the whole log yet.
    Archivator,
    /// The log is being uploaded as an artifact.
    Upload,
}

impl WaitsFor {
    /// Returns the API's word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Callback => "callback",
            Self::Archivator => "archivator",
            Self::Upload => "upload",
        }
    }
}

/// An event of an archivator's transfer of a sealed log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// The transfer began.
    Began,
    /// The last byte was handed to the connection.
    Completed,
    /// The connection broke before the last byte.
    Broken,
}

/// The state of all transfers of a job's log. Pure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Archive {
    under_way: u32,
    broken: bool,
    archived: bool,
}

impl Archive {
    pub(crate) fn note(&mut self, transfer: Transfer) {
        match transfer {
            Transfer::Began => self.under_way += 1,
            Transfer::Completed => {
                self.under_way = self.under_way.saturating_sub(1);
                self.archived = true;
            }
            Transfer::Broken => {
                self.under_way = self.under_way.saturating_sub(1);
                self.broken = true;
            }
        }
    }

    /// Whether a transfer broke, and none is under way.
    fn is_abandoned(self) -> bool {
        self.broken && self.under_way == 0
    }
}

impl PullJob {
    pub(crate) fn new(
        delivery: Rc<PullDelivery>,
        job: Rc<Job>,
        log: Rc<JobLog>,
        archive: watch::Receiver<Archive>,
    ) -> Self {
        let (waits_for, job_ended) = (Cell::default(), Cell::default());
        Self { delivery, job, log, archive, waits_for, job_ended }
    }

    /// Waits until an archivator has the whole log, then uploads the log as an artifact if the job
    /// asks for that.
    async fn archive_and_upload(&self) {
        let job = &self.job.id;
        let since = Instant::now();
        self.waits_for.set(Some(WaitsFor::Archivator));
        let at_most = since + self.delivery.archive_timeout;
        let archived = tokio::select! {
            // An archivator that is done already counts, however late it is.
            biased;
            archived = is_archived(self.archive.clone()) => archived,
            () = self.time_is_up(at_most, WaitsFor::Archivator) => false,
        };
        self.waits_for.set(None);
        if !archived {
            let seconds = since.elapsed().as_secs();
            log::warn!(job:%, seconds; "gave up waiting for an archivator to fetch the job's whole log");
        }
        let Some(log) = self.log.whole().await else {
            return;
        };
        let most = self.job.logger.as_ref().map_or(u64::MAX, |logger| logger.max_size);
        let trimmed = log.end >= most;
        self.waits_for.set(Some(WaitsFor::Upload));
        let at_most = Instant::now() + UPLOAD_PATIENCE;
        let uploaded = tokio::select! {
            // An upload that is not wanted ends at once.
            biased;
            uploaded = self.delivery.uploads.upload(&self.job, &log, trimmed) => uploaded,
            () = self.time_is_up(at_most, WaitsFor::Upload) => Err("it took too long".into()),
        };
        self.waits_for.set(None);
        if let Err(error) = uploaded {
            log::error!(job:%, error:% = WithCauses(&*error); "the job's log was not uploaded");
        }
    }

    /// Resolves at `at_most`, or sooner if the agent is asked to end. Logs how long the wait may
    /// take.
    async fn time_is_up(&self, at_most: Instant, waits_for: WaitsFor) {
        let job = &self.job.id;
        let began = Instant::now();
        let job_ended = self.job_ended.get().unwrap_or(began);
        let at_least = match waits_for {
            WaitsFor::Callback | WaitsFor::Upload => CALLBACK_AT_LEAST,
            WaitsFor::Archivator => Duration::ZERO,
        };
        let mut asked_to_end = self.delivery.asked_to_end.clone();
        loop {
            let asked = *asked_to_end.borrow_and_update();
            let when_ending =
                asked.map(|asked| (asked.max(job_ended) + ENDING_PATIENCE).max(began + at_least));
            let give_up = when_ending.map_or(at_most, |leave| leave.min(at_most));
            let left = give_up.saturating_duration_since(Instant::now());
            let seconds = left.as_millis().div_ceil(1000);
            match waits_for {
                WaitsFor::Archivator => {
                    log::info!(job:%, at_most_seconds:% = seconds; "waiting for an archivator to fetch the job's log");
                }
                // Most callbacks are accepted at once: not worth a line.
                WaitsFor::Callback | WaitsFor::Upload if asked.is_none() => {}
                WaitsFor::Callback => {
                    log::info!(job:%, at_most_seconds:% = seconds; "waiting for the platform to take a callback");
                }
                WaitsFor::Upload => {
                    log::info!(job:%, at_most_seconds:% = seconds; "waiting for the upload of the job's log");
                }
            }
            tokio::select! {
                () = sleep_until(give_up) => return,
                Ok(()) = asked_to_end.changed() => {}
            }
        }
    }

    /// Sends a callback, if the job has a URL for it.
    async fn tell(&self, what: &str, url: Option<&String>, body: String) {
        let Some(url) = url.cloned() else {
            return;
        };
        let callback = Callback { url, token: self.job.callbacks.token.clone(), body };
        self.waits_for.set(Some(WaitsFor::Callback));
        let last_failure = RefCell::default();
        let at_most = Instant::now() + CALLBACK_PATIENCE;
        let accepted = tokio::select! {
            accepted = self.send_until_accepted(what, &callback, &last_failure) => accepted,
            () = self.time_is_up(at_most, WaitsFor::Callback) => Err(None),
        };
        self.waits_for.set(None);
        if let Err(error) = accepted {
            let error = error.map(|error| WithCauses(&error).to_string());
            let why = error.or(last_failure.take()).unwrap_or("there was no answer in time".into());
            log::error!(job:% = self.job.id, callback = what, why:%; "gave up the callback");
        }
    }

    /// Sends `callback` until the platform accepts it. Fails with the last error after
    /// [`PullDelivery::attempts`]; `last_failure` keeps the error so far, for a caller that gives up
    /// earlier.
    async fn send_until_accepted(
        &self,
        what: &str,
        callback: &Callback,
        last_failure: &RefCell<Option<String>>,
    ) -> Result<(), Option<CallbackError>> {
        let job = &self.job.id;
        let failed = |error: &CallbackError, tries| {
            // Warn on the first failure only.
            let level = if tries == 1 { log::Level::Warn } else { log::Level::Debug };
            let error = WithCauses(error);
            log::log!(level, job:%, callback = what, error:%; "the callback failed; retrying");
            last_failure.replace(Some(error.to_string()));
        };
        let send = async || self.delivery.callbacks.send(callback).await;
        let retry = Retry::every(CALLBACK_PAUSE, self.delivery.attempts);
        retry.run(CallbackError::is_transient, send, failed).await?;
        log::info!(job:%, callback = what; "callback sent");
        Ok(())
    }
}

impl JobDelivery for PullJob {
    fn tell_outcome(&self, outcome: Outcome) -> LocalBoxFuture<'_, ()> {
        self.job_ended.set(Some(Instant::now()));
        let body = format!(r#"{{"result":"{outcome}"}}"#);
        self.tell("finished", self.job.callbacks.finished.as_ref(), body).boxed_local()
    }

    fn deliver(&self) -> LocalBoxFuture<'_, ()> {
        self.archive_and_upload().boxed_local()
    }

    fn tell_torn_down(&self) -> LocalBoxFuture<'_, ()> {
        let url = self.job.callbacks.teardown_finished.as_ref();
        self.tell("teardown_finished", url, "{}".to_owned()).boxed_local()
    }

    fn waits_for(&self) -> Option<WaitsFor> {
        self.waits_for.get()
    }
}

/// Waits until an archivator has the whole log, and returns `true`. Returns `false` if a transfer
/// broke and no other one began within [`ARCHIVATOR_PATIENCE`]; waits without end for the first
/// one.
async fn is_archived(mut archive: watch::Receiver<Archive>) -> bool {
    loop {
        let now = *archive.borrow_and_update();
        let changed = if now.archived {
            return true;
        } else if now.is_abandoned() {
            let Ok(changed) = timeout(ARCHIVATOR_PATIENCE, archive.changed()).await else {
                return false;
            };
            changed
        } else {
            archive.changed().await
        };
        if changed.is_err() {
            // The supervisor has crashed: nobody can report a transfer.
            return false;
        }
    }
}
