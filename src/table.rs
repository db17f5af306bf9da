//! The table: the immutable snapshot of a pool (ring and backends) that the data plane reads. [`cell`] swaps it. Only
//! the control plane's publisher writes it.

use std::sync::{Arc, OnceLock};

pub use self::cell::{LocalTable, TableCell, TableReader};
pub use self::load::{Bound, EXACT, Load};
pub use self::members::Members;
use self::members::{Bits, Tier};
pub use self::owners::Owners;
use crate::address::Address;
use crate::backend::{Backend, State};
use crate::ring::{Ring, Walk};

mod cell;
mod load;
mod members;
mod owners;
mod shares;

#[cfg(test)]
mod tests;

/// A snapshot of one pool. Owner `i` of the ring is backend `i`.
#[derive(Debug)]
pub struct Table {
    generation: u64,
    ring: Arc<Ring>,
    backends: Members,
    is_panic: bool,
    rules: Rules,
    /// The tiers that have candidates, lowest first.
    tiers: Vec<Candidates>,
    /// How many of them, from the lowest one, have joined: their backends get keys.
    joined: usize,
    shares_now: OnceLock<Vec<f64>>,
}

/// What decides which backends get connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// If a smaller percentage of the backends is healthy in every tier, all are tried, whatever their checks say. 0: never.
    pub panic_below: u8,
    /// If a smaller percentage of a tier's weight is healthy, the next tier joins. 0: if no backend of the tier is healthy.
    pub spill_below: u8,
    /// At most one backend is healthy; the others that work stand by.
    pub is_exclusive: bool,
}

/// The backends of one tier that may get connections.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Candidates {
    tier: u16,
    which: Which,
    /// Some backends take only a part of their keys, because they start slowly or their agents say so, and others can take the rest.
    spares_slow_ones: bool,
    count: usize,
    /// The sum of their weights, in parts of an [`Admission`](crate::backend::Admission).
    weight: u64,
}

/// The backends of a tier that may get connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    Healthy,
    /// Those that have not been judged yet.
    Unknown,
    /// All with an address, even if their checks fail.
    Reachable,
}

impl Table {
    /// Joins a ring with the backends that it was built from, in the same order. Starting and draining backends are not
    /// rated. If the rated backends of every tier are too few, the table is in panic mode and ignores the health checks.
    pub fn new(generation: u64, ring: Arc<Ring>, backends: Members, rules: Rules) -> Self {
        let Rules { panic_below, spill_below, .. } = rules;
        let is_rated = backends.tiers().iter().any(|tier| tier.rated > 0);
        let too_few = |tier: &Tier| match tier.rated {
            // Its backends may all be healthy.
            0 => tier.unknown == 0,
            rated => tier.healthy * 100 < usize::from(panic_below) * rated,
        };
        let is_panic = is_rated && backends.tiers().iter().all(too_few);
        let any_healthy = backends.tiers().iter().any(|tier| tier.healthy > 0);
        let mut tiers = Vec::new();
        let (mut joined, mut has_spilled) = (0, true);
        for tier in backends.tiers() {
            let (which, count, weight) = match tier.healthy {
                _ if is_panic => (Which::Reachable, tier.reachable, tier.reachable_weight),
                0 if panic_below > 0 && !any_healthy => (Which::Reachable, tier.reachable, tier.reachable_weight),
                // Backends that have not been judged yet are tried before a higher tier.
                0 if panic_below > 0 => (Which::Unknown, tier.unknown, tier.unknown_weight),
                healthy => (Which::Healthy, healthy, tier.healthy_weight),
            };
            if count > 0 {
                joined += usize::from(has_spilled);
                has_spilled &= tier.is_below(spill_below);
                let is_slow = which == Which::Healthy && tier.slow > 0;
                let spares_slow_ones = is_slow && (has_spilled || backends.admissions_differ(tier));
                tiers.push(Candidates { tier: tier.number, which, spares_slow_ones, count, weight });
            }
        }
        Self { generation, ring, backends, is_panic, rules, tiers, joined, shares_now: OnceLock::new() }
    }

    /// The table that the pool would have with this ring and these backends.
    #[must_use]
    pub fn what_if(&self, ring: Arc<Ring>, backends: Members) -> Self {
        Self::new(self.generation, ring, backends, self.rules)
    }

