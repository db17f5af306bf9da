//! The table: the immutable snapshot of a pool (ring and backends) that the data plane reads, and its
//! atomic swap. The control plane's publisher is the only writer.

use std::net::SocketAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use arc_swap::cache::Cache;
use tokio::sync::watch;

use crate::backend::{Backend, State};
use crate::ring::Ring;

/// A snapshot of one pool. Backend `i` is owner `i` of the ring.
#[derive(Debug)]
pub struct Table {
    generation: u64,
    ring: Arc<Ring>,
    backends: Box<[Backend]>,
    any_healthy: bool,
}

impl Table {
    /// Joins a ring and the backends it was built from, in the same order.
    pub fn new(generation: u64, ring: Arc<Ring>, backends: Box<[Backend]>) -> Self {
        let any_healthy = backends.iter().any(|backend| backend.state == State::Healthy);
        Self { generation, ring, backends, any_healthy }
    }

    /// Counts the snapshots of this pool, from 0.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The ring of this snapshot.
    pub fn ring(&self) -> &Arc<Ring> {
        &self.ring
    }

    /// Every backend, whatever its state.
    pub fn backends(&self) -> &[Backend] {
        &self.backends
    }

    /// Whether any backend is healthy.
    pub fn any_healthy(&self) -> bool {
        self.any_healthy
    }

    /// The backends that may get the connection of `key`, in the order to try them.
    ///
    /// Unhealthy ones are walked past. Where none is healthy, all that have an address are tried rather than
    /// none: the checks may be wrong, and the connect will tell.
    pub fn candidates(&self, key: &[u8]) -> impl Iterator<Item = (&Backend, SocketAddr)> {
        self.ring.walk(key).filter_map(|owner| {
            let backend = &self.backends[owner];
            let may = match backend.state {
                State::Healthy => true,
                State::Starting | State::Unhealthy | State::CrashLoop => !self.any_healthy,
                State::Draining => false,
            };
            backend.address.filter(|_| may).map(|address| (backend, address))
        })
    }
}

/// The place where a pool's current table is swapped and watched. Cheap to clone.
#[derive(Debug, Clone)]
pub struct TableCell {
    current: Arc<ArcSwap<Table>>,
    generation: watch::Sender<u64>,
}

impl TableCell {
    /// A cell that shows `first` until the next [`TableCell::publish`].
    pub fn new(first: Table) -> Self {
        let generation = watch::Sender::new(first.generation);
        Self { current: Arc::new(ArcSwap::from_pointee(first)), generation }
    }

    /// Swaps the table. Readers that hold the old one keep it until they are done.
    pub fn publish(&self, table: Table) {
        let generation = table.generation;
        self.current.store(Arc::new(table));
        self.generation.send_replace(generation);
    }

    /// The table of this moment.
    pub fn load(&self) -> Arc<Table> {
        self.current.load_full()
    }

    /// Tells of each swap; the value is the generation.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// A reader that keeps its own `Arc`, so that reading costs one load while nothing has changed.
    pub fn reader(&self) -> TableReader {
        TableReader(Cache::new(Arc::clone(&self.current)))
    }
}

/// A worker's cached view of a [`TableCell`].
#[derive(Debug)]
pub struct TableReader(Cache<Arc<ArcSwap<Table>>, Arc<Table>>);

impl TableReader {
    /// The table of this moment.
    pub fn load(&mut self) -> &Arc<Table> {
        self.0.load()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::backend::{Health, Live};
    use crate::ring::{Member, Parameters};

    fn table(states: &[(State, bool)]) -> Table {
        let names: Vec<String> = (0..states.len()).map(|n| format!("b{n}")).collect();
        let members: Vec<_> = names.iter().map(|id| Member { id, weight: 1 }).collect();
        let ring = Ring::build(Parameters { virtual_nodes: 40, probes: 3, seed: 0 }, &members);
        let backends = std::iter::zip(&names, states)
            .map(|(id, &(state, reachable))| Backend {
                id: id.as_str().into(),
                address: reachable.then(|| SocketAddr::from(([127, 0, 0, 1], 1))),
                weight: 1,
                state,
                replica: None,
                incarnation: 0,
                restarts: 0,
                last_exit: None,
                reported_bad: false,
                health: Health { last: None, since: Instant::now() },
                live: Arc::new(Live::default()),
            })
            .collect();
        Table::new(0, Arc::new(ring), backends)
    }

    fn ids(table: &Table, key: &[u8]) -> Vec<String> {
        table.candidates(key).map(|(backend, _)| backend.id.to_string()).collect()
    }

    #[test]
    fn only_healthy_backends_are_candidates_and_they_keep_the_walk_s_order() {
        let all = table(&[(State::Healthy, true); 5]);
        let some = table(&[
            (State::Healthy, true),
            (State::Unhealthy, true),
            (State::Draining, true),
            (State::Healthy, true),
            (State::Starting, true),
        ]);
        for key in 0_u32..200 {
            let mut expected = ids(&all, &key.to_le_bytes());
            expected.retain(|id| id == "b0" || id == "b3");
            assert_eq!(ids(&some, &key.to_le_bytes()), expected);
        }
    }

    #[test]
    fn where_none_is_healthy_all_with_an_address_are_tried_but_draining_ones() {
        let table = table(&[
            (State::Unhealthy, true),
            (State::Starting, false),
            (State::CrashLoop, true),
            (State::Draining, true),
        ]);
        let mut found = ids(&table, b"key");
        found.sort();
        assert_eq!(found, ["b0", "b2"]);
    }

    #[test]
    fn readers_see_a_swap() {
        let cell = TableCell::new(table(&[]));
        let mut reader = cell.reader();
        assert_eq!(reader.load().generation(), 0);
        let next = table(&[]);
        cell.publish(Table { generation: 7, ..next });
        assert_eq!((reader.load().generation(), cell.load().generation(), *cell.watch().borrow()), (7, 7, 7));
    }
}
