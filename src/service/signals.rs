//! Signal handling.

use std::io;
use std::task::Poll;

use nix::unistd::getpid;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::os::processes::ignores;
use crate::os::sys;

/// Ignores SIGXFSZ, so that a write beyond the file size limit fails instead of killing this process.
/// Programs that the agent starts get the default action.
pub fn survive_file_size_limits() -> io::Result<()> {
    sys::survive_file_size_limits()
}

/// A listener for some kinds of signals.
#[derive(Debug)]
pub struct Signals(Vec<Signal>);

impl Signals {
    /// Listens to `kinds`. Signals that were ignored at the start (by `nohup`, for example) stay ignored.
    pub fn unless_ignored(kinds: &[SignalKind]) -> io::Result<Self> {
        let mut listeners = Vec::new();
        for kind in kinds {
            if !ignores(getpid(), kind.as_raw_value())? {
                listeners.push(signal(*kind)?);
            }
        }
        Ok(Self(listeners))
    }

    /// Listens to one kind, even if it was ignored at the start.
    pub fn always(kind: SignalKind) -> io::Result<Self> {
        Ok(Self(vec![signal(kind)?]))
    }

    /// Waits for the next signal.
    pub async fn next(&mut self) {
        std::future::poll_fn(|cx| {
            let mut signals = self.0.iter_mut();
            let came = signals.any(|signal| signal.poll_recv(cx).is_ready());
            if came { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}
