//! The agent's private directory, and one directory in it for each job.

pub mod log_file;
pub mod log_files;

use std::cell::Cell;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};

use crate::os::random::random_word;
use crate::service::environment::Environment;

/// Prefix of directories whose job is dead but may still own containers.
const DEAD: &str = "dead-";

/// A file that is in the directory of a job that may own something outside of this machine.
const ELSEWHERE: &str = "on-engine";

/// The beginning of the name of a copy of a job's variables, for people on the machine (docs/protocol.md: "The
/// self-hosted API").
pub const ENVIRONMENT_COPY: &str = ".env-";

/// The link in a job's directory that leads to this copy.
const COPY_NOTE: &str = "environment-copy";

/// Where the agent keeps what only it may see; mode 0700.
#[derive(Clone, Debug)]
pub struct StateDir {
    path: PathBuf,
}

/// The directory can't be used.
#[derive(Debug, thiserror::Error)]
#[error("the state directory {path} can't be used: {why}")]
pub struct StateDirError {
    path: PathBuf,
    why: String,
}

impl StateDir {
    /// Makes `path`, or checks that nobody else has a hand in it. Also returns the jobs there whose agents died with
    /// everything that could clean up, as in a power cut: they must be ended and deleted.
    pub fn open(path: &Path) -> Result<(Self, DeadJobs), StateDirError> {
        let refuse = |why: String| StateDirError { path: path.to_owned(), why };
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(path).map_err(|error| refuse(error.to_string()))?;
        let found = fs::symlink_metadata(path).map_err(|error| refuse(error.to_string()))?;
        if !found.is_dir() {
            return Err(refuse("it is not a directory".into()));
        }
        if found.uid() != geteuid().as_raw() {
            return Err(refuse("it belongs to another user".into()));
        }
        if found.mode() & 0o077 != 0 {
            return Err(refuse("others may look into it; `chmod 700` it, or name another".into()));
        }
        let state = Self { path: path.to_owned() };
        let dead = state.dead_jobs().map_err(|error| refuse(error.to_string()))?;
        Ok((state, dead))
    }

    fn dead_jobs(&self) -> io::Result<DeadJobs> {
        let others_wait = self.lock()?;
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
        Ok(DeadJobs { jobs, state, _others_wait: others_wait })
    }

    /// Returns the error that this directory can't be used.
    pub fn unusable(&self, why: &io::Error) -> StateDirError {
        StateDirError { path: self.path.clone(), why: why.to_string() }
    }

    /// Keeps other agents from making or removing jobs' directories while the result lives.
    fn lock(&self) -> io::Result<File> {
        let directory = File::open(&self.path)?;
        directory.lock()?;
        Ok(directory)
    }

    /// Returns where the directory is by default: below the user's state directory.
    pub fn default_path(environment: &Environment) -> PathBuf {
        let base = environment.get("XDG_STATE_HOME").map(PathBuf::from);
        let base = base.filter(|path| path.is_absolute());
        let usual = || environment.home().unwrap_or_default().join(".local/state");
        base.unwrap_or_else(usual).join("semaphore-agent")
    }

    /// Makes the directory again, and usable, if a job has removed it or changed its mode.
    fn mend(&self) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.path)?;
        let found = fs::symlink_metadata(&self.path)?;
        if found.uid() == geteuid().as_raw() && found.is_dir() && found.mode() & 0o777 != 0o700 {
            fs::set_permissions(&self.path, Permissions::from_mode(0o700))?;
        }
        Ok(())
    }

    /// Makes a fresh directory for a job. `environment_copy` is where people on the machine are to find the job's
    /// variables as well; its name begins with [`ENVIRONMENT_COPY`].
    pub fn make_job_dir(&self, environment_copy: Option<PathBuf>) -> io::Result<JobDir> {
        self.mend()?;
        let name = format!("job-{}", &random_word()?[..12]);
        let directory = fs::canonicalize(&self.path)?.join(name);
        let _others_wait = self.lock()?;
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

/// The jobs of agents that are dead. No other agent makes or deletes a job's directory while this value lives.
#[derive(Debug)]
pub struct DeadJobs {
    /// What they have in files.
    pub jobs: Vec<JobFiles>,
    /// The state directory, without symbolic links.
    state: PathBuf,
    _others_wait: File,
}

impl DeadJobs {
    /// Returns the state directory, as it stands in the marks of its jobs' processes.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Returns whether a job of this name has a directory, whether it is alive or dead.
    pub fn is_known(&self, name: &str) -> bool {
        [name.to_owned(), format!("{DEAD}{name}")].iter().any(|name| self.state.join(name).exists())
    }
}

/// What a job has in files. All that deletes them is here.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct JobFiles {
    /// The job's directory.
    directory: PathBuf,
    /// Where people on the machine find the job's variables, if they do.
    environment_copy: Option<PathBuf>,
}

