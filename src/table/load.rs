//! How many connections the backends of a table have, in proportion to their weights: the bound of a bounded load, and the backend
//! with the smallest load.
//!
//! The bound is that of Mirrokni, Thorup and Zadimoghaddam, "Consistent Hashing with Bounded Loads", 2016
//! (<https://arxiv.org/abs/1608.01350>), with weights.

use std::cmp::Ordering as Order;
use std::iter;
use std::sync::atomic::{AtomicI64, Ordering};

use super::{Candidates, Table, Which};
use crate::address::Address;
use crate::backend::{Admission, Backend};

/// Most backends of a pool for which [`Table::least_loaded`] looks at all of them.
pub const EXACT: usize = 64;

/// Most backends of a pool for which each pick under a bound adds up all connections. Beyond it, the average pick looks at four
/// backends.
const SUMMED: usize = 15;

/// No sum was made yet.
const NONE: i64 = i64::MIN;

/// The bound of a pool: how many times its fair share of the connections a backend may have.
#[derive(Debug)]
#[repr(align(128))]
pub struct Bound {
    percent: u16,
    picks: AtomicI64,
    /// The open connections at the last sum, without the picks until then.
    base: AtomicI64,
}

/// What the limits of all backends follow from at one moment.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    percent: u16,
    /// Open connections of the backends that get keys now, and those that come.
    connections: u64,
    /// The sum of their weights, in parts of an [`Admission`].
    weight: u64,
}

impl Bound {
    /// A bound in percent of the fair share, from 101.
    pub fn new(percent: u16) -> Self {
        Self { percent, picks: AtomicI64::new(0), base: AtomicI64::new(NONE) }
    }

    /// The bound in percent of the fair share.
    pub fn percent(&self) -> u16 {
        self.percent
    }

