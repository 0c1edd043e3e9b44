//! Finds and signals everything that descends from a process.
//!
//! A process whose parent dies is adopted by the nearest ancestor that asked for it (a "child
//! subreaper"), so below one of those nothing can leave the tree.

use std::collections::HashMap;
use std::fs;
use std::io;

use memchr::memmem;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid};

/// A process below the one that was asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descendant {
    /// Its number.
    pub pid: Pid,
    /// Its parent's.
    pub parent: Pid,
    /// What it calls itself.
    pub name: String,
    /// Dead, and only not yet waited for.
    pub zombie: bool,
}

/// All processes of this machine, in no order.
pub fn all_processes() -> io::Result<Vec<Pid>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        found.extend(name.to_str().and_then(|name| name.parse().ok()).map(Pid::from_raw));
    }
    Ok(found)
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
    Ok(other_processes()?.into_iter().filter(has_marker).collect())
}

/// All processes but this one, in no order.
pub fn other_processes() -> io::Result<Vec<Pid>> {
    let mut found = all_processes()?;
    found.retain(|pid| *pid != getpid());
    Ok(found)
}

/// Everything below `root`, in no order.
pub fn descendants(root: Pid) -> io::Result<Vec<Descendant>> {
    let mut children: HashMap<Pid, Vec<Descendant>> = HashMap::new();
    for pid in all_processes()? {
        // A process that ended since the directory was read is no descendant.
        let Ok(stat) = fs::read(format!("/proc/{pid}/stat")) else {
            continue;
        };
        let found = parse_stat(pid, &String::from_utf8_lossy(&stat));
        if let Some(process) = found {
            children.entry(process.parent).or_default().push(process);
        }
    }
    let mut found = Vec::new();
    let mut next = vec![root];
    while let Some(parent) = next.pop() {
        let mut below = children.remove(&parent).unwrap_or_default();
        next.extend(below.iter().map(|process| process.pid));
        found.append(&mut below);
    }
    Ok(found)
}

/// `PID (NAME) STATE PARENT ...`; the name may hold anything.
fn parse_stat(pid: Pid, stat: &str) -> Option<Descendant> {
    let (name, fields) = stat.split_once('(')?.1.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace();
    let zombie = matches!(fields.next()?, "Z" | "X");
    let parent = Pid::from_raw(fields.next()?.parse().ok()?);
    Some(Descendant { pid, parent, name: name.to_owned(), zombie })
}

/// When the living process of this number began, as the kernel tells it: no other of the same number has the same.
pub fn start_of(pid: Pid) -> Option<String> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace();
    let lives = !matches!(fields.next()?, "Z" | "X");
    lives.then(|| fields.nth(18).map(str::to_owned))?
}

/// Whether the process ignores the signal of this number, as far as that can be seen; an error if there is no such
/// process.
pub fn ignores(pid: Pid, signal: i32) -> io::Result<bool> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    Ok(ignored.is_some_and(|mask| mask >> (signal - 1) & 1 == 1))
}

/// The process group in the foreground of the terminal of `shell`, unless that is the shell's own.
pub fn foreground_beside(shell: Pid) -> Option<Pid> {
    let stat = fs::read(format!("/proc/{shell}/stat")).ok()?;
    parse_foreground(&String::from_utf8_lossy(&stat))
}

/// `PID (NAME) STATE PARENT GROUP SESSION TERMINAL FOREGROUND ...`
fn parse_foreground(stat: &str) -> Option<Pid> {
    let (_, fields) = stat.rsplit_once(')')?;
    let fields: Vec<_> = fields.split_ascii_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<i32>().ok();
    let (own, foreground) = (number(2)?, number(5)?);
    (foreground > 1 && foreground != own).then(|| Pid::from_raw(foreground))
}

/// Sends `signal` to all of `processes` that live.
pub fn signal_all(processes: &[Descendant], signal: Signal) {
    for process in processes.iter().filter(|process| !process.zombie) {
        match kill(process.pid, signal) {
            // It ended by itself.
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => {
                let (pid, name) = (process.pid.as_raw(), &process.name);
                log::debug!(pid, name:?, error:% = error; "a process can't be signalled");
            }
        }
    }
}

/// The living of `processes`, for people.
pub fn names_of(processes: &[Descendant]) -> String {
    let living = processes.iter().filter(|process| !process.zombie);
    let named = living.map(|process| format!("{} ({})", process.pid, process.name.escape_debug()));
    named.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_may_hold_anything() {
        let parsed = parse_stat(Pid::from_raw(7), "7 (a) S 1 (b) Z 42 7 7 0").unwrap();
        assert_eq!(
            (parsed.name.as_str(), parsed.parent.as_raw(), parsed.zombie),
            ("a) S 1 (b", 42, true)
        );
        assert_eq!(parse_stat(Pid::from_raw(7), "7"), None);
    }

    #[test]
    fn a_group_in_the_foreground_is_another_than_the_shells() {
        for (stat, found) in [
            ("7 (a) b) S 1 7 7 34816 42 0", Some(42)),
            ("7 (bash) S 1 7 7 34816 7 0", None),
            ("7 (bash) S 1 7 7 0 -1 0", None),
            ("7 (bash) S 1 7", None),
        ] {
            assert_eq!(parse_foreground(stat).map(Pid::as_raw), found, "{stat}");
        }
    }
}
