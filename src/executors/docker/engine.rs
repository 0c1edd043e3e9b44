//! The Docker Engine that jobs' containers are on.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bollard::{API_DEFAULT_VERSION, Docker};

use super::hijack::{self, ContainerTerminal, HijackError};
use super::tls_relay::TlsRelay;

/// Where the engine is if `DOCKER_HOST` does not say.
const DEFAULT_SOCKET: &str = "/var/run/docker.sock";

/// The oldest API that is spoken, that of Engine 20.10, and the newest that was tried.
const OLDEST_API: (usize, usize) = (1, 41);
const NEWEST_API: (usize, usize) = (1, 52);

/// How long the engine may take to begin an answer: longer than anything that it may have to wait for.
const PATIENCE: Duration = Duration::from_mins(15);

/// How long it may take to say who it is.
const VERSION_PATIENCE: Duration = Duration::from_secs(30);

/// Where to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineAddress {
    /// On this machine.
    Unix(PathBuf),
    /// Anywhere, as host and port.
    Tcp(String),
}

/// Where an engine is, as its users say.
#[derive(Clone, Debug, PartialEq, Eq)]
enum DockerHost {
    /// It needs no more than a connection.
    Plain(EngineAddress),
    /// It wants TLS.
    Tls {
        /// Host and port.
        address: String,
        /// The directory of the certificates.
        certificates: PathBuf,
    },
}

/// Why there is no engine for a job.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The variable can't be understood.
    #[error("DOCKER_HOST `{given}` is neither unix:///PATH nor tcp://HOST:PORT")]
    Address {
        /// As given.
        given: String,
    },
    /// Its certificates can't be used.
    #[error("TLS for the Docker Engine at {at}: {why}")]
    Tls {
        /// Where the engine is.
        at: String,
        /// In the words of who tried.
        why: std::io::Error,
    },
    /// Nobody answers.
    #[error("no Docker Engine at {at}: {why}")]
    Absent {
        /// Where it was looked for.
        at: String,
        /// In the words of who looked.
        why: String,
    },
    /// It is older than what is supported.
    #[error(
        "the Docker Engine {version} speaks version {api} of its API; 1.41 or later is needed, that of \
         Engine 20.10"
    )]
    TooOld {
        /// Of the engine.
        version: String,
        /// The newest it speaks.
        api: String,
    },
}

impl DockerHost {
    /// What `DOCKER_HOST` of `environment` says.
    fn from_environment(environment: &[(OsString, OsString)]) -> Result<Self, EngineError> {
        let variable = |name: &str| {
            let found = environment.iter().find(|(its, value)| its == name && !value.is_empty());
            found.map(|(_, value)| value.to_string_lossy().into_owned())
        };
        let Some(host) = variable("DOCKER_HOST") else {
            return Ok(Self::Plain(EngineAddress::Unix(DEFAULT_SOCKET.into())));
        };
        if let Some(path) = host.strip_prefix("unix://").filter(|path| path.starts_with('/')) {
            return Ok(Self::Plain(EngineAddress::Unix(path.into())));
        }
        match host.strip_prefix("tcp://").map(|address| address.trim_end_matches('/')) {
            Some(address) if !address.is_empty() => {
                let with_port = |port| {
                    let has_port = address.rsplit_once(':').is_some_and(|(_, port)| {
                        !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit())
                    });
                    if has_port { address.to_owned() } else { format!("{address}:{port}") }
                };
                if variable("DOCKER_TLS_VERIFY").is_none() {
                    return Ok(Self::Plain(EngineAddress::Tcp(with_port(2375))));
                }
                let certificates = variable("DOCKER_CERT_PATH").map(PathBuf::from);
                let home = || variable("HOME").map(|home| Path::new(&home).join(".docker"));
                let certificates = certificates.or_else(home).unwrap_or_default();
                Ok(Self::Tls { address: with_port(2376), certificates })
            }
            _ => Err(EngineError::Address { given: host }),
        }
    }

    fn shown(&self) -> String {
        match self {
            Self::Plain(EngineAddress::Unix(path)) => path.display().to_string(),
            Self::Plain(EngineAddress::Tcp(address)) | Self::Tls { address, .. } => {
                format!("tcp://{address}")
            }
        }
    }
}

/// A client of one engine. Clones share its connections.
#[derive(Clone, Debug)]
pub struct Engine {
    /// For everything but terminals.
    pub api: Docker,
    address: EngineAddress,
    /// The socket on this machine, if it is there.
    pub socket: Option<PathBuf>,
    /// The kind of processor that it runs on.
    pub architecture: String,
    /// What paths begin with.
    prefix: String,
    /// What makes connections, if the engine wants TLS.
    _relay: Option<Arc<TlsRelay>>,
}

