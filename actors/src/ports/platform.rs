//! The platform or control plane, and where metrics go.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;

use super::LogRange;
use crate::errors::Cause;
use crate::intake::protocol::{Answer, Report};
use crate::job::{Job, JobId, PushTarget};

/// One notification of a platform about a job's end; the body of a `POST`.
#[derive(Clone, PartialEq, Eq)]
pub struct Callback {
    /// The URL, as it came with the job.
    pub url: String,
    /// The bearer token, if the job has one.
    pub token: Option<String>,
    /// A JSON object.
    pub body: String,
}

/// Shows the body only: the URL may be pre-signed.
impl fmt::Debug for Callback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "callback {}", self.body)
    }
}

/// Why a callback was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum CallbackError {
    /// The URL or the token is not valid.
    #[error(transparent)]
    Permanent(Cause),
    /// No connection, no answer in time, or a status other than 2xx.
    #[error(transparent)]
    Transient(Cause),
}

impl CallbackError {
    /// Whether another attempt may succeed.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Transient(_))
    }
}

/// Sends callbacks.
pub trait CallbackSender {
    /// Makes one attempt, which ends within a bounded time. The caller repeats it after
    /// [`CallbackError::Transient`].
    ///
    /// After an error or a dropped future the platform may have the callback all the same: delivery
    /// is at least once.
    fn send(&self, callback: &Callback) -> LocalBoxFuture<'static, Result<(), CallbackError>>;
}

/// Stores whole logs as artifacts (docs/protocol.md: "Job logs as an artifact").
pub trait LogUploads {
    /// Uploads `log`, which is whole and sealed, if the job or the agent's configuration asks for
    /// that. `trimmed` says that the platform has not kept all of the log.
    ///
    /// Called once for a job, after its log was delivered. An upload that is not asked for must
    /// succeed at the first poll, as the deadline may be over by then. A failure is only logged.
    fn upload<'a>(
        &'a self,
        job: &'a Job,
        log: &'a LogRange,
        trimmed: bool,
    ) -> LocalBoxFuture<'a, Result<(), Cause>>;
}

/// Consecutive whole lines of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogBatch {
    /// The number of lines, at least 1.
    pub lines: u64,
    /// The lines, each with its newline.
    pub bytes: Bytes,
}

/// Why a log server did not accept a batch. Every batch can be sent again.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// The token has expired or is wrong (401): refresh it.
    #[error("the token is refused")]
    Unauthorized,
    /// The space for this job's log is used up (422): send no more.
    #[error("the space for this job's log is used up")]
    QuotaUsedUp,
    /// The batch has too many lines (413): send fewer.
    #[error("the batch is too large")]
    TooLarge,
    /// No answer came in time.
    #[error("there was no answer in time")]
    TimedOut,
    /// The log server can't be reached, or answers with a 5xx: it may have lost what it had
    /// acknowledged.
    #[error(transparent)]
    Unavailable(Cause),
    /// Any other failure, taken for a transient one.
    #[error(transparent)]
    Failed(Cause),
}

/// Reads logs that are to be pushed, and keeps those that were not delivered.
pub trait LogFiles {
    /// Reads lines from the start of `range`, which is not empty: as many as fit both limits, and
    /// at least one, however long.
    ///
    /// Fails with [`io::ErrorKind::UnexpectedEof`] if no whole line is left, as in a file that was
    /// cut.
    fn read(
        &self,
        range: &LogRange,
        most_lines: u64,
        most_bytes: u64,
    ) -> LocalBoxFuture<'static, io::Result<LogBatch>>;

    /// Keeps the whole of a log whose delivery was given up, beyond the job's end. Returns the path
    /// of the kept file.
    ///
    /// Called at most once for a job, while pushing may go on in the background. The oldest kept
    /// logs may be removed to make room.
    fn keep(&self, job: &JobId, log: &LogRange) -> io::Result<PathBuf>;

    /// Removes a file that `keep` has returned, because its log was delivered after all.
    fn remove_kept(&self, kept: &Path) -> io::Result<()>;
}

