//! What runs a job's commands: one folder for each kind of executor, and what they share.

pub mod dead_jobs;
pub mod docker;
pub mod estate;
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

/// What runs one job.
///
/// Nothing of the job runs before its place's backend is told to prepare. A guard ends everything in the place if the
/// agent dies.
pub trait Executor {
    /// Returns where people who log in to `job` are led. `shows_environment` tells whether a shell that they get on this
    /// machine has the job's variables.
    fn login_target(&self, job: &Job, directory: &JobDir, shows_environment: bool) -> LeadsTo;

    /// Makes the place where `job` runs, which keeps its files in `directory`. A guard takes back `access` if the agent
    /// dies.
    fn place(&self, job: &Job, directory: Rc<JobDir>, access: Option<SshAccess>) -> Place;

    /// Makes a place for what is to run after `job` was stopped: it has a shell, and is brought up silently.
    fn spare_place(&self, job: &Job, directory: Rc<JobDir>) -> Place;

    /// Returns the path where people on the machine find the variables of `job`, if they do.
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
    /// Returns the executor that `job` asks for. A job that names none that exists fails in its first step, whatever the
    /// place.
    pub fn of<'a>(&'a self, job: &'a Job) -> Box<dyn Executor + 'a> {
        match &job.executor {
            Ok(ExecutorKind::DockerCompose(compose)) => Box::new(self.docker.with(compose)),
            Ok(ExecutorKind::Shell) | Err(_) => Box::new(&self.shell),
        }
    }
}
