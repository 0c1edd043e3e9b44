//! What the actors need from the outside world: implemented by the binary, scripted in
//! the `testing` module.
//!
//! Rules for all ports, unless a method says otherwise:
//! - Calls come from the thread of the actor that owns the port. A method that returns no future
//!   must not block for long, because it holds up every other actor of that thread.
//! - A future may be dropped at any await point, by a stop or a deadline. Its effect is then
//!   unknown, and the port's other methods must cope with either.
//! - Errors are for logs: they hold no secret (no value of a variable, no token, no URL).

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

/// The parts that belong to one job, made afresh for each.
pub struct JobParts {
    /// Prepares the place where the job's commands run. Owned by the executor.
    pub backend: Box<dyn ExecutorBackend>,
    /// Ends everything that the job started. Owned by the supervisor, as it must work after a crash
    /// of the executor.
    pub containment: Box<dyn Containment>,
    /// The job's log file, empty.
    pub spool: Box<dyn LogSpool>,
    /// SSH access to the running job; `None` where it is not offered.
    pub jump_point: Option<Rc<dyn JumpPointFiles>>,
}

/// A second place for a stopped job, whose first one is being ended: the post-job hook runs there.
pub struct SparePlace {
    /// Prepares the place.
    pub backend: Box<dyn ExecutorBackend>,
    /// Ends everything that was started in the place.
    pub containment: Box<dyn Containment>,
}

/// Makes the parts of each job.
pub trait JobPartsFactory {
    /// Makes the parts of `job`, and starts nothing.
    ///
    /// Called when a job is admitted. If it fails, the supervisor drops the parts of the previous
    /// job (its log may fill the disk) and calls it once more; a second failure refuses the job.
    /// Dropping the parts must remove everything that was made for them.
    fn make(&self, job: &Job) -> io::Result<JobParts>;

    /// Checks whether [`Self::make`] would succeed now (it fails while the disk is full, for
    /// example). Leaves nothing behind. Called before each report that asks for a job.
    fn check(&self) -> io::Result<()>;

    /// Makes a place for the post-job hook of a stopped `job`.
    ///
    /// Called at most once for a job, while the first place is being ended: the two share nothing.
    fn make_spare_place(&self, job: &Job) -> io::Result<SparePlace>;
}

/// Why a step failed, in words for the job's log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct StepError(pub String);

/// Why the place for a job's commands could not be prepared.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PreparationError {
    /// The reason is put into the job's log.
    #[error(transparent)]
    Failed(#[from] StepError),
    /// The backend has put the reason into the agent's own log, and the job's log must not show it.
    #[error("the reason is in the agent's own log")]
    Untold,
}

/// The job's log, as a preparation step sees it.
pub trait StepLog {
    /// Appends `text` to the output of the current step; it may have any length, and CRLF in it
    /// becomes LF. Resolves when the text is in the log.
    ///
    /// In a [hidden](PreparationStep::Hidden) step, the first call makes the step visible.
    ///
    /// Fails if the log can't be written; the caller need not repeat the text elsewhere.
    fn tell<'a>(&'a mut self, text: &'a str) -> LocalBoxFuture<'a, Result<(), StepError>>;
}

/// One step of preparing the place where a job's commands run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PreparationStep {
    /// The job's log always shows the step, with this title.
    Shown(&'static str),
    /// The job's log shows the step only if it fails or calls [`StepLog::tell`].
    Hidden,
}

/// The place where a job's commands run: a shell of this machine, or containers.
///
/// Order of calls: [`Self::preparation`]; [`Self::prepare`] for each step until one fails; then,
/// once the last step has opened the session and only while no script runs,
/// [`Self::stage_variables`] and [`Self::inject`] in any number.
///
/// Calls never overlap. A stop drops the future at work, and no other method is called after that.
/// Whatever a dropped future has started, or is about to start, is for the job's [`Containment`] to
/// end, which must know of it before it exists.
pub trait ExecutorBackend {
    /// Returns the steps of the preparation, in their order. Pure: the same steps at every call.
    fn preparation(&self) -> Vec<PreparationStep>;

