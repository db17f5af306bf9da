//! The walk: the members in the order to try them for a key.

use super::Ring;

/// Iterates over the distinct members clockwise from a key's point. The first member costs no allocation.
#[derive(Debug)]
pub struct Walk<'a> {
    pub(super) ring: &'a Ring,
    pub(super) point: Option<usize>,
    /// Points not yet visited.
    pub(super) left: usize,
    /// Members not yet returned. Without it, a walk would look at the remaining points of members that it has returned.
    pub(super) unseen: usize,
    pub(super) first: Option<usize>,
    /// One bit per member that was returned; allocated when a second member is requested.
    pub(super) seen: Vec<u64>,
}

impl Iterator for Walk<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let mut point = self.point?;
        let Some(first) = self.first else {
            let owner = self.ring.owner(point);
            (self.first, self.unseen) = (Some(owner), self.unseen - 1);
            return Some(owner);
        };
        if self.unseen == 0 {
            self.point = None;
            return None;
        }
        if self.seen.is_empty() {
            self.seen = vec![0; self.ring.members.div_ceil(64)];
            self.seen[first / 64] |= 1 << (first % 64);
        }
        while self.left > 0 {
            self.left -= 1;
            point = if point + 1 == self.ring.owners.len() { 0 } else { point + 1 };
            let owner = self.ring.owner(point);
            let (word, bit) = (owner / 64, 1 << (owner % 64));
            if self.seen[word] & bit == 0 {
                self.seen[word] |= bit;
                self.unseen -= 1;
                self.point = Some(point);
                return Some(owner);
            }
        }
        self.point = None;
        None
    }
}
