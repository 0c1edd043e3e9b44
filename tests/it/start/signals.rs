//! Signals to an agent of a control plane, in each of its states.

use std::fs;
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;
use serde_json::Value;

use test_support::control_plane::{Fault, ReceivedRequest};
use test_support::start::{FAR_OFF, Hub, SOON, StartAgent};
use test_support::{RUN_UNTIL_GO, RUNNING, World, job, marked, processes_with, unique, wait_until};

/// A grace period that is longer than any test.
const LONG_GRACE: u64 = 10_000;

/// Processes that ignore SIGTERM, inside and outside of the shell's process session.
const STUBBORN: [&str; 3] = [
    "setsid -f bash -c \"trap '' TERM HUP INT; touch ~/up; while :; do sleep 1000; done\"",
    "until [[ -e ~/up ]]; do sleep 0.01; done; rm ~/up",
    "trap '' TERM HUP INT; echo running; while :; do sleep 1000; done",
];

/// Starts an agent whose shutdown hook records the shutdown reason.
fn start(world: &World, hub: &Hub, grace: u64) -> StartAgent {
    let hook = world.file("hook", "echo $SEMAPHORE_AGENT_SHUTDOWN_REASON >>~/reason\n");
    StartAgent::start_with(world, hub, |command| {
        command.arg(format!("--interruption-grace-period={grace}"));
        command.arg("--shutdown-hook-path").arg(hook);
    })
}

/// Queues a job whose processes have a marker.
fn queue(hub: &Hub, commands: &[&str]) -> (String, String) {
    let mut all = vec!["(sleep 1000 &)"];
    all.extend(commands);
    let (request, marker) = marked(job(&unique(), &all));
    (hub.queue(request), marker)
}

fn wait_until_it_runs(hub: &Hub, (id, marker): &(String, String)) {
    hub.wait_for_log(id, RUNNING);
    assert!(!processes_with(marker).is_empty());
}

/// Starts an agent that runs such a job.
fn run(world: &World, hub: &Hub, grace: u64, commands: &[&str]) -> (StartAgent, String, String) {
    let job = queue(hub, commands);
    let agent = start(world, hub, grace);
    wait_until_it_runs(hub, &job);
    (agent, job.0, job.1)
}

/// Asserts that the agent ended gracefully: it disconnected once, and its hook has the reason.
fn assert_left(hub: &Hub, world: &World, agent: &mut StartAgent) {
    assert_eq!(agent.exit_code(), Some(0));
    assert_eq!(hub.look(|known| known.disconnected), 1);
    assert!(hub.look(|known| known.requests.last().unwrap().is("POST", "/disconnect")));
    assert_eq!(fs::read_to_string(world.home().join("reason")).unwrap(), "INTERRUPTED\n");
}

/// Waits for the report with the time of the interruption.
fn interrupted(hub: &Hub) -> Value {
    hub.find("interrupted_at", |known| {
        known.reports.iter().find(|report| report["interrupted_at"] != 0).cloned()
    })
}

fn go(world: &World) {
    fs::write(world.home().join("go"), "").unwrap();
}

#[test]
fn an_agent_that_is_not_registered_yet_ends_at_once() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut hub = Hub::start(FAR_OFF);
        hub.pause();
        let world = World::new();
        let mut agent = start(&world, &hub, LONG_GRACE);
        agent.wait_for_own_log("the request failed; retrying");
        agent.signal(signal);
        assert_eq!(agent.exit_code(), Some(0));
        assert_eq!(hub.look(|known| known.requests.len()), 0);
        assert_eq!(fs::read_to_string(world.home().join("reason")).unwrap(), "INTERRUPTED\n");
    }
}

#[test]
fn an_agent_without_a_job_reports_the_interruption_at_once_and_ends() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let hub = Hub::start(FAR_OFF);
        let world = World::new();
        let mut agent = start(&world, &hub, LONG_GRACE);
        hub.wait_for_state("waiting-for-jobs");
        let before = actors::log::event::unix_time();
        agent.signal(signal);
        assert_left(&hub, &world, &mut agent);
        let report = interrupted(&hub);
        assert_eq!(report["state"], "waiting-for-jobs");
        let at = report["interrupted_at"].as_u64().unwrap();
        assert!((before..=actors::log::event::unix_time()).contains(&at), "{at}");
    }
}

