//! Waits with a time limit.

use std::path::Path;
use std::process::{Child, Output};
use std::time::{Duration, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The pause between two checks of a condition.
pub fn pause() {
    std::thread::park_timeout(Duration::from_millis(5));
}

/// Waits until `done` returns `true`. Fails with the message `what` after a time limit.
pub fn wait_until(mut done: impl FnMut() -> bool, what: impl FnOnce() -> String) {
    let deadline = SystemTime::now() + PATIENCE;
    while !done() {
        assert!(SystemTime::now() <= deadline, "{}", what());
        pause();
    }
}

/// Waits for a child's end. After a time limit, kills the child and fails.
pub fn wait_for_end(child: Child) -> Output {
    let pid = Pid::from_raw(child.id().try_into().unwrap());
    let (sender, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait_with_output().unwrap()));
    let Ok(output) = ended.recv_timeout(PATIENCE) else {
        kill(pid, Signal::SIGKILL).unwrap();
        // The waiter is not waited for: processes that the child left behind may hold its output open.
        panic!("process {pid} did not end within {PATIENCE:?}");
    };
    output
}

/// Waits until a file exists.
pub fn wait_for_file(path: &Path) {
    let deadline = SystemTime::now() + PATIENCE;
    while !path.exists() {
        assert!(SystemTime::now() < deadline, "{} does not appear", path.display());
        pause();
    }
}

/// Time limit for an expected event; generous, because the machine may be busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