impl JobFiles {
    /// Returns the job's directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Returns a name that no other job of this agent has, and hardly one of any other.
    pub fn name(&self) -> &str {
        let name = self.directory.file_name().and_then(OsStr::to_str).unwrap_or_default();
        name.strip_prefix(DEAD).unwrap_or(name)
    }

    /// Returns what the job's processes are marked with.
    pub fn mark(&self) -> String {
        let state = self.directory.parent().unwrap_or(Path::new("/"));
        format!("{}@{}", self.name(), state.display())
    }

    /// Returns the directory of scripts and variables, which is there while the job runs.
    pub fn scratch(&self) -> PathBuf {
        scratch_of(&self.directory)
    }

    /// Notes that the job may own something outside of this machine.
    pub fn note_elsewhere(&self) -> io::Result<()> {
        File::create(self.directory.join(ELSEWHERE)).map(drop)
    }

    /// Returns whether the job may own something outside of this machine.
    pub fn may_be_elsewhere(&self) -> bool {
        self.directory.join(ELSEWHERE).exists()
    }

    /// Renames the directory of a dead job: what is marked with the old name belongs to no living job.
    pub fn declare_dead(&mut self) -> io::Result<()> {
        let dead = self.directory.with_file_name(format!("{DEAD}{}", self.name()));
        fs::rename(&self.directory, &dead)?;
        self.directory = dead;
        Ok(())
    }

    /// Deletes the job's scripts, variables and credentials.
    pub fn delete_secrets(&self) {
        delete(&self.scratch());
        // A link there is not followed.
        if let Some(copy) = &self.environment_copy
            && let Err(error) = fs::remove_file(copy)
            && error.kind() != io::ErrorKind::NotFound
        {
            log::warn!(path:? = copy, error:%; "a copy of a job's variables can't be removed");
        }
    }

    /// Deletes everything.
    pub fn delete(&self) {
        self.delete_secrets();
        delete(&self.directory);
    }
}

/// A job's directory. Everything in it is deleted with this value.
#[derive(Debug)]
pub struct JobDir {
    files: JobFiles,
    /// The directory stays, with nothing in it but the note that the job may own something elsewhere.
    stays: Cell<bool>,
    /// Held as long as the job's agent lives.
    _lock: File,
}

impl JobDir {
    /// Returns what the job has in files.
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

    /// Returns the path of the job's variables, a script that is there once they are exported.
    pub fn environment(&self) -> PathBuf {
        self.scratch().join("environment-1")
    }

    /// Returns the path of the job's log.
    pub fn log(&self) -> PathBuf {
        self.path().join("log.jsonl")
    }

    /// Returns where people on the machine find the job's variables until its processes are gone, if they do.
    pub fn environment_copy(&self) -> Option<&Path> {
        self.files.environment_copy.as_deref()
    }

    /// Lets the directory stay for the guard, which has to end what the job owns elsewhere.
    pub fn let_stay(&self) {
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
            // Deleted with all the rest if that fails now.
            let _ = fs::remove_file(self.log());
        } else {
            self.files.delete();
        }
    }
}

/// The copy of its variables that a dead job's directory names: only what the agent itself may have put there, as the
/// note lies where the job could write.
fn noted_copy(job_directory: &Path) -> Option<PathBuf> {
    let copy = fs::read_link(job_directory.join(COPY_NOTE)).ok()?;
    copy.file_name()?.to_str()?.starts_with(ENVIRONMENT_COPY).then_some(copy)
}

/// Deletes a directory that is the agent's own, if it is there.
fn delete(directory: &Path) {
    if let Err(error) = fs::remove_dir_all(directory)
        && error.kind() != io::ErrorKind::NotFound
    {
        log::warn!(directory:?, error:% = error; "a directory can't be removed");
    }
}