    /// Does step number `step` (from 0 on). Each step is done once, in order, and none after one
    /// that failed.
    ///
    /// The last step returns the job's shell session, each earlier one `None`.
    fn prepare<'a>(
        &'a mut self,
        step: usize,
        log: &'a mut dyn StepLog,
    ) -> LocalBoxFuture<'a, Result<Option<Box<dyn ShellSession>>, PreparationError>>;

    /// Puts the variables where the shell can read them, and nobody but the job's user. Returns the
    /// script that exports them, without their values in its text; the executor runs it next.
    ///
    /// Called for the job's own variables first (unless there are none), then for
    /// `SEMAPHORE_JOB_RESULT`.
    fn stage_variables<'a>(
        &'a mut self,
        variables: &'a [EnvVar],
    ) -> LocalBoxFuture<'a, Result<Script, StepError>>;

    /// Returns the path of `file` as the job's log shows it (docs/protocol.md: "The sequence of a job",
    /// `Injecting Files`). Pure.
    fn shown_path(&self, file: &InjectedFile) -> String;

    /// Writes `file`, with its mode, and makes missing parent directories. An existing file is
    /// replaced. On an error no further file is injected.
    fn inject<'a>(
        &'a mut self,
        file: &'a InjectedFile,
    ) -> LocalBoxFuture<'a, Result<(), StepError>>;
}

/// The next event of a shell session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionEvent {
    /// Bytes that the terminal received, in order and never empty.
    Output(Bytes),
    /// The started script has ended. All of its output came before.
    ScriptEnded(ScriptEnd),
    /// The shell has ended. All of its output came before. The text says how it ended (`exit code
    /// 1`, `killed by SIGKILL`), and is empty if that is not known.
    ShellEnded(String),
}

/// Bash source for the job's shell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Script {
    /// The source, of any number of lines.
    pub text: String,
    /// Hides the script from the job's `set -x` and `set -v`: it is the agent's own, or reads
    /// secrets.
    pub untraced: bool,
}

/// How a script ended in a shell that lives on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScriptEnd {
    /// The shell's `$?`.
    pub exit_code: i32,
    /// The value of the shell's variable `SEMAPHORE_JOB_RESULT`; empty if unset.
    pub job_result: String,
}

/// The shell that runs all scripts of a job, one after another.
///
/// After [`SessionEvent::ShellEnded`] the session is not used any more.
pub trait ShellSession {
    /// Hands `script` to the shell, and resolves without waiting for its end. Not called while a
    /// script runs. It must be quick, as a stop does not interrupt it.
    ///
    /// On an error the script does not run and has no [`SessionEvent::ScriptEnded`]; the session
    /// can be tried with another one.
    fn start<'a>(&'a mut self, script: &'a Script) -> LocalBoxFuture<'a, io::Result<()>>;

    /// Waits for the next event. Dropping the future loses no event.
    ///
    /// Polled while a script runs and, at the job's end, until the shell has ended: a terminal that
    /// nobody reads would keep its processes from ending. What the shell prints between two scripts
    /// joins the output of the second one.
    fn next_event(&mut self) -> LocalBoxFuture<'_, SessionEvent>;
}

/// Processes or containers of a job that could not be ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("could not end everything that the job started: {what}")]
pub struct LeftBehind {
    /// What is left and why, for the agent's own log.
    pub what: String,
}

/// Ends what a job started, in whole or in part.
///
/// All methods may be called at any moment, in any order, any number of times: before anything was
/// started, during the preparation, and after a crash of the executor or of the job's task. What
/// does not exist (any more) is skipped without an error. The `kill_` methods only send a request,
/// and return at once.
///
/// [`Self::end_everything`] or [`Self::release`] is called for every job. From that call on, the
/// place refuses to start anything new.
pub trait Containment {
    /// Keeps the session's shell from running any further command of the job. Its processes may
    /// live on, and the shell may still run its EXIT trap during [`Self::end_everything`].
    ///
    /// The first act of every stop: whatever ends the running command next must not let the shell
    /// go on to the one behind it.
    fn kill_shell(&self);

    /// Kills the foreground processes that the shell waits for; the shell goes on behind them.
    ///
    /// An implementation that can't tell these processes does nothing, so callers wait with a time
    /// limit and then resort to [`Self::kill_all`] or an abort.
    fn kill_foreground(&self);

    /// Kills everything, the session's shell included. The session then reports
    /// [`SessionEvent::ShellEnded`], and the job's steps go on to fail.
    fn kill_all(&self);

    /// Asks everything to end (SIGTERM, or a hangup for the shell), kills after `grace` what is
    /// left, and removes what was made for the job. Resolves within a bounded time: with success
    /// once nothing is left, else with what could not be ended.
    ///
    /// The grace begins anew for the shell's EXIT trap. A second call while one is at work can only
    /// shorten the grace, and both resolve at the end; a later call is harmless. If the
    /// future is dropped, another call must be made to complete the work.
    ///
    /// The terminal is to be read meanwhile (see [`ShellSession::next_event`]).
    fn end_everything(&self, grace: Duration) -> LocalBoxFuture<'static, Result<(), LeftBehind>>;

