//! A job's log as a file of JSON lines.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use actors::ports::LogSpool;

/// A file that is only appended to; mode 0600.
#[derive(Debug)]
pub struct FileSpool {
    path: PathBuf,
    file: File,
}

impl FileSpool {
    /// Makes a new file; fails if there is one.
    pub fn create(path: PathBuf) -> io::Result<Self> {
        let mut options = File::options();
        options.read(true).append(true).create_new(true).mode(0o600);
        let file = options.open(&path)?;
        Ok(Self { path, file })
    }
}

impl LogSpool for FileSpool {
    fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        self.file.write_all(lines)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.file.set_len(length)
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn reopen(&self) -> io::Result<Box<dyn LogSpool>> {
        let file = File::options().read(true).append(true).open(&self.path)?;
        Ok(Box::new(Self { path: self.path.clone(), file }))
    }
}
