//! A running `agent serve`, a client for it, and a server for its callbacks.

use std::io::{self, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::ops::{Deref, DerefMut};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::time::{Duration, SystemTime};

use actors::log::event::LogEvent;
use openssl::hash::MessageDigest;
use openssl::pkey::PKey;
use openssl::ssl::{Ssl, SslContext, SslMethod, SslStream};
use serde_json::{Value, json};
use tokio::net::TcpSocket;

use super::daemon::Daemon;
pub use super::http::Answer;
use super::http::Request;
use super::{Finished, PATIENCE, World, wait_for_end};

/// What the tokens of all hosted agents here are signed with.
pub const SECRET: &str = "a secret that only the tests know";

/// An `agent serve` on a free port of this machine.
pub struct Hosted {
    daemon: Daemon,
    address: SocketAddr,
}

impl Hosted {
    pub fn start(world: &World) -> Self {
        Self::start_with(world, |_| {})
    }

    /// `adapt` adds arguments and variables; a flag wins over what [`command`] has set.
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

    /// A TLS connection; the certificate is not verified.
    pub fn connect(&self) -> SslStream<TcpStream> {
        self.try_connect().unwrap()
    }

    fn try_connect(&self) -> io::Result<SslStream<TcpStream>> {
        Self::shake_hands(TcpStream::connect(self.address)?)
    }

    /// As above, from this address of this machine.
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

    /// A request on a connection of its own, without a token unless it is among the headers.
    pub fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Answer {
        self.try_request(method, path, headers, body)
            .unwrap_or_else(|error| panic!("{method} {path} has no answer: {error}"))
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
        // Who refuses a body need not read it: the answer counts.
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

    /// The log from its beginning, for a reader like any other.
    pub fn log_events(&self, id: &str) -> Vec<LogEvent> {
        events(&self.get(&format!("/jobs/{id}/log")))
    }

    /// The log from its beginning, for the reader that makes the job's log safe.
    pub fn archive(&self, id: &str) -> Vec<LogEvent> {
        events(&self.archive_from(id, 0))
    }

    pub fn archive_from(&self, id: &str, line: usize) -> Answer {
        let headers = [("Authorization", good_authorization()), ("X-Client-Name", "archivator")];
        self.request("GET", &format!("/jobs/{id}/log?start_from={line}"), &headers, b"")
    }

    /// Waits until a line of the log holds `text`.
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

    /// Waits until `/status` has this state.
    pub fn wait_for_state(&self, state: &str) {
        wait_until(
            || self.get("/status").of_status(200).json()["state"] == state,
            || format!("{state} is not reached: {}", self.own_log()),
        );
    }

    /// A job from its request to its teardown.
    pub fn run_to_end(&self, job: &Value) -> Finished {
        let id = job["job_id"].as_str().unwrap();
        let answer = self.post_job(job);
        assert_eq!((answer.status, answer.message()), (200, "ok".into()));
        self.finish(id)
    }

    /// What is left of a job, to its teardown.
    pub fn finish(&self, id: &str) -> Finished {
        self.wait_for_log(id, r#""event":"job_finished""#);
        let events = self.archive(id);
        self.wait_for_state("waiting-for-job");
        Finished { exit_code: None, events, stderr: String::new() }
    }
}

impl Deref for Hosted {
    type Target = Daemon;

    fn deref(&self) -> &Daemon {
        &self.daemon
    }
}

impl DerefMut for Hosted {
    fn deref_mut(&mut self) -> &mut Daemon {
        &mut self.daemon
    }
}

/// `agent serve` with a secret, a free port and private places for all that it writes.
pub fn command(world: &World) -> Command {
    let directory = world.directory.path();
    let working = directory.join("working");
    std::fs::create_dir_all(&working).unwrap();
    let mut command = world.agent();
    command.arg("serve").current_dir(working);
    command.env("SEMAPHORE_AGENT_AUTH_TOKEN_SECRET", SECRET);
    command.env("SEMAPHORE_AGENT_HOST", "127.0.0.1").env("SEMAPHORE_AGENT_PORT", "0");
    command.env("SEMAPHORE_AGENT_SSH_JUMP_POINT_PATH", directory.join("ssh_jump_point"));
    command.env("SEMAPHORE_AGENT_LOG_FILE_PATH", directory.join("agent_log"));
    command
}

/// What an agent says that is set up in a wrong way and does not start.
pub fn refusal(world: &World, adapt: impl FnOnce(&mut Command)) -> String {
    let mut agent = command(world);
    adapt(&mut agent);
    let output = wait_for_end(agent.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(output.stdout.is_empty(), "{message}");
    message
}

/// Asks again and again, for a bounded time.
pub fn wait_until(mut done: impl FnMut() -> bool, what: impl FnOnce() -> String) {
    let deadline = SystemTime::now() + PATIENCE;
    while !done() {
        assert!(SystemTime::now() <= deadline, "{}", what());
        crate::pause();
    }
}

/// The events of an answer that is a log.
pub fn events(answer: &Answer) -> Vec<LogEvent> {
    let lines = answer.of_status(200).body.split(|byte| *byte == b'\n');
    lines.filter(|line| !line.is_empty()).map(|line| LogEvent::decode(line).unwrap()).collect()
}

/// A job of these commands and nothing else.
pub fn job(id: &str, commands: &[&str]) -> Value {
    let mut job: Value = serde_json::from_str(&super::job_of(commands)).unwrap();
    job["job_id"] = id.into();
    job
}

/// A command that says so when it runs, and does until its home has a file `go`.
pub const RUN_UNTIL_GO: &str = "echo running; until [[ -e ~/go ]]; do sleep 0.01; done";

/// The same without an end.
pub const RUN_FOR_EVER: &str = "echo running; sleep 1000";

/// What the log of such a command holds as soon as it runs.
pub const RUNNING: &str = r#""output":"running\n""#;

/// A request as it goes over the wire.
pub fn encode_request(method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut bytes = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n").into_bytes();
    for (name, value) in headers {
        write!(bytes, "{name}: {value}\r\n").unwrap();
    }
    let chunked = headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("transfer-encoding"));
    if !chunked && (method == "POST" || !body.is_empty()) {
        write!(bytes, "Content-Length: {}\r\n", body.len()).unwrap();
    }
    bytes.extend_from_slice(b"\r\n");
    bytes.extend_from_slice(body);
    bytes
}

/// The header of a client that has the secret; its token claims nothing.
pub fn good_authorization() -> &'static str {
    static GOOD: OnceLock<String> = OnceLock::new();
    GOOD.get_or_init(|| format!("Bearer {}", token("HS256", SECRET, &json!({}))))
}

/// A JSON web token. `none` has an empty signature, and what is not HMAC is signed as HS256.
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
    let encoded = super::base64(bytes).replace('+', "-").replace('/', "_");
    encoded.trim_end_matches('=').to_owned()
}

/// A server that the agent tells how its jobs go.
pub struct CallbackServer {
    address: SocketAddr,
    count: Arc<AtomicUsize>,
    received: Mutex<mpsc::Receiver<Callback>>,
}

/// What the agent told.
#[derive(Debug)]
pub struct Callback {
    pub path: String,
    pub headers: Vec<(String, String)>,
    pub body: Value,
}

impl Callback {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(its, _)| its == name).map(|(_, value)| value.as_str())
    }
}

