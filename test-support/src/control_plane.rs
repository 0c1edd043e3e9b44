//! A small control plane on the loopback interface: hands out jobs, collects their logs, and misbehaves
//! on demand.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use actix_web::dev::{Extensions, ServerHandle};
use actix_web::http::{Method, StatusCode, header};
use actix_web::web::{self, Bytes, Data};
use actix_web::{App, HttpRequest, HttpResponse, HttpServer};
use flate2::read::GzDecoder;
use serde_json::{Map, Value, json};

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

/// The token for logs that is good now.
fn log_token(known: &Known) -> String {
    format!("log-token-{}", known.tokens)
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

/// To be able to close it without an answer.
fn remember_connection(connection: &dyn std::any::Any, data: &mut Extensions) {
    if let Some(stream) = connection.downcast_ref::<actix_web::rt::net::TcpStream>()
        && let Ok(descriptor) = stream.as_fd().try_clone_to_owned()
    {
        data.insert(Arc::new(TcpStream::from(descriptor)));
    }
}

async fn answer(request: HttpRequest, body: Bytes, state: Data<State>) -> HttpResponse {
    let path = request.path().to_owned();
    let asked = Asked::new(&request, &body);
    let number = {
        let mut known = state.known();
        known.requests.push(asked.clone());
        known.requests.len() - 1
    };
    state.changed.notify_all();
    let fault = state.fault(&asked, number);
    match fault {
        Some(Fault::Status(status)) => {
            state.answered(number, status);
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            return HttpResponse::build(status).finish();
        }
        Some(Fault::Nonsense) => {
            state.answered(number, 200);
            return HttpResponse::Ok().body("<html>{\"action\":");
        }
        Some(Fault::Refuse(status, why)) => {
            state.answered(number, status);
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            return HttpResponse::build(status).content_type("text/plain").body(why);
        }
        Some(Fault::Page) => {
            state.answered(number, 200);
            let page = "<!DOCTYPE html>\n<html><body>Please log in</body></html>\n";
            return HttpResponse::Ok().content_type("text/html").body(page);
        }
        Some(Fault::Drop) => return close(&request),
        Some(Fault::Delay(delay)) => actix_web::rt::time::sleep(delay).await,
        Some(Fault::Cut | Fault::Lost) | None => {}
    }
    let (status, answer) = if let Some(id) = path.strip_prefix(LOGS) {
        take_log(&state, id, &request, &body)
    } else if let Some(path) = path.strip_prefix(API) {
        serve_agent(&state, request.method(), path, &request, &body)
    } else {
        (404, Value::Null)
    };
    state.answered(number, status);
    if fault == Some(Fault::Lost) {
        return close(&request);
    }
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = HttpResponse::build(status);
    if state.settings().compression {
        response.insert_header((header::ACCEPT_ENCODING, "gzip"));
    }
    if fault == Some(Fault::Cut) {
        let text = format!("{answer}{}", " ".repeat(100));
        let half = Bytes::from(text[..text.len() / 2].to_owned());
        let broken = Err(io::Error::from(io::ErrorKind::ConnectionAborted));
        let parts = futures_util::stream::iter([Ok(half), broken]);
        let size = u64::try_from(text.len()).unwrap_or(u64::MAX);
        return response.body(actix_web::body::SizedStream::new(size, parts));
    }
    response.json(answer)
}

/// The connection is closed without an answer.
fn close(request: &HttpRequest) -> HttpResponse {
    if let Some(stream) = request.conn_data::<Arc<TcpStream>>() {
        let _ = stream.shutdown(Shutdown::Both);
    }
    HttpResponse::Ok().finish()
}

fn header_of<'a>(request: &'a HttpRequest, name: &str) -> &'a str {
    request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

