//! Secrets that are passed as an open descriptor: no path leads to them, and jobs can't read them. A secret
//! that is passed in a variable is wiped from the agent's environment.

use std::fs;
use std::path::Path;

use nix::unistd::{Pid, geteuid};

use test_support::World;
use test_support::serve::{self, SECRET, ServeAgent};
use test_support::start::{self, Hub, SOON, StartAgent, TOKEN};
use test_support::surroundings::in_shell;

const SECRET_VARIABLE: &str = "SEMAPHORE_AGENT_AUTH_TOKEN_SECRET";
const TOKEN_VARIABLE: &str = "SEMAPHORE_AGENT_TOKEN";

/// Prints the open descriptors of a job and of its job-init, and what can be read from them.
const DESCRIPTORS: &str = "ls -l /proc/self/fd /proc/$$/fd; ls -l /proc/$PPID/fd 2>/dev/null
    for ((fd = 3; fd < 20; fd++)); do timeout 1 cat <&$fd; done 2>/dev/null
    true";

/// Ways to pass the content of a file as descriptor 3, before the agent starts.
fn handed_over(file: &Path) -> [String; 2] {
    let file = file.display();
    [format!("exec 3< '{file}'"), format!("exec 3< <(cat '{file}')")]
}

/// Asserts that the job's output contains neither the path nor the content of the file.
fn assert_not_passed_on(seen: &str, secret: &str) {
    assert!(seen.contains("/proc/self/fd:"), "{seen}");
    assert!(!seen.contains(secret) && !seen.contains("the-secret"), "{seen}");
    assert!(!seen.contains(" 3 -> pipe:"), "{seen}");
}

#[test]
fn a_served_agent_takes_its_secret_from_a_descriptor() {
    let world = World::new();
    let file = world.file("the-secret", format!("{SECRET}\n"));
    for hand_over in handed_over(&file) {
        for by_flag in [true, false] {
            let agent = ServeAgent::start_with(&world, |command| {
                command.env_remove(SECRET_VARIABLE);
                if by_flag {
                    command.args(["--auth-token-secret-fd", "3"]);
                } else {
                    command.env("SEMAPHORE_AGENT_AUTH_TOKEN_SECRET_FD", "3");
                }
                in_shell(command, &hand_over);
            });
            agent.get("/status").of_status(200);
            let finished = agent.run_to_end(&test_support::job("1", &[DESCRIPTORS]));
            assert_not_passed_on(&finished.output(), SECRET);
            assert!(!agent.own_log().contains("is no option"), "{}", agent.own_log());
        }
    }
}

#[test]
fn an_agent_of_a_control_plane_takes_its_token_from_a_descriptor() {
    let world = World::new();
    let file = world.file("the-secret", format!("{TOKEN}\n"));
    for hand_over in handed_over(&file) {
        for by_flag in [true, false] {
            let hub = Hub::start(SOON);
            let id = hub.queue(test_support::job("1", &[DESCRIPTORS]));
            let agent = StartAgent::start_with(&world, &hub, |command| {
                command.env_remove(TOKEN_VARIABLE);
                if by_flag {
                    command.args(["--token-fd", "3"]);
                } else {
                    command.env("SEMAPHORE_AGENT_TOKEN_FD", "3");
                }
                in_shell(command, &hand_over);
            });
            let log = hub.finish(&id);
            assert_eq!(log.result(), "passed");
            assert_not_passed_on(&log.output(), TOKEN);
            drop(agent);
        }
    }
}

/// Ways to pass an unusable descriptor: the shell code before the agent, and the number.
const BAD: [(&str, &str); 4] =
    [("exec 9<&-", "9"), ("exec 9> /dev/null", "9"), ("exec 9< /", "9"), ("exec 900<&-", "900")];

