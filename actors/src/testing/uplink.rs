//! A scripted log server.

use std::cell::{Cell, RefCell};
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use tokio::time::{Instant, sleep};

use super::{ScriptedJob, panic_as_asked};
use crate::job::{JobId, PushTarget};
use crate::ports::LogRange;
use crate::ports::{LogBatch, LogFiles, LogServer, PushError};

/// How a log server handles a [`Push`].
#[derive(Debug)]
pub enum Reply {
    /// The batch is stored and acknowledged.
    Taken,
    /// The batch is stored, and the acknowledgement lost.
    Lost,
    /// The batch is not stored.
    Refused(PushError),
}

/// A batch sent to the log server.
#[derive(Clone, Debug)]
pub struct Push {
    /// The batch's ordinal number, from 1 on.
    pub number: usize,
    /// The time when the batch was sent.
    pub at: Instant,
    /// The number of the batch's first line, 0 based.
    pub first_line: u64,
    /// The number of lines.
    pub lines: u64,
    /// The number of bytes.
    pub bytes: usize,
    /// The log token.
    pub token: String,
}

/// A log server that stores everything unless a reply is scripted. Clones share the state.
///
/// Recorded in [`ScriptedJob::calls`]: `log is whole` when the last line of a job arrives and all
/// bytes are those of the job's spool, else `log is garbled`; `keep ID` and `remove
/// PATH`.
#[derive(Clone)]
pub struct ScriptedUplink(Rc<UplinkState>);

type Decide = Box<dyn FnMut(&Push) -> Reply>;

struct UplinkState {
    world: ScriptedJob,
    reply: RefCell<Decide>,
    latency: Cell<Duration>,
    /// The bandwidth, in bytes per second; 0 for no limit.
    rate: Cell<u32>,
    panic_in_read: Cell<bool>,
    pushes: RefCell<Vec<Push>>,
    lines: RefCell<Vec<Bytes>>,
    kept: RefCell<Option<String>>,
}

impl ScriptedUplink {
    /// Creates a log server for the job of `world`, which records its calls there.
    pub fn new(world: &ScriptedJob) -> Self {
        Self(Rc::new(UplinkState {
            world: world.clone(),
            reply: RefCell::new(Box::new(|_| Reply::Taken)),
            latency: Cell::default(),
            rate: Cell::default(),
            panic_in_read: Cell::default(),
            pushes: RefCell::default(),
            lines: RefCell::default(),
            kept: RefCell::default(),
        }))
    }

    /// Sets how all further batches are handled.
    pub fn reply(&self, reply: impl FnMut(&Push) -> Reply + 'static) {
        *self.0.reply.borrow_mut() = Box::new(reply);
    }

    /// Delays every reply from now on.
    pub fn take(&self, latency: Duration) {
        self.0.latency.set(latency);
    }

    /// Limits the bandwidth. A batch that takes longer than 5 s then fails and is not stored.
    pub fn slow_down(&self, bytes_per_second: u32) {
        self.0.rate.set(bytes_per_second);
    }

    /// Removes all stored lines, as a crash of the store does.
    pub fn forget(&self) {
        self.0.lines.borrow_mut().clear();
    }

    /// Makes the log shipper crash that reads next.
    pub fn crash_shipper(&self) {
        self.0.panic_in_read.set(true);
    }

    /// Returns all batches that were sent, stored or not.
    pub fn pushes(&self) -> Vec<Push> {
        self.0.pushes.borrow().clone()
    }

    /// Returns the stored log.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&self.0.lines.borrow().concat()).into_owned()
    }

    /// Returns the undelivered log that is kept, if any.
    pub fn kept(&self) -> Option<String> {
        self.0.kept.borrow().clone()
    }
}

/// How long the log server waits for a whole batch.
const CUT_OFF: Duration = Duration::from_secs(5);

