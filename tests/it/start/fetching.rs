//! Fetching a job from a control plane, which hands out the job's secrets only once.

use serde_json::{Value, json};

use test_support::control_plane::{Fault, Known, ReceivedRequest, SANITIZED};
use test_support::start::{Hub, SOON, StartAgent};
use test_support::{World, base64, job};

/// Returns a job with secrets that must not run without them.
fn job_with_secrets(id: &str) -> Value {
    let mut request = job(id, &["touch ~/never"]);
    request["env_vars"] = json!([{ "name": "KEY", "value": base64(b"secret") }]);
    request["files"] = json!([{ "path": "key", "content": base64(b"secret"), "mode": "0600" }]);
    request
}

fn is_fetch(received: &ReceivedRequest) -> bool {
    received.method == "GET" && received.path.contains("/jobs/")
}

/// Makes the first response to a fetch meet this fault.
fn spoil_first_fetch(hub: &Hub, fault: Fault) {
    let mut first = true;
    hub.fail(fault, move |received| is_fetch(received) && std::mem::take(&mut first));
}

/// Asserts that the job has failed without running, and that its log and the agent's log say that it must be
/// rerun.
fn assert_not_run(hub: &Hub, agent: &StartAgent, world: &World, id: &str) {
    let finished = hub.finish(id);
    assert_eq!(finished.result(), "failed");
    let log = format!("{:?}", finished.events);
    assert!(log.contains("rerun") && !log.contains("base64"), "{finished:#?}");
    agent.wait_for_own_log("rerun");
    assert!(!world.home().join("never").exists() && !world.home().join("key").exists());
}

#[test]
fn a_job_whose_response_was_lost_fails_and_must_be_rerun() {
    let hub = Hub::start(SOON);
    hub.set(|settings| settings.once = true);
    let world = World::new();
    let agent = StartAgent::start(&world, &hub);
    spoil_first_fetch(&hub, Fault::Lost);
    let id = hub.queue(job_with_secrets("1"));
    assert_not_run(&hub, &agent, &world, &id);
    assert_eq!(hub.run(&job("next", &["true"])).result(), "passed");
}

#[test]
fn a_request_in_which_any_secret_is_overwritten_is_not_run() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let agent = StartAgent::start(&world, &hub);
    let variable = || json!([{ "name": "KEY", "value": SANITIZED }]);
    let file = || json!([{ "path": "key", "content": SANITIZED, "mode": "0600" }]);
    let container = |secrets: Value| {
        let mut container = json!({ "name": "main", "image": "agent-test/none" });
        container.as_object_mut().unwrap().extend(secrets.as_object().unwrap().clone());
        json!({ "containers": [container] })
    };
    let credentials = |secrets: Value| json!({ "image_pull_credentials": [secrets] });
    let parts = [
        json!({ "env_vars": variable() }),
        json!({ "files": file() }),
        json!({ "callbacks": { "token": SANITIZED } }),
        json!({ "compose": container(json!({ "env_vars": variable() })) }),
        json!({ "compose": container(json!({ "files": file() })) }),
        json!({ "compose": credentials(json!({ "env_vars": variable() })) }),
        json!({ "compose": credentials(json!({ "files": file() })) }),
    ];
    for (number, part) in parts.into_iter().enumerate() {
        let mut request = job(&number.to_string(), &["touch ~/never"]);
        if part.get("compose").is_some() {
            request["executor"] = "dockercompose".into();
        }
        request.as_object_mut().unwrap().extend(part.as_object().unwrap().clone());
        let id = hub.queue(request);
        assert_not_run(&hub, &agent, &world, &id);
    }
}

#[test]
fn a_command_may_contain_the_placeholder_for_secrets() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    let finished = hub.run(&job("1", &[&format!("echo '{SANITIZED}'")]));
    assert_eq!((finished.result(), finished.output()), ("passed", format!("{SANITIZED}\n")));
}

#[test]
fn a_job_whose_response_was_cut_is_not_run() {
    let hub = Hub::start(SOON);
    hub.set(|settings| settings.once = true);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    spoil_first_fetch(&hub, Fault::Cut);
    let id = hub.queue(job_with_secrets("1"));
    assert_eq!(hub.result(&id), "failed");
    assert!(!world.home().join("never").exists());
    assert_eq!(hub.run(&job("next", &["true"])).result(), "passed");
}

#[test]
fn a_job_is_fetched_on_a_connection_of_its_own() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    for id in ["1", "2", "3"] {
        assert_eq!(hub.run(&job(id, &["true"])).result(), "passed");
    }
    let requests = hub.look(|known| known.requests.clone());
    for (number, fetch) in requests.iter().enumerate().filter(|(_, received)| is_fetch(received)) {
        let before = requests[..number].iter().find(|received| received.peer == fetch.peer);
        // The server may close a reused connection at that moment, and the response would be lost.
        assert!(before.is_none(), "{} came on the connection of {before:?}", fetch.path);
    }
}

#[test]
fn a_job_that_is_no_longer_available_is_not_a_failed_job() {
    for status in [404, 422] {
        let hub = Hub::start(SOON);
        let world = World::new();
        let _agent = StartAgent::start(&world, &hub);
        hub.wait_for_state("waiting-for-jobs");
        let refusal = Fault::Refuse(status, "job not available\n");
        hub.fail(refusal, |received| received.is("GET", "/jobs/gone"));
        hub.answer_next([json!({ "action": "run-job", "job_id": "gone" })]);
        hub.wait_until("it is asked for", |known| known.requests.iter().any(is_fetch));
        hub.wait_for_state("waiting-for-jobs");
        assert_eq!(hub.run(&job("next", &["true"])).result(), "passed");
        let states = hub.states();
        assert!(!states.iter().any(|state| state.starts_with("finished-job gone")), "{states:?}");
        let fetched = |known: &Known| {
            known.requests.iter().filter(|received| received.is("GET", "/jobs/gone")).count()
        };
        assert_eq!(hub.look(fetched), 1);
    }
}

#[test]
fn an_agent_for_one_job_ends_when_that_job_is_no_longer_available() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let refusal = Fault::Refuse(404, "job not available\n");
    hub.fail(refusal, |received| received.is("GET", "/jobs/gone"));
    hub.answer_next([json!({ "action": "run-job", "job_id": "gone" })]);
    let mut agent = StartAgent::start_with(&world, &hub, |command| {
        command.args(["--disconnect-after-job", "--job-id", "gone"]);
    });
    assert!(agent.exit_code().is_some());
    assert_eq!(hub.look(|known| known.disconnected), 1);
    let states = hub.states();
    assert!(!states.iter().any(|state| state.starts_with("finished-job")), "{states:?}");
}
