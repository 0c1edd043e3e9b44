//! Clients that break the rules of the protocol while a job runs.

use std::io::{self, Read, Write as _};
use std::net::TcpStream;
use std::process::Command;

use test_support::http::encode_request;
use test_support::serve::{ServeAgent, good_authorization};
use test_support::{RUN_UNTIL_GO, RUNNING, World, job, wait_until};

/// Starts an agent with a running job.
fn busy(world: &World) -> ServeAgent {
    let agent = ServeAgent::start(world);
    agent.post_job(&job("1", &[RUN_UNTIL_GO, "echo next"])).of_status(200);
    agent.wait_for_log("1", RUNNING);
    agent
}

fn assert_well(agent: &ServeAgent) {
    assert_eq!(agent.request("GET", "/is_alive", &[], b"").text(), "yes");
    assert_eq!(agent.get("/status").of_status(200).json()["state"], "job-received");
}

fn assert_continues(world: &World, agent: &ServeAgent) {
    assert_well(agent);
    std::fs::write(world.home().join("go"), "").unwrap();
    let finished = agent.finish("1");
    assert_eq!((finished.result(), finished.output().as_str()), ("passed", "running\nnext\n"));
}

/// Waits until the peer has closed the connection; fails after a time limit.
fn assert_closed(what: &str, mut stream: impl Read) {
    let mut all = Vec::new();
    match stream.read_to_end(&mut all) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            panic!("{what}: the connection stays open: {}", String::from_utf8_lossy(&all))
        }
        _ => {}
    }
}

fn raw(agent: &ServeAgent) -> TcpStream {
    let stream = TcpStream::connect(agent.address()).unwrap();
    stream.set_read_timeout(Some(std::time::Duration::from_mins(1))).unwrap();
    stream
}

#[test]
fn plain_http_on_the_tls_port_is_closed() {
    let world = World::new();
    let agent = busy(&world);
    for request in [
        "GET /is_alive HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "\r\n\r\n",
        "\x16",
        "\x16\x03\x01\x02\x00\x01",
    ] {
        let mut stream = raw(&agent);
        stream.write_all(request.as_bytes()).unwrap();
        if request.len() > 8 {
            assert_closed(request, stream);
        }
        assert_well(&agent);
    }
    assert_continues(&world, &agent);
}

#[test]
fn unfinished_requests_are_closed_after_a_while() {
    let world = World::new();
    let agent = busy(&world);
    let authorization = [("Authorization", good_authorization())];
    let body = encode_request("POST", "/jobs", &authorization, &[b' '; 100]);
    let handshakes: Vec<_> = (0..20).map(|_| raw(&agent)).collect();
    let mut unfinished = Vec::new();
    for part in [&b"G"[..], b"GET /is_alive HTTP/1.1\r\nHost: loc", &body[..body.len() - 50]] {
        for _ in 0..20 {
            let mut stream = agent.connect();
            stream.get_ref().set_read_timeout(Some(std::time::Duration::from_mins(1))).unwrap();
            stream.write_all(part).unwrap();
            unfinished.push((String::from_utf8_lossy(part).into_owned(), stream));
        }
    }
    assert_well(&agent);
    for handshake in handshakes {
        assert_closed("no handshake", handshake);
    }
    for (what, stream) in unfinished {
        assert_closed(&what, stream);
    }
    assert_continues(&world, &agent);
}

#[test]
fn connections_may_break_off_anywhere() {
    let world = World::new();
    let agent = busy(&world);
    let authorization = [("Authorization", good_authorization())];
    let request = job("2", &["touch ~/never"]).to_string();
    let request = encode_request("POST", "/jobs", &authorization, request.as_bytes());
    for length in (0..request.len()).step_by(7) {
        let mut stream = agent.connect();
        stream.write_all(&request[..length]).unwrap();
        if length % 2 == 0 {
            stream.shutdown().unwrap();
        }
    }
    for _ in 0..50 {
        drop(raw(&agent));
    }
    assert_continues(&world, &agent);
    assert!(!world.home().join("never").exists());
}

#[test]
fn a_slow_body_is_accepted() {
    let world = World::new();
    let agent = ServeAgent::start(&world);
    let authorization = [("Authorization", good_authorization()), ("Connection", "close")];
    let request = job("1", &["echo hi"]).to_string();
    let request = encode_request("POST", "/jobs", &authorization, request.as_bytes());
    let mut stream = agent.connect();
    for byte in request {
        stream.write_all(&[byte]).unwrap();
        std::thread::park_timeout(std::time::Duration::from_millis(2));
    }
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(agent.finish("1").output(), "hi\n");
}

