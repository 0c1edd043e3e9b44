//! Neither clients without a token nor the output of jobs can push other entries out of the agent's own log.

use std::fs;
use std::io::{BufReader, Write as _};
use std::time::{Duration, SystemTime};

use serde_json::json;

use test_support::http::{Answer, encode_request};
use test_support::serve::{ServeAgent, good_authorization};
use test_support::{World, job};

/// The size at which the log is rotated; one old file is kept.
const SIZE: usize = 200_000;

/// An entry that must stay in the log.
const WORTH_KEEPING: &str = "job torn down job=1";

/// Starts an agent with a small log, which contains an entry worth keeping.
fn start(world: &World) -> ServeAgent {
    let agent = ServeAgent::start_with(world, |command| {
        command.env("SEMAPHORE_AGENT_LOG_MAX_SIZE", SIZE.to_string());
    });
    agent.run_to_end(&job("1", &["true"]));
    agent
}

/// Returns the current and the rotated file.
fn kept(world: &World) -> String {
    let path = world.home().with_file_name("agent_log");
    let old = fs::read_to_string(path.with_extension("1")).unwrap_or_default();
    old + &fs::read_to_string(path).unwrap()
}

/// Sends the same request repeatedly.
fn ask_often(agent: &ServeAgent, times: usize, request: &[u8]) {
    ask(agent, std::iter::repeat_n(request.to_vec(), times));
}

/// Sends requests on one connection, or on a new one if the agent has closed it.
fn ask(agent: &ServeAgent, requests: impl IntoIterator<Item = Vec<u8>>) {
    let mut connection = BufReader::new(agent.connect());
    for request in requests {
        let sent = connection.get_mut().write_all(&request);
        if sent.is_err() || Answer::read_from(&mut connection, "GET").is_err() {
            connection = BufReader::new(agent.connect());
        }
    }
}

#[test]
fn long_requests_without_a_token_do_not_rotate_the_log() {
    let filler = "x".repeat(30_000);
    for (method, path) in [("GET", format!("/{filler}").as_str()), (filler.as_str(), "/jobs")] {
        let world = World::new();
        let agent = start(&world);
        ask_often(&agent, 30, &encode_request(method, path, &[], b""));
        agent.get("/status").of_status(200);
        let log = kept(&world);
        assert!(log.contains(WORTH_KEEPING), "{} bytes are left", log.len());
        let longest = log.lines().map(str::len).max().unwrap();
        assert!(longest < 4000, "a line of {longest} bytes");
    }
}

#[test]
fn long_requests_with_a_token_are_logged_in_short_lines() {
    let world = World::new();
    let agent = start(&world);
    let path = format!("/jobs/{}/log", "x".repeat(30_000));
    let headers = [("Authorization", good_authorization())];
    ask_often(&agent, 30, &encode_request("GET", &path, &headers, b""));
    agent.get("/status").of_status(200);
    let longest = kept(&world).lines().map(str::len).max().unwrap();
    assert!(longest < 4000, "a line of {longest} bytes");
}

/// Returns the number of refusals in the lines that summarise many.
fn counted(log: &str) -> usize {
    let lines = log.lines().filter(|line| line.contains("refused") && !line.contains("/flood-"));
    let count = |line: &str| {
        let words = line.split(|c: char| c.is_whitespace() || "=,;:()\"".contains(c));
        words.filter_map(|word| word.parse().ok()).filter(|number: &usize| *number <= MANY).max()
    };
    lines.filter_map(count).sum()
}

/// Enough requests to find out that a token is wrong.
const MANY: usize = 350;

/// Upper bound for lines about single refusals.
const TOO_MANY: usize = 30;

#[test]
fn many_requests_without_a_token_are_counted_and_not_listed() {
    /// How long the agent may wait before it logs the number of refusals.
    const PATIENCE: Duration = Duration::from_secs(90);
    let world = World::new();
    let agent = start(&world);
    let filler = "x".repeat(1000);
    let path = |number| format!("/flood-{number}/{filler}");
    ask(&agent, (0..MANY).map(|number| encode_request("GET", &path(number), &[], b"")));
    agent.get("/status").of_status(200);

    let deadline = SystemTime::now() + PATIENCE;
    while counted(&kept(&world)) < MANY - TOO_MANY {
        assert!(SystemTime::now() < deadline, "the number of refusals is not logged");
        std::thread::park_timeout(Duration::from_millis(50));
    }
    let log = kept(&world);
    let listed = log.lines().filter(|line| line.contains("/flood-")).count();
    assert!((1..TOO_MANY).contains(&listed), "{listed} lines about single refusals");
    let is_about_them = |line: &&str| line.contains("status=401") || line.contains("refused");
    let about_them = log.lines().filter(is_about_them).count();
    assert!(about_them < TOO_MANY + 5, "{about_them} lines");
    // Requests with a token are still logged.
    assert!(log.contains("path=/status status=200"), "{log}");
    assert!(log.contains(WORTH_KEEPING));
}

#[test]
fn the_output_of_a_host_setup_command_does_not_rotate_the_log() {
    let world = World::new();
    let agent = start(&world);
    let mut request = job("2", &["true"]);
    request["executor"] = "dockercompose".into();
    let setup = json!([{ "directive": "seq 1000000 1100000; exit 3" }]);
    let containers = json!([{ "name": "main", "image": "agent-test/bash" }]);
    request["compose"] = json!({ "containers": containers, "host_setup_commands": setup });
    // The command fails before the agent contacts the engine.
    let finished = agent.run_to_end(&request);
    assert_eq!(finished.result(), "failed");
    let log = kept(&world);
    assert!(log.contains(WORTH_KEEPING), "{} bytes are left", log.len());
    // The end of the output is logged, to find out why the command failed.
    assert!(log.contains("1100000") || finished.output().contains("1100000"), "{log}");
}
