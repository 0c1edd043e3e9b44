//! The agent's private directory, and one directory in it for each job.

pub mod log_file;

use std::cell::{Cell, RefCell};
use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;

use crate::executors::docker::watch;
use crate::executors::job_mark;
use crate::executors::session::Mark;

/// What the names of directories begin with whose jobs are dead, but perhaps not all they have elsewhere.
const DEAD: &str = "dead-";

/// The beginning of the name of a copy of a job's variables, for people on the machine (PROTOCOL: "`agent start`: the
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
    /// Makes `path`, or checks that nobody else has a hand in it.
    pub fn open(path: &Path) -> Result<Self, StateDirError> {
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
        state.remove_dead_jobs().map_err(|error| refuse(error.to_string()))?;
        Ok(state)
    }

    /// Removes what jobs left whose agents died with all that could clean up, as in a power cut.
    fn remove_dead_jobs(&self) -> io::Result<()> {
        let _others_wait = self.lock()?;
        let state = fs::canonicalize(&self.path)?;
        for entry in fs::read_dir(&self.path)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let place = name.strip_prefix(DEAD).unwrap_or(name);
            let is_job = place.starts_with("job-");
            let is_dead = || File::open(&path).is_ok_and(|directory| directory.try_lock().is_ok());
            if !is_job || !is_dead() {
                continue;
            }
            if !job_mark::kill_all_and_guards(&job_mark::mark_of(place, &state)) {
                log::warn!(job = place; "processes of a dead job can't be killed");
            }
            if let Some(copy) = noted_copy(&path) {
                remove_environment_copy(&copy);
            }
            if !watch::may_be_on_engine(&path) {
                remove(&path);
                continue;
            }
            // Under another name: what is marked with the old one belongs to no living job.
            let dead = path.with_file_name(format!("{DEAD}{place}"));
            fs::rename(&path, &dead)?;
            remove(&scratch_of(&dead));
            watch::end_dead(place, &dead);
        }
        job_mark::kill_strays(&state, |name| {
            [name.to_owned(), format!("{DEAD}{name}")].iter().any(|name| state.join(name).exists())
        });
        Ok(())
    }

    /// Keeps other agents from making or removing jobs' directories while the result lives.
    fn lock(&self) -> io::Result<File> {
        let directory = File::open(&self.path)?;
        directory.lock()?;
        Ok(directory)
    }

    /// Where it is by default: below the user's state directory.
    pub fn default_path(home: &Path) -> PathBuf {
        let base = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from);
        let base = base.filter(|path| path.is_absolute());
        base.unwrap_or_else(|| home.join(".local/state")).join("semaphore-agent")
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

    /// Makes a fresh directory for a job.
    pub fn make_job_dir(&self) -> io::Result<JobDir> {
        let name = Mark::random().map_err(io::Error::other)?;
        let name = format!("job-{}", &name.as_str()[..12]);
        self.mend()?;
        let path = fs::canonicalize(&self.path)?.join(&name);
        let _others_wait = self.lock()?;
        DirBuilder::new().mode(0o700).create(&path)?;
        let lock = File::open(&path)?;
        lock.lock()?;
        let environment_copy = RefCell::default();
        let directory =
            JobDir { path, name, stays: Cell::new(false), environment_copy, _lock: lock };
        DirBuilder::new().mode(0o700).create(directory.scratch())?;
        Ok(directory)
    }
}

/// A job's directory: gone with this value.
#[derive(Debug)]
pub struct JobDir {
    path: PathBuf,
    name: String,
    /// Stays, with no more in it than that the job may have something elsewhere.
    stays: Cell<bool>,
    /// Where people on the machine find the job's variables, if they do.
    environment_copy: RefCell<Option<PathBuf>>,
    /// Held as long as the job's agent lives.
    _lock: File,
}

impl JobDir {
    /// The whole of it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A name that no other job of this agent has, and hardly one of any other.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What its processes are marked with.
    pub fn mark(&self) -> String {
        job_mark::mark_of(&self.name, self.path.parent().unwrap_or(Path::new("/")))
    }

    /// Where scripts and variables are while the job runs.
    pub fn scratch(&self) -> PathBuf {
        scratch_of(&self.path)
    }

    /// The job's variables, as a script, once they are exported.
    pub fn environment(&self) -> PathBuf {
        self.scratch().join("environment-1")
    }

    /// A spool for the job's log.
    pub fn log(&self) -> PathBuf {
        self.path.join("log.jsonl")
    }

    /// Leaves the directory there, for who is to end what the job has elsewhere.
    pub fn let_stay(&self) {
        self.stays.set(true);
    }

    /// Removes the job's secrets.
    pub fn remove_scratch(&self) {
        remove(&self.scratch());
        if let Some(copy) = self.environment_copy.take() {
            remove_environment_copy(&copy);
        }
    }

    /// Has the job's variables be found at `path` as well, a name that begins with [`ENVIRONMENT_COPY`], until
    /// its processes are gone.
    pub fn note_environment_copy(&self, path: PathBuf) -> io::Result<()> {
        symlink(&path, self.path.join(COPY_NOTE))?;
        self.environment_copy.replace(Some(path));
        Ok(())
    }

    /// See [`Self::note_environment_copy`].
    pub fn environment_copy(&self) -> Option<PathBuf> {
        self.environment_copy.borrow().clone()
    }
}

/// What [`JobDir::scratch`] is, for who knows the directory's path only.
pub(crate) fn scratch_of(job_directory: &Path) -> PathBuf {
    job_directory.join("scratch")
}

impl Drop for JobDir {
    fn drop(&mut self) {
        self.remove_scratch();
        if self.stays.get() {
            // Gone with all the rest if it can't be removed now.
            let _ = fs::remove_file(self.log());
        } else {
            remove(&self.path);
        }
    }
}

/// The copy of its variables that a dead job's directory names: only what the agent itself may have put there, as the
/// note lies where the job could write.
fn noted_copy(job_directory: &Path) -> Option<PathBuf> {
    let copy = fs::read_link(job_directory.join(COPY_NOTE)).ok()?;
    copy.file_name()?.to_str()?.starts_with(ENVIRONMENT_COPY).then_some(copy)
}

/// Removes a copy of a job's variables. A link there is not followed.
pub(crate) fn remove_environment_copy(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        log::warn!(path:?, error:%; "a copy of a job's variables can't be removed");
    }
}

/// Removes a directory that is the agent's own, if it is there.
pub(crate) fn remove(directory: &Path) {
    if let Err(error) = fs::remove_dir_all(directory)
        && error.kind() != io::ErrorKind::NotFound
    {
        log::warn!(directory:?, error:% = error; "a directory can't be removed");
    }
}
