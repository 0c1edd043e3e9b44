//! The end of `agent serve`: signals, agents for a single job, and work that is completed before.

use std::fs;
use std::io::{BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use nix::sys::signal::Signal;
use openssl::ssl::SslStream;
use serde_json::{Value, json};
use tokio::time::Instant;

use test_support::callbacks::CallbackServer;
use test_support::http::{Answer, encode_request};
use test_support::serve::{ServeAgent, good_authorization};
use test_support::{RUN_UNTIL_GO, RUNNING, World, base64, job, processes_with, wait_until};

/// Generous for a busy machine, but much shorter than any time limit at the agent's end.
const AT_ONCE: Duration = Duration::from_secs(5);

/// Processes that ignore SIGTERM, inside and outside of the shell's process session.
const STUBBORN: [&str; 4] = [
    "nohup sleep 1000 >/dev/null 2>&1 &",
    "setsid -f bash -c \"trap '' TERM HUP INT; touch ~/up; while :; do sleep 1000; done\"",
    "until [[ -e ~/up ]]; do sleep 0.01; done; rm ~/up",
    "trap '' TERM HUP INT; echo running; while :; do sleep 1000; done",
];

const PROFILE: &str = "export FROM_PROFILE=1\n";
const KEYS: &str = "ssh-ed25519 AAAA own\n";

/// Returns a world with a login profile and authorized keys.
fn world() -> World {
    let world = World::new();
    fs::create_dir(world.home().join(".ssh")).unwrap();
    fs::write(world.home().join(".ssh/authorized_keys"), KEYS).unwrap();
    fs::write(world.home().join(".bash_profile"), PROFILE).unwrap();
    world
}

/// Returns a job with SSH access, and the marker of all its processes.
fn marked(commands: &[&str]) -> (Value, String) {
    let mut job = job("1", commands);
    job["ssh_public_keys"] = json!([base64(b"ssh-ed25519 AAAA of-the-job")]);
    test_support::marked(job)
}

fn with_callbacks(server: &CallbackServer, mut job: Value) -> Value {
    job["callbacks"] = json!({
        "finished": server.url("/finished"),
        "teardown_finished": server.url("/teardown_finished"),
    });
    job
}

fn assert_finished(server: &CallbackServer, result: &str) {
    let callback = server.next();
    assert_eq!((callback.path.as_str(), callback.body), ("/finished", json!({"result": result})));
}

/// Starts a server for two callbacks; it holds back the response to callback number `held` until the sender
/// allows it.
fn gated(held: usize) -> (mpsc::Sender<()>, CallbackServer) {
    let (open, gate) = mpsc::channel();
    let server = CallbackServer::answering(move |number| {
        if number == held {
            let _ = gate.recv();
        }
        200
    });
    (open, server)
}

fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Returns everything that is not as it was before the first job.
fn left_behind(world: &World, marker: &str) -> Vec<String> {
    let mut left = processes_with(marker);
    let expected = [
        (world.state(), &["tls"][..]),
        (world.home(), &[".bash_profile", ".ssh"]),
        (world.home().join(".ssh"), &["authorized_keys"]),
        (world.state().join(".."), &["agent_log", "home", "ssh_jump_point", "state", "working"]),
    ];
    for (directory, names) in expected {
        let found = names_in(&directory).into_iter();
        left.extend(found.filter(|name| !names.contains(&name.as_str())));
    }
    for (name, content) in [(".bash_profile", PROFILE), (".ssh/authorized_keys", KEYS)] {
        let found = fs::read_to_string(world.home().join(name)).unwrap();
        left.extend((found != content).then_some(found));
    }
    left
}

/// Starts an agent with this grace period, in seconds.
fn start(world: &World, grace: u64) -> ServeAgent {
    ServeAgent::start_with(world, |command| {
        command.arg(format!("--interruption-grace-period={grace}"));
    })
}

/// Starts a job and waits until it runs.
fn run(agent: &ServeAgent, job: &Value) {
    agent.post_job(job).of_status(200);
    agent.wait_for_log("1", RUNNING);
}

fn ask_to_end(agent: &ServeAgent, signal: Signal) {
    agent.signal(signal);
    agent.wait_for_own_log("asked to end");
}

/// Waits for the agent's end, for a limited time, and returns its exit code.
fn exit_code(agent: &mut ServeAgent, within: Duration) -> Option<i32> {
    let began = Instant::now();
    let status = agent.wait_for_exit();
    assert!(began.elapsed() < within, "it took {:?}", began.elapsed());
    status.code()
}

/// Asserts that the agent ends quickly, with exit code 0, and that its job has left nothing behind.
fn assert_ends_well(agent: &mut ServeAgent, world: &World, marker: &str) {
    assert_eq!(exit_code(agent, AT_ONCE), Some(0));
    TcpListener::bind(agent.address()).unwrap();
    assert_eq!(left_behind(world, marker), [""; 0]);
}

/// Reads the complete log as the archivator.
fn archived(agent: &ServeAgent) -> String {
    agent.wait_for_log("1", r#""event":"job_finished""#);
    format!("{:?}", agent.archive("1"))
}

fn go(world: &World) {
    fs::write(world.home().join("go"), "").unwrap();
}

fn ask_on(connection: &mut BufReader<SslStream<TcpStream>>, path: &str) -> Answer {
    let headers = [("Authorization", good_authorization())];
    connection.get_mut().write_all(&encode_request("GET", path, &headers, b"")).unwrap();
    Answer::read_from(connection, "GET").unwrap()
}

/// Starts an agent, and a reader of its job's log that stops reading.
fn with_slow_reader() -> (ServeAgent, SslStream<TcpStream>) {
    let agent = ServeAgent::start(&World::new());
    // More than an unread connection can buffer.
    agent.run_to_end(&job("1", &["head -c 40000000 /dev/zero | tr '\\0' x | fold -w 1000"]));
    let mut stream = agent.connect();
    let headers = [("Authorization", good_authorization())];
    stream.write_all(&encode_request("GET", "/jobs/1/log", &headers, b"")).unwrap();
    // The beginning of the log is in the connection's buffers; the rest does not fit.
    let mut first = vec![0; 60_000];
    wait_until(|| stream.get_ref().peek(&mut first).unwrap() == 60_000, || "no answer".into());
    (agent, stream)
}

#[test]
fn many_jobs_in_a_row_leave_nothing_behind() {
    let world = world();
    let mut agent = ServeAgent::start(&world);
    let of_agent = |what: &str| names_in(format!("/proc/{}/{what}", agent.pid()).as_ref()).len();
    let run = |id: usize| {
        let (mut request, marker) = marked(&["(sleep 1000 &) ; echo $TEST_MARKER"]);
        request["job_id"] = id.to_string().into();
        assert_eq!(agent.run_to_end(&request).result(), "passed");
        let left = left_behind(&world, &marker);
        // The last job's directory still holds its log.
        assert!(left.len() == 1 && left[0].starts_with("job-"), "{left:?}");
    };
    (0..5).for_each(run);
    let before = (of_agent("fd"), of_agent("task"));
    (5..40).for_each(run);
    // The last connections may not be closed yet.
    wait_until(
        || of_agent("fd") <= before.0 + 2 && of_agent("task") <= before.1,
        || format!("{} files and {} threads, not {before:?}", of_agent("fd"), of_agent("task")),
    );
    agent.signal(Signal::SIGTERM);
    assert_ends_well(&mut agent, &world, "no such marker");
}

#[test]
fn an_agent_for_a_single_job_ends_after_its_teardown() {
    let (open, server) = gated(1);
    let world = world();
    let mut agent = ServeAgent::start_with(&world, |command| {
        command.arg("--single-job");
    });
    agent.post_job(&json!({ "job_id": "" })).of_status(422);
    let (request, marker) = marked(&["false"]);
    let request = with_callbacks(&server, request);
    assert_eq!(agent.post_job(&request).message(), "ok");
    assert_finished(&server, "failed");
    agent.wait_for_log("1", "job_finished");
    server.assert_silent();
    agent.archive("1");
    assert_eq!(server.next().path, "/teardown_finished");
    let refused = agent.post_job(&job("2", &["touch ~/never"]));
    assert_eq!(refused.of_status(422).message(), "another job is already running");
    let same = agent.post_job(&request);
    assert_eq!(same.of_status(200).message(), "job is already running");
    open.send(()).unwrap();
    assert_ends_well(&mut agent, &world, &marker);
}

#[test]
fn an_idle_agent_ends_at_once() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let world = world();
        let mut agent = ServeAgent::start(&world);
        agent.run_to_end(&job("1", &["true"]));
        let mut used: Vec<_> = (0..20).map(|_| BufReader::new(agent.connect())).collect();
        for connection in &mut used {
            ask_on(connection, "/status").of_status(200);
        }
        let unused: Vec<_> = (0..20).map(|_| agent.connect()).collect();
        agent.signal(signal);
        assert_ends_well(&mut agent, &world, "no such marker");
        drop((used, unused));
    }
}

