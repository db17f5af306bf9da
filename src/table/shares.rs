//! The shares of all keys that backends get now, or would get.

use std::sync::Arc;

use super::Table;
use crate::backend::{Admission, Backend, State};

/// Points of the ring that one look at the shares may pass, several times. With more, the shares are estimates.
const MOST_STEPS: usize = 1 << 22;

impl Table {
    /// The share of all keys that each backend gets now, in the order of the backends: those that get no connections have 0, and
    /// the others have their keys. The first call computes and caches them.
    pub fn shares_now(&self) -> &[f64] {
        self.shares_now.get_or_init(|| {
            if let [one] = &self.tiers[..]
                && one.count == self.backends.len()
                && !one.spares_slow_ones
            {
                return self.ring.shares().to_vec();
            }
            let mut shares = vec![0.0; self.backends.len()];
            let mut from = 0.0;
            for to in self.levels() {
                let of_level = self.shares_at(f64::midpoint(from, to));
                std::iter::zip(&mut shares, of_level).for_each(|(sum, share)| *sum += (to - from) * share);
                from = to;
            }
            shares
        })
    }

    /// The admissions at which the shares change, up to 1. The same hash of a key decides for all backends whether they take it. Evenly
    /// spaced ones if there are many, which makes the shares an estimate.
    fn levels(&self) -> Vec<f64> {
        let spare = self.tiers[..self.joined].iter().filter(|tier| tier.spares_slow_ones);
        let mut levels: Vec<_> =
            spare.flat_map(|tier| self.backends.admissions(tier.tier)).map(Admission::raw).collect();
        levels.push(Admission::ALL.raw());
        levels.sort_unstable();
        levels.dedup();
        let most = (MOST_STEPS / self.ring.points().max(1)).clamp(4, 64);
        if levels.len() > most {
            return (1..=most).map(|n| n as f64 / most as f64).collect();
        }
        levels.into_iter().map(|level| level as f64 / Admission::ALL.raw() as f64).collect()
    }

    /// The shares of those keys whose hash for admissions is here, from 0 to 1.
    fn shares_at(&self, hash: f64) -> Vec<f64> {
        let joined = &self.tiers[..self.joined];
        let takes = |one: Admission| one.as_part() > hash;
        // A key that all backends of the last tier spare goes to its own.
        let spares: Vec<_> = joined
            .iter()
            .enumerate()
            .map(|(n, tier)| {
                tier.spares_slow_ones && (n + 1 < joined.len() || self.backends.admissions(tier.tier).any(takes))
            })
            .collect();
        let tier = |owner: usize| joined.iter().position(|tier| tier.tier == self.backends[owner].membership.tier);
        self.ring.shares_by_tier(joined.len(), tier, |owner| {
            let number = tier(owner).filter(|&number| self.may(&joined[number], owner));
            number.is_some_and(|number| !spares[number] || takes(self.backends[owner].admission))
        })
    }

    /// The share of all keys that a backend would get if it were healthy, and the others take theirs as now.
    pub fn share_if_it_took(&self, owner: usize) -> f64 {
        if self.rules.is_exclusive && self.any_healthy() && self.backends[owner].state != State::Healthy {
            return 0.0;
        }
        let mut backends = self.backends.clone();
        let (state, admission, drain) = (State::Healthy, Admission::ALL, None);
        backends.set(owner, Backend { state, admission, drain, ..backends[owner].clone() });
        self.what_if(Arc::clone(&self.ring), backends).shares_now()[owner]
    }
}
