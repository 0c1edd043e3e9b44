//! Terminal modes that a command leaves behind: the next script still arrives, and is not echoed.

use serde_json::Value;

use test_support::changed_shell::{
    DOCKER_JOB, SHORT_JOB, THIRD, assert_none, failed_cases, failure, run_within, with_change,
};
use test_support::docker::{job, leftovers_of};
use test_support::{World, job_of};

/// Arguments of `stty`.
const MODES: [&str; 37] = [
    "-echo -icanon time 0 min 0",
    "echo -icanon time 0 min 0",
    "-icanon time 1 min 0",
    "-icanon min 255 time 0",
    "-icanon min 255 time 255",
    "raw",
    "raw -echo",
    "raw echo",
    "cbreak",
    "-icrnl",
    "-icrnl inlcr",
    "igncr",
    "-icrnl -icanon",
    "istrip",
    "iuclc",
    "iuclc -iexten",
    "olcuc",
    "-opost",
    "opost -onlcr",
    "ocrnl onlret",
    "onocr",
    "parmrk inpck",
    "-isig",
    "intr e",
    "quit b",
    "susp g",
    "erase e",
    "kill e werase b",
    "eof e",
    "eol e eol2 b",
    "lnext a",
    "rprnt g iexten",
    "ixon stop e start b",
    "ixoff ixany",
    "echo echoe echok echonl echoctl echoprt echoke",
    "-echo echonl",
    "tostop noflsh",
];

const SIZES: [&str; 2] = ["rows 0 cols 0", "rows 1 cols 1"];

fn changes() -> impl Iterator<Item = String> {
    MODES.into_iter().chain(SIZES).map(|modes| format!("stty {modes}"))
}

fn failure_of(change: &str, second: &str) -> Option<String> {
    let mut commands = with_change(change);
    commands[2] = second;
    let job: Value = serde_json::from_str(&job_of(&commands)).unwrap();
    failure(run_within(&World::new(), SHORT_JOB, &job, |_| {}).as_ref(), true)
}

fn failure_in_container(change: &str, second: &str) -> Option<String> {
    let mut commands = with_change(change);
    commands[2] = second;
    let job = job("bash", &commands);
    let finished = run_within(&World::new(), DOCKER_JOB, &job, |_| {});
    let failure = failure(finished.as_ref(), true);
    failure.or_else(|| {
        Some(leftovers_of(&job)).filter(|left| !left.is_empty()).map(|left| left.join("\n"))
    })
}

fn long() -> String {
    format!("/bin/echo second # {}", "long ".repeat(2000))
}

#[test]
fn scripts_arrive_in_every_mode() {
    assert_none(&failed_cases(changes(), |change| failure_of(change, "/bin/echo second")));
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn short_scripts_arrive_in_a_container_in_strange_modes() {
    // A read that waits for more input can't be ended in a container, so there the command fails.
    let changes = changes().step_by(3).filter(|change| !change.contains("min 255"));
    assert_none(&failed_cases(changes, |change| failure_in_container(change, "/bin/echo second")));
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn long_scripts_arrive_in_a_container_in_strange_modes() {
    let modes = ["-echo -icanon time 0 min 0", "raw", "igncr", "iuclc", "erase e"];
    let changes = modes.map(|modes| format!("stty {modes}"));
    assert_none(&failed_cases(changes, |change| failure_in_container(change, &long())));
}

/// While a command runs, size and echo of the terminal are as its programs set them.
#[test]
fn terminal_modes_persist_within_a_command() {
    let look = "stty -icanon min 0 time 0 echo; stty rows 50 cols 132; stty -a | grep -oE '[- ]icanon|[- ]echo |rows 50|columns 132'";
    let job: Value = serde_json::from_str(&job_of(&[look, THIRD])).unwrap();
    let finished = run_within(&World::new(), SHORT_JOB, &job, |_| {}).expect("the job hangs");
    let commands = finished.commands();
    assert_eq!(commands[0], ("rows 50\ncolumns 132\n-icanon\n echo \n".into(), 0), "{commands:?}");
    assert_eq!(commands[1], ("third\n".into(), 3));
}
