//! What tests, benches and the example control plane share: agents in a world of their own, and the real or
//! scripted things around them.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::missing_panics_doc,
    reason = "a failed test is a panic"
)]
#![expect(
    missing_docs,
    reason = "only for this repository, and many names say all there is to say"
)]

pub mod changed_shell;
pub mod control_plane;
pub mod daemon;
pub mod docker;
pub mod hosted;
pub mod http;
pub mod registry;
pub mod self_hosted;
pub mod ssh;
pub mod start_agent;
pub mod surroundings;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Once, OnceLock, mpsc};
use std::time::Duration;

use actors::log::event::LogEvent;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;
use tokio::signal::unix::{SignalKind, signal};

/// Has what tests start heed the signals that this process was started to ignore, as in the background of a script:
/// handlers are not passed on, but ignoring is.
fn heed_signals() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
        let ignored = u64::from_str_radix(ignored.trim(), 16).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _within = runtime.enter();
        for kind in [SignalKind::interrupt(), SignalKind::quit(), SignalKind::hangup()] {
            if ignored >> (kind.as_raw_value() - 1) & 1 == 1 {
                // The handler stays when this value goes.
                let _stays = signal(kind).unwrap();
            }
        }
    });
}

/// A short wait between two looks at something that takes its time.
pub fn pause() {
    std::thread::park_timeout(Duration::from_millis(5));
}

/// The agent's program. Cargo builds it for tests and benches of its package, and puts it into the directory
/// above theirs: `target/debug/agent` for `target/debug/deps/it-0123`.
pub fn agent_program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let own = std::env::current_exe().unwrap();
        let program = own.ancestors().nth(2).unwrap().join("agent");
        assert!(program.is_file(), "{} is missing: `cargo build` makes it", program.display());
        program
    })
}

/// A machine's user who runs jobs.
pub struct World {
    directory: Arc<TempDir>,
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    pub fn new() -> Self {
        heed_signals();
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("home")).unwrap();
        Self { directory: Arc::new(directory) }
    }

    pub fn home(&self) -> PathBuf {
        self.directory.path().join("home")
    }

    pub fn state(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    /// A file beside the home directory.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.directory.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// The agent with nothing of the outer environment but PATH.
    pub fn agent(&self) -> Command {
        let mut command = Command::new(agent_program());
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap());
        command.env("HOME", self.home()).env("SEMAPHORE_AGENT_STATE_DIR", self.state());
        command.stdin(Stdio::null());
        command
    }

    /// Runs a job to its end.
    pub fn run(&self, job: &str) -> Finished {
        self.start(job).finish()
    }

    /// Starts a job; its log comes as event lines.
    pub fn start(&self, job: &str) -> Running {
        let path = self.file("job.yaml", job);
        self.start_file(&path)
    }

    pub fn start_file(&self, path: &Path) -> Running {
        self.start_file_with(path, |_| {})
    }

    /// `adapt` adds variables.
    pub fn start_file_with(&self, path: &Path, adapt: impl FnOnce(&mut Command)) -> Running {
        let mut command = self.agent();
        command.args(["run", "--output", "json"]).arg(path);
        adapt(&mut command);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let watchdog = Watchdog::over(&child);
        Running { child, lines: None, _watchdog: watchdog, _world: Arc::clone(&self.directory) }
    }

    /// Runs commands as a job without anything else.
    pub fn run_commands(&self, commands: &[&str]) -> Finished {
        self.run(&job_of(commands))
    }
}

/// A job of these commands, as JSON, so that nothing in them needs care.
pub fn job_of(commands: &[&str]) -> String {
    let commands: Vec<_> =
        commands.iter().map(|text| serde_json::json!({ "directive": text })).collect();
    serde_json::json!({ "job_id": "test", "commands": commands }).to_string()
}

/// A job that runs.
pub struct Running {
    pub child: Child,
    lines: Option<BufReader<ChildStdout>>,
    _watchdog: Watchdog,
    _world: Arc<TempDir>,
}

/// Kills an agent that takes far too long, so that a hang is a failed test.
struct Watchdog {
    _called_off: mpsc::Sender<()>,
}

impl Watchdog {
    fn over(child: &Child) -> Self {
        let pid = Pid::from_raw(child.id().try_into().unwrap());
        let (called_off, done) = mpsc::channel::<()>();
        std::thread::spawn(move || {
            if done.recv_timeout(Duration::from_mins(2)) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("the agent {pid} hangs and is killed");
                let _ = kill(pid, Signal::SIGKILL);
            }
        });
        Self { _called_off: called_off }
    }
}

