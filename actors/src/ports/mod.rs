//! What the actors need from the world outside; implemented by the binary, scripted in tests.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;

use crate::intake::protocol::{Answer, Report};
use crate::job::{EnvVar, InjectedFile, Job, JobId, PushTarget};
use crate::log::buffer::LogRange;

/// Everything that is made afresh for one job.
pub struct JobParts {
    /// Prepares the place where commands run.
    pub backend: Box<dyn ExecutorBackend>,
    /// Ends everything the job started; works when the executor has died.
    pub containment: Box<dyn Containment>,
    /// Keeps the job's log.
    pub spool: Box<dyn LogSpool>,
    /// Lets people log in while the job runs, where that is offered.
    pub jump_point: Option<Rc<dyn JumpPointFiles>>,
}

/// Another place for a job whose first one is gone.
pub struct SparePlace {
    /// Prepares it.
    pub backend: Box<dyn ExecutorBackend>,
    /// Ends everything that was started there.
    pub containment: Box<dyn Containment>,
}

/// Makes the parts of each job.
pub trait JobPartsFactory {
    /// Makes `job`'s parts; nothing of the job runs yet.
    fn make(&self, job: &Job) -> io::Result<JobParts>;

    /// Looks whether a job's parts could be made now, as they can't while the disk is full.
    fn check(&self) -> io::Result<()>;

    /// Makes a place for what is to run after `job` was stopped.
    fn make_spare_place(&self, job: &Job) -> io::Result<SparePlace>;
}

/// Why a step could not be done, in words for the job's log; never holds a secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct StepError(pub String);

/// Why the place for a job's commands can't be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PreparationError {
    /// For the reason given, which is for the job's log.
    #[error(transparent)]
    Failed(#[from] StepError),
    /// The reason is in the agent's own log only.
    #[error("the reason is in the agent's own log")]
    Untold,
}

/// Takes what a step has to tell while it is at work.
pub trait StepLog {
    /// Puts `text` into the job's log.
    fn tell<'a>(&'a mut self, text: &'a str) -> LocalBoxFuture<'a, Result<(), StepError>>;
}

/// One step of bringing up the place where a job's commands run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PreparationStep {
    /// The job's log shows it, under this title.
    Shown(&'static str),
    /// It shows only if it fails.
    Hidden,
}

/// The place where a job's commands run: this machine's shell, a container, a pod.
pub trait ExecutorBackend {
    /// The steps that bring the place up.
    fn preparation(&self) -> Vec<PreparationStep>;

    /// Does one of these steps, each once and in their order. The last one answers the job's one shell
    /// session.
    fn prepare<'a>(
        &'a mut self,
        step: usize,
        log: &'a mut dyn StepLog,
    ) -> LocalBoxFuture<'a, Result<Option<Box<dyn ShellSession>>, PreparationError>>;

    /// Brings the variables to where the shell can read them, and answers the script that
    /// exports them; the values are not in its text.
    fn stage_variables<'a>(
        &'a mut self,
        variables: &'a [EnvVar],
    ) -> LocalBoxFuture<'a, Result<Script, StepError>>;

    /// The path of `file` as the log shows it.
    fn shown_path(&self, file: &InjectedFile) -> String;

    /// Puts `file` in place.
    fn inject<'a>(
        &'a mut self,
        file: &'a InjectedFile,
    ) -> LocalBoxFuture<'a, Result<(), StepError>>;
}

/// What a shell session has to say next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionEvent {
    /// Bytes of the terminal, in order.
    Output(Bytes),
    /// The script that was started is over; all of its output came before.
    ScriptEnded(ScriptEnd),
    /// There is no shell any more; all of its output came before. In words how it ended, as far as that is known.
    ShellEnded(String),
}

/// Text for a shell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Script {
    /// The text.
    pub text: String,
    /// Not to be shown by the job's `set -x` or `set -v`: it is the agent's, or holds secrets.
    pub untraced: bool,
}

/// How a script ended, in a shell that lives on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScriptEnd {
    /// The shell's `$?`.
    pub exit_code: i32,
    /// The shell's variable `SEMAPHORE_JOB_RESULT`, empty if unset.
    pub job_result: String,
}

/// One shell for the whole job.
pub trait ShellSession {
    /// Has the shell run `script`. Not called again before the script has ended.
    fn start<'a>(&'a mut self, script: &'a Script) -> LocalBoxFuture<'a, io::Result<()>>;

    /// Waits for the next event. Dropping the future loses nothing.
    fn next_event(&mut self) -> LocalBoxFuture<'_, SessionEvent>;
}

