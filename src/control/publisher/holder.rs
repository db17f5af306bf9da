//! Which backend of an exclusive pool gets connections: the holder. Pure: the time is an argument.
//!
//! A backend claims the pool while its check passes. The holder stays until its claim ends. Then Ringway resets its connections,
//! and waits until no backend of the pool has any: never do two have connections at once. The best claim wins: of the backends in
//! the lowest tier, the one whose claim is the newest.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::backend_state::{BackendState, LOOK};
use crate::backend::{Eviction, Live};

/// The holder of an exclusive pool, or its absence.
#[derive(Debug, Default)]
pub(super) struct Holder {
    id: Option<Arc<str>>,
    /// Counters of the holder, or of the last one, which may have left the pool.
    live: Option<Arc<Live>>,
    /// When the last holder lost the pool; `None`: there was none.
    lost: Option<Instant>,
    /// When to look again whether all connections have ended.
    pub(super) next: Option<Instant>,
}

impl Holder {
    /// The id of the holder.
    pub(super) fn id(&self) -> Option<&Arc<str>> {
        self.id.as_ref()
    }

    /// Follows the claims of all backends of the pool.
    pub(super) fn follow(&mut self, backends: &BTreeMap<Arc<str>, BackendState>, now: Instant) {
        self.next = None;
        let claims = || backends.values().filter(|one| one.claim.is_some());
        if let Some(id) = &self.id {
            if claims().any(|one| one.backend.id == *id) {
                return;
            }
            (self.id, self.lost) = (None, Some(now));
        }
        let best =
            claims().min_by_key(|one| (one.backend.membership.tier, Reverse(one.claim.map(|claim| claim.number))));
        let is_best = |one: &BackendState| best.is_some_and(|best| best.backend.id == one.backend.id);
        // A worker may connect to the last holder by an earlier table.
        let has_settled = self.lost.is_none_or(|lost| now.saturating_duration_since(lost) >= LOOK);
        let mut is_free = has_settled;
        let gone = self.live.iter().filter(|live| !backends.values().any(|one| Arc::ptr_eq(&one.backend.live, live)));
        let others =
            backends.values().filter(|one| !is_best(one)).map(|one| (&one.backend.live, one.backend.drain.is_some()));
        for (live, drains) in others.chain(gone.map(|live| (live, false))) {
            if live.active.load(Ordering::Relaxed) > 0 {
                is_free = false;
                // A drain has a deadline of its own.
                if !drains {
                    live.evictions.request(Eviction::Down);
                }
            }
        }
        if !is_free {
            self.next = Some(now + LOOK);
        } else if let Some(best) = best {
            (self.id, self.live) = (Some(Arc::clone(&best.backend.id)), Some(Arc::clone(&best.backend.live)));
        }
    }
}
