//! The environment that the agent was started with, read once.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

/// Variables that hold the agent's own secrets; jobs must not see them.
pub const AGENT_SECRETS: [&str; 2] = ["SEMAPHORE_AGENT_TOKEN", "SEMAPHORE_AGENT_AUTH_TOKEN_SECRET"];

/// Environment variables. An empty variable counts as unset.
#[derive(Clone, Debug, Default)]
pub struct Environment(Vec<(OsString, OsString)>);

impl Environment {
    /// Reads the environment of this process.
    pub fn from_process() -> Self {
        Self(std::env::vars_os().collect())
    }

    /// Returns the value of the variable called `name`.
    pub fn get(&self, name: &str) -> Option<&OsStr> {
        let value = self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value);
        value.map(OsString::as_os_str).filter(|value| !value.is_empty())
    }

    /// Returns the value of the variable called `name`; invalid UTF-8 becomes U+FFFD.
    pub fn text(&self, name: &str) -> Option<String> {
        self.get(name).map(|value| value.to_string_lossy().into_owned())
    }

    /// Returns the variables whose names begin with `prefix`, sorted by name; names that are not UTF-8 are
    /// skipped.
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

    /// Returns the user's home directory: `HOME`, or else the user database's entry. `None` if it is not an
    /// absolute path.
    pub fn home(&self) -> Option<PathBuf> {
        let home = self.get("HOME").map(PathBuf::from).or_else(std::env::home_dir);
        home.filter(|home| home.is_absolute())
    }

    /// Returns the directory for temporary files.
    pub fn temporary_directory(&self) -> PathBuf {
        self.get("TMPDIR").map_or_else(|| "/tmp".into(), PathBuf::from)
    }

    /// Returns the environment for jobs and helper programs: all variables except [`AGENT_SECRETS`].
    pub fn without_secrets(&self) -> Vec<(OsString, OsString)> {
        let is_secret = |name: &OsString| AGENT_SECRETS.iter().any(|secret| name == secret);
        self.0.iter().filter(|(name, _)| !is_secret(name)).cloned().collect()
    }
}
