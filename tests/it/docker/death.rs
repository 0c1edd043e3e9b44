//! A job's containers are removed even if its agent is killed.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::serve::login::is_placeholder;
use test_support::docker::{docker, make_images};
use test_support::serve::ServeAgent;
use test_support::{RUNNING, Running, World, base64, processes_with, wait_for_file, wait_until};

/// Returns a job in two containers that runs until it is stopped.
fn job() -> Value {
    make_images();
    json!({
        "job_id": "killed",
        "executor": "dockercompose",
        "compose": { "containers": [
            { "name": "main", "image": "agent-test/bash" },
            { "name": "side", "image": "agent-test/nobash", "command": "sleep 1000" },
        ] },
        "commands": [{ "directive": "echo running; sleep 1000" }],
    })
}

fn start(world: &World) -> (Running, String) {
    let job = job();
    let mut running = world.start(&job.to_string());
    running.wait_for_output("running");
    let place = place(world);
    assert_eq!(left(&place).len(), 3, "{:?}", left(&place));
    (running, place)
}

/// Returns the name of the only job, with which its containers and networks are marked.
fn place(world: &World) -> String {
    let directories = job_directories(world);
    let names = directories.iter().map(|path| path.file_name().unwrap().to_str().unwrap());
    let mut names = names.filter(|name| name.starts_with("job-"));
    let place = names.next().unwrap().to_owned();
    assert_eq!(names.next(), None);
    place
}

/// Kills the guard, as in a power cut.
fn kill_guard(world: &World) {
    let home = format!("HOME={}", world.home().display());
    let beside: Vec<_> =
        processes_with(&home).into_iter().filter(|found| found.contains("docker-watch")).collect();
    assert_eq!(beside.len(), 1, "{beside:?}");
    let pid = beside[0].split(' ').next().unwrap().strip_prefix("/proc/").unwrap();
    kill(Pid::from_raw(pid.parse().unwrap()), Signal::SIGKILL).unwrap();
}

fn job_directories(world: &World) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(world.state()) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().path()).collect()
}

fn is_of(directory: &Path, place: &str) -> bool {
    directory.file_name().unwrap().to_str().unwrap().ends_with(place)
}

/// Returns the containers and networks of a job.
fn left(place: &str) -> Vec<String> {
    let label = format!("label=semaphore-agent.place={place}");
    let containers = docker(&["ps", "-aq", "--filter", &label]).1;
    let networks = docker(&["network", "ls", "-q", "--filter", &label]).1;
    containers.lines().chain(networks.lines()).map(str::to_owned).collect()
}

fn wait_until_nothing_is_left(world: &World, place: &str) {
    wait_until(
        || left(place).is_empty() && !job_directories(world).iter().any(|path| is_of(path, place)),
        || format!("{:?} and {:?} stay", left(place), job_directories(world)),
    );
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine and its client")]
fn containers_do_not_outlive_an_agent_that_is_killed() {
    let world = World::new();
    let (running, place) = start(&world);
    running.signal(Signal::SIGKILL);
    wait_until_nothing_is_left(&world, &place);
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine and its client")]
fn the_next_agent_cleans_up_when_everything_was_killed() {
    let world = World::new();
    let (running, place) = start(&world);
    kill_guard(&world);
    running.signal(Signal::SIGKILL);
    running.finish();
    assert_eq!(left(&place).len(), 3);
    assert_eq!(world.run_commands(&["true"]).result(), "passed");
    wait_until_nothing_is_left(&world, &place);
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine and its client")]
fn the_next_agent_removes_the_keys_of_a_dead_job_at_once() {
    let world = World::new();
    let mut job = job();
    job["ssh_public_keys"] = json!([base64(b"ssh-ed25519 AAAA me")]);
    let agent = ServeAgent::start(&world);
    agent.post_job(&job).of_status(200);
    agent.wait_for_log("killed", RUNNING);
    let place = place(&world);
    let keys = world.home().join(".ssh/authorized_keys");
    assert!(fs::read_to_string(&keys).unwrap().contains("ssh-ed25519 AAAA me"));
    kill_guard(&world);
    agent.signal(Signal::SIGKILL);
    drop(agent);
    let _next = ServeAgent::start(&world);
    assert!(!keys.exists());
    assert!(is_placeholder(&world));
    wait_until_nothing_is_left(&world, &place);
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine and its client")]
fn a_setup_command_of_the_host_does_not_outlive_an_agent_that_is_killed() {
    let world = World::new();
    let mut job = job();
    let command = "touch ~/up; sleep 1000 & sleep 1000; wait";
    job["compose"]["host_setup_commands"] = json!([{ "directive": command }]);
    let running = world.start(&job.to_string());
    wait_for_file(&world.home().join("up"));
    running.signal(Signal::SIGKILL);
    running.finish();
    let home = format!("HOME={}", world.home().display());
    wait_until(|| processes_with(&home).is_empty(), || format!("{:?}", processes_with(&home)));
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine and its client")]
fn variables_of_containers_are_not_in_the_agents_own_log() {
    let world = World::new();
    let agent = ServeAgent::start_with(&world, |command| {
        command.env("SEMAPHORE_AGENT_LOG_LEVEL", "trace");
    });
    let mut job = job();
    job["commands"] = json!([{ "directive": "[[ $SECRET ]]" }]);
    let secret = json!([{ "name": "SECRET", "value": base64(b"canary") }]);
    job["env_vars"] = secret.clone();
    job["compose"]["containers"][0]["env_vars"] = secret;
    let finished = agent.run_to_end(&job);
    assert_eq!(finished.result(), "passed", "{finished:#?}");
    assert!(!agent.own_log().contains("canary"), "{}", agent.own_log());
}
