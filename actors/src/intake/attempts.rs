//! How requests to the control plane are repeated (docs/protocol.md: "The self-hosted API").

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::errors::WithCauses;
use crate::ports::{HubApi, HubError};
use crate::retry::Retry;

/// Attempts to register.
const REGISTER: Retry = Retry::every(Duration::from_secs(1), 30);

/// Attempts to fetch a job.
pub(super) const FETCH: Retry = Retry::every(Duration::from_secs(3), 10);

/// Attempts to disconnect.
pub(super) const DISCONNECT: Retry = Retry::every(Duration::from_secs(1), 100);

/// How long the agent tries to register while its name is still taken, as after a crash.
const NAME_TAKEN: Duration = Duration::from_mins(20);

/// The longest pause between two attempts to register a name that is still taken; the first is that of [`REGISTER`], and
/// pauses double.
const LONGEST_NAME_PAUSE: Duration = Duration::from_secs(30);

/// The agent counts as deleted after this many 404s in a row, spread over at least
/// [`NOT_FOUND_FOR`].
const NOT_FOUND: u32 = 3;
/// The shortest time between the first and the last of [`NOT_FOUND`] 404s.
const NOT_FOUND_FOR: Duration = Duration::from_secs(5);

/// The 404s that reports have got in a row.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct NotFoundStreak {
    times: u32,
    since: Option<Instant>,
}

impl NotFoundStreak {
    /// Counts the error of a report. Returns whether the control plane has deleted the agent.
    pub(super) fn note(&mut self, error: &HubError) -> bool {
        if !matches!(error, HubError::NotFound(_)) {
            *self = Self::default();
            return false;
        }
        self.times += 1;
        let since = *self.since.get_or_insert_with(Instant::now);
        self.times >= NOT_FOUND && since.elapsed() >= NOT_FOUND_FOR
    }
}

/// The pause between two reports if the control plane does not set one, in milliseconds.
pub(super) const USUAL_PAUSE: std::ops::Range<u64> = 3000..6000;

/// The shortest pause that the control plane can set with `next_sync_after`, in milliseconds.
pub(super) const SHORTEST_PAUSE: u64 = 100;
/// The longest pause that the control plane can set with `next_sync_after`, in milliseconds.
pub(super) const LONGEST_PAUSE: u64 = 300_000;

/// The pause after a failed report, in milliseconds.
pub(super) const AFTER_FAILURE: std::ops::Range<u64> = 1000..3000;

/// Repeats a request. `what` names it in the agent's log.
pub(super) async fn retried<T>(
    retry: Retry,
    what: &str,
    ask: impl AsyncFnMut() -> Result<T, HubError>,
) -> Result<T, HubError> {
    let failed = |error: &HubError, tries| {
        log::warn!(what, error:% = WithCauses(error), tries; "the request failed; retrying");
    };
    retry.run(HubError::is_transient, ask, failed).await
}

/// Registers the agent. Waits up to [`NAME_TAKEN`] for a name that is still taken.
pub(super) async fn register(hub: &dyn HubApi) -> Result<(), HubError> {
    let (mut taken_since, mut pause) = (None::<Instant>, REGISTER.pause);
    loop {
        let once = async || match hub.register().await {
            // `Ok`, so that `retried` returns it: a taken name has its own, longer retry below.
            Err(error @ HubError::NameTaken(_)) => Ok(Err(error)),
            registered => registered.map(Ok),
        };
        let error = match retried(REGISTER, "registration", once).await? {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        if taken_since.get_or_insert_with(Instant::now).elapsed() >= NAME_TAKEN {
            return Err(error);
        }
        log::warn!(error:% = WithCauses(&error); "the agent's name is still taken, as after a crash; trying again");
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_NAME_PAUSE);
    }
}
