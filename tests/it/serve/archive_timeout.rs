//! The agent waits for a missing archivator only as long as the operator has configured.

use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::time::Instant;

use test_support::callbacks::CallbackServer;
use test_support::serve::{ServeAgent, refusal};
use test_support::{RUN_FOR_EVER, RUNNING, World, job, wait_until};

const VARIABLE: &str = "SEMAPHORE_AGENT_ARCHIVE_TIMEOUT";

fn with_callbacks(server: &CallbackServer, mut job: Value) -> Value {
    job["callbacks"] = json!({
        "finished": server.url("/finished"),
        "teardown_finished": server.url("/teardown_finished"),
    });
    job
}

fn paths(server: &CallbackServer, count: usize) -> Vec<String> {
    (0..count).map(|_| server.next().path).collect()
}

/// Returns the warnings in an agent's own log that name this job.
fn warnings(agent: &ServeAgent, id: &str) -> Vec<String> {
    let log = agent.own_log();
    let is_about = |line: &&str| line.contains(" WARN ") && line.contains(&format!("job={id}"));
    log.lines().filter(is_about).map(str::to_owned).collect()
}

#[test]
fn the_slot_becomes_free_although_nobody_fetched_the_log() {
    let ways: [fn(&World, &mut Command); 3] = [
        |_, command| {
            command.args(["--archive-timeout", "1"]);
        },
        |_, command| {
            command.env(VARIABLE, "1");
        },
        |world, command| {
            let file = world.file("config.yaml", "archive-timeout: 1\n");
            command.arg("--config-file").arg(file);
        },
    ];
    for (number, way) in ways.into_iter().enumerate() {
        let world = World::new();
        let server = CallbackServer::start();
        let agent = ServeAgent::start_with(&world, |command| way(&world, command));
        let id = format!("abandoned-{number}");
        agent.post_job(&with_callbacks(&server, job(&id, &["true"]))).of_status(200);
        assert_eq!(paths(&server, 2), ["/finished", "/teardown_finished"]);
        agent.wait_for_state("waiting-for-job");
        assert_eq!(warnings(&agent, &id).len(), 1, "{}", agent.own_log());
    }
}

#[test]
fn the_status_says_what_the_agent_waits_for() {
    let server = CallbackServer::start();
    let agent = ServeAgent::start_with(&World::new(), |command| {
        command.args(["--archive-timeout", "600"]);
    });
    let assert_status = |state: &str, waits_for: Option<&str>| {
        let mut expected = json!({ "state": state, "version": env!("CARGO_PKG_VERSION") });
        if let Some(waits_for) = waits_for {
            expected["waiting_for"] = waits_for.into();
        }
        assert_eq!(agent.get("/status").of_status(200).json(), expected);
    };
    assert_status("waiting-for-job", None);
    agent.post_job(&with_callbacks(&server, job("1", &[RUN_FOR_EVER]))).of_status(200);
    agent.wait_for_log("1", RUNNING);
    assert_status("job-received", None);
    agent.post("/stop", b"").of_status(200);
    agent.wait_for_log("1", r#""event":"job_finished""#);
    let waits = || agent.get("/status").json().get("waiting_for").is_some();
    wait_until(waits, || "it does not say that it waits".to_owned());
    // The job was stopped and has ended.
    let state = agent.get("/status").json()["state"].as_str().unwrap().to_owned();
    assert_ne!(state, "waiting-for-job");
    assert_status(&state, Some("archivator"));
    assert_eq!(server.next().path, "/finished");
    server.assert_silent();
    agent.archive("1");
    assert_eq!(server.next().path, "/teardown_finished");
    agent.wait_for_state("waiting-for-job");
    assert_status("waiting-for-job", None);
    assert_eq!(warnings(&agent, "1"), [""; 0]);
}

#[test]
fn the_timeout_also_applies_when_the_agent_ends() {
    let server = CallbackServer::start();
    let mut agent = ServeAgent::start_with(&World::new(), |command| {
        command.args(["--archive-timeout", "5"]);
    });
    agent.post_job(&with_callbacks(&server, job("1", &["true"]))).of_status(200);
    agent.wait_for_log("1", r#""event":"job_finished""#);
    let asked_at = Instant::now();
    agent.signal(Signal::SIGTERM);
    assert_eq!(agent.wait_for_exit().code(), Some(0));
    // Less than the minute that an ending agent otherwise gives the archivator.
    assert!(asked_at.elapsed() < Duration::from_secs(30), "{:?}", asked_at.elapsed());
    assert_eq!(paths(&server, 2), ["/finished", "/teardown_finished"]);
    agent.whole_log();
    assert_eq!(warnings(&agent, "1").len(), 1, "{}", agent.whole_log());
}

#[test]
fn an_invalid_timeout_is_refused() {
    for value in ["-1", "soon", "1.5", "99999999999"] {
        let message = refusal(&World::new(), |command| {
            command.arg(format!("--archive-timeout={value}"));
        });
        assert!(message.contains("archive-timeout"), "{value}: {message}");
        let message = refusal(&World::new(), |command| {
            command.env(VARIABLE, value);
        });
        assert!(message.contains(VARIABLE), "{value}: {message}");
    }
}
