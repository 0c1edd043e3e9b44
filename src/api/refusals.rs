//! Keeps refused requests from pushing everything else out of the agent's own log: of many, only the first have
//! a line each.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// In so much time...
const WINDOW: Duration = Duration::from_secs(10);
/// ...so many refusals have a line each.
const LISTED: u32 = 10;

/// How many there were of late.
#[derive(Default)]
pub(crate) struct Refusals(Mutex<Window>);

#[derive(Default)]
struct Window {
    begun: Option<Instant>,
    refused: u32,
}

impl Refusals {
    /// Notes one more; whether it is to have a line of its own. Of those that are not, somebody is to [tell](Self::tell)
    /// how many there were: whoever gets the second value, after that time.
    pub(super) fn note(&self) -> (bool, Option<Duration>) {
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = *window.begun.get_or_insert_with(Instant::now);
        if begun.elapsed() >= WINDOW && window.refused <= LISTED {
            *window = Window { begun: Some(Instant::now()), refused: 0 };
        }
        window.refused += 1;
        (window.refused <= LISTED, (window.refused == LISTED + 1).then_some(WINDOW))
    }

    /// Puts into the agent's log how many had no line, and begins anew.
    pub(super) fn tell(&self) {
        let window = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        let count = window.refused.saturating_sub(LISTED);
        if count > 0 {
            log::warn!(count; "more requests were refused, and are not listed");
        }
    }
}
