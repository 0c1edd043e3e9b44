//! HTTP/1.1 clients with certificate authorities, an HTTPS proxy and time limits.

use std::cell::OnceCell;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use actix_rt::net::TcpStream;
use actix_service::Service;
use actix_tls::connect::{ConnectError, ConnectInfo, Connection, Connector as TcpConnector};
use awc::error::{ConnectError as ConnectorError, SendRequestError};
use awc::http::header::HeaderValue;
use awc::http::uri::InvalidUri;
use awc::http::{StatusCode, Uri, Version};
use awc::{Client, Connector};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use openssl::ssl::{SslConnector, SslFiletype, SslMethod};
use openssl::x509::store::X509Lookup;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::service::environment::Environment;
use actors::errors::ErrorOf;

/// Limit for a proxy's response to CONNECT, in bytes: it is read into memory.
const LONGEST_PROXY_RESPONSE: usize = 8 << 10;

/// A plain and a TLS client with the same settings, each made at its first use.
#[derive(Default)]
pub struct HttpClients {
    /// Time limit of one request, including the time to connect.
    pub patience: Duration,
    /// A PEM file of certificate authorities to trust in addition to the machine's.
    pub ca_file: Option<PathBuf>,
    /// The proxy for HTTPS; plain HTTP connects directly.
    pub proxy: Option<Rc<Proxy>>,
    plain: OnceCell<Client>,
    /// Made lazily because reading the machine's certificate authorities is slow.
    secure: OnceCell<Client>,
}

impl HttpClients {
    /// Returns clients that connect directly and trust the machine's certificate authorities.
    pub fn new(patience: Duration) -> Self {
        Self { patience, ..Self::default() }
    }

    /// Returns clients with the same settings that share no connections with `self`.
    #[must_use]
    pub fn with_new_connections(&self) -> Self {
        let Self { patience, ca_file, proxy, .. } = self;
        Self { ca_file: ca_file.clone(), proxy: proxy.clone(), ..Self::new(*patience) }
    }

    /// Returns the client for `url`, an http: or https: URL. Fails if the certificate authorities can't be
    /// read.
    pub fn for_url(&self, url: &Uri) -> Result<&Client, HttpError> {
        if url.scheme_str() != Some("https") {
            return Ok(self.plain.get_or_init(|| self.client(None)));
        }
        if let Some(client) = self.secure.get() {
            return Ok(client);
        }
        let tls = tls_connector(self.ca_file.as_deref()).map_err(HttpError::Tls)?;
        Ok(self.secure.get_or_init(|| self.client(Some(tls))))
    }

    /// Makes a client. HTTP/2 stays off because awc's implementation of it has a known weakness.
    fn client(&self, tls: Option<SslConnector>) -> Client {
        let dialer = Dialer { proxy: self.proxy.clone().filter(|_| tls.is_some()) };
        let connector = Connector::new().connector(dialer);
        let connector = connector.timeout(self.patience).handshake_timeout(self.patience);
        let connector = match tls {
            // The TLS connector offers no ALPN protocol, so servers choose HTTP/1.1.
            Some(tls) => connector.openssl(tls),
            None => connector.max_http_version(Version::HTTP_11),
        };
        Client::builder().connector(connector).timeout(self.patience).disable_redirects().finish()
    }
}

/// Why a request could not be made, or has no usable response. No text contains the URL, which may be
/// pre-signed.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The URL can't be parsed.
    #[error("the URL is invalid")]
    Url(#[source] InvalidUri),
    /// The URL's scheme is neither http nor https, or it has no host.
    #[error("the URL must begin with http: or https: and name a host")]
    Scheme,
    /// The certificate authorities can't be read.
    #[error("TLS setup failed")]
    Tls(#[source] io::Error),
    /// The bearer token can't be sent.
    #[error("the token contains characters that are invalid in a header")]
    Token,
    /// No response came in time.
    #[error("there was no answer in time")]
    TimedOut,
    /// The connection was closed before the response.
    #[error("the connection was closed before an answer came")]
    Closed,
    /// The connection could not be established.
    #[error("the server can't be reached: {0}")]
    Unreachable(
        /// The cause, as text: the library's errors can't be sent between threads.
        String,
    ),
    /// Anything else that the HTTP library reports; as text for the same reason.
    #[error("{0}")]
    Other(String),
    /// The server refused the request.
    #[error("the server answered {status}{}{text}", if text.is_empty() { "" } else { ": " })]
    Status {
        /// The response's status.
        status: StatusCode,
        /// The beginning of the response's body, where that may be shown.
        text: String,
    },
    /// The response is not from the server that was asked.
    #[error(
        "the response is neither empty nor JSON; it may come from a proxy or a login page in between"
    )]
    Foreign,
}

