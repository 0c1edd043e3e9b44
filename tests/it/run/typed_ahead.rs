//! Startup files that read or discard what was typed before the shell was ready.

use serde_json::{Value, json};

use test_support::changed_shell::{
    DOCKER_JOB, SHORT_JOB, assert_none, failed_cases, failure, run_within, set_up_by,
    with_startup_file, without_change,
};
use test_support::docker::{job, leftovers_of};
use test_support::{World, job_of};

/// Startup commands that read all available input for about a second.
const READERS: [&str; 8] = [
    "read -t 1 x",
    "read -t 0.3 x; read -t 0.3 y; read -t 0.3 z",
    "read -rs -n 1 -t 0.5 x",
    "read -N 100000 -t 0.5 x",
    "while read -t 0.3 x; do :; done",
    "stty -icanon min 0 time 3; cat >/dev/null; stty sane",
    "read -t 1 -p 'continue? [y] ' x; echo welcome",
    "stty raw -echo; read -t 0.5 -N 5000 x; stty sane",
];

fn failure_of_profile(name: &str, reader: &str) -> Option<String> {
    let world = World::new();
    std::fs::write(world.home().join(name), format!("{reader}\n")).unwrap();
    let mut job: Value = serde_json::from_str(&job_of(&without_change())).unwrap();
    job["env_vars"] = json!([{ "name": "V", "value": "dmFsdWU=" }]);
    failure(run_within(&world, SHORT_JOB, &job, |_| {}).as_ref(), false)
}

fn failure_in_container(set_up: impl Fn(&mut Value)) -> Option<String> {
    let mut job = job("bash", &without_change());
    set_up(&mut job);
    job["env_vars"] = json!([{ "name": "V", "value": "dmFsdWU=" }]);
    job["files"] = json!([{ "path": "f", "content": "eA==", "mode": "0600" }]);
    let finished = run_within(&World::new(), DOCKER_JOB, &job, |_| {});
    let failure = failure(finished.as_ref(), false);
    failure.or_else(|| {
        Some(leftovers_of(&job)).filter(|left| !left.is_empty()).map(|left| left.join("\n"))
    })
}

#[test]
fn a_profile_that_reads_the_terminal_does_not_prevent_the_job_from_starting() {
    assert_none(&failed_cases(READERS, |reader| failure_of_profile(".bash_profile", reader)));
    assert_eq!(failure_of_profile(".profile", READERS[0]), None);
}

#[test]
fn a_profile_that_executes_another_shell_does_not_prevent_the_job_from_starting() {
    let again = "[[ $AGAIN ]] || { export AGAIN=1; read -t 0.3 x; exec bash --login; }";
    assert_eq!(failure_of_profile(".bash_profile", again), None);
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_startup_file_that_reads_the_terminal_does_not_prevent_the_job_from_starting() {
    let readers = READERS.into_iter().step_by(2);
    assert_none(&failed_cases(readers, |reader| {
        failure_in_container(|job| with_startup_file(job, reader))
    }));
}

/// The entrypoint reads the terminal before it executes the shell.
#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn an_entrypoint_that_reads_the_terminal_does_not_prevent_the_job_from_starting() {
    let readers =
        ["timeout 1 cat >/dev/null", "stty -icanon min 0 time 3; cat >/dev/null; stty sane"];
    assert_none(&failed_cases(readers, |reader| {
        failure_in_container(|job| set_up_by(job, reader))
    }));
}
