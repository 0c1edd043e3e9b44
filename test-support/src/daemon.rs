//! A running `agent serve` or `agent start`, and its own log.

use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::World;
use crate::waiting::PATIENCE;
use crate::world::Watchdog;

/// Starts a program, even one that was copied just now: a child that another thread has forked keeps the copy
/// open for writing until it executes its own program.
pub fn spawned(command: &mut Command) -> Child {
    loop {
        match command.spawn() {
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => {}
            child => return child.unwrap(),
        }
    }
}

/// An `agent serve` or `agent start`, killed on drop.
pub struct Daemon {
    child: Child,
    own_log: Arc<OwnLog>,
    _watchdog: Watchdog,
    _world: Arc<TempDir>,
}

impl Daemon {
    pub fn start(world: &World, mut command: Command) -> Self {
        command.stdout(Stdio::piped());
        let mut child = spawned(&mut command);
        let watchdog = world.watch(&child);
        let own_log = OwnLog::collect(child.stdout.take().unwrap());
        let world = world.keep();
        Self { child, own_log, _watchdog: watchdog, _world: world }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().try_into().unwrap())
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    pub fn wait_for_exit(&mut self) -> ExitStatus {
        let status = self.child.wait().unwrap();
        assert_ne!(status.signal(), Some(9), "killed, perhaps because it hung: {}", self.own_log());
        status
    }

    /// Returns the agent's own log so far, as on standard output.
    pub fn own_log(&self) -> String {
        self.own_log.so_far()
    }

    /// Waits for the end of the agent's own log and returns all of it.
    pub fn whole_log(&self) -> String {
        self.own_log.wait_for_end();
        self.own_log()
    }

    /// Waits until a line contains `text`. Returns the agent's own log so far.
    pub fn wait_for_own_log(&self, text: &str) -> String {
        self.own_log.wait_for(text)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            eprintln!("the agent's own log:\n{}", self.own_log());
        }
    }
}

/// Collects the standard output of an agent.
#[derive(Default)]
struct OwnLog {
    text: Mutex<(Vec<u8>, bool)>,
    grown: Condvar,
}

impl OwnLog {
    fn collect(mut stdout: impl io::Read + Send + 'static) -> Arc<Self> {
        let log = Arc::new(Self::default());
        let collected = Arc::clone(&log);
        std::thread::spawn(move || {
            let mut part = [0; 4096];
            loop {
                let count = stdout.read(&mut part).unwrap_or(0);
                let mut text = collected.text.lock().unwrap();
                text.0.extend_from_slice(&part[..count]);
                text.1 |= count == 0;
                collected.grown.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
        log
    }

    fn so_far(&self) -> String {
        String::from_utf8_lossy(&self.text.lock().unwrap().0).into_owned()
    }

    /// Waits until standard output is closed.
    fn wait_for_end(&self) {
        let guard = self.text.lock().unwrap();
        let (guard, waited) =
            self.grown.wait_timeout_while(guard, PATIENCE, |(_, ended)| !*ended).unwrap();
        drop(guard);
        assert!(!waited.timed_out(), "the agent's own log does not end");
    }

    /// Waits until a complete line contains `text`.
    fn wait_for(&self, text: &str) -> String {
        let guard = self.text.lock().unwrap();
        let contains_line = |log: &[u8]| {
            let log = String::from_utf8_lossy(log);
            log.split_inclusive('\n').any(|line| line.ends_with('\n') && line.contains(text))
        };
        let (guard, _) = self
            .grown
            .wait_timeout_while(guard, PATIENCE, |(log, ended)| !*ended && !contains_line(log))
            .unwrap();
        let log = String::from_utf8_lossy(&guard.0).into_owned();
        let found = contains_line(&guard.0);
        drop(guard);
        assert!(found, "{text:?} is not in the agent's own log: {log}");
        log
    }
}
