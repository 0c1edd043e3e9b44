//! Logs on their way to a log server that counts memory, has lost some, or is another one; and what can't
//! be delivered.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use actors::log::event::LogEvent;
use nix::sys::signal::Signal;
use serde_json::Value;

use test_support::control_plane::{Asked, Fault, Known};
use test_support::jobs::{go, in_parts, wait_for_part};
use test_support::start::{Hub, SOON, StartAgent};
use test_support::{World, job, wait_until};

/// What one line of output may be long, in bytes, without its end.
const LONGEST: usize = 8000;

/// The lines of a job's log that have output, without their ends.
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
fn no_line_of_output_is_longer_than_the_store_likes() {
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
    // Not many more than there must be.
    let least = lengths.iter().sum::<usize>() / LONGEST;
    assert!(lengths.len() < 3 * least + 20, "{least}: {lengths:?}");
}

#[test]
fn what_the_agent_itself_prints_is_cut_like_any_output() {
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

/// Much output at once, and then many commands that print nothing.
fn much_and_then_little(id: &str) -> Value {
    let comment = format!("# {}", "x".repeat(3000));
    let mut commands = vec!["head -c 300000 /dev/zero | tr '\\0' x"];
    commands.extend(vec![comment.as_str(); 150]);
    job(id, &commands)
}

#[test]
fn much_output_at_the_beginning_does_not_use_up_the_space_for_what_follows() {
    let hub = Hub::start(SOON);
    // The log has about 1.2 MB.
    hub.set(|settings| settings.memory = 2 << 20);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    let id = hub.queue(much_and_then_little("1"));
    assert_eq!(hub.result(&id), "passed");
    let refused =
        hub.look(|known| known.requests.iter().filter(|asked| asked.status == Some(422)).count());
    assert_eq!(refused, 0, "the log is trimmed");
    assert_eq!(hub.finish(&id).result(), "passed");
}

/// What has gone on for a second is an outage.
fn outlast_hiccups(hub: &Hub) {
    assert_eq!(hub.wait_for(Duration::from_millis(1500), |_| None::<()>), None);
}

#[test]
fn a_log_arrives_whole_though_the_log_server_lost_its_beginning() {
    let mut hub = Hub::start(SOON);
    let world = World::new();
    let agent = StartAgent::start(&world, &hub);
    hub.queue(job("1", &[&in_parts(&["echo one", "echo two", "echo three"])]));
    hub.wait_for_log("1", "one");
    hub.pause();
    go(&world, 0);
    wait_for_part(&world, 1);
    agent.wait_for_own_log("log not taken, trying again");
    outlast_hiccups(&hub);
    hub.lose_logs();
    hub.resume().unwrap();
    hub.wait_for_log("1", "two");
    go(&world, 1);
    go(&world, 2);
    assert_eq!(hub.finish("1").output(), "one\ntwo\nthree\n");
}

#[test]
fn a_log_server_that_answers_with_errors_for_a_while_may_have_lost_a_log() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let agent = StartAgent::start(&world, &hub);
    hub.queue(job("1", &[&in_parts(&["echo one", "echo two", "echo three"])]));
    hub.wait_for_log("1", "one");
    hub.fail(Fault::Status(503), Asked::is_log);
    go(&world, 0);
    wait_for_part(&world, 1);
    agent.wait_for_own_log("log not taken, trying again");
    outlast_hiccups(&hub);
    hub.lose_logs();
    hub.misbehave(None);
    hub.wait_for_log("1", "two");
    go(&world, 1);
    go(&world, 2);
    assert_eq!(hub.finish("1").output(), "one\ntwo\nthree\n");
}

#[test]
fn an_answer_that_no_log_server_gives_is_no_acknowledgment() {
    for fault in [Fault::Page, Fault::Nonsense, Fault::Status(202), Fault::Status(204)] {
        let hub = Hub::start(SOON);
        let world = World::new();
        let _agent = StartAgent::start(&world, &hub);
        let mut left = 2;
        hub.fail(fault, move |asked| {
            let is_met = left > 0 && asked.is_log();
            left -= u32::from(is_met);
            is_met
        });
        let id = hub.queue(job("1", &["echo hi"]));
        assert_eq!(hub.result(&id), "passed", "{fault:?}");
        let log = hub.look(|known| known.jobs[&id].log_bytes());
        assert!(!log.is_empty(), "nothing arrived: {fault:?}");
        assert_eq!(hub.finish(&id).output(), "hi\n", "{fault:?}");
    }
}

