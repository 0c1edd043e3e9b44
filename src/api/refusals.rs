//! Limits the log lines of refused requests, which could push everything else out of the agent's own log.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// The time for which refusals are counted together.
const WINDOW: Duration = Duration::from_secs(10);

/// How many refusals in one [`WINDOW`] get a log line each.
const LISTED: u32 = 10;

/// Counts the refused requests of the current [`WINDOW`].
#[derive(Default)]
pub(crate) struct Refusals(Mutex<Window>);

#[derive(Default)]
struct Window {
    begun: Option<Instant>,
    refused: u32,
}

impl Refusals {
    /// Counts one refusal, and returns whether it gets a log line of its own. If the second value is a time,
    /// the caller must call [`Self::log_unlisted`] after it.
    pub(super) fn count(&self) -> (bool, Option<Duration>) {
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = *window.begun.get_or_insert_with(Instant::now);
        if begun.elapsed() >= WINDOW && window.refused <= LISTED {
            *window = Window { begun: Some(Instant::now()), refused: 0 };
        }
        window.refused += 1;
        (window.refused <= LISTED, (window.refused == LISTED + 1).then_some(WINDOW))
    }

    /// Logs the number of refusals without a line of their own, and begins a new window.
    pub(super) fn log_unlisted(&self) {
        let window = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        let count = window.refused.saturating_sub(LISTED);
        if count > 0 {
            log::warn!(count; "more requests were refused without a log line each");
        }
    }
}
