//! Jobs of a control plane, from the agent's registration to their results.

use std::fs;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use test_support::callbacks::CallbackServer;
use test_support::control_plane::Fault;
use test_support::jobs::{go, in_parts};
use test_support::start::{FAR_OFF, Hub, NAME, SOON, StartAgent, TOKEN};
use test_support::{
    Finished, RUN_FOR_EVER, RUNNING, World, base64, job, marked, processes_with, wait_until,
};

const EXPORTS: &str = "Exporting environment variables";

/// The agent's `User-Agent` header.
const AGENT: &str = concat!("SemaphoreAgent/", env!("CARGO_PKG_VERSION"));

fn titles(finished: &Finished) -> Vec<String> {
    finished.steps().into_iter().map(|(title, ..)| title).collect()
}

fn with_epilogues(mut job: Value) -> Value {
    for kind in ["always", "on_pass", "on_fail"] {
        job[format!("epilogue_{kind}_commands")] =
            json!([{ "directive": format!("echo epilogue {kind}") }]);
    }
    job
}

#[test]
fn a_job_runs_from_the_registration_to_its_result() {
    let hub = Hub::start(FAR_OFF);
    let world = World::new();
    let mut request = with_epilogues(job("1", &[&in_parts(&["echo hi"]), "echo bye"]));
    request["commands"][1]["alias"] = "the end".into();
    request["env_vars"] = json!([
        { "name": "B", "value": base64(b"2") }, { "name": "A", "value": base64(b"1") },
    ]);
    request["files"] = json!([{ "path": "f", "content": base64(b"content"), "mode": "0600" }]);
    let id = hub.queue(request);
    let mut agent = StartAgent::start(&world, &hub);
    hub.wait_for_state("running-job");
    go(&world, 0);
    let finished = hub.finish(&id);
    hub.wait_for_state("waiting-for-jobs");
    agent.signal(Signal::SIGTERM);
    assert_eq!(agent.exit_code(), Some(0));

    let file = format!("Injecting {} with file mode 0600\n", world.home().join("f").display());
    let expected = [
        (EXPORTS, "Exporting A\nExporting B\n", 0),
        ("Injecting Files", file.as_str(), 0),
        (&in_parts(&["echo hi"]), "hi\n", 0),
        ("the end", "Running: echo bye\nbye\n", 0),
        (EXPORTS, "Exporting SEMAPHORE_JOB_RESULT\n", 0),
        ("echo epilogue always", "epilogue always\n", 0),
        ("echo epilogue on_pass", "epilogue on_pass\n", 0),
    ];
    let expected = expected.map(|(title, output, code)| (title.into(), output.into(), code));
    assert_eq!(finished.steps(), expected);
    assert_eq!(finished.result(), "passed");
    let states = [
        "waiting-for-jobs",
        "starting-job 1",
        "running-job 1",
        "finished-job 1 passed",
        "waiting-for-jobs",
    ];
    assert_eq!(hub.states(), states);
    // No report was repeated, except for the last one, after which the agent was told to end.
    assert_eq!(hub.look(|known| known.reports.len()), states.len() + 1);
    assert_eq!(hub.look(|known| known.jobs[&id].fetched), 1);
}

#[test]
fn the_log_has_the_events_of_the_protocol_and_no_other_keys() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    let id = hub.queue(job("1", &["echo hi"]));
    hub.finish(&id);
    let log = hub.look(|known| known.jobs[&id].log_bytes());
    let mut lines: Vec<Value> = log
        .split(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice(line).ok())
        .collect();
    for line in &mut lines {
        for time in ["timestamp", "started_at", "finished_at"] {
            if let Some(time) = line.get_mut(time) {
                assert!(time.as_u64().unwrap() > 1_700_000_000);
                *time = "time".into();
            }
        }
    }
    let time = "time";
    let started = |title| json!({ "event": "cmd_started", "timestamp": time, "directive": title });
    let finished = |title| {
        json!({
            "event": "cmd_finished", "timestamp": time, "directive": title, "exit_code": 0,
            "started_at": time, "finished_at": time,
        })
    };
    let output = |text| json!({ "event": "cmd_output", "timestamp": time, "output": text });
    let expected = [
        json!({ "event": "job_started", "timestamp": time }),
        started(EXPORTS),
        finished(EXPORTS),
        started("Injecting Files"),
        finished("Injecting Files"),
        started("echo hi"),
        output("hi\n"),
        finished("echo hi"),
        started(EXPORTS),
        output("Exporting SEMAPHORE_JOB_RESULT\n"),
        finished(EXPORTS),
        json!({ "event": "job_finished", "timestamp": time, "result": "passed" }),
    ];
    assert_eq!(lines, expected);
}

