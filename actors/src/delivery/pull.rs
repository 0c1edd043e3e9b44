//! What follows the end of a job whose log is pulled (PROTOCOL: "Teardown of a `pull` job"): tells the
//! platform, and waits until its archivator has the whole log.

use std::cell::Cell;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::job::{Job, Outcome};
use crate::log::buffer::LogRange;
use crate::ports::{Callback, CallbackError, CallbackSender, LogUploads};

/// How long to wait between two tries of a callback.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// How long all tries of one callback may take together (PROTOCOL: `agent serve`).
const IN_ALL: Duration = Duration::from_mins(15);

/// How long everything after a job's end may take together when the agent is to end: service managers kill after 90 s.
const WHEN_ENDING: Duration = Duration::from_mins(1);

/// How long a callback may take whatever the time.
const AT_LEAST: Duration = Duration::from_secs(5);

/// How long after the last broken transfer an archivator may come back.
const COME_BACK: Duration = Duration::from_mins(10);

/// How jobs whose logs are pulled are brought to their end.
pub struct PullDelivery {
    /// Sends callbacks.
    pub callbacks: Box<dyn CallbackSender>,
    /// How often one is sent before it is given up; at least once.
    pub attempts: u32,
    /// Keeps logs as artifacts.
    pub uploads: Box<dyn LogUploads>,
    /// How long an archivator may take to come.
    pub archive_timeout: Duration,
    /// When the agent was asked to end, if it was.
    pub asked_to_end: watch::Receiver<Option<Instant>>,
    /// What the job that is over waits for.
    pub waits_for: Cell<Option<WaitsFor>>,
    /// When the outcome of the last job was known.
    pub job_ended: Cell<Option<Instant>>,
}

/// Whose doing a job that is over may wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitsFor {
    /// The platform has not taken a callback yet.
    Callback,
    /// Nobody has fetched the log yet.
    Archivator,
}

impl WaitsFor {
    /// The word that the API uses.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Callback => "callback",
            Self::Archivator => "archivator",
        }
    }
}

/// What happens to an archivator's transfer of a log that is sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// It began.
    Began,
    /// The last byte was handed to the connection.
    Completed,
    /// The connection broke before that.
    Broken,
}

/// What archivators have done with a job's log so far. Pure.
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

    /// Whether somebody tried, failed, and may not come back.
    fn is_abandoned(self) -> bool {
        self.broken && self.under_way == 0
    }
}

