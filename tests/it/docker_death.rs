//! What a job has on an engine goes even if its agent is killed.

use std::fs;
use std::path::PathBuf;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::support::docker::{docker, make_images};
use crate::support::hosted::wait_until;
use crate::support::{Running, World, lives_with};

/// A job in two containers that runs without end.
fn start(world: &World) -> (Running, String) {
    make_images();
    let job = json!({
        "job_id": "killed",
        "executor": "dockercompose",
        "compose": { "containers": [
            { "name": "main", "image": "agent-test/bash" },
            { "name": "side", "image": "agent-test/nobash", "command": "sleep 1000" },
        ] },
        "commands": [{ "directive": "echo running; sleep 1000" }],
    });
    let mut running = world.start(&job.to_string());
    running.wait_for_output("running");
    let [directory] = &job_directories(world)[..] else { panic!("one job, one directory") };
    let place = directory.file_name().unwrap().to_str().unwrap().to_owned();
    assert_eq!(left(&place).len(), 3, "{:?}", left(&place));
    (running, place)
}

fn job_directories(world: &World) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(world.state()) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// The containers and networks of a job.
fn left(place: &str) -> Vec<String> {
    let label = format!("label=semaphore-agent.place={place}");
    let containers = docker(&["ps", "-aq", "--filter", &label]).1;
    let networks = docker(&["network", "ls", "-q", "--filter", &label]).1;
    containers.lines().chain(networks.lines()).map(str::to_owned).collect()
}

fn wait_until_nothing_is_left(world: &World, place: &str) {
    wait_until(
        || left(place).is_empty() && job_directories(world).is_empty(),
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
fn the_next_agent_removes_what_was_left_when_everything_was_killed() {
    let world = World::new();
    let (running, place) = start(&world);
    // As in a power cut: the process beside the agent first.
    let home = format!("HOME={}", world.home().display());
    let beside: Vec<_> =
        lives_with(&home).into_iter().filter(|found| found.contains("docker-watch")).collect();
    assert_eq!(beside.len(), 1, "{beside:?}");
    let pid = beside[0].split(' ').next().unwrap().strip_prefix("/proc/").unwrap();
    kill(Pid::from_raw(pid.parse().unwrap()), Signal::SIGKILL).unwrap();
    running.signal(Signal::SIGKILL);
    running.finish();
    assert_eq!(left(&place).len(), 3);
    assert_eq!(world.run_commands(&["true"]).result(), "passed");
    wait_until_nothing_is_left(&world, &place);
}
