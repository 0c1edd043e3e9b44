//! Adds lines to files of the user, and removes exactly these lines again.
//!
//! Every added line ends with a mark and the job directory. No symbolic link is followed.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use memchr::memmem;
use nix::libc::{ELOOP, O_DIRECTORY, O_NOFOLLOW, O_NONBLOCK};
use nix::unistd::geteuid;

use crate::os::random::random_word;

/// The mark at the end of every added line; the job directory follows.
pub(super) const MARK: &str = "semaphore-agent:";

/// Last byte of the first added line if the agent also added the newline before that line.
const AFTER_OPEN_LINE: u8 = b'+';

/// Last byte of the first added line if the agent created the file.
const IN_NEW_FILE: u8 = b'!';

/// Size limit for a file of the user, in bytes; larger files are refused.
const LARGEST_FILE: u64 = 4 << 20;

/// Returns whether `error` shows that the path holds nothing of the agent: it is missing, a symbolic
/// link, or below something that is not a directory.
pub(super) fn is_not_ours(error: &io::Error) -> bool {
    use io::ErrorKind::{NotADirectory, NotFound};
    matches!(error.kind(), NotFound | NotADirectory) || error.raw_os_error() == Some(ELOOP)
}

pub(super) fn split(path: &Path) -> io::Result<(&Path, &str)> {
    let name = path.file_name().and_then(|name| name.to_str());
    path.parent()
        .zip(name)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "is not the path of a file"))
}

/// A file in a directory that is held open, so that the directory can't be exchanged meanwhile.
pub(super) struct UserFile {
    pub(super) directory: File,
    path: PathBuf,
}

impl UserFile {
    pub(super) fn at(directory: &Path, name: &str) -> io::Result<Self> {
        Ok(Self::below(File::options().read(true).custom_flags(O_DIRECTORY).open(directory)?, name))
    }

    /// Opens `~/.ssh/authorized_keys`. Fails if `~/.ssh` is a symbolic link: a job may have made it.
    pub(super) fn for_keys(home: &Path) -> io::Result<Self> {
        let mut options = File::options();
        let ssh = options.read(true).custom_flags(O_DIRECTORY | O_NOFOLLOW);
        Ok(Self::below(ssh.open(home.join(".ssh"))?, "authorized_keys"))
    }