    /// Who gets which key if every backend is healthy.
    pub fn owners(&self) -> Owners<'_> {
        Owners::new(&self.ring, self.backends.iter().map(Backend::membership_on_ring))
    }

    /// Whether each key has the same candidates in the other table. During a slow start, they are taken to differ.
    pub fn places_like(&self, other: &Self) -> bool {
        if self.generation == other.generation {
            return true;
        }
        let is_steady = |table: &Self| table.tiers.iter().all(|tier| !tier.spares_slow_ones);
        let tiers = |table: &'_ Self| table.backends.iter().map(|backend| backend.membership.tier).collect::<Vec<_>>();
        Arc::ptr_eq(&self.ring, &other.ring)
            && (self.joined, &self.tiers) == (other.joined, &other.tiers)
            && self.backends.has_sets_of(&other.backends)
            && (is_steady(self) && is_steady(other))
            && (!self.has_tiers() || tiers(self) == tiers(other))
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
        self.healthy() > 0
    }

    /// The tiers that get keys now, lowest first; empty if no backend does.
    pub fn joined_tiers(&self) -> impl Iterator<Item = u16> {
        self.tiers[..self.joined].iter().map(|tier| tier.tier)
    }

    /// Whether a first backend may become healthy soon: none is, and none that can be reached has failed its checks. An exclusive pool
    /// waits for the one that claims it.
    pub fn awaits_first(&self) -> bool {
        let has_failed = |tier: &Tier| tier.reachable > tier.unknown + tier.healthy;
        !self.any_healthy() && (self.rules.is_exclusive || !self.backends.tiers().iter().any(has_failed))
    }

    /// Whether the backends on the ring have different tiers.
    pub fn has_tiers(&self) -> bool {
        self.backends.tiers().len() > 1
    }

    /// Whether backends beyond the lowest tier get keys.
    pub fn has_spilled(&self) -> bool {
        let lowest = self.backends.tiers().first().map(|tier| tier.number);
        self.joined_tiers().last() > lowest
    }

    /// Number of healthy backends on the ring.
    pub fn healthy(&self) -> usize {
        self.backends.tiers().iter().map(|tier| tier.healthy).sum()
    }

    /// Whether at most one backend may be healthy.
    pub fn is_exclusive(&self) -> bool {
        self.rules.is_exclusive
    }

    /// Number of backends that can take over from one that fails, with that one: those that get connections, or would if they were
    /// healthy. In an exclusive pool, only those whose checks pass can.
    pub fn taking(&self) -> usize {
        if self.rules.is_exclusive {
            self.backends.iter().filter(|backend| backend.claims()).count()
        } else {
            self.backends.taking()
        }
    }

    /// Whether the table is in panic mode: so few backends are healthy that all are tried.
    pub fn is_panic(&self) -> bool {
        self.is_panic
    }

    /// Whether the backend is still there, is still the same incarnation, and may have connections: it does not drain, and holds the
    /// pool if that is exclusive.
    pub fn still_takes(&self, id: &str, incarnation: u64) -> bool {
        self.backends.find(id).is_some_and(|backend| {
            backend.incarnation == incarnation
                && backend.state != State::Draining
                && (!self.rules.is_exclusive || backend.state == State::Healthy)
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
    /// The backends of one tier come after those of another. A key whose backend in tier 0 is healthy and takes it begins there, also
    /// while tier 1 has joined. The other keys begin in tier 1.
    pub fn candidates<'a, 'k>(&'a self, key: &'k [u8]) -> InOrder<'a, 'k> {
        let first = self.first_tier(key);
        InOrder { table: self, key, first, tiers: 0, walk: None }
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

    /// Whether the backend is in the tier. Most pools have one tier.
    fn is_in(&self, tier: &Candidates, owner: usize) -> bool {
        !self.has_tiers() || self.backends[owner].membership.tier == tier.tier
    }

    /// Whether a backend of the tier may get connections.
    fn may(&self, tier: &Candidates, owner: usize) -> bool {
        self.backends_of(tier.which).has(owner)
    }

    fn backends_of(&self, which: Which) -> &Bits {
        match which {
            Which::Healthy => &self.backends.healthy,
            Which::Unknown => &self.backends.unknown,
            Which::Reachable => &self.backends.reachable,
        }
    }
}

/// Iterates over the candidates of a key.
#[derive(Debug)]
pub struct InOrder<'a, 'k> {
    table: &'a Table,
    key: &'k [u8],
    /// The tier that comes first; the others follow, lowest first.
    first: usize,
    /// Tiers that have begun.
    tiers: usize,
    walk: Option<TierWalk<'a>>,
}

/// The walk past the candidates of one tier.
#[derive(Debug)]
struct TierWalk<'a> {
    tier: &'a Candidates,
    walk: Walk<'a>,
    /// Candidates that the walk has not passed yet. It ends with the last one.
    left: usize,
    /// A second walk returns the backends that the key spares: a slow-starting backend is better than none, so these come last.
    are_spared: bool,
}

impl<'a> Iterator for InOrder<'a, '_> {
    type Item = (&'a Backend, &'a Address);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(walk) = &mut self.walk {
                if let Some(owner) = walk.next(self.table, self.key) {
                    let backend = &self.table.backends[owner];
                    let Some(address) = backend.address.as_ref() else { continue };
                    return Some((backend, address));
                }
                if walk.tier.spares_slow_ones && !walk.are_spared {
                    *walk = TierWalk::new(self.table, walk.tier, self.key, true);
                    continue;
                }
            }
            let number = match self.tiers {
                0 => self.first,
                n if n <= self.first => n - 1,
                n => n,
            };
            let tier = self.table.tiers.get(number)?;
            self.tiers += 1;
            self.walk = Some(TierWalk::new(self.table, tier, self.key, false));
        }
    }
}

impl<'a> TierWalk<'a> {
    fn new(table: &'a Table, tier: &'a Candidates, key: &[u8], are_spared: bool) -> Self {
        Self { tier, walk: table.ring.walk(key), left: tier.count, are_spared }
    }

    /// The next backend. The walk reads one bit of each backend that it passes.
    fn next(&mut self, table: &Table, key: &[u8]) -> Option<usize> {
        while self.left > 0 {
            let owner = self.walk.next()?;
            if table.may(self.tier, owner) && table.is_in(self.tier, owner) {
                self.left -= 1;
                if self.tier.spares(&table.backends[owner], key) == self.are_spared {
                    return Some(owner);
                }
            }
        }
        None
    }
}

impl Candidates {
    fn spares(&self, backend: &Backend, key: &[u8]) -> bool {
        self.spares_slow_ones && !backend.admission.takes(key)
    }
}
