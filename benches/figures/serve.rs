//! `agent serve`, and a client that acts as the platform.

use std::fs;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

use openssl::ssl::SslStream;
use serde_json::{Value, json};
use test_support::http::{Answer, Request};
use test_support::serve::{ServeAgent, good_authorization};
use tokio::time::Instant;

use crate::place::Place;
use crate::table::{Figure, Target};
use crate::{LAST, Result, memory_in_mb, ms, wall};

/// Minimum size of the log that is read completely, in bytes.
const LONG_LOG: u64 = 79_000_000;

/// A text in the last event of a log.
const JOB_FINISHED: &str = r#""event":"job_finished""#;

/// Time limit for everything.
const PATIENCE: Duration = Duration::from_mins(1);

/// Number of reads by one reader.
const READS: usize = 50;

/// Measures the time from the start of the program to its first response.
pub(crate) fn start_up(place: &Place) -> Result<Figure> {
    // The first start makes the key.
    drop(Platform::start(place)?);
    let mut runs = Vec::new();
    for _ in 0..30 {
        let begun = Instant::now();
        let platform = Platform::start(place)?;
        runs.push(ms(begun.elapsed()));
        drop(platform);
    }
    Ok(Figure::without_floor(runs, 10.0))
}

/// Measures the time from the request to the `finished` callback.
pub(crate) fn short_job(place: &Place, command: &str, target: f64) -> Result<Figure> {
    let mut platform = Platform::start(place)?;
    let (mut floor, mut runs) = (Vec::new(), Vec::new());
    for _ in 0..60 {
        floor.push(ms(wall(&mut place.bare_login(command))?));
        runs.push(ms(platform.run_job(&[command])?.to_finished));
    }
    Ok(Figure { floor, runs, target: Target::AtMost(target) })
}

/// Measures the time from the archivator's last byte to the `teardown_finished` callback.
pub(crate) fn teardown(place: &Place) -> Result<Figure> {
    let mut platform = Platform::start(place)?;
    let mut runs = Vec::new();
    for _ in 0..60 {
        runs.push(ms(platform.run_job(&["true"])?.to_teardown));
    }
    Ok(Figure::without_floor(runs, 5.0))
}