#[test]
fn a_descriptor_that_can_not_be_read_is_fatal_and_named() {
    let world = World::new();
    for (before, number) in BAD {
        let message = serve::refusal(&world, |command| {
            command.env_remove(SECRET_VARIABLE).args(["--auth-token-secret-fd", number]);
            in_shell(command, before);
        });
        for word in ["auth-token-secret-fd", number] {
            assert!(message.contains(word), "{before}: {message}");
        }
        let mut agent = start::command(&world);
        agent.args(["--no-https", "--endpoint", "127.0.0.1:1", "--token-fd", number]);
        in_shell(&mut agent, before);
        let message = start::refusal(&mut agent);
        for word in ["token-fd", number] {
            assert!(message.contains(word), "{before}: {message}");
        }
    }
    // The secret is empty: anybody could sign tokens with it.
    let message = serve::refusal(&world, |command| {
        command.env_remove(SECRET_VARIABLE).args(["--auth-token-secret-fd", "3"]);
        in_shell(command, "exec 3< /dev/null");
    });
    assert!(message.contains("empty"), "{message}");
}

#[test]
fn a_descriptor_and_another_source_are_refused() {
    let world = World::new();
    let file = world.file("the-secret", format!("{SECRET}\n"));
    let name = file.to_str().unwrap();
    let [hand_over, _] = handed_over(&file);
    for other in [["--auth-token-secret", "canary"], ["--auth-token-secret-file", name]] {
        let message = serve::refusal(&world, |command| {
            command.env_remove(SECRET_VARIABLE).args(other).args(["--auth-token-secret-fd", "3"]);
            in_shell(command, &hand_over);
        });
        assert!(message.contains("auth-token-secret-fd"), "{message}");
        assert!(!message.contains("canary") && !message.contains(SECRET), "{message}");
        assert!(!message.contains("unexpected argument"), "{message}");
    }
    for other in [["--token", "canary"], ["--token-file", name]] {
        let mut agent = start::command(&world);
        agent.args(["--no-https", "--endpoint", "127.0.0.1:1", "--token-fd", "3"]).args(other);
        in_shell(&mut agent, &hand_over);
        let message = start::refusal(&mut agent);
        assert!(message.contains("token-fd"), "{message}");
        assert!(!message.contains("unexpected argument"), "{message}");
    }
}

/// A canary that must not be in the agent's environment, as seen by a job and by the test.
fn assert_wiped(agent: Pid, seen_by_job: &str, secret: &str) {
    let look = fs::read(format!("/proc/{agent}/environ"));
    let Ok(environment) = look else {
        eprintln!("skipped: the environment of {agent} can't be looked at: {look:?}");
        return;
    };
    let environment = String::from_utf8_lossy(&environment);
    assert!(!environment.contains(secret), "the secret is in the agent's environment");
    assert!(!seen_by_job.contains(secret), "a job found the secret in the agent's environment");
}

/// A command that prints the agent's environment in a job.
const ENVIRONMENT: &str = "agent=$(awk '/^PPid:/ {print $2}' /proc/$PPID/status)
    tr '\\0' '\\n' < /proc/$agent/environ; env; tr '\\0' '\\n' < /proc/$PPID/environ; true";

#[test]
fn a_secret_from_a_variable_is_wiped() {
    if !geteuid().is_root() {
        eprintln!("skipped: only root can look at the environment of such a process");
        return;
    }
    let world = World::new();
    let agent = ServeAgent::start(&world);
    let seen = agent.run_to_end(&test_support::job("1", &[ENVIRONMENT])).output();
    assert_wiped(agent.pid(), &seen, SECRET);

    let hub = Hub::start(SOON);
    let id = hub.queue(test_support::job(
        "1",
        &["echo $PPID; awk '/^PPid:/' /proc/$PPID/status", ENVIRONMENT],
    ));
    let world = World::new();
    let agent = StartAgent::start(&world, &hub);
    let log = hub.finish(&id);
    assert_eq!(log.result(), "passed");
    let first = log.commands()[0].0.clone();
    let number = first.split_whitespace().last().unwrap().parse().unwrap();
    assert_wiped(Pid::from_raw(number), &log.output(), TOKEN);
    drop(agent);
}
