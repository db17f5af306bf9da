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
    /// Open connections of the backends that get keys now, and one more.
    connections: u64,
    /// The sum of their weights, in parts of an [`Admission`].
    weight: u64,
}

impl Bound {
    /// A bound in percent of the fair share, from 101.
    pub fn new(percent: u16) -> Self {
        Self { percent, picks: AtomicI64::new(0), base: AtomicI64::new(0) }
    }

    /// The bound in percent of the fair share.
    pub fn percent(&self) -> u16 {
        self.percent
    }

    /// The load with one more connection, for a pick.
    ///
    /// It is exact in pools of up to 15 backends. In a larger pool, not every pick adds up the connections of all backends. In between,
    /// each pick counts as one more connection, and connections that end still count. There is about one of those for every four
    /// backends, so the limit of a backend is hardly ever different from the exact one.
    #[expect(clippy::cast_sign_loss, reason = "at least 1")]
    pub fn at_pick(&self, table: &Table) -> Load {
        if table.backends.len() <= SUMMED {
            return self.now(table);
        }
        let (pick, interval) =
            (self.picks.fetch_add(1, Ordering::Relaxed), table.backends.len().cast_signed() as i64 / 4);
        if pick % interval == 0 {
            self.base.store(table.connections().cast_signed() - pick, Ordering::Relaxed);
        }
        // Another worker may have stored a base for a later pick.
        let connections = (self.base.load(Ordering::Relaxed) + pick + 1).max(1) as u64;
        Load { percent: self.percent, connections, weight: table.weight() }
    }

    /// The load with one more connection.
    pub fn now(&self, table: &Table) -> Load {
        Load { percent: self.percent, connections: table.connections() + 1, weight: table.weight() }
    }
}

impl Table {
    /// The most connections that the backend may have under this load: the bound's percentage of its fair share, rounded up, and at
    /// least 1.
    pub fn limit(&self, backend: &Backend, load: Load) -> u64 {
        let weight = self.candidates_of(backend).map_or(0, |tier| tier.weight_of(backend));
        let (parts, whole) = (u64::from(load.percent) * weight, 100 * load.weight.max(1));
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
    /// In a pool of up to [`EXACT`] backends, it is the best one. Which one of equals it is, is random. In a larger pool, it is the
    /// better one of two, and the chance to be one of them is in proportion to the weight (Mitzenmacher, "The Power of Two Choices in
    /// Randomized Load Balancing", 2001, <https://doi.org/10.1109/71.963420>). Backends of tiers that get no keys come last.
    pub fn least_loaded(&self, is_usable: impl Fn(&Backend) -> bool) -> Option<(&Backend, &Address, u64)> {
        let lighter = |one: (&Backend, &Address, u64), other: (&Backend, &Address, u64)| {
            self.compare((one.0, one.2), (other.0, other.2)).is_gt()
        };
        let reduce = |best, next| if lighter(best, next) { next } else { best };
        let active = |backend: &Backend| backend.live.active.load(Ordering::Relaxed);
        if self.backends.len() > EXACT {
            let draw = || {
                let key = fastrand::u64(..).to_le_bytes();
                let usable = self.candidates(&key).find(|(backend, _)| is_usable(backend));
                usable.map(|(backend, address)| (backend, address, active(backend)))
            };
            return Some(reduce(draw()?, draw()?));
        }
        // Which one of equals is the first is random.
        let (count, start) = (self.backends.len(), fastrand::usize(..self.backends.len().max(1)));
        self.levels_of_tiers().find_map(|tiers| {
            let owners = (start..count).chain(0..start);
            let owners =
                owners.filter(|&owner| tiers.iter().any(|tier| self.is_in(tier, owner) && self.may(tier, owner)));
            let usable = owners.map(|owner| &self.backends[owner]).filter(|backend| is_usable(backend));
            usable.filter_map(|backend| Some((backend, backend.address.as_ref()?, active(backend)))).reduce(reduce)
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

    /// Compares how many connections two backends would have for their weights, with one more each.
    fn compare(&self, one: (&Backend, u64), other: (&Backend, u64)) -> Order {
        let weight = |backend| u128::from(self.candidates_of(backend).map_or(0, |tier| tier.weight_of(backend)));
        let with_one_more = |active: u64| u128::from(active) + 1;
        let (this, that) = (with_one_more(one.1) * weight(other.0), with_one_more(other.1) * weight(one.0));
        this.cmp(&that)
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