impl HttpError {
    /// Creates the error of a response with an unexpected status.
    pub fn from_status(status: StatusCode) -> Self {
        Self::Status { status, text: String::new() }
    }
}

impl From<SendRequestError> for HttpError {
    fn from(error: SendRequestError) -> Self {
        match error {
            SendRequestError::Timeout | SendRequestError::Connect(ConnectorError::Timeout) => {
                Self::TimedOut
            }
            SendRequestError::Connect(ConnectorError::Disconnected)
            | SendRequestError::Response(_)
            | SendRequestError::Send(_) => Self::Closed,
            SendRequestError::Connect(error) => Self::Unreachable(error.to_string()),
            error => Self::Other(error.to_string()),
        }
    }
}

/// Parses an http: or https: URL.
pub fn parse_url(text: &str) -> Result<Uri, HttpError> {
    let url: Uri = text.parse().map_err(HttpError::Url)?;
    let is_web = matches!(url.scheme_str(), Some("http" | "https")) && url.host().is_some();
    if is_web { Ok(url) } else { Err(HttpError::Scheme) }
}

/// Returns the value of an `Authorization` header: `scheme`, a space and `token`.
pub fn authorization(scheme: &str, token: &str) -> Result<HeaderValue, HttpError> {
    HeaderValue::try_from(format!("{scheme} {token}")).map_err(|_| HttpError::Token)
}

/// Returns a connector that trusts the machine's certificate authorities and those in `ca_file`.
pub fn tls_connector(ca_file: Option<&Path>) -> io::Result<SslConnector> {
    let mut tls = SslConnector::builder(SslMethod::tls_client())?;
    let authorities = openssl_probe::probe();
    if let Some(bundle) = authorities.cert_file {
        tls.set_ca_file(bundle)?;
    }
    let lookup = tls.cert_store_mut().add_lookup(X509Lookup::hash_dir())?;
    for directory in authorities.cert_dir.iter().filter_map(|path| path.to_str()) {
        lookup.add_dir(directory, SslFiletype::PEM)?;
    }
    if let Some(ca_file) = ca_file {
        tls.set_ca_file(ca_file)?;
    }
    Ok(tls.build())
}

/// A proxy for HTTPS, and the hosts that are connected to directly.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    host: String,
    port: u16,
    authorization: Option<String>,
    direct: Vec<String>,
}

/// Omits the login.
impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

impl Proxy {
    /// Reads `HTTPS_PROXY` and `NO_PROXY`, or their lower-case forms. Errors do not contain the values: a
    /// proxy's URL may hold a password.
    pub fn from_env(environment: &Environment) -> Result<Option<Self>, ErrorOf> {
        let variable =
            |name: &str| environment.text(name).or_else(|| environment.text(&name.to_lowercase()));
        let direct = variable("NO_PROXY").unwrap_or_default();
        let Some(proxy) = variable("HTTPS_PROXY") else {
            return Ok(None);
        };
        Self::new(&proxy, &direct).map(Some).map_err(|why| ErrorOf::new("HTTPS_PROXY", why))
    }

