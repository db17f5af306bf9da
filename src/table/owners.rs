//! Who gets a key if every backend is healthy: to tell how many keys a change moves.

use crate::backend::Membership;
use crate::ring::Ring;

/// The owners of the keys of a ring: the backends of the lowest tier that are not drained by their list.
#[derive(Debug)]
pub struct Owners<'a> {
    ring: &'a Ring,
    takes: Vec<bool>,
}

impl<'a> Owners<'a> {
    /// The owners on a ring, with the memberships of its members in the same order.
    pub fn new(ring: &'a Ring, memberships: impl IntoIterator<Item = Membership>) -> Self {
        let memberships: Vec<_> = memberships.into_iter().collect();
        let is_in = |one: &Membership| one.weight > 0 && !one.is_drained;
        let lowest = memberships.iter().filter(|one| is_in(one)).map(|one| one.tier).min();
        Self { ring, takes: memberships.iter().map(|one| is_in(one) && Some(one.tier) == lowest).collect() }
    }

    /// The owner of a key; `None` if no member takes keys.
    pub fn of(&self, key: &[u8]) -> Option<usize> {
        self.ring.walk(key).find(|&owner| self.takes[owner])
    }
}
