//! The mark of a job, by which all its processes on this machine are found, even after its agent and guard
//! are dead.
//!
//! The mark, `NAME@STATE-DIRECTORY`, is the value of a variable in the initial environment of each process of
//! the job, and an argument of its guard. The job's control group is named after it.
//!
//! A process that clears its environment and was never in the control group can't be found by the mark.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::os::cgroup::{JobCgroup, PREFIX};
use crate::os::processes::{descendants, kill_processes_with, other_processes, signal_all};

/// The environment variable whose value is the mark.
pub const VARIABLE: &str = "SEMAPHORE_JOB_MARK";

/// How many times [`kill_all`] searches for processes, as a process may start another before it is killed.
const SWEEPS: u32 = 100;

/// Returns the environment variable with this mark.
pub fn variable(mark: &str) -> (OsString, OsString) {
    (VARIABLE.into(), mark.into())
}

/// Returns the name of a job's control group, by the job's mark or the name of its directory.
pub fn group_name(mark: &str) -> String {
    format!("{PREFIX}{}", mark.split('@').next().unwrap_or(mark))
}

/// Kills all processes with this mark except guards, and removes the control group. Returns whether no
/// process is left.
pub fn kill_all(mark: &str) -> bool {
    let group = JobCgroup::find(&group_name(mark));
    let marker = [VARIABLE.as_bytes(), b"=", mark.as_bytes(), b"\0"].concat();
    for _ in 0..SWEEPS {
        if let Some(group) = &group {
            group.kill();
        }
        let found = kill_processes_with(&marker).unwrap_or_default();
        if found == 0 && group.as_ref().is_none_or(JobCgroup::is_empty) {
            if let Some(group) = &group {
                group.remove();
            }
            return true;
        }
        // A killed process is listed until it has ended.
        std::thread::yield_now();
    }
    false
}

/// Like [`kill_all`], for a job whose agent is dead: also kills its guards and their descendants.
pub fn kill_all_and_guards(mark: &str) -> bool {
    for guard in guards_of(mark).unwrap_or_default() {
        // Stop the guard first, so that it does not react to the end of its children.
        let _ = kill(guard, Signal::SIGSTOP);
        signal_all(&descendants(guard).unwrap_or_default(), Signal::SIGKILL);
        let _ = kill(guard, Signal::SIGKILL);
    }
    kill_all(mark)
}

/// Kills the processes of all jobs in the state directory `state` whose name is not known (any more). Such
/// jobs exist because a job can remove its own directory.
pub fn kill_strays(state: &Path, is_known: impl Fn(&str) -> bool) {
    let state = state.display().to_string();
    let mut marks: Vec<String> = Vec::new();
    for pid in other_processes().unwrap_or_default() {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let variables = environment.split(|byte| *byte == 0);
        let found = variables.filter_map(|variable| {
            let (name, mark) = std::str::from_utf8(variable).ok()?.split_once('=')?;
            (name == VARIABLE).then_some(mark)
        });
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let guarded = mark_of_guard(&arguments).and_then(|mark| std::str::from_utf8(mark).ok());
        marks.extend(found.chain(guarded).map(str::to_owned));
    }
    marks.sort();
    marks.dedup();
    for mark in marks {
        let is_stray = |(name, of): (&str, &str)| of == state && !is_known(name);
        if mark.split_once('@').is_some_and(is_stray) {
            kill_all_and_guards(&mark);
        }
    }
}

/// Returns the guards of the job with this mark.
fn guards_of(mark: &str) -> io::Result<Vec<Pid>> {
    let is_guard = |pid: &Pid| {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        mark_of_guard(&arguments) == Some(mark.as_bytes())
    };
    Ok(other_processes()?.into_iter().filter(is_guard).collect())
}

/// Returns the mark of the guarded job, if `arguments` are those of a guard.
fn mark_of_guard(arguments: &[u8]) -> Option<&[u8]> {
    let mut arguments = arguments.split(|byte| *byte == 0);
    let is_guard = arguments.next() == Some(b"agent")
        && matches!(arguments.next(), Some(b"job-init" | b"docker-watch"));
    arguments.next().filter(|_| is_guard)
}
