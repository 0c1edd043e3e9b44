//! The guard of a Docker job: a process beside the agent that removes the job's containers and files if the
//! agent dies. It is this program again, as `agent docker-watch`.
//!
//! The guard's standard input is a pipe from the agent, with a command a line. The first line is an
//! [`Estate`] in JSON. Then come `group NUMBER` for the process group that runs on this machine for the job
//! (0 for none), `engine` as soon as the job may have something on the engine, and finally `done`. If the
//! pipe ends without `done`, the agent is dead.
//!
//! The guard's standard output is a pipe to the agent, on which nothing is written: its end tells the agent
//! that the guard was killed (a job can do that) and must be replaced.

use std::ffi::OsString;
use std::io::{self, BufRead as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use actix::System;
use nix::sys::prctl;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, setsid};
use tokio::time::{Instant, sleep};

use super::engine::Engine;
use super::removal::remove_all;
use crate::executors::estate::Estate;
use crate::executors::job_mark;
use crate::os::sys;
use crate::service::environment::Environment;
use crate::state::JobFiles;

/// How long the result of the agent's last requests to the engine may take to appear.
const LAST_REQUESTS: Duration = Duration::from_secs(3);

/// How long to retry while the engine can't be reached, and the longest pause between two attempts. Pauses
/// double.
const PATIENCE: Duration = Duration::from_hours(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Starts a guard that removes what a dead job may have on the engine, and then deletes the job's files.
pub fn end_dead(mut files: JobFiles, environment: &[(OsString, OsString)]) -> io::Result<()> {
    files.declare_dead()?;
    let place = files.name().to_owned();
    let estate = Estate { files, access: None };
    let started =
        Guard::start(estate, environment).and_then(|mut guard| guard.note_engine_in_use());
    if let Err(error) = started {
        log::warn!(place, error:%; "a dead job's containers may not be removed");
    }
    Ok(())
}

/// The agent's handle of a guard. Dropping it without [`Self::call_off`] makes the guard end the job.
pub struct Guard {
    files: JobFiles,
    pipe: Option<ChildStdin>,
    process: Option<Child>,
    end: Option<ChildStdout>,
}

impl Guard {
    /// Starts a guard whose environment is `environment`, which names the engine.
    pub fn start(estate: Estate, environment: &[(OsString, OsString)]) -> io::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg0("agent").args(["docker-watch", &estate.files.mark()]).env_clear();
        // Otherwise the guard would be found by the mark, and killed with the job's processes.
        let is_mark = |(name, _): &&(OsString, OsString)| name.as_os_str() == job_mark::VARIABLE;
        command.envs(environment.iter().filter(|each| !is_mark(each)).cloned());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        sys::start_clean(&mut command);
        let mut process = command.spawn()?;
        let (pipe, end) = (process.stdin.take(), process.stdout.take());
        let spec = serde_json::to_string(&estate)?;
        let mut guard = Self { files: estate.files, pipe, process: Some(process), end };
        guard.send(&spec)?;
        Ok(guard)
    }

    /// Returns a descriptor that becomes readable when the guard ends, and never before. `None` from the
    /// second call on.
    pub fn take_end(&mut self) -> Option<OwnedFd> {
        self.end.take().map(OwnedFd::from)
    }

    /// Tells the guard that the job may have something on the engine from now on.
    pub fn note_engine_in_use(&mut self) -> io::Result<()> {
        self.files.note_engine_in_use()?;
        self.send("engine")
    }

    /// Tells the guard which process group runs on this machine for the job, if any.
    pub fn set_host_group(&mut self, group: Option<Pid>) -> io::Result<()> {
        self.send(&format!("group {}", group.map_or(0, Pid::as_raw)))
    }

    /// Ends the guard, because nothing of the job is left.
    pub fn call_off(mut self) {
        // Fails if the guard is dead, which is as good.
        let _ = self.send("done");
    }

    fn send(&mut self, line: &str) -> io::Result<()> {
        let pipe = self.pipe.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
        match pipe.write_all(format!("{line}\n").as_bytes()) {
            // A guard can be killed at any moment. `end` shows that, and its successor is told everything again.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            written => written,
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        drop(self.pipe.take());
        if let Some(mut process) = self.process.take() {
            // Reaped on a thread, as the guard may work for long. If no thread can be started, the guard
            // stays a zombie until the agent ends.
            let _ = std::thread::Builder::new().spawn(move || process.wait());
        }
    }
}

/// Runs the guard: waits for `done` or the agent's death, and in the latter case ends the job.
pub fn run() -> io::Result<()> {
    // Jobs run as the same user, and must not read this process's memory.
    prctl::set_dumpable(false)?;
    // Keeps the signals of the agent's terminal away. Fails only if this process leads a group already.
    let _ = setsid();
    let mut lines = io::stdin().lock().lines();
    let estate = lines.next().ok_or(io::ErrorKind::UnexpectedEof)??;
    let estate: Estate = serde_json::from_str(&estate)?;
    let (mut engine_in_use, mut group) = (false, 0);
    for line in lines.map_while(Result::ok) {
        match line.split_once(' ') {
            None if line == "done" => return Ok(()),
            None => engine_in_use |= line == "engine",
            Some((_, number)) => group = number.parse().unwrap_or(0),
        }
    }
    if group > 0 {
        // Fails if the group has ended by itself.
        let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
    }
    let files = &estate.files;
    job_mark::kill_all(&files.mark());
    let closed = estate.close_access();
    files.delete_secrets();
    let removed = if engine_in_use {
        System::new().block_on(remove_with_retries(files.name(), &files.scratch()))
    } else {
        Ok(())
    };
    if removed.is_ok() {
        files.delete_all();
    }
    // If the removal failed, the job's files are still there, and the next agent tries again.
    removed.and(closed)
}

async fn remove_with_retries(place: &str, scratch: &Path) -> io::Result<()> {
    let environment = Environment::from_process().without_secrets();
    let give_up = Instant::now() + PATIENCE;
    let mut pause = Duration::from_secs(1);
    loop {
        let removed = async {
            let engine = Engine::connect(&environment, scratch).await.map_err(io::Error::other)?;
            remove_all(&engine, place).await.map_err(io::Error::other)?;
            sleep(LAST_REQUESTS).await;
            remove_all(&engine, place).await.map_err(io::Error::other)
        };
        match removed.await {
            Err(_) if Instant::now() < give_up => sleep(pause).await,
            removed => return removed,
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::StateDir;

    #[test]
    fn a_killed_guard_shows_at_its_end_only() {
        let state = tempfile::tempdir().unwrap();
        let (state_dir, _) = StateDir::open(&state.path().join("agent")).unwrap();
        let directory = state_dir.make_job_dir(None).unwrap();
        let estate = Estate { files: directory.files().clone(), access: None };
        // This test program knows no guards: started as one, it ends.
        let mut guard = Guard::start(estate, &[]).unwrap();
        guard.process.take().unwrap().wait().unwrap();
        guard.note_engine_in_use().unwrap();
        guard.set_host_group(None).unwrap();
        assert!(guard.take_end().is_some());
    }
}
