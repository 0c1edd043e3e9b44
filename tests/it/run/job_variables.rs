//! Variables of a job that no shell can set, and values that no profile may show.

use std::fs;

use serde_json::{Value, json};

use test_support::docker::{self, left_of};
use test_support::{Finished, World, base64, job_of};

/// Variables that bash has for itself and lets nobody set.
const OF_THE_SHELL: [&str; 6] = ["UID", "EUID", "PPID", "BASHOPTS", "SHELLOPTS", "BASH_VERSINFO"];

/// What no log may show.
const SECRET: &str = "hunter2";

fn with_variables(mut job: Value, names: &[&str]) -> Value {
    let variable = |name: &&str| json!({ "name": name, "value": base64(SECRET.as_bytes()) });
    job["env_vars"] = names.iter().map(variable).collect();
    job
}

fn shell_job(commands: &[&str]) -> Value {
    serde_json::from_str(&job_of(commands)).unwrap()
}

/// Output and exit code of the step that exports.
fn export(finished: &Finished) -> (String, i32) {
    let mut steps = finished.steps().into_iter();
    let step = steps.find(|(title, ..)| title == "Exporting environment variables").unwrap();
    (step.1, step.2)
}

/// It passed, with every one of these named in a line that says more than that it is exported.
fn assert_skipped(finished: &Finished, names: &[&str]) {
    let (told, exit_code) = export(finished);
    assert_eq!((exit_code, finished.result()), (0, "passed"), "{told}");
    for name in names {
        let is_name = |word: &str| word == *name;
        let about =
            |line: &&str| line.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').any(is_name);
        let lines: Vec<_> = told.lines().filter(about).collect();
        assert!(!lines.is_empty(), "{name} is skipped without a word: {told}");
        let exported = format!("Exporting {name}");
        assert!(!lines.contains(&exported.as_str()), "{name} is not exported: {told}");
    }
    assert!(!format!("{finished:?}").contains(SECRET), "{finished:?}");
}

/// Others in the same job come as ever.
const CHECK: &str = "[[ ${#OTHER} == 7 && $UID == \"$(id -u)\" && ${#PPID} != 7 ]] && echo right";

#[test]
fn variables_that_belong_to_the_shell_are_skipped_with_a_line() {
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
fn variables_that_belong_to_the_shell_are_skipped_in_containers_too() {
    let names: Vec<_> = OF_THE_SHELL.into_iter().chain(["OTHER"]).collect();
    let job = with_variables(docker::job("bash", &[CHECK]), &names);
    let finished = World::new().run(&job.to_string());
    assert_skipped(&finished, &OF_THE_SHELL);
    assert_eq!(finished.commands(), [("right\n".into(), 0)]);
    assert_eq!(left_of(&job), [""; 0]);
}

/// The job has its variable, and its log shows no value.
fn assert_hidden(finished: &Finished, case: &str) {
    assert!(!format!("{finished:?}").contains(SECRET), "{case}: {finished:?}");
    assert_eq!(finished.result(), "passed", "{case}: {finished:?}");
    assert!(finished.output().contains("1 7\n"), "{case}: {finished:?}");
}

/// Whether it is exported, and the length of its value.
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

/// Functions come through the environment, too, without any profile.
#[test]
fn no_exported_function_of_the_agents_surroundings_shows_a_value() {
    let world = World::new();
    let job = with_variables(shell_job(&[USE]), &["VALUE"]);
    let path = world.file("job.json", job.to_string());
    let running = world.start_file_with(&path, |command| {
        let function = "() {  builtin echo \"$@\"; builtin export \"$@\"; }";
        command.env("BASH_FUNC_export%%", function);
    });
    assert_hidden(&running.finish(), "an exported function");
}
