//! The consistent-hash ring: build, lookup and walk. The module is pure: no I/O, no clock, and integer arithmetic for
//! every choice of a member.
//!
//! Every member owns `virtual_nodes × weight` points on a circle of 2^64. A key belongs to the member that owns the
//! next point clockwise. To even out the shares without more points, a lookup hashes the key several times (`probes`)
//! and takes the probe that is closest to its next point: Appleton and O'Reilly, "Multi-probe consistent hashing",
//! arXiv 1505.00062. The ring itself is Karger et al., "Consistent hashing and random trees", STOC 1997.
//!
//! `docs/consistent-hashing.md` describes the algorithm byte for byte. The golden vectors in `ring/tests.rs` check that
//! this file follows it.

use std::sync::OnceLock;

mod shares;
mod walk;

#[cfg(test)]
mod tests;

pub use self::walk::Walk;

/// Maximum number of points on one ring. A ring of this size uses 50 MB of memory and takes a third of a second to build.
pub const MOST_POINTS: u64 = 1 << 22;

/// Separates the id from the number in a point's hash input.
const TAG_POINT: u8 = 0;
/// Last byte of a key's hash input. A point's input ends with the high byte of its number, which is 0 because the
/// config allows at most 2^22 points. So a key never has the same input as a point.
const TAG_KEY: u8 = 1;

/// The parameters of a ring. Equal parameters and members give equal rings on every machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameters {
    /// Points per unit of weight, 1 to 65,536. More points give more even shares and use more memory.
    pub virtual_nodes: u32,
    /// Hashes per key, 1 to 64. More probes give more even shares and slower lookups.
    pub probes: u32,
    /// Part of every hash; rings with different seeds are independent.
    pub seed: u64,
}

/// A member of the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member<'a> {
    /// The identity that is hashed; unique within a ring.
    pub id: &'a str,
    /// Multiplies `virtual_nodes`; a member with weight 0 has no points.
    pub weight: u32,
}

/// One of a key's probes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// Its position on the circle. The first probe's position is the key's hash.
    pub at: u64,
    /// The position of the point that it finds.
    pub point: u64,
    /// The point's owner.
    pub owner: usize,
    /// No other probe is nearer to its point.
    pub wins: bool,
}

/// An immutable ring. An owner is an index into the members that the ring was built from.
#[derive(Debug)]
pub struct Ring {
    parameters: Parameters,
    members: usize,
    /// The members that have points.
    with_points: usize,
    /// The upper halves of the hashes of all points, sorted clockwise, followed by `WINDOW` copies of `u32::MAX`. A lookup
    /// reads only these, except on ties. They take half the memory of whole hashes, so larger rings fit into a core's cache.
    tops: Vec<u32>,
    /// The lower halves.
    bottoms: Vec<u32>,
    owners: Vec<u32>,
    /// For each value of a hash's top bits, the first point that is not before it: the start of a lookup's scan.
    starts: Vec<u32>,
    /// Right shift of a hash that gives its index into `starts`.
    shift: u32,
    digest: u64,
    shares: OnceLock<Vec<f64>>,
}

