//! A script that can't be passed to the shell completely is not run; its command fails and the log explains
//! why.

use serde_json::Value;

use test_support::changed_shell::{DOCKER_JOB, SHORT_JOB, assert_none, failed_cases, run_within};
use test_support::docker::{job, leftovers_of};
use test_support::{Finished, World, job_of};

/// Returns a command that fails after this many lines that do nothing.
fn failing_command(lines: usize) -> String {
    format!("{}echo tests\n/bin/false", format!(": {}\n", "0".repeat(100)).repeat(lines))
}

/// Returns a description of the failure, unless the second command ran and failed, or did not run and the log
/// explains why; no command may follow it.
fn unreported_failure(finished: Option<&Finished>) -> Option<String> {
    let Some(finished) = finished else {
        return Some("hangs".into());
    };
    let commands = finished.commands();
    let is_honest = match &commands[..] {
        [_, (output, exit_code)] => {
            let ran = output == "tests\n" && *exit_code == 1;
            let is_explained =
                !output.contains("tests") && !output.trim().is_empty() && *exit_code != 0;
            (ran || is_explained) && finished.result() == "failed"
        }
        _ => false,
    };
    (!is_honest).then(|| format!("{commands:?}"))
}

fn in_shell(change: &str, lines: usize) -> Option<String> {
    let commands = [change, &failing_command(lines), "echo deploying"];
    let job: Value = serde_json::from_str(&job_of(&commands)).unwrap();
    unreported_failure(run_within(&World::new(), SHORT_JOB, &job, |_| {}).as_ref())
}

fn in_container(change: &str, lines: usize) -> Option<String> {
    let job = job("bash", &[change, &failing_command(lines), "echo deploying"]);
    let unreported_failure =
        unreported_failure(run_within(&World::new(), DOCKER_JOB, &job, |_| {}).as_ref());
    assert_eq!(leftovers_of(&job), [""; 0]);
    unreported_failure
}

/// Applies a change to each file of the session that the job can find; `$file` is its path.
fn to_each_file(places: &str, change: &str) -> String {
    format!("for file in {places}; do {change}; done; /bin/true")
}

const IN_CONTAINERS: &str = "/dev/shm/.agent-* /dev/shm/*";
const OF_THE_SHELL: &str = "~/../state/job-*/scratch/*";

/// Changes that a job can make to a file before a script is written to it.
const TAMPERING: [&str; 6] = [
    r#"ln -sf /dev/null "$file""#,
    r#"ln -sf /dev/full "$file""#,
    r#"rm -f "$file"; mkfifo "$file""#,
    r#"rm -f "$file"; mkdir "$file""#,
    r#"rm -f "$file"; ln -s /nowhere/at/all "$file""#,
    r#"rm -f "$file"; ln -s /dev/tty "$file""#,
];

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_script_that_can_not_be_written_completely_is_not_run() {
    let fill = "dd if=/dev/zero of=/dev/shm/fill bs=1k 2>/dev/null; /bin/true";
    let cases = [
        (fill, 1),
        (fill, 70),
        (fill, 500),
        ("ulimit -f 2", 70),
        ("trap '' XFSZ; ulimit -f 2", 70),
    ];
    let cases = cases.map(|(change, lines)| Case { change: change.into(), lines });
    assert_none(&failed_cases(cases, |case| in_container(&case.change, case.lines)));
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_script_whose_path_in_a_container_is_occupied_runs_or_fails() {
    // A script that is typed into the terminal is echoed there, and fails.
    let changes = TAMPERING.iter().filter(|change| !change.contains("/dev/tty"));
    let cases = changes.flat_map(|change| {
        let change = to_each_file(IN_CONTAINERS, change);
        [1, 70].map(|lines| Case { change: change.clone(), lines })
    });
    let gone = "rm -rf /dev/shm/* /dev/shm/.[!.]*; chmod 0 /dev/shm; /bin/true";
    let cases = cases.chain([Case { change: gone.into(), lines: 70 }]);
    assert_none(&failed_cases(cases, |case| in_container(&case.change, case.lines)));
}

#[test]
fn a_script_whose_path_is_occupied_runs_or_fails() {
    let cases = TAMPERING.iter().map(|change| to_each_file(OF_THE_SHELL, change));
    let limits = ["ulimit -f 0", "trap '' XFSZ; ulimit -f 0"].map(str::to_owned);
    assert_none(&failed_cases(cases.chain(limits), |change| in_shell(change, 70)));
}

/// Files left in the agent's directory must not be mistaken for the next script.
#[test]
fn truncated_files_of_the_agent_do_not_let_commands_pass_without_running() {
    let empty = "(trap '' HUP; while :; do for file in ~/../state/job-*/scratch/*; do : >|\"$file\"; done; done) \
                 2>/dev/null & /bin/true";
    let count = "/bin/echo ran >>~/ran";
    let world = World::new();
    let commands = [&[empty][..], &[count; 50]].concat();
    let job: Value = serde_json::from_str(&job_of(&commands)).unwrap();
    let finished = run_within(&world, SHORT_JOB, &job, |_| {}).expect("the job hangs");
    let passed =
        finished.commands().iter().skip(1).filter(|(_, exit_code)| *exit_code == 0).count();
    let ran = std::fs::read_to_string(world.home().join("ran")).unwrap_or_default().lines().count();
    assert_eq!(ran, passed, "the commands that ran are not those that passed");
}

struct Case {
    change: String,
    lines: usize,
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({} lines)", self.change, self.lines)
    }
}
