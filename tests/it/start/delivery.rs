//! Delivery of logs to a log server that limits memory, has lost a part, or is not a log server at all; and
//! logs that can't be delivered.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use actors::log::event::LogEvent;
use nix::sys::signal::Signal;
use serde_json::Value;

use test_support::control_plane::{Fault, Known, ReceivedRequest};
use test_support::jobs::{go, in_parts, wait_for_part};
use test_support::start::{Hub, SOON, StartAgent};
use test_support::{World, job, wait_until};

/// Maximum length of a line of output, in bytes without the line end.
const LONGEST: usize = 8000;

/// Returns the output lines of a job's log, without line ends.
fn output_lines(hub: &Hub, id: &str) -> Vec<String> {
    let log = hub.look(|known| known.jobs[id].log_bytes());
    let lines = String::from_utf8(log).unwrap();
    lines
        .lines()
        .filter(|line| line.contains(r#""event":"cmd_output""#))
        .map(str::to_owned)
        .collect()
}

#[test]
fn no_line_of_output_exceeds_the_log_stores_limit() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    let zeros = "head -c 100000 /dev/zero";
    let commands = [
        format!("{zeros} | tr '\\0' x"),
        format!("{zeros} | tr '\\0' '\\001'"),
        format!("{zeros} | tr '\\0' '\\n'"),
        format!("{zeros} | sed 's/\\x00/€\\\\/g'"),
    ];
    let commands: Vec<_> = commands.iter().map(String::as_str).collect();
    let finished = hub.run(&job("1", &commands));
    let expected = ["x", "\u{1}", "\n", "€\\"].map(|text| (text.repeat(100_000), 0));
    assert!(finished.commands() == expected, "{:?}", finished.result());
    let lengths: Vec<_> = output_lines(&hub, "1").iter().map(String::len).collect();
    assert!(lengths.iter().all(|length| *length <= LONGEST), "{lengths:?}");
    // The output is split into hardly more lines than necessary.
    let least = lengths.iter().sum::<usize>() / LONGEST;
    assert!(lengths.len() < 3 * least + 20, "{least}: {lengths:?}");
}

#[test]
fn the_agents_own_output_is_split_like_any_other() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    let mut request = job("1", &[&format!(": {}", "x".repeat(50_000))]);
    request["commands"][0]["alias"] = "an alias".into();
    let finished = hub.run(&request);
    assert_eq!(finished.result(), "passed");
    let lengths: Vec<_> = output_lines(&hub, "1").iter().map(String::len).collect();
    assert!(lengths.iter().all(|length| *length <= LONGEST), "{lengths:?}");
}

#[test]
fn output_of_one_second_is_one_line() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    let finished = hub.run(&job("1", &["for i in {1..300}; do echo $i; sleep 0.01; done"]));
    let expected: String = (1..=300).map(|number| format!("{number}\n")).collect();
    assert_eq!(finished.output(), expected);
    let seconds = finished.events.iter().filter_map(|event| match event {
        LogEvent::CmdOutput { timestamp, .. } => Some(*timestamp),
        _ => None,
    });
    let (lines, seconds) = (seconds.clone().count(), seconds.collect::<BTreeSet<_>>().len());
    // A batch may end within a second.
    assert!(lines <= 3 * seconds + 3, "{lines} lines in {seconds} s");
}

/// Returns a job that prints much output at once, and then runs many commands that print nothing.
fn job_with_much_output_at_the_beginning(id: &str) -> Value {
    let comment = format!("# {}", "x".repeat(3000));
    let mut commands = vec!["head -c 300000 /dev/zero | tr '\\0' x"];
    commands.extend(vec![comment.as_str(); 150]);
    job(id, &commands)
}

#[test]
fn much_output_at_the_beginning_does_not_use_up_the_space_for_later_output() {
    let hub = Hub::start(SOON);
    // The log has about 1.2 MB.
    hub.set(|settings| settings.memory = 2 << 20);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    let id = hub.queue(job_with_much_output_at_the_beginning("1"));
    assert_eq!(hub.result(&id), "passed");
    let refused = hub.look(|known| {
        known.requests.iter().filter(|received| received.status == Some(422)).count()
    });
    assert_eq!(refused, 0, "the log was trimmed");
    assert_eq!(hub.finish(&id).result(), "passed");
}

/// Waits for a second: shorter failures do not count as outages.
fn outlast_hiccups(hub: &Hub) {
    assert_eq!(hub.wait_for(Duration::from_millis(1500), |_| None::<()>), None);
}

