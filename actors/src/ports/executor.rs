//! What runs a job, ends it, and lets people in.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;

use super::LogSpool;
use crate::errors::{Cause, ErrorOf};
use crate::job::{EnvVar, InjectedFile, Job};

/// The parts that belong to one job, made afresh for each.
pub struct JobParts {
    /// Prepares the place where the job's commands run. Owned by the executor.
    pub backend: Box<dyn ExecutorBackend>,
    /// Ends everything that the job started. Shared by the supervisor and the job's task, as it must
    /// work after a crash of either, or of the executor.
    pub containment: Box<dyn Containment>,
    /// The job's log file, empty.
    pub spool: Box<dyn LogSpool>,
    /// SSH access to the running job; `None` where it is not offered.
    pub jump_point: Option<Rc<dyn SshAccessFiles>>,
}

/// A place where commands of a job run, and what ends everything in it.
pub struct Place {
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
    fn make_spare_place(&self, job: &Job) -> io::Result<Place>;
}

/// Why a step failed. The job's log shows it with its causes.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct StepError(Cause);

impl StepError {
    /// Creates an error from a cause, or from a text.
    pub fn new(cause: impl Into<Cause>) -> Self {
        Self(cause.into())
    }

    /// Creates the error of one object, such as a file or a container, from its cause or from a text.
    pub fn of(object: impl Into<String>, cause: impl Into<Cause>) -> Self {
        Self::new(ErrorOf::new(object, cause))
    }
}

/// Why the place for a job's commands could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum PreparationError {
    /// The reason is put into the job's log.
    #[error(transparent)]
    Failed(#[from] StepError),
    /// The backend has put the reason into the agent's own log, and the job's log must not show it.
    #[error("the reason is in the agent's own log")]
    NotShown,
}

/// The job's log, as a preparation step sees it.
pub trait StepLog {
    /// Appends `text` to the output of the current step; it may have any length, and CRLF in it
    /// becomes LF. Resolves when the text is in the log.
    ///
    /// In a [hidden](PreparationStep::Hidden) step, the first call makes the step visible.
    ///
    /// Fails if the log can't be written; the caller need not repeat the text elsewhere.
    fn print<'a>(&'a self, text: &'a str) -> LocalBoxFuture<'a, Result<(), StepError>>;
}

/// One step of preparing the place where a job's commands run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PreparationStep {
    /// The job's log always shows the step, with this title.
    Shown(&'static str),
    /// The job's log shows the step only if it fails or calls [`StepLog::print`].
    Hidden,
}

/// What a step of the preparation has led to.
pub enum Prepared {
    /// Another step comes next.
    Next,
    /// The place is ready, and this is the job's shell session in it.
    Ready(Box<dyn ShellSession>),
}

/// The place where a job's commands run: a shell of this machine, or containers.
///
/// Order of calls: [`Self::next_step`] and [`Self::prepare`] in turn, until a step fails or the
/// place is [ready](Prepared::Ready); then, only while no script runs,
/// [`Self::stage_variables`] and [`Self::inject`] in any number.
///
/// Calls never overlap. A stop drops the future at work, and no other method is called after that.
/// Whatever a dropped future has started, or is about to start, is for the job's [`Containment`] to
/// end, which must know of it before it exists.
pub trait ExecutorBackend {
    /// Returns the step that the next [`Self::prepare`] does. Pure.
    fn next_step(&self) -> PreparationStep;

    /// Does the next step of the preparation.
    fn prepare<'a>(
        &'a mut self,
        log: &'a dyn StepLog,
    ) -> LocalBoxFuture<'a, Result<Prepared, PreparationError>>;

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

/// What is ended at the end of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Everything that the job started.
    Everything,
    /// The shell, and everything that does not survive its hangup. The rest (daemons) is no part of
    /// the job from then on. Where nothing can outlive the place, as in a container, the same as
    /// [`Self::Everything`].
    AllButDaemons,
}

/// Ends what a job started, in whole or in part.
///
/// All methods may be called at any moment, in any order, any number of times: before anything was
/// started, during the preparation, and after a crash of the executor or of the job's task. What
/// does not exist (any more) is skipped without an error. The `kill_` methods only send a request,
/// and return at once.
pub trait Containment {
    /// Keeps the session's shell from running any further command of the job. Its processes may
    /// live on, and the shell may still run its EXIT trap during [`Self::end`].
    ///
    /// The first act of every stop: whatever ends the running command next must not let the shell
    /// go on to the one behind it.
    fn kill_shell(&self);

    /// Kills the foreground processes that the shell waits for; the shell goes on behind them.
    ///
    /// Returns `false` if the implementation can't tell these processes from others, and has killed
    /// none; the caller resorts to [`Self::end`] or an abort, as it does if the shell does not go on
    /// within some time.
    fn kill_foreground(&self) -> bool;

    /// Asks `what` to end (SIGTERM, or a hangup for the shell), kills after `grace` what is left,
    /// and removes what was made for the job. Resolves within a bounded time: with success once
    /// nothing of it is left, else with what could not be ended.
    ///
    /// Called for every job. From the first call on, the place refuses to start anything new, and
    /// the session reports [`SessionEvent::ShellEnded`]. The terminal is to be read until then (see
    /// [`ShellSession::next_event`]).
    ///
    /// The grace begins anew for the shell's EXIT trap. An implementation that can't signal processes
    /// may ignore it. A second call while one is at work can only
    /// shorten the grace, and both resolve at the end; a later call is harmless. If the
    /// future is dropped, another call must be made to complete the work.
    ///
    /// [`End::AllButDaemons`] is for a job that was not stopped. A later call with
    /// [`End::Everything`] does not touch what has become a daemon.
    fn end(&self, what: End, grace: Duration) -> LocalBoxFuture<'static, Result<(), LeftBehind>>;
}

/// SSH access to the place where a job runs: keys, script and login profile (docs/protocol.md: "SSH
/// access").
///
/// [`Self::open`] is called at most once, before the preparation; [`Self::close`] at the end of
/// every job, whether `open` was called or not, succeeded or not. Dropping a future neither undoes
/// its work nor need stop it. Access that is not available never fails a job.
pub trait SshAccessFiles {
    /// Admits the owners of `keys`, each one line of `authorized_keys`.
    ///
    /// After an error a part may be set up, and is offered nevertheless.
    fn open(&self, keys: Vec<Bytes>) -> LocalBoxFuture<'static, io::Result<()>>;

    /// Removes exactly what `open` added, and kills the login shells and script sessions that people
    /// opened with the job's keys. Idempotent, and no error without `open`.
    fn close(&self) -> LocalBoxFuture<'static, io::Result<()>>;

    /// Closes if nobody is logged in. Returns whether it did. Polled every few seconds between the
    /// job's clean-up and its end; after an error only [`Self::close`] is tried.
    fn close_if_unused(&self) -> LocalBoxFuture<'static, io::Result<bool>>;
}
