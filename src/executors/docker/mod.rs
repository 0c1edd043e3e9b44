//! Jobs in containers, over the API of the Docker Engine (docs/protocol.md: "Docker executor").
//!
//! Nothing of this machine's file system is needed in a container but what the user asks for with
//! `--files`, and the engine's socket: so the engine may be on another machine, and the agent in a
//! container itself.

pub mod backend;
pub(crate) mod bodies;
pub mod engine;
pub mod hijack;
pub(crate) mod mode;
pub mod place;
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
use self::place::Place as ContainerPlace;
use crate::config::{DockerSocket, FileMount};
use crate::executors::shell::ShellConfig;
use crate::executors::{Executor, Place, job_mark};
use crate::ssh_access::{LeadsTo, SshAccess};
use crate::state::JobDir;

/// Runs jobs in containers.
#[derive(Clone)]
pub struct DockerExecutor {
    /// What every job's containers have.
    pub config: DockerConfig,
    /// Where measurements go.
    pub metrics: Addr<Metrics>,
}

impl DockerExecutor {
    /// Returns the executor of a job with these containers.
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
    fn backend(&self, job: &Job, place: &ContainerPlace) -> DockerBackend {
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
        let place = ContainerPlace::new(directory, access);
        Place { backend: Box::new(self.backend(job, &place)), containment: Box::new(place) }
    }

    fn spare_place(&self, job: &Job, directory: Rc<JobDir>) -> Place {
        let place = ContainerPlace::new(directory, None);
        Place { backend: Box::new(self.backend(job, &place).spare()), containment: Box::new(place) }
    }

    fn environment_copy(&self, _: &Job) -> Option<PathBuf> {
        None
    }
}

/// What an agent gives to all containers.
#[derive(Clone, Debug, Default)]
pub struct DockerConfig {
    /// The agent's own environment, less its secrets: where the engine is, and for programs that are run.
    pub environment: Vec<(OsString, OsString)>,
    /// The home of the agent's user.
    pub home: PathBuf,
    /// Files of this machine that the main container has.
    pub files: Vec<FileMount>,
    /// Whether a missing one of these fails a job.
    pub fail_on_missing_files: bool,
    /// Whether containers get `/dev/kvm`, where there is one.
    pub expose_kvm: bool,
    /// Whether the main container gets the engine's socket.
    pub socket: DockerSocket,
}

impl DockerConfig {
    /// Nothing but what the agent's user has.
    pub fn of(shell: &ShellConfig) -> Self {
        let (environment, home) = (shell.environment.clone(), shell.home.clone());
        Self { environment, home, ..Self::default() }
    }

    /// The variables that tell where the engine is, those of them that are set.
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