/// Measures the time from the stop request to the `finished` callback.
pub(crate) fn stop(place: &Place) -> Result<Figure> {
    let mut platform = Platform::start(place)?;
    let mut runs = Vec::new();
    for _ in 0..20 {
        platform.post_job(json!({"commands": [{"directive": "sleep 1000"}]}))?;
        platform.wait_for_log(r#""directive":"sleep 1000""#)?;
        let begun = Instant::now();
        platform.post("/stop", &json!({}))?;
        platform.wait_for_callback("/finished")?;
        runs.push(ms(begun.elapsed()));
        platform.tear_down()?;
    }
    Ok(Figure::without_floor(runs, 10.0))
}

/// Number of commands for the long log, the maximum of a request; each has an alias and makes three events.
const COMMANDS: u64 = 10_000;

/// Measures one reader near the end of a log of 30,000 events, or the 99th percentile of several at once.
pub(crate) fn last_events(place: &Place, readers: usize, target: f64) -> Result<Figure> {
    let mut platform = Platform::start(place)?;
    let command = json!({"directive": "true", "alias": "a command"});
    let commands = vec![command; usize::try_from(COMMANDS)?];
    platform.post_job(json!({"commands": commands}))?;
    platform.wait_for_callback("/finished")?;
    platform.wait_for_log(JOB_FINISHED)?;
    let path = format!("{}?start_from={}", platform.log_path(), 3 * COMMANDS - LAST);
    let mut runs = Vec::new();
    for _ in 0..10 {
        let read = || read_often(&platform.agent, &path).map_err(|error| error.to_string());
        let all = thread::scope(|scope| {
            let readers: Vec<_> = (0..readers).map(|_| scope.spawn(read)).collect();
            readers.into_iter().map(ScopedJoinHandle::join).collect::<Vec<_>>()
        });
        let mut times = Vec::new();
        for read in all {
            times.extend(read.map_err(|_| "a reader panicked")??);
        }
        times.sort_by(f64::total_cmp);
        let percent = if readers == 1 { 50 } else { 99 };
        runs.push(times[(times.len() * percent).div_ceil(100) - 1]);
    }
    Ok(Figure::without_floor(runs, target))
}

fn read_often(agent: &ServeAgent, path: &str) -> Result<Vec<f64>> {
    let mut client = Client::connect(agent);
    let mut times = Vec::new();
    for _ in 0..READS {
        let begun = Instant::now();
        let lines = client.get(path)?;
        times.push(ms(begun.elapsed()));
        if lines.split_inclusive(|byte| *byte == b'\n').count() < usize::try_from(LAST)? {
            return Err("the last events are not there".into());
        }
    }
    Ok(times)
}

/// Measures `curl` with a long log, from the agent and from a server of plain files, in MB/s.
pub(crate) fn whole_log(place: &Place) -> Result<Figure> {
    let mut platform = Platform::start(place)?;
    let print = format!("cat {0} {0} | head -c {LONG_LOG}", place.lines.display());
    platform.post_job(json!({"commands": [{"directive": print}]}))?;
    platform.wait_for_callback("/finished")?;
    platform.wait_for_log(JOB_FINISHED)?;

    let plain = place.world.directory().join("log");
    let url = format!("https://{}{}", platform.agent.address(), platform.log_path());
    curl(&url, &plain)?;
    let size = fs::metadata(&plain)?.len();
    if size < LONG_LOG {
        return Err(format!("the log has {size} bytes").into());
    }
    let server = FileServer::start(place)?;
    let (mut floor, mut runs) = (Vec::new(), Vec::new());
    for _ in 0..9 {
        floor.push(curl(&server.url("log"), Path::new("/dev/null"))?);
        runs.push(curl(&url, Path::new("/dev/null"))?);
    }
    Ok(Figure { floor, runs, target: Target::OfFloor(0.5) })
}

/// Returns the speed in MB/s.
fn curl(url: &str, to: &Path) -> Result<f64> {
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--fail", "--insecure", "--write-out", "%{speed_download}"]);
    curl.arg("--header").arg(format!("Authorization: {}", good_authorization()));
    let output = curl.arg("--output").arg(to).arg(url).stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        return Err(format!("curl ended with {}", output.status).into());
    }
    Ok(String::from_utf8(output.stdout)?.parse::<f64>()? / 1e6)
}

/// An `openssl s_server`, which serves files.
struct FileServer {
    process: Child,
    port: u16,
}

impl FileServer {
    fn start(place: &Place) -> Result<Self> {
        let tls = place.world.state().join("tls");
        // The listener is dropped at once, so the port is free again.
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut process = Command::new("openssl")
            .args(["s_server", "-WWW", "-accept", &format!("127.0.0.1:{port}")])
            .arg("-cert")
            .arg(tls.join("server.crt"))
            .arg("-key")
            .arg(tls.join("server.key"))
            .current_dir(place.world.directory())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut lines = BufReader::new(process.stdout.take().ok_or("no output")?).lines();
        let listening = lines.any(|line| line.is_ok_and(|line| line == "ACCEPT"));
        let server = Self { process, port };
        // The server must not block on a full pipe.
        std::thread::spawn(move || lines.for_each(drop));
        if listening { Ok(server) } else { Err("openssl s_server does not listen".into()) }
    }