    /// The load with one more connection, for a pick.
    ///
    /// It is exact in pools of up to 15 backends. In a larger pool, not every pick adds up the connections of all backends. In between,
    /// each pick counts as one more connection, and connections that end still count. While as many end as begin, there is about one of
    /// those for every four backends, so a limit is too high by one connection at most.
    #[expect(clippy::cast_sign_loss, reason = "at least 1")]
    pub fn at_pick(&self, table: &Table) -> Load {
        if table.backends.len() <= SUMMED {
            return self.now(table, 1);
        }
        let (pick, interval) =
            (self.picks.fetch_add(1, Ordering::Relaxed), table.backends.len().cast_signed() as i64 / 4);
        // Before the first sum there is no base.
        if pick % interval == 0 || self.base.load(Ordering::Relaxed) == NONE {
            let sum = table.connections().cast_signed();
            // After the sum: other workers may have picked meanwhile, and their connections are in it.
            self.base.store(sum - self.picks.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        // The base may be that of a later pick.
        let connections = (self.base.load(Ordering::Relaxed) + pick + 1).max(1) as u64;
        Load { percent: self.percent, connections, weight: table.weight() }
    }

    /// The load with so many more connections.
    pub fn now(&self, table: &Table, more: u64) -> Load {
        Load { percent: self.percent, connections: table.connections() + more, weight: table.weight() }
    }
}

impl Table {
    /// The most connections that the backend may have under this load: the bound's percentage of its fair share, rounded up, and at
    /// least 1.
    pub fn limit(&self, backend: &Backend, load: Load) -> u64 {
        if load.weight == 0 {
            // Agents say that nobody should get connections.
            return u64::MAX;
        }
        let (parts, whole) = (u64::from(load.percent) * self.weight_of(backend), 100 * load.weight);
        let limit = match load.connections.checked_mul(parts) {
            Some(share) => share.div_ceil(whole),
            None => (u128::from(load.connections) * u128::from(parts)).div_ceil(whole.into()) as u64,
        };
        limit.max(1)
    }

    /// Whether the backend gets keys now, so that its connections count in the load.
    pub fn gets_keys(&self, owner: usize) -> bool {
        self.tiers[..self.joined].iter().any(|tier| self.is_in(tier, owner) && self.may(tier, owner))
    }

    /// The usable backend with the fewest connections for its weight, its address, and its number of connections.
    ///
    /// In a pool of up to [`EXACT`] backends, it is the best one, and one of equals by chance. In a larger pool, it is the better one of
    /// two. The chances are in proportion to the weights (Mitzenmacher, "The Power of Two Choices in
    /// Randomized Load Balancing", 2001, <https://doi.org/10.1109/71.963420>). Backends of tiers that get no keys come last.
    pub fn least_loaded(&self, is_usable: impl Fn(&Backend) -> bool) -> Option<(&Backend, &Address, u64)> {
        let active = |backend: &Backend| backend.live.active.load(Ordering::Relaxed);
        if self.backends.len() > EXACT {
            let draw = || {
                let key = fastrand::u64(..).to_le_bytes();
                let usable = self.candidates(&key).find(|(backend, _)| is_usable(backend));
                usable.map(|(backend, address)| (backend, address, active(backend)))
            };
            let (one, other) = (draw()?, draw()?);
            return Some(if self.compare((one.0, one.2), (other.0, other.2)).is_gt() { other } else { one });
        }
        self.levels_of_tiers().find_map(|tiers| {
            let is_taker = |&owner: &usize| tiers.iter().any(|tier| self.is_in(tier, owner) && self.may(tier, owner));
            let (mut best, mut equals) = (None, 0);
            for backend in (0..self.backends.len()).filter(is_taker).map(|owner| &self.backends[owner]) {
                let Some(address) = backend.address.as_ref().filter(|_| is_usable(backend)) else { continue };
                let (candidate, weight) = ((backend, address, active(backend)), self.weight_of(backend).max(1));
                let order =
                    best.map_or(Order::Less, |(best, _, active)| self.compare((backend, candidate.2), (best, active)));
                equals = match order {
                    Order::Less => weight,
                    Order::Equal => equals + weight,
                    Order::Greater => continue,
                };
                // The chance of the last one. Those of the others shrink with it.
                if fastrand::u64(..equals) < weight {
                    best = Some(candidate);
                }
            }
            best
        })
    }

    /// All backends that may get a connection, in the order of [`Table::least_loaded`].
    pub fn by_load(&self) -> Vec<&Backend> {
        let mut sorted = Vec::new();
        for tiers in self.levels_of_tiers() {
            let takers = self.takers(tiers).map(|owner| &self.backends[owner]);
            let mut takers: Vec<_> =
                takers.map(|backend| (backend, backend.live.active.load(Ordering::Relaxed))).collect();
            takers.sort_by(|one, other| self.compare(*one, *other));
            sorted.extend(takers.into_iter().map(|(backend, _)| backend));
        }
        sorted
    }

    /// Whether several backends have the smallest load.
    pub fn has_equals(&self) -> bool {
        let active = |backend: &Backend| backend.live.active.load(Ordering::Relaxed);
        match self.by_load()[..] {
            [first, second, ..] => self.compare((first, active(first)), (second, active(second))).is_eq(),
            _ => false,
        }
    }

    /// Compares how many connections two backends have for their weights. One without a weight comes last.
    fn compare(&self, one: (&Backend, u64), other: (&Backend, u64)) -> Order {
        let (this, that) = (self.weight_of(one.0), self.weight_of(other.0));
        let load = |active: u64, weight: u64| u128::from(active) * u128::from(weight);
        match (this, that) {
            (0, 0) => one.1.cmp(&other.1),
            (0, _) => Order::Greater,
            (_, 0) => Order::Less,
            _ => load(one.1, that).cmp(&load(other.1, this)),
        }
    }

    /// Whether the tier of the backend gets keys now.
    pub fn has_joined(&self, backend: &Backend) -> bool {
        !self.has_tiers() || self.tiers[..self.joined].iter().any(|tier| tier.tier == backend.membership.tier)
    }

    /// The weight of a candidate, in parts of an [`Admission`].
    fn weight_of(&self, backend: &Backend) -> u64 {
        self.candidates_of(backend).map_or(0, |tier| tier.weight_of(backend))
    }

    /// The tiers that get keys now, and then each of the others.
    fn levels_of_tiers(&self) -> impl Iterator<Item = &[Candidates]> {
        let (joined, others) = self.tiers.split_at(self.joined);
        iter::once(joined).chain(others.chunks(1))
    }

    /// Open connections of the backends that get keys now.
    fn connections(&self) -> u64 {
        let takers = self.takers(&self.tiers[..self.joined]);
        takers.map(|owner| self.backends[owner].live.active.load(Ordering::Relaxed)).sum()
    }

    /// The backends of these tiers that may get connections.
    fn takers<'a>(&'a self, tiers: &'a [Candidates]) -> impl Iterator<Item = usize> + 'a {
        tiers.iter().flat_map(|tier| self.backends_of(tier.which).iter().filter(|&owner| self.is_in(tier, owner)))
    }

    /// The sum of the weights of the backends that get keys now.
    fn weight(&self) -> u64 {
        self.tiers[..self.joined].iter().map(|tier| tier.weight).sum()
    }

    fn candidates_of(&self, backend: &Backend) -> Option<&Candidates> {
        self.tiers.iter().find(|tier| tier.tier == backend.membership.tier)
    }
}

impl Candidates {
    /// The weight of one of these backends, in parts of an [`Admission`].
    fn weight_of(&self, backend: &Backend) -> u64 {
        let admission = if self.which == Which::Healthy { backend.admission } else { Admission::ALL };
        u64::from(backend.membership.weight) * admission.raw()
    }
}
