//! The writing end of a job's log that survives the death of the log buffer.

use std::cell::{Cell, RefCell};

use actix::prelude::*;
use tokio_util::sync::CancellationToken;

use crate::log_buffer::{Append, Follow, LogBuffer, LogError, Published, Seal};
use crate::log_event::LogEvent;
use crate::ports::LogSpool;
use crate::terminal_text::cut_to_lines;

/// The current [`LogBuffer`] of a job, and what it takes to replace it.
pub(crate) struct JobLog {
    buffer: RefCell<Addr<LogBuffer>>,
    arbiter: Arbiter,
    spare: Box<dyn LogSpool>,
    published: Published,
    crash_told: Cell<bool>,
    crashed: CancellationToken,
}

impl JobLog {
    /// Starts a log buffer on a thread of its own.
    pub(crate) fn start(spool: Box<dyn LogSpool>) -> Result<Self, LogError> {
        let spare = spool.reopen()?;
        let published = Published::default();
        let arbiter = Arbiter::new();
        let buffer = LogBuffer::new(spool, published.clone());
        let buffer = LogBuffer::start_in_arbiter(&arbiter.handle(), |_| buffer);
        let crashed = CancellationToken::new();
        actix::spawn(watch(buffer.clone(), crashed.clone()));
        Ok(Self {
            buffer: RefCell::new(buffer),
            arbiter,
            spare,
            published,
            crash_told: Cell::new(false),
            crashed,
        })
    }

    /// Waits for a crash of the log buffer, which a job that prints nothing would not notice.
    pub(crate) async fn crashed(&self) {
        self.crashed.cancelled().await;
    }

    pub(crate) fn buffer(&self) -> Addr<LogBuffer> {
        self.buffer.borrow().clone()
    }

    pub(crate) async fn append(&self, event: LogEvent) -> Result<(), LogError> {
        let buffer = self.buffer();
        match buffer.send(Append { event }).await {
            Ok(appended) => appended,
            Err(_) => {
                self.recover()?;
                Err(LogError::Crashed)
            }
        }
    }

    /// Appends text of any length as output events.
    pub(crate) async fn append_output(&self, text: String) -> Result<(), LogError> {
        for piece in cut_to_lines(text) {
            self.append(LogEvent::cmd_output(piece)).await?;
        }
        Ok(())
    }

    /// Puts into the log, once, that a part of the agent crashed.
    pub(crate) async fn tell_crash(&self, what: &str) {
        if self.crash_told.replace(true) {
            return;
        }
        log::error!(what; "a part of the agent crashed");
        let line = format!("The agent had an internal error: {what}. The job can't go on.\n");
        // The first try may be what finds out that the buffer has crashed.
        for _ in 0..2 {
            if self.append(LogEvent::cmd_output(line.clone())).await.is_ok() {
                break;
            }
        }
    }

    /// Ends the log.
    pub(crate) async fn seal(&self) {
        let buffer = self.buffer();
        if buffer.send(Seal).await.is_err() && self.recover().is_ok() {
            // A second crash in a row leaves an unsealed log; there is nobody left to write it.
            let _ = self.buffer().send(Seal).await;
        }
    }

    /// Replaces a log buffer that is gone.
    fn recover(&self) -> Result<(), LogError> {
        if self.buffer.borrow().connected() {
            return Ok(());
        }
        let recovered = LogBuffer::recover(self.spare.reopen()?, self.published.clone())?;
        *self.buffer.borrow_mut() =
            LogBuffer::start_in_arbiter(&self.arbiter.handle(), |_| recovered);
        Ok(())
    }
}

/// Waits for a line that never comes: the reply is the end of the log, or of its buffer.
async fn watch(buffer: Addr<LogBuffer>, crashed: CancellationToken) {
    if buffer.send(Follow { line: u64::MAX }).await.is_err() {
        crashed.cancel();
    }
}

impl Drop for JobLog {
    fn drop(&mut self) {
        self.arbiter.stop();
    }
}