impl PullDelivery {
    /// Tells the platform the result.
    pub(crate) async fn tell_outcome(&self, job: &Job, outcome: Outcome) {
        self.job_ended.set(Some(Instant::now()));
        let body = format!(r#"{{"result":"{outcome}"}}"#);
        self.tell(job, "finished", job.callbacks.finished.as_ref(), body).await;
    }

    /// Waits until an archivator has the whole log, then keeps it as an artifact if the job wants
    /// that.
    pub(crate) async fn deliver(
        &self,
        job: &Job,
        log: Option<LogRange>,
        archive: watch::Receiver<Archive>,
    ) {
        let since = Instant::now();
        self.waits_for.set(Some(WaitsFor::Archivator));
        let archived = tokio::select! {
            // One that has come already is not waited for.
            biased;
            archived = is_archived(archive) => archived,
            () = self.time_is_up(job, since + self.archive_timeout, WaitsFor::Archivator) => false,
        };
        self.waits_for.set(None);
        if !archived {
            let seconds = since.elapsed().as_secs();
            log::warn!(job:% = job.id, seconds; "no archivator has fetched the job's whole log; it is not waited for any more");
        }
        let Some(log) = log else {
            return;
        };
        let most = job.logger.as_ref().map_or(u64::MAX, |logger| logger.max_size);
        let trimmed = log.end >= most;
        if let Err(why) = self.uploads.upload(job, &log, trimmed).await {
            log::error!(job:% = job.id, why:%; "the job's log was not uploaded");
        }
    }

    /// Resolves at `at_most`, or sooner if the agent is asked to end; says in the agent's log how long that will be.
    async fn time_is_up(&self, job: &Job, at_most: Instant, waits_for: WaitsFor) {
        let began = Instant::now();
        let job_ended = self.job_ended.get().unwrap_or(began);
        let at_least = match waits_for {
            WaitsFor::Callback => AT_LEAST,
            WaitsFor::Archivator => Duration::ZERO,
        };
        let mut asked_to_end = self.asked_to_end.clone();
        loop {
            let asked = *asked_to_end.borrow_and_update();
            let when_ending =
                asked.map(|asked| (asked.max(job_ended) + WHEN_ENDING).max(began + at_least));
            let give_up = when_ending.map_or(at_most, |leave| leave.min(at_most));
            let left = give_up.saturating_duration_since(Instant::now());
            let seconds = left.as_millis().div_ceil(1000);
            match waits_for {
                WaitsFor::Archivator => {
                    log::info!(job:% = job.id, at_most_seconds:% = seconds; "waiting for an archivator to fetch the job's log");
                }
                // Most callbacks are taken at once.
                WaitsFor::Callback if asked.is_none() => {}
                WaitsFor::Callback => {
                    log::info!(job:% = job.id, at_most_seconds:% = seconds; "waiting for the platform to take a callback");
                }
            }
            tokio::select! {
                () = sleep_until(give_up) => return,
                Ok(()) = asked_to_end.changed() => {}
            }
        }
    }

    /// Tells the platform that nothing of the job is left.
    pub(crate) async fn tell_torn_down(&self, job: &Job) {
        let url = job.callbacks.teardown_finished.as_ref();
        self.tell(job, "teardown_finished", url, "{}".to_owned()).await;
    }

    async fn tell(&self, job: &Job, what: &str, url: Option<&String>, body: String) {
        let Some(url) = url.cloned() else {
            return;
        };
        let callback = Callback { url, token: job.callbacks.token.clone(), body };
        self.waits_for.set(Some(WaitsFor::Callback));
        let mut last_failure = None;
        let taken = tokio::select! {
            taken = self.send_until_taken(job, what, &callback, &mut last_failure) => taken,
            () = self.time_is_up(job, Instant::now() + IN_ALL, WaitsFor::Callback) => Err("there was no answer in time".to_owned()),
        };
        self.waits_for.set(None);
        if let Err(why) = taken {
            let why = last_failure.unwrap_or(why);
            log::error!(job:% = job.id, callback = what, why:%; "callback given up");
        }
    }

    /// Fails with the last reason when it was tried often enough; `last_failure` is the reason so far.
    async fn send_until_taken(
        &self,
        job: &Job,
        what: &str,
        callback: &Callback,
        last_failure: &mut Option<String>,
    ) -> Result<(), String> {
        let job = &job.id;
        let mut tries = 0;
        loop {
            tries += 1;
            match self.callbacks.send(callback).await {
                Ok(()) => {
                    log::info!(job:%, callback = what, tries; "callback sent");
                    return Ok(());
                }
                Err(CallbackError::Failed(why)) if tries < self.attempts => {
                    // A warning on the first failure only.
                    let level = if tries == 1 { log::Level::Warn } else { log::Level::Debug };
                    log::log!(level, job:%, callback = what, why:%; "callback not taken, trying again");
                    *last_failure = Some(why);
                }
                Err(error) => return Err(error.to_string()),
            }
            sleep(TRY_AGAIN).await;
        }
    }
}

/// Waits until the log is archived: without end while nobody has tried, but not for ever for an
/// archivator that failed. False if that did not come back.
async fn is_archived(mut archive: watch::Receiver<Archive>) -> bool {
    loop {
        let now = *archive.borrow_and_update();
        let changed = if now.archived {
            return true;
        } else if now.is_abandoned() {
            let Ok(changed) = timeout(COME_BACK, archive.changed()).await else {
                return false;
            };
            changed
        } else {
            archive.changed().await
        };
        if changed.is_err() {
            // The supervisor is gone, and with it everybody who could report a transfer.
            return false;
        }
    }
}
