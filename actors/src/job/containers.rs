//! The containers of a job: plain data, decoded once.

use std::fmt;

use bytes::Bytes;

use crate::job::{Command, EnvVar, InjectedFile, Problems};

/// A name that a container has for the others of its job, which is also the name of a host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ContainerName(String);

impl ContainerName {
    /// The longest label that a host's name may have.
    const LONGEST: usize = 63;

    /// Nothing if `name` is not made of letters, digits, `.`, `_` and `-`, a letter or digit first.
    pub fn new(name: &str) -> Option<Self> {
        let starts_well = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        let goes_on_well = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        let fits = name.len() <= Self::LONGEST;
        (starts_well && goes_on_well && fits).then(|| Self(name.to_owned()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// One container of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// For the others.
    pub name: ContainerName,
    /// As given; never empty.
    pub image: String,
    /// Instead of the image's, if not empty.
    pub entrypoint: Vec<String>,
    /// Instead of the image's, if not empty; always so for the main container.
    pub command: Vec<String>,
    /// Instead of the image's.
    pub user: Option<String>,
    /// Besides the image's.
    pub environment: Vec<EnvVar>,
    /// Put in place before it starts.
    pub files: Vec<InjectedFile>,
}

/// What a registry knows the job by.
#[derive(Clone, PartialEq, Eq)]
pub enum RegistryCredentials {
    /// Of Docker Hub.
    DockerHub {
        /// The account.
        username: String,
        /// Or a token.
        password: String,
    },
    /// Of any registry that takes a name and a password.
    Generic {
        /// With or without a scheme.
        url: String,
        /// The account.
        username: String,
        /// Or a token.
        password: String,
    },
    /// Of Amazon's registry, which gives a password to who has a key.
    Ecr {
        /// Where it is.
        region: String,
        /// The key's name.
        access_key_id: String,
        /// The key.
        secret_access_key: String,
        /// Whose registry; that of the key if absent.
        account_id: Option<String>,
    },
    /// Of Google's registry.
    Gcr {
        /// Where it is.
        hostname: String,
        /// The key, in JSON.
        key_file: Bytes,
    },
}

impl RegistryCredentials {
    /// What the job's log calls their kind (PROTOCOL: "Docker executor").
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::DockerHub { .. } => "DockerHub",
            Self::Generic { .. } => "Docker",
            Self::Ecr { .. } => "ECR",
            Self::Gcr { .. } => "GCR",
        }
    }
}

/// The kind only.
impl fmt::Debug for RegistryCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} …", self.kind())
    }
}

/// The containers of a job, and what it takes to have them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compose {
    /// Where commands run.
    pub main: Container,
    /// Reachable from there by their names.
    pub side_containers: Vec<Container>,
    /// For images that not everybody may pull.
    pub credentials: Result<Vec<RegistryCredentials>, Problems>,
    /// Run on the agent's machine before anything else.
    pub host_setup_commands: Vec<Command>,
}

impl Compose {
    /// The main one first.
    pub fn containers(&self) -> impl Iterator<Item = &Container> {
        std::iter::once(&self.main).chain(&self.side_containers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_hosts() {
        for good in ["main", "Db_1", "redis-7.2", "9"] {
            assert!(ContainerName::new(good).is_some(), "{good}");
        }
        let long = "a".repeat(64);
        for bad in ["", "-a", ".a", "a b", "a/b", "ä", "a\n", long.as_str()] {
            assert!(ContainerName::new(bad).is_none(), "{bad}");
        }
    }
}
