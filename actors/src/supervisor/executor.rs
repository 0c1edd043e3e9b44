//! Owns the place where one job's commands run, and its one shell session.
//!
//! Receives [`GetNextStep`] and [`Prepare`], then [`Export`], [`ShownPath`], [`Inject`] and
//! [`RunCommand`] one at a time, [`Abort`] and [`GoOnWithoutLog`] at any moment, and [`Discard`] at
//! the end. Writes the session's output to the job's log, awaited.
//!
//! The reply to a message is the only end of that work, and comes after all of its output was
//! appended. After the shell's end, every message that needs it fails at once.

use std::future::Future;
use std::io;
use std::rc::Rc;

use actix::prelude::*;
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::job::{EnvVar, InjectedFile};
use crate::log::buffer::LogError;
use crate::log::writer::{LogWriter, OutputShape};
use crate::ports::{
    ExecutorBackend, PreparationError, PreparationStep, Prepared, Script, ScriptEnd, SessionEvent,
    ShellSession, StepError, StepLog,
};

/// Returns the next step of the preparation (see [`ExecutorBackend::next_step`]).
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Result<PreparationStep, ExecutorError>")]
pub struct GetNextStep;

/// Does the next step of the preparation.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Result<Preparation, ExecutorError>")]
pub struct Prepare;

/// Whether the preparation is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preparation {
    /// Another step follows.
    Next,
    /// The place is ready to run scripts.
    Done,
}

/// Exports variables in the session.
#[derive(Debug, Message)]
#[rtype(result = "Result<ScriptEnd, ExecutorError>")]
pub struct Export {
    /// The variables to set and export.
    pub variables: Vec<EnvVar>,
}

/// Returns the path of a file as the job's log shows it.
#[derive(Debug, Message)]
#[rtype(result = "Result<String, ExecutorError>")]
pub struct ShownPath {
    /// The file to be injected.
    pub file: InjectedFile,
}

/// Writes a file where the job wants it.
#[derive(Debug, Message)]
#[rtype(result = "Result<(), ExecutorError>")]
pub struct Inject {
    /// The file to write.
    pub file: InjectedFile,
}

/// Runs a script in the session.
#[derive(Debug, Message)]
#[rtype(result = "Result<ScriptEnd, ExecutorError>")]
pub struct RunCommand {
    /// The script to run.
    pub script: Script,
}

/// Gives up the work in progress: it and all later work fail with [`ExecutorError::Aborted`].
/// Output that was read from the terminal is still appended. Ends no process: that is for the
/// containment.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct Abort;

/// From now on, drops output that can't be appended instead of failing. Sent after
/// a line was lost ([`ExecutorError::Log`]); the reply comes when the script that still runs, if any, has
/// ended.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Result<(), ExecutorError>")]
pub struct GoOnWithoutLog;

/// Reads the terminal and drops the output, until the shell has ended.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct Discard;