#[test]
fn the_agent_registers_with_its_properties_and_authenticates_its_requests() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let mut agent = StartAgent::start_with(&world, &hub, |command| {
        command.args(["--disconnect-after-job", "--job-id", "1"]);
        command.args(["--disconnect-after-idle-timeout=300", "--interruption-grace-period=20"]);
    });
    hub.run(&job("1", &["true"]));
    let pid = agent.pid().as_raw();
    assert_eq!(agent.exit_code(), Some(0));
    let (mut registration, requests) =
        hub.look(|known| (known.registrations[0].clone(), known.requests.clone()));
    assert!(registration["os"].as_str().unwrap().contains("Linux"), "{registration}");
    assert!(!registration["hostname"].as_str().unwrap().is_empty(), "{registration}");
    for about_machine in ["os", "hostname"] {
        registration.as_object_mut().unwrap().remove(about_machine);
    }
    let expected = json!({
        "name": NAME, "version": concat!("v", env!("CARGO_PKG_VERSION")), "pid": pid,
        "arch": std::env::consts::ARCH, "single_job": true, "idle_timeout": 300,
        "interruption_grace_period": 20, "job_id": "1",
    });
    assert_eq!(registration, expected);
    for request in &requests {
        assert_eq!(request.headers["user-agent"], AGENT, "{request:?}");
        let token = match request.path.rsplit('/').next() {
            Some("register") => format!("Token {TOKEN}"),
            _ if request.is_log() => "Bearer log-token-0".to_owned(),
            _ => "Token access-token-0".to_owned(),
        };
        assert_eq!(request.headers["authorization"], token, "{request:?}");
        assert_eq!(request.is_log(), request.headers["content-type"] == "text/plain");
        assert!(request.status.is_some_and(|status| status < 300), "{request:?}");
    }
    let kinds = requests.iter().map(|received| received.path.rsplit('/').nth(1).unwrap());
    assert!(kinds.clone().any(|kind| kind == "jobs") && kinds.clone().any(|kind| kind == "logs"));
    assert!(requests.first().unwrap().is("POST", "/register"));
    assert!(requests.last().unwrap().is("POST", "/disconnect"));
}

#[test]
fn variables_of_the_agent_override_those_of_the_job() {
    let hub = Hub::start(FAR_OFF);
    let world = World::new();
    let mut request = job("1", &["echo \"$BOTH,$OWN,$JOBS\""]);
    request["env_vars"] = json!([
        { "name": "BOTH", "value": base64(b"job") }, { "name": "JOBS", "value": base64(b"job") },
    ]);
    hub.queue(request);
    let _agent = StartAgent::start_with(&world, &hub, |command| {
        command.arg("--env-vars=BOTH=agent,OWN=a=b");
    });
    let finished = hub.finish("1");
    assert_eq!(finished.output(), "agent,a=b,job\n");
    assert_eq!(finished.steps()[0].1, "Exporting BOTH\nExporting JOBS\nExporting OWN\n");
}

#[test]
fn a_job_finds_no_token_of_the_agent() {
    const TOKEN: &str = "a-token-for-registrations";
    let hub = Hub::start(SOON);
    hub.set(|settings| settings.token = TOKEN.into());
    let world = World::new();
    let agent = StartAgent::start_with(&world, &hub, |command| {
        command.env("SEMAPHORE_AGENT_TOKEN", TOKEN);
    });
    let output = hub.run(&job("1", &["env; cat /proc/$PPID/environ"])).output();
    assert!(output.contains("HOME=") && !output.contains(TOKEN), "{output}");
    assert!(!output.contains("SEMAPHORE_AGENT_TOKEN"), "{output}");
    assert!(!agent.own_log().contains(TOKEN));
}

