//! Jobs must not inherit files that were open when the agent was started.

use std::fs;
use std::process::{Command, Stdio};

use serde_json::Value;

use test_support::docker::{self, leftovers_of};
use test_support::serve::ServeAgent;
use test_support::start::{Hub, SOON, StartAgent};
use test_support::surroundings::in_shell;
use test_support::{Finished, World, job, job_of, wait_for_end};

/// Returns a command that prints the targets of all descriptors of these processes.
fn show(processes: &str) -> String {
    format!(
        "for p in {processes}; do for f in /proc/$p/fd/*; do \
         echo \"$p ${{f##*/}} $(readlink $f)\"; done; done"
    )
}

/// Returns a command that does so for the job's shell, its child and its parent.
fn show_all() -> String {
    show("self $$ $PPID")
}

/// Makes the agent inherit a file as descriptor 9 and a pipe as descriptor 30.
fn with_descriptors(world: &World, command: &mut Command) {
    let home = world.home();
    let open = "exec 9>inherited-file 30> >(exec cat >/dev/null)";
    let note = "readlink /proc/self/fd/30 >inherited-pipe";
    let there = format!("cd '{}'", home.display());
    let back = "cd - >/dev/null";
    // Both descriptors are inherited by the programs that this shell starts.
    let seen = "[[ -e /proc/self/fd/9 && -e /proc/self/fd/30 ]] || exit 99";
    in_shell(command, &format!("{there}; {open}; {note}; {back}; {seen}"));
}

/// Asserts that none of the job's processes had one of these descriptors.
fn assert_closed(world: &World, finished: &Finished) {
    assert_eq!(finished.result(), "passed", "{finished:?}");
    let shown = finished.output();
    // At least one target is printed.
    assert!(shown.contains("self 1 "), "{shown}");
    let pipe = fs::read_to_string(world.home().join("inherited-pipe")).unwrap();
    assert!(pipe.starts_with("pipe:["), "{pipe}");
    for inherited in [pipe.trim(), "inherited-file"] {
        assert!(!shown.contains(inherited), "{inherited}: {shown}");
    }
}

fn run(world: &World, job: &Value) -> Finished {
    let mut agent = world.agent();
    agent.args(["run", "--output", "json"]).arg(world.file("job.json", job.to_string()));
    with_descriptors(world, &mut agent);
    let child = agent.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    Finished::of(&wait_for_end(child))
}

#[test]
fn a_job_from_a_file_has_no_descriptor_that_the_agent_inherited() {
    let world = World::new();
    let finished = run(&world, &serde_json::from_str(&job_of(&[&show_all()])).unwrap());
    assert_closed(&world, &finished);
}

#[test]
fn a_job_of_a_platform_has_no_inherited_descriptor() {
    let world = World::new();
    let agent = ServeAgent::start_with(&world, |command| with_descriptors(&world, command));
    assert_closed(&world, &agent.run_to_end(&job("1", &[&show_all()])));

    let world = World::new();
    let hub = Hub::start(SOON);
    let _agent = StartAgent::start_with(&world, &hub, |command| with_descriptors(&world, command));
    assert_closed(&world, &hub.run(&job("1", &[&show_all()])));
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn programs_that_a_docker_job_starts_on_the_host_have_no_inherited_descriptor() {
    let world = World::new();
    let mut job = docker::job("bash", &["true"]);
    // The agent itself has started this program.
    let show = format!("{{ {}; }} >~/shown", show("self $$"));
    job["compose"]["host_setup_commands"] = serde_json::json!([{ "directive": show }]);
    let finished = run(&world, &job);
    assert_eq!(finished.result(), "passed", "{finished:?}");
    let shown = fs::read_to_string(world.home().join("shown")).unwrap();
    assert!(shown.contains("self 1 "), "{shown}");
    let pipe = fs::read_to_string(world.home().join("inherited-pipe")).unwrap();
    assert!(!shown.contains(pipe.trim()) && !shown.contains("inherited-file"), "{shown}");
    assert_eq!(leftovers_of(&job), [""; 0]);
}
