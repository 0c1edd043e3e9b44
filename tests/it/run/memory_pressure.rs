//! A process of a job that the kernel kills for want of memory: the log says so, as nothing else would.

use std::fs;
use std::path::{Path, PathBuf};

use test_support::{World, unique};

/// What is told then.
const TOLD: &str = "memory ran out";

/// Takes more than there is.
const TOO_MUCH: &str = "head -c 500000000 /dev/zero | tail -n 1 | wc -c";

/// Where control groups with a limit can be, of both versions, and how that is called there.
const PLACES: [(&str, &str); 2] =
    [("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")];

/// A control group with little memory; gone with this value.
struct LittleMemory {
    path: PathBuf,
}

impl LittleMemory {
    /// Nothing where there can be none. That is said.
    fn make() -> Option<Self> {
        let made = PLACES.iter().find_map(|(place, limit)| Self::make_in(place.as_ref(), limit));
        if made.is_none() {
            eprintln!("skipped: no control group with little memory can be made here");
        }
        made
    }

    fn make_in(place: &Path, limit: &str) -> Option<Self> {
        // What is no control group has none of the files that the kernel makes.
        let is_group = place.join("cgroup.procs").exists();
        let path = place.join(unique());
        if !is_group || fs::create_dir(&path).is_err() {
            return None;
        }
        let group = Self { path };
        if !group.path.join(limit).exists() {
            // Children of the root have this controller only if it is wanted.
            fs::write(place.join("cgroup.subtree_control"), "+memory").ok()?;
        }
        fs::write(group.path.join(limit), "30000000").ok()?;
        // Not there without swap.
        let _ = fs::write(group.path.join("memory.swap.max"), "0");
        Some(group)
    }

    /// A command that does this with little memory.
    fn within(&self, command: &str) -> String {
        let procs = self.path.join("cgroup.procs");
        format!("bash -c 'set -o pipefail; echo $$ >{} && {command}'", procs.display())
    }
}

impl Drop for LittleMemory {
    fn drop(&mut self) {
        // The processes in it are gone; if not, it is one of the failed test.
        let _ = fs::remove_dir(&self.path);
    }
}

#[test]
fn a_command_that_the_kernel_killed_has_a_line_that_tells_why() {
    let Some(group) = LittleMemory::make() else { return };
    let finished = World::new().run_commands(&["echo before", &group.within(TOO_MUCH)]);
    assert_eq!(finished.result(), "failed", "{finished:?}");
    let (output, exit_code) = finished.commands().pop().unwrap();
    assert!(output.contains(TOLD), "{finished:?}");
    assert_ne!(exit_code, 0);
}

#[test]
fn so_has_a_shell_that_was_killed_itself() {
    let Some(group) = LittleMemory::make() else { return };
    let into = format!("echo $$ >{}", group.path.join("cgroup.procs").display());
    let grow = "x=x; while :; do x=$x$x; done";
    let finished = World::new().run_commands(&[&into, grow, "touch ~/went-on"]);
    assert_eq!(finished.result(), "failed", "{finished:?}");
    assert!(finished.output().contains(TOLD), "{finished:?}");
}

#[test]
fn a_command_that_has_enough_has_no_such_line() {
    let Some(group) = LittleMemory::make() else { return };
    let finished = World::new().run_commands(&[&group.within("echo fine")]);
    assert_eq!(finished.commands(), [("fine\n".to_owned(), 0)], "{finished:?}");
}
