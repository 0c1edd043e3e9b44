//! A small control plane on the loopback interface, which hands out jobs, collects their logs, and injects
//! faults on demand.

mod answers;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use actix_web::dev::ServerHandle;
use actix_web::http::header;
use actix_web::web::{self, Data};
use actix_web::{App, HttpRequest, HttpServer};
use serde_json::{Map, Value};

use answers::{answer, remember_connection};

/// Base path of the agents' API.
const API: &str = "/api/v1/self_hosted_agents";

/// Base path of the log API.
const LOGS: &str = "/api/v1/logs/";

/// Placeholder for a secret in a request that was handed out before.
pub const SANITIZED: &str = "{SANITIZED}";

/// An injected fault of one request. "Ignored" requests do not change the control plane's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The request is ignored and gets this status.
    Status(u16),
    /// The request is handled after this delay.
    Delay(Duration),
    /// The request is ignored, and the connection is closed without a response.
    Drop,
    /// The request is handled, but only half of the response is sent.
    Cut,
    /// The request is ignored and gets status 200 with malformed JSON.
    Nonsense,
    /// The request is ignored and gets this status, with the reason as plain text.
    Refuse(u16, &'static str),
    /// The request is ignored and gets status 200 with an HTML page, as from a captive portal.
    Page,
    /// The request is handled, but the connection is closed without a response.
    Lost,
}

/// Chooses the fault of a request, given the request and its number, from 0 on.
pub type Faults = Box<dyn FnMut(&ReceivedRequest, usize) -> Option<Fault> + Send>;

/// A received request.
#[derive(Clone, Debug, Default)]
pub struct ReceivedRequest {
    /// The method, in upper case.
    pub method: String,
    /// The path, without the query.
    pub path: String,
    /// The headers, by their names in lower case.
    pub headers: BTreeMap<String, String>,
    /// The JSON body; `Null` for logs and malformed JSON.
    pub body: Value,
    /// The status of the response; `None` until there is one.
    pub status: Option<u16>,
    /// The agent's address and port, which differ for each connection.
    pub peer: Option<SocketAddr>,
}

impl ReceivedRequest {
    fn new(request: &HttpRequest, body: &[u8]) -> Self {
        let text = |value: &header::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into();
        let headers = request.headers().iter();
        let path = request.path().to_owned();
        // A log of a single line would parse as JSON, and may be large.
        let is_log = path.starts_with(LOGS);
        Self {
            method: request.method().to_string(),
            headers: headers.map(|(name, value)| (name.to_string(), text(value))).collect(),
            body: if is_log { None } else { serde_json::from_slice(body).ok() }.unwrap_or_default(),
            path,
            status: None,
            peer: request.peer_addr(),
        }
    }

    /// Returns whether the request uploads a part of a log.
    pub fn is_log(&self) -> bool {
        self.path.starts_with(LOGS)
    }

    /// Returns whether the request has this method and this path below the agents' API.
    pub fn is(&self, method: &str, path: &str) -> bool {
        self.method == method && self.path.strip_prefix(API) == Some(path)
    }
}

/// Receives messages for people about the control plane's events.
pub type Events = Box<dyn Fn(&str) + Send + Sync>;

/// The control plane's settings, which apply to all agents.
pub struct Settings {
    /// The agents' report interval, in milliseconds.
    pub next_sync_after: u64,
    /// Maximum size of each job's log, in bytes.
    pub log_quota: usize,
    /// Maximum number of lines in one request.
    pub most_lines: usize,
    /// Whether to ask for compressed logs.
    pub compression: bool,
    /// The registration token.
    pub token: String,
    /// Whether to overwrite a job's secrets after the job was fetched once.
    pub once: bool,
    /// Maximum memory of each job's log, in bytes as estimated by the log store.
    pub memory: usize,
}

impl Default for Settings {
    fn default() -> Self {
        let (log_quota, most_lines) = (usize::MAX, 2000);
        Self {
            next_sync_after: 1000,
            log_quota,
            most_lines,
            compression: false,
            token: "dev".into(),
            once: false,
            memory: usize::MAX,
        }
    }
}

