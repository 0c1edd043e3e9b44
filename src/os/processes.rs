//! Finds and signals the descendants of a process.
//!
//! A process whose parent dies is adopted by its nearest ancestor that is a "child subreaper", so no
//! process can leave the tree below a subreaper.

use std::collections::HashMap;
use std::fs;
use std::io;

use memchr::memmem;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid};

/// A descendant of a given process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descendant {
    /// Process ID.
    pub pid: Pid,
    /// Process ID of the parent.
    pub parent: Pid,
    /// The process's name (`comm`), which the process can change.
    pub name: String,
    /// The process has ended, but its parent has not yet waited for it.
    pub zombie: bool,
}

/// Returns all processes of this machine, in no particular order.
pub fn all_processes() -> io::Result<Vec<Pid>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        found.extend(name.to_str().and_then(|name| name.parse().ok()).map(Pid::from_raw));
    }
    Ok(found)
}

/// Kills the processes that [`processes_with`] finds. Returns how many it killed.
pub fn kill_processes_with(marker: &[u8]) -> io::Result<usize> {
    let found = processes_with(marker)?;
    Ok(found.into_iter().filter(|pid| kill(*pid, Signal::SIGKILL).is_ok()).count())
}

/// Returns the processes that started with `marker` (NAME=VALUE and a zero byte) in their environment.
pub fn processes_with(marker: &[u8]) -> io::Result<Vec<Pid>> {
    let in_between = [b"\0", marker].concat();
    let has_marker = |pid: &Pid| {
        // Processes of other users, and those that have just ended, can't be read.
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.starts_with(marker) || memmem::find(&environment, &in_between).is_some()
    };
    Ok(other_processes()?.into_iter().filter(has_marker).collect())
}

/// Returns all processes but this one, in no particular order.
pub fn other_processes() -> io::Result<Vec<Pid>> {
    let mut found = all_processes()?;
    found.retain(|pid| *pid != getpid());
    Ok(found)
}

/// Returns all descendants of `root`, in no particular order.
pub fn descendants(root: Pid) -> io::Result<Vec<Descendant>> {
    let mut children: HashMap<Pid, Vec<Descendant>> = HashMap::new();
    for pid in all_processes()? {
        // The process has ended since the directory was read.
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

/// Parses `PID (NAME) STATE PARENT ...`; the name may contain any characters.
fn parse_stat(pid: Pid, stat: &str) -> Option<Descendant> {
    let (name, fields) = stat.split_once('(')?.1.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace();
    let zombie = matches!(fields.next()?, "Z" | "X");
    let parent = Pid::from_raw(fields.next()?.parse().ok()?);
    Some(Descendant { pid, parent, name: name.to_owned(), zombie })
}

/// Returns the start time of a living process, in the kernel's clock ticks. With the process ID it identifies
/// the process, even after the ID was reused.
pub fn start_of(pid: Pid) -> Option<String> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace();
    let lives = !matches!(fields.next()?, "Z" | "X");
    lives.then(|| fields.nth(18).map(str::to_owned))?
}

/// Returns whether the process ignores the signal with this number. Fails if there is no such process.
pub fn ignores(pid: Pid, signal: i32) -> io::Result<bool> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    Ok(ignored.is_some_and(|mask| mask >> (signal - 1) & 1 == 1))
}

/// Returns the foreground process group of the terminal of `shell`, unless it is the shell's own group.
pub fn foreground_beside(shell: Pid) -> Option<Pid> {
    let stat = fs::read(format!("/proc/{shell}/stat")).ok()?;
    parse_foreground(&String::from_utf8_lossy(&stat))
}

/// Parses `PID (NAME) STATE PARENT GROUP SESSION TERMINAL FOREGROUND ...`.
fn parse_foreground(stat: &str) -> Option<Pid> {
    let (_, fields) = stat.rsplit_once(')')?;
    let fields: Vec<_> = fields.split_ascii_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<i32>().ok();
    let (own, foreground) = (number(2)?, number(5)?);
    (foreground > 1 && foreground != own).then(|| Pid::from_raw(foreground))
}

/// Sends `signal` to those of `processes` that are not zombies.
pub fn signal_all(processes: &[Descendant], signal: Signal) {
    for process in processes.iter().filter(|process| !process.zombie) {
        match kill(process.pid, signal) {
            // ESRCH: the process has ended meanwhile.
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => {
                let (pid, name) = (process.pid.as_raw(), &process.name);
                log::debug!(pid, name:?, error:% = error; "a process can't be signalled");
            }
        }
    }
}

/// Lists those of `processes` that are not zombies, for messages: `42 (make), 43 (cc)`.
pub fn names_of(processes: &[Descendant]) -> String {
    let living = processes.iter().filter(|process| !process.zombie);
    let named = living.map(|process| format!("{} ({})", process.pid, process.name.escape_debug()));
    named.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_may_contain_parentheses() {
        let parsed = parse_stat(Pid::from_raw(7), "7 (a) S 1 (b) Z 42 7 7 0").unwrap();
        assert_eq!(
            (parsed.name.as_str(), parsed.parent.as_raw(), parsed.zombie),
            ("a) S 1 (b", 42, true)
        );
        assert_eq!(parse_stat(Pid::from_raw(7), "7"), None);
    }

    #[test]
    fn the_foreground_group_is_found_unless_it_is_the_shells_own() {
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
