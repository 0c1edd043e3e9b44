//! A process beside the agent that ends what a job in containers has if the agent dies. It is this program
//! again, as `agent docker-watch`.
//!
//! Its standard input is a pipe from the agent: first a [`Estate`] in JSON, a line; then `group NUMBER` for
//! a process group of this machine that is the job's (0 for none), `engine` as soon as there may be
//! something on the engine, and `done`. If it ends without that, the agent has. Its standard output is a pipe to the
//! agent, which ends with it: the job may have killed it, and gets another one.

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

/// How long what the agent asked of the engine in its last moment may take to appear.
const LAST_REQUESTS: Duration = Duration::from_secs(3);

/// How long to try while the engine is away, and the longest pause; pauses double.
const PATIENCE: Duration = Duration::from_hours(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Ends what a dead job may own on an engine, and deletes its files then.
pub fn end_dead(mut files: JobFiles, environment: &[(OsString, OsString)]) -> io::Result<()> {
    files.declare_dead()?;
    let place = files.name().to_owned();
    let estate = Estate { files, access: None };
    let watched = Watch::start(estate, environment).and_then(|mut watch| watch.on_engine());
    if let Err(error) = watched {
        log::warn!(place, error:%; "a dead job's containers may still be there");
    }
    Ok(())
}

/// The agent's hand on that process. Without a word more, the end of this value is that of the job.
pub struct Watch {
    files: JobFiles,
    pipe: Option<ChildStdin>,
    process: Option<Child>,
    end: Option<ChildStdout>,
}

impl Watch {
    /// Starts it, with nothing but `environment`, which tells where the engine is.
    pub fn start(estate: Estate, environment: &[(OsString, OsString)]) -> io::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg0("agent").args(["docker-watch", &estate.files.mark()]).env_clear();
        // It must not be found among what is the job's.
        let is_mark = |(name, _): &&(OsString, OsString)| name.as_os_str() == job_mark::VARIABLE;
        command.envs(environment.iter().filter(|each| !is_mark(each)).cloned());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        sys::start_clean(&mut command);
        let mut process = command.spawn()?;
        let (pipe, end) = (process.stdin.take(), process.stdout.take());
        let spec = serde_json::to_string(&estate)?;
        let mut watch = Self { files: estate.files, pipe, process: Some(process), end };
        watch.tell(&spec)?;
        Ok(watch)
    }

    /// Readable at its end, and not before. Once only.
    pub fn end(&mut self) -> Option<OwnedFd> {
        self.end.take().map(OwnedFd::from)
    }

    /// From now on there may be something on the engine.
    pub fn on_engine(&mut self) -> io::Result<()> {
        self.files.note_elsewhere()?;
        self.tell("engine")
    }

    /// This process group is the job's; nothing for none.
    pub fn group(&mut self, group: Option<Pid>) -> io::Result<()> {
        self.tell(&format!("group {}", group.map_or(0, Pid::as_raw)))
    }

    /// There is nothing left to end.
    pub fn call_off(mut self) {
        // One that is gone has nothing to do either.
        let _ = self.tell("done");
    }

    fn tell(&mut self, line: &str) -> io::Result<()> {
        let pipe = self.pipe.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
        match pipe.write_all(format!("{line}\n").as_bytes()) {
            // A guard can be killed at any moment. `end` shows that, and its successor is told everything again.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            written => written,
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.pipe.take());
        if let Some(mut process) = self.process.take() {
            // Nobody has to wait for it, but somebody has to take its exit code.
            // Where no thread can be had, the agent's own end does it.
            let _ = std::thread::Builder::new().spawn(move || process.wait());
        }
    }
}

/// Waits for the agent's word, or its end.
pub fn run() -> io::Result<()> {
    // Jobs run as the same user.
    prctl::set_dumpable(false)?;
    // Out of the reach of the terminal that the agent may run on. Fails for a leader only.
    let _ = setsid();
    let mut lines = io::stdin().lock().lines();
    let estate = lines.next().ok_or(io::ErrorKind::UnexpectedEof)??;
    let estate: Estate = serde_json::from_str(&estate)?;
    let (mut on_engine, mut group) = (false, 0);
    for line in lines.map_while(Result::ok) {
        match line.split_once(' ') {
            None if line == "done" => return Ok(()),
            None => on_engine |= line == "engine",
            Some((_, number)) => group = number.parse().unwrap_or(0),
        }
    }
    if group > 0 {
        // It may have ended by itself.
        let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
    }
    let files = &estate.files;
    job_mark::kill_all(&files.mark());
    let closed = estate.close_access();
    files.delete_secrets();
    let removed = if on_engine {
        System::new().block_on(remove_patiently(files.name(), &files.scratch()))
    } else {
        Ok(())
    };
    if removed.is_ok() {
        files.delete();
    }
    // Where it fails, the next agent tries again.
    removed.and(closed)
}

async fn remove_patiently(place: &str, scratch: &Path) -> io::Result<()> {
    let environment = Environment::of_process().without_secrets();
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
        let mut guard = Watch::start(estate, &[]).unwrap();
        guard.process.take().unwrap().wait().unwrap();
        guard.on_engine().unwrap();
        guard.group(None).unwrap();
        assert!(guard.end().is_some());
    }
}
