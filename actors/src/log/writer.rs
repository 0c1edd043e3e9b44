//! Writes and reads a job's log, and replaces its log buffer after a crash.

use std::cell::{Cell, RefCell};
use std::io;
use std::panic::catch_unwind;
use std::time::Duration;

use actix::prelude::*;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::job::Outcome;
use crate::log::buffer::{
    Append, AppendLastWords, Check, Follow, LogBuffer, LogError, LogRange, Published, ReadFrom,
    Seal,
};
use crate::log::event::LogEvent;
use crate::log::text::cut_to_lines;
use crate::ports::LogSpool;

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
    crash_told: Cell<bool>,
    /// Why the first line that is missing could not be written.
    problem: RefCell<Option<String>>,
    /// The problem has been put into the log.
    problem_told: Cell<bool>,
    /// The last line was written; the log only needs its seal.
    ended: Cell<bool>,
    crashed: CancellationToken,
    /// The longest encoded line of output, in bytes.
    max_line: usize,
}

impl JobLog {
    /// Starts a log buffer, on a thread of its own if the spool may block. Encoded lines of output
    /// have at most `max_line` bytes.
    pub(crate) fn start(spool: Box<dyn LogSpool>, max_line: usize) -> Result<Self, LogError> {
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
            crash_told: Cell::new(false),
            problem: RefCell::default(),
            problem_told: Cell::new(false),
            ended: Cell::new(false),
            crashed,
            max_line,
        })
    }

    /// Waits for a crash of the log buffer, which a job that prints nothing would not notice.
    pub(crate) async fn crashed(&self) {
        self.crashed.cancelled().await;
    }

    pub(crate) fn buffer(&self) -> Addr<LogBuffer> {
        self.buffer.borrow().clone()
    }

    /// Appends a line. Fails only if the log buffer has crashed or the log is sealed; a line that
    /// can't be written for another reason is dropped, and the log has a
    /// [problem](Self::has_problem) then.
    pub(crate) async fn append(&self, event: LogEvent) -> Result<(), LogError> {
        match self.try_append(event.clone()).await {
            Err(error @ (LogError::Spool(_) | LogError::Changed(_))) => {
                self.note_problem(&error.to_string()).await;
                match self.try_append(event).await {
                    Err(LogError::Spool(_) | LogError::Changed(_)) => Ok(()),
                    appended => appended,
                }
            }
            appended => appended,
        }
    }

    async fn try_append(&self, event: LogEvent) -> Result<(), LogError> {
        self.when_alive(self.buffer().send(Append { event }).await)
    }

    fn when_alive(
        &self,
        appended: Result<Result<(), LogError>, MailboxError>,
    ) -> Result<(), LogError> {
        appended.unwrap_or_else(|_| {
            self.recover()?;
            Err(LogError::Crashed)
        })
    }

    /// Whether lines may be missing because the log could not be written. Such a job has failed.
    pub(crate) fn has_problem(&self) -> bool {
        self.problem.borrow().is_some()
    }

    /// Puts into the log, once, why lines are missing.
    pub(crate) async fn note_problem(&self, why: &str) {
        if self.problem.borrow().is_none() {
            log::error!(why; "a job's log is not whole");
            self.problem.replace(Some(why.to_owned()));
        }
        if self.problem_told.get() {
            return;
        }
        let line = format!("The job has failed, and lines of its log may be missing: {why}.\n");
        let event = LogEvent::cmd_output(line);
        let told = self.when_alive(self.buffer().send(AppendLastWords { event }).await);
        self.problem_told.set(told.is_ok());
    }

    /// Notes a problem if another process has changed the log.
    pub(crate) async fn check(&self) {
        if let Ok(Err(error @ LogError::Changed(_))) = self.buffer().send(Check).await {
            self.note_problem(&error.to_string()).await;
        }
    }

    /// Appends text of any length as output events.
    pub(crate) async fn append_output(&self, text: String) -> Result<(), LogError> {
        for piece in cut_to_lines(text, self.max_line) {
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
        // The first attempt may only find that the buffer has crashed, and replace it.
        for _ in 0..2 {
            if self.append(LogEvent::cmd_output(line.clone())).await.is_ok() {
                break;
            }
        }
    }

    /// Appends `job_finished`, and seals the log even if that fails.
    pub(crate) async fn end(&self, outcome: Outcome) {
        if let Err(error) = self.append(LogEvent::job_finished(outcome)).await {
            log::error!(error:%; "the end of a job could not be logged");
            // A crashed buffer has been replaced.
            let _ = self.append(LogEvent::job_finished(outcome)).await;
        }
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
