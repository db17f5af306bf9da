//! A slot and its two seats: in the first sits the replica that fills the slot, in the second one that comes next or has been before.

use std::ops::{Index, IndexMut};
use std::sync::Arc;
use std::time::Instant;

use super::seat::{Seat, Why};
use crate::control::supervisor::rollout::Stage;

/// Which of the two seats of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// The replica fills the slot: it gets the connections.
    Front,
    /// The replica stands beside the slot: it comes next, or has filled the slot before.
    Beside,
}

/// A seat, by the number of its slot, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    /// The slot.
    pub slot: usize,
    /// The seat.
    pub role: Role,
}

impl Place {
    /// The first seat of a slot.
    pub const fn front(slot: usize) -> Self {
        Self { slot, role: Role::Front }
    }

    /// The second seat of a slot.
    pub const fn beside(slot: usize) -> Self {
        Self { slot, role: Role::Beside }
    }
}

/// The observed state of one slot.
#[derive(Debug, Clone)]
pub struct Slot {
    /// The slot's name, which is the backend's id.
    pub name: Arc<str>,
    /// The replica that fills the slot.
    pub front: Seat,
    /// The replica beside it.
    pub beside: Seat,
}

impl Slot {
    /// An empty slot whose first replica is due at once.
    pub fn new(name: Arc<str>, now: Instant) -> Self {
        // No slot has such a name.
        let beside = format!("{name}+").into();
        Self { front: Seat::new(Arc::clone(&name), now), beside: Seat::new(beside, now), name }
    }

    /// Records that the replica beside the slot fills it from now on. The other one stands beside it and lets its connections end.
    pub fn flip(&mut self) {
        std::mem::swap(&mut self.front, &mut self.beside);
        std::mem::swap(&mut self.front.id, &mut self.beside.id);
        self.front.fills();
        self.beside.leaves_slot();
        self.beside.draining(Why::Outdated);
    }

    /// Whether a replica that comes next is there or on its way.
    pub fn has_successor(&self) -> bool {
        !self.beside.is_former && (self.beside.is_starting() || self.beside.serves())
    }

    /// Whether the replica that was to come next has ended, and another one shall come in its place.
    pub(super) fn waits_for_another(&self) -> bool {
        self.beside.starts_at().is_some()
            && !self.beside.is_first_try()
            && self.front.serves()
            && self.front.is_outdated()
    }

    /// Whether nothing fills the slot, and the replica beside it may do so at once.
    pub(super) fn is_taken_over(&self, stage: Stage) -> bool {
        let may = self.beside.serves() && !self.beside.is_former && !self.beside.is_outdated();
        self.front.starts_at().is_some() && may && self.beside.unhealthy_since().is_none() && stage != Stage::Paused
    }
}

impl Index<Role> for Slot {
    type Output = Seat;

    fn index(&self, role: Role) -> &Seat {
        match role {
            Role::Front => &self.front,
            Role::Beside => &self.beside,
        }
    }
}

impl IndexMut<Role> for Slot {
    fn index_mut(&mut self, role: Role) -> &mut Seat {
        match role {
            Role::Front => &mut self.front,
            Role::Beside => &mut self.beside,
        }
    }
}
