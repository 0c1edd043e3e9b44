//! Writes a job's log: everything in it goes through the `LogWriter`, which the job's steps and
//! its executor share: the titles and lines of the agent, and the output of the job's session, whose bytes
//! become UTF-8 text with `\n` line ends ([`TerminalText`]), cut into events that fit their lines.
//!
//! Text from the steps is placed after the output collected so far.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use actix::prelude::*;
use tokio::time::Instant;

use crate::errors::WithCauses;
use crate::job::Outcome;
use crate::log::buffer::{Append, AppendLastWords, Check, LogBuffer, LogError};
use crate::log::event::{LogEvent, MAX_OUTPUT_LINE, MAX_PUSHED_OUTPUT_LINE, unix_time};
use crate::log::job_log::JobLog;
use crate::log::text::{FULL_EVENT, TerminalText};

/// How output is cut into `cmd_output` events (docs/protocol.md: "Log events").
#[derive(Clone, Copy, Debug)]
pub struct OutputShape {
    /// How long output is collected before it is sent as an event.
    pub(crate) gather: Duration,
    /// How many bytes of text are sent before that time is over.
    pub(crate) full: usize,
    /// When `full` is reached, only full log lines are sent; the rest waits for more text.
    pub(crate) shares_lines: bool,
    /// The longest encoded line of the log, in bytes.
    max_line: usize,
}

impl OutputShape {
    /// For a log that is pulled, perhaps by somebody who watches: a short delay, yet no event for
    /// every few bytes.
    pub const PULLED: Self = Self {
        gather: Duration::from_millis(8),
        full: FULL_EVENT,
        shares_lines: false,
        max_line: MAX_OUTPUT_LINE,
    };

    /// For a log that is pushed: nobody sees an event before the next batch, and times are in whole
    /// seconds.
    pub const PUSHED: Self = Self {
        gather: Duration::from_secs(1),
        full: MAX_PUSHED_OUTPUT_LINE,
        shares_lines: true,
        max_line: MAX_PUSHED_OUTPUT_LINE,
    };
}

/// A part of the agent has crashed, so that the job can't go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Crash {
    #[error("the job supervisor has crashed")]
    Supervisor,
    #[error("the job's task has crashed")]
    Task,
    #[error("the job's steps have crashed")]
    Steps,
    #[error("the executor has crashed")]
    Executor,
    #[error(transparent)]
    Log(#[from] LogError),
    /// A script went on although its output could not be logged.
    #[error("{0}; the script did not end then")]
    UnloggedScript(String),
}

/// A step of the log whose `cmd_started` is written. Must be ended by [`LogWriter::end_step`].
#[derive(Debug)]
#[must_use]
pub(crate) struct StartedStep {
    title: String,
    /// The time of `cmd_started`, in seconds since the epoch.
    started_at: u64,
    /// The same moment on the monotonic clock, to measure the step's duration.
    since: Instant,
}

/// Writes one job's log. See the [module](self).
pub(crate) struct LogWriter {
    log: Rc<JobLog>,
    shape: OutputShape,
    /// The session's output that no event has yet.
    terminal: RefCell<TerminalText>,
    /// The last event of the session's output. The terminal is read while it is appended: waiting first would
    /// keep the job waiting for its terminal.
    in_flight: RefCell<Option<Request<LogBuffer, Append>>>,
    /// The title of a step that the next output starts, if it comes.
    step_if_output: Cell<Option<&'static str>>,
    /// The step that output has started.
    step_of_output: RefCell<Option<StartedStep>>,
    is_crash_written: Cell<bool>,
    /// Why the first missing line could not be written.
    problem: RefCell<Option<String>>,
    is_problem_written: Cell<bool>,
}

impl LogWriter {
    /// Creates the writer of `log`, whose output has the given shape.
    pub(crate) fn new(log: Rc<JobLog>, shape: OutputShape) -> Self {
        Self {
            log,
            shape,
            terminal: RefCell::new(TerminalText::new(shape.max_line)),
            in_flight: RefCell::default(),
            step_if_output: Cell::default(),
            step_of_output: RefCell::default(),
            is_crash_written: Cell::default(),
            problem: RefCell::default(),
            is_problem_written: Cell::default(),
        }
    }

    pub(crate) fn log(&self) -> &Rc<JobLog> {
        &self.log
    }

    pub(crate) fn shape(&self) -> OutputShape {
        self.shape
    }

    /// Writes `job_started`.
    pub(crate) async fn start_job(&self) -> Result<(), LogError> {
        self.append(LogEvent::job_started()).await
    }

    /// Writes `cmd_started`.
    pub(crate) async fn start_step(&self, title: &str) -> Result<StartedStep, LogError> {
        let step =
            StartedStep { title: title.to_owned(), started_at: unix_time(), since: Instant::now() };
        self.append(LogEvent::cmd_started(title)).await?;
        Ok(step)
    }

    /// Writes `cmd_finished`.
    pub(crate) async fn end_step(&self, step: StartedStep, exit_code: i32) -> Result<(), LogError> {
        let StartedStep { title, started_at, since } = step;
        self.append(LogEvent::cmd_finished(title, exit_code, started_at, since.elapsed())).await
    }

    /// Lets the next output start a step with this title.
    pub(crate) fn start_step_if_output(&self, title: &'static str) {
        self.step_if_output.set(Some(title));
    }