impl UplinkState {
    /// Returns how long a batch of `bytes` bytes takes to arrive.
    fn time_for(&self, bytes: usize) -> Duration {
        match (self.rate.get(), u32::try_from(bytes)) {
            (0, _) => Duration::ZERO,
            (rate, bytes) => {
                Duration::from_secs_f64(f64::from(bytes.unwrap_or(u32::MAX)) / f64::from(rate))
            }
        }
    }

    /// Stores lines from `first_line` on, in place of everything stored there and behind.
    fn store(&self, first_line: u64, batch: &[u8]) {
        let mut lines = self.lines.borrow_mut();
        lines.resize(usize::try_from(first_line).unwrap_or(usize::MAX), Bytes::new());
        lines.extend(batch.split_inclusive(|byte| *byte == b'\n').map(Bytes::copy_from_slice));
        if lines.last().is_some_and(|line| line.starts_with(br#"{"event":"job_finished""#)) {
            let whole = lines.concat() == self.world.0.spool.borrow().contents();
            self.world.call(if whole { "log is whole" } else { "log is garbled" });
        }
    }

    fn spooled(&self, range: &LogRange) -> Vec<u8> {
        let at = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
        self.world.0.spool.borrow().contents()[at(range.start)..at(range.end)].to_vec()
    }
}

impl LogFiles for ScriptedUplink {
    fn read(
        &self,
        range: &LogRange,
        most_lines: u64,
        most_bytes: u64,
    ) -> LocalBoxFuture<'static, io::Result<LogBatch>> {
        if self.0.panic_in_read.replace(false) {
            panic_as_asked();
        }
        let mut batch = LogBatch { lines: 0, bytes: Bytes::new() };
        let mut bytes = Vec::new();
        for line in self.0.spooled(range).split_inclusive(|byte| *byte == b'\n') {
            let fits = (bytes.len() + line.len()) as u64 <= most_bytes;
            if batch.lines > 0 && (batch.lines == most_lines || !fits) {
                break;
            }
            bytes.extend_from_slice(line);
            batch.lines += 1;
        }
        batch.bytes = bytes.into();
        std::future::ready(Ok(batch)).boxed_local()
    }

    fn keep(&self, job: &JobId, log: &LogRange) -> io::Result<PathBuf> {
        self.0.world.call(format!("keep {job}"));
        let kept = String::from_utf8_lossy(&self.0.spooled(log)).into_owned();
        self.0.kept.replace(Some(kept));
        Ok(PathBuf::from("kept"))
    }

    fn remove_kept(&self, kept: &Path) -> io::Result<()> {
        self.0.world.call(format!("remove {}", kept.display()));
        self.0.kept.replace(None);
        Ok(())
    }
}

impl LogServer for ScriptedUplink {
    fn push(
        &self,
        target: &PushTarget,
        first_line: u64,
        batch: LogBatch,
    ) -> LocalBoxFuture<'static, Result<(), PushError>> {
        let this = Rc::clone(&self.0);
        let push = Push {
            number: this.pushes.borrow().len() + 1,
            at: Instant::now(),
            first_line,
            lines: batch.lines,
            bytes: batch.bytes.len(),
            token: target.token.clone(),
        };
        this.pushes.borrow_mut().push(push.clone());
        let reply = (this.reply.borrow_mut())(&push);
        async move {
            let latency = this.latency.get();
            if latency > Duration::ZERO {
                sleep(latency).await;
            }
            let on_its_way = this.time_for(push.bytes);
            if on_its_way > Duration::ZERO {
                sleep(on_its_way.min(CUT_OFF)).await;
            }
            if on_its_way > CUT_OFF {
                return Err(PushError::Failed("connection reset".into()));
            }
            if !matches!(reply, Reply::Refused(_)) {
                this.store(first_line, &batch.bytes);
            }
            match reply {
                Reply::Taken => Ok(()),
                Reply::Lost => Err(PushError::Failed("connection reset".into())),
                Reply::Refused(error) => Err(error),
            }
        }
        .boxed_local()
    }
}