/// The server that stores logs (docs/protocol.md: "Pushing logs").
pub trait LogServer {
    /// Sends `batch`, whose first line has the number `first_line` (0 based), and resolves when the
    /// server has acknowledged it. Makes one attempt, which ends within a bounded time. Called for
    /// one batch of a job at a time, in the order of the lines.
    ///
    /// The server replaces everything from `first_line` on, so sending again is always safe, also
    /// from line 0.
    fn push(
        &self,
        target: &PushTarget,
        first_line: u64,
        batch: LogBatch,
    ) -> LocalBoxFuture<'static, Result<(), PushError>>;
}

/// Why a request to the control plane failed. The texts, with their causes, are fit for the agent's log.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// No connection, no answer in time, or an answer that may be another one next time.
    #[error(transparent)]
    Transient(Cause),
    /// The request is refused for good, or its answer is not valid.
    #[error(transparent)]
    Permanent(Cause),
    /// The answer began, but did not arrive whole.
    #[error("the answer broke off")]
    BrokeOff(#[source] Cause),
    /// The control plane does not accept the agent's token (401).
    #[error(transparent)]
    Unauthorized(Cause),
    /// The control plane does not know the agent (404).
    #[error(transparent)]
    NotFound(Cause),
    /// An agent with this name is registered: the same one, within minutes of a crash, or another.
    #[error(transparent)]
    NameTaken(Cause),
    /// The job can't be fetched any more, for example because it was stopped.
    #[error("the job is not available any more")]
    JobGone,
}

impl HubError {
    /// Whether another attempt may succeed.
    pub fn is_transient(&self) -> bool {
        !matches!(self, Self::Permanent(_) | Self::JobGone)
    }
}

/// The control plane of a self-hosted agent (docs/protocol.md: "The self-hosted API").
///
/// Every call is one attempt that ends within a bounded time; the caller repeats it where that is
/// safe. After a dropped future the control plane may have got the request.
///
/// Order of calls: [`Self::register`] until it succeeds, then [`Self::sync`] again and again, with
/// [`Self::fetch_job`] and [`Self::refresh_log_token`] beside it, then [`Self::disconnect`]. An agent that the control plane has
/// deleted begins with [`Self::register`] again.
pub trait HubApi {
    /// Registers the agent. The port keeps the access token of the answer for all later calls.
    ///
    /// Fails with [`HubError::NameTaken`] while an agent with this name is registered.
    fn register(&self) -> LocalBoxFuture<'static, Result<(), HubError>>;

    /// Reports the agent's state, and returns what the agent is to do. One report is under way at a
    /// time; one that takes too long is dropped for a newer one.
    ///
    /// [`HubError::NotFound`] means that the control plane has deleted the agent.
    fn sync(&self, report: &Report) -> LocalBoxFuture<'static, Result<Answer, HubError>>;

    /// Fetches a job. The control plane gives a job out whole only once, so an answer that has
    /// begun but does not arrive must be [`HubError::Permanent`], which is not repeated.
    ///
    /// Fails with [`HubError::JobGone`] if the job was stopped meanwhile. Dropped when the job is
    /// to be stopped before it is here.
    fn fetch_job(&self, id: &JobId) -> LocalBoxFuture<'static, Result<Job, HubError>>;

    /// Gets a new token for [`PushTarget::token`], after the log server has refused the current one.
    fn refresh_log_token(&self) -> LocalBoxFuture<'static, Result<String, HubError>>;

    /// Deregisters the agent. The last call; it may be repeated after an error.
    fn disconnect(&self) -> LocalBoxFuture<'static, Result<(), HubError>>;
}

/// The destination of metrics. Must not block: a measurement that can't be sent at once is dropped.
pub trait MetricsSink {
    /// Adds 1 to the counter `name` (without the namespace), tagged `tag` (`key:value`).
    fn count(&mut self, name: &str, tag: &str);

    /// Records a duration under `name` (without the namespace), tagged `tag` (`key:value`).
    fn time(&mut self, name: &str, duration: Duration, tag: &str);
}

/// Drops all measurements, for an agent without a metrics server.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiscardMetrics;

impl MetricsSink for DiscardMetrics {
    fn count(&mut self, _name: &str, _tag: &str) {}

    fn time(&mut self, _name: &str, _duration: Duration, _tag: &str) {}
}
