//! Secrets of the agent, and the three ways in which it can be given one.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;

use super::options::{Descriptor, Opt, Spec};
use super::{ConfigError, MASKED, Settings};
use crate::os::sys;

/// How much of a secret is read, in bytes: no token is longer.
const LONGEST_SECRET: u64 = 64 << 10;

/// A value that is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub(super) String);

impl Secret {
    /// Returns the value.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Reads the content of a file, without the line end behind it. Also returns a warning if others can read the file. A
    /// file that others could have written is an error.
    fn read(path: &Path) -> io::Result<(Self, Option<String>)> {
        let file = File::open(path)?;
        let found = file.metadata()?;
        if !found.is_file() {
            // A pipe or a device.
            return Ok((Self::read_from(file)?, None));
        }
        let refused = |why: String| Err(io::Error::new(io::ErrorKind::InvalidData, why));
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

    /// Reads a secret from a descriptor that the agent's parent has left open, and closes it.
    fn read_descriptor(Descriptor(number): Descriptor) -> io::Result<Self> {
        let number = i32::try_from(number).ok().filter(|number| *number > 2);
        let number = number.ok_or_else(|| {
            io::Error::other("3 is the first descriptor that can be used for this")
        })?;
        let open = sys::take_descriptor(number).map_err(|error| {
            let hint = format!("open it for the agent, as with `{number}<FILE` in a shell");
            io::Error::new(error.kind(), format!("{error}; {hint}"))
        })?;
        Self::read_from(open)
    }

    fn read_from(file: File) -> io::Result<Self> {
        let mut text = String::new();
        file.take(LONGEST_SECRET).read_to_string(&mut text)?;
        let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
        Ok(Self(text.trim_end_matches(['\n', '\r']).to_owned()))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(MASKED)
    }
}

/// The options that give one secret.
pub(super) struct WaysToSecret {
    /// What the secret is called.
    pub(super) what: &'static str,
    pub(super) itself: Opt<Secret>,
    pub(super) in_file: Opt<PathBuf>,
    pub(super) by_descriptor: Opt<Descriptor>,
}

impl WaysToSecret {
    /// Returns the option that gives the secret.
    pub(super) fn set_by(&self, settings: &Settings) -> &Spec {
        let ways = [&self.itself.spec, &self.in_file.spec, &self.by_descriptor.spec];
        ways.into_iter().find(|way| settings.is_set(way)).unwrap_or(&self.itself.spec)
    }

    /// Returns the secret, which is not empty, and the option that gave it. A file that others can read becomes a warning.
    pub(super) fn read(&self, settings: &mut Settings) -> Result<Secret, ConfigError> {
        let Self { what, itself, in_file, by_descriptor } = self;
        let given = settings.get(itself);
        let file = settings.get(in_file);
        let descriptor = settings.get(by_descriptor);
        let (spec, secret) = match (given, file, descriptor) {
            (Some(secret), None, None) => (&itself.spec, secret),
            (None, Some(path), None) => {
                let (secret, warning) = Secret::read(&path).map_err(|error| {
                    settings.refuse(&in_file.spec, format!("`{}`: {error}", path.display()))
                })?;
                settings.warnings.extend(warning);
                if secret.reveal().is_empty() {
                    let why = format!("`{}`: there is no {what} in it", path.display());
                    return Err(settings.refuse(&in_file.spec, why));
                }
                (&in_file.spec, secret)
            }
            (None, None, Some(number)) => {
                let secret = Secret::read_descriptor(number).map_err(|error| {
                    settings.refuse(&by_descriptor.spec, format!("`{}`: {error}", number.0))
                })?;
                (&by_descriptor.spec, secret)
            }
            (None, None, None) => {
                return Err(ConfigError(format!(
                    "no {what}: set {}, name a file with --{}, or an open descriptor with --{}",
                    itself.spec.variable(),
                    in_file.spec.key,
                    by_descriptor.spec.key
                )));
            }
            (given, file, _) => {
                let set = [(given.is_some(), &itself.spec), (file.is_some(), &in_file.spec)];
                let other = set.into_iter().find(|(is_set, _)| *is_set);
                let other = other.map_or(by_descriptor.spec.key, |(_, spec)| spec.key);
                let this = if settings.is_set(&by_descriptor.spec) {
                    &by_descriptor.spec
                } else {
                    &in_file.spec
                };
                let why = format!("{other} is set too; one of these is needed");
                return Err(settings.refuse(this, why));
            }
        };
        if secret.reveal().is_empty() {
            return Err(settings.refuse(spec, "is empty"));
        }
        Ok(secret)
    }
}
