//! The shares of all keys that the members of a ring own, or get while some of them take no keys.

use super::Ring;

impl Ring {
    /// The share of all keys that each member owns, in the order of the members; the shares add up to 1.
    ///
    /// The shares are exact, not sampled. The first call computes and caches them.
    pub fn shares(&self) -> &[f64] {
        self.shares.get_or_init(|| {
            let mut shares = vec![0.0; self.members];
            for (point, won) in self.won().into_iter().enumerate() {
                shares[self.owner(point)] += won;
            }
            shares
        })
    }

    /// The share of all keys that each member gets, with members in tiers 0 to `tiers - 1` or in none, if only those that `takes` names
    /// take keys. The keys of a member in tier 0 that does not go to tier 1, and so on. In the last tier, the next member of the tier
    /// clockwise gets them. If none there takes any, they are in no share.
    pub fn shares_by_tier(
        &self,
        tiers: usize,
        tier: impl Fn(usize) -> Option<usize>,
        takes: impl Fn(usize) -> bool,
    ) -> Vec<f64> {
        let mut shares = vec![0.0; self.members];
        let Some(last) = tiers.checked_sub(1) else { return shares };
        let mut left = self.won();
        for current in 0..last {
            // The first turn around the circle finds the next member after the last point.
            let mut next = None;
            for turn in 0..2 {
                for (point, left) in left.iter_mut().enumerate().rev() {
                    let owner = self.owner(point);
                    next = if tier(owner) == Some(current) { Some(owner) } else { next };
                    if turn == 1
                        && let Some(owner) = next.filter(|&owner| takes(owner))
                    {
                        shares[owner] += std::mem::take(left);
                    }
                }
            }
        }
        let mut next = None;
        for turn in 0..2 {
            for (point, left) in left.iter().enumerate().rev() {
                let owner = self.owner(point);
                next = if tier(owner) == Some(last) && takes(owner) { Some(owner) } else { next };
                if turn == 1
                    && let Some(owner) = next
                {
                    shares[owner] += left;
                }
            }
        }
        shares
    }

    /// The share of all keys that each point wins, in the order of the points.
    ///
    /// Point `j` has the gap `g_j` before it. With `k` probes, it wins at distance `d < g_j` when one probe falls at
    /// that distance and all other probes are farther than `d` from their points. A probe is farther than `d` with
    /// probability `S(d) = Σ max(g - d, 0)` over all gaps. So the point's share is `∫ k·S(d)^(k-1) dd` from 0 to `g_j`.
    /// `S` is linear between neighboring gap lengths, so the integral is a sum over the sorted gaps.
    fn won(&self) -> Vec<f64> {
        let count = self.owners.len();
        if count == 1 {
            return vec![1.0];
        }
        let mut by_point = vec![0.0; count];
        let mut gaps: Vec<(u64, usize)> = (0..count)
            .map(|point| {
                let before = self.hash((point + count - 1) % count);
                (self.hash(point).wrapping_sub(before), point)
            })
            .collect();
        gaps.sort_unstable();
        let circle = 2.0_f64.powi(64);
        let probes = self.parameters.probes.cast_signed();
        let (mut survival, mut won, mut from) = (1.0_f64, 0.0, 0.0);
        for (shorter, &(gap, point)) in gaps.iter().enumerate() {
            let to = gap as f64 / circle;
            let reaching = (count - shorter) as f64;
            let next = (survival - reaching * (to - from)).max(0.0);
            won += (survival.powi(probes) - next.powi(probes)) / reaching;
            (survival, from) = (next, to);
            by_point[point] = won;
        }
        by_point
    }
}