/// Processes that are still there after everything was tried.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("could not end everything that the job started: {what}")]
pub struct LeftBehind {
    /// What is left and why, for the agent's own log.
    pub what: String,
}

/// Power over everything a job started.
pub trait Containment {
    /// Sees to it that the session's shell runs no command of the job any more, from now on. Its EXIT trap may still run
    /// when everything is ended.
    fn kill_shell(&self);

    /// Kills what the session's shell waits for; it goes on with what comes next.
    fn kill_foreground(&self);

    /// Kills everything, and the session's shell with it, whose end the session notices.
    fn kill_all(&self);

    /// Asks everything to end, waits `grace` at most, kills what is left. Resolves when nothing is
    /// left, or with what could not be ended. Another call while one is at work shortens its grace.
    fn end_everything(&self, grace: Duration) -> LocalBoxFuture<'static, Result<(), LeftBehind>>;

    /// Ends the shell, within `grace`, and leaves alone what a hangup does not end. Resolves when the
    /// shell is gone; from then on the rest is no part of the job any more.
    fn release(&self, grace: Duration) -> LocalBoxFuture<'static, Result<(), LeftBehind>>;
}

/// A log as its readers have it: open, whatever becomes of the file's name.
pub trait LogSource: Send + Sync + fmt::Debug {
    /// Reads from `offset` on, in bytes; 0 bytes at the end. Never waits for anybody.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;

    /// Makes the log a file of this new name as well; fails if there is one.
    fn keep_as(&self, path: &Path) -> io::Result<()>;
}

/// A change that another process made to the file of a log. A job can make one: it runs as the agent's user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ForeignChange {
    /// It is not at its place any more, or something else is.
    #[error("its file was removed or replaced")]
    Removed,
    /// Only so many of its bytes are left.
    #[error("its file was cut")]
    Cut(u64),
    /// Somebody else wrote to its end.
    #[error("somebody else wrote to its file")]
    Grown,
    /// Bytes of it are not those that were written.
    #[error("its file was overwritten")]
    Overwritten,
}

/// An append-only file of lines that outlives a crash of the actor that writes it.
pub trait LogSpool: Send + fmt::Debug {
    /// Writes whole lines at the end. Fails while there is still room for [`Self::append_last_words`].
    fn append(&mut self, lines: &[u8]) -> io::Result<()>;

    /// Writes the last lines, up to a few kilobytes, for which room is kept.
    fn append_last_words(&mut self, lines: &[u8]) -> io::Result<()>;

    /// Looks for what somebody else did since the file was made, written or cut here.
    fn foreign_change(&self) -> io::Result<Option<ForeignChange>>;

    /// Compares all bytes with what was written, which takes about a millisecond for each megabyte. A difference is told
    /// once; from then on, what is there now counts as written.
    fn check_bytes(&mut self) -> io::Result<Option<ForeignChange>>;

    /// Reads from `offset` on; 0 bytes at the end.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;

    /// Cuts everything from `length` bytes on.
    fn truncate(&mut self, length: u64) -> io::Result<()>;

    /// The same file for readers.
    fn source(&self) -> Arc<dyn LogSource>;

    /// Another handle on the same file.
    fn reopen(&self) -> io::Result<Box<dyn LogSpool>>;

    /// Whether who writes may have to wait, and so needs a thread of its own.
    fn may_block(&self) -> bool {
        true
    }
}

/// What lets people log in to where a job runs (PROTOCOL: "SSH jump point").
pub trait JumpPointFiles {
    /// Lets in who has one of `keys`, which are lines of `authorized_keys`.
    fn open(&self, keys: Vec<Bytes>) -> LocalBoxFuture<'static, io::Result<()>>;

    /// Takes back exactly what `open` added. Doing it twice, or without `open`, is no error.
    fn close(&self) -> LocalBoxFuture<'static, io::Result<()>>;

    /// The same, unless somebody is logged in: `false` then.
    fn close_if_unused(&self) -> LocalBoxFuture<'static, io::Result<bool>>;
}

/// One message to a platform about a job's end.
#[derive(Clone, PartialEq, Eq)]
pub struct Callback {
    /// Where it goes.
    pub url: String,
    /// What the agent proves itself with.
    pub token: Option<String>,
    /// JSON.
    pub body: String,
}

/// The body only: a URL may be pre-signed.
impl fmt::Debug for Callback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "callback {}", self.body)
    }
}

/// Why a platform did not take a callback; without URL and token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallbackError {
    /// It never will: the URL or the token can't be used.
    #[error("{0}")]
    Unusable(String),
    /// It may later.
    #[error("{0}")]
    Failed(String),
}

/// Sends callbacks.
pub trait CallbackSender {
    /// Sends one, once.
    fn send(&self, callback: &Callback) -> LocalBoxFuture<'static, Result<(), CallbackError>>;
}

