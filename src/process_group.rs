//! Programs of this machine that must not outstay their welcome.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::{Command as StdCommand, ExitStatus};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::sys;

/// Runs a program to its end, or to that of its time: nothing then. What is left of its process group
/// is killed in any case.
pub async fn run_for(
    mut command: StdCommand,
    patience: Duration,
) -> io::Result<Option<ExitStatus>> {
    sys::start_clean(&mut command);
    command.process_group(0);
    let mut program = Command::from(command).spawn()?;
    let _ended_with_it = ProcessGroup::of(&program);
    timeout(patience, program.wait()).await.ok().transpose()
}

/// A program and what it has started. Killed with this value.
struct ProcessGroup(Option<Pid>);

impl ProcessGroup {
    fn of(leader: &Child) -> Self {
        Self(leader.id().and_then(|pid| pid.try_into().ok()).map(Pid::from_raw))
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // Fails if all of it has ended.
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}
