//! The agent's private directory, and one directory in it for each job.

pub mod log_file;
pub mod log_files;

use std::cell::Cell;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use actors::errors::Cause;
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};

use crate::os::random::random_word;
use crate::service::environment::Environment;

/// Prefix of directories whose job is dead but may still own containers.
const DEAD: &str = "dead-";

/// Marker file in the directory of a job that may own containers on an engine, perhaps a remote one.
const ENGINE_IN_USE: &str = "on-engine";

/// File name prefix of the copy of a job's variables that people on the machine may read
/// (docs/protocol.md: "The self-hosted API").
pub const ENVIRONMENT_COPY: &str = ".env-";

/// Symbolic link in a job directory; its target is the copy of the job's variables.
const COPY_NOTE: &str = "environment-copy";

/// The agent's private directory, with mode 0700.
#[derive(Clone, Debug)]
pub struct StateDir {
    path: PathBuf,
}

/// Why the state directory can't be used.
#[derive(Debug, thiserror::Error)]
#[error("the state directory {path} can't be used")]
pub struct StateDirError {
    path: PathBuf,
    source: Cause,
}

impl StateDir {
    /// Creates `path`, or checks that no other user can read or change it.
    ///
    /// Also returns the jobs whose agent and guard both died, as in a power cut: the caller must end and
    /// delete them.
    pub fn open(path: &Path) -> Result<(Self, DeadJobs), StateDirError> {
        let refuse = |source: Cause| StateDirError { path: path.to_owned(), source };
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(path).map_err(|error| refuse(error.into()))?;
        let found = fs::symlink_metadata(path).map_err(|error| refuse(error.into()))?;
        if !found.is_dir() {
            return Err(refuse("it is not a directory".into()));
        }
        if found.uid() != geteuid().as_raw() {
            return Err(refuse("it belongs to another user".into()));
        }
        if found.mode() & 0o077 != 0 {
            return Err(refuse(
                "other users can access it; run `chmod 700` on it or choose another directory"
                    .into(),
            ));
        }
        let state = Self { path: path.to_owned() };
        let dead = state.dead_jobs().map_err(|error| refuse(error.into()))?;
        Ok((state, dead))
    }

    fn dead_jobs(&self) -> io::Result<DeadJobs> {
        let lock = self.lock()?;
        let state = fs::canonicalize(&self.path)?;
        let mut jobs = Vec::new();
        for entry in fs::read_dir(&state)? {
            let directory = entry?.path();
            let files = JobFiles { environment_copy: noted_copy(&directory), directory };
            let is_dead = || File::open(&files.directory).is_ok_and(|lock| lock.try_lock().is_ok());
            if files.name().starts_with("job-") && is_dead() {
                jobs.push(files);
            }
        }
        Ok(DeadJobs { jobs, state, _lock: lock })
    }

    /// Makes a [`StateDirError`] for this directory.
    pub fn unusable(&self, source: io::Error) -> StateDirError {
        StateDirError { path: self.path.clone(), source: source.into() }
    }

    /// Keeps other agents from creating or removing job directories as long as the returned file is open.
    fn lock(&self) -> io::Result<File> {
        let directory = File::open(&self.path)?;
        directory.lock()?;
        Ok(directory)
    }

    /// Returns the default path, below the user's state directory (`XDG_STATE_HOME`).
    pub fn default_path(environment: &Environment) -> PathBuf {
        let base = environment.get("XDG_STATE_HOME").map(PathBuf::from);
        let base = base.filter(|path| path.is_absolute());
        let usual = || environment.home().unwrap_or_default().join(".local/state");
        base.unwrap_or_else(usual).join("semaphore-agent")
    }

    /// Restores the directory and its mode, in case a job has removed or changed them.
    fn restore(&self) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.path)?;
        let found = fs::symlink_metadata(&self.path)?;
        if found.uid() == geteuid().as_raw() && found.is_dir() && found.mode() & 0o777 != 0o700 {
            fs::set_permissions(&self.path, Permissions::from_mode(0o700))?;
        }
        Ok(())
    }

    /// Creates the directory of a job. `environment_copy` is the path of the copy of the job's variables,
    /// if one will be made; its file name begins with [`ENVIRONMENT_COPY`].
    pub fn make_job_dir(&self, environment_copy: Option<PathBuf>) -> io::Result<JobDir> {
        self.restore()?;
        let name = format!("job-{}", &random_word()?[..12]);
        let directory = fs::canonicalize(&self.path)?.join(name);
        let _state_lock = self.lock()?;
        DirBuilder::new().mode(0o700).create(&directory)?;
        let lock = File::open(&directory)?;
        lock.lock()?;
        let files = JobFiles { directory, environment_copy };
        let made = JobDir { files, stays: Cell::new(false), _lock: lock };
        DirBuilder::new().mode(0o700).create(made.scratch())?;
        if let Some(copy) = made.environment_copy() {
            symlink(copy, made.path().join(COPY_NOTE))?;
        }
        Ok(made)
    }
}

/// The jobs of dead agents. No other agent can create or delete a job directory while this value lives.
#[derive(Debug)]
pub struct DeadJobs {
    /// The files of each dead job.
    pub jobs: Vec<JobFiles>,
    /// The state directory, without symbolic links.
    state: PathBuf,
    _lock: File,
}

impl DeadJobs {
    /// Returns the path of the state directory as [`JobFiles::mark`] spells it.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Returns whether the job called `name`, living or dead, has a directory.
    pub fn is_known(&self, name: &str) -> bool {
        [name.to_owned(), format!("{DEAD}{name}")].iter().any(|name| self.state.join(name).exists())
    }
}

/// The paths of a job's files, and the only code that deletes them.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct JobFiles {
    /// The job's directory.
    directory: PathBuf,
    /// The copy of the job's variables that people on the machine may read, if there is one.
    environment_copy: Option<PathBuf>,
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
        delete(&self.scratch());
        // `remove_file` does not follow a symbolic link.
        if let Some(copy) = &self.environment_copy
            && let Err(error) = fs::remove_file(copy)
            && error.kind() != io::ErrorKind::NotFound
        {
            log::warn!(path:? = copy, error:%; "a copy of a job's variables can't be removed");
        }
    }

    /// Deletes all of the job's files.
    pub fn delete(&self) {
        self.delete_secrets();
        delete(&self.directory);
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
            self.files.delete();
        }
    }
}

/// Returns the copy of the variables that the link in a dead job's directory names. The job could write
/// to that directory, so a link to any other file is ignored.
fn noted_copy(job_directory: &Path) -> Option<PathBuf> {
    let copy = fs::read_link(job_directory.join(COPY_NOTE)).ok()?;
    copy.file_name()?.to_str()?.starts_with(ENVIRONMENT_COPY).then_some(copy)
}

/// Deletes one of the agent's own directories, if it exists.
fn delete(directory: &Path) {
    if let Err(error) = fs::remove_dir_all(directory)
        && error.kind() != io::ErrorKind::NotFound
    {
        log::warn!(directory:?, error:% = error; "a directory can't be removed");
    }
}