/// A job and its progress.
#[derive(Clone, Debug, Default)]
pub struct HubJob {
    /// The request as agents fetch it.
    pub request: Value,
    /// The lines of the log, each with its newline.
    pub log: Vec<Vec<u8>>,
    /// The result as reported by the agent.
    pub result: Option<String>,
    /// How many times the job was fetched.
    pub fetched: usize,
    stop: bool,
    /// The log store has lost a part of the log without noticing.
    has_holes: bool,
}

impl HubJob {
    /// Returns the whole log.
    pub fn log_bytes(&self) -> Vec<u8> {
        self.log.concat()
    }

    /// Returns the output of all steps.
    pub fn output(&self) -> String {
        let events = self.log.iter().filter_map(|line| serde_json::from_slice::<Value>(line).ok());
        events.filter_map(|event| event["output"].as_str().map(str::to_owned)).collect()
    }
}

#[derive(Clone, Debug)]
struct HubAgent {
    registration: Value,
    token: String,
    job: Option<String>,
}

/// The control plane's state.
#[derive(Default)]
pub struct Known {
    /// The jobs, by ID.
    pub jobs: BTreeMap<String, HubJob>,
    /// The bodies of registrations.
    pub registrations: Vec<Value>,
    /// The bodies of reports.
    pub reports: Vec<Value>,
    /// The time of the response to each report.
    pub answered: Vec<SystemTime>,
    /// How many agents have disconnected.
    pub disconnected: usize,
    /// All requests so far.
    pub requests: Vec<ReceivedRequest>,
    /// The sizes of uploaded log bodies before decompression, in bytes.
    pub log_bodies: Vec<usize>,
    queue: VecDeque<String>,
    agents: Vec<HubAgent>,
    answers: VecDeque<Value>,
    shutdown: Option<String>,
    tokens: usize,
}

impl Known {
    /// Returns the currently valid token for logs.
    fn log_token(&self) -> String {
        format!("log-token-{}", self.tokens)
    }
}

struct State {
    known: Mutex<Known>,
    changed: Condvar,
    settings: Mutex<Settings>,
    faults: Mutex<Option<Faults>>,
    events: Events,
    address: SocketAddr,
}

impl State {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settings(&self) -> MutexGuard<'_, Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fault(&self, received: &ReceivedRequest, number: usize) -> Option<Fault> {
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        faults.as_mut()?(received, number)
    }

    fn answered(&self, number: usize, status: u16) {
        self.known().requests[number].status = Some(status);
        self.changed.notify_all();
    }
}

/// A running control plane; it stops on drop.
pub struct ControlPlane {
    state: Arc<State>,
    server: Option<(ServerHandle, JoinHandle<()>)>,
}

