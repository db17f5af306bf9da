//! The table: the immutable snapshot of a pool (ring and backends) that the data plane reads, and its atomic swap. Only
//! the control plane's publisher writes it.

use std::rc::Rc;
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;
use arc_swap::cache::Cache;
use tokio::sync::watch;

pub use self::members::Members;
pub use self::owners::Owners;
use crate::address::Address;
use crate::backend::{Admission, Backend, State};
use crate::ring::Ring;

mod members;
mod owners;

#[cfg(test)]
mod tests;

/// A snapshot of one pool. Owner `i` of the ring is backend `i`.
#[derive(Debug)]
pub struct Table {
    generation: u64,
    ring: Arc<Ring>,
    backends: Members,
    is_panic: bool,
    thresholds: Thresholds,
    /// The tiers that have candidates, lowest first.
    tiers: Vec<Candidates>,
    /// How many of them, from the lowest one, have joined: their backends get keys.
    joined: usize,
    shares_now: OnceLock<Vec<f64>>,
}

/// The percentages that decide which backends get connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Thresholds {
    /// If a smaller percentage of the backends is healthy in every tier, all are tried, whatever their checks say. 0: never.
    pub panic_below: u8,
    /// If a smaller percentage of a tier's weight is healthy, the next tier joins. 0: if no backend of the tier is healthy.
    pub spill_below: u8,
}

/// The backends of one tier that may get connections.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Candidates {
    tier: u16,
    /// All backends with an address are tried, even if their checks fail.
    takes_all: bool,
    /// Some backends start slowly, and others can take their keys meanwhile. A slow-starting backend then gets only the keys that
    /// its admission takes.
    spares_slow_ones: bool,
    count: usize,
}

impl Table {
    /// Joins a ring with the backends that it was built from, in the same order. Starting and draining backends are not
    /// rated. If the rated backends of every tier are too few, the table is in panic mode and ignores the health checks.
    pub fn new(generation: u64, ring: Arc<Ring>, backends: Members, thresholds: Thresholds) -> Self {
        let Thresholds { panic_below, spill_below } = thresholds;
        let mut rated = backends.tiers().iter().filter(|tier| tier.rated > 0).peekable();
        let is_panic =
            rated.peek().is_some() && rated.all(|tier| tier.healthy * 100 < usize::from(panic_below) * tier.rated);
        let any_healthy = backends.tiers().iter().any(|tier| tier.healthy > 0);
        let mut tiers = Vec::new();
        let (mut joined, mut has_spilled) = (0, true);
        for tier in backends.tiers() {
            // Backends that have not been judged yet are tried before a higher tier.
            let is_hopeful = tier.healthy == 0 && (tier.unknown > 0 || !any_healthy);
            let takes_all = is_panic || (is_hopeful && panic_below > 0);
            let count = if takes_all { tier.reachable } else { tier.healthy };
            if count > 0 {
                joined += usize::from(has_spilled);
                has_spilled &= tier.is_below(spill_below);
                let spares_slow_ones = !takes_all && tier.slow > 0 && (tier.slow < tier.healthy || has_spilled);
                tiers.push(Candidates { tier: tier.number, takes_all, spares_slow_ones, count });
            }
        }
        Self { generation, ring, backends, is_panic, thresholds, tiers, joined, shares_now: OnceLock::new() }
    }

    /// The share of all keys that each backend gets now, in the order of the backends: those that get no connections have 0, and
    /// the others have their keys. Shares during a slow start are estimates. The first call computes and caches them.
    pub fn shares_now(&self) -> &[f64] {
        self.shares_now.get_or_init(|| {
            if let [one] = &self.tiers[..]
                && one.count == self.backends.len()
                && !one.spares_slow_ones
            {
                return self.ring.shares().to_vec();
            }
            let joined = &self.tiers[..self.joined];
            let tier = |owner: usize| joined.iter().position(|tier| tier.tier == self.backends[owner].membership.tier);
            self.ring.shares_by_tier(joined.len(), tier, |owner| {
                let tier = tier(owner).map(|tier| &joined[tier]).filter(|tier| self.may(tier, owner));
                tier.map_or(
                    0.0,
                    |tier| {
                        if tier.spares_slow_ones { self.backends[owner].admission.as_part() } else { 1.0 }
                    },
                )
            })
        })
    }

    /// The share of all keys that a backend would get if it were healthy, and the others take theirs as now.
    pub fn share_if_it_took(&self, owner: usize) -> f64 {
        let mut backends = self.backends.clone();
        let (state, admission, drain) = (State::Healthy, Admission::ALL, None);
        backends.set(owner, Backend { state, admission, drain, ..backends[owner].clone() });
        self.what_if(Arc::clone(&self.ring), backends).shares_now()[owner]
    }

