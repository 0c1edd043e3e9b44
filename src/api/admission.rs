//! Who may have a connection: so many in all, and so many an address. When there is no room, those go that do nothing,
//! the ones that have done so for longest first.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How often at most the agent's log says that it is full.
const TELL_AGAIN: Duration = Duration::from_mins(1);

/// Stands for the time since when a connection does nothing that does something.
const BUSY: u64 = u64::MAX;

/// Counts moments: no two are the same, however fast connections come.
#[derive(Default)]
struct Clock(AtomicU64);

impl Clock {
    fn next(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}

/// All connections of the server; shared by its threads.
pub(super) struct Admission {
    /// How many there may be.
    most: usize,
    /// How many one address may have.
    most_per_client: usize,
    clock: Arc<Clock>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    places: Vec<Arc<Place>>,
    told: Option<Instant>,
}

/// What a connection and who admits it know of each other.
pub(super) struct Place {
    client: Option<IpAddr>,
    /// Since when the connection is idle, or [`BUSY`].
    idle_since: AtomicU64,
    clock: Arc<Clock>,
    /// It has to go.
    evicted: CancellationToken,
}

/// A connection's place, until it is dropped.
pub(super) struct Admitted {
    admission: Arc<Admission>,
    place: Arc<Place>,
}

impl Place {
    /// It has a request, or an answer is on its way.
    pub(super) fn set_busy(&self) {
        self.idle_since.store(BUSY, Ordering::Relaxed);
    }

    /// It waits for a request.
    pub(super) fn set_idle(&self) {
        self.idle_since.store(self.clock.next(), Ordering::Relaxed);
    }

    /// Resolves when it has to go.
    pub(super) async fn evicted(&self) {
        self.evicted.cancelled().await;
    }

    /// The same as an owned value.
    pub(super) fn eviction(&self) -> CancellationToken {
        self.evicted.clone()
    }
}

impl Admitted {
    pub(super) fn place(&self) -> &Arc<Place> {
        &self.place
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.admission.state().places.retain(|place| !Arc::ptr_eq(place, &self.place));
    }
}

impl State {
    /// Says in the agent's log that it is full, but not again and again.
    fn tell(&mut self, what: &str) {
        let is_due = self.told.is_none_or(|told| told.elapsed() >= TELL_AGAIN);
        if is_due {
            self.told = Some(Instant::now());
            log::warn!("{what}");
        }
    }
}

impl Admission {
    /// At most `most` connections; one address at most `most_per_client` of them.
    pub(super) fn new(most: usize, most_per_client: usize) -> Arc<Self> {
        let (clock, state) = Default::default();
        Arc::new(Self { most, most_per_client, clock, state })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a connection of `client`, for which another one may have to go; `None` if all are busy, or if the
    /// client has as many as it may.
    pub(super) fn admit(self: &Arc<Self>, client: Option<IpAddr>) -> Option<Admitted> {
        let mut state = self.state();
        let of_client = state.places.iter().filter(|place| place.client == client).count();
        if of_client >= self.most_per_client {
            state.tell("one address has as many connections as it may; more are refused");
            return None;
        }
        if state.places.len() >= self.most {
            state.tell("there are as many connections as there may be; idle ones have to go");
            if !evict_idlest(&mut state.places) {
                return None;
            }
        }
        let place = Arc::new(Place {
            client,
            idle_since: AtomicU64::new(self.clock.next()),
            clock: Arc::clone(&self.clock),
            evicted: CancellationToken::new(),
        });
        state.places.push(Arc::clone(&place));
        drop(state);
        Some(Admitted { admission: Arc::clone(self), place })
    }
}

/// Has the one go that has done nothing for longest; whether there is one.
fn evict_idlest(places: &mut Vec<Arc<Place>>) -> bool {
    let since = |place: &Arc<Place>| place.idle_since.load(Ordering::Relaxed);
    let idle = places.iter().enumerate().map(|(index, place)| (since(place), index));
    match idle.filter(|(since, _)| *since != BUSY).min() {
        Some((_, index)) => {
            places.swap_remove(index).evicted.cancel();
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
    async fn the_idlest_goes_and_the_busy_stay() {
        let admission = Admission::new(3, 2);
        let mut places = Vec::new();
        for number in [1, 2, 1] {
            places.push(admission.admit(Some(client(number))).unwrap());
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        let evicted = |places: &[Admitted]| -> Vec<bool> {
            places.iter().map(|admitted| admitted.place.evicted.is_cancelled()).collect()
        };
        places[0].place.set_busy();
        // Full: the second one has been idle for longest.
        places.push(admission.admit(Some(client(3))).unwrap());
        assert_eq!(evicted(&places), [false, true, false, false]);
        // As many as one address may have.
        assert!(admission.admit(Some(client(1))).is_none());
        assert_eq!(evicted(&places), [false, true, false, false]);
        for admitted in &places {
            admitted.place.set_busy();
        }
        assert!(admission.admit(Some(client(4))).is_none());
        places.remove(3);
        assert!(admission.admit(Some(client(4))).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn those_that_come_in_the_same_moment_go_in_their_order() {
        let admission = Admission::new(3, 100);
        let places: Vec<_> = (0..20).map(|_| admission.admit(Some(client(1))).unwrap()).collect();
        let evicted = places.iter().filter(|admitted| admitted.place.evicted.is_cancelled());
        assert_eq!(evicted.count(), 17);
        assert!(places[..17].iter().all(|admitted| admitted.place.evicted.is_cancelled()));
    }
}
