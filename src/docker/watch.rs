//! A process beside the agent that ends what a job has on an engine if the agent dies. It is this program
//! again, as `agent docker-watch`.
//!
//! Its standard input is a pipe from the agent: first a [`WatchSpec`] in JSON, a line; then nothing, until
//! `done`, or the end, which is that of the agent.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use actix::System;
use nix::unistd::setsid;
use serde::{Deserialize, Serialize};
use tokio::time::sleep;

use super::engine::Engine;
use super::place::remove_all;
use crate::executors::shell::agent_environment;
use crate::jump_point::SshAccess;
use crate::state_dir;
use crate::sys;

/// How long what the agent asked of the engine in its last moment may take to appear.
const LAST_REQUESTS: Duration = Duration::from_secs(3);

/// Is in the directory of a job that has something on an engine.
const MARK: &str = "on-engine";

/// Ends what a job has on an engine whose agent died with all that could do that; whether there may be
/// something.
pub fn end_dead(job_directory: &Path) -> bool {
    let place = job_directory.file_name().and_then(|name| name.to_str());
    let Some(place) = place.filter(|_| job_directory.join(MARK).exists()) else {
        return false;
    };
    let spec = WatchSpec {
        place: place.to_owned(),
        job_directory: job_directory.to_owned(),
        access: None,
    };
    match Watch::start(&spec, &agent_environment()) {
        Ok(watch) => drop(watch),
        Err(error) => log::warn!(place, error:%; "a dead job's containers may still be there"),
    }
    true
}

/// What to end.
#[derive(Debug, Deserialize, Serialize)]
pub struct WatchSpec {
    /// What it is marked with.
    pub place: String,
    /// Removed with all that is in it.
    pub job_directory: PathBuf,
    /// Taken back.
    pub access: Option<SshAccess>,
}

/// The agent's hand on that process. Without a word more, the end of this value is that of the job.
pub struct Watch {
    pipe: Option<ChildStdin>,
    process: Option<Child>,
}

impl Watch {
    /// Starts it, with nothing but `environment`, which tells where the engine is.
    pub fn start(spec: &WatchSpec, environment: &[(OsString, OsString)]) -> io::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg0("agent").arg("docker-watch").env_clear();
        command.envs(environment.iter().cloned());
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        sys::start_clean(&mut command);
        let mut process = command.spawn()?;
        let mut watch = Self { pipe: process.stdin.take(), process: Some(process) };
        File::create(spec.job_directory.join(MARK))?;
        let mut line = serde_json::to_vec(spec)?;
        line.push(b'\n');
        watch.tell(&line)?;
        Ok(watch)
    }

    /// There is nothing left to end.
    pub fn call_off(mut self) {
        // One that is gone has nothing to do either.
        let _ = self.tell(b"done\n");
    }

    fn tell(&mut self, line: &[u8]) -> io::Result<()> {
        self.pipe.as_mut().ok_or(io::ErrorKind::BrokenPipe)?.write_all(line)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.pipe.take());
        if let Some(mut process) = self.process.take() {
            // Nobody has to wait for it, but somebody has to take its exit code.
            std::thread::spawn(move || process.wait());
        }
    }
}

/// Waits for the agent's word, or its end.
pub fn run() -> io::Result<()> {
    // Out of the reach of the terminal that the agent may run on. Fails for a leader only.
    let _ = setsid();
    let mut lines = io::stdin().lock().lines();
    let spec = lines.next().ok_or(io::ErrorKind::UnexpectedEof)??;
    let spec: WatchSpec = serde_json::from_str(&spec)?;
    if matches!(lines.next(), Some(Ok(word)) if word == "done") {
        return Ok(());
    }
    let closed = spec.access.map_or(Ok(()), |access| access.close_now());
    let scratch = state_dir::scratch_of(&spec.job_directory);
    let removed = System::new().block_on(async {
        let environment: Vec<_> = std::env::vars_os().collect();
        let engine = Engine::connect(&environment, &scratch).await.map_err(io::Error::other)?;
        remove_all(&engine, &spec.place).await.map_err(io::Error::other)?;
        sleep(LAST_REQUESTS).await;
        remove_all(&engine, &spec.place).await.map_err(io::Error::other)
    });
    // Where it fails, the next agent tries again.
    state_dir::remove(if removed.is_ok() { &spec.job_directory } else { &scratch });
    removed.and(closed)
}
