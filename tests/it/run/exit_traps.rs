//! Clean-up by the job itself at its end: traps of its shell and programs, and the time that they have.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::time::Instant;

use test_support::serve::{ServeAgent, refusal};
use test_support::start::{Hub, SOON, StartAgent};
use test_support::{World, job, job_of, marked, processes_with, start, wait_for_end};

const VARIABLE: &str = "SEMAPHORE_AGENT_GRACE_PERIOD";

/// A program that ignores all requests to end.
const STUBBORN: &str = "(trap '' TERM HUP; : >~/stubborn; exec sleep 1000) & \
                        until [ -e ~/stubborn ]; do sleep 0.01; done; echo begun";

/// Returns a program that takes this many seconds to end after SIGTERM.
fn ends_after(seconds: u32) -> String {
    format!(
        "bash -c 'trap \"sleep {seconds}; echo cleaned >~/cleaned; exit\" TERM; echo running; \
         while :; do sleep 0.1; done'"
    )
}

fn has(path: &Path, text: &str) -> bool {
    fs::read_to_string(path).is_ok_and(|found| found == text)
}

#[test]
fn the_exit_trap_of_the_shell_runs_to_its_end() {
    let trap = "trap 'sleep 1; echo bye >~/bye' EXIT";
    for commands in [&[trap][..], &[STUBBORN, trap], &[trap, STUBBORN, "exit 3"]] {
        let world = World::new();
        let (job, marker) = marked(serde_json::from_str(&job_of(commands)).unwrap());
        let finished = world.run(&job.to_string());
        assert!(has(&world.home().join("bye"), "bye\n"), "{commands:?}: {finished:?}");
        assert_eq!(processes_with(&marker), [""; 0], "{commands:?}");
    }
}

#[test]
fn the_running_directives_own_trap_runs_when_a_job_is_stopped() {
    let world = World::new();
    let mut running = world.start(&job_of(&[STUBBORN, &ends_after(1)]));
    running.wait_for_output("running\n");
    running.signal(Signal::SIGINT);
    assert_eq!(running.finish().result(), "stopped");
    assert!(has(&world.home().join("cleaned"), "cleaned\n"));

    let world = World::new();
    let agent = ServeAgent::start(&world);
    agent.post_job(&job("1", &[STUBBORN, &ends_after(1)])).of_status(200);
    agent.wait_for_log("1", r#""output":"running\n""#);
    agent.post("/stop", b"").of_status(200);
    assert_eq!(agent.finish("1").result(), "stopped");
    assert!(has(&world.home().join("cleaned"), "cleaned\n"));
}

#[test]
fn slow_traps_get_the_grace_period_of_the_configuration() {
    let command = ends_after(4);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let world = World::new();
            let file = world.file("job.json", job_of(&[&command]));
            let mut running = world.start_file_with(&file, |agent| {
                agent.args(["--grace-period", "8"]);
            });
            running.wait_for_output("running\n");
            running.signal(Signal::SIGTERM);
            assert_eq!(running.finish().result(), "stopped");
            assert!(has(&world.home().join("cleaned"), "cleaned\n"));
        });
        scope.spawn(|| {
            let world = World::new();
            let agent = ServeAgent::start_with(&world, |agent| {
                agent.env(VARIABLE, "8");
            });
            agent.post_job(&job("1", &[&command])).of_status(200);
            agent.wait_for_log("1", r#""output":"running\n""#);
            agent.post("/stop", b"").of_status(200);
            assert_eq!(agent.finish("1").result(), "stopped");
            assert!(has(&world.home().join("cleaned"), "cleaned\n"));
        });
        scope.spawn(|| {
            let world = World::new();
            let hub = Hub::start(SOON);
            let _agent = StartAgent::start_with(&world, &hub, |agent| {
                let file = world.file("config.yaml", "grace-period: 8\n");
                agent.arg("--config-file").arg(file);
            });
            let id = hub.queue(job("1", &[&command]));
            hub.wait_for_log(&id, r#""output":"running\n""#);
            hub.stop_job(&id);
            assert_eq!(hub.finish(&id).result(), "stopped");
            assert!(has(&world.home().join("cleaned"), "cleaned\n"));
        });
    });
}

/// Returns the time from the stop request to the end of a stubborn job, with this grace period.
fn time_to_end(grace: &str) -> Duration {
    let world = World::new();
    let (job, marker) =
        marked(serde_json::from_str(&job_of(&[STUBBORN, "echo running; sleep 1000"])).unwrap());
    let file = world.file("job.json", job.to_string());
    let mut running = world.start_file_with(&file, |agent| {
        agent.args(["--grace-period", grace]);
    });
    running.wait_for_output("running\n");
    let asked_at = Instant::now();
    running.signal(Signal::SIGTERM);
    assert_eq!(running.finish().result(), "stopped");
    assert_eq!(processes_with(&marker), [""; 0]);
    asked_at.elapsed()
}

#[test]
fn without_a_grace_period_stubborn_processes_are_killed_at_once() {
    // A busy machine may delay some of the runs, but hardly all of them.
    let shortest = (0..5).map(|_| time_to_end("0")).min().unwrap();
    assert!(shortest < Duration::from_millis(1500), "{shortest:?}");
    assert!(time_to_end("3") >= Duration::from_secs(3));
}

/// Returns the message with which `agent run` refuses this option or variable.
fn refusal_of_run(adapt: impl FnOnce(&mut Command)) -> String {
    let world = World::new();
    let mut agent = world.agent();
    agent.arg("run").arg(world.file("job.json", job_of(&["touch ~/ran"])));
    adapt(&mut agent);
    let output = wait_for_end(agent.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(!world.home().join("ran").exists());
    message
}

#[test]
fn an_invalid_grace_period_is_refused() {
    for value in ["-1", "soon", "1.5", "99999999999999999999999"] {
        let option = format!("--grace-period={value}");
        let world = World::new();
        let messages = [
            refusal_of_run(|agent| {
                agent.arg(&option);
            }),
            refusal_of_run(|agent| {
                agent.env(VARIABLE, value);
            }),
            refusal(&world, |agent| {
                agent.arg(&option);
            }),
            refusal(&world, |agent| {
                agent.env(VARIABLE, value);
            }),
            start::refusal(start::command(&world).arg(&option)),
            start::refusal(start::command(&world).env(VARIABLE, value)),
        ];
        for message in messages {
            let is_named = message.contains("grace-period") || message.contains(VARIABLE);
            assert!(is_named, "{value}: {message}");
        }
    }
}

#[test]
fn no_trap_lets_a_stopped_shell_continue() {
    for trap in [
        "trap : HUP INT TERM EXIT",
        "trap : 41",
        "trap '' HUP INT TERM 26 41",
        "for s in {1..64}; do trap '' $s 2>/dev/null; done",
        "trap : DEBUG ERR RETURN",
    ] {
        let world = World::new();
        let stopped = format!("{trap}; echo waiting; sleep 100; touch ~/after");
        let mut running = world.start(&job_of(&[trap, &stopped]));
        running.wait_for_output("waiting\n");
        running.signal(Signal::SIGTERM);
        assert_eq!(running.finish().result(), "stopped", "{trap}");
        assert!(!world.home().join("after").exists(), "{trap}");
    }
}
