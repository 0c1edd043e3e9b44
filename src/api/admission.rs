//! Limits the number of connections, in total and for each client address. When the total is reached, a new
//! connection evicts the one that has been idle for longest.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Minimum time between two warnings about a limit in the agent's log.
const WARNING_INTERVAL: Duration = Duration::from_mins(1);

/// The value of [`Slot::idle_since`] for a busy connection.
const BUSY: u64 = u64::MAX;

/// A logical clock. Its values are distinct, unlike times of connections that come in quick succession.
#[derive(Default)]
struct Clock(AtomicU64);

impl Clock {
    fn next(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}

/// The connections of the server and their limits; shared by its threads.
pub(super) struct Admission {
    /// Limit for all connections.
    most: usize,
    /// Limit for the connections of one address.
    most_per_client: usize,
    clock: Arc<Clock>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    slots: Vec<Arc<Slot>>,
    last_warning: Option<Instant>,
}

/// What a connection shares with [`Admission`].
pub(super) struct Slot {
    client: Option<IpAddr>,
    /// When the connection became idle, by the logical clock; [`BUSY`] while it is not.
    idle_since: AtomicU64,
    clock: Arc<Clock>,
    /// Cancelled when the connection must close to make room.
    evicted: CancellationToken,
}

/// Counts as one connection until it is dropped.
pub(super) struct Admitted {
    admission: Arc<Admission>,
    slot: Arc<Slot>,
}

impl Slot {
    /// Protects the connection from eviction, from a request until its response is sent.
    pub(super) fn set_busy(&self) {
        self.idle_since.store(BUSY, Ordering::Relaxed);
    }

    /// Makes the connection evictable, as it waits for a request.
    pub(super) fn set_idle(&self) {
        self.idle_since.store(self.clock.next(), Ordering::Relaxed);
    }

    /// Resolves when the connection must close.
    pub(super) async fn evicted(&self) {
        self.evicted.cancelled().await;
    }

    /// Returns the token behind [`Self::evicted`].
    pub(super) fn eviction(&self) -> CancellationToken {
        self.evicted.clone()
    }
}

impl Admitted {
    pub(super) fn slot(&self) -> &Arc<Slot> {
        &self.slot
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.admission.state().slots.retain(|slot| !Arc::ptr_eq(slot, &self.slot));
    }
}

impl State {
    /// Logs a warning about a limit, at most one per [`WARNING_INTERVAL`].
    fn warn(&mut self, what: &str) {
        let is_due = self.last_warning.is_none_or(|last| last.elapsed() >= WARNING_INTERVAL);
        if is_due {
            self.last_warning = Some(Instant::now());
            log::warn!("{what}");
        }
    }
}

impl Admission {
    /// Admits at most `most` connections, of which one address may have `most_per_client`.
    pub(super) fn new(most: usize, most_per_client: usize) -> Arc<Self> {
        let (clock, state) = Default::default();
        Arc::new(Self { most, most_per_client, clock, state })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Admits a connection of `client`, and evicts an idle one if necessary. Returns `None` if all are busy,
    /// or if the client has reached its limit.
    pub(super) fn admit(self: &Arc<Self>, client: Option<IpAddr>) -> Option<Admitted> {
        let mut state = self.state();
        let of_client = state.slots.iter().filter(|slot| slot.client == client).count();
        if of_client >= self.most_per_client {
            state.warn("one address has reached its limit of connections; refusing more");
            return None;
        }
        if state.slots.len() >= self.most {
            state.warn("the limit of connections is reached; closing idle ones");
            if !evict_idlest(&mut state.slots) {
                return None;
            }
        }
        let slot = Arc::new(Slot {
            client,
            idle_since: AtomicU64::new(self.clock.next()),
            clock: Arc::clone(&self.clock),
            evicted: CancellationToken::new(),
        });
        state.slots.push(Arc::clone(&slot));
        drop(state);
        Some(Admitted { admission: Arc::clone(self), slot })
    }
}

/// Evicts the connection that has been idle for longest. Returns `false` if all are busy.
fn evict_idlest(slots: &mut Vec<Arc<Slot>>) -> bool {
    let since = |slot: &Arc<Slot>| slot.idle_since.load(Ordering::Relaxed);
    let idle = slots.iter().enumerate().map(|(index, slot)| (since(slot), index));
    match idle.filter(|(since, _)| *since != BUSY).min() {
        Some((_, index)) => {
            slots.swap_remove(index).evicted.cancel();
            true
        }
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(number: u8) -> IpAddr {
        IpAddr::from([127, 0, 0, number])
    }

    #[tokio::test(start_paused = true)]
    async fn the_longest_idle_connection_is_evicted_and_busy_ones_stay() {
        let admission = Admission::new(3, 2);
        let mut slots = Vec::new();
        for number in [1, 2, 1] {
            slots.push(admission.admit(Some(client(number))).unwrap());
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        let evicted = |slots: &[Admitted]| -> Vec<bool> {
            slots.iter().map(|admitted| admitted.slot.evicted.is_cancelled()).collect()
        };
        slots[0].slot.set_busy();
        // The limit is reached, and the second connection has been idle for longest.
        slots.push(admission.admit(Some(client(3))).unwrap());
        assert_eq!(evicted(&slots), [false, true, false, false]);
        // The address has reached its limit: nothing is evicted.
        assert!(admission.admit(Some(client(1))).is_none());
        assert_eq!(evicted(&slots), [false, true, false, false]);
        for admitted in &slots {
            admitted.slot.set_busy();
        }
        assert!(admission.admit(Some(client(4))).is_none());
        slots.remove(3);
        assert!(admission.admit(Some(client(4))).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn connections_of_the_same_moment_are_evicted_in_their_order() {
        let admission = Admission::new(3, 100);
        let slots: Vec<_> = (0..20).map(|_| admission.admit(Some(client(1))).unwrap()).collect();
        let evicted = slots.iter().filter(|admitted| admitted.slot.evicted.is_cancelled());
        assert_eq!(evicted.count(), 17);
        assert!(slots[..17].iter().all(|admitted| admitted.slot.evicted.is_cancelled()));
    }
}
