//! The backends of a table. A copy shares all chunks that do not change. So the change of one backend costs the
//! same in a small pool and in a large one.

use std::ops::Index;
use std::sync::Arc;

use crate::backend::{Admission, Backend, State};
use crate::labels::Label as _;

/// Backends in a chunk: a change copies one chunk, and a copy of the list copies a pointer for each chunk.
const CHUNK: usize = 32;

/// The backends of a pool, sorted by id. The position of a backend is its owner number on the ring.
#[derive(Debug, Clone, Default)]
pub struct Members {
    chunks: Vec<Arc<[Backend]>>,
    length: usize,
    /// Healthy backends with an address.
    pub(super) healthy: Bits,
    /// Backends with an address that do not drain.
    pub(super) reachable: Bits,
    /// Those of them that have not been judged yet.
    pub(super) unknown: Bits,
    states: [usize; State::ALL.len()],
    /// The tiers that have backends on the ring, lowest first.
    tiers: Vec<Tier>,
    /// Backends on the ring with an address that do not drain.
    taking: usize,
    roster: u64,
}

/// The backends of one tier that are on the ring.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Tier {
    pub(super) number: u16,
    on_ring: usize,
    /// Backends whose health has been judged: they neither start nor drain.
    pub(super) rated: usize,
    pub(super) healthy: usize,
    pub(super) reachable: usize,
    /// Backends with an address that have not been judged yet.
    pub(super) unknown: usize,
    /// Healthy backends that do not take all of their keys yet.
    pub(super) slow: usize,
    /// The sum of the weights, in parts of an [`Admission`].
    weight: u64,
    /// The part of it that healthy backends take.
    pub(super) healthy_weight: u64,
    pub(super) reachable_weight: u64,
    pub(super) unknown_weight: u64,
}

impl Tier {
    /// Whether less than this percentage of the weight is healthy.
    pub(super) fn is_below(&self, percent: u8) -> bool {
        // Those that have not been judged may turn out to be healthy.
        (self.healthy_weight + self.unknown_weight) * 100 < u64::from(percent) * self.weight
    }
}

impl Members {
    /// The members of a pool. `roster` is a number that no earlier list of the pool has had.
    pub fn new(backends: impl IntoIterator<Item = Backend>, roster: u64) -> Self {
        let mut backends = backends.into_iter().peekable();
        let mut members = Self { roster, ..Self::default() };
        while backends.peek().is_some() {
            let chunk: Arc<[Backend]> = backends.by_ref().take(CHUNK).collect();
            members.length += chunk.len();
            members.chunks.push(chunk);
        }
        members.healthy = Bits::new(members.length);
        members.reachable = Bits::new(members.length);
        members.unknown = Bits::new(members.length);
        for n in 0..members.length {
            members.note(n, true);
        }
        members
    }

    /// Replaces the backend at `position`.
    ///
    /// # Panics
    /// Beyond the end of the list.
    pub fn set(&mut self, position: usize, backend: Backend) {
        self.note(position, false);
        let before = &mut Arc::make_mut(&mut self.chunks[position / CHUNK])[position % CHUNK];
        let is_elsewhere = (&before.address, before.incarnation) != (&backend.address, backend.incarnation);
        *before = backend;
        self.roster += u64::from(is_elsewhere);
        self.note(position, true);
    }

    /// Adds a backend to the counts, or takes it out of them.
    fn note(&mut self, position: usize, is_in: bool) {
        let backend = &self[position];
        let (state, has_address) = (backend.state, backend.address.is_some());
        let (number, weight) = (backend.membership.tier, u64::from(backend.membership.weight));
        // The state of what stands beside a slot is no state of the pool.
        let is_own = backend.beside.is_none();
        let (admission, is_drained) = (backend.admission, backend.drain.is_some());
        // Without points on the ring, no key leads to a backend.
        let is_on_ring = backend.membership_on_ring().weight > 0;
        let is_healthy = state == State::Healthy && has_address && is_on_ring;
        let is_reachable = state != State::Draining && has_address && is_on_ring;
        let is_unknown = state == State::Starting && is_reachable;
        let is_slow = is_healthy && admission != Admission::ALL;
        let count = |counter: &mut usize, counts: bool| match (counts, is_in) {
            (true, true) => *counter += 1,
            (true, false) => *counter -= 1,
            (false, _) => {}
        };
        count(&mut self.states[state.index()], is_own);
        count(&mut self.taking, has_address && !is_drained && is_on_ring);
        self.healthy.set(position, is_in && is_healthy);
        self.reachable.set(position, is_in && is_reachable);
        self.unknown.set(position, is_in && is_unknown);
        if !is_on_ring {
            return;
        }
        let found = self.tiers.binary_search_by_key(&number, |tier| tier.number);
        let at = found.unwrap_or_else(|at| {
            self.tiers.insert(at, Tier { number, ..Tier::default() });
            at
        });
        let tier = &mut self.tiers[at];
        count(&mut tier.on_ring, true);
        count(&mut tier.rated, !matches!(state, State::Starting | State::Draining));
        count(&mut tier.healthy, is_healthy);
        count(&mut tier.reachable, is_reachable);
        count(&mut tier.unknown, is_unknown);
        count(&mut tier.slow, is_slow);
        let whole = weight * Admission::ALL.raw();
        let weigh = |sum: &mut u64, weight: u64, counts: bool| match (counts, is_in) {
            (true, true) => *sum += weight,
            (true, false) => *sum -= weight,
            (false, _) => {}
        };
        weigh(&mut tier.weight, whole, true);
        weigh(&mut tier.healthy_weight, weight * admission.raw(), is_healthy);
        weigh(&mut tier.reachable_weight, whole, is_reachable);
        weigh(&mut tier.unknown_weight, whole, is_unknown);
        if tier.on_ring == 0 {
            self.tiers.remove(at);
        }
    }

