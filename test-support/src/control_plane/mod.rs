//! A small control plane on the loopback interface: it hands out jobs, collects their logs, and misbehaves
//! on demand.

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

/// Where everything but logs is.
const API: &str = "/api/v1/self_hosted_agents";

/// Where logs go.
const LOGS: &str = "/api/v1/logs/";

/// What stands for a secret in a request that was given out before.
pub const SANITIZED: &str = "{SANITIZED}";

/// What one request is answered with instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// This status, and nothing is done.
    Status(u16),
    /// What it is usually answered with, so much later.
    Delay(Duration),
    /// Nothing: the connection is closed, and nothing is done.
    Drop,
    /// Half of what it is usually answered with, after it was done.
    Cut,
    /// Something that is no JSON, and nothing is done.
    Nonsense,
    /// This status and the reason in words, and nothing is done.
    Refuse(u16, &'static str),
    /// Somebody else's page and a status of success, as of a network that wants a login; nothing is done.
    Page,
    /// Nothing: the connection is closed after it was done.
    Lost,
}

/// Which fault a request meets, by itself and its number from 0 on.
pub type Faults = Box<dyn FnMut(&Asked, usize) -> Option<Fault> + Send>;

/// A request as it came.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    /// In capitals.
    pub method: String,
    /// Without the query.
    pub path: String,
    /// By their names in small letters.
    pub headers: BTreeMap<String, String>,
    /// Empty if it is no JSON, as for logs.
    pub body: Value,
    /// What it was answered; nothing as long as it is not.
    pub status: Option<u16>,
    /// The other end of the connection, which is another one for each.
    pub peer: Option<SocketAddr>,
}

impl Asked {
    fn new(request: &HttpRequest, body: &[u8]) -> Self {
        let text = |value: &header::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into();
        let headers = request.headers().iter();
        let path = request.path().to_owned();
        // A log of one line is JSON, too, and may be large.
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

    /// Whether it brings a part of a log.
    pub fn is_log(&self) -> bool {
        self.path.starts_with(LOGS)
    }

    /// Whether it is one of `method` to this path of the agents' API.
    pub fn is(&self, method: &str, path: &str) -> bool {
        self.method == method && self.path.strip_prefix(API) == Some(path)
    }
}

/// What a control plane tells people.
pub type Events = Box<dyn Fn(&str) + Send + Sync>;

/// How a control plane treats everybody.
pub struct Settings {
    /// When agents are to report again, in milliseconds.
    pub next_sync_after: u64,
    /// How many bytes of each job's log are taken.
    pub log_quota: usize,
    /// How many lines are taken at once.
    pub most_lines: usize,
    /// Asks for compressed logs.
    pub compression: bool,
    /// The token that agents register with.
    pub token: String,
    /// Gives out each job whole only once: what is secret in it is overwritten then.
    pub once: bool,
    /// How much memory each job's log may take, in bytes as its store estimates them.
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

/// A job and what became of it.
#[derive(Clone, Debug, Default)]
pub struct HubJob {
    /// As agents get it.
    pub request: Value,
    /// Whole lines.
    pub log: Vec<Vec<u8>>,
    /// As the agent told it.
    pub result: Option<String>,
    /// How often it was fetched.
    pub fetched: usize,
    stop: bool,
    /// Its store has lost a part of the log, and knows nothing of that.
    has_holes: bool,
}

impl HubJob {
    /// All of the log.
    pub fn log_bytes(&self) -> Vec<u8> {
        self.log.concat()
    }

    /// What its steps printed.
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

/// What a control plane knows.
#[derive(Default)]
pub struct Known {
    /// By their ids.
    pub jobs: BTreeMap<String, HubJob>,
    /// The bodies of registrations.
    pub registrations: Vec<Value>,
    /// The bodies of reports.
    pub reports: Vec<Value>,
    /// When each of them was answered.
    pub answered: Vec<SystemTime>,
    /// How many agents have disconnected.
    pub disconnected: usize,
    /// All of them.
    pub requests: Vec<Asked>,
    /// The sizes of the bodies of logs as they came, in bytes.
    pub log_bodies: Vec<usize>,
    queue: VecDeque<String>,
    agents: Vec<HubAgent>,
    answers: VecDeque<Value>,
    shutdown: Option<String>,
    tokens: usize,
}

impl Known {
    /// The token for logs that is valid now.
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

    fn fault(&self, asked: &Asked, number: usize) -> Option<Fault> {
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        faults.as_mut()?(asked, number)
    }

    fn answered(&self, number: usize, status: u16) {
        self.known().requests[number].status = Some(status);
        self.changed.notify_all();
    }
}

/// See the module.
pub struct ControlPlane {
    state: Arc<State>,
    server: Option<(ServerHandle, JoinHandle<()>)>,
}

impl ControlPlane {
    /// Listens on `address`; port 0 stands for any.
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

    /// Is not there any more, but forgets nothing.
    pub fn pause(&mut self) {
        if let Some((handle, thread)) = self.server.take() {
            // The server stops on its own thread; there is nothing to do here but to wait.
            let stopping = handle.stop(false);
            drop(stopping);
            let _ = thread.join();
        }
    }

    /// Is there again, on the same port.
    pub fn resume(&mut self) -> io::Result<()> {
        self.listen(TcpListener::bind(self.state.address)?)
    }

    /// Host and port.
    pub fn endpoint(&self) -> String {
        self.state.address.to_string()
    }

    /// Changes how everybody is treated.
    pub fn set(&self, change: impl FnOnce(&mut Settings)) {
        change(&mut self.state.settings());
    }

    /// From now on requests meet these faults.
    pub fn misbehave(&self, faults: Option<Faults>) {
        *self.state.faults.lock().unwrap_or_else(PoisonError::into_inner) = faults;
    }

    /// Hands out a job, as soon as there is an agent for it. Answers its id, made fit for a URL.
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

    /// Answers the next reports with these actions, whatever is right.
    pub fn answer_next(&self, answers: impl IntoIterator<Item = Value>) {
        self.state.known().answers.extend(answers);
    }

    /// Wants a job stopped.
    pub fn stop_job(&self, id: &str) {
        if let Some(job) = self.state.known().jobs.get_mut(id) {
            job.stop = true;
        }
    }

    /// Wants all agents to end.
    pub fn shut_down(&self, reason: &str) {
        self.state.known().shutdown = Some(reason.to_owned());
    }

    /// The tokens that agents have for their logs are not good any more.
    pub fn expire_log_tokens(&self) {
        self.state.known().tokens += 1;
    }

    /// The store of the logs crashes, and forgets all that it has acknowledged.
    pub fn lose_logs(&self) {
        for job in self.state.known().jobs.values_mut() {
            job.log.clear();
            job.has_holes = true;
        }
    }

    /// What is known now.
    pub fn look<T>(&self, look: impl FnOnce(&Known) -> T) -> T {
        look(&self.state.known())
    }

    /// Waits until something is known; nothing if that takes too long.
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

/// A job from a file, in YAML or JSON.
pub fn read_job(text: &str) -> Result<Value, String> {
    let job: Map<String, Value> = serde_yaml::from_str(text).map_err(|error| error.to_string())?;
    Ok(Value::Object(job))
}
