//! Stage pick: the backend of the next attempt, with a permit for it.

use std::sync::atomic::Ordering;

use super::Route;
use super::connect::Try;
use super::stats::RefusalReason;
use crate::address::Address;
use crate::backend::{Backend, BackendPermit, State};
use crate::label_enum;
use crate::table::{Load, Table};

/// How often a pick looks again because other workers were faster. Each time, at least one of them has got what it wanted.
const ROUNDS: u32 = 16;

label_enum! {
    /// How a pool chooses a backend for a connection.
    pub enum Balance {
        /// The key decides: the first backend of its walk on the ring that has room.
        Ring => "ring",
        /// The backend with the fewest connections for its weight.
        LeastConnections => "least_connections",
    }
}

/// A backend for the next attempt.
#[derive(Debug)]
pub(super) struct Picked<'a> {
    pub(super) backend: &'a Backend,
    pub(super) address: &'a Address,
    pub(super) permit: BackendPermit,
}

/// Picks a backend that was not tried yet.
///
/// # Errors
/// When no backend may get a connection, or all that may are full.
pub(super) fn pick<'a>(
    route: &Route,
    table: &'a Table,
    key: &[u8],
    tried: &[Try],
) -> Result<Picked<'a>, RefusalReason> {
    match (route.balance, &route.bound) {
        (Balance::LeastConnections, _) => least_loaded(route, table, tried),
        (Balance::Ring, None) => along_the_walk(route, table, key, tried, None).map_err(Nobody::why),
        (Balance::Ring, Some(bound)) => {
            for _ in 0..ROUNDS {
                match along_the_walk(route, table, key, tried, Some(bound.at_pick(table))) {
                    // Other workers have used up the room that there was a moment ago. With their connections there is more.
                    Err(Nobody { at_bound: true, is_full: false }) if tried.is_empty() => {}
                    Err(Nobody { at_bound: true, .. }) => break,
                    picked => return picked.map_err(Nobody::why),
                }
            }
            // The bound makes the load even, and refuses nobody: here, the backends with room do not answer or are full.
            along_the_walk(route, table, key, tried, None).map_err(Nobody::why)
        }
    }
}

/// Why no backend was picked.
#[derive(Debug, Clone, Copy, Default)]
struct Nobody {
    is_full: bool,
    at_bound: bool,
}

impl Nobody {
    fn why(self) -> RefusalReason {
        if self.is_full { RefusalReason::BackendsFull } else { RefusalReason::NoBackend }
    }
}

/// The first backend of the key's walk that has room, under this load of a bounded pool.
fn along_the_walk<'a>(
    route: &Route,
    table: &'a Table,
    key: &[u8],
    tried: &[Try],
    load: Option<Load>,
) -> Result<Picked<'a>, Nobody> {
    let (mut nobody, mut owner) = (Nobody::default(), None);
    for (backend, address) in table.candidates(key) {
        if was_tried(backend, tried) {
            continue;
        }
        let (most, bound) = limits(route, table, backend, load);
        if let Some(permit) = BackendPermit::take(&backend.live, most.min(bound)) {
            if let Some(owner) = owner.filter(|_| tried.is_empty()) {
                count_displaced(owner);
            }
            return Ok(Picked { backend, address, permit });
        }
        if bound < most {
            nobody.at_bound = true;
            owner = owner.or(Some(backend));
        } else {
            nobody.is_full = true;
            route.stats.walked_past_full.fetch_add(1, Ordering::Relaxed);
        }
    }
    Err(nobody)
}

fn count_displaced(owner: &Backend) {
    owner.live.displaced.fetch_add(1, Ordering::Relaxed);
}

/// The most connections that a backend may have, and the most that it may have under this load of a bounded pool.
fn limits(route: &Route, table: &Table, backend: &Backend, load: Option<Load>) -> (u64, u64) {
    let bound = load.map_or(u64::MAX, |load| table.limit(backend, load));
    (backend.most_connections(route.most_per_backend), bound)
}