#[test]
fn queued_jobs_run_one_after_another_without_a_pause() {
    let hub = Hub::start(FAR_OFF);
    let world = World::new();
    // Each job checks that it is alone: the file of the previous job is gone.
    let alone = "set -e; mkdir ~/alone; trap 'rmdir ~/alone' EXIT; echo $$ >>~/shells; exit 0";
    let ids: Vec<_> = (0..10)
        .map(|number| hub.queue(job(&number.to_string(), &[&format!("bash -c {alone:?}")])))
        .collect();
    let _agent = StartAgent::start(&world, &hub);
    for id in &ids {
        assert_eq!(hub.finish(id).result(), "passed");
        assert_eq!(hub.look(|known| known.jobs[id].fetched), 1);
    }
    let order = hub.states().into_iter().filter(|state| state.starts_with("finished"));
    let expected = ids.iter().map(|id| format!("finished-job {id} passed"));
    assert!(order.eq(expected), "{:?}", hub.states());
    assert_eq!(fs::read_to_string(world.home().join("shells")).unwrap().lines().count(), 10);
}

#[test]
fn a_failed_job_is_reported_as_failed() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    let finished = hub
        .run(&with_epilogues(job("1", &["exit_with() { return $1; }; exit_with 3", "echo next"])));
    assert_eq!(finished.result(), "failed");
    let codes: Vec<_> = finished.steps().iter().map(|(.., code)| *code).collect();
    assert_eq!(codes, [0, 0, 3, 0, 0, 0]);
    assert_eq!(titles(&finished)[4..], ["echo epilogue always", "echo epilogue on_fail"]);
}

#[test]
fn a_stopped_job_is_reported_as_stopped() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    let (request, marker) = marked(with_epilogues(job("stopped", &[RUN_FOR_EVER, "echo next"])));
    let id = hub.queue(request);
    hub.wait_for_log(&id, RUNNING);
    assert!(!processes_with(&marker).is_empty());
    hub.stop_job(&id);
    let finished = hub.finish(&id);
    assert_eq!(finished.result(), "stopped");
    assert_eq!(finished.steps()[2..], [(RUN_FOR_EVER.into(), "running\n".into(), 1)]);
    assert_eq!(processes_with(&marker), [""; 0]);
    let states = hub.states().into_iter().filter(|state| state.contains("stopped"));
    let expected = ["starting-job", "running-job", "stopping-job", "finished-job"];
    assert!(states.map(|state| state.split(' ').next().unwrap().to_owned()).eq(expected));
    // The next job is not stopped.
    assert_eq!(hub.run(&job("next", &["true"])).result(), "passed");
}

#[test]
fn an_invalid_job_fails_with_the_reason_in_its_log() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    let cases = [
        ("executor", json!("magic"), "magic"),
        ("executor", json!("dockercompose"), "containers"),
        ("env_vars", json!([{ "name": "A", "value": "~~~" }]), "A"),
        ("files", json!([{ "path": "f", "content": "~~~", "mode": "600" }]), "f"),
        (
            "files",
            json!([{ "path": "f", "content": "YQ==", "mode": "rw" }]),
            "bad file permission 'rw'",
        ),
    ];
    for (number, (field, value, why)) in cases.into_iter().enumerate() {
        let mut request = job(&number.to_string(), &["touch ~/never"]);
        request[field] = value.clone();
        let finished = hub.run(&request);
        assert_eq!(finished.result(), "failed", "{value}");
        assert!(
            finished.steps().iter().any(|(_, output, code)| *code != 0 && output.contains(why)),
            "{value}: {finished:?}"
        );
    }
    assert!(!world.home().join("never").exists());
    assert_eq!(hub.run(&job("next", &["true"])).result(), "passed");
}

