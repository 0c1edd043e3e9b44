//! Runs helper programs, with a time limit, and kills what they leave behind.

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

/// Maximum size of a program's kept output, in bytes; the end of the output is kept.
const KEPT: usize = 256 << 10;

/// Time to read the rest of a program's output after it has ended; a descendant may keep the pipe open.
const REST_PATIENCE: Duration = Duration::from_secs(1);

/// Runs a program for at most `patience`; returns `None` after a timeout. Kills the rest of its process
/// group in either case.
pub async fn run_for(
    mut command: StdCommand,
    patience: Duration,
) -> io::Result<Option<ExitStatus>> {
    sys::start_clean(&mut command);
    command.process_group(0);
    let mut program = Command::from(command).spawn()?;
    let _killed_on_drop = ProcessGroup::led_by(&program);
    timeout(patience, program.wait()).await.ok().transpose()
}

/// Runs a program to its end. Returns its exit status and the end of its output, standard error included.
///
/// Calls `started` with the program's process group. Kills the rest of the group when the program has
/// ended or the future is dropped.
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
    let group = ProcessGroup::led_by(&program);
    started(group.0);
    // `command` holds the pipe's other end.
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
    // A descendant that left the process group may keep the pipe open.
    let _ = timeout(REST_PATIENCE, output.read_to_end(&mut printed)).await;
    Ok((ended, printed))
}

/// The result of a program.
pub struct Printed {
    /// Exit status.
    pub status: ExitStatus,
    /// The end of its standard output.
    pub stdout: Vec<u8>,
    /// The end of its standard error.
    pub stderr: Vec<u8>,
}

/// Runs a program with `input` on its standard input. Kills the rest of its process group when the program
/// has ended or the future is dropped.
pub async fn stdout_of(mut command: StdCommand, input: &[u8]) -> io::Result<Printed> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    sys::start_clean(&mut command);
    command.process_group(0);
    let mut program = Command::from(command).spawn()?;
    let group = ProcessGroup::led_by(&program);
    let (stdin, stdout, stderr) =
        (program.stdin.take(), program.stdout.take(), program.stderr.take());
    let ended = async {
        if let Some(mut stdin) = stdin {
            // A program that does not read its input reports the reason by itself.
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
        // A read error counts as the end of the stream.
        while stream.read_buf(&mut printed).await.is_ok_and(|count| count > 0) {
            printed.drain(..printed.len().saturating_sub(KEPT));
        }
    }
    printed
}

/// A program's process group, killed on drop.
struct ProcessGroup(Option<Pid>);

impl ProcessGroup {
    fn led_by(leader: &Child) -> Self {
        Self(leader.id().and_then(|pid| pid.try_into().ok()).map(Pid::from_raw))
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // Fails if the whole group has ended.
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}
