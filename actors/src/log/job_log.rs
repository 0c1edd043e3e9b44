//! A job's log as the agent holds it: the current log buffer, and all that is needed to replace it after a crash.

use std::cell::{Cell, RefCell};
use std::io;
use std::panic::catch_unwind;
use std::time::Duration;

use actix::prelude::*;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::log::buffer::{Follow, LogBuffer, LogError, Published, ReadFrom, Seal};
use crate::ports::{LogRange, LogSpool};

/// The pause before a reader asks again after a crash of the log buffer.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// A job's log: its current [`LogBuffer`], and all that is needed to replace it.
pub(crate) struct JobLog {
    buffer: RefCell<Addr<LogBuffer>>,
    arbiter: ArbiterHandle,
    /// The log buffer's own thread, stopped with this value; `None` if the buffer needs none.
    thread: Option<Arbiter>,
    spare: Box<dyn LogSpool>,
    published: Published,
    /// The last line was written; the log only needs its seal.
    ended: Cell<bool>,
    crashed: CancellationToken,
}

impl JobLog {
    /// Starts a log buffer, on a thread of its own if the spool may block.
    pub(crate) fn start(spool: Box<dyn LogSpool>) -> Result<Self, LogError> {
        let spare = spool.reopen()?;
        let published = Published::default();
        // `Arbiter::new` panics if no thread can be had, which must end no more than this job.
        let thread = spool.may_block().then(|| catch_unwind(Arbiter::new)).transpose();
        let thread = thread.map_err(|_| io::Error::other("can't start the log's thread"))?;
        let arbiter = thread.as_ref().map_or_else(Arbiter::current, Arbiter::handle);
        let buffer = LogBuffer::new(spool, published.clone());
        let buffer = LogBuffer::start_in_arbiter(&arbiter, |_| buffer);
        let crashed = CancellationToken::new();
        actix::spawn(watch(buffer.clone(), crashed.clone()));
        Ok(Self {
            buffer: RefCell::new(buffer),
            arbiter,
            thread,
            spare,
            published,
            ended: Cell::new(false),
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

    /// Unwraps the reply to an append. If there is none, the buffer has crashed: replaces it, and fails.
    pub(crate) fn appended(
        &self,
        reply: Result<Result<(), LogError>, MailboxError>,
    ) -> Result<(), LogError> {
        reply.unwrap_or_else(|_| {
            self.recover()?;
            Err(LogError::Crashed)
        })
    }

    /// Seals the log behind its last line.
    pub(crate) async fn end(&self) {
        self.ended.set(true);
        self.seal().await;
    }

    /// Returns the range of the whole log; `None` if the log can't be read.
    pub(crate) async fn whole(&self) -> Option<LogRange> {
        self.buffer().send(ReadFrom { line: 0 }).await.ok()?.ok()
    }

    /// Returns the lines from `line` on, once there is one or the log is sealed.
    pub(crate) async fn follow(&self, line: u64) -> Result<LogRange, LogError> {
        loop {
            if let Ok(range) = self.buffer().send(Follow { line }).await {
                return range;
            }
            // A running job replaces its crashed buffer with the next line. After the last line,
            // sealing does that.
            if self.ended.get() {
                self.seal().await;
            }
            sleep(LOOK_AGAIN).await;
        }
    }

    /// Waits until the log is sealed.
    pub(crate) async fn sealed(&self) {
        while !self.follow(u64::MAX).await.is_ok_and(|range| range.sealed) {
            sleep(LOOK_AGAIN).await;
        }
    }

    /// Seals the log.
    pub(crate) async fn seal(&self) {
        let buffer = self.buffer();
        if buffer.send(Seal).await.is_err() && self.recover().is_ok() {
            // A second crash in a row leaves the log unsealed.
            let _ = self.buffer().send(Seal).await;
        }
    }

    /// Replaces the log buffer if it has crashed.
    fn recover(&self) -> Result<(), LogError> {
        if self.buffer.borrow().connected() {
            return Ok(());
        }
        let recovered = LogBuffer::recover(self.spare.reopen()?, self.published.clone())?;
        *self.buffer.borrow_mut() = LogBuffer::start_in_arbiter(&self.arbiter, |_| recovered);
        Ok(())
    }
}

/// Follows a line that never comes: the request ends when the log is sealed, or fails when the
/// buffer has crashed.
async fn watch(buffer: Addr<LogBuffer>, crashed: CancellationToken) {
    if buffer.send(Follow { line: u64::MAX }).await.is_err() {
        crashed.cancel();
    }
}

impl Drop for JobLog {
    fn drop(&mut self) {
        if let Some(thread) = &self.thread {
            thread.stop();
        }
    }
}
