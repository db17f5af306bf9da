//! The cell that holds a pool's current table: its atomic swap, and the readers of workers.

use std::rc::Rc;
use std::sync::Arc;

use arc_swap::ArcSwap;
use arc_swap::cache::Cache;
use tokio::sync::watch;

use super::Table;

/// The shared cell that holds a pool's current table. It can be swapped and watched, and is cheap to clone.
#[derive(Debug, Clone)]
pub struct TableCell {
    current: Arc<ArcSwap<Table>>,
    generation: watch::Sender<u64>,
}

impl TableCell {
    /// Creates a cell that holds `first` until the next [`TableCell::publish`].
    pub fn new(first: Table) -> Self {
        let generation = watch::Sender::new(first.generation);
        Self { current: Arc::new(ArcSwap::from_pointee(first)), generation }
    }

    /// Swaps the table. Readers keep the old table until they release it.
    pub fn publish(&self, table: Table) {
        let generation = table.generation;
        self.current.store(Arc::new(table));
        self.generation.send_replace(generation);
    }

    /// Identifies the cell as long as there is a handle on it.
    pub fn address(&self) -> usize {
        Arc::as_ptr(&self.current).addr()
    }

    /// The current table.
    pub fn load(&self) -> Arc<Table> {
        self.current.load_full()
    }

    /// Notifies of each swap; the value is the generation.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// Creates a reader with its own `Arc`; a read costs one atomic load while the table is unchanged.
    pub fn reader(&self) -> TableReader {
        let mut cache = Cache::new(Arc::clone(&self.current));
        let local = LocalTable(Rc::new(Arc::clone(cache.load())));
        TableReader { cache, local }
    }
}

/// A worker's cached view of a [`TableCell`].
#[derive(Debug)]
pub struct TableReader {
    cache: Cache<Arc<ArcSwap<Table>>, Arc<Table>>,
    local: LocalTable,
}

/// A worker's handle on a table. A clone changes the worker's own reference count, not the count that all workers share.
#[derive(Debug, Clone)]
#[expect(clippy::redundant_allocation, reason = "a clone of the `Rc` does not touch the count in the `Arc`")]
pub struct LocalTable(Rc<Arc<Table>>);

impl AsRef<Table> for LocalTable {
    fn as_ref(&self) -> &Table {
        &self.0
    }
}

impl TableReader {
    /// The current table.
    pub fn load(&mut self) -> LocalTable {
        let current = self.cache.load();
        if !Arc::ptr_eq(current, &self.local.0) {
            self.local = LocalTable(Rc::new(Arc::clone(current)));
        }
        self.local.clone()
    }
}