impl CallbackServer {
    pub fn start() -> Self {
        Self::answering(|_| 200)
    }

    /// `status` decides on each request, counted from 0, after [`Self::next`] has seen it.
    pub fn answering(status: impl Fn(usize) -> u16 + Send + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let count = Arc::new(AtomicUsize::new(0));
        let (sender, received) = mpsc::channel();
        let counter = Arc::clone(&count);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                let mut reader = io::BufReader::new(stream);
                let Ok(request) = Request::read_from(&mut reader) else { continue };
                let body = serde_json::from_slice(&request.body).unwrap_or(Value::Null);
                let Request { method, path, headers, .. } = request;
                let number = counter.fetch_add(1, Ordering::SeqCst);
                let path = if method == "POST" { path } else { format!("{method} {path}") };
                if sender.send(Callback { path, headers, body }).is_err() {
                    return;
                }
                let answer = format!(
                    "HTTP/1.1 {} Answer\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
                    status(number)
                );
                let _ = reader.get_mut().write_all(answer.as_bytes());
            }
        });
        Self { address, count, received: Mutex::new(received) }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Waits for the next request.
    pub fn next(&self) -> Callback {
        self.received.lock().unwrap().recv_timeout(PATIENCE).unwrap()
    }

    /// Nothing comes for a while.
    pub fn assert_silent(&self) {
        let received = self.received.lock().unwrap().recv_timeout(Duration::from_millis(300));
        assert!(received.is_err(), "{received:?} came too early");
    }

    /// How many requests there were.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }
}
