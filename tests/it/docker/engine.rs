//! Engines that are missing, refuse access, are too old, or vanish while a job runs.

use std::fs;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::Shutdown;
use std::os::unix::fs::chown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use test_support::docker::{container, job, job_in, leftovers_of};
use test_support::serve::ServeAgent;
use test_support::{Finished, World, wait_for_end};

const ENGINE: &str = "/var/run/docker.sock";

/// An unprivileged user.
const NOBODY: u32 = 65534;

fn at(socket: &Path) -> String {
    format!("unix://{}", socket.display())
}

/// Runs a job on the engine at this socket.
fn run_at(socket: &Path, job: &Value) -> Finished {
    let world = World::new();
    let path = world.file("job.json", job.to_string());
    let running = world.start_file_with(&path, |command| {
        command.env("DOCKER_HOST", at(socket));
    });
    running.finish()
}

/// Returns the message in the log of a job that can't be prepared.
fn why(finished: &Finished) -> String {
    assert_eq!((finished.result(), finished.exit_code), ("failed", Some(1)), "{finished:#?}");
    let steps = finished.steps();
    assert_eq!(steps.len(), 1, "{steps:#?}");
    assert_eq!((steps[0].0.as_str(), steps[0].2), ("Preparing the job", 1));
    steps[0].1.clone()
}

/// Returns a job whose preparation must fail and whose epilogue must not run.
fn unprepared() -> Value {
    let mut job = job("bash", &["echo not reached"]);
    job["epilogue_always_commands"] = json!([{ "directive": "echo not reached" }]);
    job
}

