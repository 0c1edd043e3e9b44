//! Options shared by several modes.

use std::path::PathBuf;

use super::option::{Opt, Seconds};
use super::{ConfigError, DockerSocket, FileMount, Settings};
use crate::service::environment::Environment;
use crate::ssh_access;
use crate::state::StateDir;

pub(super) const CONFIG_FILE: Opt<PathBuf> =
    Opt::new("config-file", "FILE", "A YAML file with any of these options as keys")
        .alias("config");

pub(super) const FILES: Opt<Vec<String>> = Opt::new(
    "files",
    "HOST:CONTAINER,...",
    "Files of this machine to mount into containers, as HOST:CONTAINER",
)
.set_in_example("[]");

pub(super) const DOCKER_SOCKET: Opt<DockerSocket> = Opt::new(
    "docker-socket",
    "WHEN",
    "Whether jobs in containers get the Docker Engine's socket, which makes them root on its machine: always or never",
)
.default("always");

pub(super) const INTERRUPTION_GRACE_PERIOD: Opt<Seconds> = Opt::new(
    "interruption-grace-period",
    "SECONDS",
    "How long a job may go on after SIGTERM or SIGINT before it is stopped, in seconds",
)
.default("0");

pub(super) const GRACE_PERIOD: Opt<Seconds> = Opt::new(
    "grace-period",
    "SECONDS",
    "How long the processes of a finished or stopped shell job may take to end after SIGTERM, in seconds; 0 kills them at once (containers are always killed at once)",
)
.default("2");

pub(super) const STATE_DIR: Opt<PathBuf> =
    Opt::new("state-dir", "DIR", "The agent's private directory, of mode 0700")
        .default_in_words(
            "below the user's state directory, usually ~/.local/state/semaphore-agent",
        )
        .example("/var/lib/semaphore-agent");

pub(super) const SSH_JUMP_POINT_PATH: Opt<PathBuf> = Opt::new(
    "ssh-jump-point-path",
    "FILE",
    "Where to install the script that people run over SSH to enter a job",
)
.default(ssh_access::DEFAULT_SCRIPT);

/// Returns the configured state directory, or the default one.
pub(super) fn state_dir(settings: &Settings, environment: &Environment) -> PathBuf {
    settings.get(&STATE_DIR).unwrap_or_else(|| StateDir::default_path(environment))
}

/// Returns the path of the SSH access script. Fails if it is not absolute.
pub(super) fn jump_point(settings: &Settings) -> Result<PathBuf, ConfigError> {
    let path = settings.get_or_empty(&SSH_JUMP_POINT_PATH);
    if path.is_absolute() {
        return Ok(path);
    }
    let why = format!("`{}` is not an absolute path", path.display());
    Err(settings.refuse(&SSH_JUMP_POINT_PATH.spec, why))
}

/// Parses the option `files`.
pub(super) fn file_mounts(settings: &Settings) -> Result<Vec<FileMount>, ConfigError> {
    let pairs = settings.get_or_empty(&FILES);
    let files: Result<_, String> = pairs.iter().map(|pair| pair.trim().parse()).collect();
    files.map_err(|why| settings.refuse(&FILES.spec, why))
}

/// Returns the absolute path of a hook: the job's shell has another working directory than the agent.
pub(super) fn hook_path(
    settings: &Settings,
    option: &Opt<PathBuf>,
) -> Result<Option<String>, ConfigError> {
    let Some(path) = settings.get(option) else {
        return Ok(None);
    };
    let path = std::path::absolute(&path).unwrap_or(path);
    let path = path.into_os_string().into_string();
    let refuse = |path: std::ffi::OsString| {
        settings.refuse(&option.spec, format!("`{}` is not UTF-8", path.display()))
    };
    path.map(Some).map_err(refuse)
}