impl Running {
    /// Reads on until an output holds `text`; answers all output since the last call.
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

/// What a job left behind.
#[derive(Debug)]
pub struct Finished {
    pub exit_code: Option<i32>,
    pub events: Vec<LogEvent>,
    pub stderr: String,
}

/// One step of a log: title, output, exit code.
pub type Step = (String, String, i32);

impl Finished {
    pub fn of(output: &Output) -> Self {
        let lines = output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        Self {
            exit_code: output.status.code(),
            events: lines.map(|line| LogEvent::decode(line).unwrap()).collect(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    pub fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        let mut printed = String::new();
        for event in &self.events {
            match event {
                LogEvent::CmdOutput { output, .. } => printed.push_str(output),
                LogEvent::CmdFinished { directive, exit_code, .. } => {
                    steps.push((directive.clone(), std::mem::take(&mut printed), *exit_code));
                }
                _ => {}
            }
        }
        steps
    }

    /// Output and exit code of each main command.
    pub fn commands(&self) -> Vec<(String, i32)> {
        let own = [
            "Setting up image pull credentials",
            "Pulling docker images...",
            "Starting the docker image...",
            "Exporting environment variables",
            "Injecting Files",
        ];
        let steps = self.steps().into_iter().filter(|(title, ..)| !own.contains(&title.as_str()));
        steps.map(|(_, output, exit_code)| (output, exit_code)).collect()
    }

    /// Everything that commands printed.
    pub fn output(&self) -> String {
        self.commands().into_iter().map(|(output, _)| output).collect()
    }

    pub fn result(&self) -> &str {
        match self.events.last() {
            Some(LogEvent::JobFinished { result, .. }) => result,
            other => panic!("the log ends with {other:?}; {}", self.stderr),
        }
    }
}

/// Writes all of `bytes` to a child's standard input and closes it.
pub fn feed(child: &mut Child, bytes: &[u8]) {
    child.stdin.take().unwrap().write_all(bytes).unwrap();
}

/// A name that nothing else on this machine has, and that no other such name begins with.
pub fn unique() -> String {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    format!("test-{}-{:04}", std::process::id(), COUNT.fetch_add(1, Ordering::SeqCst))
}

/// A job all of whose processes have a marker.
pub fn marked(mut job: Value) -> (Value, String) {
    let marker = unique();
    let variable = serde_json::json!({ "name": "TEST_MARKER", "value": base64(marker.as_bytes()) });
    match job["env_vars"].as_array_mut() {
        Some(variables) => variables.push(variable),
        None => job["env_vars"] = Value::Array(vec![variable]),
    }
    (job, format!("TEST_MARKER={marker}"))
}

/// Whether a process has this marker in its environment.
pub fn lives_with(marker: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap() {
        let path = entry.unwrap().path();
        let Ok(environment) = fs::read(path.join("environ")) else {
            continue;
        };
        if environment.windows(marker.len()).any(|part| part == marker.as_bytes()) {
            let name = fs::read_to_string(path.join("cmdline")).unwrap_or_default();
            found.push(format!("{} {}", path.display(), name.replace('\0', " ")));
        }
    }
    found
}

/// If a test fails, all that has this marker in its environment is killed.
pub struct KilledOnFailure(pub String);

impl Drop for KilledOnFailure {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for found in lives_with(&self.0) {
            let pid = found.split(' ').next().and_then(|path| path.strip_prefix("/proc/"));
            let pid = pid.and_then(|pid| pid.parse().ok()).map(Pid::from_raw);
            // Some end by themselves meanwhile.
            let _ = pid.map(|pid| kill(pid, Signal::SIGKILL));
        }
    }
}

/// The keys of a configuration file, those that are commented out included.
pub fn config_keys(text: &str) -> BTreeSet<String> {
    let lines = text.lines().map(|line| line.strip_prefix("# ").unwrap_or(line));
    let keys = lines.filter_map(|line| line.split_once(": ").map(|(key, _)| key));
    let is_key = |key: &&str| key.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
    keys.filter(is_key).map(str::to_owned).collect()
}

/// As values and contents are written in job files.
pub fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut encoded = String::new();
    for group in bytes.chunks(3) {
        let bits = [0, 1, 2].map(|i| u32::from(group.get(i).copied().unwrap_or(0)));
        let bits = bits[0] << 16 | bits[1] << 8 | bits[2];
        for i in 0..=group.len() {
            encoded.push(char::from(DIGITS[(bits >> (18 - 6 * i) & 63) as usize]));
        }
    }
    encoded
}

/// Waits for a child's end; one that does not come fails the test, and leaves nothing running.
pub fn wait_for_end(child: Child) -> Output {
    let pid = Pid::from_raw(child.id().try_into().unwrap());
    let (sender, ended) = std::sync::mpsc::channel();
    let waiter = std::thread::spawn(move || sender.send(child.wait_with_output().unwrap()));
    let Ok(output) = ended.recv_timeout(PATIENCE) else {
        kill(pid, Signal::SIGKILL).unwrap();
        waiter.join().unwrap().unwrap();
        panic!("process {pid} did not end within {PATIENCE:?}");
    };
    output
}

/// Waits for a file that a job makes.
pub fn wait_for_file(path: &Path) {
    let deadline = std::time::SystemTime::now() + PATIENCE;
    while !path.exists() {
        assert!(std::time::SystemTime::now() < deadline, "{} does not appear", path.display());
        pause();
    }
}

/// How long a test waits for what must happen: long, for busy machines, but not for ever.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(30);