/// Starts a fake engine that sends this response to every request.
fn fake(socket: &Path, answer: &'static str) {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = BufReader::new(stream.unwrap());
            let mut line = String::new();
            while stream.read_line(&mut line).is_ok_and(|count| count > 2) {
                line.clear();
            }
            // A client that only checks whether somebody listens has already closed the connection.
            let _ = stream.get_mut().write_all(answer.as_bytes());
        }
    });
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn without_an_engine_the_job_says_so() {
    let world = World::new();
    let missing = world.home().join("missing.sock");
    let text = why(&run_at(&missing, &unprepared()));
    let expected = format!("no Docker Engine at {}: No such file", missing.display());
    assert!(text.starts_with(&expected) && text.ends_with('\n'), "{text}");

    // The socket of an engine that was killed.
    let dead = world.home().join("dead.sock");
    drop(UnixListener::bind(&dead).unwrap());
    let text = why(&run_at(&dead, &unprepared()));
    assert!(text.contains("dead.sock: Connection refused"), "{text}");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_fake_or_outdated_engine_is_named() {
    let world = World::new();
    let directory = world.home();
    let body = r#"{"Version":"18.09.1","ApiVersion":"1.30"}"#;
    let old: &str = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{body}",
        body.len()
    )
    .leak();
    for (name, answer, reason) in [
        (
            "old",
            old,
            "Docker Engine 18.09.1 supports version 1.30 of its API at most; the agent needs 1.41",
        ),
        ("ssh", "SSH-2.0-OpenSSH_9.2\r\n", "no Docker Engine at "),
        ("silent", "", "no Docker Engine at "),
    ] {
        let socket = directory.join(name);
        fake(&socket, answer);
        let text = why(&run_at(&socket, &unprepared()));
        assert!(text.starts_with(reason), "{name}: {text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }
    let world = World::new();
    let path = world.file("job.json", unprepared().to_string());
    let running = world.start_file_with(&path, |command| {
        command.env("DOCKER_HOST", "ssh://engine");
    });
    let text = why(&running.finish());
    assert!(text.contains("DOCKER_HOST `ssh://engine` is neither"), "{text}");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn an_engine_that_refuses_the_agents_user_is_named() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let world = World::new();
    let job = world.file("job.json", unprepared().to_string());
    let program = world.file("agent", fs::read(test_support::agent_program()).unwrap());
    for path in [world.home().parent().unwrap(), &world.home(), &job, &program] {
        chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    fs::set_permissions(&program, mode).unwrap();
    let mut agent = Command::new(program);
    agent.uid(NOBODY).gid(NOBODY).current_dir("/").env_clear();
    agent.envs(world.agent().get_envs().filter_map(|(name, value)| Some((name, value?))));
    agent.args(["run", "--output", "json"]).arg(job).stdin(Stdio::null());
    let child = agent.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let text = why(&Finished::of(&wait_for_end(child)));
    assert!(text.contains(&format!("{ENGINE}: Permission denied")), "{text}");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn an_agent_without_an_engine_continues() {
    let world = World::new();
    let missing = world.home().join("missing.sock");
    let agent = ServeAgent::start_with(&world, |command| {
        command.env("DOCKER_HOST", at(&missing));
    });
    for _ in 0..2 {
        let finished = agent.run_to_end(&unprepared());
        assert_eq!(finished.result(), "failed");
        assert!(finished.output().contains("missing.sock"), "{finished:#?}");
    }
    assert_eq!(agent.run_to_end(&test_support::job("1", &["echo hi"])).result(), "passed");
}

/// A socket that forwards to the engine until it is cut.
pub struct Wire {
    pub socket: PathBuf,
    /// The open connections; `None` while the wire is cut.
    streams: Arc<Mutex<Option<Vec<UnixStream>>>>,
}

impl Wire {
    pub fn new(socket: PathBuf) -> Self {
        let listener = UnixListener::bind(&socket).unwrap();
        let streams = Arc::new(Mutex::new(Some(Vec::new())));
        let shared = Arc::clone(&streams);
        std::thread::spawn(move || {
            for near in listener.incoming() {
                let (near, far) = (near.unwrap(), UnixStream::connect(ENGINE).unwrap());
                let both = [&near, &far].map(|stream| stream.try_clone().unwrap());
                let Some(streams) = &mut *shared.lock().unwrap() else { continue };
                streams.extend(both);
                let [near_too, far_too] = [&near, &far].map(|stream| stream.try_clone().unwrap());
                for (from, to) in [(near, far), (far_too, near_too)] {
                    std::thread::spawn(move || forward(&from, &to));
                }
            }
        });
        Self { socket, streams }
    }

    fn cut(&self) {
        fs::rename(&self.socket, self.socket.with_extension("cut")).unwrap();
        for stream in self.streams.lock().unwrap().take().unwrap() {
            // Fails for connections that have already ended.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Closes all open connections; new ones still reach the engine.
    pub fn cut_open_connections(&self) {
        for stream in self.streams.lock().unwrap().iter_mut().flat_map(std::mem::take) {
            // Fails for connections that have already ended.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn mend(&self) {
        self.streams.lock().unwrap().replace(Vec::new());
        fs::rename(self.socket.with_extension("cut"), &self.socket).unwrap();
    }
}

fn forward(from: &UnixStream, to: &UnixStream) {
    // Any error means that the connection has ended.
    let _ = io::copy(&mut &*from, &mut &*to);
    let _ = to.shutdown(Shutdown::Write);
}

/// Starts an agent behind a wire, with a job that is running a command.
fn running_behind(world: &World) -> (Wire, ServeAgent, Value) {
    let wire = Wire::new(world.home().join("engine.sock"));
    let agent = ServeAgent::start_with(world, |command| {
        command.env("DOCKER_HOST", at(&wire.socket));
    });
    let containers = json!([container("main", "bash"), container("web", "service")]);
    let mut job = job_in(containers, &[test_support::RUN_FOR_EVER, "echo not reached"]);
    job["epilogue_always_commands"] = json!([{ "directive": "echo epilogue" }]);
    agent.post_job(&job).of_status(200);
    agent.wait_for_log(job["job_id"].as_str().unwrap(), test_support::RUNNING);
    (wire, agent, job)
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_vanished_engine_fails_the_job_and_is_cleaned_up_when_it_is_back() {
    let world = World::new();
    let (wire, agent, job) = running_behind(&world);
    wire.cut();
    let id = job["job_id"].as_str().unwrap();
    agent.wait_for_log(id, "the Docker Engine is gone: ");
    wire.mend();
    let finished = agent.finish(id);
    assert_eq!(finished.result(), "failed");
    let commands = finished.commands();
    let (output, exit_code) = &commands[0];
    assert!(
        output.starts_with("running\nThe job's shell has ended (the Docker Engine is gone: "),
        "{output}"
    );
    assert_eq!((output.lines().count(), *exit_code), (2, 1), "{output}");
    let refused = ("the job's shell has ended, so this can't run\n".into(), 1);
    assert_eq!(commands[1..], [refused]);
    assert_eq!(leftovers_of(&job), [""; 0]);
    let next = test_support::docker::job("bash", &["echo hi"]);
    assert_eq!(agent.run_to_end(&next).commands(), [("hi\n".into(), 0)]);
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_job_whose_engine_has_vanished_can_be_stopped() {
    let world = World::new();
    let (wire, agent, job) = running_behind(&world);
    wire.cut();
    agent.post("/stop", b"").of_status(200);
    wire.mend();
    let finished = agent.finish(job["job_id"].as_str().unwrap());
    assert!(["stopped", "failed"].contains(&finished.result()), "{finished:#?}");
    assert!(!finished.output().contains("not reached"), "{finished:#?}");
    assert_eq!(leftovers_of(&job), [""; 0]);
}
