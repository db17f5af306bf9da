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
    /// The owners on a ring, with the memberships of its members in the same order. Members without points have the weight 0.
    pub fn new(ring: &'a Ring, memberships: impl IntoIterator<Item = Membership>) -> Self {
        let memberships: Vec<_> = memberships.into_iter().collect();
        let lowest = memberships.iter().filter(|one| one.takes_keys()).map(|one| one.tier).min();
        Self { ring, takes: memberships.iter().map(|one| one.takes_keys() && Some(one.tier) == lowest).collect() }
    }

    /// The owner of a key; `None` if no member takes keys.
    pub fn of(&self, key: &[u8]) -> Option<usize> {
        self.ring.walk(key).find(|&owner| self.takes[owner])
    }
}
