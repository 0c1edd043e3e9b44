//! A typing error in a job file is an error, and does not run a different job.

use std::fs;
use std::process::{Output, Stdio};

use serde_json::json;

use test_support::serve::ServeAgent;
use test_support::{Finished, World, job, wait_for_end};

/// The end of every job here: a command that proves that the job ran.
const MARK: &str = "commands: [{directive: touch ~/executed}]\n";

fn run(world: &World, job: &str, options: &[&str]) -> Output {
    world.file("job.yaml", job);
    let mut agent = world.agent();
    agent.current_dir(world.home().join("..")).arg("run").args(options).arg("job.yaml");
    wait_for_end(agent.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
}

/// Asserts that each job is refused before it runs, with a message that contains all of these parts.
fn assert_refused(jobs: &[(&str, &[&str])]) {
    for (job, parts) in jobs {
        let world = World::new();
        let output = run(&world, job, &[]);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{job}: {message}");
        assert!(output.stdout.is_empty() && message.starts_with("error: "), "{job}: {message}");
        assert_eq!(fs::read_dir(world.home()).unwrap().count(), 0, "{job} ran: {message}");
        for part in *parts {
            assert!(message.contains(part), "{job}: no {part:?} in {message}");
        }
    }
}

/// Runs a job that must pass without any message.
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
            // A field of another tool, whose name does not begin with `x-`.
            &format!("job_id: x\nz: {{a: 1}}\n{MARK}"),
            &["job.yaml:2: ", "`z`"],
        ),
    ]);
}

#[test]
fn unknown_fields_are_reported_together_with_other_problems() {
    let job =
        format!("job_id: x\nexecuter: shell\nenv_vars: [{{name: 1, value: MQ==}}]\nzzz: 1\n{MARK}");
    assert_refused(&[(&job, &["job.yaml:2: ", "job.yaml:3: ", "job.yaml:4: ", "--lenient"])]);
}

#[test]
fn in_lenient_mode_an_unknown_field_is_only_a_warning() {
    let world = World::new();
    let job = format!("job_id: x\nexecuter: shell\n{MARK}");
    let output = run(&world, &job, &["--lenient"]);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{message}");
    let expected = "warning: job.yaml:2: unknown field `executer`; did you mean `executor`?\n";
    assert_eq!(message, expected);
    assert!(world.home().join("executed").exists());
}

#[test]
fn fields_whose_names_begin_with_x_are_ignored() {
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
fn a_request_without_commands_is_valid() {
    let agent = ServeAgent::start(&World::new());
    assert_eq!(agent.run_to_end(&json!({ "job_id": "1" })).result(), "passed");
}

/// Returns the output of a job with these variables, whose names and values are given as in a job file.
fn printed(job: &str) -> String {
    pass(job).output()
}

const SHOW: &str = r#"commands: [{directive: 'echo "$A,$B,$C"'}]"#;

#[test]
fn a_merge_key_merges_mappings() {
    for (merge, expected) in [
        // Explicit keys override merged ones, whether they come before or after the merge key.
        ("{<<: *b, value: MQ==}", "1,,\n"),
        ("{value: MQ==, <<: *b}", "1,,\n"),
        ("{<<: *b}", "2,,\n"),
        // In a list, earlier mappings override later ones.
        ("{<<: [*b, *c]}", "2,,\n"),
        ("{<<: [*c, *b]}", "3,,\n"),
        ("{<<: [*n, *c]}", "3,,\n"),
        ("{name: B, <<: [*c, *b]}", ",3,\n"),
    ] {
        let job = format!(
            "job_id: x\nx-n: &n {{name: A}}\nx-b: &b {{name: A, value: Mg==}}\n\
             x-c: &c {{name: A, value: Mw==}}\nenv_vars: [{merge}]\n{SHOW}\n"
        );
        assert_eq!(printed(&job), expected, "{merge}");
    }
}

#[test]
fn merged_mappings_may_contain_merge_keys() {
    let job = format!(
        "x-name: &name {{name: A}}\nx-both: &both\n  <<: *name\n  value: MQ==\n\
         x-job: &job\n  job_id: x\n  env_vars:\n  - *both\n  - <<: *both\n    name: B\n\
         <<: *job\n{SHOW}\n"
    );
    assert_eq!(printed(&job), "1,1,\n");
    // Lists are not merged, nor are nested mappings.
    let job = format!(
        "x-base: &base\n  job_id: x\n  env_vars: [{{name: A, value: MQ==}}]\n\
         <<: *base\nenv_vars: [{{name: B, value: Mg==}}]\n{SHOW}\n"
    );
    assert_eq!(printed(&job), ",2,\n");
}

#[test]
fn merging_something_else_than_mappings_is_an_error() {
    for merge in ["3", "text", "[3]", "[[{job_id: y}]]", "[{job_id: y}, text]"] {
        let job = format!("job_id: x\n<<: {merge}\n{MARK}");
        assert_refused(&[(&job, &["job.yaml", "<<"])]);
    }
    // Merged fields are checked like all others.
    let job = format!("job_id: x\nx-base: &base {{exekutor: shell}}\n<<: *base\n{MARK}");
    assert_refused(&[(&job, &["job.yaml:", "`exekutor`", "`executor`"])]);
}

/// Returns the lines of an agent's own log that contain one of these parts.
fn lines_with<'a>(log: &'a str, parts: &[&str]) -> Vec<&'a str> {
    log.lines().filter(|line| parts.iter().any(|part| line.contains(part))).collect()
}

#[test]
fn unknown_fields_of_a_request_are_ignored_and_logged_without_their_values() {
    let agent = ServeAgent::start(&World::new());
    let mut request = job("1", &["echo hi"]);
    request["unheard_of"] = json!({ "token": "canary" });
    request["commands"][0]["colour"] = "canary".into();
    request["env_vars"] = json!([{ "name": "A", "value": "MQ==", "comment": "canary" }]);
    let finished = agent.run_to_end(&request);
    assert_eq!((finished.result(), finished.output()), ("passed", "hi\n".to_owned()));
    let log = agent.own_log();
    let paths = ["unheard_of", "commands[0].colour", "env_vars[0].comment"];
    let logged = lines_with(&log, &paths);
    assert_eq!(logged.len(), 1, "{log}");
    for path in paths {
        assert!(logged[0].contains(path), "{path}: {}", logged[0]);
    }
    assert!(!log.contains("canary") && !log.contains("token"), "{log}");
    assert!(!format!("{finished:?}").contains("canary"), "{finished:?}");
    // A request without unknown fields is not logged.
    let before = agent.own_log().lines().filter(|line| line.contains("unknown")).count();
    agent.run_to_end(&job("2", &["true"]));
    let after = agent.own_log().lines().filter(|line| line.contains("unknown")).count();
    assert_eq!(before, after, "{}", agent.own_log());
}

#[test]
fn many_unknown_fields_give_one_short_line() {
    let agent = ServeAgent::start(&World::new());
    let mut request = job("1", &["true"]);
    for number in 0..2000 {
        request[format!("unheard_of_{number}")] = "canary".into();
    }
    request["x\ny ERROR forged"] = "canary".into();
    assert_eq!(agent.run_to_end(&request).result(), "passed");
    let log = agent.own_log();
    let logged = lines_with(&log, &["unheard_of_"]);
    assert_eq!(logged.len(), 1, "{} lines", logged.len());
    assert!(logged[0].len() < 4000, "{} bytes", logged[0].len());
    assert!(!log.lines().any(|line| line.starts_with("y ERROR")), "{}", logged[0]);
    assert!(!log.contains("canary"), "{}", logged[0]);
}
