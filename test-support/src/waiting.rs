//! Waits, each with an end.

use std::path::Path;
use std::process::{Child, Output};
use std::time::{Duration, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A short wait between two looks at something that takes its time.
pub fn pause() {
    std::thread::park_timeout(Duration::from_millis(5));
}

/// Asks again and again, for a bounded time.
pub fn wait_until(mut done: impl FnMut() -> bool, what: impl FnOnce() -> String) {
    let deadline = SystemTime::now() + PATIENCE;
    while !done() {
        assert!(SystemTime::now() <= deadline, "{}", what());
        pause();
    }
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
    let deadline = SystemTime::now() + PATIENCE;
    while !path.exists() {
        assert!(SystemTime::now() < deadline, "{} does not appear", path.display());
        pause();
    }
}

/// How long a test waits for what must happen: long, for busy machines, but not for ever.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
