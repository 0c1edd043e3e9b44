//! Where a job's log is kept.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// A job's log for its readers: an open file, readable even after its name was removed or reused.
///
/// Read concurrently by any number of threads, and while the [`LogSpool`] appends. Readers stop at
/// the end that the log buffer has published ([`LogRange::end`]): behind it may be half a line.
pub trait LogSource: Send + Sync + fmt::Debug {
    /// Reads from byte `offset` on. Returns the number of bytes read; 0 at the end of the file.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;

    /// Gives the file the additional name `path`, or copies it there where no link is possible.
    /// Fails with [`io::ErrorKind::AlreadyExists`] if there is something.
    fn link_or_copy_to(&self, path: &Path) -> io::Result<()>;
}

/// A range of whole lines in a log's file.
#[derive(Clone, Debug)]
pub struct LogRange {
    /// The open file.
    pub source: Arc<dyn LogSource>,
    /// The byte offset of the first line wanted; equal to `end` if the line does not exist.
    pub start: u64,
    /// The byte offset behind the last whole line.
    pub end: u64,
    /// The number of the line that will begin at `end`, 0 based.
    pub next_line: u64,
    /// Whether the log ends at `end` for good.
    pub sealed: bool,
}

impl LogRange {
    /// Returns a reader of the range's bytes; it ends early if the file was cut meanwhile.
    pub fn reader(&self) -> LogReader {
        LogReader { source: Arc::clone(&self.source), at: self.start, end: self.end }
    }
}

/// Reads the bytes of a [`LogRange`], returned by [`LogRange::reader`].
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

/// A change that another process made to a log's file. A job can do that: it runs as the agent's
/// user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ForeignChange {
    /// The file's name was removed, or is that of another file now. The open file is unharmed.
    #[error("its file was removed or replaced")]
    Removed,
    /// The file was cut to this many bytes.
    #[error("its file was truncated")]
    Cut(u64),
    /// Another process appended to the file.
    #[error("another process wrote to its file")]
    Grown,
    /// Bytes within the file differ from those that were written.
    #[error("its file was overwritten")]
    Overwritten,
}

/// The writer of a job's log file: only appended to, and only in whole lines.
///
/// One handle writes at a time: that of the log buffer. When the buffer crashes, its successor gets
/// another one by [`Self::reopen`].
pub trait LogSpool: Send + fmt::Debug {
    /// Appends whole lines, newlines included. Fails early enough that there is room left for
    /// [`Self::append_last_words`].
    ///
    /// After an error a part of the lines may be in the file: the caller truncates it to its last
    /// whole line.
    fn append(&mut self, lines: &[u8]) -> io::Result<()>;

    /// Appends a log's last lines, a few kilobytes in all, into the room that [`Self::append`]
    /// leaves.
    fn append_last_words(&mut self, lines: &[u8]) -> io::Result<()>;

    /// Compares the file's length and name with what this handle has written. Cheap: done before
    /// each line and for each reader.
    ///
    /// Returns the same change at each call until [`Self::truncate`] accepts it;
    /// [`ForeignChange::Removed`] for good. Never returns [`ForeignChange::Overwritten`].
    fn foreign_change(&self) -> io::Result<Option<ForeignChange>>;

    /// Compares all bytes with those that were written; about 1 ms for each megabyte. Returns
    /// [`ForeignChange::Overwritten`] once for each difference: the bytes found count as written
    /// then.
    fn check_bytes(&mut self) -> io::Result<Option<ForeignChange>>;

    /// Reads from byte `offset` on. Returns the number of bytes read; 0 at the end of the file.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;

    /// Cuts the file to `length` bytes, which must all be there. The next line is appended there,
    /// and the first `length` bytes, as found, count as written.
    fn truncate(&mut self, length: u64) -> io::Result<()>;

    /// Returns the same file for readers.
    fn source(&self) -> Arc<dyn LogSource>;

    /// Returns another handle on the same file, even if its name is gone. The new handle may not
    /// know the current length: [`Self::truncate`] comes first, before anything is appended or
    /// checked.
    fn reopen(&self) -> io::Result<Box<dyn LogSpool>>;

    /// Whether the calls do I/O, so that the log buffer needs a thread of its own.
    fn may_block(&self) -> bool {
        true
    }
}
