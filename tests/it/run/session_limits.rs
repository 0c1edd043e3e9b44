//! Changes that a session can't support: the command fails with an explanation, and the job does not hang.

use serde_json::Value;

use test_support::changed_shell::{
    DOCKER_JOB, SHORT_JOB, VAIN_WAIT, assert_none, failed_changes, run_within, unexplained_failure,
    with_change, words_of_bash,
};
use test_support::docker::{job, leftovers_of};
use test_support::{World, job_of};

fn shell_job(commands: &[&str]) -> Value {
    serde_json::from_str(&job_of(commands)).unwrap()
}

/// Returns the failure of a shell job after this change, unless its log explains it.
fn failure_of(change: &str) -> Option<String> {
    let job = shell_job(&with_change(change));
    unexplained_failure(run_within(&World::new(), SHORT_JOB, &job, |_| {}).as_ref())
}

fn failure_in_container(change: &str) -> Option<String> {
    let job = job("bash", &with_change(change));
    let failure = unexplained_failure(run_within(&World::new(), DOCKER_JOB, &job, |_| {}).as_ref());
    failure.or_else(|| {
        Some(leftovers_of(&job)).filter(|left| !left.is_empty()).map(|left| left.join("\n"))
    })
}

fn owned(cases: &[&str]) -> Vec<String> {
    cases.iter().map(|case| (*case).to_owned()).collect()
}

/// Disables each builtin in turn, and all at once. Without `return`, bash itself complains.
fn disabled_builtins() -> Vec<String> {
    let mut builtins = words_of_bash("builtin");
    builtins.retain(|builtin| builtin != "return");
    let each = builtins.iter().map(|builtin| format!("enable -n {builtin}"));
    each.chain([format!("enable -n {}", builtins.join(" "))]).collect()
}

/// Commands that take away from the session what it may need.
const TAKEN_AWAY: [&str; 7] = [
    "set -r",
    "set -t",
    "readonly FUNCNEST=1",
    "readonly TMOUT=1; /bin/sleep 2",
    "ulimit -n 3",
    "ulimit -f 0",
    "ulimit -s 64",
];

/// Functions that can't be removed, because they are readonly.
fn readonly_functions() -> Vec<String> {
    let words = ". : builtin eval source command printf read local return set unset break shopt";
    let words = owned(&words.split(' ').collect::<Vec<_>>());
    let function = |word: &String| format!("function {word} {{ /bin/echo hijacked; }}");
    let all: Vec<_> = words.iter().map(function).collect();
    let all = format!("{}\nreadonly -f {}", all.join("\n"), words.join(" "));
    let each = words.iter().map(|word| format!("{}; readonly -f {word}", function(word)));
    each.chain([all]).collect()
}

#[test]
fn a_disabled_builtin_is_not_needed_or_is_reported() {
    assert_none(&failed_changes(disabled_builtins(), failure_of));
}

#[test]
fn missing_resources_are_not_needed_or_are_reported() {
    assert_none(&failed_changes(owned(&TAKEN_AWAY), failure_of));
}

#[test]
fn readonly_functions_are_harmless_or_are_reported() {
    assert_none(&failed_changes(readonly_functions(), failure_of));
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn missing_resources_in_a_container_are_not_needed_or_are_reported() {
    let builtins = ["read", "printf", "builtin", ". eval source", "set unset local return"];
    let disabled = builtins.map(|builtins| format!("enable -n {builtins}"));
    let all = disabled_builtins().pop();
    let readonly = readonly_functions().pop();
    let changes = disabled.into_iter().chain(all).chain(readonly).chain(owned(&TAKEN_AWAY));
    assert_none(&failed_changes(changes, failure_in_container));
}

/// Code that the job hooks between two commands may never end.
#[test]
fn a_shell_that_hangs_between_commands_fails_the_job() {
    let never = [
        "PROMPT_COMMAND='/bin/sleep 1000'",
        "PROMPT_COMMAND='kill -STOP $$'",
        "PROMPT_COMMAND='while :; do :; done'",
        "PROMPT_COMMAND='read x y z'; readonly PROMPT_COMMAND",
    ];
    assert_none(&failed_changes(owned(&never), |change| {
        let job = shell_job(&with_change(change));
        unexplained_failure(run_within(&World::new(), VAIN_WAIT, &job, |_| {}).as_ref())
    }));
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_shell_that_hangs_in_a_container_fails_the_job() {
    let job = job("bash", &with_change("PROMPT_COMMAND='/bin/sleep 1000'"));
    let finished = run_within(&World::new(), VAIN_WAIT, &job, |_| {});
    assert_eq!(unexplained_failure(finished.as_ref()), None);
    assert_eq!(leftovers_of(&job), [""; 0]);
}
