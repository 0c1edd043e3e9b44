//! The containers of a job, as plain, valid data.

use std::fmt;

use bytes::Bytes;

use crate::job::values::{Command, EnvVar, InjectedFile, Problems};

/// The name of a container within its job; the other containers reach it by this host name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ContainerName(String);

impl ContainerName {
    /// The longest label of a host name, in bytes.
    const LONGEST: usize = 63;

    /// Returns `None` unless `name` is 1 to 63 letters, digits, `.`, `_` and `-` of ASCII, a letter
    /// or digit first.
    pub fn new(name: &str) -> Option<Self> {
        let starts_well = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        let goes_on_well = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        let fits = name.len() <= Self::LONGEST;
        (starts_well && goes_on_well && fits).then(|| Self(name.to_owned()))
    }

    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// One container of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// The container's name within the job.
    pub name: ContainerName,
    /// The reference of the image, without surrounding white space; never empty.
    pub image: String,
    /// The words that replace the image's entrypoint; empty to keep that.
    pub entrypoint: Vec<String>,
    /// The words that replace the image's command; empty to keep that, and for the main container,
    /// which runs the job's shell.
    pub command: Vec<String>,
    /// The user, in place of the image's.
    pub user: Option<String>,
    /// Variables in addition to the image's, with UTF-8 values.
    pub environment: Vec<EnvVar>,
    /// Files to write before the container's own program, or the job's first script, runs.
    pub files: Vec<InjectedFile>,
}

/// Credentials for pulling images from a registry (docs/protocol.md: "Docker executor").
#[derive(Clone, PartialEq, Eq)]
pub enum RegistryCredentials {
    /// Credentials for Docker Hub.
    DockerHub {
        /// The account's name.
        username: String,
        /// The password or an access token.
        password: String,
    },
    /// Credentials for any registry with user names and passwords.
    Generic {
        /// The registry's URL or host, with or without a scheme.
        url: String,
        /// The account's name.
        username: String,
        /// The password or an access token.
        password: String,
    },
    /// A key for Amazon's ECR, to request a registry password with.
    Ecr {
        /// The AWS region of the registry.
        region: String,
        /// The id of the access key.
        access_key_id: String,
        /// The secret of the access key.
        secret_access_key: String,
        /// The AWS account that owns the registry; `None` for the account of the key.
        account_id: Option<String>,
    },
    /// A service account key for Google's registry.
    Gcr {
        /// The registry's host, such as `gcr.io`.
        hostname: String,
        /// The key file, JSON.
        key_file: Bytes,
    },
}

impl RegistryCredentials {
    /// Returns the kind as the job's log shows it (docs/protocol.md: "Docker executor").
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::DockerHub { .. } => "DockerHub",
            Self::Generic { .. } => "Docker",
            Self::Ecr { .. } => "ECR",
            Self::Gcr { .. } => "GCR",
        }
    }
}

/// Shows the kind only: the rest is secret.
impl fmt::Debug for RegistryCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} …", self.kind())
    }
}

/// The containers of a job, and what is needed to start them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compose {
    /// The container where the job's commands run.
    pub main: Container,
    /// Further containers, reachable from the main one by their names.
    pub side_containers: Vec<Container>,
    /// Credentials for pulling private images.
    pub credentials: Result<Vec<RegistryCredentials>, Problems>,
    /// Commands that run on the agent's machine before images are pulled.
    pub host_setup_commands: Vec<Command>,
}

impl Compose {
    /// Returns all containers, the main one first.
    pub fn containers(&self) -> impl Iterator<Item = &Container> {
        std::iter::once(&self.main).chain(&self.side_containers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn container_names_are_valid_host_names() {
        for good in ["main", "Db_1", "redis-7.2", "9"] {
            assert!(ContainerName::new(good).is_some(), "{good}");
        }
        let long = "a".repeat(64);
        for bad in ["", "-a", ".a", "a b", "a/b", "ä", "a\n", long.as_str()] {
            assert!(ContainerName::new(bad).is_none(), "{bad}");
        }
    }
}
