//! Programs of this machine that must not outstay their welcome.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::{Command as StdCommand, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::pipe::Receiver;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::os::sys;

/// How much of what a program prints is kept, in bytes.
const KEPT: usize = 256 << 10;

/// How long to wait for what an ended program has printed.
const REST_PATIENCE: Duration = Duration::from_secs(1);

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

/// Runs a program to its end; answers that, and the last of what it printed. What is left of its process group
/// is killed then, and if nobody waits any more. `started` is told the group.
pub async fn output_of(
    mut command: StdCommand,
    started: impl FnOnce(Option<Pid>),
) -> io::Result<(ExitStatus, Vec<u8>)> {
    let (reader, writer) = io::pipe()?;
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    sys::start_clean(&mut command);
    command.process_group(0);
    let mut command = Command::from(command);
    let mut program = command.spawn()?;
    let group = ProcessGroup::of(&program);
    started(group.0);
    // It holds the pipe's other end.
    drop(command);
    let mut output = Receiver::from_owned_fd(reader.into())?;
    let mut printed = Vec::new();
    let ended = loop {
        tokio::select! {
            ended = program.wait() => break ended?,
            count = output.read_buf(&mut printed) => {
                if count? == 0 {
                    break program.wait().await?;
                }
                printed.drain(..printed.len().saturating_sub(KEPT));
            }
        }
    };
    drop(group);
    // What got away may keep the pipe open.
    let _ = timeout(REST_PATIENCE, output.read_to_end(&mut printed)).await;
    Ok((ended, printed))
}

/// What a program printed.
pub struct Printed {
    /// How it ended.
    pub status: ExitStatus,
    /// On its standard output, the last of it.
    pub stdout: Vec<u8>,
    /// On its standard error, the last of it.
    pub stderr: Vec<u8>,
}

/// Runs a program that gets `input`, to its end. What is left of its process group is killed then, and if nobody
/// waits any more.
pub async fn answer_of(mut command: StdCommand, input: &[u8]) -> io::Result<Printed> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    sys::start_clean(&mut command);
    command.process_group(0);
    let mut program = Command::from(command).spawn()?;
    let group = ProcessGroup::of(&program);
    let (stdin, stdout, stderr) =
        (program.stdin.take(), program.stdout.take(), program.stderr.take());
    let ended = async {
        if let Some(mut stdin) = stdin {
            // One that does not read it says in its own words what it wants.
            let _ = stdin.write_all(input).await;
        }
        let status = program.wait().await;
        drop(group);
        status
    };
    let (status, stdout, stderr) = tokio::join!(ended, last_of(stdout), last_of(stderr));
    Ok(Printed { status: status?, stdout, stderr })
}

async fn last_of(stream: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut printed = Vec::new();
    if let Some(mut stream) = stream {
        // A stream that fails has said all that it will.
        while stream.read_buf(&mut printed).await.is_ok_and(|count| count > 0) {
            printed.drain(..printed.len().saturating_sub(KEPT));
        }
    }
    printed
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
