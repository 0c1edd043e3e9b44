//! Reads logs for delivery, and keeps those that were not delivered.

use std::fs::{self, DirBuilder};
use std::io::{self, Read as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use actors::job::JobId;
use actors::ports::LogRange;
use actors::ports::{LogBatch, LogFiles};
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;

/// How many undelivered logs are kept; the oldest ones beyond that are removed.
const MOST_KEPT: usize = 100;

/// How much of a log file is read at once, in bytes.
const READ_SIZE: usize = 64 << 10;

/// The logs of this machine's jobs.
#[derive(Debug)]
pub struct StateLogFiles {
    undelivered: PathBuf,
}

impl StateLogFiles {
    /// Keeps undelivered logs in the directory `undelivered`, which is made when it is needed.
    pub fn new(undelivered: PathBuf) -> Self {
        Self { undelivered }
    }
}

/// Removes the oldest files of `directory` beyond [`MOST_KEPT`].
fn remove_oldest(directory: &Path) -> io::Result<()> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        files.push((entry.metadata()?.modified()?, entry.path()));
    }
    files.sort();
    for (_, path) in files.iter().take(files.len().saturating_sub(MOST_KEPT)) {
        fs::remove_file(path)?;
    }
    Ok(())
}

fn read_lines(range: &LogRange, most_lines: u64, most_bytes: u64) -> io::Result<LogBatch> {
    let mut file = range.reader();
    let mut bytes = Vec::new();
    // `bytes[..end]` holds `lines` whole lines.
    let (mut lines, mut end) = (0, 0);
    loop {
        let old = bytes.len();
        if (&mut file).take(READ_SIZE as u64).read_to_end(&mut bytes)? == 0 {
            break;
        }
        for newline in memchr::memchr_iter(b'\n', &bytes[old..]) {
            let next = old + newline + 1;
            if lines == most_lines || (lines > 0 && next as u64 > most_bytes) {
                break;
            }
            (lines, end) = (lines + 1, next);
        }
        if lines == most_lines || (lines > 0 && bytes.len() as u64 > most_bytes) {
            break;
        }
    }
    if lines == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    bytes.truncate(end);
    Ok(LogBatch { lines, bytes: bytes.into() })
}

impl LogFiles for StateLogFiles {
    fn read(
        &self,
        range: &LogRange,
        most_lines: u64,
        most_bytes: u64,
    ) -> LocalBoxFuture<'static, io::Result<LogBatch>> {
        let range = range.clone();
        let read =
            actix_rt::task::spawn_blocking(move || read_lines(&range, most_lines, most_bytes));
        async { read.await.map_err(io::Error::other)? }.boxed_local()
    }

    fn keep(&self, job: &JobId, log: &LogRange) -> io::Result<PathBuf> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.undelivered)?;
        let is_plain = |c: &char| c.is_ascii_alphanumeric() || "-_".contains(*c);
        let name: String = job.as_str().chars().filter(is_plain).take(100).collect();
        for number in 1.. {
            let path = self.undelivered.join(format!("{name}.{number}.jsonl"));
            match log.source.link_or_copy_to(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                linked => {
                    linked?;
                    remove_oldest(&self.undelivered)?;
                    return Ok(path);
                }
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    fn remove_kept(&self, kept: &Path) -> io::Result<()> {
        fs::remove_file(kept)
    }
}

#[cfg(test)]
mod tests {
    use actors::ports::LogSpool as _;

    use super::*;
    use crate::state::log_file::FileSpool;

    fn spool(directory: &Path, text: &str) -> FileSpool {
        let mut spool = FileSpool::create(directory.join("log")).unwrap();
        spool.append(text.as_bytes()).unwrap();
        spool
    }

    fn range(spool: &FileSpool, start: u64, end: u64) -> LogRange {
        LogRange { source: spool.source(), start, end, next_line: 0, sealed: true }
    }

    #[test]
    fn batches_are_whole_lines_within_both_limits() {
        let directory = tempfile::tempdir().unwrap();
        let lines: Vec<String> =
            (0..5000).map(|i| format!("{i}{}\n", "x".repeat(i * 37 % 90_000))).collect();
        let whole = lines.concat();
        let spool = spool(directory.path(), &whole);
        for (most_lines, most_bytes) in [(2000, 1 << 20), (1, 1), (7, 100), (3000, 64 << 10)] {
            let mut got = Vec::new();
            let mut start = 0;
            while start < 20_000_000 {
                let range = range(&spool, start, whole.len() as u64);
                let LogBatch { lines, bytes } = read_lines(&range, most_lines, most_bytes).unwrap();
                assert!(lines <= most_lines && (bytes.len() as u64 <= most_bytes || lines == 1));
                assert_eq!(memchr::memchr_iter(b'\n', &bytes).count() as u64, lines);
                start += bytes.len() as u64;
                got.extend_from_slice(&bytes);
            }
            assert!(whole.as_bytes().starts_with(&got), "{most_lines} {most_bytes}");
        }
    }

    #[test]
    fn what_is_not_published_yet_is_not_read() {
        let directory = tempfile::tempdir().unwrap();
        let spool = spool(directory.path(), "one\ntwo\nthr");
        let batch = read_lines(&range(&spool, 0, 8), 100, 100).unwrap();
        assert_eq!((batch.lines, &*batch.bytes), (2, &b"one\ntwo\n"[..]));
    }
}