impl Ring {
    /// Builds the ring of `members`. Their order decides only the owners' indices and never moves a point.
    ///
    /// # Panics
    /// With more than `u32::MAX` points; the config allows at most 2^22.
    pub fn build(parameters: Parameters, members: &[Member<'_>]) -> Self {
        // A member without weight leaves no trace: neither a point nor a part of the digest.
        let mut by_id = order_by_id(members);
        by_id.retain(|&member| members[member].weight > 0);
        let mut points = Vec::new();
        let mut bytes = Vec::new();
        for (rank, &member) in by_id.iter().enumerate() {
            let Member { id, weight } = members[member];
            for i in 0..parameters.virtual_nodes.saturating_mul(weight) {
                points.push((hash_point(&mut bytes, parameters.seed, id.as_bytes(), i), rank));
            }
        }
        // Sort by hash, and equal hashes by id, so the order of discovery does not matter.
        points.sort_unstable();
        assert!(u32::try_from(points.len()).is_ok(), "a ring has at most 2^32 - 1 points");

        let digest = digest(parameters, members, &by_id, &points);
        let (starts, shift) = start_index(&points);
        Self {
            parameters,
            members: members.len(),
            with_points: by_id.len(),
            bottoms: points.iter().map(|&(hash, _)| hash as u32).collect(),
            tops: points.iter().map(|&(hash, _)| top(hash)).chain([u32::MAX; WINDOW]).collect(),
            owners: points.iter().map(|&(_, rank)| narrow(by_id[rank])).collect(),
            starts,
            shift,
            digest,
            shares: OnceLock::new(),
        }
    }

    /// The member that owns `key`; `None` if the ring has no points.
    pub fn lookup(&self, key: &[u8]) -> Option<usize> {
        self.nearest(key).map(|point| self.owner(point))
    }

    /// The members in the order to try them for `key`: the owner first, then clockwise, each member once.
    pub fn walk(&self, key: &[u8]) -> Walk<'_> {
        let (left, unseen) = (self.owners.len(), self.with_points);
        Walk { ring: self, point: self.nearest(key), left, unseen, first: None, seen: Vec::new() }
    }

    /// The probes of `key`, in the order in which a lookup makes them. Their winner is the owner.
    pub fn probes(&self, key: &[u8]) -> Vec<Probe> {
        let winner = self.landings(key).reduce(|best, landing| self.nearer(best, landing));
        let probe = |landing: Landing| Probe {
            at: landing.at,
            point: self.hash(landing.point),
            owner: self.owner(landing.point),
            wins: winner.is_some_and(|winner| winner.at == landing.at),
        };
        self.landings(key).map(probe).collect()
    }

    /// A fingerprint of all points and parameters. Instances with the same digest pick the same members.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// Number of points on the ring.
    pub fn points(&self) -> usize {
        self.owners.len()
    }

    /// The parameters that the ring was built with.
    pub fn parameters(&self) -> Parameters {
        self.parameters
    }

    /// The point at the shortest clockwise distance from any of the key's probes; the first probe wins a tie.
    fn nearest(&self, key: &[u8]) -> Option<usize> {
        self.landings(key).reduce(|best, landing| self.nearer(best, landing)).map(|best| best.point)
    }

    /// Where the probes of a key are, and which points they find; nothing if the ring has no points.
    fn landings(&self, key: &[u8]) -> impl Iterator<Item = Landing> {
        let probes = if self.owners.is_empty() { 0 } else { self.parameters.probes };
        let key = hash_key(self.parameters.seed, key);
        (0..probes).map(move |probe| {
            let at = if probe == 0 { key } else { probe_of(key, probe) };
            Landing { at, point: self.next_point(at) }
        })
    }

    /// The first point at or clockwise after `at`; wraps at the top of the circle.
    fn next_point(&self, at: u64) -> usize {
        let mut point = self.starts[(at >> self.shift) as usize] as usize;
        // This counts instead of searching. The number of points before `at` is random, so the CPU would mispredict a
        // search's branch half of the time.
        loop {
            let window = &self.tops[point..point + WINDOW];
            let before: usize = window.iter().map(|&other| usize::from(other < top(at))).sum();
            point += before;
            if before < WINDOW {
                break;
            }
        }
        while point < self.owners.len() && self.tops[point] == top(at) && self.hash(point) < at {
            point += 1;
        }
        if point < self.owners.len() { point } else { 0 }
    }

    /// The landing that is nearer to its point; the first one if both are equally near.
    fn nearer(&self, first: Landing, second: Landing) -> Landing {
        let roughly = |landing: Landing| self.tops[landing.point].wrapping_sub(top(landing.at));
        let exactly = |landing: Landing| self.hash(landing.point).wrapping_sub(landing.at);
        // Subtracting upper halves gives the upper half of the true distance, or one more.
        let (a, b) = (roughly(second), roughly(first));
        let is_second = if a.abs_diff(b) > 1 { a < b } else { exactly(second) < exactly(first) };
        if is_second { second } else { first }
    }

