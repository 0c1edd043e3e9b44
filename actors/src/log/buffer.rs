//! Owns a job's log: the only writer of its spool, and the only one who knows where a line is.
//!
//! Receives [`Append`] (awaited, which is the back-pressure on the job's output), [`ReadFrom`] and
//! [`Follow`] from readers, and [`Seal`] at the end. Answers readers with a file and a range, never
//! with bytes, so that a slow reader costs the job nothing.
//!
//! A line is readable only after it was written whole, and never changes then. A crash leaves the
//! [`Published`] length behind: [`LogBuffer::recover`] cuts what was not published and goes on.
//!
//! A job can change the file behind the agent's back. A change of its length or its name is noticed with the next line
//! or reader, changed bytes by [`Check`]; whoever appends the next line or checks is told. A log never gets fewer
//! lines: empty ones stand where some were cut off, so that readers who count lines find the end.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use actix::prelude::*;
use tokio::sync::oneshot;

use crate::log::event::LogEvent;
use crate::log::index::{LogIndex, Position};
use crate::ports::{ForeignChange, LogSource, LogSpool};

/// Writes an event as the next line.
#[derive(Debug, Message)]
#[rtype(result = "Result<(), LogError>")]
pub struct Append {
    /// What happened.
    pub event: LogEvent,
}

/// Writes an event as [`Append`] does, into the room that is kept for the last lines if there is no other.
#[derive(Debug, Message)]
#[rtype(result = "Result<(), LogError>")]
pub struct AppendLastWords {
    /// The event.
    pub event: LogEvent,
}

/// Looks for what somebody else did to the log, and tells what was not told yet.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Result<(), LogError>")]
pub struct Check;

/// Asks where the lines from `line` on are, as many as there are now.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Result<LogRange, LogError>")]
pub struct ReadFrom {
    /// The first line wanted, 0 based.
    pub line: u64,
}

/// The same, but waits until there is such a line or the log is sealed.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Result<LogRange, LogError>")]
pub struct Follow {
    /// The first line wanted, 0 based.
    pub line: u64,
}

/// No line will come any more, as after the end of the job. Sealing twice is the same as once.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct Seal;

/// Where some whole lines are.
#[derive(Clone, Debug)]
pub struct LogRange {
    /// The open file.
    pub source: Arc<dyn LogSource>,
    /// The offset of the first line wanted, in bytes; `end` if there is no such line.
    pub start: u64,
    /// The end of the last whole line, in bytes.
    pub end: u64,
    /// The number of the line that will come at `end`.
    pub next_line: u64,
    /// Whether the log ends at `end`.
    pub sealed: bool,
}

impl LogRange {
    /// Reads the range's bytes from its start on; fewer if somebody has cut the file meanwhile.
    pub fn reader(&self) -> LogReader {
        LogReader { source: Arc::clone(&self.source), at: self.start, end: self.end }
    }
}

/// See [`LogRange::reader`].
#[derive(Debug)]
pub struct LogReader {
    source: Arc<dyn LogSource>,
    at: u64,
    end: u64,
}

impl io::Read for LogReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
        let wanted = buffer.len().min(left);
        let read = self.source.read_at(self.at, &mut buffer[..wanted])?;
        self.at += read as u64;
        Ok(read)
    }
}

