//! What the operator of an agent can set. Each option is written once; flags, variables and a file are merged as maps,
//! and checked once.

pub mod common;
mod file;
pub mod layers;
pub mod options;
pub mod run;
mod secret;
pub mod serve;
pub mod start;

use std::path::PathBuf;
use std::str::FromStr;

use clap::ValueEnum;

pub use self::layers::{Flags, Settings};
pub use self::secret::Secret;

/// What is wrong with the configuration: which option, its value, and what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub String);

/// What variables of options begin with.
const PREFIX: &str = "SEMAPHORE_AGENT_";

/// Stands for what is not shown.
const MASKED: &str = "…";

/// Whether jobs in containers get the socket of the engine that runs them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DockerSocket {
    /// They do: who has it is root on the engine's machine.
    #[default]
    Always,
    /// They don't.
    Never,
}

/// A directory or file of this machine, and where containers find it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileMount {
    /// On this machine.
    pub host: PathBuf,
    /// In a container.
    pub container: PathBuf,
}

impl FromStr for FileMount {
    type Err = String;

    fn from_str(pair: &str) -> Result<Self, Self::Err> {
        match pair.split_once(':') {
            // A third part would be for the container's engine, which knows more than there is here.
            Some((host, container))
                if !host.is_empty() && !container.is_empty() && !container.contains(':') =>
            {
                // What is not a path from the root would be the name of a volume to engines.
                let host = PathBuf::from(host);
                let host = std::path::absolute(&host).unwrap_or(host);
                Ok(Self { host, container: container.into() })
            }
            _ => Err(format!("`{pair}` is not HOST:CONTAINER, two paths")),
        }
    }
}

/// Which of the known words is most like this one.
fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known.max_by(|a, b| strsim::jaro_winkler(word, a).total_cmp(&strsim::jaro_winkler(word, b)))
}

#[cfg(test)]
mod tests {
    use super::layers::OptionSet;
    use super::serve::Serve;
    use super::start::Start;

    const INTRODUCTION: &str = "\
# All options of `agent MODE --config-file FILE`, with the values they have if nothing is set; those
# without such a value are comments. Each is a flag too (--grace-period), and a variable
# (SEMAPHORE_AGENT_GRACE_PERIOD). Flags win over variables, and both over this file.
# `agent MODE --print-config` shows what is in force.
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
    fn examples_are_made_from_the_options() {
        assert_example::<Serve>("serve", include_str!("../../config/serve.example.yaml"));
        assert_example::<Start>("start", include_str!("../../config/agent.example.yaml"));
    }

    #[test]
    fn every_default_is_a_value() {
        for option in Serve::OPTIONS.iter().chain(Start::OPTIONS) {
            if let Some(default) = option.default {
                assert!((option.normalised)(&default.into()).is_ok(), "{}", option.key);
            }
        }
    }
}