    fn below(directory: File, name: &str) -> Self {
        let path = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name);
        Self { directory, path }
    }

    pub(super) fn exists(&self) -> io::Result<bool> {
        Ok(self.read()?.is_some())
    }

    /// Returns the content and mode of the file, if it exists.
    fn read(&self) -> io::Result<Option<(Vec<u8>, u32)>> {
        let opened =
            File::options().read(true).custom_flags(O_NOFOLLOW | O_NONBLOCK).open(&self.path);
        let mut file = match opened {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        let found = file.metadata()?;
        if !found.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "is not a regular file"));
        }
        if found.len() > LARGEST_FILE {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "is too large"));
        }
        let mut content = Vec::new();
        (&mut file).take(LARGEST_FILE).read_to_end(&mut content)?;
        Ok(Some((content, found.mode() & 0o7777)))
    }

    /// Does the same as [`Self::read`], but returns `None` for paths to which the agent can't have added
    /// lines.
    fn read_ours(&self) -> io::Result<Option<(Vec<u8>, u32)>> {
        match self.read() {
            Err(error) if is_not_ours(&error) => Ok(None),
            read => read,
        }
    }

    /// Replaces the file atomically; a symbolic link is replaced, not followed.
    pub(super) fn replace(&self, content: &[u8], mode: u32) -> io::Result<()> {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        let random = random_word()?;
        let new = self.path.with_file_name(format!(".{name}.{}", &random[..12]));
        let written = File::options()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&new)
            .and_then(|mut file| {
                file.write_all(content)?;
                file.set_permissions(Permissions::from_mode(mode))
            })
            .and_then(|()| fs::rename(&new, &self.path));
        if written.is_err() {
            // Report the first error, not this one.
            let _ = fs::remove_file(&new);
        }
        written
    }

    /// Adds `lines` at the end, each with the job's mark after `before_mark`.
    pub(super) fn add(
        &self,
        lines: &[&[u8]],
        before_mark: &str,
        job: &Path,
        mode: u32,
    ) -> io::Result<()> {
        let found = self.read()?;
        let is_new = found.is_none();
        let (mut content, found_mode) = found.unwrap_or((Vec::new(), mode));
        let open_line = content.last().is_some_and(|last| *last != b'\n');
        if open_line {
            content.push(b'\n');
        }
        let job = job.as_os_str().as_bytes();
        let mark = [before_mark.as_bytes(), MARK.as_bytes(), job].concat();
        for (i, line) in lines.iter().enumerate() {
            content.extend_from_slice(line);
            content.extend_from_slice(&mark);
            match i {
                0 if open_line => content.push(AFTER_OPEN_LINE),
                0 if is_new => content.push(IN_NEW_FILE),
                _ => {}
            }
            content.push(b'\n');
        }
        // sshd ignores an `authorized_keys` file that other users can write.
        self.replace(&content, if mode == 0o600 { mode } else { found_mode })
    }

    /// Removes the lines of the jobs for which `gone` returns `true`.
    pub(super) fn remove(&self, gone: &dyn Fn(&Path) -> bool) -> io::Result<()> {
        let Some((content, mode)) = self.read_ours()? else {
            return Ok(());
        };
        let mut kept = Vec::with_capacity(content.len());
        // The note of a removed first line, unless a line of the user follows it.
        let mut noted = None;
        for line in content.split_inclusive(|byte| *byte == b'\n') {
            match mark_of(line) {
                Some((job, note)) if gone(&job) => noted = note.or(noted),
                // The next job's line becomes the first added line, and takes over the note.
                Some((_, None)) => {
                    kept.extend_from_slice(line.strip_suffix(b"\n").unwrap_or(line));
                    kept.extend(noted.take());
                    kept.push(b'\n');
                }
                _ => {
                    noted = None;
                    kept.extend_from_slice(line);
                }
            }
        }
        if noted == Some(AFTER_OPEN_LINE) {
            kept.pop_if(|last| *last == b'\n');
        }
        if kept == content {
            Ok(())
        } else if kept.is_empty() && noted == Some(IN_NEW_FILE) {
            fs::remove_file(&self.path)
        } else {
            self.replace(&kept, mode)
        }
    }

    /// Replaces the file by `content` if it has the mark of a job for which `gone` returns `true`.
    pub(super) fn replace_if_marked(
        &self,
        gone: &dyn Fn(&Path) -> bool,
        content: &[u8],
    ) -> io::Result<()> {
        let Some((found, mode)) = self.read_ours()? else {
            return Ok(());
        };
        let mut marks = found.split_inclusive(|byte| *byte == b'\n').filter_map(mark_of);
        if marks.any(|(job, _)| gone(&job)) { self.replace(content, mode) } else { Ok(()) }
    }

    /// Removes the file if `condition` returns `true` for its content.
    pub(super) fn remove_if(&self, condition: impl Fn(&[u8]) -> bool) -> io::Result<()> {
        match self.read_ours()? {
            Some((found, _)) if condition(&found) => fs::remove_file(&self.path),
            _ => Ok(()),
        }
    }

    /// Returns whether the path holds a regular file of this user.
    pub(super) fn is_ours(&self) -> io::Result<bool> {
        let found = match fs::symlink_metadata(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            found => found?,
        };
        Ok(found.is_file() && found.uid() == geteuid().as_raw())
    }
}

/// Returns the job directory in the mark at the end of `line`, and the note of a first added line.
fn mark_of(line: &[u8]) -> Option<(PathBuf, Option<u8>)> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let mark = &line[memmem::rfind(line, MARK.as_bytes())? + MARK.len()..];
    let (job, first) = match mark.split_last() {
        Some((last, job)) if [AFTER_OPEN_LINE, IN_NEW_FILE].contains(last) => (job, Some(*last)),
        _ => (mark, None),
    };
    job.starts_with(b"/").then(|| (PathBuf::from(OsStr::from_bytes(job)), first))
}