    /// Hangs up on the shell, kills it after `grace`, and spares what survives the hangup
    /// (daemons). Resolves when the shell is gone; what is left is then no part of the job any
    /// more, and a later [`Self::end_everything`] does not touch it.
    ///
    /// Called instead of [`Self::end_everything`], once, and only for a job that was not stopped.
    /// Where nothing can outlive the place, as in a container, the two are the same.
    fn release(&self, grace: Duration) -> LocalBoxFuture<'static, Result<(), LeftBehind>>;
}

/// A job's log for its readers: an open file, readable even after its name was removed or reused.
///
/// Read concurrently by any number of threads, and while the [`LogSpool`] appends. Readers stop at
/// the end that the log buffer has published ([`LogRange::end`]): behind it may be half a line.
pub trait LogSource: Send + Sync + fmt::Debug {
    /// Reads from byte `offset` on. Returns the number of bytes read; 0 at the end of the file.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;

    /// Gives the file the additional name `path`, or copies it there where no link is possible.
    /// Fails with [`io::ErrorKind::AlreadyExists`] if there is something.
    fn keep_as(&self, path: &Path) -> io::Result<()>;
}

/// A change that another process made to a log's file. A job can do that: it runs as the agent's
/// user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ForeignChange {
    /// The file's name was removed, or is that of another file now. The open file is unharmed.
    #[error("its file was removed or replaced")]
    Removed,
    /// The file was cut to this many bytes.
    #[error("its file was truncated")]
    Cut(u64),
    /// Another process appended to the file.
    #[error("another process wrote to its file")]
    Grown,
    /// Bytes within the file differ from those that were written.
    #[error("its file was overwritten")]
    Overwritten,
}

/// The writer of a job's log file: only appended to, and only in whole lines.
///
/// One handle writes at a time: that of the log buffer. When the buffer crashes, its successor gets
/// another one by [`Self::reopen`].
pub trait LogSpool: Send + fmt::Debug {
    /// Appends whole lines, newlines included. Fails early enough that there is room left for
    /// [`Self::append_last_words`].
    ///
    /// After an error a part of the lines may be in the file: the caller truncates it to its last
    /// whole line.
    fn append(&mut self, lines: &[u8]) -> io::Result<()>;

    /// Appends a log's last lines, a few kilobytes in all, into the room that [`Self::append`]
    /// leaves.
    fn append_last_words(&mut self, lines: &[u8]) -> io::Result<()>;

    /// Compares the file's length and name with what this handle has written. Cheap: done before
    /// each line and for each reader.
    ///
    /// Returns the same change at each call until [`Self::truncate`] accepts it;
    /// [`ForeignChange::Removed`] for good. Never returns [`ForeignChange::Overwritten`].
    fn foreign_change(&self) -> io::Result<Option<ForeignChange>>;

    /// Compares all bytes with those that were written; about 1 ms for each megabyte. Returns
    /// [`ForeignChange::Overwritten`] once for each difference: the bytes found count as written
    /// then.
    fn check_bytes(&mut self) -> io::Result<Option<ForeignChange>>;

    /// Reads from byte `offset` on. Returns the number of bytes read; 0 at the end of the file.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;

    /// Cuts the file to `length` bytes, which must all be there. The next line is appended there,
    /// and the first `length` bytes, as found, count as written.
    fn truncate(&mut self, length: u64) -> io::Result<()>;

    /// Returns the same file for readers.
    fn source(&self) -> Arc<dyn LogSource>;

    /// Returns another handle on the same file, even if its name is gone. The new handle may not
    /// know the current length: [`Self::truncate`] comes first, before anything is appended or
    /// checked.
    fn reopen(&self) -> io::Result<Box<dyn LogSpool>>;

    /// Whether the calls do I/O, so that the log buffer needs a thread of its own.
    fn may_block(&self) -> bool {
        true
    }
}

/// SSH access to the place where a job runs: keys, script and login profile (docs/protocol.md: "SSH
/// access").
///
/// [`Self::open`] is called at most once, before the preparation; [`Self::close`] at the end of
/// every job, whether `open` was called or not, succeeded or not. Dropping a future neither undoes
/// its work nor need stop it. Access that is not available never fails a job.
pub trait JumpPointFiles {
    /// Admits the owners of `keys`, each one line of `authorized_keys`.
    ///
    /// After an error a part may be set up, and is offered nevertheless.
    fn open(&self, keys: Vec<Bytes>) -> LocalBoxFuture<'static, io::Result<()>>;

