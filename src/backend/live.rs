//! The counters of a backend that outlive table snapshots, its permits, and the requests to end its connections.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use super::{ConnectFailure, PortSearch};
use crate::label_enum;
use crate::labels::{Label as _, Tally};

/// The live state of a backend: of one incarnation of its slot, or of all that followed each other without a rollout.
#[derive(Debug, Default)]
pub struct Live {
    /// Connections to this backend that are open or connecting now; only [`BackendPermit`] changes it.
    pub active: AtomicU64,
    /// The search for source ports towards this backend.
    pub port_search: PortSearch,
    /// Consecutive failed connects, without local failures. A successful connect resets it.
    pub failed_in_a_row: AtomicU32,
    /// Requests to end the backend's connections.
    pub evictions: Evictions,
    /// Whether the replica was started from other settings than the current ones.
    pub outdated: AtomicBool,
    /// What is counted for the slot.
    pub counters: Arc<Counters>,
}

impl Live {
    /// The live state of another incarnation of the same slot, which continues its counters.
    #[must_use]
    pub fn of_same_slot(&self) -> Self {
        Self { counters: Arc::clone(&self.counters), ..Self::default() }
    }
}

/// What Ringway counts for a slot. All of its incarnations continue the same counters.
#[derive(Debug, Default)]
pub struct Counters {
    /// Lines of the replica's output that were not logged.
    pub output_lost: AtomicU64,
    /// Connections established so far.
    pub total: AtomicU64,
    /// Connect attempts so far.
    pub attempts: AtomicU64,
    /// Failed connects, by cause.
    pub failures: Tally<ConnectFailure>,
    /// Connections that went to another backend because this one, to which their keys lead, was at its bound.
    pub displaced: AtomicU64,
    /// How often the backend was ejected.
    pub ejections: AtomicU64,
    /// Connections that Ringway reset at the deadline of a drain.
    pub cut_by_drain: AtomicU64,
    /// Payload bytes moved from clients to the backend.
    pub from_client: Moved,
    /// Payload bytes moved from the backend to clients.
    pub to_client: Moved,
    /// Health checks passed so far.
    pub checks_passed: AtomicU64,
    /// Health checks failed so far.
    pub checks_failed: AtomicU64,
}

/// Bytes moved in one direction, by path.
#[derive(Debug, Default)]
pub struct Moved {
    /// Bytes copied through the worker's buffer.
    pub copied: AtomicU64,
    /// Bytes spliced through a pipe, within the kernel.
    pub spliced: AtomicU64,
}

impl Moved {
    /// Bytes of both paths together.
    pub fn total(&self) -> u64 {
        self.copied.load(Ordering::Relaxed) + self.spliced.load(Ordering::Relaxed)
    }
}

/// The data plane's report that connects to a backend keep failing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failing {
    /// The backend's id.
    pub backend: Arc<str>,
    /// The incarnation of the replica that could not be reached.
    pub incarnation: u64,
}

/// A connection's permit for a backend, held from before the connect until the connection ends.
#[derive(Debug)]
pub struct BackendPermit {
    live: Arc<Live>,
    era: u64,
}

impl BackendPermit {
    /// Takes a permit; `None` if the backend already has `most` connections. The limit is exact across all workers.
    pub fn take(live: &Arc<Live>, most: u64) -> Option<Self> {
        if most == u64::MAX {
            live.active.fetch_add(1, Ordering::Relaxed);
        } else {
            let more = |active| (active < most).then_some(active + 1);
            live.active.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        }
        Some(Self { live: Arc::clone(live), era: live.evictions.era() })
    }

    /// Takes a permit for a connection that an old process has made, whatever the limit is. All requests to end connections that this
    /// process has had so far mean it too.
    pub fn take_over(live: &Arc<Live>) -> Self {
        live.active.fetch_add(1, Ordering::Relaxed);
        Self { live: Arc::clone(live), era: Evictions::default().era() }
    }

    /// The backend's live counters.
    pub fn live(&self) -> &Live {
        &self.live
    }

    /// Why the connection must end, if that was requested after the permit was taken.
    pub fn eviction(&self) -> Option<Eviction> {
        self.live.evictions.since(self.era)
    }
}

impl Drop for BackendPermit {
    fn drop(&mut self) {
        self.live.active.fetch_sub(1, Ordering::Relaxed);
    }
}

label_enum! {
    /// Why a backend's connections are ended.
    pub enum Eviction {
        /// The backend's drain has reached its deadline.
        Drained => "drained",
        /// The backend is down, and its pool resets connections in that case.
        Down => "down",
    }
}

/// Requests to end all connections of a backend. The control plane writes them; the timeout task reads them.
#[derive(Debug, Default)]
pub struct Evictions(AtomicU64);

impl Evictions {
    /// Requests the end of all connections that the backend has now.
    pub fn request(&self, why: Eviction) {
        // The lowest byte holds the reason of the last request, and the upper bytes count the requests. Only one thread
        // writes.
        let number = self.0.load(Ordering::Relaxed) >> 8;
        self.0.store((number + 1) << 8 | why.index() as u64, Ordering::Relaxed);
    }

    /// Identifies the time since the last request; pass it to [`Evictions::since`].
    pub fn era(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// The reason of the last request after `era`; `None`: there was no request.
    pub fn since(&self, era: u64) -> Option<Eviction> {
        let now = self.0.load(Ordering::Relaxed);
        (now != era).then(|| Eviction::ALL[(now & 0xff) as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_never_exceeds_its_limit_and_dropped_permits_are_returned() {
        let live = Arc::new(Live::default());
        let permits: Vec<_> = (0..5).filter_map(|_| BackendPermit::take(&live, 3)).collect();
        assert_eq!((permits.len(), live.active.load(Ordering::Relaxed)), (3, 3));
        drop(permits);
        assert!(BackendPermit::take(&live, 1).is_some());
        assert_eq!(live.active.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn an_eviction_ends_a_connection_that_is_taken_over_later() {
        let live = Arc::new(Live::default());
        let permit = BackendPermit::take_over(&live);
        assert_eq!((permit.eviction(), live.active.load(Ordering::Relaxed)), (None, 1));
        live.evictions.request(Eviction::Down);
        assert_eq!(permit.eviction(), Some(Eviction::Down));
        assert_eq!(BackendPermit::take_over(&live).eviction(), Some(Eviction::Down));
        assert_eq!(BackendPermit::take(&live, 10).unwrap().eviction(), None);
    }

    #[test]
    fn an_eviction_ends_only_connections_made_before_it() {
        let evictions = Evictions::default();
        let era = evictions.era();
        assert_eq!(evictions.since(era), None);
        evictions.request(Eviction::Down);
        assert_eq!(evictions.since(era), Some(Eviction::Down));
        let later = evictions.era();
        assert_eq!(evictions.since(later), None);
        evictions.request(Eviction::Drained);
        assert_eq!((evictions.since(era), evictions.since(later)), (Some(Eviction::Drained), Some(Eviction::Drained)));
    }
}
