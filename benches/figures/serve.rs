//! `agent serve`, and a client as platforms have it.

use std::fs;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use openssl::hash::MessageDigest;
use openssl::pkey::PKey;
use openssl::sign::Signer;
use openssl::ssl::{Ssl, SslContext, SslMethod, SslStream};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::place::Place;
use crate::table::{Figure, Target};
use crate::{LAST, Result, memory_in_mb, ms, wall};
use test_support::agent_program;
use test_support::http::{Answer, Request};

const SECRET: &str = "of no use to anybody";

/// The log that is read as a whole, in bytes at least.
const LONG_LOG: u64 = 79_000_000;

/// In the last event of a log.
const JOB_FINISHED: &str = r#""event":"job_finished""#;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_mins(1);

/// How often a reader reads.
const READS: usize = 50;

/// From the start of the program to its first answer.
pub(crate) fn start_up(place: &Place) -> Result<Figure> {
    // Makes the key.
    drop(ServeAgent::start(place)?);
    let mut runs = Vec::new();
    for _ in 0..30 {
        let begun = Instant::now();
        let agent = ServeAgent::start(place)?;
        runs.push(ms(begun.elapsed()));
        drop(agent);
    }
    Ok(Figure::without_floor(runs, 10.0))
}

/// From the request to the callback that says that the job has finished.
pub(crate) fn short_job(place: &Place, command: &str, target: f64) -> Result<Figure> {
    let mut agent = ServeAgent::start(place)?;
    let (mut floor, mut runs) = (Vec::new(), Vec::new());
    for _ in 0..60 {
        floor.push(ms(wall(&mut place.bare_login(command))?));
        runs.push(ms(agent.run_job(&[command])?.to_finished));
    }
    Ok(Figure { floor, runs, target: Target::AtMost(target) })
}

/// From the archivator's last byte to the callback that says that everything is gone.
pub(crate) fn teardown(place: &Place) -> Result<Figure> {
    let mut agent = ServeAgent::start(place)?;
    let mut runs = Vec::new();
    for _ in 0..60 {
        runs.push(ms(agent.run_job(&["true"])?.to_teardown));
    }
    Ok(Figure::without_floor(runs, 5.0))
}