    fn hash(&self, point: usize) -> u64 {
        u64::from(self.tops[point]) << 32 | u64::from(self.bottoms[point])
    }

    fn owner(&self, point: usize) -> usize {
        self.owners[point] as usize
    }
}

/// The position of a key's probe, and the point that it found.
#[derive(Clone, Copy)]
struct Landing {
    at: u64,
    point: usize,
}

/// A point's hash: seahash of seed (8 bytes, little-endian), id, tag (1 byte), number (4 bytes, little-endian).
fn hash_point(bytes: &mut Vec<u8>, seed: u64, id: &[u8], number: u32) -> u64 {
    bytes.clear();
    bytes.extend_from_slice(&seed.to_le_bytes());
    bytes.extend_from_slice(id);
    bytes.push(TAG_POINT);
    bytes.extend_from_slice(&number.to_le_bytes());
    seahash::hash(bytes)
}

/// A key's hash: seahash of seed (8 bytes, little-endian), key, tag (1 byte).
fn hash_key(seed: u64, key: &[u8]) -> u64 {
    /// Bytes on the stack, enough for any address key; longer keys use the heap.
    const INLINE: usize = 32;
    let mut stack = [0; INLINE];
    let mut heap = Vec::new();
    let bytes = if key.len() + 9 <= INLINE {
        &mut stack[..key.len() + 9]
    } else {
        heap.resize(key.len() + 9, 0);
        &mut heap[..]
    };
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..8 + key.len()].copy_from_slice(key);
    bytes[8 + key.len()] = TAG_KEY;
    seahash::hash(bytes)
}

/// The position of probe `number` ≥ 1 of a key: the key's hash plus `number` steps of 2^64 divided by the golden ratio,
/// then seahash's diffusion. This costs a tenth of hashing the key again and spreads as evenly.
fn probe_of(key: u64, number: u32) -> u64 {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    const PRIME: u64 = 0x6eed_0e9d_a4d9_4a4f;
    let x = key.wrapping_add(STEP.wrapping_mul(u64::from(number))).wrapping_mul(PRIME);
    (x ^ ((x >> 32) >> (x >> 60))).wrapping_mul(PRIME)
}

fn top(hash: u64) -> u32 {
    (hash >> 32) as u32
}

fn order_by_id(members: &[Member<'_>]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..members.len()).collect();
    order.sort_by_key(|&member| members[member].id);
    order
}

fn digest(parameters: Parameters, members: &[Member<'_>], by_id: &[usize], points: &[(u64, usize)]) -> u64 {
    let mut bytes = Vec::with_capacity(16 + points.len() * 12);
    bytes.extend_from_slice(&parameters.seed.to_le_bytes());
    bytes.extend_from_slice(&parameters.virtual_nodes.to_le_bytes());
    bytes.extend_from_slice(&parameters.probes.to_le_bytes());
    for &member in by_id {
        let id = members[member].id.as_bytes();
        bytes.extend_from_slice(&(id.len() as u64).to_le_bytes());
        bytes.extend_from_slice(id);
    }
    for &(hash, rank) in points {
        bytes.extend_from_slice(&hash.to_le_bytes());
        bytes.extend_from_slice(&narrow(rank).to_le_bytes());
    }
    seahash::hash(&bytes)
}

/// Points compared at a time in a lookup.
const WINDOW: usize = 8;

/// Creates one start per two to four points, so a lookup nearly always ends within its first window.
fn start_index(points: &[(u64, usize)]) -> (Vec<u32>, u32) {
    let bits = points.len().next_power_of_two().trailing_zeros().max(3) - 2;
    let shift = 64 - bits;
    let mut starts = Vec::with_capacity(1 << bits);
    let mut point = 0;
    for top in 0..1_u64 << bits {
        while point < points.len() && points[point].0 < top << shift {
            point += 1;
        }
        starts.push(narrow(point));
    }
    (starts, shift)
}

fn narrow(index: usize) -> u32 {
    u32::try_from(index).expect("numbers of members and points fit in 32 bits")
}
