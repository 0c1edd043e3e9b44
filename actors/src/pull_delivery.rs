//! What follows the end of a job whose log is pulled (PROTOCOL: "Teardown of a `pull` job"): tells the
//! platform, and waits until its archivator has the whole log.

use std::cell::Cell;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

use crate::job::{Job, Outcome};
use crate::log_buffer::LogRange;
use crate::ports::{Callback, CallbackError, CallbackSender, LogUploads};

/// How long to wait between two tries of a callback.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// How long all tries of one callback may take together (PROTOCOL: `agent serve`).
const IN_ALL: Duration = Duration::from_mins(15);

/// How long an archivator may take to come when the agent is to end.
const WHEN_ENDING: Duration = Duration::from_mins(1);

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
    /// An archivator is waited for.
    pub waits: Cell<bool>,
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
        self.waits.set(true);
        let archived = tokio::select! {
            // One that has come already is not waited for.
            biased;
            archived = is_archived(archive) => archived,
            () = self.time_is_up(job, since) => false,
        };
        self.waits.set(false);
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

    /// Resolves when no archivator is waited for any more; says in the agent's log how long that will be.
    async fn time_is_up(&self, job: &Job, since: Instant) {
        let mut asked_to_end = self.asked_to_end.clone();
        loop {
            let asked = *asked_to_end.borrow_and_update();
            let at_most = since + self.archive_timeout;
            let give_up =
                asked.map_or(at_most, |asked| at_most.min(asked.max(since) + WHEN_ENDING));
            let left = give_up.saturating_duration_since(Instant::now());
            let seconds = left.as_millis().div_ceil(1000);
            log::info!(job:% = job.id, at_most_seconds:% = seconds; "waiting for an archivator to fetch the job's log");
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
        let job = &job.id;
        let mut tries = 0;
        let give_up = Instant::now() + IN_ALL;
        loop {
            tries += 1;
            let sent = timeout_at(give_up, self.callbacks.send(&callback)).await;
            let too_late = || Err(CallbackError::Failed("there was no answer in time".into()));
            let has_time = Instant::now() + TRY_AGAIN < give_up;
            match sent.unwrap_or_else(|_| too_late()) {
                Ok(()) => {
                    log::info!(job:%, callback = what, tries; "callback sent");
                    return;
                }
                Err(CallbackError::Failed(why)) if tries < self.attempts && has_time => {
                    // Once, and not three hundred times.
                    let level = if tries == 1 { log::Level::Warn } else { log::Level::Debug };
                    log::log!(level, job:%, callback = what, why:%; "callback not taken, trying again");
                }
                Err(error) => {
                    log::error!(job:%, callback = what, tries, why:% = error; "callback given up");
                    return;
                }
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
