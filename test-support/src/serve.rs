//! A running `agent serve`, and a client for it.

use std::io::{self, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::ops::{Deref, DerefMut};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use actors::log::event::LogEvent;
use openssl::hash::MessageDigest;
use openssl::pkey::PKey;
use openssl::ssl::{Ssl, SslContext, SslMethod, SslStream};
use serde_json::{Value, json};
use tokio::net::TcpSocket;

use crate::daemon::Daemon;
use crate::http::{Answer, encode_request};
use crate::waiting::PATIENCE;
use crate::{Finished, World, base64, finished, wait_for_end, wait_until};

/// The secret with which the agents verify tokens.
pub const SECRET: &str = "a secret that only the tests know";

/// An `agent serve` on a free port of this machine.
pub struct ServeAgent {
    daemon: Daemon,
    address: SocketAddr,
}

impl ServeAgent {
    pub fn start(world: &World) -> Self {
        Self::start_with(world, |_| {})
    }

    /// Starts an agent after `adapt` has changed the command. Flags override the variables set by
    /// [`command`].
    pub fn start_with(world: &World, adapt: impl FnOnce(&mut Command)) -> Self {
        let mut command = command(world);
        adapt(&mut command);
        let daemon = Daemon::start(world, command);
        let opened = daemon.wait_for_own_log(" address=");
        let address = opened.split_once(" address=").unwrap().1;
        let address = address.split_whitespace().next().unwrap().parse().unwrap();
        Self { daemon, address }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Opens a TLS connection, without verifying the certificate.
    pub fn connect(&self) -> SslStream<TcpStream> {
        self.try_connect().unwrap()
    }

    fn try_connect(&self) -> io::Result<SslStream<TcpStream>> {
        Self::shake_hands(TcpStream::connect(self.address)?)
    }

    /// Opens a TLS connection from this local address.
    pub fn connect_from(&self, address: Ipv4Addr) -> io::Result<SslStream<TcpStream>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let socket = runtime.block_on(async {
            let socket = TcpSocket::new_v4()?;
            socket.bind((address, 0).into())?;
            socket.connect(self.address).await?.into_std()
        })?;
        socket.set_nonblocking(false)?;
        Self::shake_hands(socket)
    }

    fn shake_hands(stream: TcpStream) -> io::Result<SslStream<TcpStream>> {
        static CONTEXT: OnceLock<SslContext> = OnceLock::new();
        let context =
            CONTEXT.get_or_init(|| SslContext::builder(SslMethod::tls_client()).unwrap().build());
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ssl::new(context)?.connect(stream).map_err(io::Error::other)
    }

    /// Sends a request on a connection of its own, without a token unless the headers contain one.
    pub fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Answer {
        self.try_request(method, path, headers, body)
            .unwrap_or_else(|error| panic!("{method} {path} has no response: {error}"))
    }

    pub fn try_request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> io::Result<Answer> {
        let mut stream = self.try_connect()?;
        let mut headers = headers.to_vec();
        headers.push(("Connection", "close"));
        // The agent may refuse a body without reading it, so only the response counts.
        let _ = stream.write_all(&encode_request(method, path, &headers, body));
        Answer::read_from(&mut io::BufReader::new(stream), method)
    }

    pub fn get(&self, path: &str) -> Answer {
        self.request("GET", path, &[("Authorization", good_authorization())], b"")
    }

    pub fn post(&self, path: &str, body: &[u8]) -> Answer {
        let headers =
            [("Authorization", good_authorization()), ("Content-Type", "application/json")];
        self.request("POST", path, &headers, body)
    }

    pub fn post_job(&self, job: &Value) -> Answer {
        self.post("/jobs", job.to_string().as_bytes())
    }

    /// Reads the log from its beginning, as an ordinary client.
    pub fn log_events(&self, id: &str) -> Vec<LogEvent> {
        events(&self.get(&format!("/jobs/{id}/log")))
    }

    /// Reads the log from its beginning, as the archivator.
    pub fn archive(&self, id: &str) -> Vec<LogEvent> {
        events(&self.archive_from(id, 0))
    }

    pub fn archive_from(&self, id: &str, line: usize) -> Answer {
        let headers = [("Authorization", good_authorization()), ("X-Client-Name", "archivator")];
        self.request("GET", &format!("/jobs/{id}/log?start_from={line}"), &headers, b"")
    }

    /// Waits until a line of the log contains `text`.
    pub fn wait_for_log(&self, id: &str, text: &str) {
        let mut line = 0;
        wait_until(
            || {
                let new =
                    self.get(&format!("/jobs/{id}/log?start_from={line}")).of_status(200).text();
                line += new.lines().count();
                new.lines().any(|line| line.contains(text))
            },
            || {
                let log = self.get(&format!("/jobs/{id}/log")).text();
                format!("{text:?} is not in the log of {id}: {log}")
            },
        );
    }

    /// Waits until `/status` returns this state.
    pub fn wait_for_state(&self, state: &str) {
        wait_until(
            || self.get("/status").of_status(200).json()["state"] == state,
            || format!("{state} is not reached: {}", self.own_log()),
        );
    }

    /// Runs a job from its request to its teardown.
    pub fn run_to_end(&self, job: &Value) -> Finished {
        let id = job["job_id"].as_str().unwrap();
        let answer = self.post_job(job);
        assert_eq!((answer.status, answer.message()), (200, "ok".into()));
        self.finish(id)
    }

    /// Waits for the end of a job, archives its log, and waits for the teardown.
    pub fn finish(&self, id: &str) -> Finished {
        self.wait_for_log(id, r#""event":"job_finished""#);
        let events = self.archive(id);
        self.wait_for_state("waiting-for-job");
        Finished { exit_code: None, events, stderr: String::new() }
    }
}

impl Deref for ServeAgent {
    type Target = Daemon;

    fn deref(&self) -> &Daemon {
        &self.daemon
    }
}

impl DerefMut for ServeAgent {
    fn deref_mut(&mut self) -> &mut Daemon {
        &mut self.daemon
    }
}

/// Returns a command for `agent serve` with a secret and a free port, which writes only below the world's
/// directory.
pub fn command(world: &World) -> Command {
    let mut command = world.daemon("serve");
    command.env("SEMAPHORE_AGENT_AUTH_TOKEN_SECRET", SECRET);
    command.env("SEMAPHORE_AGENT_HOST", "127.0.0.1").env("SEMAPHORE_AGENT_PORT", "0");
    command
}

/// Runs an agent that must refuse its configuration, and returns its error message.
pub fn refusal(world: &World, adapt: impl FnOnce(&mut Command)) -> String {
    let mut agent = command(world);
    adapt(&mut agent);
    let output = wait_for_end(agent.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(output.stdout.is_empty(), "{message}");
    message
}

/// Decodes the events of a response that is a log.
pub fn events(answer: &Answer) -> Vec<LogEvent> {
    finished::events(&answer.of_status(200).body)
}

/// Returns an `Authorization` header with a valid token that has no claims.
pub fn good_authorization() -> &'static str {
    static GOOD: OnceLock<String> = OnceLock::new();
    GOOD.get_or_init(|| format!("Bearer {}", token("HS256", SECRET, &json!({}))))
}

/// Makes a JSON web token. `none` gets an empty signature; unknown algorithms are signed as HS256.
pub fn token(algorithm: &str, secret: &str, payload: &Value) -> String {
    token_with_header(&json!({ "alg": algorithm, "typ": "JWT" }), secret, payload)
}

pub fn token_with_header(header: &Value, secret: &str, payload: &Value) -> String {
    let signed = [header, payload].map(|part| base64_url(part.to_string().as_bytes()));
    let signed = signed.join(".");
    let digest = match header["alg"].as_str().unwrap_or_default() {
        "none" => return format!("{signed}."),
        "HS384" => MessageDigest::sha384(),
        "HS512" => MessageDigest::sha512(),
        _ => MessageDigest::sha256(),
    };
    let key = PKey::hmac(secret.as_bytes()).unwrap();
    let mut hmac = openssl::sign::Signer::new(digest, &key).unwrap();
    let signature = hmac.sign_oneshot_to_vec(signed.as_bytes()).unwrap();
    format!("{signed}.{}", base64_url(&signature))
}

fn base64_url(bytes: &[u8]) -> String {
    let encoded = base64(bytes).replace('+', "-").replace('/', "_");
    encoded.trim_end_matches('=').to_owned()
}