/// The backend with the fewest connections for its weight. It has got no other one since this worker looked.
fn least_loaded<'a>(route: &Route, table: &'a Table, tried: &[Try]) -> Result<Picked<'a>, RefusalReason> {
    let most = |backend: &Backend| backend.most_connections(route.most_per_backend);
    let has_room = |backend: &Backend| backend.live.active.load(Ordering::Relaxed) < most(backend);
    for round in 0..=ROUNDS {
        let least = table.least_loaded(|backend| !was_tried(backend, tried) && has_room(backend));
        let Some((backend, address, active)) = least else { break };
        let limit = if round < ROUNDS { most(backend).min(active + 1) } else { most(backend) };
        if let Some(permit) = BackendPermit::take(&backend.live, limit) {
            return Ok(Picked { backend, address, permit });
        }
    }
    if table.least_loaded(|backend| !was_tried(backend, tried)).is_none() {
        return Err(RefusalReason::NoBackend);
    }
    route.stats.walked_past_full.fetch_add(1, Ordering::Relaxed);
    Err(RefusalReason::BackendsFull)
}

/// Whether a backend has room for one more connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    Free,
    /// It has as many connections as the pool's bound allows.
    AtBound(u64),
    /// It has as many connections as it may have.
    Full(u64),
}

/// The candidates in the order in which picks would take them now. Full ones keep their places, but get no attempt.
pub(super) fn in_order<'a>(route: &Route, table: &'a Table, key: &[u8]) -> Vec<(&'a Backend, Room)> {
    let load = route.bound.as_ref().map(|bound| bound.now(table));
    let room = |backend: &Backend| {
        let (most, bound) = limits(route, table, backend, load);
        match backend.live.active.load(Ordering::Relaxed) {
            active if active >= most => Room::Full(most),
            active if active >= bound => Room::AtBound(bound),
            _ => Room::Free,
        }
    };
    let candidates = match route.balance {
        Balance::Ring => table.candidates(key).map(|(backend, _)| backend).collect(),
        Balance::LeastConnections => table.by_load(),
    };
    let mut candidates: Vec<_> = candidates.into_iter().map(|backend| (backend, room(backend))).collect();
    candidates.sort_by_key(|(_, room)| matches!(room, Room::AtBound(_)));
    candidates
}

impl Route {
    /// The most connections that each backend of the table may have now; `None`: any number.
    pub fn limits(&self, table: &Table) -> Vec<Option<u64>> {
        let load = self.bound.as_ref().map(|bound| bound.now(table));
        let limit = |(owner, backend)| {
            let (most, bound) = limits(self, table, backend, load.filter(|_| table.gets_keys(owner)));
            Some(most.min(bound)).filter(|&limit| limit < u64::MAX)
        };
        table.backends().iter().enumerate().map(limit).collect()
    }
}

/// Whether the key of a connection to this backend leads first of all to another one, and that has room. Not while the pool is in panic, and not if the
/// connection's own backend is unhealthy or drains: other settings say what becomes of it then.
pub(super) fn belongs_elsewhere(route: &Route, table: &Table, key: &[u8], backend: &str) -> bool {
    let is_healthy = |one: &Backend| one.state == State::Healthy && one.membership.weight > 0;
    if table.is_panic() || route.balance != Balance::Ring || !table.backends().find(backend).is_some_and(is_healthy) {
        return false;
    }
    let load = route.bound.as_ref().map(|bound| bound.now(table));
    let has_room = |one: &Backend| {
        let (most, bound) = limits(route, table, one, load);
        one.live.active.load(Ordering::Relaxed) < most.min(bound)
    };
    let home = table.candidates(key).next().map(|(home, _)| home);
    home.is_some_and(|home| *home.id != *backend && has_room(home))
}

fn was_tried(backend: &Backend, tried: &[Try]) -> bool {
    tried.iter().any(|tried| tried.backend == backend.id && tried.incarnation == backend.incarnation)
}

#[cfg(test)]
mod tests;