#[test]
fn a_malformed_job_is_a_failed_job() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let agent = StartAgent::start(&world, &hub);
    let cases = [
        ("logger", json!({ "method": "pull" })),
        ("logger", json!({ "method": "push" })),
        ("logger", json!({ "method": "push", "url": "", "token": "t" })),
        ("logger", json!({ "method": "carry" })),
        ("commands", json!("touch ~/never")),
        ("env_vars", json!({ "A": "YQ==" })),
    ];
    for (number, (field, value)) in cases.into_iter().enumerate() {
        let mut request = job(&number.to_string(), &["touch ~/never"]);
        request[field] = value.clone();
        let id = hub.queue(request);
        assert_eq!(hub.result(&id), "failed", "{value}");
        assert_eq!(
            hub.look(|known| (known.jobs[&id].fetched, known.jobs[&id].log.len())),
            (1, 0),
            "{value}"
        );
    }
    wait_until(
        || agent.own_log().matches("the job can't be run").count() == 6,
        || format!("not all are in the agent's own log: {}", agent.own_log()),
    );
    assert!(!world.home().join("never").exists());
    assert_eq!(hub.run(&job("next", &["true"])).result(), "passed");
}

#[test]
fn a_job_that_can_not_be_fetched_is_a_failed_job() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    hub.fail(Fault::Status(404), |received| received.is("GET", "/jobs/1"));
    let id = hub.queue(job("1", &["touch ~/never"]));
    assert_eq!(hub.result(&id), "failed");
    let tries = hub.look(|known| {
        known.requests.iter().filter(|received| received.is("GET", "/jobs/1")).count()
    });
    assert_eq!(tries, 10);
    assert_eq!(hub.run(&job("next", &["true"])).result(), "passed");
    assert!(!world.home().join("never").exists());
}

#[test]
fn a_job_is_fetched_again_until_the_response_is_valid() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    let mut faults = vec![Fault::Status(500), Fault::Drop, Fault::Cut, Fault::Nonsense];
    hub.misbehave(Some(Box::new(move |received, _| {
        received.is("GET", "/jobs/1").then(|| faults.pop()).flatten()
    })));
    assert_eq!(hub.run(&job("1", &["true"])).result(), "passed");
}

#[test]
fn a_job_that_is_stopped_while_it_is_fetched_never_runs() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    hub.fail(Fault::Status(500), |received| received.is("GET", "/jobs/1"));
    let id = hub.queue(job("1", &["touch ~/never"]));
    hub.wait_for_state("starting-job");
    hub.stop_job(&id);
    assert_eq!(hub.result(&id), "stopped");
    hub.misbehave(None);
    assert_eq!(hub.run(&job("next", &["true"])).result(), "passed");
    assert!(!world.home().join("never").exists());
}

#[test]
fn the_control_plane_ends_an_agent_and_the_hook_learns_why() {
    for (word, reason) in [("idle", "IDLE"), ("requested", "REQUESTED"), ("whim", "UNKNOWN")] {
        let hub = Hub::start(SOON);
        let world = World::new();
        let hook = world.file("hook", "echo $SEMAPHORE_AGENT_SHUTDOWN_REASON >>~/reason\n");
        let mut agent = StartAgent::start_with(&world, &hub, |command| {
            command.arg("--shutdown-hook-path").arg(hook);
        });
        hub.wait_for_state("waiting-for-jobs");
        hub.shut_down(word);
        assert_eq!(agent.exit_code(), Some(0));
        assert_eq!(hub.look(|known| known.disconnected), 1);
        assert_eq!(fs::read_to_string(world.home().join("reason")).unwrap(), format!("{reason}\n"));
    }
}

#[test]
fn an_agent_for_a_single_job_ends_after_it() {
    let hub = Hub::start(FAR_OFF);
    let world = World::new();
    let hook = world.file("hook", "echo $SEMAPHORE_AGENT_SHUTDOWN_REASON >>~/reason\n");
    let first = hub.queue(job("first", &["false"]));
    let second = hub.queue(job("second", &["touch ~/never"]));
    let mut agent = StartAgent::start_with(&world, &hub, |command| {
        command.arg("--disconnect-after-job").arg("--shutdown-hook-path").arg(hook);
    });
    assert_eq!(agent.exit_code(), Some(0));
    assert_eq!(hub.finish(&first).result(), "failed");
    assert_eq!(hub.look(|known| (known.jobs[&second].fetched, known.disconnected)), (0, 1));
    assert_eq!(hub.look(|known| known.registrations[0]["single_job"].clone()), true);
    assert_eq!(fs::read_to_string(world.home().join("reason")).unwrap(), "JOB_FINISHED\n");
}