impl ControlPlane {
    /// Starts a control plane on `address`; port 0 selects a free port.
    pub fn start(address: &str, settings: Settings, events: Events) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        let state = Arc::new(State {
            known: Mutex::default(),
            changed: Condvar::new(),
            settings: Mutex::new(settings),
            faults: Mutex::default(),
            events,
            address: listener.local_addr()?,
        });
        let mut control_plane = Self { state, server: None };
        control_plane.listen(listener)?;
        Ok(control_plane)
    }

    fn listen(&mut self, listener: TcpListener) -> io::Result<()> {
        let state = Data::from(Arc::clone(&self.state));
        let (sender, handle) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            actix_web::rt::System::new().block_on(async {
                let server = HttpServer::new(move || {
                    let limit = web::PayloadConfig::new(64 << 20);
                    App::new()
                        .app_data(state.clone())
                        .app_data(limit)
                        .default_service(web::to(answer))
                });
                let server = server.workers(2).disable_signals().shutdown_timeout(0);
                let server = server.on_connect(remember_connection).listen(listener);
                match server.map(HttpServer::run) {
                    Ok(server) => {
                        let _ = sender.send(Ok(server.handle()));
                        let _ = server.await;
                    }
                    Err(error) => {
                        let _ = sender.send(Err(error));
                    }
                }
            });
        });
        let handle = handle.recv().map_err(io::Error::other)??;
        self.server = Some((handle, thread));
        Ok(())
    }

    /// Stops the server, but keeps the state.
    pub fn pause(&mut self) {
        if let Some((handle, thread)) = self.server.take() {
            // The server stops on its own thread, for whose end this waits.
            let stopping = handle.stop(false);
            drop(stopping);
            let _ = thread.join();
        }
    }

    /// Starts the server again, on the same port.
    pub fn resume(&mut self) -> io::Result<()> {
        self.listen(TcpListener::bind(self.state.address)?)
    }

    /// Returns host and port.
    pub fn endpoint(&self) -> String {
        self.state.address.to_string()
    }

    /// Changes the settings.
    pub fn set(&self, change: impl FnOnce(&mut Settings)) {
        change(&mut self.state.settings());
    }

    /// Injects these faults from now on; `None` ends that.
    pub fn misbehave(&self, faults: Option<Faults>) {
        *self.state.faults.lock().unwrap_or_else(PoisonError::into_inner) = faults;
    }

    /// Queues a job for the next free agent. Returns the job's ID, adapted for use in a URL.
    pub fn queue(&self, mut job: Value) -> String {
        let mut known = self.state.known();
        let aliases = [
            ("id", "job_id"),
            ("file", "files"),
            ("epilogue_commands", "epilogue_always_commands"),
        ];
        if let Some(fields) = job.as_object_mut() {
            for (alias, field) in aliases {
                if let Some(value) = fields.remove(alias) {
                    fields.entry(field).or_insert(value);
                }
            }
        }
        let id = job["job_id"].as_str().unwrap_or("job").chars();
        let fit = |c: char| if c.is_ascii_alphanumeric() || "-_~".contains(c) { c } else { '-' };
        let mut id: String = id.map(fit).collect();
        if known.jobs.contains_key(&id) {
            id = format!("{id}-{}", known.jobs.len() + 1);
        }
        job["job_id"] = id.clone().into();
        known.queue.push_back(id.clone());
        known.jobs.insert(id.clone(), HubJob { request: job, ..HubJob::default() });
        id
    }

    /// Responds to the next reports with these actions, regardless of the state.
    pub fn answer_next(&self, answers: impl IntoIterator<Item = Value>) {
        self.state.known().answers.extend(answers);
    }

    /// Requests that a job be stopped.
    pub fn stop_job(&self, id: &str) {
        if let Some(job) = self.state.known().jobs.get_mut(id) {
            job.stop = true;
        }
    }

    /// Requests that all agents shut down when they have no job.
    pub fn shut_down(&self, reason: &str) {
        self.state.known().shutdown = Some(reason.to_owned());
    }

    /// Invalidates the log tokens that agents have.
    pub fn expire_log_tokens(&self) {
        self.state.known().tokens += 1;
    }

    /// Simulates a crash of the log store, which loses all acknowledged lines.
    pub fn lose_logs(&self) {
        for job in self.state.known().jobs.values_mut() {
            job.log.clear();
            job.has_holes = true;
        }
    }

    /// Calls `look` with the current state.
    pub fn look<T>(&self, look: impl FnOnce(&Known) -> T) -> T {
        look(&self.state.known())
    }

    /// Waits until `look` returns a value. Returns `None` after `patience`.
    pub fn wait_for<T>(
        &self,
        patience: Duration,
        mut look: impl FnMut(&Known) -> Option<T>,
    ) -> Option<T> {
        let mut found = None;
        let known = self.state.known();
        let _ = self.state.changed.wait_timeout_while(known, patience, |known| {
            found = look(known);
            found.is_none()
        });
        found
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        self.pause();
    }
}

/// Parses a job in YAML or JSON.
pub fn read_job(text: &str) -> Result<Value, String> {
    let job: Map<String, Value> = serde_yaml::from_str(text).map_err(|error| error.to_string())?;
    Ok(Value::Object(job))
}
