//! Refusals of the control plane and their reasons, and agents that it no longer knows.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use serde_json::Value;

use test_support::control_plane::{Fault, Known};
use test_support::start::{FAR_OFF, Hub, SOON, StartAgent};
use test_support::{RUN_FOR_EVER, RUNNING, World, job};

/// The control plane's message if an agent with this name seems to be alive.
const TAKEN: &str = "agent can't be registered\n";

fn registrations(known: &Known) -> usize {
    known.requests.iter().filter(|received| received.is("POST", "/register")).count()
}

/// Runs an agent whose registration is refused. Returns its exit code, its message, and the number of
/// attempts.
fn refused(fault: Fault, name: Option<&str>) -> (Option<i32>, String, usize) {
    let hub = Hub::start(SOON);
    let world = World::new();
    hub.fail(fault, |received| received.is("POST", "/register"));
    let mut agent = StartAgent::start_with(&world, &hub, |command| {
        command.stderr(Stdio::null());
        if let Some(name) = name {
            command.env("SEMAPHORE_AGENT_NAME", name);
        }
    });
    (agent.exit_code(), agent.whole_log(), hub.look(registrations))
}

#[test]
fn a_final_refusal_ends_the_agent_at_once_and_its_own_log_says_why() {
    for (status, text, logged) in [
        (
            422,
            "agent quota of 5 has been reached\nforged line\n",
            "agent quota of 5 has been reached",
        ),
        (400, "the agent name a.b must follow the pattern", "a.b must follow the pattern"),
        (422, "AWS account 123456 is not allowed\n", "AWS account 123456 is not allowed"),
    ] {
        let (code, own_log, tries) = refused(Fault::Refuse(status, text), None);
        assert!(own_log.contains(logged), "{own_log}");
        assert!(!own_log.lines().any(|line| line.starts_with("forged")), "{own_log}");
        assert_eq!((code, tries), (Some(1), 1), "{own_log}");
    }
}

#[test]
fn only_the_first_200_characters_of_a_refusal_are_logged() {
    let text = format!("{}{}", "é".repeat(200), "canary");
    let (_, own_log, _) = refused(Fault::Refuse(422, text.leak()), None);
    let logged = "é".repeat(200);
    assert!(own_log.contains(&logged) && !own_log.contains("canary"), "{own_log}");
}

#[test]
fn a_refusal_that_may_echo_a_signed_url_is_not_logged() {
    let name = "https://sts.example.com/?Action=GetCallerIdentity&Signature=canary";
    let text = "https://sts.example.com/?Signature=canary is not accepted";
    let (code, own_log, tries) = refused(Fault::Refuse(422, text), Some(name));
    assert!(!own_log.contains("canary") && own_log.contains("422"), "{own_log}");
    assert_eq!((code, tries), (Some(1), 1), "{own_log}");
}

#[test]
fn a_wrong_token_is_named() {
    let (code, own_log, _) = refused(Fault::Refuse(401, ""), None);
    assert_eq!(code, Some(1));
    assert!(own_log.contains("token"), "{own_log}");
}

#[test]
fn a_wrong_host_is_named() {
    let (code, own_log, _) = refused(Fault::Refuse(404, ""), None);
    assert_eq!(code, Some(1));
    assert!(own_log.contains("organization"), "{own_log}");
}

#[test]
fn the_reason_of_a_refused_report_is_logged() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let why = "the organization is suspended";
    hub.fail(Fault::Refuse(403, why), |received| received.is("POST", "/sync"));
    StartAgent::start(&world, &hub).wait_for_own_log(why);
}

#[test]
fn the_reason_of_a_refused_job_is_logged() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let why = "there is no such job";
    hub.fail(Fault::Refuse(403, why), |received| received.is("GET", "/jobs/1"));
    hub.queue(job("1", &["true"]));
    StartAgent::start(&world, &hub).wait_for_own_log(why);
}

#[test]
fn the_reason_of_a_refused_log_token_is_logged() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let agent = StartAgent::start(&world, &hub);
    let id = hub.queue(job("1", &[RUN_FOR_EVER]));
    hub.wait_for_log(&id, RUNNING);
    let why = "the token can not be renewed";
    hub.fail(Fault::Refuse(403, why), |received| received.is("POST", "/refresh"));
    hub.expire_log_tokens();
    hub.stop_job(&id);
    agent.wait_for_own_log(why);
}