/// Why a message to the executor failed.
#[derive(Debug, thiserror::Error)]
pub enum ExecutorError {
    /// The step failed, with a reason for the job's log.
    #[error(transparent)]
    Step(#[from] StepError),
    /// The preparation failed, and the job's log must not show the reason
    /// (see [`PreparationError::NotShown`]).
    #[error("the reason is in the agent's own log")]
    NotShown,
    /// The shell ended while the script ran (see [`SessionEvent::ShellEnded`] for the text).
    #[error("the job's shell ended {0}")]
    ShellEnded(String),
    /// The shell has ended, or was never there.
    #[error("the job's shell has ended, so this can't run")]
    NoShell,
    /// [`Abort`] was received.
    #[error("aborted")]
    Aborted,
    /// Output could not be written. If only [a line is lost](LogError::is_lost_line), the script
    /// still runs; else there is no log any more.
    #[error(transparent)]
    Log(#[from] LogError),
}

#[derive(Debug, thiserror::Error)]
#[error("the script can't be handed to the shell")]
struct ScriptNotStarted {
    source: io::Error,
}

impl From<PreparationError> for ExecutorError {
    fn from(error: PreparationError) -> Self {
        match error {
            PreparationError::Failed(error) => Self::Step(error),
            PreparationError::NotShown => Self::NotShown,
        }
    }
}

/// Runs one job's scripts. See the [module](self).
pub struct Executor {
    work: Rc<Mutex<Work>>,
    aborted: CancellationToken,
}

struct Work {
    backend: Box<dyn ExecutorBackend>,
    session: Option<Box<dyn ShellSession>>,
    /// A script was started, and has not ended as far as the session has told.
    script_runs: bool,
    output: Output,
}

/// The output of the session on its way into the job's log.
struct Output {
    log: Rc<LogWriter>,
    /// Set by [`GoOnWithoutLog`].
    may_be_lost: bool,
}

impl Output {
    async fn send(&self) -> Result<(), ExecutorError> {
        self.written(self.log.send().await)
    }

    async fn send_full_lines(&self) -> Result<(), ExecutorError> {
        self.written(self.log.send_full_lines().await)
    }

    async fn finish(&self) -> Result<(), ExecutorError> {
        self.written(self.log.finish_output().await)
    }

    fn written(&self, written: Result<(), LogError>) -> Result<(), ExecutorError> {
        match written {
            Err(error) if error.is_lost_line() && self.may_be_lost => Ok(()),
            written => Ok(written?),
        }
    }
}

impl StepLog for Output {
    fn print<'a>(&'a self, text: &'a str) -> LocalBoxFuture<'a, Result<(), StepError>> {
        async move {
            self.log.print(text).await.map_err(StepError::new)?;
            self.log.problem().map_or(Ok(()), |problem| Err(StepError::new(problem)))
        }
        .boxed_local()
    }
}

impl Executor {
    /// Creates an executor that writes the session's output to `log`.
    pub(crate) fn new(backend: Box<dyn ExecutorBackend>, log: Rc<LogWriter>) -> Self {
        let output = Output { log, may_be_lost: false };
        let work = Work { backend, session: None, script_runs: false, output };
        Self { work: Rc::new(Mutex::new(work)), aborted: CancellationToken::new() }
    }

    /// Runs `step` once all earlier work has ended. `step` must heed the abort token.
    fn reply_with<T, F>(&self, step: F) -> ResponseActFuture<Self, Result<T, ExecutorError>>
    where
        T: 'static,
        F: AsyncFnOnce(&mut Work, &CancellationToken) -> Result<T, ExecutorError> + 'static,
    {
        let (work, aborted) = (Rc::clone(&self.work), self.aborted.clone());
        let reply = async move { step(&mut *work.lock().await, &aborted).await };
        Box::pin(reply.into_actor(self))
    }
}

/// Awaits `work`; an abort drops it.
async fn unless_aborted<T, E>(
    aborted: &CancellationToken,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, ExecutorError>
where
    ExecutorError: From<E>,
{
    tokio::select! {
        biased;
        () = aborted.cancelled() => Err(ExecutorError::Aborted),
        done = work => Ok(done?),
    }
}

impl Work {
    async fn run(
        &mut self,
        script: &Script,
        aborted: &CancellationToken,
    ) -> Result<ScriptEnd, ExecutorError> {
        let Some(session) = &mut self.session else {
            return Err(ExecutorError::NoShell);
        };
        session
            .start(script)
            .await
            .map_err(|error| StepError::new(ScriptNotStarted { source: error }))?;
        self.script_runs = true;
        self.follow_to_the_end(aborted).await
    }

    /// Appends the output of the running script until its end, then what is left of the text.
    async fn follow_to_the_end(
        &mut self,
        aborted: &CancellationToken,
    ) -> Result<ScriptEnd, ExecutorError> {
        let end = self.follow_script(aborted).await;
        if matches!(end, Err(ExecutorError::ShellEnded(_))) {
            self.session = None;
        }
        self.script_runs &= !matches!(end, Ok(_) | Err(ExecutorError::ShellEnded(_)));
        self.output.finish().await?;
        end
    }

    /// Appends output until the script ends.
    async fn follow_script(
        &mut self,
        aborted: &CancellationToken,
    ) -> Result<ScriptEnd, ExecutorError> {
        let Some(session) = &mut self.session else {
            return Err(ExecutorError::NoShell);
        };
        let OutputShape { gather, full, shares_lines, .. } = self.output.log.shape();
        let mut due: Option<Instant> = None;
        loop {
            let event = tokio::select! {
                biased;
                () = aborted.cancelled() => return Err(ExecutorError::Aborted),
                event = session.next_event() => Some(event),
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => None,
            };
            match event {
                Some(SessionEvent::Output(bytes)) => {
                    let collected = self.output.log.collect(&bytes);
                    let now = Instant::now();
                    let is_due = now >= *due.get_or_insert_with(|| now + gather);
                    let is_full = collected >= full;
                    if is_full && shares_lines {
                        self.output.send_full_lines().await?;
                    }
                    if !is_due && (shares_lines || !is_full) {
                        continue;
                    }
                }
                Some(SessionEvent::ScriptEnded(end)) => return Ok(end),
                Some(SessionEvent::ShellEnded(how)) => return Err(ExecutorError::ShellEnded(how)),
                None => {}
            }
            self.output.send().await?;
            due = None;
        }
    }
}

impl Actor for Executor {
    type Context = Context<Self>;
}

impl Handler<GetNextStep> for Executor {
    type Result = ResponseActFuture<Self, Result<PreparationStep, ExecutorError>>;

    fn handle(&mut self, _: GetNextStep, _: &mut Self::Context) -> Self::Result {
        self.reply_with(async |work: &mut Work, _: &CancellationToken| Ok(work.backend.next_step()))
    }
}

impl Handler<Prepare> for Executor {
    type Result = ResponseActFuture<Self, Result<Preparation, ExecutorError>>;

    fn handle(&mut self, _: Prepare, _: &mut Self::Context) -> Self::Result {
        self.reply_with(async |work: &mut Work, aborted: &CancellationToken| {
            let prepared = work.backend.prepare(&work.output);
            match unless_aborted(aborted, prepared).await? {
                Prepared::Next => Ok(Preparation::Next),
                Prepared::Ready(session) => {
                    work.session = Some(session);
                    Ok(Preparation::Done)
                }
            }
        })
    }
}

impl Handler<Export> for Executor {
    type Result = ResponseActFuture<Self, Result<ScriptEnd, ExecutorError>>;

    fn handle(&mut self, message: Export, _: &mut Self::Context) -> Self::Result {
        self.reply_with(async move |work: &mut Work, aborted: &CancellationToken| {
            let staged = work.backend.stage_variables(&message.variables);
            let script = unless_aborted(aborted, staged).await?;
            work.run(&script, aborted).await
        })
    }
}

impl Handler<ShownPath> for Executor {
    type Result = ResponseActFuture<Self, Result<String, ExecutorError>>;

    fn handle(&mut self, message: ShownPath, _: &mut Self::Context) -> Self::Result {
        self.reply_with(async move |work: &mut Work, _: &CancellationToken| {
            Ok(work.backend.shown_path(&message.file))
        })
    }
}

impl Handler<Inject> for Executor {
    type Result = ResponseActFuture<Self, Result<(), ExecutorError>>;

    fn handle(&mut self, message: Inject, _: &mut Self::Context) -> Self::Result {
        self.reply_with(async move |work: &mut Work, aborted: &CancellationToken| {
            unless_aborted(aborted, work.backend.inject(&message.file)).await
        })
    }
}

impl Handler<RunCommand> for Executor {
    type Result = ResponseActFuture<Self, Result<ScriptEnd, ExecutorError>>;

    fn handle(&mut self, message: RunCommand, _: &mut Self::Context) -> Self::Result {
        self.reply_with(async move |work: &mut Work, aborted: &CancellationToken| {
            work.run(&message.script, aborted).await
        })
    }
}

impl Handler<GoOnWithoutLog> for Executor {
    type Result = ResponseActFuture<Self, Result<(), ExecutorError>>;

    fn handle(&mut self, _: GoOnWithoutLog, _: &mut Self::Context) -> Self::Result {
        self.reply_with(async move |work: &mut Work, aborted: &CancellationToken| {
            work.output.may_be_lost = true;
            if work.script_runs {
                work.follow_to_the_end(aborted).await?;
            }
            Ok(())
        })
    }
}

impl Handler<Discard> for Executor {
    type Result = ResponseActFuture<Self, ()>;

    fn handle(&mut self, _: Discard, _: &mut Self::Context) -> Self::Result {
        let work = Rc::clone(&self.work);
        let discard = async move {
            if let Some(session) = &mut work.lock().await.session {
                while !matches!(session.next_event().await, SessionEvent::ShellEnded(_)) {}
            }
        };
        Box::pin(discard.into_actor(self))
    }
}

impl Handler<Abort> for Executor {
    type Result = ();

    fn handle(&mut self, _: Abort, _: &mut Self::Context) {
        self.aborted.cancel();
    }
}
