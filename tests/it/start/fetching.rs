//! How a job gets from a control plane, which gives it out whole only once, to its agent.

use serde_json::{Value, json};

use test_support::control_plane::{Asked, Fault, Known, SANITIZED};
use test_support::start::{Hub, SOON, StartAgent};
use test_support::{World, base64, job};

/// A job with secrets that must not run without them.
fn job_with_secrets(id: &str) -> Value {
    let mut request = job(id, &["touch ~/never"]);
    request["env_vars"] = json!([{ "name": "KEY", "value": base64(b"secret") }]);
    request["files"] = json!([{ "path": "key", "content": base64(b"secret"), "mode": "0600" }]);
    request
}

fn is_fetch(asked: &Asked) -> bool {
    asked.method == "GET" && asked.path.contains("/jobs/")
}

/// The first answer to somebody who fetches a job meets this fault.
fn spoil_first_fetch(hub: &Hub, fault: Fault) {
    let mut first = true;
    hub.fail(fault, move |asked| is_fetch(asked) && std::mem::take(&mut first));
}

/// The job has failed, its log and the agent's say that it must be rerun, and none of it ran.
fn assert_not_run(hub: &Hub, agent: &StartAgent, world: &World, id: &str) {
    let finished = hub.finish(id);
    assert_eq!(finished.result(), "failed");
    let told = format!("{:?}", finished.events);
    assert!(told.contains("rerun") && !told.contains("base64"), "{finished:#?}");
    agent.wait_for_own_log("rerun");
    assert!(!world.home().join("never").exists() && !world.home().join("key").exists());
}

#[test]
fn a_job_whose_answer_got_lost_fails_and_its_log_says_that_it_must_be_rerun() {
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
fn a_command_may_speak_of_what_stands_for_secrets() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    let finished = hub.run(&job("1", &[&format!("echo '{SANITIZED}'")]));
    assert_eq!((finished.result(), finished.output()), ("passed", format!("{SANITIZED}\n")));
}

#[test]
fn a_job_whose_answer_was_cut_is_not_run() {
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
    for (number, fetch) in requests.iter().enumerate().filter(|(_, asked)| is_fetch(asked)) {
        let before = requests[..number].iter().find(|asked| asked.peer == fetch.peer);
        // One that was used before may be closed by now, and the answer lost.
        assert!(before.is_none(), "{} came on the connection of {before:?}", fetch.path);
    }
}

#[test]
fn a_job_that_is_not_available_any_more_is_no_failed_job() {
    for status in [404, 422] {
        let hub = Hub::start(SOON);
        let world = World::new();
        let _agent = StartAgent::start(&world, &hub);
        hub.wait_for_state("waiting-for-jobs");
        let refusal = Fault::Refuse(status, "job not available\n");
        hub.fail(refusal, |asked| asked.is("GET", "/jobs/gone"));
        hub.answer_next([json!({ "action": "run-job", "job_id": "gone" })]);
        hub.wait_until("it is asked for", |known| known.requests.iter().any(is_fetch));
        hub.wait_for_state("waiting-for-jobs");
        assert_eq!(hub.run(&job("next", &["true"])).result(), "passed");
        let states = hub.states();
        assert!(!states.iter().any(|state| state.starts_with("finished-job gone")), "{states:?}");
        let fetched = |known: &Known| {
            known.requests.iter().filter(|asked| asked.is("GET", "/jobs/gone")).count()
        };
        assert_eq!(hub.look(fetched), 1);
    }
}

#[test]
fn an_agent_for_one_job_ends_when_that_is_not_available_any_more() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let refusal = Fault::Refuse(404, "job not available\n");
    hub.fail(refusal, |asked| asked.is("GET", "/jobs/gone"));
    hub.answer_next([json!({ "action": "run-job", "job_id": "gone" })]);
    let mut agent = StartAgent::start_with(&world, &hub, |command| {
        command.args(["--disconnect-after-job", "--job-id", "gone"]);
    });
    assert!(agent.exit_code().is_some());
    assert_eq!(hub.look(|known| known.disconnected), 1);
    let states = hub.states();
    assert!(!states.iter().any(|state| state.starts_with("finished-job")), "{states:?}");
}
