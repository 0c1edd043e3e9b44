//! Login profiles that wait for input or never end: the log shows their output while the job waits.

use std::fs;
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::time::Instant;

use test_support::serve::ServeAgent;
use test_support::{World, job, job_of, wait_until};

/// Time limit until the profile's output is in the log; much shorter than the time limit for profiles.
const SECONDS: Duration = Duration::from_secs(40);

/// Profiles after which the shell never takes a command, and the output before that.
const ENDLESS: [(&str, &str); 3] = [
    ("while :; do read -p \"who? \" x; sleep 0.2; done", "who? "),
    ("echo hello; exec cat", "hello"),
    ("echo looking around; while :; do sleep 1000; done", "looking around"),
];

fn with_profile(profile: &str) -> World {
    let world = World::new();
    fs::write(world.home().join(".bash_profile"), format!("{profile}\n")).unwrap();
    world
}

#[test]
fn the_output_of_an_endless_profile_is_in_the_log_while_the_job_waits() {
    for (profile, text) in ENDLESS {
        let world = with_profile(profile);
        let begun = Instant::now();
        let mut running = world.start(&job_of(&["touch ~/ran"]));
        running.wait_for_output(text);
        assert!(begun.elapsed() < SECONDS, "{profile}: {:?}", begun.elapsed());
        running.signal(Signal::SIGTERM);
        let finished = running.finish();
        assert_eq!(finished.result(), "stopped", "{profile}");
        assert!(!world.home().join("ran").exists(), "{profile}");
    }
}

#[test]
fn a_platform_sees_the_output_of_an_endless_profile() {
    let (profile, text) = ENDLESS[0];
    let agent = ServeAgent::start(&with_profile(profile));
    agent.post_job(&job("1", &["true"])).of_status(200);
    agent.wait_for_log("1", text);
    let log = agent.get("/jobs/1/log").text();
    let line = log.lines().find(|line| line.contains(text)).unwrap();
    assert!(line.contains(r#""event":"cmd_output""#), "{line}");
    agent.post("/stop", b"").of_status(200);
    assert_eq!(agent.finish("1").result(), "stopped");
}

/// The profile may read a line that was typed for the shell, and then ends.
#[test]
fn a_profile_that_waits_for_input_is_visible_in_the_log() {
    let world = with_profile("read -p \"who? \" x");
    let agent = ServeAgent::start(&world);
    agent.post_job(&job("1", &["echo from the job"])).of_status(200);
    let mut log = String::new();
    let goes_on = || {
        log = agent.get("/jobs/1/log").text();
        log.contains("who? ") || log.contains(r#""output":"from the job\n""#)
    };
    wait_until(goes_on, || "neither a question nor a job".to_owned());
    agent.post("/stop", b"");
    assert_ne!(agent.finish("1").result(), "failed", "{log}");
}

#[test]
fn the_output_of_a_profile_that_ends_is_not_in_the_log() {
    for profile in ["echo hello; echo hello >&2", "printf hello", "echo hello >/dev/tty"] {
        let finished = with_profile(profile).run(&job_of(&["echo from the job"]));
        assert_eq!(finished.result(), "passed", "{profile}");
        assert_eq!(finished.output(), "from the job\n", "{profile}");
        assert!(!format!("{:?}", finished.events).contains("hello"), "{profile}: {finished:?}");
    }
}

#[test]
fn the_prompts_of_a_slow_shell_are_not_in_the_log() {
    let profile = "PS1='prompt# '; echo slow; sleep 1.5; echo ready";
    let finished = with_profile(profile).run(&job_of(&["echo from the job"]));
    assert_eq!(finished.result(), "passed");
    let output = finished.output();
    assert!(output.contains("slow") && output.ends_with("from the job\n"), "{output}");
    assert!(!output.contains("# "), "{output}");
}