#[test]
fn a_thousand_idle_connections_shut_out_nobody() {
    let world = World::new();
    let agent = busy(&world);
    let plain: Vec<_> = (0..500).map(|_| raw(&agent)).collect();
    let secure: Vec<_> = (0..500).map(|_| agent.connect()).collect();
    assert_continues(&world, &agent);
    assert_eq!((plain.len(), secure.len()), (500, 500));
    drop((plain, secure));
    assert_eq!(agent.run_to_end(&job("2", &["true"])).result(), "passed");
}

#[test]
fn an_agent_with_few_file_descriptors_survives_many_connections() {
    let world = World::new();
    let agent = ServeAgent::start_with(&world, |command| limited(command, "ulimit -n 128"));
    agent.post_job(&job("1", &[RUN_UNTIL_GO, "(echo next > ~/next)"])).of_status(200);
    agent.wait_for_log("1", RUNNING);
    let many: Vec<_> = (0..300).map(|_| raw(&agent)).collect();
    std::fs::write(world.home().join("go"), "").unwrap();
    let goes_on = || std::fs::read(world.home().join("next")).is_ok_and(|text| !text.is_empty());
    wait_until(goes_on, || format!("the job does not go on: {}", agent.own_log()));
    drop(many);
    assert_eq!(agent.finish("1").result(), "passed");
}

#[test]
fn a_job_gets_the_agents_original_limit_of_open_files() {
    let agent = ServeAgent::start_with(&World::new(), |command| limited(command, "ulimit -Sn 100"));
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", agent.pid())).unwrap();
    let own = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert!(!own.contains(" 100 "), "{own}");
    assert_eq!(agent.run_to_end(&job("1", &["ulimit -Sn"])).output(), "100\n");
}

/// Makes the agent start from a shell that ran `first`.
fn limited(command: &mut Command, first: &str) {
    let mut limited = Command::new("bash");
    limited.args(["-c", &format!("{first}; exec \"$@\""), "bash"]).arg(command.get_program());
    limited.args(command.get_args()).env_clear();
    limited.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    limited.current_dir(command.get_current_dir().unwrap());
    *command = limited;
}

/// Returns the agent's peak memory, in KiB.
fn peak(agent: &ServeAgent) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn an_endless_body_takes_no_memory() {
    let world = World::new();
    let agent = busy(&world);
    let chunk = [format!("{:x}\r\n", 1 << 20).as_bytes(), &vec![b'x'; 1 << 20], b"\r\n"].concat();
    agent.get("/jobs/1/log").of_status(200);
    let before = peak(&agent);
    let good = ("Authorization", good_authorization());
    let bad = ("Authorization", "Bearer x");
    for (method, path, authorization) in [
        ("POST", "/jobs", bad),
        ("GET", "/status", good),
        ("GET", "/is_alive", bad),
        ("POST", "/nothing", good),
    ] {
        let mut stream = agent.connect();
        let headers = [authorization, ("Transfer-Encoding", "chunked")];
        stream.write_all(&encode_request(method, path, &headers, b"")).unwrap();
        // The agent may close the connection early, or read and discard the body.
        let _ = (0..1000).try_for_each(|_| stream.write_all(&chunk));
        assert_well(&agent);
    }
    assert!(peak(&agent) < before + 8 * 1024, "{} KiB after {before}", peak(&agent));
    for path in ["/jobs", "/stop"] {
        let mut stream = agent.connect();
        let headers = [good, ("Transfer-Encoding", "chunked")];
        stream.write_all(&encode_request("POST", path, &headers, b"")).unwrap();
        let _ = (0..1000).try_for_each(|_| stream.write_all(&chunk));
        assert_well(&agent);
    }
    // The agent may hold a body of the allowed size, and twice that while the parts are joined.
    assert!(peak(&agent) < before + 80 * 1024, "{} KiB after {before}", peak(&agent));
    assert_continues(&world, &agent);
}

#[test]
fn endless_headers_are_refused() {
    let world = World::new();
    let agent = busy(&world);
    let before = peak(&agent);
    let header = format!("x-{}: {}\r\n", "n".repeat(100), "v".repeat(1000));
    let mut stream = agent.connect();
    stream.write_all(b"GET /is_alive HTTP/1.1\r\nHost: localhost\r\n").unwrap();
    let sent = (0..100_000).try_for_each(|_| stream.write_all(header.as_bytes()));
    assert!(sent.is_err(), "100 MB of headers were accepted");
    assert!(peak(&agent) < before + 8 * 1024, "{} KiB after {before}", peak(&agent));
    assert_continues(&world, &agent);
}
