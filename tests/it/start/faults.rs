//! Logs and results arrive completely, whatever happens to the control plane and on the way to it.

use std::fs;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use test_support::control_plane::{Fault, ReceivedRequest};
use test_support::finished::events;
use test_support::jobs::{go, in_parts, wait_for_part};
use test_support::start::{Hub, SOON, StartAgent};
use test_support::{Finished, RUN_FOR_EVER, RUNNING, World, job, wait_for_file};

/// The agent's log message for the first failure of each kind.
const NOT_TAKEN: &str = "the log server did not accept a batch; retrying";
const NOT_REPORTED: &str = "the report to the control plane failed";

/// Parts of a command that print lines of all lengths, and the output of each.
const PARTS: [&str; 4] =
    ["numbers 1 400", "numbers 401 900", "numbers 901 1500", "numbers 1501 1600"];
const NUMBERS: &str =
    "numbers() { for ((i=$1; i<=$2; i++)); do printf '%0*d €\\n' $((i * 37 % 300 + 5)) $i; done; }";

fn numbers(first: usize, last: usize) -> String {
    (first..=last).map(|i| format!("{i:0width$} €\n", width = i * 37 % 300 + 5)).collect()
}

/// Returns a job that prints [`PARTS`] and waits after each.
fn job_in_parts() -> Value {
    job("1", &[NUMBERS, &in_parts(&PARTS)])
}

/// Asserts that the job has printed all parts, and passed.
fn assert_all_arrived(finished: &Finished) {
    assert_eq!(finished.result(), "passed");
    let (printed, exit_code) = &finished.commands()[1];
    assert!(*printed == numbers(1, 1600), "{} bytes: {printed}", printed.len());
    assert_eq!(*exit_code, 0);
}

/// Starts this job, and waits until its first part has arrived.
fn begin(hub: &Hub, world: &World) -> StartAgent {
    let agent = StartAgent::start(world, hub);
    hub.queue(job_in_parts());
    hub.wait_for_log("1", "400 €");
    agent
}

/// Returns a job of many commands with a predictable log, and its output.
fn many_commands(id: &str) -> (Value, String) {
    let commands: Vec<_> = (0..40).map(|number| format!("echo {id}-{number}")).collect();
    let commands: Vec<_> = commands.iter().map(String::as_str).collect();
    (job(id, &commands), (0..40).map(|number| format!("{id}-{number}\n")).collect())
}

/// Runs jobs while every third request for which `meant` returns `true` fails with one of `faults`, in turn.
fn assert_survives(faults: &[Fault], meant: impl Fn(&ReceivedRequest) -> bool + Send + 'static) {
    let hub = Hub::start(SOON);
    let world = World::new();
    let (all, count) = (faults.to_vec(), Arc::new(AtomicUsize::new(0)));
    let counter = Arc::clone(&count);
    hub.misbehave(Some(Box::new(move |received, _| {
        let number = if meant(received) { counter.fetch_add(1, Ordering::SeqCst) } else { 0 };
        (number % 3 == 2).then(|| all[number / 3 % all.len()])
    })));
    let _agent = StartAgent::start(&world, &hub);
    for id in ["a", "b", "c"] {
        let (mut request, mut expected) = many_commands(id);
        let commands = request["commands"].as_array_mut().unwrap();
        commands.push(json!({ "directive": format!("echo ran | tee -a ~/{id}") }));
        expected.push_str("ran\n");
        let finished = hub.run(&request);
        assert_eq!((finished.result(), finished.output()), ("passed", expected));
        assert_eq!(fs::read_to_string(world.home().join(id)).unwrap(), "ran\n");
    }
    let count = count.load(Ordering::SeqCst);
    assert!(count / 3 > 2 * faults.len(), "only {count} requests could meet a fault");
}

#[test]
fn every_third_request_may_be_refused() {
    assert_survives(&[Fault::Status(500)], |_| true);
}

