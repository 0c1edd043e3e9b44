//! A process of a job that the kernel kills for lack of memory: the log must say so.

use std::fs;
use std::path::{Path, PathBuf};

use test_support::{World, unique};

/// The message in the job's log.
const OUT_OF_MEMORY: &str = "memory ran out";

/// A command that takes more memory than it may.
const TOO_MUCH: &str = "head -c 500000000 /dev/zero | tail -n 1 | wc -c";

/// Hierarchies in which groups can have a memory limit, of both versions, and the name of the limit's file.
const PLACES: [(&str, &str); 2] =
    [("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")];

/// A control group with little memory, removed on drop.
struct LittleMemory {
    path: PathBuf,
}

impl LittleMemory {
    /// Makes the group. If that is not possible, prints so and returns `None`.
    fn make() -> Option<Self> {
        let made = PLACES.iter().find_map(|(place, limit)| Self::make_in(place.as_ref(), limit));
        if made.is_none() {
            eprintln!("skipped: no control group with little memory can be made here");
        }
        made
    }

    fn make_in(place: &Path, limit: &str) -> Option<Self> {
        // A directory that is not a control group lacks the files that the kernel creates.
        let is_group = place.join("cgroup.procs").exists();
        let path = place.join(unique());
        if !is_group || fs::create_dir(&path).is_err() {
            return None;
        }
        let group = Self { path };
        if !group.path.join(limit).exists() {
            // Children of the root group have this controller only if it is enabled there.
            fs::write(place.join("cgroup.subtree_control"), "+memory").ok()?;
        }
        fs::write(group.path.join(limit), "30000000").ok()?;
        // The file does not exist without swap.
        let _ = fs::write(group.path.join("memory.swap.max"), "0");
        Some(group)
    }

    /// Returns a command that runs `command` with little memory.
    fn within(&self, command: &str) -> String {
        let procs = self.path.join("cgroup.procs");
        format!("bash -c 'set -o pipefail; echo $$ >{} && {command}'", procs.display())
    }
}

impl Drop for LittleMemory {
    fn drop(&mut self) {
        // The processes in the group have ended, unless the test failed.
        let _ = fs::remove_dir(&self.path);
    }
}

#[test]
fn a_command_killed_for_lack_of_memory_says_so() {
    let Some(group) = LittleMemory::make() else { return };
    let finished = World::new().run_commands(&["echo before", &group.within(TOO_MUCH)]);
    assert_eq!(finished.result(), "failed", "{finished:?}");
    let (output, exit_code) = finished.commands().pop().unwrap();
    assert!(output.contains(OUT_OF_MEMORY), "{finished:?}");
    assert_ne!(exit_code, 0);
}

#[test]
fn a_shell_killed_for_lack_of_memory_says_so() {
    let Some(group) = LittleMemory::make() else { return };
    let into = format!("echo $$ >{}", group.path.join("cgroup.procs").display());
    let grow = "x=x; while :; do x=$x$x; done";
    let finished = World::new().run_commands(&[&into, grow, "touch ~/went-on"]);
    assert_eq!(finished.result(), "failed", "{finished:?}");
    assert!(finished.output().contains(OUT_OF_MEMORY), "{finished:?}");
}

#[test]
fn a_command_with_enough_memory_has_no_such_message() {
    let Some(group) = LittleMemory::make() else { return };
    let finished = World::new().run_commands(&[&group.within("echo fine")]);
    assert_eq!(finished.commands(), [("fine\n".to_owned(), 0)], "{finished:?}");
}
