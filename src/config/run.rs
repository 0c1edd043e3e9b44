//! The options of `agent run` that it shares with other modes.

use std::path::PathBuf;
use std::time::Duration;

use super::common::{DOCKER_SOCKET, GRACE_PERIOD, STATE_DIR, state_dir};
use super::layers::{Flags, OptionSet, Settings};
use super::option::Spec;
use super::{ConfigError, DockerSocket};
use crate::service::environment::Environment;

/// The options of `agent run`.
#[derive(Clone, Debug)]
pub struct Run;

impl OptionSet for Run {
    const HAS_FILE: bool = false;
    const OPTIONS: &'static [&'static Spec] =
        &[&DOCKER_SOCKET.spec, &GRACE_PERIOD.spec, &STATE_DIR.spec];
}

/// The options, merged and checked.
#[derive(Clone, Debug)]
pub struct RunConfig {
    /// Whether jobs in containers get the engine's socket.
    pub docker_socket: DockerSocket,
    /// How long the processes of a finished or stopped job have to end.
    pub grace: Duration,
    /// The agent's private directory.
    pub state_dir: PathBuf,
}

impl RunConfig {
    /// Merges flags and variables.
    pub fn load(flags: &Flags<Run>, environment: &Environment) -> Result<Self, ConfigError> {
        let settings = Settings::merge(flags, environment)?;
        Ok(Self {
            docker_socket: settings.get_or_empty(&DOCKER_SOCKET),
            grace: settings.get_or_empty(&GRACE_PERIOD).duration(),
            state_dir: state_dir(&settings, environment),
        })
    }
}