#[test]
fn a_log_arrives_completely_although_the_log_server_lost_its_beginning() {
    let mut hub = Hub::start(SOON);
    let world = World::new();
    let agent = StartAgent::start(&world, &hub);
    hub.queue(job("1", &[&in_parts(&["echo one", "echo two", "echo three"])]));
    hub.wait_for_log("1", "one");
    hub.pause();
    go(&world, 0);
    wait_for_part(&world, 1);
    agent.wait_for_own_log("the log server did not accept a batch; retrying");
    outlast_hiccups(&hub);
    hub.lose_logs();
    hub.resume().unwrap();
    hub.wait_for_log("1", "two");
    go(&world, 1);
    go(&world, 2);
    assert_eq!(hub.finish("1").output(), "one\ntwo\nthree\n");
}

#[test]
fn a_log_server_that_returns_errors_for_a_while_may_have_lost_a_log() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let agent = StartAgent::start(&world, &hub);
    hub.queue(job("1", &[&in_parts(&["echo one", "echo two", "echo three"])]));
    hub.wait_for_log("1", "one");
    hub.fail(Fault::Status(503), ReceivedRequest::is_log);
    go(&world, 0);
    wait_for_part(&world, 1);
    agent.wait_for_own_log("the log server did not accept a batch; retrying");
    outlast_hiccups(&hub);
    hub.lose_logs();
    hub.misbehave(None);
    hub.wait_for_log("1", "two");
    go(&world, 1);
    go(&world, 2);
    assert_eq!(hub.finish("1").output(), "one\ntwo\nthree\n");
}

#[test]
fn a_response_of_another_server_is_no_acknowledgment() {
    for fault in [Fault::Page, Fault::Nonsense, Fault::Status(202), Fault::Status(204)] {
        let hub = Hub::start(SOON);
        let world = World::new();
        let _agent = StartAgent::start(&world, &hub);
        let mut left = 2;
        hub.fail(fault, move |received| {
            let is_hit = left > 0 && received.is_log();
            left -= u32::from(is_hit);
            is_hit
        });
        let id = hub.queue(job("1", &["echo hi"]));
        assert_eq!(hub.result(&id), "passed", "{fault:?}");
        let log = hub.look(|known| known.jobs[&id].log_bytes());
        assert!(!log.is_empty(), "nothing arrived: {fault:?}");
        assert_eq!(hub.finish(&id).output(), "hi\n", "{fault:?}");
    }
}

#[test]
fn an_html_page_does_not_disconnect_an_agent() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let mut agent = StartAgent::start(&world, &hub);
    hub.wait_for_state("waiting-for-jobs");
    let mut left = 2;
    hub.fail(Fault::Page, move |received| {
        let is_hit = left > 0 && received.is("POST", "/disconnect");
        left -= u32::from(is_hit);
        is_hit
    });
    agent.signal(Signal::SIGTERM);
    assert_eq!(agent.exit_code(), Some(0));
    assert_eq!(hub.look(|known| known.disconnected), 1);
}

/// Starts an agent that gives up undelivered logs after this time, in seconds.
fn impatient(world: &World, hub: &Hub, seconds: u32) -> StartAgent {
    StartAgent::start_with(world, hub, |command| {
        command.arg(format!("--log-delivery-timeout={seconds}"));
    })
}

#[test]
fn a_log_without_a_requested_upload_is_not_reported_as_missing() {
    let hub = Hub::start(SOON);
    let world = World::new();
    hub.fail(Fault::Status(500), ReceivedRequest::is_log);
    let agent = impatient(&world, &hub, 0);
    // It was a race which of the two waits ended first.
    for number in 0..10 {
        let id = hub.queue(job(&number.to_string(), &["true"]));
        assert_eq!(hub.result(&id), "passed");
    }
    let own_log = agent.wait_for_own_log("a part of the job's log was not delivered");
    assert!(!own_log.contains("was not uploaded"), "{own_log}");
}

#[test]
fn the_path_of_an_undelivered_log_is_logged() {
    let hub = Hub::start(SOON);
    let world = World::new();
    hub.fail(Fault::Status(500), ReceivedRequest::is_log);
    let agent = impatient(&world, &hub, 0);
    let id = hub.queue(job("1", &["true"]));
    assert_eq!(hub.result(&id), "passed");
    let own_log = agent.wait_for_own_log("a part of the job's log was not delivered");
    let line = own_log.lines().find(|line| line.contains("was not delivered")).unwrap();
    assert!(!line.contains("\\\""), "{line}");
    assert!(line.contains(world.state().join("undelivered").to_str().unwrap()), "{line}");
}

