//! The environment that the agent was started with, read once.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

/// Variables with the agent's own secrets, which no job may see.
pub const AGENT_SECRETS: [&str; 2] = ["SEMAPHORE_AGENT_TOKEN", "SEMAPHORE_AGENT_AUTH_TOKEN_SECRET"];

/// Variables with their values. An empty variable counts as one that is not set.
#[derive(Clone, Debug, Default)]
pub struct Environment(Vec<(OsString, OsString)>);

impl Environment {
    /// Reads the environment of this process.
    pub fn of_process() -> Self {
        Self(std::env::vars_os().collect())
    }

    /// Returns the value of the variable called `name`.
    pub fn get(&self, name: &str) -> Option<&OsStr> {
        let value = self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value);
        value.map(OsString::as_os_str).filter(|value| !value.is_empty())
    }

    /// Returns the value of the variable called `name`, with a replacement for each byte that is not text.
    pub fn text(&self, name: &str) -> Option<String> {
        self.get(name).map(|value| value.to_string_lossy().into_owned())
    }

    /// Returns the variables whose names are text and begin with `prefix`, by name.
    pub fn with_prefix(&self, prefix: &str) -> Vec<(&str, &OsStr)> {
        let mut found: Vec<_> = self
            .0
            .iter()
            .filter_map(|(name, value)| Some((name.to_str()?, value.as_os_str())))
            .filter(|(name, value)| name.starts_with(prefix) && !value.is_empty())
            .collect();
        found.sort();
        found
    }

    /// Returns the user's home directory, which the system knows if no variable names it. `None` if it is no absolute
    /// path.
    pub fn home(&self) -> Option<PathBuf> {
        let home = self.get("HOME").map(PathBuf::from).or_else(std::env::home_dir);
        home.filter(|home| home.is_absolute())
    }

    /// Returns the directory for temporary files.
    pub fn temporary_directory(&self) -> PathBuf {
        self.get("TMPDIR").map_or_else(|| "/tmp".into(), PathBuf::from)
    }

    /// Returns what jobs and the agent's helpers may see: everything but the agent's own secrets.
    pub fn without_secrets(&self) -> Vec<(OsString, OsString)> {
        let is_secret = |name: &OsString| AGENT_SECRETS.iter().any(|secret| name == secret);
        self.0.iter().filter(|(name, _)| !is_secret(name)).cloned().collect()
    }
}