#[test]
fn every_third_request_may_be_unauthorized_unknown_or_too_much() {
    assert_survives(&[401, 404, 429, 503].map(Fault::Status), |_| true);
}

#[test]
fn every_third_connection_may_be_dropped() {
    assert_survives(&[Fault::Drop], |_| true);
}

#[test]
fn every_third_response_may_be_cut() {
    assert_survives(&[Fault::Cut], |_| true);
}

#[test]
fn every_third_response_may_be_nonsense() {
    // Not for logs: a response to a log only has a status.
    assert_survives(&[Fault::Nonsense], |received| !received.is_log());
}

#[test]
fn a_log_arrives_completely_although_the_control_plane_was_away() {
    let mut hub = Hub::start(SOON);
    let world = World::new();
    let agent = begin(&hub, &world);
    hub.pause();
    go(&world, 0);
    wait_for_part(&world, 1);
    agent.wait_for_own_log(NOT_TAKEN);
    agent.wait_for_own_log(NOT_REPORTED);
    go(&world, 1);
    wait_for_part(&world, 2);
    hub.resume().unwrap();
    hub.wait_for_log("1", "1500 €");
    go(&world, 2);
    go(&world, 3);
    assert_all_arrived(&hub.finish("1"));
    assert_eq!(hub.look(|known| known.registrations.len()), 1);
}

#[test]
fn a_result_is_reported_to_a_control_plane_that_was_away_at_the_end() {
    let mut hub = Hub::start(SOON);
    let world = World::new();
    let agent = begin(&hub, &world);
    hub.pause();
    (0..4).for_each(|part| go(&world, part));
    wait_for_part(&world, 3);
    agent.wait_for_own_log(NOT_TAKEN);
    agent.wait_for_own_log(NOT_REPORTED);
    hub.resume().unwrap();
    assert_all_arrived(&hub.finish("1"));
    let states = hub.states();
    assert!(states.contains(&"finished-job 1 passed".to_owned()), "{states:?}");
    assert_eq!(hub.look(|known| known.jobs["1"].fetched), 1);
}

#[test]
fn a_log_arrives_completely_although_its_tokens_expire_repeatedly() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = begin(&hub, &world);
    for (part, printed) in [(0, "900 €"), (1, "1500 €"), (2, "1600 €")] {
        hub.expire_log_tokens();
        go(&world, part);
        hub.wait_for_log("1", printed);
    }
    hub.expire_log_tokens();
    go(&world, 3);
    assert_all_arrived(&hub.finish("1"));
    let refreshed = hub.look(|known| {
        known.requests.iter().filter(|received| received.is("POST", "/refresh")).count()
    });
    assert_eq!(refreshed, 4);
}

#[test]
fn tokens_that_expire_before_they_are_used_do_no_harm() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = begin(&hub, &world);
    // Refreshed tokens have expired when they are used, and sometimes refreshing fails.
    let mut count = 0;
    hub.misbehave(Some(Box::new(move |received, _| {
        let is_refreshed = received.is("POST", "/refresh");
        count += usize::from(is_refreshed);
        let is_refused = received.is_log() && count < 3;
        if is_refused {
            Some(Fault::Status(401))
        } else {
            (is_refreshed && count == 2).then_some(Fault::Status(500))
        }
    })));
    (0..4).for_each(|part| go(&world, part));
    assert_all_arrived(&hub.finish("1"));
}

#[test]
fn a_log_arrives_in_requests_of_the_servers_maximum_size() {
    for most_lines in [7, 1] {
        let hub = Hub::start(SOON);
        hub.set(|settings| settings.most_lines = most_lines);
        let world = World::new();
        let _agent = StartAgent::start(&world, &hub);
        let (request, expected) = many_commands("a");
        let finished = hub.run(&request);
        assert_eq!((finished.result(), finished.output()), ("passed", expected));
        let refused = hub.look(|known| {
            known.requests.iter().filter(|received| received.status == Some(413)).count()
        });
        assert!((1..12).contains(&refused), "{refused}");
    }
}

