//! The agent's configuration. Each option is defined once; flags, variables and a file are merged as maps and
//! then checked.

pub mod common;
mod file;
pub mod layers;
pub mod option;
pub mod run;
mod secret;
pub mod serve;
pub mod start;

use std::path::PathBuf;
use std::str::FromStr;

use clap::ValueEnum;

pub use self::layers::{Flags, Settings};
pub use self::secret::Secret;

/// An error in the configuration. Its object is the flag, the variable, or the file and key with the bad value.
pub type ConfigError = actors::errors::ErrorOf;

/// Prefix of the environment variables that set options.
const PREFIX: &str = "SEMAPHORE_AGENT_";

/// Shown in place of a secret.
const MASKED: &str = "…";

/// Whether jobs in containers get the engine's socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DockerSocket {
    /// Mount the socket, which makes jobs root on the engine's machine.
    #[default]
    Always,
    /// Don't mount the socket.
    Never,
}

/// A directory or file of this machine to mount into containers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileMount {
    /// The path on this machine.
    pub host: PathBuf,
    /// The path in a container.
    pub container: PathBuf,
}

impl FromStr for FileMount {
    type Err = String;

    fn from_str(pair: &str) -> Result<Self, Self::Err> {
        match pair.split_once(':') {
            // Mount options of the engine (a third part, as in `/a:/b:ro`) are not supported.
            Some((host, container))
                if !host.is_empty() && !container.is_empty() && !container.contains(':') =>
            {
                // Engines take a relative path for the name of a volume.
                let host = PathBuf::from(host);
                let host = std::path::absolute(&host).unwrap_or(host);
                Ok(Self { host, container: container.into() })
            }
            _ => Err(format!("`{pair}` is not HOST:CONTAINER (two paths)")),
        }
    }
}

/// Returns the known word that is most similar to `word`.
fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known.max_by(|a, b| strsim::jaro_winkler(word, a).total_cmp(&strsim::jaro_winkler(word, b)))
}

#[cfg(test)]
mod tests {
    use super::layers::OptionSet;
    use super::serve::Serve;
    use super::start::Start;

    const INTRODUCTION: &str = "\
# All options of `agent MODE --config-file FILE` with their defaults; options without a default are
# comments. Each option is also a flag (--grace-period) and a variable (SEMAPHORE_AGENT_GRACE_PERIOD).
# Flags override variables, and both override this file.
# `agent MODE --print-config` shows the options in force.
";

    fn example_file<S: OptionSet>(introduction: &str) -> String {
        let options = S::OPTIONS.iter().filter_map(|option| option.example());
        std::iter::once(introduction.to_owned()).chain(options).collect::<Vec<_>>().join("\n")
    }

    fn assert_example<S: OptionSet>(mode: &str, found: &str) {
        let expected = example_file::<S>(&INTRODUCTION.replace("MODE", mode));
        assert_eq!(found, expected, "the example file must be: {expected}");
    }

    #[test]
    fn example_files_match_the_options() {
        assert_example::<Serve>("serve", include_str!("../../config/serve.example.yaml"));
        assert_example::<Start>("start", include_str!("../../config/agent.example.yaml"));
    }

    #[test]
    fn every_default_is_valid() {
        for option in Serve::OPTIONS.iter().chain(Start::OPTIONS) {
            if let Some(default) = option.default {
                assert!((option.normalised)(&default.into()).is_ok(), "{}", option.key);
            }
        }
    }
}
