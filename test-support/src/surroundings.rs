//! Starts agents in other environments than that of the tests: by a shell, or as another user.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, lchown};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::unistd::geteuid;
use tempfile::TempDir;

use crate::World;

/// ID of an unprivileged user who runs agents.
pub const OPERATOR: u32 = 12_345;

/// ID of another user of the same machine.
pub const STRANGER: u32 = 12_346;

/// Returns whether tests can run programs as other users. If not, prints that the test is skipped.
pub fn can_switch_user() -> bool {
    let is_root = geteuid().is_root();
    if !is_root {
        eprintln!("skipped: only root can run programs as other users");
    }
    is_root
}

/// Makes the agent start from a shell that ran `first`. Redirections in `first` also apply to the agent.
pub fn in_shell(command: &mut Command, first: &str) {
    let mut shell = Command::new("bash");
    shell.args(["-c", &format!("{first}; exec \"$@\""), "bash"]).arg(command.get_program());
    shell.args(command.get_args());
    with_surroundings_of(command, &mut shell);
    *command = shell;
}

/// Hides all control groups from the agent; only root can do that.
pub fn without_control_groups(command: &mut Command) {
    let hidden = "mount -t tmpfs none /sys/fs/cgroup && exec \"$@\"";
    in_shell(command, &format!("set -- unshare -m bash -c '{hidden}' bash \"$@\""));
}

/// Makes the agent start as this user, and gives the world's directory to the user. Other users can read it,
/// as far as the modes of its subdirectories allow.
pub fn as_user(world: &World, user: u32, command: &mut Command) {
    let directory = world.directory();
    // Only the tests' own user may have access to the build directory.
    let usual = crate::agent_program();
    let program = directory.join("agent");
    if !program.exists() {
        // Another program makes the copy: a file that a forked child of this process has inherited open for
        // writing can't be executed.
        let copied = Command::new("cp").arg(usual).arg(&program).status().unwrap();
        assert!(copied.success());
        fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    }
    give_away(directory, user);
    fs::set_permissions(directory, Permissions::from_mode(0o755)).unwrap();
    let here = |word| if word == usual { program.as_os_str() } else { word };
    let mut same = Command::new(here(command.get_program()));
    same.args(command.get_args().map(here)).uid(user).gid(user);
    with_surroundings_of(command, &mut same);
    *command = same;
}

fn with_surroundings_of(command: &Command, other: &mut Command) {
    other.env_clear().stdin(Stdio::null());
    other.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    other.current_dir(command.get_current_dir().unwrap_or_else(|| Path::new("/")));
}

/// Makes this user the owner of `path` and everything below it.
pub fn give_away(path: &Path, user: u32) {
    lchown(path, Some(user), Some(user)).unwrap();
    if fs::symlink_metadata(path).unwrap().is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            give_away(&entry.unwrap().path(), user);
        }
    }
}

/// Makes a directory like `/tmp`, owned by `owner`: all users may create files in it, and only the owner of a
/// file or of the directory may remove that file.
pub fn world_writable_directory(owner: u32) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    lchown(directory.path(), Some(owner), Some(owner)).unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o1777)).unwrap();
    directory
}

/// Runs a bash script as this user, which must succeed, and returns its output.
pub fn bash_as(user: u32, script: &str) -> String {
    let mut bash = Command::new("bash");
    bash.args(["-c", script]).current_dir("/").env_clear().stdin(Stdio::null());
    bash.env("PATH", std::env::var_os("PATH").unwrap()).uid(user).gid(user);
    let output = bash.output().unwrap();
    assert!(output.status.success(), "{script}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}
