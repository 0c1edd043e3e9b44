//! The engine's socket gives a job root access to the agent's machine; operators can withhold it.

use std::process::Command;

use serde_json::Value;

use test_support::World;
use test_support::docker::{job, make_images};
use test_support::serve::{self, ServeAgent};
use test_support::start::{self, Hub, SOON, StartAgent};

/// Returns a job that passes where the socket exists.
fn needs_socket() -> Value {
    make_images();
    job("docker", &["[[ -S /var/run/docker.sock ]]", "docker version >/dev/null"])
}

/// Values of the option, and whether jobs then have the socket.
const CASES: [(&[&str], &str); 3] = [
    (&[], "passed"),
    (&["--docker-socket", "always"], "passed"),
    (&["--docker-socket", "never"], "failed"),
];

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn jobs_of_agent_serve_have_the_socket_unless_it_is_withheld() {
    for (options, result) in CASES {
        let agent = ServeAgent::start_with(&World::new(), |command| {
            command.args(options);
        });
        let finished = agent.run_to_end(&needs_socket());
        assert_eq!(finished.result(), result, "{options:?}: {finished:#?}");
        let commands = finished.commands();
        // The shell works; only the socket is missing.
        assert_eq!(commands[0], (String::new(), i32::from(result == "failed")), "{options:?}");
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn jobs_of_agent_start_have_the_socket_unless_it_is_withheld() {
    for (options, expected) in CASES {
        let control_plane = Hub::start(SOON);
        let agent = StartAgent::start_with(&World::new(), &control_plane, |command| {
            command.args(options);
        });
        let id = control_plane.queue(needs_socket());
        let log = control_plane.finish(&id);
        assert_eq!(log.result(), expected, "{options:?}: {log:#?}");
        drop(agent);
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn jobs_from_files_have_the_socket_unless_it_is_withheld() {
    for (options, expected) in CASES {
        let world = World::new();
        let path = world.file("job.json", needs_socket().to_string());
        let running = world.start_file_with(&path, |command| {
            command.args(options);
        });
        let finished = running.finish();
        assert!(!finished.events.is_empty(), "{options:?}: {}", finished.stderr);
        assert_eq!(finished.result(), expected, "{options:?}: {finished:#?}");
    }
}

#[test]
fn an_invalid_socket_setting_is_refused_with_the_valid_values() {
    let wrong = |command: &mut Command| {
        command.args(["--docker-socket", "sometimes"]);
    };
    let world = World::new();
    let mut start = start::command(&world);
    wrong(&mut start);
    for message in [serve::refusal(&World::new(), wrong), start::refusal(&mut start)] {
        for word in ["docker-socket", "sometimes", "always", "never"] {
            assert!(message.contains(word), "no {word}: {message}");
        }
    }
}
