//! The table: the immutable snapshot of a pool (ring and backends) that the data plane reads, and its atomic swap. Only
//! the control plane's publisher writes it.

use std::rc::Rc;
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;
use arc_swap::cache::Cache;
use tokio::sync::watch;

pub use self::members::Members;
use crate::address::Address;
use crate::backend::{Backend, State};
use crate::ring::Ring;

mod members;

/// A snapshot of one pool. Owner `i` of the ring is backend `i`.
#[derive(Debug)]
pub struct Table {
    generation: u64,
    ring: Arc<Ring>,
    backends: Members,
    /// All backends with an address are tried, even if their checks fail.
    takes_all: bool,
    is_panic: bool,
    panic_below: u8,
    /// At least one healthy backend takes all of its keys, and at least one starts slowly. A slow-starting backend then
    /// gets only the keys that its admission takes.
    spares_slow_ones: bool,
    shares_now: OnceLock<Vec<f64>>,
}

impl Table {
    /// Joins a ring with the backends that it was built from, in the same order. Starting and draining backends are not
    /// rated. If fewer than `panic_below` percent of the rated backends are healthy, the table is in panic mode and
    /// ignores the health checks; 0 turns panic mode off.
    pub fn new(generation: u64, ring: Arc<Ring>, backends: Members, panic_below: u8) -> Self {
        let healthy = backends.count(State::Healthy);
        let known = backends.len() - backends.count(State::Starting) - backends.count(State::Draining);
        let is_panic = healthy * 100 < usize::from(panic_below) * known;
        let takes_all = is_panic || (healthy == 0 && panic_below > 0);
        let spares_slow_ones = !takes_all && backends.some_start_slowly();
        let shares_now = OnceLock::new();
        Self { generation, ring, backends, takes_all, is_panic, panic_below, spares_slow_ones, shares_now }
    }

    /// The share of all keys that each backend gets now, in the order of the backends: those that get no connections have 0, and
    /// the others have their keys. Shares during a slow start are estimates. The first call computes and caches them.
    pub fn shares_now(&self) -> &[f64] {
        self.shares_now.get_or_init(|| {
            let may = if self.takes_all { &self.backends.reachable } else { &self.backends.healthy };
            if may.count() == self.backends.len() && !self.spares_slow_ones {
                return self.ring.shares().to_vec();
            }
            self.ring.shares_by(|owner| match (may.has(owner), self.spares_slow_ones) {
                (false, _) => 0.0,
                (true, false) => 1.0,
                (true, true) => self.backends[owner].admission.as_part(),
            })
        })
    }

    /// The share of all keys that a backend would get if it took its keys, and the others take theirs as now.
    pub fn share_if_it_took(&self, owner: usize) -> f64 {
        let may = if self.takes_all { &self.backends.reachable } else { &self.backends.healthy };
        self.ring.shares_by(|other| if other == owner || may.has(other) { 1.0 } else { 0.0 })[owner]
    }

    /// The table that the pool would have with this ring and these backends.
    #[must_use]
    pub fn what_if(&self, ring: Arc<Ring>, backends: Members) -> Self {
        Self::new(self.generation, ring, backends, self.panic_below)
    }

    /// The snapshot's number within its pool, from 0.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The snapshot's ring.
    pub fn ring(&self) -> &Arc<Ring> {
        &self.ring
    }

    /// All backends, in any state.
    pub fn backends(&self) -> &Members {
        &self.backends
    }

    /// Whether at least one backend is healthy.
    pub fn any_healthy(&self) -> bool {
        self.healthy() > 0
    }

    /// Number of healthy backends.
    pub fn healthy(&self) -> usize {
        self.backends.count(State::Healthy)
    }

    /// Whether the table is in panic mode: so few backends are healthy that all are tried.
    pub fn is_panic(&self) -> bool {
        self.is_panic
    }

    /// Whether the backend is still there, is still the same incarnation, and does not drain.
    pub fn still_takes(&self, id: &str, incarnation: u64) -> bool {
        self.backends
            .find(id)
            .is_some_and(|backend| backend.incarnation == incarnation && backend.state != State::Draining)
    }

    /// Whether the key stays away from the backend during its slow start, unless all others fail.
    pub fn is_spared(&self, backend: &Backend, key: &[u8]) -> bool {
        self.spares_slow_ones && !backend.admission.takes(key)
    }

    /// The backends that may get the connection of `key`, in the order to try them.
    ///
    /// Unhealthy backends are skipped. If too few backends are healthy, all backends with an address are tried, except
    /// draining ones. The checks may be wrong, and the few healthy backends might not bear the whole load. The connect
    /// then shows which backends work.
    pub fn candidates(&self, key: &[u8]) -> impl Iterator<Item = (&Backend, &Address)> {
        let may = if self.takes_all { &self.backends.reachable } else { &self.backends.healthy };
        // The walk reads one bit of each backend that it passes, and ends with the last one that may.
        let allowed = move || self.ring.walk(key).filter(|&owner| may.has(owner)).take(may.count());
        let is_spared = move |owner: &usize| self.is_spared(&self.backends[*owner], key);
        let first = allowed().filter(move |owner| !is_spared(owner));
        // A slow-starting backend is better than none, so these come last.
        let spared = self.spares_slow_ones.then(allowed).into_iter().flatten().filter(is_spared);
        first.chain(spared).filter_map(|owner| {
            let backend = &self.backends[owner];
            Some((backend, backend.address.as_ref()?))
        })
    }
}

