//! Owns a job's log: the only writer of its spool, and the only index of its lines.
//!
//! Receives [`Append`], [`AppendLastWords`] and [`Check`] from the job's writer (awaited, which is
//! the back-pressure on the job's output), [`ReadFrom`] and [`Follow`] from readers, and [`Seal`] at
//! the end. A reply
//! to a reader is an open file and a range, never bytes, so that a slow reader costs the job
//! nothing.
//!
//! A line becomes readable only after it was written whole, and never changes after that. A crash
//! leaves the [`Published`] length behind: [`LogBuffer::recover`] cuts the file to it and goes on.
//!
//! A job can change the file behind the agent's back. A change of its length or name is noticed at
//! the next line or reader, changed bytes by [`Check`]; the sender of the next [`Append`] or
//! [`Check`] gets the error. A log never loses lines: empty output events replace those that were
//! cut off, so that a reader's line numbers stay valid.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use actix::prelude::*;
use tokio::sync::oneshot;

use crate::log::event::LogEvent;
use crate::log::index::{LogIndex, Position};
use crate::ports::{ForeignChange, LogRange, LogSpool};

/// Writes an event as the next line. [`LogEvent::JobFinished`] seals the log.
#[derive(Debug, Message)]
#[rtype(result = "Result<(), LogError>")]
pub struct Append {
    /// The event to write.
    pub event: LogEvent,
}

/// Writes an event as [`Append`] does, but may use the room reserved for the last lines of a log.
#[derive(Debug, Message)]
#[rtype(result = "Result<(), LogError>")]
pub struct AppendLastWords {
    /// The event to write.
    pub event: LogEvent,
}

/// Looks for changes that another process made to the log, byte by byte. Fails with
/// [`LogError::Changed`] for one that was not reported before.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Result<(), LogError>")]
pub struct Check;

/// Returns the range of the lines from `line` on that exist now.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Result<LogRange, LogError>")]
pub struct ReadFrom {
    /// The first line wanted, 0 based.
    pub line: u64,
}

/// Returns the same range as [`ReadFrom`], once the line exists or the log is sealed.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Result<LogRange, LogError>")]
pub struct Follow {
    /// The first line wanted, 0 based.
    pub line: u64,
}

/// Ends the log: no line can be appended any more. Idempotent.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct Seal;

