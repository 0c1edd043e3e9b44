//! The marks by which the agent recognises the shell's messages: the job can't find and forge them.

use serde_json::Value;

use test_support::changed_shell::{DOCKER_JOB, SHORT_JOB, VAIN_WAIT, run_within};
use test_support::docker::{job, leftovers_of};
use test_support::{Finished, World, job_of};

fn ended(finished: Option<Finished>) -> Finished {
    finished.unwrap_or_else(|| panic!("the job hangs"))
}

fn run_in_shell(commands: &[&str]) -> Finished {
    let job: Value = serde_json::from_str(&job_of(commands)).unwrap();
    ended(run_within(&World::new(), SHORT_JOB, &job, |_| {}))
}

fn run_in_container(commands: &[&str]) -> Finished {
    let job = job("bash", commands);
    let finished = ended(run_within(&World::new(), DOCKER_JOB, &job, |_| {}));
    assert_eq!(leftovers_of(&job), [""; 0]);
    finished
}

/// Prints each long word of random digits that a process of the job can find: in files of the agent, in the
/// shell's functions and variables, in its arguments and environment. In a container, all files belong to the
/// job.
const FIND: &str = r"find_words() {
  local places='../state .'
  [[ -d ~/../state ]] || places='/dev/shm /tmp /run /root'
  {
    (cd && find $places -type f -exec cat {} +)
    cat /proc/$$/cmdline /proc/$$/environ
    declare -f
    set
    jobs; trap -p; alias
  } 2>/dev/null | tr -c '0-9a-f' '\n' | grep -E '^.{32,}$' | sort -u
}";

/// Prints forged messages with each of these words from another process, while the second command runs.
const FORGE: &str = r#"words=$(find_words)
forgery='
until [[ -e ~/second-runs ]]; do sleep 0.05; done
for word in $words $words $words; do
  printf "\001%s\001" "$word" >&3
  while IFS= read -r -t 1 answer <&3; do printf "\001%s 0 hB \001" "$answer" >&3; done
done
: >~/forged'
words=$words setsid bash -c "$forgery" 3<>/dev/tty </dev/null >/dev/null 2>&1 &
disown"#;

const FORGED: &str =
    ": >~/second-runs; until [[ -e ~/forged ]]; do sleep 0.05; done; echo second; (exit 3)";

fn assert_marks_can_not_be_forged(run: impl Fn(&[&str]) -> Finished) {
    let forge = format!("{FIND}\n{FORGE}");
    let finished = run(&[&forge, FORGED, "echo not reached"]);
    let commands = finished.commands();
    assert_eq!(commands.len(), 2, "{commands:?}");
    assert!(commands[1].0.contains("second\n") && commands[1].1 == 3, "{commands:?}");
    assert_eq!(finished.result(), "failed");
}

#[test]
fn marks_can_not_be_forged() {
    assert_marks_can_not_be_forged(run_in_shell);
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn marks_can_not_be_forged_in_a_container() {
    assert_marks_can_not_be_forged(run_in_container);
}

/// Also between commands.
#[test]
fn a_flood_of_forged_marks_does_not_block_the_job() {
    let flood = format!(
        "{FIND}\nwords=$(find_words); (for ((i = 0; i < 20000; i++)); do for word in $words; do printf '\\001%s\\001' \"$word\"; done; done) & true"
    );
    let job = job_of(&[&flood, "echo second", "wait; echo third; (exit 3)", "echo not reached"]);
    let job: Value = serde_json::from_str(&job).unwrap();
    let finished = ended(run_within(&World::new(), VAIN_WAIT, &job, |_| {}));
    let commands = finished.commands();
    assert_eq!(commands.len(), 3, "{} commands", commands.len());
    assert!(commands[1].0.contains("second\n") && commands[1].1 == 0);
    assert!(!commands[1].0.contains("command not found"), "a mark was run as a command");
    assert!(commands[2].0.contains("third\n") && commands[2].1 == 3);
    assert_eq!(finished.result(), "failed");
}
