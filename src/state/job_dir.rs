//! The directory of a job, and its deletion.

use std::cell::Cell;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use serde::{Deserialize, Serialize};

/// Marker file in the directory of a job that may own containers on an engine, perhaps a remote one.
const ENGINE_IN_USE: &str = "on-engine";

/// Prefix of directories whose job is dead but may still own containers.
pub(super) const DEAD: &str = "dead-";

/// The room that the scripts and variables of a job of usual size need, in bytes.
const ROOM_FOR_SCRATCH: i64 = 256 << 10;

/// The paths of a job's files, and the only code that deletes them.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct JobFiles {
    /// The job's directory.
    pub(super) directory: PathBuf,
    /// The copy of the job's variables that people on the machine may read, if there is one.
    pub(super) environment_copy: Option<PathBuf>,
}

impl JobFiles {
    /// Returns the job's directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Returns the job's name, which is random and thus unique among all agents for practical purposes.
    pub fn name(&self) -> &str {
        let name = self.directory.file_name().and_then(OsStr::to_str).unwrap_or_default();
        name.strip_prefix(DEAD).unwrap_or(name)
    }

    /// Returns the mark by which the job's processes are found.
    pub fn mark(&self) -> String {
        let state = self.directory.parent().unwrap_or(Path::new("/"));
        format!("{}@{}", self.name(), state.display())
    }

    /// Returns the directory of scripts and variables, which exists while the job runs.
    pub fn scratch(&self) -> PathBuf {
        scratch_of(&self.directory)
    }

    /// Records that the job may own containers.
    pub fn note_engine_in_use(&self) -> io::Result<()> {
        File::create(self.directory.join(ENGINE_IN_USE)).map(drop)
    }

    /// Returns whether the job may own containers.
    pub fn may_own_containers(&self) -> bool {
        self.directory.join(ENGINE_IN_USE).exists()
    }

    /// Renames the directory of a dead job: processes and containers with its name belong to no living job.
    pub fn declare_dead(&mut self) -> io::Result<()> {
        let dead = self.directory.with_file_name(format!("{DEAD}{}", self.name()));
        fs::rename(&self.directory, &dead)?;
        self.directory = dead;
        Ok(())
    }

    /// Deletes the job's scripts, variables and credentials.
    pub fn delete_secrets(&self) {
        delete_directory(&self.scratch());
        // `remove_file` does not follow a symbolic link.
        if let Some(copy) = &self.environment_copy
            && let Err(error) = fs::remove_file(copy)
            && error.kind() != io::ErrorKind::NotFound
        {
            log::warn!(path:? = copy, error:%; "a copy of a job's variables can't be removed");
        }
    }

    /// Deletes the job's directory and all of the job's other files.
    pub fn delete_all(&self) {
        self.delete_secrets();
        delete_directory(&self.directory);
    }
}

/// A job's directory, deleted with all of the job's files when this value is dropped.
#[derive(Debug)]
pub struct JobDir {
    files: JobFiles,
    /// On drop, keep the directory with the [`ENGINE_IN_USE`] marker.
    stays: Cell<bool>,
    /// Locked as long as the job's agent lives: an unlocked directory belongs to a dead job.
    _lock: File,
}

impl JobDir {
    pub(super) fn new(files: JobFiles, lock: File) -> Self {
        Self { files, stays: Cell::new(false), _lock: lock }
    }

    /// Returns the paths of the job's files.
    pub fn files(&self) -> &JobFiles {
        &self.files
    }

    /// Returns the directory's path.
    pub fn path(&self) -> &Path {
        &self.files.directory
    }

    /// See [`JobFiles::name`].
    pub fn name(&self) -> &str {
        self.files.name()
    }

    /// See [`JobFiles::mark`].
    pub fn mark(&self) -> String {
        self.files.mark()
    }

    /// See [`JobFiles::scratch`].
    pub fn scratch(&self) -> PathBuf {
        self.files.scratch()
    }

    /// Returns the path of the script with the job's variables, which exists once they are exported.
    pub fn environment(&self) -> PathBuf {
        self.scratch().join("environment-1")
    }

    /// Returns the path of the job's log.
    pub fn log(&self) -> PathBuf {
        self.path().join("log.jsonl")
    }

    /// Returns the path of the copy of the job's variables, if there is one. The copy is removed when the
    /// job's processes have ended.
    pub fn environment_copy(&self) -> Option<&Path> {
        self.files.environment_copy.as_deref()
    }

    /// Fails if the disk has no room for the job's scripts and variables. A job of unusual size may need more.
    pub fn check_room_for_scratch(&self) -> io::Result<()> {
        let path = self.scratch().join("room");
        let file = File::create_new(&path)?;
        let allocated = fallocate(&file, FallocateFlags::empty(), 0, ROOM_FOR_SCRATCH);
        fs::remove_file(path)?;
        match allocated {
            // The file system can't tell, or files are limited to a smaller size.
            Ok(()) | Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EFBIG) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Keeps the directory on drop: the guard needs it to remove the job's containers.
    pub fn keep(&self) {
        self.stays.set(true);
    }

    /// See [`JobFiles::delete_secrets`].
    pub fn delete_secrets(&self) {
        self.files.delete_secrets();
    }
}

/// Returns the path of [`JobFiles::scratch`] in a job's directory.
pub(crate) fn scratch_of(job_directory: &Path) -> PathBuf {
    job_directory.join("scratch")
}

impl Drop for JobDir {
    fn drop(&mut self) {
        self.delete_secrets();
        if self.stays.get() {
            // If this fails, the guard deletes the log with the directory.
            let _ = fs::remove_file(self.log());
        } else {
            self.files.delete_all();
        }
    }
}

/// Deletes one of the agent's own directories, if it exists.
fn delete_directory(directory: &Path) {
    if let Err(error) = fs::remove_dir_all(directory)
        && error.kind() != io::ErrorKind::NotFound
    {
        log::warn!(directory:?, error:% = error; "a directory can't be removed");
    }
}
