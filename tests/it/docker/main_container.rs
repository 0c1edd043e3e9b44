//! A main container that ends, is removed or can't be reached while a command runs in it: the job's log names
//! the reason.

use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use test_support::docker::{docker_prints, job, leftovers_of};
use test_support::{Finished, World};

const RUN_FOR_EVER: &str = "echo running; sleep 1000";

/// Returns the engine's name of a job's main container.
fn main_of(job: &Value) -> String {
    let label = format!("label=semaphore-agent.job={}", job["job_id"].as_str().unwrap());
    let found = docker_prints(&["ps", "--filter", &label, "--format", "{{.Names}}"]);
    let mut names = found.lines().filter(|name| name.ends_with("-main"));
    names.next().unwrap_or_else(|| panic!("no main container: {found}")).to_owned()
}

/// Runs a job with a command that must fail, and asserts that nothing of the job is left.
fn run(command: &str, then: impl FnOnce(&Value)) -> Finished {
    let mut job = job("bash", &[command, "echo not reached"]);
    job["epilogue_always_commands"] = json!([{ "directive": "echo epilogue" }]);
    let mut running = World::new().start(&job.to_string());
    let before = running.wait_for_output("running\n");
    assert!(before.ends_with("running\n"), "{before}");
    then(&job);
    let finished = running.finish();
    assert_eq!(leftovers_of(&job), [""; 0]);
    finished
}

/// Returns the part of a failed command's output that the command did not print.
fn why(finished: &Finished) -> String {
    assert_eq!((finished.result(), finished.exit_code), ("failed", Some(1)), "{finished:#?}");
    assert!(!finished.output().contains("not reached"), "{finished:#?}");
    let commands = finished.commands();
    let (output, exit_code) = &commands[0];
    assert_eq!(*exit_code, 1, "{commands:?}");
    let lines = output.lines().filter(|line| !["", "running", "exit"].contains(&line.trim()));
    lines.collect::<Vec<_>>().join("\n")
}

/// Asserts that the reason contains one of these words, in any case.
fn assert_says(why: &str, words: &[&str]) {
    let lower = why.to_lowercase();
    assert!(words.iter().any(|word| lower.contains(word)), "none of {words:?}: {why:?}");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine and its client")]
fn a_main_container_that_is_killed_from_outside_is_named_as_the_reason() {
    let finished = run(RUN_FOR_EVER, |job| drop(docker_prints(&["kill", &main_of(job)])));
    let why = why(&finished);
    assert_says(&why, &["container"]);
    assert_says(&why, &["137", "kill"]);
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine and its client")]
fn a_main_container_that_is_removed_from_outside_is_named_as_the_reason() {
    let finished = run(RUN_FOR_EVER, |job| drop(docker_prints(&["rm", "-f", &main_of(job)])));
    let why = why(&finished);
    assert_says(&why, &["container"]);
    // The container is killed before it is removed, and the agent may notice that first.
    assert_says(&why, &["removed", "gone", "no longer", "no such", "137", "kill"]);
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine and its client")]
fn a_main_container_that_is_out_of_memory_is_named_as_the_reason() {
    // The shell itself uses up the memory, as soon as it may.
    let command = "echo running; until [[ -e /tmp/go ]]; do sleep 0.1; done
                   while :; do all+=$all$(head -c 1000000 /dev/zero | tr '\\0' x); done";
    let finished = run(command, |job| {
        let main = main_of(job);
        docker_prints(&["update", "--memory", "32m", "--memory-swap", "32m", &main]);
        docker_prints(&["exec", &main, "touch", "/tmp/go"]);
    });
    assert_says(&why(&finished), &["memory"]);
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine and its client")]
fn a_command_whose_shell_is_killed_or_ends_says_so() {
    for (end, words) in [
        ("echo running; kill -KILL $$", &["kill", "137", "signal 9"][..]),
        ("echo running; exit 0", &["shell"]),
        ("echo running; exit 3", &["exit code 3", "with 3"]),
        ("echo running; set -e; false", &["shell"]),
    ] {
        let finished = run(end, |_| {});
        let why = why(&finished);
        assert_says(&why, words);
        assert_says(&why, &["shell", "container"]);
        assert_eq!(why.lines().count(), 1, "{end}: {why}");
    }
}

/// A socket that forwards to the engine. Only the connections to terminals can be cut.
struct Wire {
    socket: PathBuf,
    terminals: Arc<Mutex<Vec<UnixStream>>>,
}

impl Wire {
    fn new(socket: PathBuf) -> Self {
        let listener = UnixListener::bind(&socket).unwrap();
        let terminals = Arc::new(Mutex::new(Vec::new()));
        let shared = Arc::clone(&terminals);
        std::thread::spawn(move || {
            for near in listener.incoming() {
                let (near, terminals) = (near.unwrap(), Arc::clone(&shared));
                // Any error means that the connection has ended.
                std::thread::spawn(move || drop(forward_connection(&near, &terminals)));
            }
        });
        Self { socket, terminals }
    }

    fn cut_terminals(&self) {
        let terminals = std::mem::take(&mut *self.terminals.lock().unwrap());
        assert!(!terminals.is_empty(), "no terminal");
        for stream in terminals {
            // Fails if the peer has already closed the connection.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn forward_connection(near: &UnixStream, terminals: &Mutex<Vec<UnixStream>>) -> io::Result<()> {
    let far = UnixStream::connect("/var/run/docker.sock")?;
    let mut first = [0; 4096];
    let length = (&*near).read(&mut first)?;
    let request = String::from_utf8_lossy(&first[..length]);
    if request.lines().next().is_some_and(|line| line.contains("/attach")) {
        terminals.lock().unwrap().extend([near.try_clone()?, far.try_clone()?]);
    }
    (&far).write_all(&first[..length])?;
    let (near_too, far_too) = (near.try_clone()?, far.try_clone()?);
    std::thread::spawn(move || forward(&far_too, &near_too));
    forward(near, &far);
    Ok(())
}

fn forward(from: &UnixStream, to: &UnixStream) {
    let _ = io::copy(&mut &*from, &mut &*to);
    let _ = to.shutdown(Shutdown::Write);
}

/// Returns the variable that makes an agent use the engine at this socket.
fn at(socket: &Path) -> (&'static str, String) {
    ("DOCKER_HOST", format!("unix://{}", socket.display()))
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_terminal_whose_connection_is_cut_is_named_as_the_reason() {
    let world = World::new();
    let wire = Wire::new(world.home().join("engine.sock"));
    let job = job("bash", &[RUN_FOR_EVER, "echo not reached"]);
    let path = world.file("job.json", job.to_string());
    let mut running = world.start_file_with(&path, |command| {
        let (name, value) = at(&wire.socket);
        command.env(name, value);
    });
    running.wait_for_output("running\n");
    wire.cut_terminals();
    let why = why(&running.finish());
    assert_eq!(leftovers_of(&job), [""; 0]);
    // Both the engine and the container still run.
    assert!(!why.contains("is gone"), "{why}");
    assert_says(&why, &["connection", "stream", "terminal"]);
}