/// The shared cell that holds a pool's current table. It can be swapped and watched, and is cheap to clone.
#[derive(Debug, Clone)]
pub struct TableCell {
    current: Arc<ArcSwap<Table>>,
    generation: watch::Sender<u64>,
}

impl TableCell {
    /// Creates a cell that holds `first` until the next [`TableCell::publish`].
    pub fn new(first: Table) -> Self {
        let generation = watch::Sender::new(first.generation);
        Self { current: Arc::new(ArcSwap::from_pointee(first)), generation }
    }

    /// Swaps the table. Readers keep the old table until they release it.
    pub fn publish(&self, table: Table) {
        let generation = table.generation;
        self.current.store(Arc::new(table));
        self.generation.send_replace(generation);
    }

    /// The current table.
    pub fn load(&self) -> Arc<Table> {
        self.current.load_full()
    }

    /// Notifies of each swap; the value is the generation.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// Creates a reader with its own `Arc`; a read costs one atomic load while the table is unchanged.
    pub fn reader(&self) -> TableReader {
        let mut cache = Cache::new(Arc::clone(&self.current));
        let local = LocalTable(Rc::new(Arc::clone(cache.load())));
        TableReader { cache, local }
    }
}

/// A worker's cached view of a [`TableCell`].
#[derive(Debug)]
pub struct TableReader {
    cache: Cache<Arc<ArcSwap<Table>>, Arc<Table>>,
    local: LocalTable,
}

/// A worker's handle on a table. A clone changes the worker's own reference count, not the count that all workers share.
#[derive(Debug, Clone)]
#[expect(clippy::redundant_allocation, reason = "a clone of the `Rc` does not touch the count in the `Arc`")]
pub struct LocalTable(Rc<Arc<Table>>);

impl AsRef<Table> for LocalTable {
    fn as_ref(&self) -> &Table {
        &self.0
    }
}

