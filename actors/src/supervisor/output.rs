//! The output of a job's session on its way into the log.

use std::time::Duration;

use actix::prelude::*;
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use tokio::time::Instant;

use super::executor::{BegunStep, ExecutorError};
use crate::delivery::push::target_of;
use crate::job::Job;
use crate::log::buffer::{Append, LogBuffer, LogError};
use crate::log::event::{LogEvent, MAX_OUTPUT_LINE, MAX_PUSHED_OUTPUT_LINE, unix_time};
use crate::log::text::{FULL_EVENT, TerminalText};
use crate::ports::{StepError, StepLog};

/// How output is cut into `cmd_output` events (docs/protocol.md: "Log events").
#[derive(Clone, Copy, Debug)]
pub struct OutputShape {
    /// How long output is collected before it is sent as an event.
    pub(super) gather: Duration,
    /// How many bytes of text are sent before that time is over.
    pub(super) full: usize,
    /// When `full` is reached, only full log lines are sent; the rest waits for more text.
    pub(super) shares_lines: bool,
    /// The longest encoded line of the log, in bytes.
    pub max_line: usize,
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

    /// Returns the shape for how `job`'s log gets to the platform.
    pub fn for_job(job: &Job) -> Self {
        if target_of(job).is_some() { Self::PUSHED } else { Self::PULLED }
    }
}

/// The session's output on its way into the log.
pub(super) struct Output {
    pub(super) log: Addr<LogBuffer>,
    pub(super) text: TerminalText,
    pub(super) shape: OutputShape,
    /// Set by [`GoOnWithoutLog`](super::executor::GoOnWithoutLog).
    pub(super) may_lose: bool,
    /// See [`Prepare::begins`](super::executor::Prepare::begins).
    pub(super) begins: Option<&'static str>,
    pub(super) begun: Option<BegunStep>,
    /// The last event sent. The terminal is read while it is appended: waiting first would keep the
    /// job waiting for its terminal.
    pub(super) in_flight: Option<Request<LogBuffer, Append>>,
}

impl Output {
    /// Sends the text collected so far; waits until all but the last event is appended.
    pub(super) async fn send(&mut self) -> Result<(), ExecutorError> {
        let pieces = self.text.take();
        self.send_all(pieces).await
    }

    /// Sends the part of the collected text that fills whole log lines.
    pub(super) async fn send_full(&mut self) -> Result<(), ExecutorError> {
        let pieces = self.text.take_full();
        self.send_all(pieces).await
    }

    pub(super) async fn send_all(&mut self, pieces: Vec<String>) -> Result<(), ExecutorError> {
        for piece in pieces {
            self.settle().await?;
            let append = Append { event: LogEvent::cmd_output(piece) };
            self.in_flight = Some(self.log.send(append));
        }
        Ok(())
    }

    /// Waits until everything sent is in the log.
    pub(super) async fn settle(&mut self) -> Result<(), ExecutorError> {
        if let Some(request) = self.in_flight.take() {
            let appended = request.await.unwrap_or(Err(LogError::Crashed));
            return match appended {
                Err(error @ (LogError::Spool(_) | LogError::Changed(_))) if !self.may_lose => {
                    Err(ExecutorError::LogProblem(error.to_string()))
                }
                Ok(()) | Err(LogError::Spool(_) | LogError::Changed(_)) => Ok(()),
                Err(error) => Err(ExecutorError::LogCrashed(error.to_string())),
            };
        }
        Ok(())
    }
}

impl StepLog for Output {
    fn tell<'a>(&'a mut self, text: &'a str) -> LocalBoxFuture<'a, Result<(), StepError>> {
        async {
            let begins = self.begins.take();
            self.text.push(text.as_bytes());
            self.text.finish();
            let told = async {
                if let Some(title) = begins {
                    self.begun = Some(BegunStep { started_at: unix_time(), begun: Instant::now() });
                    self.in_flight =
                        Some(self.log.send(Append { event: LogEvent::cmd_started(title) }));
                }
                self.send().await?;
                self.settle().await
            };
            told.await.map_err(|error: ExecutorError| StepError(error.to_string()))
        }
        .boxed_local()
    }
}
