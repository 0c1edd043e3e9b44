//! Variables of a job that no shell can set, and values that no profile may print.

use std::fs;

use serde_json::{Value, json};

use test_support::docker::{self, leftovers_of};
use test_support::{Finished, World, base64, job_of};

/// Variables of bash that are readonly.
const OF_THE_SHELL: [&str; 6] = ["UID", "EUID", "PPID", "BASHOPTS", "SHELLOPTS", "BASH_VERSINFO"];

/// A canary that no log may contain.
const SECRET: &str = "hunter2";

fn with_variables(mut job: Value, names: &[&str]) -> Value {
    let variable = |name: &&str| json!({ "name": name, "value": base64(SECRET.as_bytes()) });
    job["env_vars"] = names.iter().map(variable).collect();
    job
}

fn shell_job(commands: &[&str]) -> Value {
    serde_json::from_str(&job_of(commands)).unwrap()
}

/// Returns output and exit code of the step that exports variables.
fn export(finished: &Finished) -> (String, i32) {
    let mut steps = finished.steps().into_iter();
    let step = steps.find(|(title, ..)| title == "Exporting environment variables").unwrap();
    (step.1, step.2)
}

/// Asserts that the job passed, and that the log explains for each of these variables that it was skipped.
fn assert_skipped(finished: &Finished, names: &[&str]) {
    let (output, exit_code) = export(finished);
    assert_eq!((exit_code, finished.result()), (0, "passed"), "{output}");
    for name in names {
        let is_name = |word: &str| word == *name;
        let about =
            |line: &&str| line.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').any(is_name);
        let lines: Vec<_> = output.lines().filter(about).collect();
        assert!(!lines.is_empty(), "{name} is skipped without a message: {output}");
        let exported = format!("Exporting {name}");
        assert!(!lines.contains(&exported.as_str()), "{name} is not exported: {output}");
    }
    assert!(!format!("{finished:?}").contains(SECRET), "{finished:?}");
}

/// Other variables of the same job are exported as usual.
const CHECK: &str = "[[ ${#OTHER} == 7 && $UID == \"$(id -u)\" && ${#PPID} != 7 ]] && echo right";

#[test]
fn readonly_variables_of_the_shell_are_skipped_with_a_message() {
    for name in OF_THE_SHELL {
        let job = with_variables(shell_job(&[CHECK]), &[name, "OTHER"]);
        let finished = World::new().run(&job.to_string());
        assert_skipped(&finished, &[name]);
        assert_eq!(finished.commands(), [("right\n".into(), 0)], "{name}");
    }
    let names: Vec<_> = OF_THE_SHELL.into_iter().chain(["OTHER"]).collect();
    let job = with_variables(shell_job(&[CHECK]), &names);
    assert_skipped(&World::new().run(&job.to_string()), &OF_THE_SHELL);
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn readonly_variables_of_the_shell_are_skipped_in_containers() {
    let names: Vec<_> = OF_THE_SHELL.into_iter().chain(["OTHER"]).collect();
    let job = with_variables(docker::job("bash", &[CHECK]), &names);
    let finished = World::new().run(&job.to_string());
    assert_skipped(&finished, &OF_THE_SHELL);
    assert_eq!(finished.commands(), [("right\n".into(), 0)]);
    assert_eq!(leftovers_of(&job), [""; 0]);
}

/// Asserts that the job had its variable, and that its log does not show the value.
fn assert_hidden(finished: &Finished, case: &str) {
    assert!(!format!("{finished:?}").contains(SECRET), "{case}: {finished:?}");
    assert_eq!(finished.result(), "passed", "{case}: {finished:?}");
    assert!(finished.output().contains("1 7\n"), "{case}: {finished:?}");
}

/// Prints whether the variable is exported, and the length of its value.
const USE: &str = "builtin echo \"$(command env | command grep -c ^VALUE=) ${#VALUE}\"";

#[test]
fn no_function_alias_or_trap_of_a_profile_shows_a_value() {
    for profile in [
        "export() { builtin echo \"exporting $*\"; builtin export \"$@\"; }",
        "export() { builtin printf '%q\\n' \"$@\"; }",
        "shopt -s expand_aliases; alias export='builtin echo'",
        "shopt -s expand_aliases; alias .='command cat'",
        ".() { command cat \"$1\"; builtin . \"$@\"; }",
        "trap 'builtin echo \"$BASH_COMMAND\"' DEBUG; set -o functrace",
        "trap 'builtin echo \"$BASH_COMMAND\"' DEBUG; shopt -s extdebug",
        "trap 'builtin echo \"$BASH_COMMAND\"' RETURN; set -o functrace",
        "trap 'builtin echo \"$BASH_COMMAND\"' ERR; set -o errtrace",
        "return() { builtin echo \"$VALUE\"; }",
        "PROMPT_COMMAND='fc -ln -5'; set -o history",
    ] {
        let world = World::new();
        fs::write(world.home().join(".bash_profile"), format!("{profile}\n")).unwrap();
        let job = with_variables(shell_job(&[USE]), &["VALUE"]);
        assert_hidden(&world.run(&job.to_string()), profile);
    }
}

/// Functions can also be inherited through the environment, without any profile.
#[test]
fn no_exported_function_of_the_agents_environment_shows_a_value() {
    let world = World::new();
    let job = with_variables(shell_job(&[USE]), &["VALUE"]);
    let path = world.file("job.json", job.to_string());
    let running = world.start_file_with(&path, |command| {
        let function = "() {  builtin echo \"$@\"; builtin export \"$@\"; }";
        command.env("BASH_FUNC_export%%", function);
    });
    assert_hidden(&running.finish(), "an exported function");
}
