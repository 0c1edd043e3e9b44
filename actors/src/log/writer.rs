//! The writing end of a job's log that survives the death of the log buffer.

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

/// How long a reader waits for the successor of a log buffer that is gone.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// The current [`LogBuffer`] of a job, and what it takes to replace it.
pub(crate) struct JobLog {
    buffer: RefCell<Addr<LogBuffer>>,
    arbiter: ArbiterHandle,
    /// Ends with the log.
    thread: Option<Arbiter>,
    spare: Box<dyn LogSpool>,
    published: Published,
    crash_told: Cell<bool>,
    /// Why a line could not be written, if there was one.
    problem: RefCell<Option<String>>,
    /// The log itself says so.
    problem_told: Cell<bool>,
    /// Nobody writes any more.
    ended: Cell<bool>,
    crashed: CancellationToken,
    /// The longest line of output, in bytes.
    max_line: usize,
}

impl JobLog {
    /// Starts a log buffer, on a thread of its own unless nothing there can block.
    /// No line of output has more than `max_line` bytes.
    pub(crate) fn start(spool: Box<dyn LogSpool>, max_line: usize) -> Result<Self, LogError> {
        let spare = spool.reopen()?;
        let published = Published::default();
        // Panics if no thread can be had, which must be no end of more than this job.
        let thread = spool.may_block().then(|| catch_unwind(Arbiter::new)).transpose();
        let thread = thread.map_err(|_| io::Error::other("no thread can be had for the log"))?;
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

    /// Appends a line; fails only if the log buffer has crashed or the log is sealed. A line that can't be written
    /// otherwise is missing, and the job has a [problem](Self::has_problem).
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

    /// Whether lines are missing because the log could not be written: such a job has failed.
    pub(crate) fn has_problem(&self) -> bool {
        self.problem.borrow().is_some()
    }

    /// Puts into the log, once, why lines of it are missing.
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

    /// Looks whether somebody has changed the log since its last line.
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
        // The first try may be what finds out that the buffer has crashed.
        for _ in 0..2 {
            if self.append(LogEvent::cmd_output(line.clone())).await.is_ok() {
                break;
            }
        }
    }

    /// Puts the job's end into the log, which is sealed then, whatever happens.
    pub(crate) async fn end(&self, outcome: Outcome) {
        if let Err(error) = self.append(LogEvent::job_finished(outcome)).await {
            log::error!(error:%; "the end of a job could not be logged");
            // The buffer is a new one if the old one had crashed.
            let _ = self.append(LogEvent::job_finished(outcome)).await;
        }
        self.ended.set(true);
        self.seal().await;
    }

    /// Where all of it is, unless it can't be read.
    pub(crate) async fn whole(&self) -> Option<LogRange> {
        self.buffer().send(ReadFrom { line: 0 }).await.ok()?.ok()
    }

    /// Waits until there is line `line` or the log is sealed.
    pub(crate) async fn follow(&self, line: u64) -> Result<LogRange, LogError> {
        loop {
            if let Ok(range) = self.buffer().send(Follow { line }).await {
                return range;
            }
            // A crashed buffer has a successor as soon as the job notices. One that is over does not.
            if self.ended.get() {
                self.seal().await;
            }
            sleep(LOOK_AGAIN).await;
        }
    }

    /// Waits until no line will come any more.
    pub(crate) async fn sealed(&self) {
        while !self.follow(u64::MAX).await.is_ok_and(|range| range.sealed) {
            sleep(LOOK_AGAIN).await;
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
        *self.buffer.borrow_mut() = LogBuffer::start_in_arbiter(&self.arbiter, |_| recovered);
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
        if let Some(thread) = &self.thread {
            thread.stop();
        }
    }
}
