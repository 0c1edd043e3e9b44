//! The own log of `agent serve`.

use std::fs;
use std::io::{BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use test_support::http::{Answer, encode_request};
use test_support::serve::{ServeAgent, command, good_authorization, refusal};
use test_support::{World, free_port, job, wait_for_end, wait_until};

const CANARY: &str = "canary";

fn log_file(world: &World) -> PathBuf {
    world.home().with_file_name("agent_log")
}

fn logging_to(path: &Path) -> impl FnOnce(&mut Command) {
    move |command| {
        command.env("SEMAPHORE_AGENT_LOG_FILE_PATH", path);
    }
}

/// Starts an agent on a known port, for log levels that hide the address.
fn start_on_known_port(mut agent: Command) -> (Child, SocketAddr) {
    let free = SocketAddr::from(([127, 0, 0, 1], free_port()));
    agent.env("SEMAPHORE_AGENT_PORT", free.port().to_string());
    (agent.stdout(Stdio::piped()).spawn().unwrap(), free)
}

/// Returns whether the agent responds to plain HTTP, if only with an error.
fn is_served(address: SocketAddr) -> bool {
    let answer = TcpStream::connect(address).and_then(|mut connection| {
        connection.write_all(b"GET ")?;
        connection.read(&mut [0])
    });
    answer.is_ok_and(|bytes| bytes == 1)
}

/// Ends the agent and returns its standard output.
fn end(child: Child) -> String {
    kill(Pid::from_raw(child.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    String::from_utf8(wait_for_end(child).stdout).unwrap()
}

/// Returns level and text of each line, without its time.
fn entries(log: &str) -> Vec<(&str, &str)> {
    log.lines()
        .map(|line| {
            let (time, rest) = line.split_once(' ').unwrap();
            assert!(time.len() == 24 && time.ends_with('Z'), "{line}");
            let (level, rest) = rest.split_at(6);
            (level.trim(), rest)
        })
        .collect()
}

#[test]
fn requests_are_logged_on_standard_output_and_in_the_file() {
    let world = World::new();
    let agent = ServeAgent::start(&world);
    agent.get("/status").of_status(200);
    agent.request("GET", "/jobs/1/log?start_from=7", &[], b"").of_status(401);
    agent.get("/nothing").of_status(404);
    agent.post("/jobs/", b"{}").of_status(422);
    let expected = [
        "request method=GET path=/status status=200 us=",
        "request method=GET path=/jobs/1/log status=401 us=",
        "request method=GET path=/nothing status=404 us=",
        "request method=POST path=/jobs/ status=422 us=",
    ];
    for text in expected {
        agent.wait_for_own_log(text);
    }
    let file = fs::read_to_string(log_file(&world)).unwrap();
    let logged: Vec<_> =
        entries(&file).into_iter().filter(|(_, t)| t.starts_with("request")).collect();
    assert_eq!(logged.len(), expected.len(), "{file}");
    for ((level, line), text) in logged.iter().zip(expected) {
        assert!(*level == "INFO" && line.starts_with(text), "{file}");
        assert!(line.contains("127.0.0.1:"), "{file}");
    }
    wait_until(|| agent.own_log() == file, || format!("{file} is not {}", agent.own_log()));
    assert_eq!(fs::metadata(log_file(&world)).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn the_log_is_served() {
    let world = World::new();
    let agent = ServeAgent::start(&world);
    agent.run_to_end(&job("1", &["true"]));
    let before = fs::read_to_string(log_file(&world)).unwrap();
    let answer = agent.get("/agent_logs");
    assert!(answer.of_status(200).header("content-type").unwrap().starts_with("text/plain"));
    assert!(answer.text().starts_with(&before), "{}", answer.text());
    assert!(before.contains("job started job=1") && before.contains("job torn down job=1"));
}

#[test]
fn the_configured_level_applies() {
    for (level, debug, info) in
        [("debug", true, true), ("", false, true), ("WARN", false, false), ("off", false, false)]
    {
        let world = World::new();
        let mut agent = command(&world);
        agent.env("SEMAPHORE_AGENT_LOG_LEVEL", level);
        let (child, address) = start_on_known_port(agent);
        wait_until(|| is_served(address), || format!("{level}: the agent does not listen"));
        wait_until(
            || !debug || fs::read_to_string(log_file(&world)).unwrap().contains(" DEBUG "),
            || format!("{level}: no line for debugging"),
        );
        let log = end(child);
        assert_eq!((log.contains(" DEBUG "), log.contains(" INFO ")), (debug, info), "{log}");
        assert_eq!(fs::read_to_string(log_file(&world)).unwrap(), log, "{level}");
    }
}

#[test]
fn an_invalid_setting_is_fatal() {
    let world = World::new();
    let cases = [
        ("SEMAPHORE_AGENT_LOG_LEVEL", "loud", "error, warn, info, debug"),
        ("SEMAPHORE_AGENT_LOG_MAX_SIZE", "0", "number of bytes"),
        ("SEMAPHORE_AGENT_LOG_MAX_SIZE", "10M", "number of bytes"),
        ("SEMAPHORE_AGENT_LOGS_COMPRESSION_SIZE", "1000", "1048576"),
    ];
    for (variable, value, why) in cases {
        let message = refusal(&world, |command| {
            command.env(variable, value);
        });
        let value = format!("`{value}`");
        for word in [variable, value.as_str(), why] {
            assert!(message.contains(word), "{word}: {message}");
        }
    }
}

#[test]
fn the_file_is_rotated_and_continued_after_a_restart() {
    let world = World::new();
    let small = |command: &mut Command| {
        command.env("SEMAPHORE_AGENT_LOG_MAX_SIZE", "5000");
    };
    let old = log_file(&world).with_file_name("agent_log.1");
    let agent = ServeAgent::start_with(&world, small);
    let mut requests = 0;
    wait_until(
        || {
            requests += 1;
            agent.get(&format!("/number-{requests}")).of_status(404);
            old.exists()
        },
        || "nothing is rotated".into(),
    );
    assert!((20..100).contains(&requests), "{requests}");
    agent.get("/the-last").of_status(404);
    agent.wait_for_own_log("/the-last");
    let served = agent.get("/agent_logs").text();
    let [first, second] = [&old, &log_file(&world)].map(|path| fs::read_to_string(path).unwrap());
    assert!(first.len() <= 5000 && first.len() > 4500, "{}", first.len());
    assert!(second.starts_with(&served) && served.contains("/the-last"), "{served}");
    wait_until(|| agent.own_log() == format!("{first}{second}"), || "lines are missing".into());
    drop(agent);

    let agent = ServeAgent::start_with(&world, small);
    assert!(agent.get("/agent_logs").text().starts_with(&second));
}

#[test]
fn a_file_that_can_not_be_written_is_a_warning() {
    let mut served = Vec::new();
    for kind in ["missing directory", "directory", "link", "device"] {
        let world = World::new();
        let target = world.file("target", CANARY);
        let path = match kind {
            "missing directory" => world.home().join("missing/log"),
            "directory" => world.home(),
            "device" => "/dev/null".into(),
            _ => {
                symlink(&target, world.home().join("link")).unwrap();
                world.home().join("link")
            }
        };
        let agent = ServeAgent::start_with(&world, logging_to(&path));
        let warning = format!("standard output only path={}", path.display());
        assert!(agent.own_log().contains(&warning), "{kind}: {}", agent.own_log());
        assert_eq!(agent.run_to_end(&job("1", &["true"])).result(), "passed");
        assert_eq!(fs::read_to_string(target).unwrap(), CANARY, "{kind}");
        assert!(agent.own_log().contains("job torn down"));
        // The agent has no log to serve, and must not serve a file that others put at its path.
        let headers = [("Authorization", good_authorization())];
        let answer = agent.try_request("GET", "/agent_logs", &headers, b"");
        if !answer.as_ref().is_ok_and(|answer| answer.status == 404) {
            served.push((kind, answer.map(|answer| (answer.status, answer.text()))));
        }
    }
    assert!(served.is_empty(), "{served:#?}");
}

#[test]
fn a_pipe_at_the_files_path_does_not_block_the_agent() {
    let world = World::new();
    let path = world.home().join("pipe");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut agent = command(&world);
    logging_to(&path)(&mut agent);
    let (child, address) = start_on_known_port(agent);
    let deadline = SystemTime::now() + Duration::from_secs(10);
    let mut serves = false;
    while !serves && SystemTime::now() < deadline {
        serves = is_served(address);
    }
    end(child);
    assert!(serves, "the agent waits for a reader of the pipe");
}

/// Redirects the agent's standard output to this shell script.
fn reading_with(reader: &str, command: &mut Command) {
    let mut shell = Command::new("bash");
    shell.args(["-c", &format!("exec \"$0\" \"$@\" > >({reader})")]);
    shell.arg(command.get_program()).args(command.get_args());
    shell.env_clear().envs(command.get_envs().map(|(name, value)| (name, value.unwrap())));
    shell.current_dir(command.get_current_dir().unwrap()).stdin(Stdio::null());
    *command = shell;
}

#[test]
fn unread_standard_output_does_not_block_the_agent() {
    for reader in ["head -n 1", "head -n 1; while kill -0 $$ 2> /dev/null; do sleep 0.01; done"] {
        let world = World::new();
        let mut agent = ServeAgent::start_with(&world, |command| {
            command.env("SEMAPHORE_AGENT_LOG_LEVEL", "debug");
            reading_with(reader, command);
        });
        let mut connection = BufReader::new(agent.connect());
        let request = encode_request("GET", "/is_alive", &[], b"");
        // More than the pipe and the agent's queue can hold.
        for _ in 0..6000 {
            connection.get_mut().write_all(&request).unwrap();
            Answer::read_from(&mut connection, "GET").unwrap().of_status(200);
        }
        assert_eq!(agent.run_to_end(&job("1", &["true"])).result(), "passed");
        let log = agent.get("/agent_logs").text();
        assert!(log.matches("path=/is_alive").count() >= 6000 && log.contains("job torn down"));
        agent.signal(Signal::SIGTERM);
        assert_eq!(agent.wait_for_exit().code(), Some(0), "{reader}");
        let read = agent.whole_log().matches("path=/is_alive").count();
        assert!(read < 6000, "{reader}: {read} lines were read after all");
    }
}