const KEYS: &str = "ssh-ed25519 AAAA own\n";
const PROFILE: &str = "export FROM_PROFILE=1\n";

#[test]
fn ssh_access_needs_keys_of_the_job_and_ends_with_its_result() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let (keys, script) = (world.home().join(".ssh/authorized_keys"), world.jump_point());
    fs::create_dir(keys.parent().unwrap()).unwrap();
    fs::write(&keys, KEYS).unwrap();
    let _agent = StartAgent::start(&world, &hub);
    let show = format!("cat ~/.ssh/authorized_keys; grep -q job- {}; echo $?", script.display());
    let at_the_end = {
        let (keys, script) = (keys.clone(), script.clone());
        hub.watch("finished-job", move || {
            let script = fs::read_to_string(&script).unwrap();
            (fs::read_to_string(&keys).unwrap(), script.contains("job-"))
        })
    };
    let without = hub.run(&job("without", &[&show]));
    assert_eq!(without.output(), format!("{KEYS}1\n"));
    assert_eq!(at_the_end.recv().unwrap(), (KEYS.to_owned(), false));
    let mut request = job("with", &[&show]);
    request["ssh_public_keys"] = json!([base64(b"ssh-ed25519 AAAA of-the-job")]);
    let with = hub.run(&request).output();
    assert!(with.contains(KEYS) && with.contains("of-the-job") && with.ends_with("0\n"), "{with}");
    assert_eq!(at_the_end.recv().unwrap(), (KEYS.to_owned(), false));
}

#[test]
fn the_login_profile_is_not_changed() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    let mut request = job("1", &["cat ~/.bash_profile", "echo own >~/own"]);
    request["env_vars"] = json!([{ "name": "A", "value": "YQ==" }]);
    request["ssh_public_keys"] = json!([base64(b"ssh-ed25519 AAAA of-the-job")]);
    let finished = hub.run(&request);
    assert_eq!(finished.commands()[0].1, 1, "{finished:?}");
    assert!(!world.home().join(".bash_profile").exists());
    fs::write(world.home().join(".bash_profile"), PROFILE).unwrap();
    request["job_id"] = "2".into();
    assert_eq!(hub.run(&request).commands()[0], (PROFILE.to_owned(), 0));
    assert_eq!(fs::read_to_string(world.home().join(".bash_profile")).unwrap(), PROFILE);
}

#[test]
fn nothing_of_a_job_is_left_when_its_result_is_reported() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    let (request, marker) = marked(job(
        "leaver",
        &[
            "nohup sleep 1000 >/dev/null 2>&1 &",
            "setsid -f bash -c \"trap '' TERM HUP INT; touch ~/up; while :; do sleep 1000; done\"",
            "until [[ -e ~/up ]]; do sleep 0.01; done",
        ],
    ));
    let (of_marker, state) = (marker.clone(), world.state());
    let at_the_end = hub.watch("finished-job", move || {
        let entries = fs::read_dir(&state).unwrap();
        let entries = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        (processes_with(&of_marker), entries.filter(|name| name != "lock").count())
    });
    assert_eq!(hub.run(&request).result(), "passed");
    let (processes, directories) = at_the_end.recv().unwrap();
    assert_eq!(processes, [""; 0]);
    // The last job's directory still holds the log.
    assert!(directories <= 1, "{directories}");
}

#[test]
fn callbacks_in_a_request_are_never_called() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let server = CallbackServer::start();
    let mut agent = StartAgent::start(&world, &hub);
    let mut request = job("1", &["true"]);
    request["callbacks"] = json!({
        "finished": server.url("/finished"), "teardown_finished": server.url("/teardown_finished"),
        "token": "t",
    });
    assert_eq!(hub.run(&request).result(), "passed");
    hub.wait_for_state("waiting-for-jobs");
    agent.signal(Signal::SIGTERM);
    assert_eq!(agent.exit_code(), Some(0));
    assert_eq!(server.count(), 0);
}
