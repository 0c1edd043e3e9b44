//! Owns the place where one job's commands run, and its one shell session.
//!
//! Receives [`GetPreparation`] and [`Prepare`], then [`Export`], [`Inject`] and [`RunCommand`] one
//! at a time, and [`Abort`] at any moment. Sends `Append` with the session's output to the log
//! buffer, awaited.
//!
//! The reply to a message is the only end of that work, and comes after all of its output was
//! appended. After the shell's end, every message that needs it fails at once.

use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use actix::prelude::*;
use tokio::sync::{Mutex, Notify};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::job::{EnvVar, InjectedFile};
use crate::log::buffer::LogBuffer;
use crate::log::text::TerminalText;
use crate::ports::{
    ExecutorBackend, PreparationError, PreparationStep, Script, ScriptEnd, SessionEvent,
    ShellSession, StepError,
};
use crate::supervisor::output::{Output, OutputShape};

/// How long [`FlushOutput`] waits for output to be appended.
const FLUSH_PATIENCE: Duration = Duration::from_secs(1);

/// Returns the steps of the preparation (see [`ExecutorBackend::preparation`]).
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Result<Vec<PreparationStep>, ExecutorError>")]
pub struct GetPreparation;

/// Does one step of the preparation.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Result<(), ExecutorError>")]
pub struct Prepare {
    /// The step's index, from 0 on.
    pub step: usize,
    /// For a hidden step, the title under which its first output begins a step of the log. `None`
    /// if the sender has logged `cmd_started`.
    pub begins: Option<&'static str>,
}

/// Returns, once, the log step that the output of the last [`Prepare`] began; `None` if it began
/// none. The sender must log its `cmd_finished`.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Option<BegunStep>")]
pub struct TakeBegunStep;