impl Engine {
    /// Finds the engine that `environment` names, and out which version of the API to speak. `scratch` is a
    /// private directory, or will be.
    pub async fn connect(
        environment: &[(OsString, OsString)],
        scratch: &Path,
    ) -> Result<Self, EngineError> {
        let host = DockerHost::from_environment(environment)?;
        let at = host.shown();
        let absent = |why: String| EngineError::Absent { at: at.clone(), why };
        let (address, relay) = match host {
            DockerHost::Plain(address) => (address, None),
            DockerHost::Tls { address, certificates } => {
                let relay = TlsRelay::start(&address, &certificates, scratch);
                let relay = relay.map_err(|why| EngineError::Tls { at: at.clone(), why })?;
                (EngineAddress::Unix(relay.socket.clone()), Some(Arc::new(relay)))
            }
        };
        let socket = match (&address, &relay) {
            (EngineAddress::Unix(path), None) => Some(path.clone()),
            _ => None,
        };
        if let EngineAddress::Unix(path) = &address {
            // The client's own words name neither.
            probe(path).map_err(|error| absent(error.to_string()))?;
        }
        let api = client(&address, String::new()).map_err(|error| absent(error.to_string()))?;
        let version = tokio::time::timeout(VERSION_PATIENCE, api.version())
            .await
            .map_err(|_| absent("there was no answer in time".into()))?
            .map_err(|error| absent(error.to_string()))?;
        let spoken = version.api_version.unwrap_or_default();
        let Some(newest) = parse_version(&spoken).filter(|newest| *newest >= OLDEST_API) else {
            let version = version.version.unwrap_or_default();
            return Err(EngineError::TooOld { version, api: spoken });
        };
        let (major, minor) = newest.min(NEWEST_API);
        let prefix = format!("/v{major}.{minor}");
        let api = client(&address, prefix.clone()).map_err(|error| absent(error.to_string()))?;
        let architecture = version.arch.unwrap_or_default();
        Ok(Self { api, address, socket, architecture, prefix, _relay: relay })
    }

    /// The terminal of a container, which may not have been started yet.
    pub async fn attach(&self, container: &str) -> Result<ContainerTerminal, HijackError> {
        let path = format!(
            "{}/containers/{container}/attach?stream=1&stdin=1&stdout=1&stderr=1",
            self.prefix
        );
        ContainerTerminal::open(&self.address, &path).await
    }

    /// Posts what the library has no call for.
    pub async fn post(&self, path: &str, body: &[u8]) -> Result<(), HijackError> {
        hijack::post(&self.address, &format!("{}{path}", self.prefix), body).await
    }
}

fn probe(socket: &Path) -> std::io::Result<()> {
    std::os::unix::net::UnixStream::connect(socket).map(drop)
}

fn parse_version(text: &str) -> Option<(usize, usize)> {
    let (major, minor) = text.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// A client whose paths begin with `prefix`. The library negotiates a version but does not send it, and it
/// encodes credentials in the alphabet that engines do not read.
fn client(address: &EngineAddress, prefix: String) -> Result<Docker, bollard::errors::Error> {
    let seconds = PATIENCE.as_secs();
    let client = match address {
        EngineAddress::Unix(path) => {
            Docker::connect_with_unix(&path.to_string_lossy(), seconds, API_DEFAULT_VERSION)?
        }
        EngineAddress::Tcp(address) => {
            Docker::connect_with_http(address, seconds, API_DEFAULT_VERSION)?
        }
    };
    Ok(client.with_request_modifier(move |mut request| {
        let path = request.uri().path_and_query().map(|path| format!("{prefix}{path}"));
        if let Some(path) = path.and_then(|path| path.parse().ok()) {
            let mut parts = request.uri().clone().into_parts();
            parts.path_and_query = Some(path);
            // Fails for no path that begins with a slash.
            if let Ok(uri) = parts.try_into() {
                *request.uri_mut() = uri;
            }
        }
        if let Some(value) = request.headers_mut().get_mut("x-registry-auth") {
            let encoded = value.to_str().unwrap_or_default().replace('+', "-").replace('/', "_");
            if let Ok(encoded) = encoded.parse() {
                *value = encoded;
            }
        }
        request
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(variables: &[(&str, &str)]) -> Result<DockerHost, String> {
        let variables: Vec<_> = variables.iter().map(|(n, v)| (n.into(), v.into())).collect();
        DockerHost::from_environment(&variables).map_err(|error| error.to_string())
    }

    #[test]
    fn the_engine_is_where_docker_host_says() {
        let unix = |path: &str| Ok(DockerHost::Plain(EngineAddress::Unix(path.into())));
        assert_eq!(host(&[]), unix(DEFAULT_SOCKET));
        assert_eq!(host(&[("DOCKER_HOST", "unix:///run/docker.sock")]), unix("/run/docker.sock"));
        for (given, address) in
            [("tcp://engine:5000", "engine:5000"), ("tcp://[::1]", "[::1]:2375")]
        {
            let tcp = DockerHost::Plain(EngineAddress::Tcp(address.into()));
            assert_eq!(host(&[("DOCKER_HOST", given)]), Ok(tcp));
        }
        let verified =
            [("DOCKER_HOST", "tcp://engine"), ("DOCKER_TLS_VERIFY", "1"), ("HOME", "/me")];
        let (address, certificates) = ("engine:2376".into(), "/me/.docker".into());
        assert_eq!(host(&verified), Ok(DockerHost::Tls { address, certificates }));
        for wrong in ["ssh://engine", "unix://relative", "tcp://", "engine"] {
            assert!(host(&[("DOCKER_HOST", wrong)]).unwrap_err().contains(wrong));
        }
    }

    #[test]
    fn versions_are_compared_as_numbers() {
        assert!(parse_version("1.100").unwrap() > parse_version("1.41").unwrap());
        assert_eq!(parse_version("new"), None);
    }
}
