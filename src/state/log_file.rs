//! A job's log as a file of JSON lines.

use std::cmp::Ordering;
use std::fs::{File, Metadata};
use std::hash::{BuildHasher as _, DefaultHasher, Hasher as _, RandomState};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use actors::ports::{ForeignChange, LogSource, LogSpool};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, FallocateFlags, fallocate};
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::linkat;

/// Step by which disk space is preallocated, in bytes.
const PREALLOCATION_STEP: u64 = 256 << 10;

/// Space reserved for the last lines of a log, in bytes: a full disk must not cost the job's result.
const LAST_WORDS: u64 = 16 << 10;

/// Size of the buffer for hashing the file, in bytes.
const HASH_BUFFER: usize = 256 << 10;

/// An append-only file with mode 0600. The file stays open from its creation on and is never opened by
/// name again, because a job may put another file in its place.
#[derive(Clone, Debug)]
pub struct FileSpool {
    path: PathBuf,
    file: Arc<OpenFile>,
    /// Offset at which the next line is written, in bytes.
    end: u64,
    /// Offset up to which disk space is reserved, in bytes; `u64::MAX` if the file system can't preallocate.
    reserved: u64,
    /// The process's file size limit (`RLIMIT_FSIZE`), in bytes.
    limit: u64,
    /// The secret key of `written`: a job can't forge content with the same hash.
    key: RandomState,
    /// Hash of all bytes up to `end`.
    written: DefaultHasher,
}

/// An open file shared by its readers, even after it was renamed or removed.
#[derive(Debug)]
pub struct OpenFile(pub File);

impl FileSpool {
    /// Creates the file; fails if it exists or the disk is full.
    pub fn create(path: PathBuf) -> io::Result<Self> {
        let mut options = File::options();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = Arc::new(OpenFile(options.open(&path)?));
        let (limit, _) = getrlimit(Resource::RLIMIT_FSIZE)?;
        let key = RandomState::new();
        let written = key.build_hasher();
        let mut spool = Self { path, file, end: 0, reserved: 0, limit, key, written };
        spool.reserve(0)?;
        Ok(spool)
    }

    /// Hashes the first `length` bytes of the file as they are now.
    fn hash_of_file(&self, length: u64) -> io::Result<DefaultHasher> {
        let mut hasher = self.key.build_hasher();
        let mut buffer = vec![0; HASH_BUFFER];
        let mut offset = 0;
        while offset < length {
            let left = usize::try_from(length - offset).unwrap_or(usize::MAX);
            let wanted = left.min(buffer.len());
            match self.file.read_at(offset, &mut buffer[..wanted])? {
                0 => break,
                read => {
                    hasher.write(&buffer[..read]);
                    offset += read as u64;
                }
            }
        }
        Ok(hasher)
    }