    fn new(url: &str, direct: &str) -> Result<Self, &'static str> {
        let with_scheme =
            if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        // An unescaped `#`, `/` or `?` in the login ends the authority: the URL parser would take the login
        // for the host.
        let after_scheme = with_scheme.split_once("://").map_or("", |(_, rest)| rest);
        if let Some((before, after)) = after_scheme.split_once(['#', '/', '?'])
            && !before.contains('@')
            && after.contains('@')
        {
            return Err("in the login, `#`, `/` and `?` must be written as %23, %2F and %3F");
        }
        let url: Uri = with_scheme.parse().map_err(|_| "not a valid URL")?;
        if url.scheme_str() != Some("http") {
            return Err("only http: proxies are supported");
        }
        let authority = url.authority().ok_or("the URL names no host")?;
        let login = authority.as_str().rsplit_once('@').map(|(login, _)| login);
        Ok(Self {
            host: authority.host().trim_matches(['[', ']']).to_owned(),
            port: authority.port_u16().unwrap_or(80),
            authorization: login
                .map(|login| format!("Basic {}", BASE64_STANDARD.encode(percent_decoded(login)))),
            direct: direct.split(',').map(|host| host.trim().to_lowercase()).collect(),
        })
    }

    /// Returns whether `host` is connected to directly. Entries of `NO_PROXY` are names (which include their
    /// subdomains), addresses and CIDR ranges; names and addresses may be limited to one port.
    fn is_bypassed(&self, host: &str, port: u16) -> bool {
        let host = host.trim_matches(['[', ']']).to_lowercase();
        self.direct.iter().filter(|name| !name.is_empty()).any(|name| {
            if let Some((network, bits)) = name.split_once('/') {
                return is_in_network(&host, network, bits);
            }
            let (name, only_port) = match name.rsplit_once(':') {
                // The last group of a bare IPv6 address is not a port.
                Some((name, port)) if !name.contains(':') || name.ends_with(']') => {
                    (name, Some(port))
                }
                _ => (name.as_str(), None),
            };
            let name = name.trim_matches(['[', ']']);
            let name = name.trim_start_matches("*.").trim_start_matches('.');
            let below = host.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'));
            only_port.is_none_or(|only| only.parse() == Ok(port))
                && (name == "*" || host == name || below)
        })
    }

    /// Opens a connection to `host` through the proxy with CONNECT.
    async fn tunnel(&self, host: &str, port: u16) -> io::Result<TcpStream> {
        let failed = |why: String| io::Error::other(format!("the proxy {self:?} {why}"));
        let mut stream = TcpStream::connect((self.host.as_str(), self.port))
            .await
            .map_err(|error| failed(format!("can't be reached: {error}")))?;
        stream.set_nodelay(true)?;
        let authorization = self.authorization.as_ref();
        let authorization =
            authorization.map_or_else(String::new, |it| format!("Proxy-Authorization: {it}\r\n"));
        let head =
            format!("CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n{authorization}\r\n");
        stream.write_all(head.as_bytes()).await?;
        let mut response = Vec::new();
        while !response.ends_with(b"\r\n\r\n") {
            // One byte at a time: whatever follows the headers belongs to the TLS connection.
            let byte = stream.read_u8().await?;
            response.push(byte);
            if response.len() > LONGEST_PROXY_RESPONSE {
                return Err(failed("sent too long a response to CONNECT".into()));
            }
        }
        let response = String::from_utf8_lossy(&response);
        let status = response.split_whitespace().nth(1).unwrap_or_default();
        if response.starts_with("HTTP/1.") && status.starts_with('2') {
            Ok(stream)
        } else {
            Err(failed(format!("answered {}", response.lines().next().unwrap_or_default())))
        }
    }
}

fn is_in_network(host: &str, network: &str, bits: &str) -> bool {
    let (Ok(host), Ok(network), Ok(bits)) = (host.parse(), network.parse(), bits.parse::<u32>())
    else {
        return false;
    };
    let (host, network, size) = match (host, network) {
        (IpAddr::V4(host), IpAddr::V4(network)) => {
            (u128::from(host.to_bits()), u128::from(network.to_bits()), 32)
        }
        (IpAddr::V6(host), IpAddr::V6(network)) => (host.to_bits(), network.to_bits(), 128),
        _ => return false,
    };
    // With a prefix of 0 bits the shift is as wide as the type: every address matches.
    bits <= size && (host ^ network).checked_shr(size - bits).unwrap_or(0) == 0
}

/// Decodes `%XX` sequences, and leaves invalid ones as they are.
fn percent_decoded(text: &str) -> Vec<u8> {
    let hex = |digits: &str| u8::from_str_radix(digits, 16).ok();
    let mut parts = text.split('%');
    let mut decoded = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        match part.get(..2).and_then(hex) {
            Some(byte) => {
                decoded.push(byte);
                decoded.extend_from_slice(&part.as_bytes()[2..]);
            }
            None => {
                decoded.push(b'%');
                decoded.extend_from_slice(part.as_bytes());
            }
        }
    }
    decoded
}