fn assert_ends_in_spite_of<T>(mut connect: impl FnMut(&ServeAgent) -> T) {
    let world = world();
    let mut agent = ServeAgent::start(&world);
    let _open: Vec<_> = (0..5).map(|_| connect(&agent)).collect();
    // Jobs are handled in the order in which they came.
    agent.get("/status").of_status(200);
    agent.signal(Signal::SIGTERM);
    assert_ends_well(&mut agent, &world, "no such marker");
}

fn begin_a_post(agent: &ServeAgent, missing: usize) -> SslStream<TcpStream> {
    let headers = [("Authorization", good_authorization())];
    let request = encode_request("POST", "/jobs", &headers, &[b' '; 100]);
    let mut stream = agent.connect();
    stream.write_all(&request[..request.len() - missing]).unwrap();
    stream
}

#[test]
fn connections_without_a_handshake_do_not_delay_the_end() {
    assert_ends_in_spite_of(|agent| TcpStream::connect(agent.address()).unwrap());
}

#[test]
fn unfinished_headers_do_not_delay_the_end() {
    assert_ends_in_spite_of(|agent| begin_a_post(agent, 110));
}

#[test]
fn unfinished_bodies_do_not_delay_the_end() {
    assert_ends_in_spite_of(|agent| begin_a_post(agent, 50));
}

