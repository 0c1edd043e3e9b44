//! Invalid command lines execute nothing.

use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::process::Stdio;

use test_support::{World, wait_for_end};

use super::bad_input::{MARK, agent, names_in, refusal, spawn};

#[test]
fn invalid_arguments() {
    for (arguments, expected) in [
        (&["run", "--fast", "job.yaml"][..], "--fast"),
        (&["run", "job.yaml", "other.yaml"], "other.yaml"),
        (&["run"], "<FILE>"),
        (&["run", "--output", "html", "job.yaml"], "pretty, plain, json"),
        (&["run", "--state-dir"], "--state-dir"),
        (&["walk"], "walk"),
        (&["--fast"], "--fast"),
    ] {
        let world = World::new();
        world.file("job.yaml", format!("job_id: x\n{MARK}"));
        let stderr = refusal(&world, &agent(&world, arguments));
        assert!(stderr.contains(expected), "{arguments:?}: {stderr}");
    }
}

#[test]
fn no_arguments_show_the_help() {
    let world = World::new();
    let output = agent(&world, &[]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr.contains("Usage: agent <COMMAND>"), "{stderr}");
}

/// The exit code is right even when no message can be written.
#[test]
fn a_full_disk_below_standard_error_changes_no_exit_code() {
    let world = World::new();
    let bad = world.file("bad.yaml", "job_id: ''\n");
    let warned = world.file("warned.yaml", format!("job_id: x\nzzzz: 1\n{MARK}"));
    for (path, expected) in [(bad, 2), (warned, 0)] {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut command = world.agent();
        let child = command.args(["run", "--lenient"]).arg(&path).stdout(Stdio::null());
        let output = wait_for_end(child.stderr(full).spawn().unwrap());
        assert_eq!(output.status.code(), Some(expected), "{}", path.display());
    }
    assert!(world.home().join("executed").exists());
}

#[test]
fn job_init_can_not_be_called_by_hand() {
    let world = World::new();
    let mut command = world.agent();
    command.arg("job-init").arg0("agent");
    let output = wait_for_end(spawn(&mut command));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_ne!(output.status.code(), Some(0), "{stderr}");
    assert!(stderr.starts_with("error: "), "{stderr}");
    assert_eq!(names_in(&world.home()), [""; 0]);
}