#[test]
fn a_log_that_is_too_large_for_the_server_is_trimmed_and_the_result_stands() {
    const QUOTA: usize = 20_000;
    let hub = Hub::start(SOON);
    hub.set(|settings| settings.log_quota = QUOTA);
    let world = World::new();
    let agent = StartAgent::start(&world, &hub);
    hub.queue(job_in_parts());
    hub.wait_until("it is used up", |known| {
        known.requests.iter().any(|received| received.status == Some(422))
    });
    (0..4).for_each(|part| go(&world, part));
    assert_eq!(hub.result("1"), "passed");
    let (log, logs) = hub.look(|known| {
        let of_log = known.requests.iter().filter(|received| received.is_log());
        (known.jobs["1"].log_bytes(), of_log.map(|received| received.status).collect::<Vec<_>>())
    });
    assert!(log.len() <= QUOTA && !log.is_empty(), "{}", log.len());
    let printed = Finished { exit_code: None, events: events(&log), stderr: String::new() };
    assert!(numbers(1, 1600).starts_with(&printed.output()));
    // The agent sends nothing after the refusal.
    assert_eq!(
        logs.iter().position(|status| *status == Some(422)),
        Some(logs.len() - 1),
        "{logs:?}"
    );
    agent.wait_for_own_log("the log server's space for the job's log is used up");
    // The next job has its own quota.
    assert_eq!(hub.run(&job("next", &["echo hi"])).output(), "hi\n");
}

#[test]
fn a_log_that_can_not_be_delivered_is_kept_and_the_result_is_reported() {
    let hub = Hub::start(SOON);
    let world = World::new();
    hub.fail(Fault::Status(500), ReceivedRequest::is_log);
    let agent = StartAgent::start_with(&world, &hub, |command| {
        command.arg("--log-delivery-timeout=1");
    });
    let (request, expected) = many_commands("a");
    hub.queue(request);
    assert_eq!(hub.result("a"), "passed");
    agent.wait_for_own_log("a part of the job's log was not delivered");
    let kept = fs::read(world.state().join("undelivered/a.1.jsonl")).unwrap();
    let kept = Finished { exit_code: None, events: events(&kept), stderr: String::new() };
    assert_eq!((kept.result(), kept.output()), ("passed", expected));
    hub.misbehave(None);
    assert_eq!(hub.run(&job("next", &["echo hi"])).output(), "hi\n");
}

#[test]
fn logs_are_compressed_only_for_a_server_that_asks_for_it() {
    for compression in [false, true] {
        let hub = Hub::start(SOON);
        hub.set(|settings| settings.compression = compression);
        let world = World::new();
        let _agent = begin(&hub, &world);
        (0..4).for_each(|part| go(&world, part));
        assert_all_arrived(&hub.finish("1"));
        let encodings: Vec<_> = hub.look(|known| {
            let of_log = known.requests.iter().filter(|received| received.is_log());
            of_log.map(|received| received.headers.get("content-encoding").cloned()).collect()
        });
        assert!(encodings.len() > 1 && encodings[0].is_none(), "{encodings:?}");
        let packed = compression.then(|| "gzip".to_owned());
        assert!(encodings[1..].iter().all(|encoding| *encoding == packed), "{encodings:?}");
    }
}

#[test]
fn a_job_that_is_handed_out_twice_runs_once() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = begin(&hub, &world);
    let again = || json!({ "action": "run-job", "job_id": "1" });
    let reports = hub.look(|known| known.reports.len());
    // Both while the job runs, and when its result is known.
    hub.answer_next([again(), again()]);
    hub.wait_until("two more reports", |known| known.reports.len() > reports + 2);
    (0..4).for_each(|part| go(&world, part));
    assert_all_arrived(&hub.finish("1"));
    hub.wait_for_state("waiting-for-jobs");
    let reports = hub.look(|known| known.reports.len());
    hub.answer_next([again()]);
    hub.wait_until("the result again", |known| {
        known.reports[reports..].iter().any(|report| report["job_result"] == "passed")
    });
    hub.wait_for_state("waiting-for-jobs");
    assert_eq!(hub.look(|known| known.jobs["1"].fetched), 1);
    assert_all_arrived(&hub.finish("1"));
    assert_eq!(hub.run(&job("next", &["true"])).result(), "passed");
}