#[test]
fn an_ending_agent_stops_its_job_and_delivers_the_log_and_callbacks() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let (open, server) = gated(0);
        let world = world();
        let mut agent = ServeAgent::start(&world);
        let (request, marker) = marked(&STUBBORN);
        run(&agent, &with_callbacks(&server, request));
        assert!(!processes_with(&marker).is_empty());
        agent.signal(signal);
        assert_finished(&server, "stopped");
        let refused = agent.post_job(&job("2", &["touch ~/never"]));
        assert!(!refused.of_status(503).message().is_empty());
        assert_eq!(agent.get("/status").of_status(200).json()["state"], "job-received");
        // The clean-up does not wait for the callback.
        wait_until(
            || processes_with(&marker).is_empty(),
            || format!("{:?}", processes_with(&marker)),
        );
        open.send(()).unwrap();
        assert!(archived(&agent).contains(r#"result: "stopped""#));
        let callback = server.next();
        assert_eq!((callback.path.as_str(), callback.body), ("/teardown_finished", json!({})));
        assert_ends_well(&mut agent, &world, &marker);
        assert_eq!(server.count(), 2);
    }
}

#[test]
fn a_job_that_is_sent_again_while_the_agent_ends_is_recognised() {
    let world = World::new();
    let mut agent = start(&world, 100);
    let request = job("1", &[RUN_UNTIL_GO]);
    run(&agent, &request);
    ask_to_end(&agent, Signal::SIGTERM);
    let same = agent.post_job(&request);
    go(&world);
    archived(&agent);
    assert_eq!(exit_code(&mut agent, AT_ONCE), Some(0));
    // If the agent refused the job, the platform would also run it elsewhere.
    assert_eq!((same.status, same.message()), (200, "job is already running".into()));
}

