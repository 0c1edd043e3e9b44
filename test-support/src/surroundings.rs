//! Agents in other surroundings than those of the tests: started by a shell, or by another user.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, lchown};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::unistd::geteuid;
use tempfile::TempDir;

use crate::World;

/// A user who runs agents and has no other rights.
pub const OPERATOR: u32 = 12_345;

/// Another user of the same machine.
pub const STRANGER: u32 = 12_346;

/// Whether tests can do things as other users. If not, that is said.
pub fn has_other_users() -> bool {
    let is_root = geteuid().is_root();
    if !is_root {
        eprintln!("skipped: only root can do things as other users");
    }
    is_root
}

/// Has the agent start in a shell that ran `first`; a redirection there is the agent's too.
pub fn in_shell(command: &mut Command, first: &str) {
    let mut shell = Command::new("bash");
    shell.args(["-c", &format!("{first}; exec \"$@\""), "bash"]).arg(command.get_program());
    shell.args(command.get_args());
    with_surroundings_of(command, &mut shell);
    *command = shell;
}

/// Has the agent start where no control group can be made, nor found; only root can do that.
pub fn without_control_groups(command: &mut Command) {
    let hidden = "mount -t tmpfs none /sys/fs/cgroup && exec \"$@\"";
    in_shell(command, &format!("set -- unshare -m bash -c '{hidden}' bash \"$@\""));
}

/// Has the agent start as this user, to whom the world belongs from now on. Others can look into it where its
/// own directories let them.
pub fn as_user(world: &World, user: u32, command: &mut Command) {
    let directory = world.directory();
    // The usual place may be one that only the tests' own user gets to.
    let usual = crate::agent_program();
    let program = directory.join("agent");
    if !program.exists() {
        // By another program: a thread's child would inherit a copy that is open to be written here, and no copy that is
        // can be started.
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

/// Makes this user the owner of everything there.
pub fn give_away(path: &Path, user: u32) {
    lchown(path, Some(user), Some(user)).unwrap();
    if fs::symlink_metadata(path).unwrap().is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            give_away(&entry.unwrap().path(), user);
        }
    }
}

/// A directory like `/tmp`, which `owner` has made: everybody may put files into it, and only who owns a file, or
/// the directory, may remove it.
pub fn open_to_all(owner: u32) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    lchown(directory.path(), Some(owner), Some(owner)).unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o1777)).unwrap();
    directory
}

/// What a script prints that this user has run by bash; it must succeed.
pub fn done_by(user: u32, script: &str) -> String {
    let mut bash = Command::new("bash");
    bash.args(["-c", script]).current_dir("/").env_clear().stdin(Stdio::null());
    bash.env("PATH", std::env::var_os("PATH").unwrap()).uid(user).gid(user);
    let output = bash.output().unwrap();
    assert!(output.status.success(), "{script}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}
