//! What a job prints while the agent waits for its shell takes none of the agent's memory.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use test_support::World;
use test_support::docker::{file, job, left_of};

/// How much a job prints, and how much the agent may need for it and all else.
const PRINTED: &str = "150000000";
const MOST_KB: u64 = 100_000;

/// Prints that much into the job's terminal.
fn flood() -> String {
    format!("head -c {PRINTED} /dev/zero | tr '\\0' y >/dev/tty")
}

/// Runs a job to its end, however that is; answers the most that the agent ever had in memory, in kB. The log
/// goes nowhere.
fn peak_of(job: &Value) -> u64 {
    let world = World::new();
    let mut agent = world.agent();
    agent.args(["run", "--output", "json"]).arg(world.file("job.json", job.to_string()));
    let mut agent = agent.stdout(Stdio::null()).spawn().unwrap();
    let pid = Pid::from_raw(agent.id().try_into().unwrap());
    let status = format!("/proc/{pid}/status");
    let deadline = SystemTime::now() + Duration::from_mins(2);
    let mut peak = 0;
    while agent.try_wait().unwrap().is_none() {
        let text = fs::read_to_string(&status).unwrap_or_default();
        // One that has just ended has none.
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let size = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
        peak = peak.max(size.unwrap_or(0));
        let hangs = SystemTime::now() > deadline;
        if peak > MOST_KB || hangs {
            // Whatever else it would do does not matter.
            kill(pid, Signal::SIGTERM).unwrap();
            agent.wait().unwrap();
        }
        assert!(!hangs, "the job does not end");
    }
    assert_eq!(left_of(job), [""; 0]);
    peak
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_shell_that_floods_its_terminal_before_it_takes_a_script_is_not_kept_in_memory() {
    // A line editor shows what is typed, so what comes before the shell answers is looked through.
    let flood = flood().replace('\'', "'\\''");
    let trap =
        format!("trap '[[ $BASH_COMMAND != *take* ]] || {{ trap - DEBUG; {flood}; }}' DEBUG");
    let peak = peak_of(&job("bash", &["set -o emacs", &trap, "echo next"]));
    assert!(peak < MOST_KB, "the agent grew to {peak} kB");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_container_that_floods_its_terminal_while_a_file_is_injected_is_not_kept_in_memory() {
    let mut job = job("bash", &["echo next"]);
    // As soon as a part of the file is there, the shell is held up until all is printed.
    let hold_up = format!(
        "until [ -s /root/f ]; do usleep 1000; done; kill -STOP $shell; {}; kill -CONT $shell",
        flood()
    );
    // The shell takes the place of who runs this.
    let entrypoint = format!("read shell rest </proc/self/stat; ( {hold_up} ) & exec \"$@\"");
    let quoted = entrypoint.replace('\'', r"'\''");
    job["compose"]["containers"][0]["entrypoint"] = format!("sh -c '{quoted}' -").into();
    job["files"] = json!([file("f", &vec![b'x'; 2_000_000], "0600")]);
    let peak = peak_of(&job);
    assert!(peak < MOST_KB, "the agent grew to {peak} kB");
}
