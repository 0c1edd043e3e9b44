//! Owns a job's log: the only writer of its spool, and the only one who knows where a line is.
//!
//! Receives [`Append`] (awaited, which is the back-pressure on the job's output), [`ReadFrom`] and
//! [`Follow`] from readers, and [`Seal`] at the end. Answers readers with a file and a range, never
//! with bytes, so that a slow reader costs the job nothing.
//!
//! A line is readable only after it was written whole, and never changes then. A crash leaves the
//! [`Published`] length behind: [`LogBuffer::recover`] cuts what was not published and goes on.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use actix::prelude::*;
use tokio::sync::oneshot;

use crate::log_event::LogEvent;
use crate::log_index::{LogIndex, Position};
use crate::ports::LogSpool;

/// Writes an event as the next line.
#[derive(Debug, Message)]
#[rtype(result = "Result<(), LogError>")]
pub struct Append {
    /// What happened.
    pub event: LogEvent,
}

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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogRange {
    /// The file.
    pub path: PathBuf,
    /// The offset of the first line wanted, in bytes; `end` if there is no such line.
    pub start: u64,
    /// The end of the last whole line, in bytes.
    pub end: u64,
    /// The number of the line that will come at `end`.
    pub next_line: u64,
    /// Whether the log ends at `end`.
    pub sealed: bool,
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
    #[error("the log file failed: {0}")]
    Spool(#[from] io::Error),
    /// The log buffer is gone.
    #[error("the log buffer has crashed")]
    Crashed,
}

/// How much of the spool is published; shared with whoever may have to recover it.
#[derive(Clone, Debug, Default)]
pub struct Published(Arc<AtomicU64>);

impl Published {
    /// In bytes.
    fn length(&self) -> u64 {
        self.0.load(Ordering::Acquire)
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
        }
    }

    /// A buffer over the spool of one that crashed: what was not published is cut.
    pub fn recover(mut spool: Box<dyn LogSpool>, published: Published) -> io::Result<Self> {
        let length = published.length();
        spool.truncate(length)?;
        let mut index = LogIndex::default();
        let mut line_start = 0;
        let mut offset = 0;
        let mut buffer = vec![0; 64 * 1024];
        while offset < length {
            let read = spool.read_at(offset, &mut buffer)?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            for newline in memchr::memchr_iter(b'\n', &buffer[..read]) {
                let next_line = offset + newline as u64 + 1;
                index.append(next_line - line_start);
                line_start = next_line;
            }
            offset += read as u64;
        }
        Ok(Self { index, ..Self::new(spool, published) })
    }

    fn append(&mut self, event: &LogEvent) -> Result<(), LogError> {
        if self.sealed {
            return Err(LogError::Sealed);
        }
        self.line.clear();
        event.encode(&mut self.line)?;
        if let Err(error) = self.spool.append(&self.line) {
            // Half a line may be there; the next one must not continue it.
            if self.spool.truncate(self.index.end().offset).is_err() {
                // It can't be cut off, so nothing may come after it.
                self.sealed = true;
                self.wake_followers();
            }
            return Err(error.into());
        }
        self.index.append(self.line.len() as u64);
        self.published.0.store(self.index.end().offset, Ordering::Release);
        // Whoever reads the end of the job is to know that nothing follows.
        self.sealed = matches!(event, LogEvent::JobFinished { .. });
        self.line.shrink_to(2 * crate::log_event::MAX_OUTPUT_LINE);
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

    fn range_from(&self, line: u64) -> Result<LogRange, LogError> {
        let end = self.index.end();
        Ok(LogRange {
            path: self.spool.path().to_owned(),
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
        self.append(&message.event)
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
}
