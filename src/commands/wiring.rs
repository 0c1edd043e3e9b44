//! Makes the parts of each job: its executor, its containment, its log file and its SSH access.

use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use actors::job::Job;
use actors::ports::{JobParts, JobPartsFactory, Place, SshAccessFiles};

use crate::executors::{Executors, dead_jobs};
use crate::service::environment::Environment;
use crate::ssh_access::SshAccess;
use crate::state::log_file::FileSpool;
use crate::state::{JobDir, StateDir, StateDirError};

/// Opens the state directory, and cleans up after the jobs of dead agents.
pub fn open_state(path: &Path, environment: &Environment) -> Result<StateDir, StateDirError> {
    let (state, dead) = StateDir::open(path)?;
    dead_jobs::end(dead, environment).map_err(|error| state.unusable(error))?;
    Ok(state)
}

/// Makes the parts of all jobs of an agent.
pub struct Jobs {
    /// The directory that holds the job directories.
    pub state: StateDir,
    /// The executors, which run the jobs' commands.
    pub executors: Executors,
    /// The home directory of the agent's user.
    pub home: PathBuf,
    /// How people log in; `None` disables SSH access.
    pub login: Option<SshAccessConfig>,
}

/// How people log in to jobs.
#[derive(Clone, Debug)]
pub struct SshAccessConfig {
    /// Path of the SSH access script.
    pub script: PathBuf,
    /// Install the script for jobs without keys, too, and load the job's environment in its login shells.
    pub for_every_job: bool,
}

impl Jobs {
    /// Returns the SSH access to `job`, or `None` if it is disabled.
    fn access(&self, job: &Job, directory: &JobDir) -> Option<SshAccess> {
        let SshAccessConfig { script, for_every_job } = self.login.clone()?;
        Some(SshAccess {
            home: self.home.clone(),
            script,
            job_directory: directory.path().to_owned(),
            without_keys: for_every_job,
            leads_to: self.executors.for_job(job).login_target(job, directory, for_every_job),
        })
    }
}

/// Creates a job's log. Fails if the disk is full, or has no room for the job's scripts beside the log.
fn make_log(directory: &JobDir) -> io::Result<FileSpool> {
    let spool = FileSpool::create(directory.log())?;
    directory.check_room_for_scratch()?;
    Ok(spool)
}

impl JobPartsFactory for Jobs {
    fn make(&self, job: &Job) -> io::Result<JobParts> {
        let executor = self.executors.for_job(job);
        let directory = Rc::new(self.state.make_job_dir(executor.environment_copy(job))?);
        let spool = Box::new(make_log(&directory)?);
        let access = self.access(job, &directory);
        let jump_point = access.clone().map(|access| Rc::new(access) as Rc<dyn SshAccessFiles>);
        let Place { backend, containment } = executor.place(job, directory, access);
        Ok(JobParts { backend, containment, spool, jump_point })
    }

    fn check(&self) -> io::Result<()> {
        let directory = self.state.make_job_dir(None)?;
        make_log(&directory).map(drop)
    }

    fn make_spare_place(&self, job: &Job) -> io::Result<Place> {
        let directory = Rc::new(self.state.make_job_dir(None)?);
        Ok(self.executors.for_job(job).spare_place(job, directory))
    }
}