#[test]
fn another_job_than_the_running_one_is_neither_run_nor_stopped() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = begin(&hub, &world);
    let reports = hub.look(|known| known.reports.len());
    hub.answer_next([
        json!({ "action": "stop-job", "job_id": "other" }),
        json!({ "action": "run-job", "job_id": "other" }),
        json!({ "action": "dance", "job_id": "1" }),
        json!({}),
        json!({ "action": null, "job_id": null, "shutdown_reason": null }),
    ]);
    hub.wait_until("five more reports", |known| known.reports.len() > reports + 5);
    (0..4).for_each(|part| go(&world, part));
    assert_all_arrived(&hub.finish("1"));
    hub.wait_for_state("waiting-for-jobs");
    let reports = hub.look(|known| known.reports.len());
    hub.answer_next(["1", "other", ""].map(|id| json!({ "action": "stop-job", "job_id": id })));
    hub.wait_until("three more reports", |known| known.reports.len() > reports + 3);
    assert_eq!(hub.run(&job("next", &["true"])).result(), "passed");
}

#[test]
fn a_stop_works_although_the_log_can_not_be_delivered() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let agent = StartAgent::start(&world, &hub);
    let id = hub.queue(job("1", &[RUN_FOR_EVER]));
    hub.wait_for_log(&id, RUNNING);
    hub.fail(Fault::Status(500), ReceivedRequest::is_log);
    hub.stop_job(&id);
    agent.wait_for_own_log(NOT_TAKEN);
    hub.wait_for_state("stopping-job");
    hub.misbehave(None);
    assert_eq!(hub.finish(&id).result(), "stopped");
}

#[test]
fn a_slow_log_server_does_not_delay_a_job() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    let id = hub.queue(job("1", &["seq 200000", "touch ~/printed"]));
    hub.fail(Fault::Delay(Duration::from_secs(2)), ReceivedRequest::is_log);
    wait_for_file(&world.home().join("printed"));
    // When the job ends, less than a tenth of its log has arrived.
    let arrived = hub.look(|known| known.jobs[&id].log.len());
    assert!(arrived < 5, "{arrived} lines");
    let expected: String = (1..=200_000).map(|number| format!("{number}\n")).collect();
    let finished = hub.finish(&id);
    assert!(finished.output() == expected, "{} bytes", finished.output().len());
}

#[test]
fn a_log_of_50_megabytes_arrives_completely() {
    const LINES: usize = 500_000;
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    let finished = hub.run(&job("1", &[&format!("seq -f %0100.0f {LINES}")]));
    let output = finished.output();
    assert_eq!(output.len(), LINES * 101);
    let numbers = output.lines().map(|line| line.parse::<usize>().unwrap());
    assert!(numbers.eq(1..=LINES));
    // The number of requests is small: each is as large as allowed.
    let bodies = hub.look(|known| known.log_bodies.clone());
    assert!(bodies.len() < 200 && bodies.iter().all(|size| *size <= 1 << 20), "{bodies:?}");
}

#[test]
fn an_agent_that_is_refused_repeatedly_ends_with_1() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let mut agent = StartAgent::start_with(&world, &hub, |command| {
        command.env("SEMAPHORE_AGENT_TOKEN", "not-the-right-one").stderr(Stdio::null());
    });
    assert_eq!(agent.exit_code(), Some(1));
    let tries = hub.look(|known| known.requests.clone());
    assert_eq!(tries.len(), 30);
    assert!(
        tries
            .iter()
            .all(|received| received.is("POST", "/register") && received.status == Some(401))
    );
    let own_log = agent.whole_log();
    assert!(own_log.contains("not registered") && !own_log.contains("not-the-right-one"));
}
