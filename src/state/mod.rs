//! The agent's private directory, and one directory in it for each job.

pub mod job_dir;
pub mod log_delivery;
pub mod log_file;

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use actors::errors::Cause;
use nix::unistd::geteuid;

use self::job_dir::DEAD;
pub use self::job_dir::{JobDir, JobFiles};
use crate::os::random::random_word;
use crate::service::environment::Environment;

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
        let made = JobDir::new(JobFiles { directory, environment_copy }, lock);
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

/// Returns the copy of the variables that the link in a dead job's directory names. The job could write
/// to that directory, so a link to any other file is ignored.
fn noted_copy(job_directory: &Path) -> Option<PathBuf> {
    let copy = fs::read_link(job_directory.join(COPY_NOTE)).ok()?;
    copy.file_name()?.to_str()?.starts_with(ENVIRONMENT_COPY).then_some(copy)
}
