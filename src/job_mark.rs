//! The mark by which everything is found that a job has on this machine, even if nobody is left who
//! started it: a variable in the environment that each of its processes begins with, the name of its control
//! group, and an argument of the processes that guard it.
//!
//! A process that clears its environment and was never in the control group can't be found like this.

use std::ffi::OsString;
use std::fs;
use std::io;

use memchr::memmem;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid};

use crate::cgroup::{JobCgroup, PREFIX};
use crate::process_tree::{descendants, signal_all};

/// The variable, whose value is the name of the job's directory.
pub const VARIABLE: &str = "SEMAPHORE_JOB_MARK";

/// How often to look, as each process that is found may just make another.
const SWEEPS: u32 = 100;

/// The variable of the job called `name`.
pub fn variable(name: &str) -> (OsString, OsString) {
    (VARIABLE.into(), name.into())
}

/// The name of the job's control group, which no other has.
pub fn group_name(name: &str) -> String {
    format!("{PREFIX}{name}")
}

/// Kills everything that carries the mark of the job called `name`, but no process that guards it, and removes
/// its control group. Whether nothing is left.
pub fn kill_all(name: &str) -> bool {
    let group = JobCgroup::find(&group_name(name));
    let marker = [VARIABLE.as_bytes(), b"=", name.as_bytes(), b"\0"].concat();
    for _ in 0..SWEEPS {
        if let Some(group) = &group {
            group.kill();
        }
        let found = kill_those_with(&marker).unwrap_or_default();
        if found == 0 && group.as_ref().is_none_or(JobCgroup::is_empty) {
            if let Some(group) = &group {
                group.remove();
            }
            return true;
        }
        // What was killed is seen until it has ended.
        std::thread::yield_now();
    }
    false
}

/// The same for a job whose agent is dead: its guards go too, and what is below them.
pub fn kill_all_and_guards(name: &str) -> bool {
    for guard in guards_of(name).unwrap_or_default() {
        // First, so that it does nothing more of its own.
        let _ = kill(guard, Signal::SIGSTOP);
        signal_all(&descendants(guard).unwrap_or_default(), Signal::SIGKILL);
        let _ = kill(guard, Signal::SIGKILL);
    }
    kill_all(name)
}

/// Kills the processes that [`those_with`] finds. How many there were.
pub fn kill_those_with(marker: &[u8]) -> io::Result<usize> {
    let found = those_with(marker)?;
    Ok(found.into_iter().filter(|pid| kill(*pid, Signal::SIGKILL).is_ok()).count())
}

/// The processes that began with `marker`, NAME=VALUE and a zero byte, in their environment.
pub fn those_with(marker: &[u8]) -> io::Result<Vec<Pid>> {
    let in_between = [b"\0", marker].concat();
    let has_marker = |pid: &Pid| {
        // Processes of others, and those that have just ended, can't be read.
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.starts_with(marker) || memmem::find(&environment, &in_between).is_some()
    };
    Ok(all_processes()?.into_iter().filter(has_marker).collect())
}

/// The processes beside the agent that look after the job called `name`.
fn guards_of(name: &str) -> io::Result<Vec<Pid>> {
    let is_guard = |pid: &Pid| {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut arguments = arguments.split(|byte| *byte == 0);
        arguments.next() == Some(b"agent")
            && matches!(arguments.next(), Some(b"job-init" | b"docker-watch"))
            && arguments.next() == Some(name.as_bytes())
    };
    Ok(all_processes()?.into_iter().filter(is_guard).collect())
}

fn all_processes() -> io::Result<Vec<Pid>> {
    let own = getpid();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let pid = name.to_str().and_then(|name| name.parse().ok()).map(Pid::from_raw);
        found.extend(pid.filter(|pid| *pid != own));
    }
    Ok(found)
}