impl TableReader {
    /// The current table.
    pub fn load(&mut self) -> LocalTable {
        let current = self.cache.load();
        if !Arc::ptr_eq(current, &self.local.0) {
            self.local = LocalTable(Rc::new(Arc::clone(current)));
        }
        self.local.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::backend::{Admission, Health, Live};
    use crate::labels::Label as _;
    use crate::ring::{Member, Parameters};

    fn table(states: &[(State, bool)]) -> Table {
        floored(states, 50)
    }

    fn floored(states: &[(State, bool)], panic_below: u8) -> Table {
        let names: Vec<String> = (0..states.len()).map(|n| format!("b{n}")).collect();
        let members: Vec<_> = names.iter().map(|id| Member { id, weight: 1 }).collect();
        let ring = Ring::build(Parameters { virtual_nodes: 40, probes: 3, seed: 0 }, &members);
        let backends = std::iter::zip(&names, states).map(|(id, &(state, reachable))| Backend {
            id: id.as_str().into(),
            address: reachable.then(|| Address::Ip(([127, 0, 0, 1], 1).into())),
            weight: 1,
            state,
            replica: None,
            incarnation: 0,
            restarts: 0,
            last_exit: None,
            reported_bad: false,
            health: Health { last: None, verdict: None, since: Instant::now() },
            well: None,
            admission: Admission::ALL,
            drain: None,
            live: Arc::new(Live::default()),
        });
        Table::new(0, Arc::new(ring), Members::new(backends, 0), panic_below)
    }

    fn ids(table: &Table, key: &[u8]) -> Vec<String> {
        table.candidates(key).map(|(backend, _)| backend.id.to_string()).collect()
    }

    #[test]
    fn only_healthy_backends_are_candidates_and_they_keep_the_ring_order() {
        let all = table(&[(State::Healthy, true); 5]);
        let some = table(&[
            (State::Healthy, true),
            (State::Unhealthy, true),
            (State::Draining, true),
            (State::Healthy, true),
            (State::Starting, true),
        ]);
        for key in 0_u32..200 {
            let mut expected = ids(&all, &key.to_le_bytes());
            expected.retain(|id| id == "b0" || id == "b3");
            assert_eq!(ids(&some, &key.to_le_bytes()), expected);
        }
    }

    #[test]
    fn if_no_backend_is_healthy_all_with_an_address_are_tried_except_draining_ones() {
        let table = table(&[
            (State::Unhealthy, true),
            (State::Starting, false),
            (State::CrashLoop, true),
            (State::Draining, true),
        ]);
        let mut found = ids(&table, b"key");
        found.sort();
        assert_eq!(found, ["b0", "b2"]);
    }

    #[test]
    fn panic_mode_tries_all_backends_and_a_floor_of_zero_turns_it_off() {
        let states = |healthy: usize| -> Vec<_> {
            (0..10).map(|n| (if n < healthy { State::Healthy } else { State::Unhealthy }, true)).collect()
        };
        let tried = |healthy, floor| {
            let table = floored(&states(healthy), floor);
            (table.is_panic(), ids(&table, b"key").len())
        };
        assert_eq!(tried(5, 50), (false, 5));
        assert_eq!(tried(4, 50), (true, 10));
        assert_eq!(tried(0, 50), (true, 10));
        assert_eq!(tried(1, 10), (false, 1));
        assert_eq!(tried(1, 0), (false, 1));
        assert_eq!(tried(0, 0), (false, 0));
        assert_eq!(tried(10, 100), (false, 10));
        assert_eq!(tried(9, 100), (true, 10));
        // Starting backends are still unknown, and draining backends were taken out on purpose, so neither is rated.
        let others = [(State::Healthy, true), (State::Starting, true), (State::Draining, true)];
        let table = floored(&others, 100);
        assert_eq!((table.is_panic(), ids(&table, b"key").len()), (false, 1));
        let starting = floored(&[(State::Starting, true)], 50);
        assert_eq!((starting.is_panic(), ids(&starting, b"key").len()), (false, 1));
    }

    #[test]
    fn a_slow_starting_backend_gets_a_fraction_of_its_keys_and_other_keys_stay() {
        let all = table(&[(State::Healthy, true); 3]);
        let with = |table: &Table, admissions: &[(usize, f64)]| {
            let mut backends = table.backends.clone();
            for &(n, part) in admissions {
                backends.set(n, Backend { admission: Admission::part(part), ..backends[n].clone() });
            }
            Table::new(0, Arc::clone(table.ring()), backends, 50)
        };
        let slow = with(&all, &[(1, 0.25)]);
        let (mut own, mut kept) = (0, 0);
        for key in 0_u32..8000 {
            let (before, now) = (ids(&all, &key.to_le_bytes()), ids(&slow, &key.to_le_bytes()));
            assert_eq!(now.len(), 3, "the slow-starting backend stays the last resort");
            if before[0] == "b1" {
                own += 1;
                kept += u32::from(now[0] == "b1");
            } else {
                assert_eq!(before[0], now[0]);
            }
        }
        assert!((f64::from(kept) / f64::from(own) - 0.25).abs() < 0.05, "{kept} of {own}");
        // If all backends start slowly, no other backend can take their keys.
        let alone = with(&slow, &[(0, 0.0), (1, 0.0), (2, 0.0)]);
        assert_eq!(ids(&alone, b"key").len(), 3);
    }

    #[test]
    fn changed_members_equal_members_built_from_scratch() {
        let states = [State::Healthy, State::Unhealthy, State::Draining, State::Starting, State::Ejected];
        let all: Vec<_> = (0..200).map(|n| (states[n % 5], n % 3 > 0)).collect();
        let built = table(&all).backends;
        let mut changed = table(&[(State::Starting, false); 200]).backends;
        let first = changed.clone();
        for n in [7, 199, 0, 7] {
            changed.set(n, built[n].clone());
        }
        assert_eq!(first.count(State::Starting), 200, "a change reached a copy");
        for n in 0..200 {
            changed.set(n, built[n].clone());
        }
        for state in State::ALL {
            assert_eq!(changed.count(*state), built.count(*state));
        }
        assert_eq!(changed.taking(), built.taking());
        for n in 0..200 {
            assert_eq!(changed.healthy.has(n), built.healthy.has(n));
            assert_eq!(changed.reachable.has(n), built.reachable.has(n));
        }
        assert_eq!(
            (changed.healthy.count(), changed.reachable.count()),
            (built.healthy.count(), built.reachable.count())
        );
    }

    #[test]
    fn the_roster_changes_only_with_addresses_and_incarnations() {
        let mut members = table(&[(State::Healthy, true); 3]).backends;
        let roster = members.roster();
        members.set(1, Backend { state: State::Unhealthy, ..members[1].clone() });
        assert_eq!(members.roster(), roster);
        members.set(1, Backend { incarnation: 9, ..members[1].clone() });
        assert_ne!(members.roster(), roster);
        assert_eq!(members.find("b1").map(|backend| backend.incarnation), Some(9));
        assert!(members.find("b").is_none() && members.find("b3").is_none() && members.find("c").is_none());
    }

    #[test]
    fn readers_see_the_new_table_after_a_swap() {
        let cell = TableCell::new(table(&[]));
        let mut reader = cell.reader();
        assert_eq!(reader.load().as_ref().generation(), 0);
        let next = table(&[]);
        cell.publish(Table { generation: 7, ..next });
        assert_eq!((reader.load().as_ref().generation(), cell.load().generation(), *cell.watch().borrow()), (7, 7, 7));
    }
}