#[test]
fn a_page_of_somebody_else_does_not_disconnect_an_agent() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let mut agent = StartAgent::start(&world, &hub);
    hub.wait_for_state("waiting-for-jobs");
    let mut left = 2;
    hub.fail(Fault::Page, move |asked| {
        let is_met = left > 0 && asked.is("POST", "/disconnect");
        left -= u32::from(is_met);
        is_met
    });
    agent.signal(Signal::SIGTERM);
    assert_eq!(agent.exit_code(), Some(0));
    assert_eq!(hub.look(|known| known.disconnected), 1);
}

/// An agent that gives up undelivered logs after so many seconds.
fn impatient(world: &World, hub: &Hub, seconds: u32) -> StartAgent {
    StartAgent::start_with(world, hub, |command| {
        command.arg(format!("--log-delivery-timeout={seconds}"));
    })
}

#[test]
fn a_log_that_is_not_to_be_uploaded_is_not_reported_as_not_uploaded() {
    let hub = Hub::start(SOON);
    let world = World::new();
    hub.fail(Fault::Status(500), Asked::is_log);
    let agent = impatient(&world, &hub, 0);
    // Which of two ends of the waiting came first was up to chance.
    for number in 0..10 {
        let id = hub.queue(job(&number.to_string(), &["true"]));
        assert_eq!(hub.result(&id), "passed");
    }
    let own_log = agent.wait_for_own_log("a part of the job's log was not delivered");
    assert!(!own_log.contains("was not uploaded"), "{own_log}");
}

#[test]
fn the_place_of_an_undelivered_log_is_told_as_a_path() {
    let hub = Hub::start(SOON);
    let world = World::new();
    hub.fail(Fault::Status(500), Asked::is_log);
    let agent = impatient(&world, &hub, 0);
    let id = hub.queue(job("1", &["true"]));
    assert_eq!(hub.result(&id), "passed");
    let own_log = agent.wait_for_own_log("a part of the job's log was not delivered");
    let line = own_log.lines().find(|line| line.contains("was not delivered")).unwrap();
    assert!(!line.contains("\\\""), "{line}");
    assert!(line.contains(world.state().join("undelivered").to_str().unwrap()), "{line}");
}

/// A job whose log nobody takes, but whose result is told.
fn leave_undelivered(hub: &Hub, id: &str, command: &str) {
    hub.fail(Fault::Status(500), Asked::is_log);
    let id = hub.queue(job(id, &[command]));
    assert_eq!(hub.result(&id), "passed");
    hub.wait_for_state("waiting-for-jobs");
}

/// A file of an undelivered log as a long time ago, which takes no space but claims to.
fn plant_old(directory: &Path, number: usize) {
    let file = File::create_new(directory.join(format!("old-{number}.1.jsonl"))).unwrap();
    file.set_len(1 << 30).unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000)).unwrap();
}

#[test]
fn what_can_not_be_delivered_does_not_pile_up_for_ever() {
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
    wait_until(|| old() < MANY, || "2 TB of old logs stay, and one more".to_owned());
}

/// What is kept of undelivered logs.
fn kept(world: &World) -> Vec<String> {
    let Ok(entries) = fs::read_dir(world.state().join("undelivered")) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// The logs among that.
fn kept_logs(world: &World) -> Vec<String> {
    kept(world)
        .into_iter()
        .filter(|name| Path::new(name).extension().is_some_and(|extension| extension == "jsonl"))
        .collect()
}

#[test]
fn a_log_that_was_not_delivered_is_as_soon_as_the_log_server_is_back() {
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
    // At the latest after the next job's end.
    let next = hub.queue(job("next", &["echo next"]));
    assert_eq!(hub.finish(&next).output(), "next\n");
    for id in ["1", "2"] {
        hub.wait_for_log(id, r#""event":"job_finished""#);
        assert_eq!(hub.finish(id).output(), format!("the output of {id}\n"), "of {id}");
    }
    wait_until(|| kept(&world).is_empty(), || format!("{:?} are kept", kept(&world)));
    assert!(!agent.own_log().contains("the output of"), "{}", agent.own_log());
    // The jobs are over, and nothing else is told again.
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
fn a_log_that_still_can_not_be_delivered_stays() {
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