#[test]
fn an_interruption_is_reported_as_soon_as_the_control_plane_responds() {
    let mut hub = Hub::start(SOON);
    let world = World::new();
    let mut agent = start(&world, &hub, LONG_GRACE);
    hub.wait_for_state("waiting-for-jobs");
    hub.pause();
    agent.wait_for_own_log("the report to the control plane failed");
    agent.signal(Signal::SIGTERM);
    agent.wait_for_own_log("asked to end");
    hub.resume().unwrap();
    assert_left(&hub, &world, &mut agent);
}

#[test]
fn a_running_job_without_a_grace_period_is_stopped() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let (mut agent, id, marker) = run(&world, &hub, 0, &STUBBORN);
    agent.signal(Signal::SIGTERM);
    assert_eq!(interrupted(&hub)["state"], "running-job");
    let finished = hub.finish(&id);
    assert_eq!(finished.result(), "stopped");
    assert_eq!(finished.commands().last().unwrap(), &("running\n".into(), 1));
    assert_left(&hub, &world, &mut agent);
    assert_eq!(processes_with(&marker), [""; 0]);
}

#[test]
fn a_running_job_may_go_on_for_the_grace_period() {
    let hub = Hub::start(FAR_OFF);
    let world = World::new();
    let (mut agent, id, marker) = run(&world, &hub, LONG_GRACE, &[RUN_UNTIL_GO, "echo next"]);
    let never = hub.queue(job("never", &["touch ~/never"]));
    agent.signal(Signal::SIGTERM);
    // The first report after the signal comes at once, although the next regular one is far off.
    assert_eq!(interrupted(&hub)["state"], "running-job");
    assert!(!processes_with(&marker).is_empty());
    go(&world);
    let finished = hub.finish(&id);
    assert_eq!((finished.result(), finished.output().as_str()), ("passed", "running\nnext\n"));
    assert_left(&hub, &world, &mut agent);
    assert_eq!(hub.look(|known| known.jobs[&never].fetched), 0);
}

#[test]
fn a_job_that_is_being_fetched_is_not_run_after_a_signal() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let mut agent = start(&world, &hub, 0);
    hub.fail(Fault::Status(500), |received| received.is("GET", "/jobs/1"));
    let id = hub.queue(job("1", &["touch ~/never"]));
    hub.wait_until("a try", |known| {
        known.requests.iter().any(|received| received.is("GET", "/jobs/1"))
    });
    agent.signal(Signal::SIGTERM);
    assert_eq!(hub.result(&id), "stopped");
    assert_left(&hub, &world, &mut agent);
    assert!(!world.home().join("never").exists());
}

/// Returns the order of events: each part of the log, the result, the disconnection.
fn order_of_end(hub: &Hub) -> Vec<&'static str> {
    let mut order: Vec<_> = hub.look(|known| {
        let taken = known.requests.iter().filter(|received| received.status == Some(200));
        let kind = |received: &ReceivedRequest| {
            let is_result = received.body["state"] == "finished-job";
            let kinds = [
                (received.is_log(), "log"),
                (is_result, "result"),
                (received.is("POST", "/disconnect"), "end"),
            ];
            kinds.into_iter().find(|(is, _)| *is).map(|(_, kind)| kind)
        };
        taken.filter_map(kind).collect()
    });
    order.dedup();
    order
}

#[test]
fn a_log_is_delivered_before_the_agent_leaves() {
    for (grace, state) in [(LONG_GRACE, "running-job"), (0, "stopping-job")] {
        let hub = Hub::start(SOON);
        let world = World::new();
        let (mut agent, id, marker) = run(&world, &hub, grace, &[RUN_UNTIL_GO, "echo next"]);
        hub.fail(Fault::Status(503), ReceivedRequest::is_log);
        go(&world);
        wait_until(|| processes_with(&marker).is_empty(), || "it does not end".into());
        agent.wait_for_own_log("the log server did not accept a batch; retrying");
        agent.signal(Signal::SIGTERM);
        assert_eq!(interrupted(&hub)["state"], "running-job");
        hub.wait_for_state(state);
        assert!(hub.look(|known| known.jobs[&id].result.is_none() && known.disconnected == 0));
        hub.misbehave(None);
        let finished = hub.finish(&id);
        assert_eq!((finished.result(), finished.output().as_str()), ("passed", "running\nnext\n"));
        assert_left(&hub, &world, &mut agent);
        assert_eq!(order_of_end(&hub), ["log", "result", "end"]);
    }
}