/// Opens TCP connections, directly or through the proxy.
#[derive(Clone)]
struct Dialer {
    proxy: Option<Rc<Proxy>>,
}

impl Service<ConnectInfo<Uri>> for Dialer {
    type Response = Connection<Uri, TcpStream>;
    type Error = ConnectError;
    type Future = LocalBoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&self, info: ConnectInfo<Uri>) -> Self::Future {
        let proxy =
            self.proxy.clone().filter(|proxy| !proxy.is_bypassed(info.hostname(), info.port()));
        let Some(proxy) = proxy else {
            return TcpConnector::default().service().call(info).boxed_local();
        };
        async move {
            let stream = proxy.tunnel(info.hostname(), info.port()).await;
            let stream = stream.map_err(ConnectError::Io)?;
            Ok(Connection::new(info.request().clone(), stream))
        }
        .boxed_local()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_url_is_parsed_with_its_login() {
        let proxy = Proxy::new("http://me:secret@proxy.example:3128/", "").unwrap();
        assert_eq!((proxy.host.as_str(), proxy.port), ("proxy.example", 3128));
        assert_eq!(proxy.authorization.as_deref(), Some("Basic bWU6c2VjcmV0"));
        assert_eq!(format!("{proxy:?}"), "proxy.example:3128");
        assert_eq!(Proxy::new("proxy", "").unwrap().port, 80);
        assert!(Proxy::new("https://proxy", "").is_err());
        assert!(Proxy::new("http://", "").is_err());
        for raw in
            ["http://me:a#b@proxy", "me:a/b@proxy", "http://me:80/x?@proxy", "me:a?b@proxy:1"]
        {
            assert!(Proxy::new(raw, "").unwrap_err().contains("%23"), "{raw}");
        }
        assert_eq!(Proxy::new("http://me:a%23b@proxy/x@y", "").unwrap().host, "proxy");
    }

    #[test]
    fn no_proxy_names_bypass_the_proxy() {
        let proxy = Proxy::new("proxy", "localhost, .example.com,10.0.0.1,*.corp").unwrap();
        for host in ["localhost", "a.example.com", "example.com", "10.0.0.1", "x.corp", "X.Corp"] {
            assert!(proxy.is_bypassed(host, 443), "{host}");
        }
        for host in ["example.org", "notexample.com", "10.0.0.10", "localhost.org"] {
            assert!(!proxy.is_bypassed(host, 443), "{host}");
        }
        assert!(Proxy::new("proxy", "*").unwrap().is_bypassed("anything", 443));
    }

    #[test]
    fn no_proxy_takes_networks_and_ports() {
        let proxy = Proxy::new("proxy", "10.0.0.0/8,fd00::/16,a.example:8443,[::1]:1,::2").unwrap();
        let bypassed = [
            ("10.1.2.3", 443),
            ("fd00:1::1", 1),
            ("[fd00::1]", 1),
            ("a.example", 8443),
            ("x.a.example", 8443),
            ("::1", 1),
            ("[::2]", 443),
        ];
        for (host, port) in bypassed {
            assert!(proxy.is_bypassed(host, port), "{host}:{port}");
        }
        for (host, port) in
            [("11.0.0.1", 443), ("a.example", 443), ("::1", 443), ("fd01::1", 1), ("10.example", 1)]
        {
            assert!(!proxy.is_bypassed(host, port), "{host}:{port}");
        }
        assert!(Proxy::new("proxy", "0.0.0.0/0").unwrap().is_bypassed("1.2.3.4", 443));
        assert!(!Proxy::new("proxy", "0.0.0.0/33").unwrap().is_bypassed("1.2.3.4", 443));
    }

    #[test]
    fn percent_sequences_are_decoded() {
        for (text, decoded) in [
            ("me:p%40%3a%25", "me:p@:%"),
            ("%zz%4", "%zz%4"),
            ("%C3%BC", "ü"),
            ("%é", "%é"),
            ("", ""),
        ] {
            assert_eq!(percent_decoded(text), decoded.as_bytes(), "{text}");
        }
    }
}
