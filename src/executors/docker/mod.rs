//! Jobs in containers, over the API of the Docker Engine (PROTOCOL: "Docker executor").
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
pub mod pull;
pub(crate) mod shell;
pub mod side_containers;
mod tls_relay;
pub mod upload;
pub mod watch;

use std::ffi::OsString;
use std::path::PathBuf;

use crate::config::{DockerSocket, FileMount};
use crate::executors::shell::ShellConfig;

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
