//! Jobs in containers, over the API of the Docker Engine (docs/protocol.md: "Docker executor").
//!
//! Containers need nothing from this machine's file system except the paths of `--files` and the engine's
//! socket. So the engine may run on another machine, and the agent in a container itself.

pub mod backend;
pub(crate) mod bodies;
pub mod containers;
pub mod engine;
pub mod errors;
pub mod hijack;
pub(crate) mod mode;
mod preparation;
pub mod pull;
mod removal;
pub(crate) mod shell;
pub mod side_containers;
mod tls_relay;
pub mod upload;
pub mod watch;

use std::ffi::OsString;
use std::path::PathBuf;
use std::rc::Rc;

use actix::Addr;
use actors::job::Job;
use actors::job::containers::Compose;
use actors::metrics::Metrics;

use self::backend::DockerBackend;
use self::bodies::main_container_name;
use self::containers::JobContainers;
use crate::config::{DockerSocket, FileMount};
use crate::executors::shell::ShellConfig;
use crate::executors::{Executor, Place, job_mark};
use crate::ssh_access::{LeadsTo, SshAccess};
use crate::state::JobDir;

/// Runs jobs in containers.
#[derive(Clone)]
pub struct DockerExecutor {
    /// The settings of all jobs' containers.
    pub config: DockerConfig,
    /// Receives the duration and the result of each pull.
    pub metrics: Addr<Metrics>,
}

impl DockerExecutor {
    /// Returns the executor of a job that consists of the containers of `compose`.
    pub fn with<'a>(&'a self, compose: &'a Compose) -> impl Executor + 'a {
        InContainers { executor: self, compose }
    }
}

/// See [`DockerExecutor::with`].
struct InContainers<'a> {
    executor: &'a DockerExecutor,
    compose: &'a Compose,
}

impl InContainers<'_> {
    fn backend(&self, job: &Job, place: &JobContainers) -> DockerBackend {
        let DockerExecutor { mut config, metrics } = self.executor.clone();
        config.environment.push(job_mark::variable(&place.mark()));
        DockerBackend::new(config, &job.id, self.compose.clone(), place.clone(), metrics)
    }
}

impl Executor for InContainers<'_> {
    fn login_target(&self, _: &Job, directory: &JobDir, _: bool) -> LeadsTo {
        LeadsTo::Container {
            name: main_container_name(directory.name(), self.compose),
            engine: self.executor.config.engine(),
        }
    }

    fn place(&self, job: &Job, directory: Rc<JobDir>, access: Option<SshAccess>) -> Place {
        let place = JobContainers::new(directory, access);
        Place { backend: Box::new(self.backend(job, &place)), containment: Box::new(place) }
    }

    fn spare_place(&self, job: &Job, directory: Rc<JobDir>) -> Place {
        let place = JobContainers::new(directory, None);
        Place { backend: Box::new(self.backend(job, &place).spare()), containment: Box::new(place) }
    }

    fn environment_copy(&self, _: &Job) -> Option<PathBuf> {
        None
    }
}

/// The agent's settings for the containers of all jobs.
#[derive(Clone, Debug, Default)]
pub struct DockerConfig {
    /// The agent's environment without its secrets. It names the engine, and is the environment of host setup
    /// commands and credential helpers.
    pub environment: Vec<(OsString, OsString)>,
    /// The home of the agent's user.
    pub home: PathBuf,
    /// Files of this machine that are mounted into the main container.
    pub files: Vec<FileMount>,
    /// Whether a missing path among `files` fails the job.
    pub fail_on_missing_files: bool,
    /// Whether containers get `/dev/kvm`, if this machine has it.
    pub expose_kvm: bool,
    /// Whether the main container gets the engine's socket.
    pub socket: DockerSocket,
}

impl DockerConfig {
    /// Returns the defaults, with the environment and the home of `shell`.
    pub fn from_shell(shell: &ShellConfig) -> Self {
        let (environment, home) = (shell.environment.clone(), shell.home.clone());
        Self { environment, home, ..Self::default() }
    }

    /// Returns the variables of the environment that name the engine.
    pub fn engine(&self) -> Vec<(String, String)> {
        const NAMES: [&str; 3] = ["DOCKER_HOST", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH"];
        let text = |text: &OsString| text.to_string_lossy().into_owned();
        let set = self
            .environment
            .iter()
            .filter(|(name, value)| NAMES.iter().any(|known| name == known) && !value.is_empty());
        set.map(|(name, value)| (text(name), text(value))).collect()
    }
}