/// Runs a job whose log can't be delivered, but whose result is reported.
fn leave_undelivered(hub: &Hub, id: &str, command: &str) {
    hub.fail(Fault::Status(500), ReceivedRequest::is_log);
    let id = hub.queue(job(id, &[command]));
    assert_eq!(hub.result(&id), "passed");
    hub.wait_for_state("waiting-for-jobs");
}

/// Makes a large sparse file that looks like an old undelivered log.
fn plant_old(directory: &Path, number: usize) {
    let file = File::create_new(directory.join(format!("old-{number}.1.jsonl"))).unwrap();
    file.set_len(1 << 30).unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000)).unwrap();
}

#[test]
fn undelivered_logs_do_not_pile_up_for_ever() {
    const MANY: usize = 2000;
    let hub = Hub::start(SOON);
    let world = World::new();
    let kept = world.state().join("undelivered");
    fs::create_dir_all(&kept).unwrap();
    for directory in [world.state(), kept.clone()] {
        fs::set_permissions(directory, std::os::unix::fs::PermissionsExt::from_mode(0o700))
            .unwrap();
    }
    (0..MANY).for_each(|number| plant_old(&kept, number));
    let _agent = impatient(&world, &hub, 0);
    leave_undelivered(&hub, "late", "echo late");
    let old = || {
        let names = fs::read_dir(&kept).unwrap().filter_map(|entry| Some(entry.ok()?.file_name()));
        names.filter(|name| name.to_string_lossy().starts_with("old-")).count()
    };
    wait_until(|| old() < MANY, || "no old log was deleted".to_owned());
}

/// Returns the files that are kept of undelivered logs.
fn kept(world: &World) -> Vec<String> {
    let Ok(entries) = fs::read_dir(world.state().join("undelivered")) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Returns the logs among these files.
fn kept_logs(world: &World) -> Vec<String> {
    kept(world)
        .into_iter()
        .filter(|name| Path::new(name).extension().is_some_and(|extension| extension == "jsonl"))
        .collect()
}

#[test]
fn an_undelivered_log_is_delivered_when_the_log_server_is_back() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let agent = impatient(&world, &hub, 1);
    for id in ["1", "2"] {
        leave_undelivered(&hub, id, &format!("echo the output of {id}"));
    }
    assert_eq!(kept_logs(&world).len(), 2, "{:?}", kept(&world));
    for name in kept(&world) {
        let file = fs::metadata(world.state().join("undelivered").join(&name)).unwrap();
        assert_eq!(file.permissions().mode() & 0o777, 0o600, "{name}");
    }
    hub.misbehave(None);
    // Delivered after the next job's end at the latest.
    let next = hub.queue(job("next", &["echo next"]));
    assert_eq!(hub.finish(&next).output(), "next\n");
    for id in ["1", "2"] {
        hub.wait_for_log(id, r#""event":"job_finished""#);
        assert_eq!(hub.finish(id).output(), format!("the output of {id}\n"), "of {id}");
    }
    wait_until(|| kept(&world).is_empty(), || format!("{:?} are kept", kept(&world)));
    assert!(!agent.own_log().contains("the output of"), "{}", agent.own_log());
    // The results of the jobs are not reported again.
    let results = |known: &Known| {
        let finished = known.reports.iter().filter(|report| report["state"] == "finished-job");
        finished.filter_map(|report| report["job_id"].as_str().map(str::to_owned)).collect()
    };
    let results: Vec<String> = hub.look(results);
    let mut ids = results.clone();
    ids.dedup();
    assert_eq!(ids, ["1", "2", "next"], "{results:?}");
}

#[test]
fn an_undelivered_log_is_kept_while_delivery_fails() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = impatient(&world, &hub, 0);
    leave_undelivered(&hub, "1", "echo one");
    leave_undelivered(&hub, "2", "echo two");
    let all = kept_logs(&world);
    assert_eq!(all.len(), 2, "{all:?}");
    for (id, text) in [("1.", "one"), ("2.", "two")] {
        let name = all.iter().find(|name| name.starts_with(id)).unwrap();
        let log = fs::read(world.state().join("undelivered").join(name)).unwrap();
        let log = String::from_utf8_lossy(&log).into_owned();
        assert!(log.contains(&format!(r#""output":"{text}\n""#)), "{log}");
        assert!(log.contains(r#""event":"job_finished""#), "{log}");
    }
}
