//! Secrets of the agent. Each can be given as a value, in a file, or through a file descriptor.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;

use super::option::{Descriptor, Opt, Spec};
use super::{ConfigError, MASKED, Settings};
use crate::os::sys;

/// Limit for a secret read from a file or a descriptor, in bytes; no token is longer. The rest is ignored.
const LONGEST_SECRET: u64 = 64 << 10;

/// A secret value, which debug output does not show.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub(super) String);

impl Secret {
    /// Returns the value.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Reads a secret from a file, without the line ends behind it. Also returns a warning if every user can
    /// read the file. Fails if another user owns the file, or if every user can write to it.
    fn read(path: &Path) -> io::Result<(Self, Option<String>)> {
        let file = File::open(path)?;
        let found = file.metadata()?;
        if !found.is_file() {
            // The owner and the mode of a pipe or a device say nothing.
            return Ok((Self::read_from(file)?, None));
        }
        let refused = |why: String| Err(io::Error::new(io::ErrorKind::InvalidData, why));
        if found.uid() != 0 && found.uid() != geteuid().as_raw() {
            return refused(format!("it belongs to another user (uid {})", found.uid()));
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

    /// Reads a secret from a file descriptor inherited from the agent's parent, and closes it.
    fn read_descriptor(Descriptor(number): Descriptor) -> io::Result<Self> {
        let number = i32::try_from(number).ok().filter(|number| *number > 2);
        let number =
            number.ok_or_else(|| io::Error::other("the descriptor must be 3 or higher"))?;
        let open = sys::take_descriptor(number).map_err(|error| {
            let hint =
                format!("open it when starting the agent, as with `{number}<FILE` in a shell");
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

/// The three options that can set one secret.
pub(super) struct SecretOptions {
    /// What messages call the secret.
    pub(super) name: &'static str,
    pub(super) value: Opt<Secret>,
    pub(super) file: Opt<PathBuf>,
    pub(super) descriptor: Opt<Descriptor>,
}

impl SecretOptions {
    /// Returns the option that sets the secret.
    pub(super) fn set_by(&self, settings: &Settings) -> &Spec {
        let options = [&self.value.spec, &self.file.spec, &self.descriptor.spec];
        options.into_iter().find(|option| settings.is_set(option)).unwrap_or(&self.value.spec)
    }

    /// Reads the secret, which is not empty. Adds a warning to `settings` if every user can read its file.
    pub(super) fn read(&self, settings: &mut Settings) -> Result<Secret, ConfigError> {
        let Self { name, value, file, descriptor } = self;
        let given = settings.get(value);
        let path = settings.get(file);
        let number = settings.get(descriptor);
        let (spec, secret) = match (given, path, number) {
            (Some(secret), None, None) => (&value.spec, secret),
            (None, Some(path), None) => {
                let (secret, warning) = Secret::read(&path).map_err(|error| {
                    settings.refuse(&file.spec, format!("`{}`: {error}", path.display()))
                })?;
                settings.warnings.extend(warning);
                if secret.reveal().is_empty() {
                    let why = format!("`{}`: there is no {name} in it", path.display());
                    return Err(settings.refuse(&file.spec, why));
                }
                (&file.spec, secret)
            }
            (None, None, Some(number)) => {
                let secret = Secret::read_descriptor(number).map_err(|error| {
                    settings.refuse(&descriptor.spec, format!("`{}`: {error}", number.0))
                })?;
                (&descriptor.spec, secret)
            }
            (None, None, None) => {
                let how = format!(
                    "set {}, name a file with --{}, or an open descriptor with --{}",
                    value.spec.variable(),
                    file.spec.key,
                    descriptor.spec.key
                );
                return Err(ConfigError::new(format!("no {name}"), how));
            }
            (given, path, _) => {
                let set = [(given.is_some(), &value.spec), (path.is_some(), &file.spec)];
                let other = set.into_iter().find(|(is_set, _)| *is_set);
                let other = other.map_or(descriptor.spec.key, |(_, spec)| spec.key);
                let this =
                    if settings.is_set(&descriptor.spec) { &descriptor.spec } else { &file.spec };
                let why = format!("{other} is set too (only one is allowed)");
                return Err(settings.refuse(this, why));
            }
        };
        if secret.reveal().is_empty() {
            return Err(settings.refuse(spec, "is empty"));
        }
        Ok(secret)
    }
}