    /// The table that the pool would have with this ring and these backends.
    #[must_use]
    pub fn what_if(&self, ring: Arc<Ring>, backends: Members) -> Self {
        Self::new(self.generation, ring, backends, self.thresholds)
    }

    /// Who gets which key if every backend is healthy.
    pub fn owners(&self) -> Owners<'_> {
        Owners::new(&self.ring, self.backends.iter().map(|backend| backend.membership))
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

    /// Whether at least one backend is healthy and on the ring.
    pub fn any_healthy(&self) -> bool {
        self.backends.tiers().iter().any(|tier| tier.healthy > 0)
    }

    /// The tiers that get keys now, lowest first; empty if no backend does.
    pub fn joined_tiers(&self) -> impl Iterator<Item = u16> {
        self.tiers[..self.joined].iter().map(|tier| tier.tier)
    }

    /// Whether backends beyond the lowest tier get keys.
    pub fn has_spilled(&self) -> bool {
        let lowest = self.backends.tiers().first().map(|tier| tier.number);
        self.joined_tiers().last() > lowest
    }

    /// Number of healthy backends.
    pub fn healthy(&self) -> usize {
        self.backends.count(State::Healthy)
    }

    /// Whether the table is in panic mode: so few backends are healthy that all are tried.
    pub fn is_panic(&self) -> bool {
        self.is_panic
    }

    /// Whether the backend is still there, is still the same incarnation, and neither drains nor stands by.
    pub fn still_takes(&self, id: &str, incarnation: u64) -> bool {
        self.backends.find(id).is_some_and(|backend| {
            backend.incarnation == incarnation && !matches!(backend.state, State::Draining | State::Standby)
        })
    }

    /// Whether the key stays away from the backend during its slow start, unless all others of its tier fail.
    pub fn is_spared(&self, backend: &Backend, key: &[u8]) -> bool {
        let tier = self.tiers.iter().find(|tier| tier.tier == backend.membership.tier);
        tier.is_some_and(|tier| tier.spares(backend, key))
    }

    /// The backends that may get the connection of `key`, in the order to try them.
    ///
    /// Unhealthy backends are skipped. If too few backends are healthy, all backends with an address are tried, except
    /// draining ones. The checks may be wrong, and the few healthy backends might not bear the whole load. The connect
    /// then shows which backends work.
    ///
    /// The backends of one tier come after those of another. A key whose backend in tier 0 is healthy begins there, also while tier 1
    /// has joined. The other keys begin in tier 1.
    pub fn candidates(&self, key: &[u8]) -> impl Iterator<Item = (&Backend, &Address)> {
        let first = self.first_tier(key);
        let others = self.tiers.iter().enumerate().filter(move |(n, _)| *n != first).map(|(_, tier)| tier);
        self.tiers.get(first).into_iter().chain(others).flat_map(move |tier| self.in_tier(tier, key))
    }

    /// Where the candidates of a key begin: in the first joined tier that has a healthy backend for it, or else in the last one.
    fn first_tier(&self, key: &[u8]) -> usize {
        let last = self.joined.saturating_sub(1);
        let takes = |tier: &Candidates| {
            let owner = self.ring.walk(key).find(|&owner| self.is_in(tier, owner));
            owner.is_some_and(|owner| self.may(tier, owner) && !tier.spares(&self.backends[owner], key))
        };
        self.tiers[..last].iter().position(takes).unwrap_or(last)
    }

    /// The backends of a tier that may get the connection of `key`, in the order of the ring.
    fn in_tier(&self, tier: &Candidates, key: &[u8]) -> impl Iterator<Item = (&Backend, &Address)> {
        // The walk reads one bit of each backend that it passes, and ends with the last one that may.
        let allowed = move || {
            let walk = self.ring.walk(key).filter(|&owner| self.may(tier, owner) && self.is_in(tier, owner));
            walk.take(tier.count)
        };
        let is_spared = move |owner: &usize| tier.spares(&self.backends[*owner], key);
        let first = allowed().filter(move |owner| !is_spared(owner));
        // A slow-starting backend is better than none, so these come last.
        let spared = tier.spares_slow_ones.then(allowed).into_iter().flatten().filter(is_spared);
        first.chain(spared).filter_map(|owner| {
            let backend = &self.backends[owner];
            Some((backend, backend.address.as_ref()?))
        })
    }

    /// Whether the backend is in the tier. Most pools have one tier.
    fn is_in(&self, tier: &Candidates, owner: usize) -> bool {
        self.backends.tiers().len() == 1 || self.backends[owner].membership.tier == tier.tier
    }

    /// Whether a backend of the tier may get connections.
    fn may(&self, tier: &Candidates, owner: usize) -> bool {
        let may = if tier.takes_all { &self.backends.reachable } else { &self.backends.healthy };
        may.has(owner)
    }
}

impl Candidates {
    fn spares(&self, backend: &Backend, key: &[u8]) -> bool {
        self.spares_slow_ones && !backend.admission.takes(key)
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
