//! Errors of requests to a Docker Engine.

use bollard::errors::Error;

/// Parts of an engine's messages that mean a transient failure of a pull. The engine passes on what a registry, a
/// resolver or a proxy said, as text only: there is nothing else to decide by.
const TRANSIENT: [&str; 10] = [
    "timeout",
    "timed out",
    "connection refused",
    "connection reset",
    "no such host",
    "temporary failure",
    "unexpected eof",
    ": eof",
    "service unavailable",
    "bad gateway",
];

/// A request that the engine refused or did not respond to. Shown as the engine's message, without the library's words
/// around it.
///
/// The library's error is no `source`: its text would repeat the message.
#[derive(Debug, thiserror::Error)]
#[error("{}", message_of(error))]
pub struct RequestError {
    error: Error,
}

impl From<Error> for RequestError {
    fn from(error: Error) -> Self {
        Self { error }
    }
}

impl RequestError {
    /// Returns whether a pull that failed like this may succeed the next time.
    pub fn is_transient(&self) -> bool {
        let message = message_of(&self.error).to_ascii_lowercase();
        TRANSIENT.iter().any(|transient| message.contains(transient))
    }

    /// Returns whether the engine does not have what was asked for.
    pub fn is_not_found(&self) -> bool {
        matches!(self.error, Error::DockerResponseServerError { status_code: 404, .. })
    }

    /// Returns whether the engine's message is about `path`.
    pub fn is_about(&self, path: &str) -> bool {
        message_of(&self.error).contains(path)
    }
}

fn message_of(error: &Error) -> String {
    match error {
        Error::DockerResponseServerError { message, .. } => message.trim().to_owned(),
        Error::DockerStreamError { error } => error.trim().to_owned(),
        other => other.to_string(),
    }
}

/// Why a container could not be created or started.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// The job is over.
    #[error(transparent)]
    Closed(#[from] super::containers::Closed),
    /// The engine refused it.
    #[error(transparent)]
    Request(#[from] RequestError),
}

impl From<Error> for ContainerError {
    fn from(error: Error) -> Self {
        Self::Request(error.into())
    }
}

/// Why the main container does not start.
#[derive(Debug, thiserror::Error)]
pub enum MainContainerError {
    /// The image has no bash.
    #[error("the image {image} has no `bash`")]
    NoBash {
        /// The image.
        image: String,
        /// The engine's message.
        source: ContainerError,
    },
    /// The image's entrypoint, or the job's, is missing or not executable.
    #[error("the entrypoint `{entrypoint}` can't be run")]
    Entrypoint {
        /// The program.
        entrypoint: String,
        /// The engine's message.
        source: ContainerError,
    },
    /// Anything else.
    #[error(transparent)]
    Other(ContainerError),
}

impl MainContainerError {
    /// Finds the program in the engine's message, which names it as text only.
    pub fn new(source: ContainerError, image: &str) -> Self {
        let message = source.to_string();
        let program = message.split_once("exec: \"").and_then(|(_, rest)| rest.split_once('"'));
        match program {
            Some(("bash", _)) => Self::NoBash { image: image.to_owned(), source },
            Some((entrypoint, _)) => Self::Entrypoint { entrypoint: entrypoint.to_owned(), source },
            None => Self::Other(source),
        }
    }
}

#[cfg(test)]
mod tests {
    use actors::errors::{ErrorOf, WithCauses};

    use super::*;

    #[test]
    fn the_engines_message_is_shown_once() {
        let message = "no such user".to_owned();
        let error = Error::DockerResponseServerError { status_code: 500, message };
        let error = ErrorOf::new("main", RequestError::from(error));
        assert_eq!(WithCauses(&error).to_string(), "main: no such user");
    }

    #[test]
    fn failed_connections_are_transient_and_refusals_are_not() {
        let error = |message: &str| {
            let message = message.to_owned();
            RequestError::from(Error::DockerResponseServerError { status_code: 500, message })
        };
        assert!(
            error("Get \"https://r/v2/\": dial tcp: connect: connection refused").is_transient()
        );
        assert!(error("Get \"https://r/v2/\": EOF").is_transient());
        for refusal in [
            "unauthorized: authentication required",
            "manifest for x:latest not found: manifest unknown",
            "pull access denied for x, repository does not exist",
        ] {
            assert!(!error(refusal).is_transient(), "{refusal}");
        }
    }
}
