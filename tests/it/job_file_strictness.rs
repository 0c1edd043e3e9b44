//! A slip of the pen in a job file is an error, not another job.

use std::fs;
use std::process::{Output, Stdio};

use serde_json::json;

use crate::support::hosted::Hosted;
use crate::support::{Finished, World, wait_for_end};

/// The end of every job here: proof that it ran.
const MARK: &str = "commands: [{directive: touch ~/executed}]\n";

fn run(world: &World, job: &str, options: &[&str]) -> Output {
    world.file("job.yaml", job);
    let mut agent = world.agent();
    agent.current_dir(world.home().join("..")).arg("run").args(options).arg("job.yaml");
    wait_for_end(agent.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
}

/// Each job is refused before anything of it runs, with a message that holds all of these parts.
fn assert_refused(jobs: &[(&str, &[&str])]) {
    for (job, parts) in jobs {
        let world = World::new();
        let output = run(&world, job, &[]);
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{job}: {told}");
        assert!(output.stdout.is_empty() && told.starts_with("error: "), "{job}: {told}");
        assert_eq!(fs::read_dir(world.home()).unwrap().count(), 0, "{job} ran: {told}");
        for part in *parts {
            assert!(told.contains(part), "{job}: no {part:?} in {told}");
        }
    }
}

/// Runs a job about which nothing is to be told.
fn pass(job: &str) -> Finished {
    let world = World::new();
    let output = run(&world, job, &["--output", "json"]);
    let finished = Finished::of(&output);
    assert_eq!((finished.exit_code, finished.stderr.as_str()), (Some(0), ""), "{job}");
    finished
}

#[test]
fn an_unknown_field_is_an_error_with_its_line_and_the_nearest_known_one() {
    assert_refused(&[
        (
            "job_id: x\ncomands: [{directive: touch ~/executed}]\n",
            &["job.yaml:2: ", "`comands`", "`commands`"],
        ),
        (
            "job_id: x\ncommands:\n- directve: touch ~/executed\n",
            &["job.yaml:3: ", "`commands[0].directve`", "`directive`"],
        ),
        (
            &format!("job_id: x\nenv_vars:\n- name: A\n  valeu: MQ==\n{MARK}"),
            &["job.yaml:4: ", "`env_vars[0].valeu`", "`value`"],
        ),
        (
            &format!(
                "job_id: x\nfiles:\n- {{path: a, content: '', mode: '644', mod: '600'}}\n{MARK}"
            ),
            &["job.yaml:3: ", "`files[0].mod`", "`mode`"],
        ),
        (
            &format!("job_id: x\nepilogue_on_pas_commands: []\n{MARK}"),
            &["job.yaml:2: ", "`epilogue_on_pas_commands`", "`epilogue_on_pass_commands`"],
        ),
        (
            &format!(
                "job_id: x\nexecutor: dockercompose\ncompose:\n  containers:\n  - {{name: main, imaeg: bash}}\n{MARK}"
            ),
            &["job.yaml:5: ", "`compose.containers[0].imaeg`", "`image`"],
        ),
        (
            "{\"job_id\": \"x\",\n \"comands\": [{\"directive\": \"touch ~/executed\"}]}",
            &["job.yaml:2: ", "`comands`", "`commands`"],
        ),
        (
            // Of another tool, but not under a name that is free.
            &format!("job_id: x\nz: {{a: 1}}\n{MARK}"),
            &["job.yaml:2: ", "`z`"],
        ),
    ]);
}

#[test]
fn unknown_fields_and_other_problems_are_named_at_once() {
    let job =
        format!("job_id: x\nexecuter: shell\nenv_vars: [{{name: 1, value: MQ==}}]\nzzz: 1\n{MARK}");
    assert_refused(&[(&job, &["job.yaml:2: ", "job.yaml:3: ", "job.yaml:4: ", "--lenient"])]);
}

#[test]
fn where_it_is_asked_for_an_unknown_field_is_only_a_warning() {
    let world = World::new();
    let job = format!("job_id: x\nexecuter: shell\n{MARK}");
    let output = run(&world, &job, &["--lenient"]);
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{told}");
    let expected = "warning: job.yaml:2: unknown field `executer`; did you mean `executor`?\n";
    assert_eq!(told, expected);
    assert!(world.home().join("executed").exists());
}

#[test]
fn fields_of_other_tools_are_free_under_names_that_begin_with_x() {
    for job in [
        format!("job_id: x\nx-owner: {{team: ci}}\n{MARK}"),
        format!("x-all: [1, {{a: b}}]\njob_id: x\n{MARK}"),
        "job_id: x\ncommands:\n- {directive: touch ~/executed, x-note: why}\n".to_owned(),
        format!("job_id: x\nenv_vars:\n- {{name: A, value: MQ==, x-note: {{}}}}\n{MARK}"),
        "{\"job_id\": \"x\", \"x-tool\": {\"a\": [1]}, \"commands\": [{\"directive\": \"true\"}]}"
            .to_owned(),
    ] {
        assert_eq!(pass(&job).commands().len(), 1, "{job}");
    }
}

#[test]
fn a_job_without_any_command_is_an_error() {
    for job in [
        "job_id: x\n",
        "job_id: x\ncommands: []\n",
        "job_id: x\ncommands:\n",
        "job_id: x\nenv_vars: [{name: A, value: MQ==}]\n",
        "{\"job_id\": \"x\", \"commands\": null}",
    ] {
        assert_refused(&[(job, &["job.yaml", "command"])]);
    }
}

/// Platforms may send such jobs.
#[test]
fn a_request_without_a_command_is_a_job_all_the_same() {
    let agent = Hosted::start(&World::new());
    assert_eq!(agent.run_to_end(&json!({ "job_id": "1" })).result(), "passed");
}