/// From the request to stop to the callback that says that the job has finished.
pub(crate) fn stop(place: &Place) -> Result<Figure> {
    let mut agent = ServeAgent::start(place)?;
    let mut runs = Vec::new();
    for _ in 0..20 {
        agent.post_job(json!({"commands": [{"directive": "sleep 1000"}]}))?;
        agent.wait_for_log(r#""directive":"sleep 1000""#)?;
        let begun = Instant::now();
        agent.post("/stop", &json!({}))?;
        agent.wait_for_callback("/finished")?;
        runs.push(ms(begun.elapsed()));
        agent.tear_down()?;
    }
    Ok(Figure::without_floor(runs, 10.0))
}

/// How many commands make the long log, as many as a request may have; each is three events with its alias.
const COMMANDS: u64 = 10_000;

/// One reader near the end of a log of 30,000 events, or the 99th percentile of several at once.
pub(crate) fn last_events(place: &Place, readers: usize, target: f64) -> Result<Figure> {
    let mut agent = ServeAgent::start(place)?;
    let command = json!({"directive": "true", "alias": "a command"});
    let commands = vec![command; usize::try_from(COMMANDS)?];
    agent.post_job(json!({"commands": commands}))?;
    agent.wait_for_callback("/finished")?;
    agent.wait_for_log(JOB_FINISHED)?;
    let path = format!("{}?start_from={}", agent.log_path(), 3 * COMMANDS - LAST);
    let mut runs = Vec::new();
    for _ in 0..10 {
        let reading: Vec<_> = (0..readers)
            .map(|_| {
                let (path, address) = (path.clone(), agent.address);
                thread::spawn(move || read_often(address, &path).map_err(|error| error.to_string()))
            })
            .collect();
        let mut times = Vec::new();
        for reader in reading {
            times.extend(reader.join().map_err(|_| "a reader panicked")??);
        }
        times.sort_by(f64::total_cmp);
        let percent = if readers == 1 { 50 } else { 99 };
        runs.push(times[(times.len() * percent).div_ceil(100) - 1]);
    }
    Ok(Figure::without_floor(runs, target))
}

fn read_often(address: SocketAddr, path: &str) -> Result<Vec<f64>> {
    let mut client = Client::connect(address)?;
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

/// A long log for `curl`, from the agent and from a server of plain files, in MB/s.
pub(crate) fn whole_log(place: &Place) -> Result<Figure> {
    let mut agent = ServeAgent::start(place)?;
    let print = format!("cat {0} {0} | head -c {LONG_LOG}", place.lines.display());
    agent.post_job(json!({"commands": [{"directive": print}]}))?;
    agent.wait_for_callback("/finished")?;
    agent.wait_for_log(JOB_FINISHED)?;

    let plain = place.directory.path().join("log");
    let url = format!("https://{}{}", agent.address, agent.log_path());
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

/// Answers MB/s.
fn curl(url: &str, to: &Path) -> Result<f64> {
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--fail", "--insecure", "--write-out", "%{speed_download}"]);
    curl.arg("--header").arg(format!("Authorization: Bearer {}", token()?));
    let output = curl.arg("--output").arg(to).arg(url).stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        return Err(format!("curl ended with {}", output.status).into());
    }
    Ok(String::from_utf8(output.stdout)?.parse::<f64>()? / 1e6)
}

/// `openssl s_server`, which serves files.
struct FileServer {
    process: Child,
    port: u16,
}

impl FileServer {
    fn start(place: &Place) -> Result<Self> {
        let tls = place.state().join("tls");
        // Free again at the end of this line.
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut process = Command::new("openssl")
            .args(["s_server", "-WWW", "-accept", &format!("127.0.0.1:{port}")])
            .arg("-cert")
            .arg(tls.join("server.crt"))
            .arg("-key")
            .arg(tls.join("server.key"))
            .current_dir(place.directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut lines = BufReader::new(process.stdout.take().ok_or("no output")?).lines();
        let listening = lines.any(|line| line.is_ok_and(|line| line == "ACCEPT"));
        let server = Self { process, port };
        // It must be able to go on printing.
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

/// Resident memory of the agent after so many jobs, in MB.
pub(crate) fn memory(place: &Place, jobs: usize, target: f64) -> Result<Figure> {
    let mut runs = Vec::new();
    for _ in 0..3 {
        let mut agent = ServeAgent::start(place)?;
        for _ in 0..jobs {
            agent.run_job(&["true"])?;
        }
        runs.push(memory_in_mb(agent.process.id(), "VmRSS:")?.ok_or("the agent has ended")?);
    }
    Ok(Figure::without_floor(runs, target))
}

/// How long a job took.
struct Times {
    /// From the request to the `finished` callback.
    to_finished: Duration,
    /// From the end of the archivator's transfer to the `teardown_finished` callback.
    to_teardown: Duration,
}

/// A running `agent serve`, and a client of it. Ends with this value.
pub(crate) struct ServeAgent {
    process: Child,
    address: SocketAddr,
    client: Client,
    callbacks: Callbacks,
    jobs: usize,
}

impl ServeAgent {
    /// Answers as soon as the agent answers that it is alive.
    pub(crate) fn start(place: &Place) -> Result<Self> {
        let callbacks = Callbacks::serve()?;
        let directory = place.directory.path();
        let mut process = Command::new(agent_program())
            .args(["serve", "--host", "127.0.0.1", "--port", "0"])
            .current_dir(directory)
            .env_clear()
            .envs(place.shell.environment.clone())
            .env("SEMAPHORE_AGENT_AUTH_TOKEN_SECRET", SECRET)
            .env("SEMAPHORE_AGENT_STATE_DIR", place.state())
            .env("SEMAPHORE_AGENT_LOG_FILE_PATH", directory.join("agent_log"))
            .env("SEMAPHORE_AGENT_SSH_JUMP_POINT_PATH", directory.join("ssh_jump_point"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut lines = BufReader::new(process.stdout.take().ok_or("no output")?).lines();
        let address = lines
            .by_ref()
            .map_while(io::Result::ok)
            .find_map(|line| line.split_once(" address=")?.1.split(' ').next()?.parse().ok());
        // It must be able to go on writing its log.
        thread::spawn(move || lines.for_each(drop));
        let address = address.ok_or("the agent does not say where it listens")?;
        let mut client = Client::connect(address)?;
        client.get("/is_alive")?;
        Ok(Self { process, address, client, callbacks, jobs: 0 })
    }

    fn log_path(&self) -> String {
        format!("/jobs/{}/log", self.jobs)
    }

    pub(crate) fn post(&mut self, path: &str, body: &Value) -> Result<()> {
        self.client.answer("POST", path, "", body.to_string().as_bytes()).map(drop)
    }

    /// `job` without its identity and callbacks.
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

    /// Archives the log as soon as it is complete.
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

impl Drop for ServeAgent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A client of the agent with a connection that stays.
struct Client {
    stream: BufReader<SslStream<TcpStream>>,
    token: String,
}

impl Client {
    fn connect(address: SocketAddr) -> Result<Self> {
        // Verifies nothing.
        let context = SslContext::builder(SslMethod::tls_client())?.build();
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let stream = BufReader::new(Ssl::new(&context)?.connect(stream)?);
        Ok(Self { stream, token: token()? })
    }

    fn get(&mut self, path: &str) -> Result<Vec<u8>> {
        self.answer("GET", path, "", b"")
    }

    fn answer(&mut self, method: &str, path: &str, header: &str, body: &[u8]) -> Result<Vec<u8>> {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\n\
             Content-Length: {}\r\n{header}\r\n",
            self.token,
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

fn token() -> Result<String> {
    let part = |value: Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
    let signed = format!("{}.{}", part(json!({"alg": "HS256", "typ": "JWT"})), part(json!({})));
    let key = PKey::hmac(SECRET.as_bytes())?;
    let mut hmac = Signer::new(MessageDigest::sha256(), &key)?;
    let signature = hmac.sign_oneshot_to_vec(signed.as_bytes())?;
    Ok(format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature)))
}

/// Where the agent tells how its jobs go.
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
                // Until the agent ends the connection.
                while let Ok(request) = Request::read_from(&mut stream) {
                    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
                    let told = sender.send(request.path).is_ok();
                    if !told || stream.get_mut().write_all(answer).is_err() {
                        break;
                    }
                }
            }
        });
        Ok(Self { port, received })
    }
}