    fn url(&self, file: &str) -> String {
        format!("https://127.0.0.1:{}/{file}", self.port)
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Measures the resident memory of the agent after this number of jobs, in MB.
pub(crate) fn memory(place: &Place, jobs: usize, target: f64) -> Result<Figure> {
    let mut runs = Vec::new();
    for _ in 0..3 {
        let mut platform = Platform::start(place)?;
        for _ in 0..jobs {
            platform.run_job(&["true"])?;
        }
        runs.push(memory_in_mb(platform.agent.pid(), "VmRSS:")?.ok_or("the agent has ended")?);
    }
    Ok(Figure::without_floor(runs, target))
}

/// The durations of a job.
struct Times {
    /// From the request to the `finished` callback.
    to_finished: Duration,
    /// From the end of the archivator's transfer to the `teardown_finished` callback.
    to_teardown: Duration,
}

/// A running `agent serve`, and a platform that gives it jobs. The agent is killed on drop.
pub(crate) struct Platform {
    agent: ServeAgent,
    client: Client,
    callbacks: Callbacks,
    jobs: usize,
}

impl Platform {
    /// Starts the agent, and returns as soon as it responds to `/is_alive`.
    pub(crate) fn start(place: &Place) -> Result<Self> {
        let callbacks = Callbacks::serve()?;
        let agent = ServeAgent::start(&place.world);
        let mut client = Client::connect(&agent);
        client.get("/is_alive")?;
        Ok(Self { agent, client, callbacks, jobs: 0 })
    }

    fn log_path(&self) -> String {
        format!("/jobs/{}/log", self.jobs)
    }

    pub(crate) fn post(&mut self, path: &str, body: &Value) -> Result<()> {
        self.client.answer("POST", path, "", body.to_string().as_bytes()).map(drop)
    }

    /// Posts a job; adds its ID and its callbacks.
    pub(crate) fn post_job(&mut self, mut job: Value) -> Result<()> {
        self.jobs += 1;
        job["job_id"] = self.jobs.to_string().into();
        let url = |path| format!("http://127.0.0.1:{}{path}", self.callbacks.port);
        job["callbacks"] =
            json!({"finished": url("/finished"), "teardown_finished": url("/teardown_finished")});
        self.post("/jobs", &job)
    }

    fn run_job(&mut self, commands: &[&str]) -> Result<Times> {
        let commands: Vec<_> =
            commands.iter().map(|directive| json!({"directive": directive})).collect();
        let begun = Instant::now();
        self.post_job(json!({"commands": commands}))?;
        self.wait_for_callback("/finished")?;
        let to_finished = begun.elapsed();
        let to_teardown = self.tear_down()?;
        Ok(Times { to_finished, to_teardown })
    }

    /// Archives the log as soon as it is complete, and waits for the teardown.
    pub(crate) fn tear_down(&mut self) -> Result<Duration> {
        self.wait_for_log(JOB_FINISHED)?;
        let path = self.log_path();
        self.client.answer("GET", &path, "X-Client-Name: archivator\r\n", b"")?;
        let begun = Instant::now();
        self.wait_for_callback("/teardown_finished")?;
        Ok(begun.elapsed())
    }

    pub(crate) fn wait_for_callback(&self, path: &str) -> Result<()> {
        let called = self.callbacks.received.recv_timeout(PATIENCE)?;
        if called == path { Ok(()) } else { Err(format!("{called} instead of {path}").into()) }
    }

    #[expect(clippy::disallowed_methods, reason = "nothing else is to be done here")]
    pub(crate) fn wait_for_log(&mut self, text: &str) -> Result<()> {
        let mut line = 0;
        loop {
            let path = format!("{}?start_from={line}", self.log_path());
            let new = self.client.get(&path)?;
            let new = String::from_utf8(new)?;
            if new.contains(text) {
                return Ok(());
            }
            line += new.lines().count();
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A client of the agent with a persistent connection.
struct Client {
    stream: BufReader<SslStream<TcpStream>>,
}

impl Client {
    fn connect(agent: &ServeAgent) -> Self {
        Self { stream: BufReader::new(agent.connect()) }
    }

    fn get(&mut self, path: &str) -> Result<Vec<u8>> {
        self.answer("GET", path, "", b"")
    }

    fn answer(&mut self, method: &str, path: &str, header: &str, body: &[u8]) -> Result<Vec<u8>> {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {}\r\n\
             Content-Length: {}\r\n{header}\r\n",
            good_authorization(),
            body.len()
        );
        self.stream.get_mut().write_all(&[head.as_bytes(), body].concat())?;
        let answer = Answer::read_from(&mut self.stream, method)?;
        match answer.status {
            200 => Ok(answer.body),
            status => Err(format!("{status}: {}", String::from_utf8_lossy(&answer.body)).into()),
        }
    }
}

/// The server for the agent's callbacks.
struct Callbacks {
    port: u16,
    received: Receiver<String>,
}

impl Callbacks {
    fn serve() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let (sender, received) = channel();
        thread::spawn(move || {
            for stream in listener.incoming().map_while(io::Result::ok) {
                let mut stream = BufReader::new(stream);
                // Serve requests until the agent closes the connection.
                while let Ok(request) = Request::read_from(&mut stream) {
                    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
                    let sent = sender.send(request.path).is_ok();
                    if !sent || stream.get_mut().write_all(answer).is_err() {
                        break;
                    }
                }
            }
        });
        Ok(Self { port, received })
    }
}
