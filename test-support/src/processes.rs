//! Processes of a test and of its jobs.

use std::fs;
use std::io::Write as _;
use std::process::Child;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Writes all of `bytes` to a child's standard input and closes it.
pub fn feed(child: &mut Child, bytes: &[u8]) {
    child.stdin.take().unwrap().write_all(bytes).unwrap();
}

/// Returns the processes that have this marker in their environment: their `/proc` directory and command
/// line.
pub fn processes_with(marker: &str) -> Vec<String> {
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

/// If the test fails, kills on drop all processes that have this marker in their environment.
pub struct KilledOnFailure(pub String);

impl Drop for KilledOnFailure {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for found in processes_with(&self.0) {
            let pid = found.split(' ').next().and_then(|path| path.strip_prefix("/proc/"));
            let pid = pid.and_then(|pid| pid.parse().ok()).map(Pid::from_raw);
            // Fails if the process has ended meanwhile.
            let _ = pid.map(|pid| kill(pid, Signal::SIGKILL));
        }
    }
}
