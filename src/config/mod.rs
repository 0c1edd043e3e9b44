//! What the operator of an agent can set: raw options from flags, environment and a file, merged and
//! validated once.

/// Sets each option that is not set from another layer.
macro_rules! fill {
    ($options:ident from $layer:expr; $($option:ident),* $(,)?) => {{
        let layer = $layer;
        $($options.$option = $options.$option.or(layer.$option);)*
    }};
}

mod fields;
mod origins;
pub mod serve;
pub mod start;

use std::fmt;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::ValueEnum;
use nix::unistd::geteuid;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize, Serializer};

use crate::os::sys;
use crate::serde_words::without_value;

/// What is wrong with the configuration: which option, its value, and what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub String);

/// How long what a job leaves running has to end when it is asked to.
pub const DEFAULT_GRACE: Duration = Duration::from_secs(2);

/// How much of a secret is read, in bytes: no token is longer.
const LONGEST_SECRET: u64 = 64 << 10;

/// Stands for what is not shown.
const MASKED: &str = "…";

/// A value that is never shown.
#[derive(Clone, Deserialize, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The value.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// The content of a file, without the newline at its end; and a warning if others can read it. One that others could
    /// have written is an error.
    fn read(path: &Path) -> std::io::Result<(Self, Option<String>)> {
        let file = std::fs::File::open(path)?;
        let found = file.metadata()?;
        if !found.is_file() {
            // A pipe or a device, which is whose it is.
            return Ok((Self::read_from(file)?, None));
        }
        let refused = |why: String| Err(std::io::Error::new(std::io::ErrorKind::InvalidData, why));
        if found.uid() != 0 && found.uid() != geteuid().as_raw() {
            return refused(format!("it belongs to another user (number {})", found.uid()));
        }
        if found.mode() & 0o002 != 0 {
            return refused(
                "every user of this machine can write to it; `chmod 600` it".to_owned(),
            );
        }
        let warning = (found.mode() & 0o004 != 0).then(|| {
            let path = path.display();
            format!("{path}: every user of this machine can read this secret; `chmod 600` it")
        });
        Ok((Self::read_from(file)?, warning))
    }

    /// Reads a secret from the descriptor of this number, which the agent's parent has left open, and closes it.
    fn read_descriptor(number: u32) -> std::io::Result<Self> {
        let number = i32::try_from(number).ok().filter(|number| *number > 2);
        let number = number.ok_or_else(|| {
            std::io::Error::other("3 is the first descriptor that can be used for this")
        })?;
        Self::read_from(sys::take_descriptor(number)?)
    }

    fn read_from(file: std::fs::File) -> std::io::Result<Self> {
        let mut text = String::new();
        file.take(LONGEST_SECRET).read_to_string(&mut text)?;
        let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
        Ok(Self(text.trim_end_matches(['\n', '\r']).to_owned()))
    }
}

impl FromStr for Secret {
    type Err = std::convert::Infallible;

    fn from_str(value: &str) -> Result<Self, Self::Err> {
        Ok(Self(value.to_owned()))
    }
}

/// Masked: what is written is for people.
impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(MASKED)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(MASKED)
    }
}

/// Whether jobs in containers get the socket of the engine that runs them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
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

/// Options that can be read from a file.
trait FileOptions: Default + DeserializeOwned {
    /// Keys whose values are never shown.
    const SECRETS: &'static [&'static str];
}

/// Reads the options that a file sets; answers them and all of its text.
fn read_file<O: FileOptions>(path: &Path) -> Result<(O, String), ConfigError> {
    let refuse = |why: String| ConfigError(format!("{}: {why}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| refuse(error.to_string()))?;
    // Some editors begin a file with a byte order mark.
    let text = text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text);
    if text.trim().is_empty() {
        return Ok((O::default(), text));
    }
    let options = serde_path_to_error::deserialize(serde_yaml::Deserializer::from_str(&text));
    options.map(|options| (options, text.clone())).map_err(|error| {
        let key = error.path().to_string();
        let what = with_nearest_key(error.inner().to_string(), &text);
        // A line without its space or colon makes what is around it one value.
        let secret =
            key == "." || O::SECRETS.iter().any(|secret| error.to_string().contains(secret));
        refuse(if secret { without_value(&what) } else { what })
    })
}

/// The number of the line of `text` that sets `key`.
fn line_of(text: &str, key: &str) -> Option<usize> {
    let quotes = ['"', '\''];
    let sets = |line: &str| {
        let rest = line.trim_start().trim_start_matches(quotes).strip_prefix(key);
        rest.is_some_and(|rest| rest.trim_start_matches(quotes).trim_start().starts_with(':'))
    };
    text.lines().position(sets).map(|index| index + 1)
}

/// Instead of all the keys that there are, the one that was probably meant.
fn with_nearest_key(message: String, text: &str) -> String {
    let parts = message.split_once("unknown field `").and_then(|(before, rest)| {
        let (unknown, rest) = rest.split_once('`')?;
        let known = rest.split('`').skip(1).step_by(2);
        let line = line_of(text, unknown);
        let line = line.map_or_else(String::new, |line| format!(" at line {line}"));
        Some((before, unknown, nearest(unknown, known)?, line))
    });
    match parts {
        Some((before, unknown, meant, line)) => {
            format!("{before}unknown key `{unknown}`; `{meant}` is the nearest known one{line}")
        }
        None => message,
    }
}

/// Which of the known words is most like this one.
fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known.max_by(|a, b| strsim::jaro_winkler(word, a).total_cmp(&strsim::jaro_winkler(word, b)))
}

/// The variables of the environment that look like an option of this agent and are none.
pub fn unknown_variables(known: &[String]) -> Vec<String> {
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    names.filter(|name| name.starts_with("SEMAPHORE_AGENT_") && !known.contains(name)).collect()
}