/// The beginning of a step of the log.
#[derive(Clone, Copy, Debug)]
pub struct BegunStep {
    /// The time of `cmd_started`, in seconds since the epoch.
    pub started_at: u64,
    /// The same moment on the monotonic clock, to measure the step's duration.
    pub begun: Instant,
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

/// Appends the output that was read so far, so that the sender's own line comes behind it. The
/// reply comes after a second at most, appended or not.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct FlushOutput;

/// From now on, drops output that can't be appended instead of failing. Sent after
/// [`ExecutorError::LogProblem`]; the reply comes when the script that still runs, if any, has
/// ended.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Result<(), ExecutorError>")]
pub struct GoOnWithoutLog;

/// Reads the terminal and drops the output, until the shell has ended.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct Discard;

/// Why a message to the executor failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExecutorError {
    /// The step failed, with a reason for the job's log.
    #[error(transparent)]
    Step(#[from] StepError),
    /// The preparation failed, and the job's log must not show the reason
    /// (see [`PreparationError::Untold`]).
    #[error("the reason is in the agent's own log")]
    Untold,
    /// The shell ended while the script ran (see [`SessionEvent::ShellEnded`] for the text).
    #[error("the job's shell ended {0}")]
    ShellEnded(String),
    /// The shell has ended, or was never there.
    #[error("the job's shell has ended, so this can't run")]
    NoShell,
    /// [`Abort`] was received.
    #[error("aborted")]
    Aborted,
    /// The log buffer has crashed, or the log is sealed.
    #[error("{0}")]
    LogCrashed(String),
    /// Output could not be appended to the log. The script still runs.
    #[error("{0}")]
    LogProblem(String),
}

impl From<PreparationError> for ExecutorError {
    fn from(error: PreparationError) -> Self {
        match error {
            PreparationError::Failed(error) => Self::Step(error),
            PreparationError::Untold => Self::Untold,
        }
    }
}

/// Runs one job's scripts. See the [module](self).
pub struct Executor {
    work: Rc<Mutex<Work>>,
    aborted: CancellationToken,
    flush: Rc<Flush>,
}

/// The two halves of [`FlushOutput`].
#[derive(Debug, Default)]
struct Flush {
    asked: Notify,
    done: Notify,
}

struct Work {
    flush: Rc<Flush>,
    backend: Box<dyn ExecutorBackend>,
    session: Option<Box<dyn ShellSession>>,
    /// A script was started, and has not ended as far as the session has told.
    script_runs: bool,
    output: Output,
}

impl Executor {
    /// Creates an executor that appends output to `log`, cut into events by `shape`.
    pub fn new(
        backend: Box<dyn ExecutorBackend>,
        log: Addr<LogBuffer>,
        shape: OutputShape,
    ) -> Self {
        let text = TerminalText::new(shape.max_line);
        let output = Output {
            log,
            text,
            shape,
            may_lose: false,
            begins: None,
            begun: None,
            in_flight: None,
        };
        let flush = Rc::<Flush>::default();
        let work =
            Work { flush: Rc::clone(&flush), backend, session: None, script_runs: false, output };
        Self { work: Rc::new(Mutex::new(work)), aborted: CancellationToken::new(), flush }
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
        session.start(script).await.map_err(|error| {
            StepError(format!("the script can't be handed to the shell: {error}"))
        })?;
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
        self.output.text.finish();
        self.output.send().await?;
        self.output.settle().await?;
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
        let mut due: Option<Instant> = None;
        loop {
            let event = tokio::select! {
                biased;
                () = aborted.cancelled() => return Err(ExecutorError::Aborted),
                event = session.next_event() => Some(event),
                () = self.flush.asked.notified() => {
                    self.output.send().await?;
                    self.output.settle().await?;
                    self.flush.done.notify_one();
                    due = None;
                    continue;
                }
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => None,
            };
            match event {
                Some(SessionEvent::Output(bytes)) => {
                    self.output.text.push(&bytes);
                    let OutputShape { gather, full, shares_lines, .. } = self.output.shape;
                    let now = Instant::now();
                    let is_due = now >= *due.get_or_insert_with(|| now + gather);
                    let is_full = self.output.text.len() >= full;
                    if is_full && shares_lines {
                        self.output.send_full().await?;
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

impl Handler<GetPreparation> for Executor {
    type Result = ResponseActFuture<Self, Result<Vec<PreparationStep>, ExecutorError>>;

    fn handle(&mut self, _: GetPreparation, _: &mut Self::Context) -> Self::Result {
        self.reply_with(async |work: &mut Work, _: &CancellationToken| {
            Ok(work.backend.preparation())
        })
    }
}

impl Handler<Prepare> for Executor {
    type Result = ResponseActFuture<Self, Result<(), ExecutorError>>;

    fn handle(&mut self, message: Prepare, _: &mut Self::Context) -> Self::Result {
        self.reply_with(async move |work: &mut Work, aborted: &CancellationToken| {
            let Work { backend, session, output, .. } = work;
            output.begins = message.begins;
            let prepared = backend.prepare(message.step, output);
            if let Some(opened) = unless_aborted(aborted, prepared).await? {
                *session = Some(opened);
            }
            Ok(())
        })
    }
}

impl Handler<TakeBegunStep> for Executor {
    type Result = ResponseActFuture<Self, Option<BegunStep>>;

    fn handle(&mut self, _: TakeBegunStep, _: &mut Self::Context) -> Self::Result {
        let work = Rc::clone(&self.work);
        Box::pin(async move { work.lock().await.output.begun.take() }.into_actor(self))
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
            work.output.may_lose = true;
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

impl Handler<FlushOutput> for Executor {
    type Result = ResponseActFuture<Self, ()>;

    fn handle(&mut self, _: FlushOutput, _: &mut Self::Context) -> Self::Result {
        let flush = Rc::clone(&self.flush);
        let flushed = async move {
            flush.asked.notify_one();
            // Times out if no script runs: then no output is pending either.
            let _ = timeout(FLUSH_PATIENCE, flush.done.notified()).await;
        };
        Box::pin(flushed.into_actor(self))
    }
}

impl Handler<Abort> for Executor {
    type Result = ();

    fn handle(&mut self, _: Abort, _: &mut Self::Context) {
        self.aborted.cancel();
    }
}

/// Makes the actor panic as a bug would.
#[cfg(feature = "testing")]
impl Handler<crate::testing::PanicNow> for Executor {
    type Result = ();

    fn handle(&mut self, _: crate::testing::PanicNow, _: &mut Self::Context) {
        crate::testing::panic_as_asked();
    }
}