/// Why the log could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// A line came after the end.
    #[error("the log is sealed")]
    Sealed,
    /// The event is no JSON; can't happen for events made of strings and numbers.
    #[error("an event could not be encoded")]
    Encode(#[from] serde_json::Error),
    /// The spool failed.
    #[error("the job's log could not be written: {0}")]
    Spool(#[from] io::Error),
    /// Somebody else changed the log. Told once; lines that come after are written.
    #[error("the job's log was changed by somebody else: {0}")]
    Changed(#[from] ForeignChange),
    /// The log buffer is gone.
    #[error("the log buffer has crashed")]
    Crashed,
}

/// How much of the spool is published; shared with whoever may have to recover it.
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

/// See the module.
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
    /// Somebody took the file's name away. That stays so.
    removed: bool,
}

#[derive(Debug)]
struct Follower {
    line: u64,
    wake: oneshot::Sender<()>,
}

impl LogBuffer {
    /// A buffer over an empty spool.
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

    /// A buffer over the spool of one that crashed: what was not published is cut.
    pub fn recover(spool: Box<dyn LogSpool>, published: Published) -> io::Result<Self> {
        let PublishedEnd { lines, bytes } = &*published.0;
        let (lines, bytes) = (lines.load(Ordering::Acquire), bytes.load(Ordering::Acquire));
        let mut buffer = Self::new(spool, published);
        buffer.cut_to(bytes, lines)?;
        Ok(buffer)
    }

    /// Goes on with what is whole within the first `length` bytes of the file, and with empty lines up to `lines`.
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

    /// Looks whether somebody else changed the file, and goes on with what is left of it.
    fn notice_changes(&mut self) -> io::Result<()> {
        let Some(change) = self.spool.foreign_change()? else {
            return Ok(());
        };
        match change {
            ForeignChange::Removed if self.removed => return Ok(()),
            ForeignChange::Removed => self.removed = true,
            ForeignChange::Cut(left) => self.cut_to(left, self.index.end().line)?,
            ForeignChange::Grown => self.spool.truncate(self.index.end().offset)?,
            // Only `check_bytes` finds that.
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
                // It can't be cut off, so nothing may come after it.
                self.sealed = true;
                self.wake_followers();
            }
            return Err(error.into());
        }
        self.index.append(self.line.len() as u64);
        self.published.publish(self.index.end());
        // Whoever reads the end of the job is to know that nothing follows.
        self.sealed = matches!(event, LogEvent::JobFinished { .. });
        self.line.shrink_to(2 * crate::log::event::MAX_OUTPUT_LINE);
        self.wake_followers();
        Ok(())
    }

    fn wake_followers(&mut self) {
        let (end, sealed) = (self.index.end().line, self.sealed);
        for follower in self.followers.extract_if(.., |f| sealed || f.line < end) {
            // A follower that is gone has nothing to be told.
            let _ = follower.wake.send(());
        }
    }

    fn range_from(&mut self, line: u64) -> Result<LogRange, LogError> {
        self.notice_changes()?;
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
            let read = self.spool.read_at(offset, &mut buffer)?;
            if read == 0 {
                return Err(LogError::Spool(io::ErrorKind::UnexpectedEof.into()));
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
            // Lines may begin and end elsewhere now.
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

/// Makes the actor panic as a bug would.
#[cfg(feature = "testing")]
impl Handler<crate::testing::PanicNow> for LogBuffer {
    type Result = ();

    fn handle(&mut self, _: crate::testing::PanicNow, _: &mut Self::Context) {
        crate::testing::panic_as_asked();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::MemorySpool;

    fn output(text: &str) -> Append {
        Append { event: LogEvent::cmd_output(text) }
    }

    fn read(spool: &MemorySpool, range: &LogRange) -> Vec<String> {
        let bytes = spool.contents();
        let [start, end] = [range.start, range.end].map(|at| usize::try_from(at).unwrap());
        let lines = std::str::from_utf8(&bytes[start..end]).unwrap().lines();
        lines
            .map(|line| match LogEvent::decode(line.as_bytes()).unwrap() {
                LogEvent::CmdOutput { output, .. } => output,
                other => panic!("{other:?}"),
            })
            .collect()
    }

    #[actix::test]
    async fn any_line_can_be_found_and_never_changes() {
        let spool = MemorySpool::default();
        let log = LogBuffer::new(Box::new(spool.clone()), Published::default()).start();
        let texts: Vec<String> =
            (0..1000).map(|i| format!("{i}{}", "x".repeat(i * 7 % 3000))).collect();
        for text in &texts {
            log.send(output(text)).await.unwrap().unwrap();
        }
        for line in [0, 1, 63, 64, 65, 500, 998, 999, 1000, 5000] {
            let range = log.send(ReadFrom { line: line as u64 }).await.unwrap().unwrap();
            assert_eq!(read(&spool, &range), texts[line.min(1000)..], "from line {line}");
            assert_eq!((range.next_line, range.sealed), (1000, false));
        }
    }

    #[actix::test]
    async fn a_follower_waits_for_its_line_or_the_end() {
        let spool = MemorySpool::default();
        let log = LogBuffer::new(Box::new(spool.clone()), Published::default()).start();
        let mut waiting = Box::pin(log.send(Follow { line: 1 }));
        assert!(futures_util::poll!(&mut waiting).is_pending());
        log.send(output("a")).await.unwrap().unwrap();
        assert!(futures_util::poll!(&mut waiting).is_pending());
        log.send(output("b")).await.unwrap().unwrap();
        assert_eq!(read(&spool, &waiting.await.unwrap().unwrap()), ["b"]);

        let at_end = log.send(Follow { line: 2 });
        log.send(Seal).await.unwrap();
        let range = at_end.await.unwrap().unwrap();
        assert!(range.sealed && range.start == range.end);
        assert!(matches!(log.send(output("late")).await.unwrap(), Err(LogError::Sealed)));
    }

    #[actix::test]
    async fn a_failed_write_leaves_no_half_line() {
        let spool = MemorySpool::default();
        let log = LogBuffer::new(Box::new(spool.clone()), Published::default()).start();
        log.send(output("a")).await.unwrap().unwrap();
        spool.fail_next_append_after(5);
        assert!(matches!(log.send(output("lost")).await.unwrap(), Err(LogError::Spool(_))));
        log.send(output("b")).await.unwrap().unwrap();
        let range = log.send(ReadFrom { line: 0 }).await.unwrap().unwrap();
        assert_eq!(read(&spool, &range), ["a", "b"]);
    }

    #[actix::test]
    async fn a_crash_loses_nothing_that_was_published() {
        let spool = MemorySpool::default();
        let published = Published::default();
        let log = LogBuffer::new(Box::new(spool.clone()), published.clone()).start();
        for i in 0..200 {
            log.send(output(&i.to_string())).await.unwrap().unwrap();
        }
        assert!(log.send(crate::testing::PanicNow).await.is_err());
        spool.clone().append(b"{\"event\":\"cmd_out").unwrap();

        let recovered = LogBuffer::recover(Box::new(spool.clone()), published).unwrap().start();
        recovered.send(output("after")).await.unwrap().unwrap();
        let range = recovered.send(ReadFrom { line: 198 }).await.unwrap().unwrap();
        assert_eq!(read(&spool, &range), ["198", "199", "after"]);
    }

    #[actix::test]
    async fn a_log_that_somebody_cuts_keeps_its_number_of_lines_and_tells_it_once() {
        let spool = MemorySpool::default();
        let log = LogBuffer::new(Box::new(spool.clone()), Published::default()).start();
        for i in 0..200 {
            log.send(output(&i.to_string())).await.unwrap().unwrap();
        }
        spool.cut_behind_the_writer(spool.contents().len() / 2 + 3);
        let range = log.send(ReadFrom { line: 198 }).await.unwrap().unwrap();
        assert_eq!(read(&spool, &range), ["", ""]);
        let told = log.send(output("not written")).await.unwrap();
        assert!(matches!(told, Err(LogError::Changed(ForeignChange::Cut(_)))), "{told:?}");
        log.send(output("after")).await.unwrap().unwrap();
        let all = log.send(ReadFrom { line: 0 }).await.unwrap().unwrap();
        let lines = read(&spool, &all);
        assert_eq!((lines.len(), &*lines[0], &*lines[50], &*lines[200]), (201, "0", "50", "after"));
    }

    #[actix::test]
    async fn what_somebody_else_appends_is_no_part_of_the_log() {
        let spool = MemorySpool::default();
        let log = LogBuffer::new(Box::new(spool.clone()), Published::default()).start();
        log.send(output("a")).await.unwrap().unwrap();
        spool.write_behind_the_writer(b"garbage");
        assert!(matches!(
            log.send(Check).await.unwrap(),
            Err(LogError::Changed(ForeignChange::Grown))
        ));
        log.send(output("b")).await.unwrap().unwrap();
        let range = log.send(ReadFrom { line: 0 }).await.unwrap().unwrap();
        assert_eq!(read(&spool, &range), ["a", "b"]);
        assert_eq!(spool.contents().len() as u64, range.end);
    }

    #[actix::test]
    async fn overwritten_bytes_are_told_by_a_check_and_cost_no_line() {
        let spool = MemorySpool::default();
        let log = LogBuffer::new(Box::new(spool.clone()), Published::default()).start();
        for _ in 0..3 {
            log.send(output("text")).await.unwrap().unwrap();
        }
        log.send(Check).await.unwrap().unwrap();
        let first = memchr::memchr(b'\n', &spool.contents()).unwrap();
        spool.overwrite_behind_the_writer(first, b" ");
        let told = log.send(Check).await.unwrap();
        assert!(matches!(told, Err(LogError::Changed(ForeignChange::Overwritten))), "{told:?}");
        log.send(Check).await.unwrap().unwrap();
        let range = log.send(ReadFrom { line: 2 }).await.unwrap().unwrap();
        assert_eq!((read(&spool, &range), range.next_line), (vec![String::new()], 3));
    }

    #[actix::test]
    async fn a_crash_after_somebody_cut_the_log_is_survived() {
        let spool = MemorySpool::default();
        let published = Published::default();
        let log = LogBuffer::new(Box::new(spool.clone()), published.clone()).start();
        for text in ["a", "b", "c"] {
            log.send(output(text)).await.unwrap().unwrap();
        }
        assert!(log.send(crate::testing::PanicNow).await.is_err());
        spool.cut_behind_the_writer(10);
        let recovered = LogBuffer::recover(Box::new(spool.clone()), published).unwrap().start();
        assert!(matches!(recovered.send(Check).await.unwrap(), Err(LogError::Changed(_))));
        let range = recovered.send(ReadFrom { line: 0 }).await.unwrap().unwrap();
        assert_eq!((read(&spool, &range), range.next_line), (vec![String::new(); 3], 3));
    }
}
