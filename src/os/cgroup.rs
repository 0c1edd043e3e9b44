//! A control group for one job, where the agent may create one: processes can't leave it by forking, and
//! the kernel kills it as a whole.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Name prefix of all jobs' groups.
pub const PREFIX: &str = "semaphore-agent-";

/// Age from which an empty group is removed; a younger one may belong to a job that is just starting.
const OLD: Duration = Duration::from_mins(1);

/// A group that holds a job's processes.
#[derive(Debug)]
pub struct JobCgroup {
    path: PathBuf,
}

impl JobCgroup {
    /// Creates a group called `name` below the agent's own group: in the unified hierarchy if there is one,
    /// else in an older one. Returns `None` if the agent lacks the permission.
    pub fn create(name: &str) -> Option<Self> {
        let places: Vec<_> = places(name).collect();
        for group in &places {
            remove_old_groups_beside(&group.path);
        }
        let is_made = |group: &Self| fs::create_dir(&group.path).is_ok() && group.is_usable();
        places.into_iter().find(is_made)
    }

    /// Returns the group called `name`, if it exists.
    pub fn find(name: &str) -> Option<Self> {
        places(name).find(|group| group.path.is_dir())
    }

    fn is_usable(&self) -> bool {
        let usable = self.open_procs().is_ok();
        if !usable {
            self.remove();
        }
        usable
    }

    /// Opens `cgroup.procs`, to which a process writes "0" in order to enter the group.
    pub fn open_procs(&self) -> io::Result<File> {
        File::options().write(true).open(self.path.join("cgroup.procs"))
    }

    /// Opens the group's directory, for `clone3` with `CLONE_INTO_CGROUP`.
    pub fn open(&self) -> io::Result<File> {
        File::open(&self.path)
    }

    /// Kills all processes in the group.
    pub fn kill(&self) {
        if fs::write(self.path.join("cgroup.kill"), "1").is_err() {
            // Old hierarchies and kernels have no `cgroup.kill`.
            for pid in self.members() {
                // Fails if the process has ended meanwhile.
                let _ = kill(pid, Signal::SIGKILL);
            }
        }
    }

    /// Returns whether the group has no processes.
    pub fn is_empty(&self) -> bool {
        self.members().is_empty()
    }

    fn members(&self) -> Vec<Pid> {
        let members = fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
        members.lines().filter_map(|line| line.parse().ok().map(Pid::from_raw)).collect()
    }

    /// Removes the empty group, and any groups that the job created below it.
    pub fn remove(&self) {
        if let Err(error) = remove_tree(&self.path)
            && error.kind() != ErrorKind::NotFound
        {
            log::warn!(path:? = self.path, error:% = error; "a control group can't be removed");
        }
    }
}

/// Removes empty groups of past jobs. A group can outlive its job if a process in it could not be killed
/// at once, for example during an uninterruptible sleep.
fn remove_old_groups_beside(path: &Path) {
    let entries = path.parent().and_then(|parent| fs::read_dir(parent).ok());
    for entry in entries.into_iter().flatten().flatten() {
        let is_jobs = entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX));
        let age = entry.metadata().and_then(|found| found.modified()).map(|made| made.elapsed());
        if is_jobs && matches!(age, Ok(Ok(age)) if age > OLD) {
            // Fails for a group that is not empty, which must stay.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// Returns the possible paths of a group called `name`, best hierarchy first.
fn places(name: &str) -> impl Iterator<Item = JobCgroup> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let memberships = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = candidates(&mounts, &memberships).into_iter();
    own.map(move |own| JobCgroup { path: own.join(name) })
}

/// Removes a group and its subgroups. The kernel removes a group's files with the group.
fn remove_tree(group: &Path) -> io::Result<()> {
    for entry in fs::read_dir(group)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(group)
}

/// Returns the directories of the groups that the agent is in, best hierarchy first.
fn candidates(mounts: &str, memberships: &str) -> Vec<PathBuf> {
    let mut found: Vec<(u8, PathBuf)> = Vec::new();
    for line in mounts.lines() {
        let Some((place, filesystem)) = line.split_once(" - ") else {
            continue;
        };
        let mut place = place.split(' ').skip(3);
        let (Some(root), Some(mount)) = (place.next(), place.next()) else {
            continue;
        };
        let mut filesystem = filesystem.split(' ');
        let (Some(kind), Some(options)) = (filesystem.next(), filesystem.nth(1)) else {
            continue;
        };
        let (rank, controllers) = match kind {
            "cgroup2" => (0, ""),
            "cgroup" if has_word(options, "pids") => (1, "pids"),
            "cgroup" if has_word(options, "name=systemd") => (2, "name=systemd"),
            _ => continue,
        };
        let own = memberships.lines().find_map(|line| {
            let (named, path) = line.split_once(':')?.1.split_once(':')?;
            (named == controllers || has_word(named, controllers)).then_some(path)
        });
        if let Some(own) = own {
            let below_mount = own.strip_prefix(root).unwrap_or(own).trim_start_matches('/');
            found.push((rank, Path::new(mount).join(below_mount)));
        }
    }
    found.sort();
    found.into_iter().map(|(_, path)| path).collect()
}

fn has_word(list: &str, word: &str) -> bool {
    list.split(',').any(|one| one == word)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn old_empty_groups_of_jobs_are_removed() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        for name in ["semaphore-agent-old", "semaphore-agent-new", "semaphore-agent-full", "other"]
        {
            fs::create_dir(at(name)).unwrap();
        }
        fs::create_dir(at("semaphore-agent-full/process")).unwrap();
        let long_ago = SystemTime::now() - 2 * OLD;
        for name in ["semaphore-agent-old", "semaphore-agent-full", "other"] {
            File::open(at(name)).unwrap().set_modified(long_ago).unwrap();
        }
        remove_old_groups_beside(&at("semaphore-agent-next"));
        let mut left: Vec<_> = fs::read_dir(directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, ["other", "semaphore-agent-full", "semaphore-agent-new"]);
    }

    fn paths(mounts: &str, memberships: &str) -> Vec<String> {
        candidates(mounts, memberships).iter().map(|path| path.display().to_string()).collect()
    }

    #[test]
    fn the_unified_hierarchy_comes_first() {
        let mounts = "\
            30 25 0:25 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
            31 25 0:26 / /sys/fs/cgroup/pids rw,relatime shared:7 - cgroup cgroup rw,pids\n\
            32 25 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n\
            33 25 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";
        let memberships = "9:pids:/a\n1:name=systemd:/b\n3:cpu:/\n0::/user.slice/agent.service\n";
        assert_eq!(
            paths(mounts, memberships),
            [
                "/sys/fs/cgroup/unified/user.slice/agent.service",
                "/sys/fs/cgroup/pids/a",
                "/sys/fs/cgroup/systemd/b"
            ]
        );
    }

    #[test]
    fn a_container_sees_its_own_group_as_the_root() {
        let mounts = "30 25 0:25 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(paths(mounts, "0::/docker/abc\n"), ["/sys/fs/cgroup/"]);
        assert_eq!(paths("nonsense\n1 - 2\n", ""), [""; 0]);
    }
}
