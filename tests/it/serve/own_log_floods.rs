//! Who has no token does not decide what stays in the agent's own log, nor does what jobs print.

use std::fs;
use std::io::{BufReader, Write as _};
use std::time::{Duration, SystemTime};

use serde_json::json;

use test_support::http::{Answer, encode_request};
use test_support::serve::{ServeAgent, good_authorization};
use test_support::{World, job};

/// The size at which the log is rotated: two of that are kept.
const SIZE: usize = 200_000;

/// What must not be pushed out.
const WORTH_KEEPING: &str = "job torn down job=1";

/// An agent with a small log in which something is worth keeping.
fn start(world: &World) -> ServeAgent {
    let agent = ServeAgent::start_with(world, |command| {
        command.env("SEMAPHORE_AGENT_LOG_MAX_SIZE", SIZE.to_string());
    });
    agent.run_to_end(&job("1", &["true"]));
    agent
}

/// The file and the one before.
fn kept(world: &World) -> String {
    let path = world.home().with_file_name("agent_log");
    let old = fs::read_to_string(path.with_extension("1")).unwrap_or_default();
    old + &fs::read_to_string(path).unwrap()
}

/// Asks this again and again.
fn ask_often(agent: &ServeAgent, times: usize, request: &[u8]) {
    ask(agent, std::iter::repeat_n(request.to_vec(), times));
}

/// Asks on one connection, or on a new one if the agent has closed it.
fn ask(agent: &ServeAgent, requests: impl IntoIterator<Item = Vec<u8>>) {
    let mut connection = BufReader::new(agent.connect());
    for request in requests {
        let asked = connection.get_mut().write_all(&request);
        if asked.is_err() || Answer::read_from(&mut connection, "GET").is_err() {
            connection = BufReader::new(agent.connect());
        }
    }
}

#[test]
fn long_requests_without_a_token_push_nothing_out() {
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
fn long_requests_with_a_token_are_noted_in_short_lines_too() {
    let world = World::new();
    let agent = start(&world);
    let path = format!("/jobs/{}/log", "x".repeat(30_000));
    let headers = [("Authorization", good_authorization())];
    ask_often(&agent, 30, &encode_request("GET", &path, &headers, b""));
    agent.get("/status").of_status(200);
    let longest = kept(&world).lines().map(str::len).max().unwrap();
    assert!(longest < 4000, "a line of {longest} bytes");
}

/// How many refusals lines tell of that tell of many.
fn counted(log: &str) -> usize {
    let lines = log.lines().filter(|line| line.contains("refused") && !line.contains("/flood-"));
    let count = |line: &str| {
        let words = line.split(|c: char| c.is_whitespace() || "=,;:()\"".contains(c));
        words.filter_map(|word| word.parse().ok()).filter(|number: &usize| *number <= MANY).max()
    };
    lines.filter_map(count).sum()
}

/// More requests than anybody needs to find out that a token is wrong.
const MANY: usize = 350;

/// More lines about single ones than are of use.
const TOO_MANY: usize = 30;

#[test]
fn many_requests_without_a_token_are_counted_and_not_listed() {
    /// How long a count may wait for more to count.
    const PATIENCE: Duration = Duration::from_secs(90);
    let world = World::new();
    let agent = start(&world);
    let filler = "x".repeat(1000);
    let path = |number| format!("/flood-{number}/{filler}");
    ask(&agent, (0..MANY).map(|number| encode_request("GET", &path(number), &[], b"")));
    agent.get("/status").of_status(200);

    let deadline = SystemTime::now() + PATIENCE;
    while counted(&kept(&world)) < MANY - TOO_MANY {
        assert!(SystemTime::now() < deadline, "nothing says how many were refused");
        std::thread::park_timeout(Duration::from_millis(50));
    }
    let log = kept(&world);
    let listed = log.lines().filter(|line| line.contains("/flood-")).count();
    assert!((1..TOO_MANY).contains(&listed), "{listed} lines about single ones");
    let is_about_them = |line: &&str| line.contains("status=401") || line.contains("refused");
    let about_them = log.lines().filter(is_about_them).count();
    assert!(about_them < TOO_MANY + 5, "{about_them} lines");
    // What somebody with a token asks is noted as ever.
    assert!(log.contains("path=/status status=200"), "{log}");
    assert!(log.contains(WORTH_KEEPING));
}

#[test]
fn what_a_host_setup_command_prints_pushes_nothing_out() {
    let world = World::new();
    let agent = start(&world);
    let mut request = job("2", &["true"]);
    request["executor"] = "dockercompose".into();
    let setup = json!([{ "directive": "seq 1000000 1100000; exit 3" }]);
    let containers = json!([{ "name": "main", "image": "agent-test/bash" }]);
    request["compose"] = json!({ "containers": containers, "host_setup_commands": setup });
    // The command fails before any engine is asked for.
    let finished = agent.run_to_end(&request);
    assert_eq!(finished.result(), "failed");
    let log = kept(&world);
    assert!(log.contains(WORTH_KEEPING), "{} bytes are left", log.len());
    // The end of what it printed is somewhere, to find out why it failed.
    assert!(log.contains("1100000") || finished.output().contains("1100000"), "{log}");
}
