//! How many replicas a pool has that scales by itself: by its connections, between a minimum and a maximum. Pure except for its status,
//! which others read.
//!
//! The number rises at once with the load, and falls only to the highest need of the last `cool_down`. So a load that goes up and down
//! around a limit changes nothing (as the stabilization window of Kubernetes' autoscaler). Without connections for `idle_stop`, the pool
//! has its minimum; with a minimum of 0 it sleeps, and the first connection wakes it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::backend::Waiting;
use crate::label_enum;
use crate::labels::Tally;

/// When a pool scales by itself. The configured number of replicas is the maximum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scaling {
    /// Replicas without connections; 0: the pool sleeps. Less than the maximum.
    pub min: u32,
    /// Time without connections after which the pool has only the minimum.
    pub idle_stop: Duration,
    /// How the number follows the connections; `None`: the maximum whenever there is one.
    pub by_load: Option<ByLoad>,
}

/// How the number of replicas follows the connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByLoad {
    /// Connections for which one replica is enough; at least 1.
    pub connections_per_replica: u32,
    /// How long a number must have been enough before it falls.
    pub cool_down: Duration,
}

label_enum! {
    /// Whether a pool got more replicas or fewer.
    pub enum Direction {
        /// More.
        Up => "up",
        /// Fewer.
        Down => "down",
    }
}

/// The connections of a pool: those to its backends, those that wait for one, and whether any began since the last look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Load {
    pub(super) open: u64,
    pub(super) waiting: u64,
    pub(super) any_began: bool,
}

/// What a pool has needed lately.
#[derive(Debug, Default)]
pub(super) struct Scaler {
    /// The highest needs of the last `cool_down`, falling, with their times.
    needs: VecDeque<(Instant, u32)>,
    /// Since when there has been no connection.
    idle_since: Option<Instant>,
}

impl Scaler {
    /// The number of replicas from now on. `now_wanted`: the number until now.
    pub(super) fn wanted(&mut self, scaling: &Scaling, most: u32, now_wanted: u32, load: Load, now: Instant) -> u32 {
        // Short connections begin and end between two looks.
        let connections = (load.open + load.waiting).max(load.any_began.into());
        if connections > 0 {
            self.idle_since = None;
        } else if now.saturating_duration_since(*self.idle_since.get_or_insert(now)) >= scaling.idle_stop {
            self.needs.clear();
            return scaling.min.min(most);
        }
        let least = scaling.min.max(1);
        let need = match scaling.by_load {
            // A pool that sleeps needs nothing before a connection comes, and one that was awake stays so.
            _ if connections == 0 && now_wanted == 0 => scaling.min,
            None if connections == 0 => now_wanted.max(scaling.min),
            None => most,
            Some(by_load) => {
                let need = connections.div_ceil(by_load.connections_per_replica.max(1).into());
                u32::try_from(need).unwrap_or(u32::MAX).max(least)
            }
        };
        let need = need.min(most);
        let Some(ByLoad { cool_down, .. }) = scaling.by_load else { return need };
        if self.needs.is_empty() {
            // What was there before had its reason.
            self.needs.push_back((now, now_wanted.min(most)));
        }
        while self.needs.back().is_some_and(|&(_, before)| before <= need) {
            self.needs.pop_back();
        }
        self.needs.push_back((now, need));
        while self.needs.len() > 1 && self.needs[0].0 + cool_down <= now {
            self.needs.pop_front();
        }
        // The maximum may have become less.
        self.needs[0].1.min(most)
    }
}

/// The scaling of one pool, for whoever shows it.
#[derive(Debug, Default)]
pub struct ScalingStatus {
    view: Mutex<Option<ScalingView>>,
    /// Changes of the number, by direction.
    pub changes: Tally<Direction>,
    /// The connections that wait for a backend.
    pub waiting: Arc<Waiting>,
}

/// How many replicas a pool has that scales by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScalingView {
    /// The minimum and the maximum.
    pub min: u32,
    #[expect(missing_docs, reason = "see above")]
    pub max: u32,
    /// The number that it should have now; 0: it sleeps.
    pub wanted: u32,
    /// Since when.
    pub since: Instant,
}

impl ScalingStatus {
    /// How many replicas the pool has; `None`: it does not scale by itself.
    pub fn view(&self) -> Option<ScalingView> {
        *self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn show(&self, view: Option<ScalingView>) {
        *self.view.lock().unwrap_or_else(PoisonError::into_inner) = view;
    }
}

#[cfg(test)]
mod tests;
