//! Output of a job that comes while the agent waits for the job's shell is not kept in memory.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use test_support::World;
use test_support::docker::{file, job, leftovers_of};

/// Size of the job's output, and the agent's memory limit during that.
const PRINTED: &str = "150000000";
const MOST_KB: u64 = 100_000;

/// Returns a command that prints that much to the job's terminal.
fn flood() -> String {
    format!("head -c {PRINTED} /dev/zero | tr '\\0' y >/dev/tty")
}

/// Runs a job to its end, with any result. Returns the agent's peak memory, in kB. The log is discarded.
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
        // A process that has just ended has no peak.
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let size = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
        peak = peak.max(size.unwrap_or(0));
        let hangs = SystemTime::now() > deadline;
        if peak > MOST_KB || hangs {
            // The result of the job does not matter any more.
            kill(pid, Signal::SIGTERM).unwrap();
            agent.wait().unwrap();
        }
        assert!(!hangs, "the job does not end");
    }
    assert_eq!(leftovers_of(job), [""; 0]);
    peak
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn output_before_a_script_is_accepted_is_not_kept_in_memory() {
    // With a line editor, input is echoed, so the agent searches all output before the shell's response.
    let flood = flood().replace('\'', "'\\''");
    let trap =
        format!("trap '[[ $BASH_COMMAND != *take* ]] || {{ trap - DEBUG; {flood}; }}' DEBUG");
    let peak = peak_of(&job("bash", &["set -o emacs", &trap, "echo next"]));
    assert!(peak < MOST_KB, "the agent grew to {peak} kB");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn output_during_the_injection_of_a_file_is_not_kept_in_memory() {
    let mut job = job("bash", &["echo next"]);
    // As soon as a part of the file exists, the shell is paused until everything is printed.
    let hold_up = format!(
        "until [ -s /root/f ]; do usleep 1000; done; kill -STOP $shell; {}; kill -CONT $shell",
        flood()
    );
    // The shell gets the process ID of this script.
    let entrypoint = format!("read shell rest </proc/self/stat; ( {hold_up} ) & exec \"$@\"");
    let quoted = entrypoint.replace('\'', r"'\''");
    job["compose"]["containers"][0]["entrypoint"] = format!("sh -c '{quoted}' -").into();
    job["files"] = json!([file("f", &vec![b'x'; 2_000_000], "0600")]);
    let peak = peak_of(&job);
    assert!(peak < MOST_KB, "the agent grew to {peak} kB");
}
