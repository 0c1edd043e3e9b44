//! The executors, which run jobs: a folder for each kind, and what they share.

pub mod dead_jobs;
pub mod docker;
pub mod estate;
mod home_path;
pub mod job_mark;
pub mod registries;
pub mod session;
pub mod shell;

use std::path::PathBuf;
use std::rc::Rc;

use actors::job::{ExecutorKind, Job};
pub use actors::ports::Place;

use self::docker::DockerExecutor;
use self::shell::ShellExecutor;
use crate::ssh_access::{LeadsTo, SshAccess};
use crate::state::JobDir;

/// Makes the places where a job runs.
///
/// Making a place starts nothing; only its backend's `prepare` does. A guard ends everything in the place if
/// the agent dies.
pub trait Executor {
    /// Returns the target of the job's SSH access. `shows_environment` tells whether login shells on this
    /// machine get the job's variables.
    fn login_target(&self, job: &Job, directory: &JobDir, shows_environment: bool) -> LeadsTo;

    /// Makes the place where `job` runs. Its files are in `directory`. The guard closes `access` if the agent
    /// dies.
    fn place(&self, job: &Job, directory: Rc<JobDir>, access: Option<SshAccess>) -> Place;

    /// Makes a place for the post-job hook of a stopped `job`: a shell of its own, prepared without logging.
    fn spare_place(&self, job: &Job, directory: Rc<JobDir>) -> Place;

    /// Returns the path of the copy of the job's variables for people who debug on this machine; `None` if
    /// there is none.
    fn environment_copy(&self, job: &Job) -> Option<PathBuf>;
}

/// The executors of this agent.
pub struct Executors {
    /// For jobs in a shell of this machine.
    pub shell: ShellExecutor,
    /// For jobs in containers.
    pub docker: DockerExecutor,
}

impl Executors {
    /// Returns the executor for `job`. A job with an unknown executor gets the shell's; it fails in its first
    /// step.
    pub fn for_job<'a>(&'a self, job: &'a Job) -> Box<dyn Executor + 'a> {
        match &job.executor {
            Ok(ExecutorKind::DockerCompose(compose)) => Box::new(self.docker.with(compose)),
            Ok(ExecutorKind::Shell) | Err(_) => Box::new(&self.shell),
        }
    }
}
