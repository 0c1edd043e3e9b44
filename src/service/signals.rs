//! Signals that this process waits for.

use std::io;
use std::task::Poll;

use nix::unistd::getpid;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::os::processes::ignores;
use crate::os::sys;

/// Has a full file fail the write that it is full for, instead of ending this process. What it starts is ended by that
/// signal as ever.
pub fn survive_file_size_limits() -> io::Result<()> {
    sys::survive_file_size_limits()
}

/// Some kinds of signals.
#[derive(Debug)]
pub struct Signals(Vec<Signal>);

impl Signals {
    /// Listens to `kinds`. Signals that are ignored from the start, as under `nohup`, stay ignored.
    pub fn heeded(kinds: &[SignalKind]) -> io::Result<Self> {
        let mut heeded = Vec::new();
        for kind in kinds {
            if !ignores(getpid(), kind.as_raw_value())? {
                heeded.push(signal(*kind)?);
            }
        }
        Ok(Self(heeded))
    }

    /// Listens to one kind, even if it was ignored so far.
    pub fn always(kind: SignalKind) -> io::Result<Self> {
        Ok(Self(vec![signal(kind)?]))
    }

    /// Waits for the next one.
    pub async fn next(&mut self) {
        std::future::poll_fn(|cx| {
            let mut signals = self.0.iter_mut();
            let came = signals.any(|signal| signal.poll_recv(cx).is_ready());
            if came { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}
