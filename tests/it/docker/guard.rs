//! A job's containers, and its processes on this machine, are removed even if its agent or its guard (`agent
//! docker-watch`) is killed.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use test_support::docker::{job, leftovers_of};
use test_support::serve::ServeAgent;
use test_support::{
    KilledOnFailure, RUN_FOR_EVER, RUNNING, Running, World, processes_with, unique, wait_for_file,
    wait_until,
};

/// Starts a job with an agent all of whose processes have a marker; `first` comes first in its PATH.
fn start(world: &World, job: &Value, first: &Path) -> (Running, String) {
    let value = unique();
    let path = format!("{}:{}", first.display(), std::env::var("PATH").unwrap());
    let file = world.file("job.json", job.to_string());
    let running = world.start_file_with(&file, |command| {
        command.env("PATH", path).env("TEST_MARKER", &value);
    });
    (running, format!("TEST_MARKER={value}"))
}

/// Returns the guards of an agent.
fn guards(marker: &str) -> Vec<Pid> {
    let found = processes_with(marker).into_iter().filter(|found| found.contains("docker-watch"));
    let pid = |found: String| {
        let pid = found.split(' ').next().unwrap().strip_prefix("/proc/").unwrap().to_owned();
        Pid::from_raw(pid.parse().unwrap())
    };
    found.map(pid).collect()
}

/// Kills the only guard, and waits for its successor.
fn replace_guard(marker: &str) {
    let old = guards(marker);
    assert_eq!(old.len(), 1, "{:?}", processes_with(marker));
    kill(old[0], Signal::SIGKILL).unwrap();
    let is_replaced = || matches!(guards(marker)[..], [new] if new != old[0]);
    wait_until(is_replaced, || format!("no new one appears: {:?}", processes_with(marker)));
}

fn wait_until_gone(job: &Value, marker: &str) {
    wait_until(
        || leftovers_of(job).is_empty() && processes_with(marker).is_empty(),
        || format!("{:?} and {:?} stay", leftovers_of(job), processes_with(marker)),
    );
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine and its client")]
fn a_killed_guard_is_replaced() {
    let world = World::new();
    let job = job("bash", &[RUN_FOR_EVER]);
    let (mut running, marker) = start(&world, &job, Path::new("/nowhere"));
    let _clean = KilledOnFailure(marker.clone());
    running.wait_for_output("running");
    // This works repeatedly.
    replace_guard(&marker);
    replace_guard(&marker);
    assert!(!leftovers_of(&job).is_empty());
    running.signal(Signal::SIGKILL);
    running.finish();
    wait_until_gone(&job, &marker);
    wait_until(
        || fs::read_dir(world.state()).unwrap().count() == 0,
        || "the job's directory stays".to_owned(),
    );
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine and its client")]
fn a_job_whose_guard_is_killed_continues() {
    let world = World::new();
    let value = unique();
    let agent = ServeAgent::start_with(&world, |command| {
        command.env("TEST_MARKER", &value);
    });
    let marker = format!("TEST_MARKER={value}");
    let _clean = KilledOnFailure(marker.clone());
    let wait = "echo running; until [[ -e /tmp/go ]]; do sleep 0.1; done; echo over";
    let job = job("bash", &[wait]);
    let id = job["job_id"].as_str().unwrap();
    agent.post_job(&job).of_status(200);
    agent.wait_for_log(id, RUNNING);
    replace_guard(&marker);
    let container = leftovers_of(&job).into_iter().find_map(|line| {
        line.strip_prefix("container ").and_then(|line| line.split(' ').next()).map(str::to_owned)
    });
    test_support::docker::docker_prints(&["exec", &container.unwrap(), "touch", "/tmp/go"]);
    let finished = agent.finish(id);
    assert_eq!((finished.result(), finished.output()), ("passed", "running\nover\n".to_owned()));
    assert_eq!(leftovers_of(&job), [""; 0]);
    wait_until(|| guards(&marker).is_empty(), || "a guard stays".to_owned());
}

/// Returns the processes that a host setup command has started in a session of their own.
fn detached_processes(marker: &str) -> Vec<String> {
    processes_with(marker).into_iter().filter(|found| found.contains("sleep 1234")).collect()
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine and its client")]
fn processes_of_a_host_setup_command_end_with_the_job() {
    for agent_is_killed in [false, true] {
        let world = World::new();
        let command = if agent_is_killed { RUN_FOR_EVER } else { "echo running" };
        let mut job = job("bash", &[command]);
        job["compose"]["host_setup_commands"] = json!([
            { "directive": "setsid sleep 1234 & touch ~/up" },
            { "directive": "(setsid sleep 1234 </dev/null >/dev/null 2>&1 &)" },
        ]);
        let (mut running, marker) = start(&world, &job, Path::new("/nowhere"));
        let _clean = KilledOnFailure(marker.clone());
        if agent_is_killed {
            running.wait_for_output("running");
            running.signal(Signal::SIGKILL);
            running.finish();
            wait_until_gone(&job, &marker);
        } else {
            let finished = running.finish();
            assert_eq!(finished.result(), "passed", "{finished:?}");
            assert!(world.home().join("up").exists());
            assert_eq!(detached_processes(&marker), [""; 0]);
        }
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine and its client")]
fn a_credential_helper_that_hangs_does_not_outlive_an_agent_that_is_killed() {
    let world = World::new();
    let programs = world.home().join("bin");
    fs::create_dir(&programs).unwrap();
    let helper = programs.join("docker-credential-hangs");
    let script = "#!/bin/sh\nsleep 1000 & touch ~/asked; setsid sleep 1000 & sleep 1000; wait\n";
    fs::write(&helper, script).unwrap();
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(world.home().join(".docker")).unwrap();
    let config = json!({ "credsStore": "hangs" }).to_string();
    fs::write(world.home().join(".docker/config.json"), config).unwrap();
    let mut job = job("bash", &["echo not reached"]);
    // The helper runs before any registry is contacted.
    job["compose"]["containers"][0]["image"] = "127.0.0.1:1/x".into();
    let (running, marker) = start(&world, &job, &programs);
    let _clean = KilledOnFailure(marker.clone());
    wait_for_file(&world.home().join("asked"));
    running.signal(Signal::SIGKILL);
    running.finish();
    wait_until_gone(&job, &marker);
}