    /// Returns the step that output has started since [`Self::start_step_if_output`], if there was any. Later output
    /// starts none.
    pub(crate) fn take_step_of_output(&self) -> Option<StartedStep> {
        self.step_if_output.take();
        self.step_of_output.borrow_mut().take()
    }

    /// Writes text of the agent, of any length, as output of the current step.
    pub(crate) async fn print(&self, text: &str) -> Result<(), LogError> {
        if let Some(title) = self.step_if_output.take() {
            let step = self.start_step(title).await?;
            self.step_of_output.replace(Some(step));
        }
        let mut own = TerminalText::new(self.shape.max_line);
        own.push(text.as_bytes());
        own.finish();
        let collected = self.terminal.borrow_mut().take();
        for piece in collected.into_iter().chain(own.take()) {
            self.append(LogEvent::cmd_output(piece)).await?;
        }
        Ok(())
    }

    /// Collects bytes that the session's terminal received. Returns how much text is collected, in bytes.
    pub(crate) fn collect(&self, bytes: &[u8]) -> usize {
        let mut terminal = self.terminal.borrow_mut();
        terminal.push(bytes);
        terminal.len()
    }

    /// Sends the collected output to the log; waits until all but its last event is written. A line that can't be
    /// written is an error here.
    pub(crate) async fn send(&self) -> Result<(), LogError> {
        let pieces = self.terminal.borrow_mut().take();
        self.send_all(pieces).await
    }

    /// Sends the part of the collected output that fills whole log lines.
    pub(crate) async fn send_full_lines(&self) -> Result<(), LogError> {
        let pieces = self.terminal.borrow_mut().take_full();
        self.send_all(pieces).await
    }

    /// Writes all output that was collected, and waits until it is in the log: a script has ended, and no more bytes
    /// come to complete a character.
    pub(crate) async fn finish_output(&self) -> Result<(), LogError> {
        self.terminal.borrow_mut().finish();
        self.send().await?;
        self.settle().await
    }

    async fn send_all(&self, pieces: Vec<String>) -> Result<(), LogError> {
        for piece in pieces {
            self.settle().await?;
            let append = Append { event: LogEvent::cmd_output(piece) };
            self.in_flight.replace(Some(self.log.buffer().send(append)));
        }
        Ok(())
    }

    /// Waits until the event in flight is written.
    async fn settle(&self) -> Result<(), LogError> {
        let in_flight = self.in_flight.take();
        match in_flight {
            Some(request) => self.log.appended(request.await),
            None => Ok(()),
        }
    }

    /// Writes a line. Fails only if the log buffer has crashed or the log is sealed; a line that
    /// can't be written for another reason is dropped, and the log has a
    /// [problem](Self::problem) then.
    async fn append(&self, event: LogEvent) -> Result<(), LogError> {
        match self.try_append(event.clone()).await {
            Err(error) if error.is_lost_line() => {
                self.note_problem(&error).await;
                match self.try_append(event).await {
                    Err(error) if error.is_lost_line() => Ok(()),
                    appended => appended,
                }
            }
            appended => appended,
        }
    }

    async fn try_append(&self, event: LogEvent) -> Result<(), LogError> {
        self.log.appended(self.log.buffer().send(Append { event }).await)
    }

    /// Returns why lines are missing, if the log could not be written. Such a job has failed.
    pub(crate) fn problem(&self) -> Option<String> {
        self.problem.borrow().clone()
    }

    pub(crate) fn has_problem(&self) -> bool {
        self.problem.borrow().is_some()
    }

    /// Puts into the log, once, why lines are missing.
    pub(crate) async fn note_problem(&self, why: &LogError) {
        let why = WithCauses(why).to_string();
        if self.problem.borrow().is_none() {
            log::error!(why:%; "a job's log is incomplete");
            self.problem.replace(Some(why.clone()));
        }
        if self.is_problem_written.get() {
            return;
        }
        let line = format!("The job has failed, and lines of its log may be missing: {why}.\n");
        let event = LogEvent::cmd_output(line);
        let written = self.log.appended(self.log.buffer().send(AppendLastWords { event }).await);
        self.is_problem_written.set(written.is_ok());
    }

    /// Notes a problem if another process has changed the log.
    pub(crate) async fn check(&self) {
        if let Ok(Err(error @ LogError::Changed(_))) = self.log.buffer().send(Check).await {
            self.note_problem(&error).await;
        }
    }

    /// Puts into the log, once, that a part of the agent crashed.
    pub(crate) async fn note_crash(&self, what: &Crash) {
        if self.is_crash_written.replace(true) {
            return;
        }
        let what = WithCauses(what);
        log::error!(what:%; "a part of the agent crashed");
        let line = format!("The agent had an internal error: {what}. The job can't go on.\n");
        // The first attempt may only find that the buffer has crashed, and replace it.
        for _ in 0..2 {
            if self.append(LogEvent::cmd_output(line.clone())).await.is_ok() {
                break;
            }
        }
    }

    /// Writes `job_finished`, and seals the log even if that fails.
    pub(crate) async fn end_job(&self, outcome: Outcome) {
        if let Err(error) = self.append(LogEvent::job_finished(outcome)).await {
            log::error!(error:% = WithCauses(&error); "the end of a job could not be logged");
            // A crashed buffer has been replaced.
            let _ = self.append(LogEvent::job_finished(outcome)).await;
        }
        self.log.end().await;
    }
}
