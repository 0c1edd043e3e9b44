//! A command that fails because a process was killed has the reason in its output.

use serde_json::{Value, json};

use crate::docker::engine::Wire;
use test_support::serve::ServeAgent;
use test_support::{Finished, RUN_FOR_EVER, RUNNING, World, docker, job_of};

/// Commands that end their shell, and a word that the reason must contain.
const ENDS: [(&str, &str); 6] = [
    ("exit 0", "exit"),
    ("exit 3", "3"),
    ("exec true", "shell"),
    ("set -e\nfalse", "shell"),
    ("kill -9 $$", "kill"),
    ("echo hi; logout", "exit"),
];

/// Asserts that the command fails with a message that the shell has ended, and why.
fn assert_explained(finished: &Finished, end: &str, word: &str) {
    let commands = finished.commands();
    let (output, exit_code) = &commands[0];
    assert_eq!(*exit_code, 1, "{end}: {commands:?}");
    let reason = output.lines().last().unwrap_or_default().to_lowercase();
    assert!(reason.contains("shell"), "{end}: no reason: {commands:?}");
    assert!(reason.contains(word), "{end}: no {word:?}: {commands:?}");
    assert_eq!(finished.result(), "failed", "{end}");
}

#[test]
fn a_command_that_ends_the_shell_says_so() {
    for (end, word) in ENDS {
        let finished = World::new().run_commands(&[end, "echo not reached"]);
        assert_explained(&finished, end, word);
        assert!(!finished.output().contains("not reached"));
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_command_that_ends_the_shell_of_a_container_says_so() {
    for (end, _) in ENDS {
        let job = docker::job("bash", &[end, "echo not reached"]);
        assert_explained(&World::new().run(&job.to_string()), end, "shell");
        assert_eq!(docker::leftovers_of(&job), [""; 0]);
    }
}

#[test]
fn an_epilogue_that_ends_the_shell_says_so() {
    let mut job: Value = serde_json::from_str(&job_of(&["true"])).unwrap();
    job["epilogue_always_commands"] = json!([{ "directive": "exit 0" }]);
    let finished = World::new().run(&job.to_string());
    let last = finished.commands().pop().unwrap();
    assert!(last.0.to_lowercase().contains("shell"), "no reason: {finished:?}");
    assert_eq!(last.1, 1);
}

#[test]
fn a_command_whose_helper_was_killed_says_so() {
    let finished = World::new().run_commands(&["kill -9 $PPID; sleep 1000", "echo not reached"]);
    let commands = finished.commands();
    assert_eq!((commands[0].1, finished.result()), (1, "failed"), "{commands:?}");
    assert!(!commands[0].0.trim().is_empty(), "no reason: {commands:?}");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_command_whose_terminal_was_cut_off_says_so() {
    let world = World::new();
    let wire = Wire::new(world.home().join("engine.sock"));
    let agent = ServeAgent::start_with(&world, |command| {
        command.env("DOCKER_HOST", format!("unix://{}", wire.socket.display()));
    });
    let job = docker::job("bash", &[RUN_FOR_EVER, "echo not reached"]);
    let id = job["job_id"].as_str().unwrap();
    agent.post_job(&job).of_status(200);
    agent.wait_for_log(id, RUNNING);
    wire.cut_open_connections();
    let finished = agent.finish(id);
    let commands = finished.commands();
    let (output, exit_code) = &commands[0];
    assert_eq!((*exit_code, finished.result()), (1, "failed"), "{commands:?}");
    let reason = output.strip_prefix("running\n").unwrap_or_default();
    assert!(!reason.trim().is_empty(), "no reason: {commands:?}");
    assert_eq!(docker::leftovers_of(&job), [""; 0]);
}
