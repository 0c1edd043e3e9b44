//! A private home and a private state directory for the agent of one test, and jobs that run there.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, Once, OnceLock, mpsc};
use std::time::Duration;

use actors::log::event::LogEvent;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::signal::unix::{SignalKind, signal};

use crate::{Finished, job_of};

/// Returns the path of the agent's program. Cargo builds it for the tests and benches of its package, one
/// directory above theirs: `target/debug/agent` for `target/debug/deps/it-0123`.
pub fn agent_program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let own = std::env::current_exe().unwrap();
        let program = own.ancestors().nth(2).unwrap().join("agent");
        assert!(program.is_file(), "{} is missing: run `cargo build`", program.display());
        program
    })
}

/// The private directories of one test: home, state and others. Deleted with the last value that uses them.
pub struct World {
    directory: Arc<TempDir>,
    time_limit: Duration,
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    pub fn new() -> Self {
        handle_ignored_signals();
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("home")).unwrap();
        Self { directory: Arc::new(directory), time_limit: Duration::from_mins(2) }
    }

    /// Makes a world in which agents are killed after this time, instead of two minutes.
    pub fn with_time_limit(time_limit: Duration) -> Self {
        Self { time_limit, ..Self::new() }
    }

    pub fn home(&self) -> PathBuf {
        self.directory().join("home")
    }

    pub fn state(&self) -> PathBuf {
        self.directory().join("state")
    }

    /// Returns the directory that contains all others.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Keeps the directory as long as the returned value lives.
    pub(crate) fn keep(&self) -> Arc<TempDir> {
        Arc::clone(&self.directory)
    }

    /// Kills this agent when the time limit is over.
    pub(crate) fn watch(&self, child: &Child) -> Watchdog {
        Watchdog::over(child, self.time_limit)
    }

    /// Returns the path of the SSH access script.
    pub fn jump_point(&self) -> PathBuf {
        self.directory().join("ssh_jump_point")
    }

    /// Writes a file beside the home directory and returns its path.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.directory().join(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// Returns a command for the agent, with only PATH from the outer environment.
    pub fn agent(&self) -> Command {
        let mut command = Command::new(agent_program());
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap());
        command.env("HOME", self.home()).env("SEMAPHORE_AGENT_STATE_DIR", self.state());
        command.stdin(Stdio::null());
        command
    }

    /// Returns a command for `agent MODE` which writes only below the world's directory. All other required
    /// settings are missing.
    pub fn daemon(&self, mode: &str) -> Command {
        let working = self.directory().join("working");
        fs::create_dir_all(&working).unwrap();
        let mut command = self.agent();
        command.arg(mode).current_dir(working);
        command.env("SEMAPHORE_AGENT_SSH_JUMP_POINT_PATH", self.jump_point());
        command.env("SEMAPHORE_AGENT_LOG_FILE_PATH", self.directory().join("agent_log"));
        command
    }

    /// Runs a job to its end.
    pub fn run(&self, job: &str) -> Finished {
        self.start(job).finish()
    }

    /// Starts a job with `agent run`, which prints the log as event lines.
    pub fn start(&self, job: &str) -> Running {
        let path = self.file("job.yaml", job);
        self.start_file(&path)
    }

    pub fn start_file(&self, path: &Path) -> Running {
        self.start_file_with(path, |_| {})
    }

    /// Starts a job file after `adapt` has changed the command.
    pub fn start_file_with(&self, path: &Path, adapt: impl FnOnce(&mut Command)) -> Running {
        let mut command = self.agent();
        command.args(["run", "--output", "json"]).arg(path);
        adapt(&mut command);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let watchdog = self.watch(&child);
        Running { child, lines: None, _watchdog: watchdog, _world: self.keep() }
    }

    /// Runs a job of these commands to its end.
    pub fn run_commands(&self, commands: &[&str]) -> Finished {
        self.run(&job_of(commands))
    }
}

/// A running `agent run`.
pub struct Running {
    pub child: Child,
    lines: Option<BufReader<ChildStdout>>,
    _watchdog: Watchdog,
    _world: Arc<TempDir>,
}

/// Kills an agent after a time limit, so that a hang fails the test. Dropping it calls it off.
pub(crate) struct Watchdog {
    _called_off: mpsc::Sender<()>,
}

impl Watchdog {
    fn over(child: &Child, time_limit: Duration) -> Self {
        let pid = Pid::from_raw(child.id().try_into().unwrap());
        let (called_off, done) = mpsc::channel::<()>();
        std::thread::spawn(move || {
            if done.recv_timeout(time_limit) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("the agent {pid} hangs and is killed");
                let _ = kill(pid, Signal::SIGKILL);
            }
        });
        Self { _called_off: called_off }
    }
}

impl Running {
    /// Reads the log until an output contains `text`. Returns all output since the last call.
    pub fn wait_for_output(&mut self, text: &str) -> String {
        let mut all = String::new();
        let lines =
            self.lines.get_or_insert_with(|| BufReader::new(self.child.stdout.take().unwrap()));
        let mut line = String::new();
        while !all.contains(text) {
            line.clear();
            assert_ne!(
                lines.read_line(&mut line).unwrap(),
                0,
                "the log ended before {text:?}: {all}"
            );
            if let LogEvent::CmdOutput { output, .. } = LogEvent::decode(line.as_bytes()).unwrap() {
                all.push_str(&output);
            }
        }
        all
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }

    pub fn finish(mut self) -> Finished {
        let mut stdout = Vec::new();
        if let Some(mut lines) = self.lines.take() {
            std::io::Read::read_to_end(&mut lines, &mut stdout).unwrap();
        }
        let mut output = self.child.wait_with_output().unwrap();
        output.stdout.splice(0..0, stdout);
        Finished::of(&output)
    }
}

/// Makes the programs that tests start handle signals which this process was started to ignore (in the
/// background of a script, for example): an ignored signal stays ignored after exec, a handled one gets its
/// default action.
fn handle_ignored_signals() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
        let ignored = u64::from_str_radix(ignored.trim(), 16).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _within = runtime.enter();
        for kind in [SignalKind::interrupt(), SignalKind::quit(), SignalKind::hangup()] {
            if ignored >> (kind.as_raw_value() - 1) & 1 == 1 {
                // The handler outlives this value.
                let _handler = signal(kind).unwrap();
            }
        }
    });
}