#[test]
fn registration_is_retried_until_the_name_is_free() {
    const TAKEN_FOR: Duration = Duration::from_secs(10);
    let hub = Hub::start(SOON);
    let world = World::new();
    let mut first = None;
    hub.fail(Fault::Refuse(422, TAKEN), move |received| {
        let is_register = received.is("POST", "/register");
        is_register && first.get_or_insert_with(SystemTime::now).elapsed().unwrap() < TAKEN_FOR
    });
    let agent = StartAgent::start_with(&world, &hub, |command| {
        command.stderr(Stdio::null());
    });
    agent.wait_for_own_log("agent can't be registered");
    let known = hub.wait_for(Duration::from_secs(100), |known| {
        (!known.registrations.is_empty()).then(|| registrations(known))
    });
    let tries = known.unwrap_or_else(|| panic!("never registered: {}", agent.own_log()));
    // A crashed agent's name stays taken for minutes, so the agent must not retry every second.
    assert!((3..=6).contains(&tries), "{tries}");
    assert_eq!(hub.run(&job("1", &["true"])).result(), "passed");
}

/// Makes the control plane forget the registered agent and its job.
fn delete_agent(hub: &Hub) {
    let mut known = true;
    hub.misbehave(Some(Box::new(move |received, _| {
        if received.is("POST", "/register") {
            known = false;
        }
        let of_deleted =
            known && (received.is_log() || received.path.contains("self_hosted_agents"));
        of_deleted.then_some(Fault::Refuse(404, "not found\n"))
    })));
}

#[test]
fn an_idle_agent_that_is_no_longer_known_registers_again() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    hub.wait_for_state("waiting-for-jobs");
    let deleted = SystemTime::now();
    delete_agent(&hub);
    hub.wait_until("another registration", |known| known.registrations.len() > 1);
    let after = deleted.elapsed().unwrap();
    assert!(after > Duration::from_millis(4900), "{after:?}");
    let refused = |known: &Known| {
        let reports = known.requests.iter().filter(|received| received.is("POST", "/sync"));
        reports.filter(|received| received.status == Some(404)).count()
    };
    assert!(hub.look(refused) >= 3);
    assert_eq!(hub.run(&job("next", &["true"])).result(), "passed");
    let names = hub.look(|known| known.registrations.iter().map(name).collect::<Vec<_>>());
    assert_eq!(names[0], names[1]);
}

fn name(registration: &Value) -> String {
    registration["name"].as_str().unwrap().to_owned()
}

#[test]
fn a_busy_agent_that_is_no_longer_known_stops_its_job_keeps_the_log_and_registers_again() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start_with(&world, &hub, |command| {
        command.arg("--log-delivery-timeout=5");
    });
    let id = hub.queue(job("1", &[RUN_FOR_EVER]));
    hub.wait_for_log(&id, RUNNING);
    delete_agent(&hub);
    hub.wait_until("another registration", |known| known.registrations.len() > 1);
    let kept = fs::read_dir(world.state().join("undelivered")).unwrap();
    assert!(kept.count() > 0, "the log was not kept");
    assert_eq!(hub.run(&job("next", &["echo hi"])).output(), "hi\n");
    let states = hub.states();
    assert!(!states.iter().any(|state| state.starts_with("finished-job 1")), "{states:?}");
}

#[test]
fn two_not_found_responses_do_not_make_an_agent_register_again() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    hub.wait_for_state("waiting-for-jobs");
    let mut left = 2;
    hub.fail(Fault::Refuse(404, "not found\n"), move |received| {
        let is_refused = left > 0 && received.is("POST", "/sync");
        left -= u32::from(is_refused);
        is_refused
    });
    assert_eq!(hub.run(&job("1", &["true"])).result(), "passed");
    assert_eq!(hub.look(|known| known.registrations.len()), 1);
}

#[test]
fn the_reported_version_has_the_control_planes_format() {
    let hub = Hub::start(FAR_OFF);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    hub.wait_for_state("waiting-for-jobs");
    let version = hub.look(|known| known.registrations[0]["version"].clone());
    assert_eq!(version, format!("v{}", env!("CARGO_PKG_VERSION")));
}
