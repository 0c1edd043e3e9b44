//! Where options were set: for people who look for what is wrong, or for what is in force.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::{ConfigError, line_of};

/// What variables of options begin with.
pub(super) const PREFIX: &str = "SEMAPHORE_AGENT_";

/// The variable of an option.
pub(super) fn variable_of(key: &str) -> String {
    format!("{PREFIX}{}", key.to_ascii_uppercase().replace('-', "_"))
}

/// A file of options.
#[derive(Default)]
pub(super) struct OptionsFile {
    /// Where it is.
    pub(super) path: PathBuf,
    /// All of it.
    pub(super) text: String,
}

/// What each layer sets, fit to be shown.
pub(super) struct Origins {
    /// Wins over all others.
    pub(super) flags: Map<String, Value>,
    /// Wins over the file.
    pub(super) variables: Map<String, Value>,
    /// The last one.
    pub(super) file: Map<String, Value>,
    /// Where that is.
    pub(super) place: OptionsFile,
}

impl Origins {
    /// Where the value of an option comes from, in a word.
    pub(super) fn of(&self, key: &str) -> String {
        if self.flags.contains_key(key) {
            "flag".to_owned()
        } else if self.variables.contains_key(key) {
            variable_of(key)
        } else if self.file.contains_key(key) {
            self.place.path.display().to_string()
        } else {
            "default".to_owned()
        }
    }

    /// An error that names the place of an option with a bad value.
    pub(super) fn refuse(&self, key: &str, why: impl std::fmt::Display) -> ConfigError {
        ConfigError(if self.flags.contains_key(key) {
            format!("--{key}: {why}")
        } else if self.variables.contains_key(key) {
            format!("{}: {why}", variable_of(key))
        } else if self.file.contains_key(key) {
            let line = line_of(&self.place.text, key);
            let line = line.map_or_else(String::new, |line| format!(" at line {line}"));
            format!("{}: {key}: {why}{line}", self.place.path.display())
        } else {
            format!("{key}: {why}")
        })
    }
}