    /// Reserves disk space for `more` bytes and the last words.
    fn reserve(&mut self, more: u64) -> io::Result<()> {
        let wanted = self.end + more + LAST_WORDS;
        if wanted > self.limit {
            return Err(Errno::EFBIG.into());
        }
        if wanted <= self.reserved {
            return Ok(());
        }
        let reserved = wanted.next_multiple_of(PREALLOCATION_STEP);
        let [from, length] =
            [self.end, reserved - self.end].map(|bytes| i64::try_from(bytes).unwrap_or(i64::MAX));
        match fallocate(&self.file.0, FallocateFlags::FALLOC_FL_KEEP_SIZE, from, length) {
            Ok(()) => self.reserved = reserved,
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => self.reserved = u64::MAX,
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

impl LogSpool for FileSpool {
    fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        self.reserve(lines.len() as u64)?;
        self.append_last_words(lines)
    }

    fn append_last_words(&mut self, lines: &[u8]) -> io::Result<()> {
        self.file.0.write_all_at(lines, self.end)?;
        self.end += lines.len() as u64;
        self.written.write(lines);
        Ok(())
    }

    fn foreign_change(&self) -> io::Result<Option<ForeignChange>> {
        let open = self.file.0.metadata()?;
        Ok(match open.len().cmp(&self.end) {
            Ordering::Less => Some(ForeignChange::Cut(open.len())),
            Ordering::Greater => Some(ForeignChange::Grown),
            Ordering::Equal => {
                let named = self.path.symlink_metadata();
                let is_same_file =
                    |named: Metadata| (named.dev(), named.ino()) == (open.dev(), open.ino());
                (!named.is_ok_and(is_same_file)).then_some(ForeignChange::Removed)
            }
        })
    }

    fn check_bytes(&mut self) -> io::Result<Option<ForeignChange>> {
        let found = self.hash_of_file(self.end)?;
        let is_changed = found.finish() != self.written.finish();
        self.written = found;
        Ok(is_changed.then_some(ForeignChange::Overwritten))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read_at(offset, buffer)
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.file.0.set_len(length)?;
        if length != self.end {
            self.written = self.hash_of_file(length)?;
            self.end = length;
        }
        // Truncating also frees the space reserved behind the new end.
        self.reserved = self.reserved.min(length);
        Ok(())
    }

    fn source(&self) -> Arc<dyn LogSource> {
        Arc::clone(&self.file) as Arc<dyn LogSource>
    }

    fn reopen(&self) -> io::Result<Box<dyn LogSpool>> {
        Ok(Box::new(self.clone()))
    }
}

impl LogSource for OpenFile {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read_at(buffer, offset)
    }

    fn link_or_copy_to(&self, path: &Path) -> io::Result<()> {
        // Link the open descriptor: the name may belong to another file by now.
        let open = format!("/proc/self/fd/{}", self.0.as_raw_fd());
        match linkat(AT_FDCWD, open.as_str(), AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW) {
            Ok(()) => Ok(()),
            Err(Errno::EEXIST) => Err(Errno::EEXIST.into()),
            // The job has removed the file's last name, or `path` is on another file system.
            Err(_) => {
                let mut copy =
                    File::options().write(true).create_new(true).mode(0o600).open(path)?;
                io::copy(&mut File::open(open)?, &mut copy).map(drop)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overwritten_byte_is_reported_once_whatever_the_sizes_of_the_writes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut spool = FileSpool::create(path.clone()).unwrap();
        for length in [0, 1, 7, 8, 9, 100_000, 300_000, 3] {
            spool.append(&vec![b'x'; length]).unwrap();
            assert_eq!(spool.check_bytes().unwrap(), None, "after {length} more");
        }
        spool.truncate(200_001).unwrap();
        spool.append(b"more").unwrap();
        assert_eq!(spool.check_bytes().unwrap(), None);
        File::options().write(true).open(&path).unwrap().write_all_at(b"y", 100_000).unwrap();
        assert_eq!(spool.foreign_change().unwrap(), None);
        assert_eq!(spool.check_bytes().unwrap(), Some(ForeignChange::Overwritten));
        assert_eq!(spool.check_bytes().unwrap(), None);
        spool.append(b"more").unwrap();
        assert_eq!(spool.check_bytes().unwrap(), None);
    }

    #[test]
    fn a_log_is_kept_whether_or_not_its_file_still_has_a_name() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let mut spool = FileSpool::create(at("log")).unwrap();
        spool.append(b"one\n").unwrap();
        spool.source().link_or_copy_to(&at("linked")).unwrap();
        std::fs::remove_file(at("log")).unwrap();
        std::fs::remove_file(at("linked")).unwrap();
        spool.source().link_or_copy_to(&at("copied")).unwrap();
        assert_eq!(std::fs::read(at("copied")).unwrap(), b"one\n");
        assert!(
            spool.source().link_or_copy_to(&at("copied")).is_err(),
            "an existing file was replaced"
        );
    }
}
