//! The mark by which everything is found that a job has on this machine, even if nobody is left who
//! started it: a variable in the environment that each of its processes begins with, the name of its control
//! group, and an argument of the processes that guard it.
//!
//! A process that clears its environment and was never in the control group can't be found like this.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::os::cgroup::{JobCgroup, PREFIX};
use crate::os::processes::{descendants, kill_those_with, other_processes, signal_all};

/// The variable, whose value is the mark.
pub const VARIABLE: &str = "SEMAPHORE_JOB_MARK";

/// How often to look, as each process that is found may just make another.
const SWEEPS: u32 = 100;

/// The variable of the job with this mark.
pub fn variable(mark: &str) -> (OsString, OsString) {
    (VARIABLE.into(), mark.into())
}

/// The name of the control group of the job with this mark, or whose directory has this name: no other has it.
pub fn group_name(mark: &str) -> String {
    format!("{PREFIX}{}", mark.split('@').next().unwrap_or(mark))
}

/// Kills everything that carries this mark, but no process that guards the job, and removes its control group.
/// Whether nothing is left.
pub fn kill_all(mark: &str) -> bool {
    let group = JobCgroup::find(&group_name(mark));
    let marker = [VARIABLE.as_bytes(), b"=", mark.as_bytes(), b"\0"].concat();
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
pub fn kill_all_and_guards(mark: &str) -> bool {
    for guard in guards_of(mark).unwrap_or_default() {
        // First, so that it does nothing more of its own.
        let _ = kill(guard, Signal::SIGSTOP);
        signal_all(&descendants(guard).unwrap_or_default(), Signal::SIGKILL);
        let _ = kill(guard, Signal::SIGKILL);
    }
    kill_all(mark)
}

/// Kills what carries the mark of a job in the state directory `state` for which `exists` does not hold: a job can remove
/// its own directory.
pub fn kill_strays(state: &Path, exists: impl Fn(&str) -> bool) {
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
        let guarded = guarded_by(&arguments).and_then(|mark| std::str::from_utf8(mark).ok());
        marks.extend(found.chain(guarded).map(str::to_owned));
    }
    marks.sort();
    marks.dedup();
    for mark in marks {
        let is_stray = |(name, of): (&str, &str)| of == state && !exists(name);
        if mark.split_once('@').is_some_and(is_stray) {
            kill_all_and_guards(&mark);
        }
    }
}

/// The processes beside the agent that look after the job with this mark.
fn guards_of(mark: &str) -> io::Result<Vec<Pid>> {
    let is_guard = |pid: &Pid| {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        guarded_by(&arguments) == Some(mark.as_bytes())
    };
    Ok(other_processes()?.into_iter().filter(is_guard).collect())
}

/// The mark of the job that a process with these arguments guards, if it does.
fn guarded_by(arguments: &[u8]) -> Option<&[u8]> {
    let mut arguments = arguments.split(|byte| *byte == 0);
    let is_guard = arguments.next() == Some(b"agent")
        && matches!(arguments.next(), Some(b"job-init" | b"docker-watch"));
    arguments.next().filter(|_| is_guard)
}