#[test]
fn a_second_signal_stops_the_job_and_ends_the_agent_gracefully() {
    for second in [Signal::SIGTERM, Signal::SIGINT] {
        let hub = Hub::start(FAR_OFF);
        let world = World::new();
        let (mut agent, id, marker) = run(&world, &hub, LONG_GRACE, &STUBBORN);
        agent.signal(Signal::SIGTERM);
        interrupted(&hub);
        agent.signal(second);
        let finished = hub.finish(&id);
        assert_eq!(finished.result(), "stopped");
        assert_left(&hub, &world, &mut agent);
        assert_eq!(processes_with(&marker), [""; 0]);
        assert_eq!(order_of_end(&hub), ["log", "result", "end"]);
    }
}

#[test]
fn a_second_signal_to_an_agent_without_a_job_ends_it() {
    let hub = Hub::start(FAR_OFF);
    let world = World::new();
    let mut agent = start(&world, &hub, LONG_GRACE);
    hub.wait_for_state("waiting-for-jobs");
    // This control plane never tells an agent to end.
    hub.answer_next((0..100).map(|_| serde_json::json!({ "action": "continue" })));
    agent.signal(Signal::SIGTERM);
    interrupted(&hub);
    agent.signal(Signal::SIGTERM);
    assert_left(&hub, &world, &mut agent);
}

#[test]
fn a_third_signal_kills_at_once() {
    for is_away in [false, true] {
        let mut hub = Hub::start(FAR_OFF);
        let world = World::new();
        let (mut agent, id, marker) = run(&world, &hub, LONG_GRACE, &STUBBORN);
        if is_away {
            hub.pause();
        } else {
            // The agent does not wait for the end of the job.
            hub.fail(Fault::Status(503), ReceivedRequest::is_log);
        }
        for text in ["asked to end", "second signal", "third signal"] {
            agent.signal(Signal::SIGTERM);
            agent.wait_for_own_log(text);
        }
        assert_eq!(agent.exit_code(), Some(1));
        assert_eq!(processes_with(&marker), [""; 0]);
        assert!(hub.look(|known| known.jobs[&id].result.is_none() && known.disconnected == 0));
        assert!(!world.home().join("reason").exists());
    }
}

#[test]
fn nothing_of_a_job_survives_when_the_agent_is_killed() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let (agent, _, marker) = run(&world, &hub, 0, &STUBBORN);
    nix::sys::signal::kill(agent.pid(), Signal::SIGKILL).unwrap();
    // The agent can't report the end of the clean-up, so the test watches the processes.
    wait_until(|| processes_with(&marker).is_empty(), || format!("{:?}", processes_with(&marker)));
    drop(agent);
    // The next agent is not affected.
    let _agent = start(&world, &hub, 0);
    assert_eq!(hub.run(&job("next", &["echo hi"])).output(), "hi\n");
}

#[test]
fn sighup_works_like_the_other_signals_unless_it_is_ignored() {
    for is_ignored in [false, true] {
        let hub = Hub::start(SOON);
        let world = World::new();
        let running = queue(&hub, &[RUN_UNTIL_GO]);
        let mut agent = StartAgent::start_with(&world, &hub, |command| {
            if is_ignored {
                let agent = std::mem::replace(command, Command::new("nohup"));
                command.arg(agent.get_program()).args(agent.get_args());
                command.env_clear().stdin(Stdio::null()).stderr(Stdio::null());
                command.envs(agent.get_envs().filter_map(|(name, value)| Some((name, value?))));
            }
            command.arg(format!("--interruption-grace-period={LONG_GRACE}"));
        });
        wait_until_it_runs(&hub, &running);
        agent.signal(Signal::SIGHUP);
        let reports = hub.look(|known| known.reports.len());
        hub.wait_until("two more reports", |known| known.reports.len() > reports + 2);
        let is_interrupted = hub.look(|known| known.reports.last().unwrap()["interrupted_at"] != 0);
        assert_eq!(is_interrupted, !is_ignored);
        go(&world);
        assert_eq!(hub.finish(&running.0).result(), "passed");
        if is_ignored {
            agent.signal(Signal::SIGTERM);
        }
        assert_eq!(agent.exit_code(), Some(0));
    }
}