/// Keeps whole logs as artifacts (PROTOCOL: "Job logs as an artifact").
pub trait LogUploads {
    /// Uploads the log that is in `log`, if that is wanted; answers why it could not be done.
    /// `trimmed` tells whether the platform has not kept all of it.
    fn upload<'a>(
        &'a self,
        job: &'a Job,
        log: &'a LogRange,
        trimmed: bool,
    ) -> LocalBoxFuture<'a, Result<(), String>>;
}

/// Some whole lines of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogBatch {
    /// How many.
    pub lines: u64,
    /// With their newlines.
    pub bytes: Bytes,
}

/// Why a log server did not take a batch; without URL and token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PushError {
    /// The token is not good any more.
    #[error("the token is refused")]
    Unauthorized,
    /// The space for this job's log is used up.
    #[error("the space for this job's log is used up")]
    QuotaUsedUp,
    /// There were too many lines.
    #[error("the batch is too large")]
    TooLarge,
    /// There was no answer in time.
    #[error("there was no answer in time")]
    TimedOut,
    /// The log server can't be reached, or says that it is in trouble: it may have lost what it had.
    #[error("{0}")]
    Away(String),
    /// Anything else, which may pass.
    #[error("{0}")]
    Failed(String),
}

/// Brings logs to the platform (PROTOCOL: "Pushing logs").
pub trait LogUplink {
    /// Reads lines from the start of `range`: as many as there are, but no more than either limit,
    /// and one line at least.
    fn read(
        &self,
        range: &LogRange,
        most_lines: u64,
        most_bytes: u64,
    ) -> LocalBoxFuture<'static, io::Result<LogBatch>>;

    /// Sends lines, of which the first has this number.
    fn push(
        &self,
        target: &PushTarget,
        first_line: u64,
        batch: LogBatch,
    ) -> LocalBoxFuture<'static, Result<(), PushError>>;

    /// Gets a new token for logs.
    fn refresh_token(&self) -> LocalBoxFuture<'static, Result<String, HubError>>;

    /// Puts a log that was not delivered where it stays; answers where that is.
    fn keep(&self, job: &JobId, log: &LogRange) -> io::Result<PathBuf>;

    /// Removes what `keep` has put there, as it is delivered.
    fn remove_kept(&self, kept: &Path) -> io::Result<()>;
}

/// Why the control plane did not do what it was asked for; without tokens.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HubError {
    /// It may later.
    #[error("{0}")]
    Failed(String),
    /// What it answered can't be used, and won't change.
    #[error("{0}")]
    Unusable(String),
    /// Its answer began and broke off.
    #[error("the answer broke off: {0}")]
    BrokeOff(String),
    /// It does not accept the agent's token.
    #[error("{0}")]
    Unauthorized(String),
    /// It does not know the agent, or has no such page.
    #[error("{0}")]
    NotFound(String),
    /// An agent of this name is registered. After a crash that ends within minutes.
    #[error("{0}")]
    NameTaken(String),
    /// The job is not to be had any more, as one that was stopped before it ran.
    #[error("the job is not available any more")]
    JobGone,
}

impl HubError {
    /// Whether it makes sense to ask again.
    pub fn may_pass(&self) -> bool {
        !matches!(self, Self::Unusable(_) | Self::JobGone)
    }
}

/// The control plane of an agent that asks for its jobs (PROTOCOL: "`agent start`: the self-hosted
/// API"). Every call ends within a bounded time.
pub trait HubApi {
    /// Registers the agent.
    fn register(&self) -> LocalBoxFuture<'static, Result<(), HubError>>;

    /// Tells what the agent is doing, and asks what it is to do.
    fn sync(&self, report: &Report) -> LocalBoxFuture<'static, Result<Answer, HubError>>;

    /// Gets a job.
    fn fetch_job(&self, id: &JobId) -> LocalBoxFuture<'static, Result<Job, HubError>>;

    /// Takes the agent off the list.
    fn disconnect(&self) -> LocalBoxFuture<'static, Result<(), HubError>>;
}

/// Where measurements go. Never fails a job: what can't be sent is dropped.
pub trait MetricsSink {
    /// Adds one to a counter.
    fn count(&mut self, name: &str, tag: &str);

    /// Records how long something took.
    fn time(&mut self, name: &str, duration: Duration, tag: &str);
}

/// A sink for agents without a metrics server.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiscardMetrics;

impl MetricsSink for DiscardMetrics {
    fn count(&mut self, _name: &str, _tag: &str) {}

    fn time(&mut self, _name: &str, _duration: Duration, _tag: &str) {}
}