/// Why the log could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// A line was to be appended to a sealed log.
    #[error("the log is sealed")]
    Sealed,
    /// The event could not be encoded; impossible for events of strings and numbers.
    #[error("an event could not be encoded")]
    Encode(#[from] serde_json::Error),
    /// The spool could not be written. The line is not in the log.
    #[error("the job's log could not be written")]
    Spool(#[from] io::Error),
    /// The spool could not be read.
    #[error("the job's log could not be read")]
    Unreadable(#[source] io::Error),
    /// Another process changed the log. Returned once for each change; the line that gets the
    /// error is not in the log, later ones are.
    #[error("the job's log was changed by somebody else")]
    Changed(#[from] ForeignChange),
    /// The log buffer has crashed.
    #[error("the log buffer has crashed")]
    Crashed,
}

impl LogError {
    /// Whether a line is missing from the log, and later ones may still be written.
    pub fn is_lost_line(&self) -> bool {
        matches!(self, Self::Spool(_) | Self::Changed(_))
    }
}

/// How many lines and bytes of the spool are readable. Clones share the numbers, which outlive a
/// crash of the log buffer.
#[derive(Clone, Debug, Default)]
pub struct Published(Arc<PublishedEnd>);

#[derive(Debug, Default)]
struct PublishedEnd {
    lines: AtomicU64,
    bytes: AtomicU64,
}

impl Published {
    fn publish(&self, end: Position) {
        self.0.lines.store(end.line, Ordering::Release);
        self.0.bytes.store(end.offset, Ordering::Release);
    }
}

/// Owns a job's log. See the [module](self).
#[derive(Debug)]
pub struct LogBuffer {
    spool: Box<dyn LogSpool>,
    index: LogIndex,
    published: Published,
    sealed: bool,
    followers: Vec<Follower>,
    line: Vec<u8>,
    /// A foreign change that has not been reported yet.
    untold: Option<ForeignChange>,
    /// The file's name was removed, which was reported and can't be undone.
    removed: bool,
}

#[derive(Debug)]
struct Follower {
    line: u64,
    wake: oneshot::Sender<()>,
}

impl LogBuffer {
    /// Creates a buffer over an empty spool.
    pub fn new(spool: Box<dyn LogSpool>, published: Published) -> Self {
        Self {
            spool,
            index: LogIndex::default(),
            published,
            sealed: false,
            followers: Vec::new(),
            line: Vec::new(),
            untold: None,
            removed: false,
        }
    }

    /// Creates a buffer over the spool of a crashed one, and cuts what was not published.
    pub fn recover(spool: Box<dyn LogSpool>, published: Published) -> io::Result<Self> {
        let PublishedEnd { lines, bytes } = &*published.0;
        let (lines, bytes) = (lines.load(Ordering::Acquire), bytes.load(Ordering::Acquire));
        let mut buffer = Self::new(spool, published);
        buffer.cut_to(bytes, lines)?;
        Ok(buffer)
    }

    /// Cuts the file to the whole lines within its first `length` bytes, and appends empty output
    /// events until there are `lines` lines.
    fn cut_to(&mut self, length: u64, lines: u64) -> io::Result<()> {
        let mut index = LogIndex::default();
        let mut offset = 0;
        let mut buffer = vec![0; 64 * 1024];
        while offset < length {
            let read = self.spool.read_at(offset, &mut buffer)?;
            if read == 0 {
                self.untold = Some(ForeignChange::Cut(offset));
                break;
            }
            let within = usize::try_from(length - offset).map_or(read, |left| left.min(read));
            for newline in memchr::memchr_iter(b'\n', &buffer[..within]) {
                let next_line = offset + newline as u64 + 1;
                index.append(next_line - index.end().offset);
            }
            offset += within as u64;
        }
        self.spool.truncate(index.end().offset)?;
        let mut empty = Vec::new();
        LogEvent::cmd_output("").encode(&mut empty)?;
        while index.end().line < lines {
            self.spool.append(&empty)?;
            index.append(empty.len() as u64);
        }
        self.index = index;
        self.published.publish(self.index.end());
        Ok(())
    }

    /// Notes a change that another process made to the file, and makes the file valid again.
    fn notice_changes(&mut self) -> io::Result<()> {
        let Some(change) = self.spool.foreign_change()? else {
            return Ok(());
        };
        match change {
            ForeignChange::Removed if self.removed => return Ok(()),
            ForeignChange::Removed => self.removed = true,
            ForeignChange::Cut(left) => self.cut_to(left, self.index.end().line)?,
            ForeignChange::Grown => self.spool.truncate(self.index.end().offset)?,
            // Returned by `check_bytes` only.
            ForeignChange::Overwritten => {}
        }
        self.untold = Some(change);
        Ok(())
    }

    fn append(&mut self, event: &LogEvent, are_last_words: bool) -> Result<(), LogError> {
        if self.sealed {
            return Err(LogError::Sealed);
        }
        self.notice_changes()?;
        if let Some(change) = self.untold.take() {
            return Err(change.into());
        }
        self.line.clear();
        event.encode(&mut self.line)?;
        let written = if are_last_words {
            self.spool.append_last_words(&self.line)
        } else {
            self.spool.append(&self.line)
        };
        if let Err(error) = written {
            // Half a line may be there; the next one must not continue it.
            if self.spool.truncate(self.index.end().offset).is_err() {
                // Half a line is there to stay, so nothing may come after it.
                self.sealed = true;
                self.wake_followers();
            }
            return Err(error.into());
        }
        self.index.append(self.line.len() as u64);
        self.published.publish(self.index.end());
        // A reader of the last line must learn with it that nothing follows.
        self.sealed = matches!(event, LogEvent::JobFinished { .. });
        self.line.shrink_to(2 * crate::log::event::MAX_OUTPUT_LINE);
        self.wake_followers();
        Ok(())
    }

    fn wake_followers(&mut self) {
        let (end, sealed) = (self.index.end().line, self.sealed);
        for follower in self.followers.extract_if(.., |f| sealed || f.line < end) {
            // The follower may have gone away.
            let _ = follower.wake.send(());
        }
    }

    fn range_from(&mut self, line: u64) -> Result<LogRange, LogError> {
        self.notice_changes().map_err(LogError::Unreadable)?;
        let end = self.index.end();
        Ok(LogRange {
            source: self.spool.source(),
            start: if line >= end.line { end.offset } else { self.offset_of(line)? },
            end: end.offset,
            next_line: end.line,
            sealed: self.sealed,
        })
    }

    fn offset_of(&self, line: u64) -> Result<u64, LogError> {
        let Position { line: mut at, mut offset } = self.index.at_or_before(line);
        let mut buffer = [0; 16 * 1024];
        while at < line {
            let read = self.spool.read_at(offset, &mut buffer).map_err(LogError::Unreadable)?;
            if read == 0 {
                return Err(LogError::Unreadable(io::ErrorKind::UnexpectedEof.into()));
            }
            let wanted = usize::try_from(line - at - 1).unwrap_or(usize::MAX);
            let mut newlines = memchr::memchr_iter(b'\n', &buffer[..read]);
            match newlines.nth(wanted) {
                Some(newline) => return Ok(offset + newline as u64 + 1),
                None => {
                    at += memchr::memchr_iter(b'\n', &buffer[..read]).count() as u64;
                    offset += read as u64;
                }
            }
        }
        Ok(offset)
    }
}

impl Actor for LogBuffer {
    type Context = Context<Self>;
}

impl Handler<Append> for LogBuffer {
    type Result = Result<(), LogError>;

    fn handle(&mut self, message: Append, _: &mut Self::Context) -> Self::Result {
        let is_the_end = matches!(message.event, LogEvent::JobFinished { .. });
        self.append(&message.event, is_the_end)
    }
}

impl Handler<AppendLastWords> for LogBuffer {
    type Result = Result<(), LogError>;

    fn handle(&mut self, message: AppendLastWords, _: &mut Self::Context) -> Self::Result {
        self.append(&message.event, true)
    }
}

impl Handler<Check> for LogBuffer {
    type Result = Result<(), LogError>;

    fn handle(&mut self, _: Check, _: &mut Self::Context) -> Self::Result {
        self.notice_changes()?;
        if let Some(change) = self.spool.check_bytes()? {
            // Newlines may have been overwritten, too: index the file again.
            let end = self.index.end();
            self.cut_to(end.offset, end.line)?;
            self.untold.get_or_insert(change);
        }
        self.untold.take().map_or(Ok(()), |change| Err(change.into()))
    }
}

impl Handler<ReadFrom> for LogBuffer {
    type Result = Result<LogRange, LogError>;

    fn handle(&mut self, message: ReadFrom, _: &mut Self::Context) -> Self::Result {
        self.range_from(message.line)
    }
}

impl Handler<Follow> for LogBuffer {
    type Result = ResponseActFuture<Self, Result<LogRange, LogError>>;

    fn handle(&mut self, message: Follow, _: &mut Self::Context) -> Self::Result {
        let (wake, woken) = oneshot::channel();
        self.followers.push(Follower { line: message.line, wake });
        self.wake_followers();
        Box::pin(woken.into_actor(self).map(move |woken, actor, _| match woken {
            Ok(()) => actor.range_from(message.line),
            Err(_) => Err(LogError::Crashed),
        }))
    }
}

impl Handler<Seal> for LogBuffer {
    type Result = ();

    fn handle(&mut self, _: Seal, _: &mut Self::Context) {
        self.sealed = true;
        self.wake_followers();
    }
}

#[cfg(test)]
mod tests;