    /// Number of backends.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there is no backend.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// All backends, sorted by id.
    pub fn iter(&self) -> impl Iterator<Item = &Backend> {
        self.chunks.iter().flat_map(|chunk| chunk.iter())
    }

    /// The backend with this id.
    pub fn find(&self, id: &str) -> Option<&Backend> {
        let chunk = self.chunks.partition_point(|chunk| chunk.last().is_some_and(|last| &*last.id < id));
        let chunk = self.chunks.get(chunk)?;
        let position = chunk.binary_search_by(|backend| (*backend.id).cmp(id)).ok()?;
        Some(&chunk[position])
    }

    /// Number of backends in this state.
    pub fn count(&self, state: State) -> usize {
        self.states[state.index()]
    }

    /// Number of backends that get connections, or would if they were healthy.
    pub fn taking(&self) -> usize {
        self.taking
    }

    /// Whether some healthy backends of the tier take a greater part of their keys than others.
    pub(super) fn admissions_differ(&self, tier: &Tier) -> bool {
        let mut admissions = self.admissions(tier.number);
        let first = admissions.next();
        tier.slow > 0 && (tier.slow < tier.healthy || admissions.any(|one| Some(one) != first))
    }

    /// The parts of their keys that the healthy backends of a tier take.
    pub(super) fn admissions(&self, tier: u16) -> impl Iterator<Item = Admission> {
        let healthy = self.iter().enumerate().filter(|(position, _)| self.healthy.has(*position));
        healthy.filter(move |(_, one)| one.membership.tier == tier).map(|(_, one)| one.admission)
    }

    /// Whether the same positions are healthy, reachable and unknown.
    pub(super) fn has_sets_of(&self, other: &Self) -> bool {
        (&self.healthy, &self.reachable, &self.unknown) == (&other.healthy, &other.reachable, &other.unknown)
    }

    /// The tiers that have backends on the ring, lowest first.
    pub(super) fn tiers(&self) -> &[Tier] {
        &self.tiers
    }

    /// A number that changes when a backend joins, leaves, or has another incarnation or address.
    pub fn roster(&self) -> u64 {
        self.roster
    }
}

impl Index<usize> for Members {
    type Output = Backend;

    fn index(&self, position: usize) -> &Backend {
        &self.chunks[position / CHUNK][position % CHUNK]
    }
}

impl<'a> IntoIterator for &'a Members {
    type Item = &'a Backend;
    type IntoIter = Box<dyn Iterator<Item = &'a Backend> + 'a>;

    fn into_iter(self) -> Self::IntoIter {
        Box::new(self.iter())
    }
}

/// A set of positions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Bits {
    words: Vec<u64>,
}

impl Bits {
    fn new(length: usize) -> Self {
        Self { words: vec![0; length.div_ceil(64)] }
    }

    fn set(&mut self, position: usize, is_in: bool) {
        let (word, bit) = (&mut self.words[position / 64], 1 << (position % 64));
        if is_in {
            *word |= bit;
        } else {
            *word &= !bit;
        }
    }

    /// The positions in the set, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = usize> {
        let in_word = |(n, &word): (usize, &u64)| {
            let mut left = word;
            std::iter::from_fn(move || {
                let next = (left != 0).then(|| n * 64 + left.trailing_zeros() as usize);
                left &= left.wrapping_sub(1);
                next
            })
        };
        self.words.iter().enumerate().flat_map(in_word)
    }

    /// Whether the position is in the set.
    pub(super) fn has(&self, position: usize) -> bool {
        self.words[position / 64] & 1 << (position % 64) != 0
    }
}