#[test]
fn a_job_that_just_started_is_stopped_and_delivered() {
    for delay in [0, 2, 5, 10, 20] {
        let world = world();
        let mut agent = ServeAgent::start(&world);
        let (request, marker) = marked(&["sleep 1000; touch ~/never"]);
        agent.post_job(&request).of_status(200);
        // The delays need not hit a specific moment: all are tried, and each must be handled.
        std::thread::park_timeout(Duration::from_millis(delay));
        agent.signal(Signal::SIGTERM);
        assert!(archived(&agent).contains(r#"result: "stopped""#));
        assert_ends_well(&mut agent, &world, &marker);
    }
}

#[test]
fn a_job_may_go_on_for_the_grace_period() {
    for (end, grace, result) in
        [("its own", 100, "passed"), ("a stop", 100, "stopped"), ("the period's", 2, "stopped")]
    {
        let server = CallbackServer::start();
        let world = world();
        let mut agent = start(&world, grace);
        let (mut request, marker) = marked(&[RUN_UNTIL_GO, "echo next"]);
        request["epilogue_always_commands"] = json!([{ "directive": "rm ~/go; echo epilogue" }]);
        run(&agent, &with_callbacks(&server, request));
        let began = Instant::now();
        ask_to_end(&agent, Signal::SIGTERM);
        agent.post_job(&job("2", &["touch ~/never"])).of_status(503);
        server.assert_silent();
        match end {
            "its own" => go(&world),
            "a stop" => _ = agent.post("/stop", b"").of_status(200),
            _ => {}
        }
        assert_finished(&server, result);
        let is_over = began.elapsed() >= Duration::from_secs(grace);
        assert_eq!(is_over, end == "the period's", "{end}: {:?}", began.elapsed());
        let log = archived(&agent);
        let went_on = log.contains("next\\n") && log.contains("epilogue\\n");
        assert_eq!(went_on, result == "passed", "{log}");
        assert_eq!(server.next().path, "/teardown_finished");
        assert_ends_well(&mut agent, &world, &marker);
    }
}

#[test]
fn a_second_signal_kills_a_stubborn_job() {
    let (int, term) = (Signal::SIGINT, Signal::SIGTERM);
    for (first, second, grace) in [(term, term, 100), (int, term, 100), (term, int, 0)] {
        let world = world();
        let mut agent = start(&world, grace);
        let (request, marker) = marked(&STUBBORN);
        run(&agent, &request);
        ask_to_end(&agent, first);
        agent.signal(second);
        // Less than the time that a stubborn job has after the first signal.
        assert_eq!(exit_code(&mut agent, Duration::from_secs(2)), Some(1));
        assert_eq!(left_behind(&world, &marker), [""; 0]);
    }
}

#[test]
fn a_second_signal_abandons_archivators_and_callbacks() {
    let slow = gated(0);
    let failing = CallbackServer::answering(|_| 500);
    let archivator = CallbackServer::start();
    for (what, server) in
        [("archivator", &archivator), ("a slow one", &slow.1), ("a failing one", &failing)]
    {
        let world = world();
        let mut agent = ServeAgent::start(&world);
        let (request, marker) = marked(&["echo running; (sleep 1000 &)"]);
        agent.post_job(&with_callbacks(server, request)).of_status(200);
        assert_finished(server, "passed");
        if what == "archivator" {
            agent.wait_for_log("1", "job_finished");
        }
        ask_to_end(&agent, Signal::SIGTERM);
        assert_eq!(agent.get("/status").of_status(200).json()["state"], "job-received");
        agent.signal(Signal::SIGTERM);
        assert_eq!(exit_code(&mut agent, AT_ONCE), Some(1), "{what}");
        assert_eq!(left_behind(&world, &marker), [""; 0], "{what}");
    }
}

#[test]
fn a_job_ends_soon_after_its_agent_is_killed() {
    let world = world();
    let mut agent = ServeAgent::start(&world);
    let (request, marker) = marked(&STUBBORN);
    run(&agent, &request);
    assert!(!processes_with(&marker).is_empty());
    nix::sys::signal::kill(agent.pid(), Signal::SIGKILL).unwrap();
    wait_until(|| TcpListener::bind(agent.address()).is_ok(), || "the port is in use".into());
    // The agent can't report the end of the clean-up, so the test watches the processes.
    let left = || left_behind(&world, &marker);
    wait_until(|| left().is_empty(), || format!("{:?}", left()));
    agent = ServeAgent::start(&world);
    assert_eq!(agent.run_to_end(&job("1", &["true"])).result(), "passed");
}

#[test]
fn a_slow_reader_gets_everything_before_the_end() {
    let (mut agent, stream) = with_slow_reader();
    let whole = agent.get("/jobs/1/log").body;
    ask_to_end(&agent, Signal::SIGTERM);
    let read = Answer::read_from(&mut BufReader::new(stream), "GET").unwrap();
    assert!(read.of_status(200).body == whole, "{} bytes of {}", read.body.len(), whole.len());
    assert_eq!(exit_code(&mut agent, AT_ONCE), Some(0));
}

#[test]
fn a_stuck_reader_does_not_block_the_end_for_ever() {
    let (mut agent, _reader) = with_slow_reader();
    agent.signal(Signal::SIGTERM);
    assert_eq!(exit_code(&mut agent, Duration::from_secs(45)), Some(0));
}

#[test]
fn a_second_signal_abandons_readers() {
    let (mut agent, _reader) = with_slow_reader();
    ask_to_end(&agent, Signal::SIGTERM);
    wait_until(|| TcpStream::connect(agent.address()).is_err(), || "it still listens".into());
    agent.signal(Signal::SIGTERM);
    exit_code(&mut agent, AT_ONCE);
}

#[test]
fn sighup_ends_neither_the_agent_nor_a_connection_nor_a_job() {
    let world = World::new();
    let agent = ServeAgent::start(&world);
    let mut connection = BufReader::new(agent.connect());
    ask_on(&mut connection, "/status").of_status(200);
    run(&agent, &job("1", &[RUN_UNTIL_GO]));
    agent.signal(Signal::SIGHUP);
    agent.wait_for_own_log("certificate reloaded");
    ask_on(&mut connection, "/jobs/1/log").of_status(200);
    fs::write(world.state().join("tls/server.crt"), "nonsense").unwrap();
    agent.signal(Signal::SIGHUP);
    agent.wait_for_own_log("certificate not reloaded");
    ask_on(&mut connection, "/status").of_status(200);
    go(&world);
    assert_eq!(agent.finish("1").result(), "passed");
    ask_on(&mut connection, "/status").of_status(200);
}
