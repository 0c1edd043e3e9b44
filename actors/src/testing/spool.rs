//! A log in memory, which tests can damage.

use std::cmp::Ordering;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::ports::{ForeignChange, LogSource, LogSpool};

/// A spool in memory. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct MemorySpool(Arc<Mutex<MemorySpoolState>>);

#[derive(Debug, Default)]
struct MemorySpoolState {
    bytes: Vec<u8>,
    /// The length of what was written through the spool, in bytes.
    known: usize,
    fail_after: Option<usize>,
    is_full: bool,
    is_overwritten: bool,
}

impl MemorySpool {
    fn state(&self) -> MutexGuard<'_, MemorySpoolState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns all bytes of the spool.
    pub fn contents(&self) -> Vec<u8> {
        self.state().bytes.clone()
    }

    /// Lets the next append write only `bytes` bytes and fail.
    pub fn fail_next_append_after(&self, bytes: usize) {
        self.state().fail_after = Some(bytes);
    }

    /// Sets whether there is room for last words only.
    pub fn set_full(&self, is_full: bool) {
        self.state().is_full = is_full;
    }

    /// Cuts the spool to `length` bytes, as another process could.
    pub fn cut_behind_the_writer(&self, length: usize) {
        self.state().bytes.truncate(length);
    }

    /// Overwrites bytes from offset `at` on, as another process could.
    pub fn overwrite_behind_the_writer(&self, at: usize, bytes: &[u8]) {
        let mut state = self.state();
        state.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        state.is_overwritten = true;
    }

    /// Appends bytes, as another process could.
    pub fn write_behind_the_writer(&self, bytes: &[u8]) {
        self.state().bytes.extend_from_slice(bytes);
    }
}

impl LogSpool for MemorySpool {
    fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        let mut state = self.state();
        if state.is_full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let written = state.fail_after.take();
        state.bytes.extend_from_slice(&lines[..written.unwrap_or(lines.len())]);
        state.known = state.bytes.len();
        written.map_or(Ok(()), |_| Err(io::ErrorKind::StorageFull.into()))
    }

    fn append_last_words(&mut self, lines: &[u8]) -> io::Result<()> {
        let mut state = self.state();
        state.bytes.extend_from_slice(lines);
        state.known = state.bytes.len();
        Ok(())
    }

    fn foreign_change(&self) -> io::Result<Option<ForeignChange>> {
        let state = self.state();
        Ok(match state.bytes.len().cmp(&state.known) {
            Ordering::Less => Some(ForeignChange::Cut(state.bytes.len() as u64)),
            Ordering::Equal => None,
            Ordering::Greater => Some(ForeignChange::Grown),
        })
    }

    fn check_bytes(&mut self) -> io::Result<Option<ForeignChange>> {
        let is_overwritten = std::mem::take(&mut self.state().is_overwritten);
        Ok(is_overwritten.then_some(ForeignChange::Overwritten))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        LogSource::read_at(&*self.0, offset, buffer)
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        let mut state = self.state();
        state.bytes.truncate(usize::try_from(length).unwrap_or(usize::MAX));
        state.known = state.bytes.len();
        Ok(())
    }

    fn source(&self) -> Arc<dyn LogSource> {
        Arc::clone(&self.0) as Arc<dyn LogSource>
    }

    fn reopen(&self) -> io::Result<Box<dyn LogSpool>> {
        Ok(Box::new(self.clone()))
    }

    fn may_block(&self) -> bool {
        false
    }
}

impl LogSource for Mutex<MemorySpoolState> {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let state = self.lock().unwrap_or_else(PoisonError::into_inner);
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(state.bytes.len());
        let length = buffer.len().min(state.bytes.len() - start);
        buffer[..length].copy_from_slice(&state.bytes[start..start + length]);
        Ok(length)
    }

    fn link_or_copy_to(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }
}
