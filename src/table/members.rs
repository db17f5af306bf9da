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
    states: [usize; State::ALL.len()],
    /// Healthy backends that do not take all of their keys yet.
    slow: usize,
    /// Backends with an address that do not drain on an order.
    taking: usize,
    roster: u64,
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
        let is_healthy = state == State::Healthy;
        let (is_slow, is_taking) =
            (is_healthy && backend.admission != Admission::ALL, has_address && backend.drain.is_none());
        let count = |counter: &mut usize, counts: bool| match (counts, is_in) {
            (true, true) => *counter += 1,
            (true, false) => *counter -= 1,
            (false, _) => {}
        };
        count(&mut self.states[state.index()], true);
        count(&mut self.slow, is_slow);
        count(&mut self.taking, is_taking);
        self.healthy.set(position, is_in && is_healthy && has_address);
        self.reachable.set(position, is_in && has_address && state != State::Draining);
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

    /// Number of backends that have an address and do not drain.
    pub fn taking(&self) -> usize {
        self.taking
    }

    /// Whether some of the healthy backends start slowly, and others take all of their keys.
    pub(super) fn some_start_slowly(&self) -> bool {
        self.slow > 0 && self.slow < self.count(State::Healthy)
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
#[derive(Debug, Clone, Default)]
pub(super) struct Bits {
    words: Vec<u64>,
    count: usize,
}

impl Bits {
    fn new(length: usize) -> Self {
        Self { words: vec![0; length.div_ceil(64)], count: 0 }
    }

    fn set(&mut self, position: usize, is_in: bool) {
        let (word, bit) = (&mut self.words[position / 64], 1 << (position % 64));
        match (is_in, *word & bit != 0) {
            (true, false) => self.count += 1,
            (false, true) => self.count -= 1,
            _ => return,
        }
        *word ^= bit;
    }

    /// Whether the position is in the set.
    pub(super) fn has(&self, position: usize) -> bool {
        self.words[position / 64] & 1 << (position % 64) != 0
    }

    /// Number of positions in the set.
    pub(super) fn count(&self) -> usize {
        self.count
    }
}
