//! The two incarnations of a slot whose replica is being replaced: one fills the slot, the other stands beside it. A flip exchanges
//! them in one publication. The ring does not change, so no key moves.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Publisher;
use super::backend_state::{BackendState, Change};
use crate::backend::Replica;

impl Publisher {
    /// Adds an incarnation beside a slot.
    pub(super) fn stand_beside(&mut self, id: Arc<str>, slot: &Arc<str>, now: Instant) -> Change {
        let Some(of_slot) = self.backends.get_mut(slot).filter(|_| id != *slot) else { return Change::Nothing };
        let other = Arc::clone(&of_slot.backend.live);
        if self.backends.contains_key(&id) {
            return Change::Nothing;
        }
        let mut beside = BackendState::new(Arc::clone(&id), false, now);
        beside.backend.live = Arc::new(other.of_same_slot());
        beside.backend.other = Some(other);
        beside.backend.beside = Some(Arc::clone(slot));
        if let Some(of_slot) = self.backends.get_mut(slot) {
            of_slot.backend.other = Some(Arc::clone(&beside.backend.live));
        }
        self.backends.insert(id, beside);
        self.changed.insert(Arc::clone(slot));
        // The place of each backend in the list, but no point on the ring.
        Change::Ring
    }

    /// The incarnation beside a slot takes the place of the other one. The ring does not change.
    pub(super) fn flip(
        &mut self,
        (id, beside): (Arc<str>, Arc<str>),
        next: Replica,
        former: Option<Replica>,
        within: Duration,
        now: Instant,
    ) -> Change {
        if !self.backends.contains_key(&id) {
            return Change::Nothing;
        }
        // Both join and leave by events of one supervisor, which sends them in order.
        let Some(mut other) = self.backends.remove(&beside) else { return Change::Nothing };
        let Some(mut of_slot) = self.backends.remove(&id) else { return Change::Nothing };
        of_slot.flip(&mut other, next, former, within, now);
        tracing::info!(pool = %self.pool, %id, address = of_slot.backend.address.as_ref().map(tracing::field::display),
            "another replica fills the slot");
        for (id, state) in [(id, of_slot), (beside, other)] {
            self.backends.insert(Arc::clone(&id), state);
            self.judge(&id, now);
            self.changed.insert(id);
        }
        Change::Backend
    }
}