fn take_log(state: &State, id: &str, request: &HttpRequest, body: &[u8]) -> (u16, Value) {
    let (quota, memory, most_lines) = {
        let settings = state.settings();
        (settings.log_quota, settings.memory, settings.most_lines)
    };
    let mut known = state.known();
    if header_of(request, "authorization") != format!("Bearer {}", log_token(&known)) {
        return (401, Value::Null);
    }
    known.log_bodies.push(body.len());
    let mut text = Vec::new();
    if header_of(request, "content-encoding") == "gzip" {
        if GzDecoder::new(body).read_to_end(&mut text).is_err() {
            return (400, Value::Null);
        }
    } else {
        text.extend_from_slice(body);
    }
    let lines: Vec<Vec<u8>> =
        text.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
    if lines.len() > most_lines {
        return (413, Value::Null);
    }
    let start = request.query_string().strip_prefix("start_from=");
    let Some(start) = start.and_then(|start| start.parse::<usize>().ok()) else {
        return (400, Value::Null);
    };
    let Some(job) = known.jobs.get_mut(id) else {
        return (404, Value::Null);
    };
    if (start > job.log.len() && !job.has_holes) || !text.ends_with(b"\n") {
        return (400, Value::Null);
    }
    let start = start.min(job.log.len());
    let size: usize = job.log[..start].iter().map(Vec::len).sum();
    if size + text.len() > quota || memory_of(&job.log[..start]) > memory {
        return (422, Value::Null);
    }
    let already = job.log.len();
    job.log.truncate(start);
    job.log.extend(lines);
    for line in job.log.iter().skip(already) {
        match serde_json::from_slice::<Value>(line) {
            Ok(event) => tell_event(state, id, &event),
            Err(error) => (state.events)(&format!("{id}: a line of the log is no JSON: {error}\n")),
        }
    }
    (200, Value::Null)
}

/// What the store takes these lines for: it keeps them in nodes of 8 KiB at most, unless one line is
/// larger, and estimates all from the first five.
fn memory_of(lines: &[Vec<u8>]) -> usize {
    const NODE: usize = 8 << 10;
    const SAMPLED: usize = 5;
    let mut nodes: Vec<usize> = Vec::new();
    for line in lines {
        match nodes.last_mut() {
            Some(node) if *node + line.len() <= NODE => *node += line.len(),
            _ => nodes.push(line.len()),
        }
    }
    let sampled = nodes.len().clamp(1, SAMPLED);
    nodes.iter().take(sampled).sum::<usize>() * nodes.len() / sampled
}

fn tell_event(state: &State, id: &str, event: &Value) {
    let text = |key: &str| event[key].as_str().unwrap_or_default().to_owned();
    (state.events)(&match event["event"].as_str() {
        Some("job_started") => format!("── {id} runs\n"),
        Some("cmd_started") => format!("▶ {}\n", text("directive")),
        Some("cmd_output") => text("output"),
        Some("cmd_finished") => format!("  exit code {}\n", event["exit_code"]),
        _ => format!("── {id} {}\n", text("result")),
    });
}

fn serve_agent(
    state: &State,
    method: &Method,
    path: &str,
    request: &HttpRequest,
    body: &[u8],
) -> (u16, Value) {
    let authorization = header_of(request, "authorization");
    let Some(token) = authorization.strip_prefix("Token ") else {
        return (401, Value::Null);
    };
    let body: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
    if path == "/register" {
        return register(state, token, body);
    }
    let mut known = state.known();
    let Some(index) = known.agents.iter().position(|agent| agent.token == token) else {
        return (401, Value::Null);
    };
    match (method.as_str(), path) {
        ("POST", "/sync") => (200, sync(state, &mut known, index, &body)),
        ("POST", "/refresh") => (200, json!({ "token": log_token(&known) })),
        ("POST", "/disconnect") => {
            let agent = known.agents.remove(index);
            known.disconnected += 1;
            (state.events)(&format!("── {} has left\n", agent.registration["name"]));
            (200, Value::Null)
        }
        ("GET", path) => {
            let token = log_token(&known);
            let id = path.strip_prefix("/jobs/").unwrap_or_default();
            let Some(job) = known.jobs.get_mut(id) else {
                return (404, Value::Null);
            };
            job.fetched += 1;
            let mut request = job.request.clone();
            // Those of a test stay.
            if request["logger"].is_null() {
                let url = format!("http://{}{LOGS}{id}", state.address);
                request["logger"] = json!({ "method": "push", "url": url, "token": token });
            }
            if state.settings().once && job.fetched > 1 {
                sanitize(&mut request);
            }
            (200, request)
        }
        _ => (404, Value::Null),
    }
}

