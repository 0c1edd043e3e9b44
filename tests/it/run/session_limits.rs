//! What a session can't support: the command fails with a line that says so, and nothing waits for ever.

use serde_json::Value;

use test_support::changed_shell::{
    DOCKER_JOB, SHORT_JOB, VAIN_WAIT, assert_none, harmed_by, run_within, silent_harm, with_change,
    words_of_bash,
};
use test_support::docker::{job, left_of};
use test_support::{World, job_of};

fn shell_job(commands: &[&str]) -> Value {
    serde_json::from_str(&job_of(commands)).unwrap()
}

/// What goes wrong without a word in a shell job that makes this change.
fn harm_of(change: &str) -> Option<String> {
    let job = shell_job(&with_change(change));
    silent_harm(run_within(&World::new(), SHORT_JOB, &job, |_| {}).as_ref())
}

fn harm_in_container(change: &str) -> Option<String> {
    let job = job("bash", &with_change(change));
    let harm = silent_harm(run_within(&World::new(), DOCKER_JOB, &job, |_| {}).as_ref());
    harm.or_else(|| Some(left_of(&job)).filter(|left| !left.is_empty()).map(|left| left.join("\n")))
}

fn owned(cases: &[&str]) -> Vec<String> {
    cases.iter().map(|case| (*case).to_owned()).collect()
}

/// Of every builtin in turn, and of all at once. Without `return`, bash itself complains.
fn disabled_builtins() -> Vec<String> {
    let mut builtins = words_of_bash("builtin");
    builtins.retain(|builtin| builtin != "return");
    let each = builtins.iter().map(|builtin| format!("enable -n {builtin}"));
    each.chain([format!("enable -n {}", builtins.join(" "))]).collect()
}

/// What leaves the session without something that it may need.
const TAKEN_AWAY: [&str; 7] = [
    "set -r",
    "set -t",
    "readonly FUNCNEST=1",
    "readonly TMOUT=1; /bin/sleep 2",
    "ulimit -n 3",
    "ulimit -f 0",
    "ulimit -s 64",
];

/// Functions that can't be removed again.
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
fn a_builtin_that_is_disabled_is_not_needed_or_its_lack_is_told() {
    assert_none(&harmed_by(disabled_builtins(), harm_of));
}

#[test]
fn what_is_taken_away_from_the_session_is_not_needed_or_its_lack_is_told() {
    assert_none(&harmed_by(owned(&TAKEN_AWAY), harm_of));
}

#[test]
fn functions_that_can_not_be_removed_do_no_harm_in_silence() {
    assert_none(&harmed_by(readonly_functions(), harm_of));
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn what_is_taken_away_in_a_container_is_not_needed_or_its_lack_is_told() {
    let builtins = ["read", "printf", "builtin", ". eval source", "set unset local return"];
    let disabled = builtins.map(|builtins| format!("enable -n {builtins}"));
    let all = disabled_builtins().pop();
    let readonly = readonly_functions().pop();
    let changes = disabled.into_iter().chain(all).chain(readonly).chain(owned(&TAKEN_AWAY));
    assert_none(&harmed_by(changes, harm_in_container));
}

/// Between two commands nothing runs that may take as long as it wants.
#[test]
fn a_shell_that_never_answers_between_commands_is_not_waited_for_for_ever() {
    let never = [
        "PROMPT_COMMAND='/bin/sleep 1000'",
        "PROMPT_COMMAND='kill -STOP $$'",
        "PROMPT_COMMAND='while :; do :; done'",
        "PROMPT_COMMAND='read x y z'; readonly PROMPT_COMMAND",
    ];
    assert_none(&harmed_by(owned(&never), |change| {
        let job = shell_job(&with_change(change));
        silent_harm(run_within(&World::new(), VAIN_WAIT, &job, |_| {}).as_ref())
    }));
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_shell_that_never_answers_in_a_container_is_not_waited_for_for_ever() {
    let job = job("bash", &with_change("PROMPT_COMMAND='/bin/sleep 1000'"));
    let finished = run_within(&World::new(), VAIN_WAIT, &job, |_| {});
    assert_eq!(silent_harm(finished.as_ref()), None);
    assert_eq!(left_of(&job), [""; 0]);
}
