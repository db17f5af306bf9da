//! Which backend of an exclusive pool gets connections: the holder. Pure: the time is an argument.
//!
//! A backend claims the pool while its check passes. The holder stays until its claim ends. Then Ringway resets its connections,
//! and waits until no backend of the pool has any: never do two have connections at once. The best claim wins: of the backends in
//! the lowest tier, the one whose claim is the newest.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::backend_state::{BackendState, LOOK};
use crate::backend::{Eviction, Live};

/// How long after a change a worker that has picked by an earlier table may still connect to another backend than the holder.
const LATE: Duration = Duration::from_secs(5);

/// The holder of an exclusive pool, or its absence.
#[derive(Debug, Default)]
pub(super) struct Holder {
    /// Its id and incarnation.
    current: Option<(Arc<str>, u64)>,
    /// The last holder, which may have left the pool: its incarnation and counters.
    last: Option<(u64, Arc<Live>)>,
    /// When the pool became exclusive, or the last holder lost it; `None`: neither.
    lost: Option<Instant>,
    /// When the holder got the pool.
    won: Option<Instant>,
    /// When to look again at the connections.
    pub(super) next: Option<Instant>,
}

impl Holder {
    /// Nobody holds a pool whose backends may have connections.
    pub(super) fn after_change(now: Instant) -> Self {
        Self { lost: Some(now), ..Self::default() }
    }

    /// The id of the holder.
    pub(super) fn id(&self) -> Option<&Arc<str>> {
        self.current.as_ref().map(|(id, _)| id)
    }

    /// Follows the claims of all backends of the pool.
    pub(super) fn follow(&mut self, backends: &BTreeMap<Arc<str>, BackendState>, now: Instant) {
        let claims = || backends.values().filter(|one| one.claim.is_some());
        let is_holder = |one: &BackendState, current: &(Arc<str>, u64)| {
            (&one.backend.id, one.backend.incarnation) == (&current.0, current.1)
        };
        if self.current.as_ref().is_some_and(|current| !claims().any(|one| is_holder(one, current))) {
            (self.current, self.lost) = (None, Some(now));
        }
        let best = match &self.current {
            Some((id, _)) => backends.get(id),
            None => {
                claims().min_by_key(|one| (one.backend.membership.tier, Reverse(one.claim.map(|claim| claim.number))))
            }
        };
        let others_have_ended = self.end_others(backends, best);
        let since = |then: Option<Instant>| then.map(|then| now.saturating_duration_since(then));
        let has_settled = since(self.lost).is_none_or(|passed| passed >= LOOK);
        if self.current.is_none()
            && has_settled
            && others_have_ended
            && let Some(best) = best
        {
            let (id, incarnation) = (Arc::clone(&best.backend.id), best.backend.incarnation);
            (self.current, self.won) = (Some((id, incarnation)), Some(now));
            self.last = Some((incarnation, Arc::clone(&best.backend.live)));
        }
        let is_early = self.current.is_some() && since(self.won).is_some_and(|passed| passed < LATE);
        self.next = (is_early || !others_have_ended || !has_settled).then_some(now + LOOK);
    }

    /// Resets the connections of all backends but `best`. Returns whether they have none.
    fn end_others(&self, backends: &BTreeMap<Arc<str>, BackendState>, best: Option<&BackendState>) -> bool {
        // A holder at another address is another server. Its connections to the old one count for the same backend.
        let has_moved = |one: &BackendState| {
            let is_last = |(_, live): &&(u64, Arc<Live>)| Arc::ptr_eq(live, &one.backend.live);
            self.last.as_ref().filter(is_last).is_some_and(|(incarnation, _)| *incarnation != one.backend.incarnation)
        };
        let stays = |one: &BackendState| best.is_some_and(|best| best.backend.id == one.backend.id) && !has_moved(one);
        let is_here = |live: &Arc<Live>| backends.values().any(|one| Arc::ptr_eq(&one.backend.live, live));
        let gone = self.last.iter().map(|(_, live)| live).filter(|live| !is_here(live)).map(|live| (live, false));
        let others = backends.values().filter(|one| !stays(one)).map(|one| {
            // A drain has a deadline of its own, as long as the server works.
            (&one.backend.live, one.backend.drain.is_some() && one.backend.well == Some(true))
        });
        let mut have_ended = true;
        for (live, drains) in others.chain(gone) {
            if live.active.load(Ordering::Relaxed) > 0 {
                have_ended = false;
                if !drains {
                    live.evictions.request(Eviction::Down);
                }
            }
        }
        have_ended
    }
}