/// Overwrites what is secret in a request that was given out before.
fn sanitize(part: &mut Value) {
    match part {
        Value::Object(fields) => {
            for (name, field) in fields {
                if field.is_string() && ["value", "content", "token"].contains(&name.as_str()) {
                    *field = SANITIZED.into();
                } else {
                    sanitize(field);
                }
            }
        }
        Value::Array(parts) => parts.iter_mut().for_each(sanitize),
        _ => {}
    }
}

fn register(state: &State, token: &str, body: Value) -> (u16, Value) {
    if token != state.settings().token {
        return (401, Value::Null);
    }
    let mut known = state.known();
    let name = body["name"].clone();
    let token = format!("access-token-{}", known.registrations.len());
    (state.events)(&format!("── {name} is there\n"));
    known.registrations.push(body.clone());
    known.agents.push(HubAgent { registration: body, token: token.clone(), job: None });
    (201, json!({ "name": name, "token": token }))
}

fn sync(state: &State, known: &mut Known, index: usize, report: &Value) -> Value {
    known.reports.push(report.clone());
    known.answered.push(SystemTime::now());
    let mut answer = match known.answers.pop_front() {
        Some(answer) => answer,
        None => decide(known, index, report),
    };
    if let Some(fields) = answer.as_object_mut() {
        fields.entry("next_sync_after").or_insert_with(|| state.settings().next_sync_after.into());
    }
    answer
}

fn action(name: &str) -> Value {
    json!({ "action": name })
}

fn decide(known: &mut Known, index: usize, report: &Value) -> Value {
    let id = report["job_id"].as_str().unwrap_or_default();
    let interrupted_at = report["interrupted_at"].as_u64().unwrap_or(0);
    let registration = known.agents[index].registration.clone();
    let shutdown = |reason: &str| json!({ "action": "shutdown", "shutdown_reason": reason });
    match report["state"].as_str() {
        Some("waiting-for-jobs") => {
            if interrupted_at > 0 {
                return shutdown("interrupted");
            }
            if let Some(reason) = &known.shutdown {
                return shutdown(reason);
            }
            // One that was handed out, but has not got there.
            let job = known.agents[index].job.take().or_else(|| known.queue.pop_front());
            known.agents[index].job.clone_from(&job);
            job.map_or_else(
                || action("continue"),
                |id| json!({ "action": "run-job", "job_id": id }),
            )
        }
        Some("finished-job") => {
            known.agents[index].job = None;
            if let Some(job) = known.jobs.get_mut(id) {
                job.result = report["job_result"].as_str().map(str::to_owned);
            }
            if interrupted_at > 0 {
                shutdown("interrupted")
            } else if registration["single_job"] == true {
                shutdown("job-finished")
            } else {
                action("wait-for-jobs")
            }
        }
        Some("starting-job" | "running-job") => {
            let grace = registration["interruption_grace_period"].as_u64().unwrap_or(0);
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs());
            let is_over = interrupted_at > 0 && now >= interrupted_at + grace;
            if is_over || known.jobs.get(id).is_some_and(|job| job.stop) {
                json!({ "action": "stop-job", "job_id": id })
            } else {
                action("continue")
            }
        }
        _ => action("continue"),
    }
}

/// A job from a file, in YAML or JSON.
pub fn read_job(text: &str) -> Result<Value, String> {
    let job: Map<String, Value> = serde_yaml::from_str(text).map_err(|error| error.to_string())?;
    Ok(Value::Object(job))
}
