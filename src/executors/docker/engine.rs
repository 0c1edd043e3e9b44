//! The client of the Docker Engine that runs jobs' containers.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use actors::errors::Cause;
use bollard::{API_DEFAULT_VERSION, Docker};

use super::hijack::{self, ContainerTerminal, HijackError};
use super::tls_relay::TlsRelay;

/// The engine's socket if `DOCKER_HOST` is not set.
const DEFAULT_SOCKET: &str = "/var/run/docker.sock";

/// The oldest supported version of the API, that of Engine 20.10, and the newest one that was tested.
const OLDEST_API: (usize, usize) = (1, 41);
const NEWEST_API: (usize, usize) = (1, 52);

/// How long the engine may take to begin a response. Longer than any single request should need.
const PATIENCE: Duration = Duration::from_mins(15);

/// How long the engine may take to report its version.
const VERSION_PATIENCE: Duration = Duration::from_secs(30);

/// The address that the client connects to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineAddress {
    /// The path of a Unix socket.
    Unix(PathBuf),
    /// `HOST:PORT`.
    Tcp(String),
}

/// The engine that the environment names.
#[derive(Clone, Debug, PartialEq, Eq)]
enum DockerHost {
    Plain(EngineAddress),
    Tls {
        /// `HOST:PORT`.
        address: String,
        /// The directory with the certificates.
        certificates: PathBuf,
    },
}

/// Why a job has no engine.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// `DOCKER_HOST` has a form that is not supported.
    #[error("DOCKER_HOST `{given}` is neither unix:///PATH nor tcp://HOST:PORT")]
    Address {
        /// The value of `DOCKER_HOST`.
        given: String,
    },
    /// The certificates can't be used, or the relay can't be set up.
    #[error("TLS for the Docker Engine at {at}")]
    Tls {
        /// The engine's address.
        at: String,
        /// The cause.
        source: std::io::Error,
    },
    /// The connection failed, or no engine responded.
    #[error("no Docker Engine at {at}")]
    Absent {
        /// The address that was tried.
        at: String,
        /// The cause.
        source: Cause,
    },
    /// The engine is older than 20.10.
    #[error(
        "Docker Engine {version} supports version {api} of its API at most; the agent needs 1.41 or \
         later (Engine 20.10)"
    )]
    TooOld {
        /// The engine's version.
        version: String,
        /// The newest API version that the engine supports.
        api: String,
    },
}

impl DockerHost {
    /// Reads `DOCKER_HOST`, `DOCKER_TLS_VERIFY` and `DOCKER_CERT_PATH` as the `docker` command does.
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
    /// The library's client, for everything but terminals and [`Self::post`].
    pub api: Docker,
    address: EngineAddress,
    /// The engine's socket, if the engine runs on this machine.
    pub socket: Option<PathBuf>,
    /// The engine's processor architecture, as `amd64`.
    pub architecture: String,
    /// The API version that begins each path, as `/v1.41`.
    prefix: String,
    /// The relay that `address` leads to, if the engine needs TLS. Kept alive with the client.
    _relay: Option<Arc<TlsRelay>>,
}

impl Engine {
    /// Connects to the engine that `environment` names, and chooses the version of the API. `scratch` is a
    /// private directory for the TLS relay's socket; it is created if needed.
    pub async fn connect(
        environment: &[(OsString, OsString)],
        scratch: &Path,
    ) -> Result<Self, EngineError> {
        let host = DockerHost::from_environment(environment)?;
        let at = host.shown();
        let absent = |source: Cause| EngineError::Absent { at: at.clone(), source };
        let (address, relay) = match host {
            DockerHost::Plain(address) => (address, None),
            DockerHost::Tls { address, certificates } => {
                let relay = TlsRelay::start(&address, &certificates, scratch);
                let relay = relay.map_err(|source| EngineError::Tls { at: at.clone(), source })?;
                (EngineAddress::Unix(relay.socket.clone()), Some(Arc::new(relay)))
            }
        };
        let socket = match (&address, &relay) {
            (EngineAddress::Unix(path), None) => Some(path.clone()),
            _ => None,
        };
        if let EngineAddress::Unix(path) = &address {
            // Checked here, as the library's error names neither the path nor the reason.
            probe(path).map_err(|error| absent(error.into()))?;
        }
        let api = client(&address, String::new()).map_err(|error| absent(error.into()))?;
        let version = tokio::time::timeout(VERSION_PATIENCE, api.version())
            .await
            .map_err(|_| absent("the engine did not respond in time".into()))?
            .map_err(|error| absent(error.into()))?;
        let spoken = version.api_version.unwrap_or_default();
        let Some(newest) = parse_version(&spoken).filter(|newest| *newest >= OLDEST_API) else {
            let version = version.version.unwrap_or_default();
            return Err(EngineError::TooOld { version, api: spoken });
        };
        let (major, minor) = newest.min(NEWEST_API);
        let prefix = format!("/v{major}.{minor}");
        let api = client(&address, prefix.clone()).map_err(|error| absent(error.into()))?;
        let architecture = version.arch.unwrap_or_default();
        Ok(Self { api, address, socket, architecture, prefix, _relay: relay })
    }

    /// Attaches to the terminal of `container`, which need not be started yet.
    pub async fn attach(&self, container: &str) -> Result<ContainerTerminal, HijackError> {
        let path = format!(
            "{}/containers/{container}/attach?stream=1&stdin=1&stdout=1&stderr=1",
            self.prefix
        );
        ContainerTerminal::open(&self.address, &path).await
    }

    /// Posts a JSON body to `path`, for requests that the library does not have.
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

/// Returns a client whose request paths begin with `prefix`.
///
/// Works around two defects of the library: it does not send the API version that it negotiated, and it
/// encodes credentials in standard base64 where engines expect the URL-safe alphabet.
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
            // Can't fail: the path begins with a slash.
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
    fn docker_host_names_the_engine() {
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
