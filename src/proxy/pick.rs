//! Stage pick: the backend of the next attempt, with a permit for it.

use std::collections::HashMap;
use std::sync::Arc;
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
                    Ok(picked) => return Ok(picked),
                    // Other workers have used up the room that there was a moment ago. With their connections there is more.
                    Err(Nobody { at_bound: true, is_full: false }) if tried.is_empty() => {}
                    Err(_) => break,
                }
            }
            // The bound makes the load even, and refuses nobody: the backends with room do not answer or are full.
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
    let (mut nobody, mut owner, mut is_first) = (Nobody::default(), None, true);
    for (backend, address) in table.candidates(key) {
        // The load of the tiers that get keys says nothing about the others, which come after all of them.
        if was_tried(backend, tried) || load.is_some() && !table.has_joined(backend) {
            continue;
        }
        let (most, bound) = limits(route, table, backend, load);
        if let Some(permit) = BackendPermit::take(&backend.live, most.min(bound)) {
            if let Some(owner) = owner {
                count_displaced(owner, tried);
            }
            return Ok(Picked { backend, address, permit });
        }
        if bound < most {
            nobody.at_bound = true;
            owner = owner.or(Some(backend).filter(|_| is_first));
        } else {
            nobody.is_full = true;
            // Once for each connection: not again at its next attempt.
            let is_new = u64::from(tried.is_empty() && (load.is_some() || route.bound.is_none()));
            route.stats.walked_past_full.fetch_add(is_new, Ordering::Relaxed);
        }
        is_first = false;
    }
    Err(nobody)
}

fn count_displaced(owner: &Backend, tried: &[Try]) {
    if tried.is_empty() {
        owner.live.counters.displaced.fetch_add(1, Ordering::Relaxed);
    }
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
    for _ in 0..ROUNDS {
        let least = table.least_loaded(|backend| !was_tried(backend, tried) && has_room(backend));
        let Some((backend, address, active)) = least else { break };
        if let Some(permit) = BackendPermit::take(&backend.live, most(backend).min(active + 1)) {
            return Ok(Picked { backend, address, permit });
        }
    }
    let mut left = table.by_load().into_iter().filter(|backend| !was_tried(backend, tried)).peekable();
    if left.peek().is_none() {
        return Err(RefusalReason::NoBackend);
    }
    // The best one has been full each time, because other workers were faster.
    let picked = left.find_map(|backend| {
        let (address, permit) = (backend.address.as_ref()?, BackendPermit::take(&backend.live, most(backend))?);
        Some(Picked { backend, address, permit })
    });
    if let Some(picked) = picked {
        return Ok(picked);
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
    let load = route.bound.as_ref().map(|bound| bound.now(table, 1));
    let room = |backend: &Backend| {
        let (most, bound) = limits(route, table, backend, load.filter(|_| table.has_joined(backend)));
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
    candidates.sort_by_key(|(backend, room)| (!table.has_joined(backend), matches!(room, Room::AtBound(_))));
    candidates
}

impl Route {
    /// The most connections that each backend of the table may have now; `None`: any number.
    pub fn limits(&self, table: &Table) -> Vec<Option<u64>> {
        let load = self.bound.as_ref().map(|bound| bound.now(table, 1));
        let limit = |(owner, backend)| {
            let (most, bound) = limits(self, table, backend, load.filter(|_| table.gets_keys(owner)));
            Some(most.min(bound)).filter(|&limit| limit < u64::MAX)
        };
        table.backends().iter().enumerate().map(limit).collect()
    }
}

/// Finds connections whose keys lead to other healthy backends, as long as these have room. Not while the pool is in panic.
#[derive(Debug)]
pub(super) struct Homes<'a> {
    route: &'a Route,
    table: &'a Table,
    /// The load as it stays if a connection moves.
    load: Option<Load>,
    claimed: Claims,
}

/// Places that are promised to connections, by backend.
pub(super) type Claims = HashMap<Arc<str>, u64>;

impl<'a> Homes<'a> {
    pub(super) fn new(route: &'a Route, table: &'a Table) -> Self {
        let load = route.bound.as_ref().map(|bound| bound.now(table, 0));
        Self { route, table, load, claimed: Claims::new() }
    }

    /// The same, but some places are promised already.
    pub(super) fn without(self, claimed: Claims) -> Self {
        Self { claimed, ..self }
    }

    pub(super) fn into_claims(self) -> Claims {
        self.claimed
    }

    /// Whether the key of a connection to this backend leads to another one first, which is healthy and has a place. Claims the place.
    /// The connections of a backend that is unhealthy or drains stay: other settings decide about them.
    pub(super) fn claim(&mut self, key: &[u8], backend: &str) -> bool {
        let Self { route, table, .. } = *self;
        let is_healthy = |one: &Backend| one.state == State::Healthy && one.membership.weight > 0;
        if table.is_panic() || route.balance != Balance::Ring {
            return false;
        }
        let Some((home, _)) = table.candidates(key).next().filter(|(home, _)| *home.id != *backend) else {
            return false;
        };
        if !is_healthy(home) || !table.backends().find(backend).is_some_and(is_healthy) {
            return false;
        }
        let (most, bound) = limits(route, table, home, self.load);
        let claimed = self.claimed.entry(Arc::clone(&home.id)).or_default();
        let has_place = home.live.active.load(Ordering::Relaxed) + *claimed < most.min(bound);
        *claimed += u64::from(has_place);
        has_place
    }
}

fn was_tried(backend: &Backend, tried: &[Try]) -> bool {
    tried.iter().any(|tried| tried.backend == backend.id && tried.incarnation == backend.incarnation)
}

#[cfg(test)]
mod tests;