    /// Removes exactly what `open` added, and kills what people who logged in with the job's keys
    /// still run. Idempotent, and no error without `open`.
    fn close(&self) -> LocalBoxFuture<'static, io::Result<()>>;

    /// Closes if nobody is logged in. Returns whether it did. Polled every few seconds between the
    /// job's clean-up and its end; after an error only [`Self::close`] is tried.
    fn close_if_unused(&self) -> LocalBoxFuture<'static, io::Result<bool>>;
}

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
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallbackError {
    /// Permanent: the URL or the token is not valid.
    #[error("{0}")]
    Unusable(String),
    /// Transient: no connection, no answer in time, or a status other than 2xx.
    #[error("{0}")]
    Failed(String),
}

/// Sends callbacks.
pub trait CallbackSender {
    /// Makes one attempt, which ends within a bounded time. The caller repeats it after
    /// [`CallbackError::Failed`].
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
    ) -> LocalBoxFuture<'a, Result<(), String>>;
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
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
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
    #[error("{0}")]
    Away(String),
    /// Any other failure, taken for a transient one.
    #[error("{0}")]
    Failed(String),
}

/// Reads logs and sends them to the platform (docs/protocol.md: "Pushing logs").
///
/// For one job [`Self::read`], [`Self::push`] and [`Self::refresh_token`] are called one at a time,
/// in the order of the lines; [`Self::keep`] may come in between.
pub trait LogUplink {
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

    /// Sends `batch`, whose first line has the number `first_line` (0 based), and resolves when the
    /// platform has acknowledged it. Makes one attempt, which ends within a bounded time.
    ///
    /// The platform replaces everything from `first_line` on, so sending again is always safe, also
    /// from line 0.
    fn push(
        &self,
        target: &PushTarget,
        first_line: u64,
        batch: LogBatch,
    ) -> LocalBoxFuture<'static, Result<(), PushError>>;

    /// Gets a new log token for [`PushTarget::token`]. Called after [`PushError::Unauthorized`].
    fn refresh_token(&self) -> LocalBoxFuture<'static, Result<String, HubError>>;

    /// Keeps the whole of a log whose delivery was given up, beyond the job's end. Returns the path
    /// of the kept file.
    ///
    /// Called at most once for a job, while pushing may go on in the background. The oldest kept
    /// logs may be removed to make room.
    fn keep(&self, job: &JobId, log: &LogRange) -> io::Result<PathBuf>;

    /// Removes a file that `keep` has returned, because its log was delivered after all.
    fn remove_kept(&self, kept: &Path) -> io::Result<()>;
}

/// Why a request to the control plane failed. The texts are fit for the agent's log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HubError {
    /// Transient: no connection, no answer in time, or an answer that may be another one next time.
    #[error("{0}")]
    Failed(String),
    /// Permanent: the request is refused for good, or its answer is not valid.
    #[error("{0}")]
    Unusable(String),
    /// The answer began, but did not arrive whole.
    #[error("the answer broke off: {0}")]
    BrokeOff(String),
    /// The control plane does not accept the agent's token (401).
    #[error("{0}")]
    Unauthorized(String),
    /// The control plane does not know the agent (404).
    #[error("{0}")]
    NotFound(String),
    /// An agent with this name is registered: the same one, within minutes of a crash, or another.
    #[error("{0}")]
    NameTaken(String),
    /// The job can't be fetched any more, for example because it was stopped.
    #[error("the job is not available any more")]
    JobGone,
}

impl HubError {
    /// Whether another attempt may succeed.
    pub fn may_pass(&self) -> bool {
        !matches!(self, Self::Unusable(_) | Self::JobGone)
    }
}

/// The control plane of a self-hosted agent (docs/protocol.md: "The self-hosted API").
///
/// Every call is one attempt that ends within a bounded time; the caller repeats it where that is
/// safe. After a dropped future the control plane may have got the request.
///
/// Order of calls: [`Self::register`] until it succeeds, then [`Self::sync`] again and again, with
/// [`Self::fetch_job`] beside it, then [`Self::disconnect`]. An agent that the control plane has
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
    /// begun but does not arrive must be [`HubError::Unusable`], which is not repeated.
    ///
    /// Fails with [`HubError::JobGone`] if the job was stopped meanwhile. Dropped when the job is
    /// to be stopped before it is here.
    fn fetch_job(&self, id: &JobId) -> LocalBoxFuture<'static, Result<Job, HubError>>;

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
