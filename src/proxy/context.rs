//! State that the connections of one worker share: the worker and its listeners.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use slab::Slab;
use tokio::sync::Notify;

use super::Serving;
use super::connection::{Connection, ConnectionId};
use super::handover::Offered;
use super::pipe::PipePool;
use super::stats::{ListenerShare, WorkerStats};
use super::write_backlog::WriteBacklog;
use crate::table::{LocalTable, TableReader};

/// State shared by a worker's connections. It never crosses to another thread.
#[derive(Debug)]
pub(super) struct Worker {
    /// Its number, from 0.
    pub(super) index: usize,
    pub(super) stats: Arc<WorkerStats>,
    pub(super) scratch: RefCell<Box<[u8]>>,
    pub(super) write_backlog: RefCell<WriteBacklog>,
    pub(super) pipes: RefCell<PipePool>,
    /// Every open connection.
    pub(super) open: RefCell<Slab<Rc<Connection>>>,
    /// The id of the next connection.
    pub(super) next_id: Cell<ConnectionId>,
    /// Time to the last tick of the timeout task, from [`START`](super::timeouts::START) on: coarse, and cheap to read.
    pub(super) clock: Cell<Duration>,
    /// Connections that stand still and are about to be offered to a successor.
    pub(super) offers: RefCell<Vec<(ConnectionId, Offered)>>,
    /// Interval that the timeouts of the current listeners need.
    pub(super) tick: Cell<Duration>,
    /// Tells the timeout task of a new interval.
    pub(super) new_tick: Notify,
    /// Short connections that have ended since the last tick.
    pub(super) short: Cell<u64>,
    /// Payload bytes reported since the last tick.
    pub(super) bytes: Cell<u64>,
    /// Pipes whose bytes were moved to memory.
    pub(super) moved_out: Cell<usize>,
    /// Reads of at least this many bytes count towards splicing; `None`: splicing is off.
    pub(super) splice_from: Option<usize>,
}

/// A listener as one worker sees it.
#[derive(Debug)]
pub(super) struct WorkerListener {
    pub(super) serving: Arc<Serving>,
    pub(super) worker: Rc<Worker>,
    /// The table of each route.
    pub(super) tables: Box<[RefCell<TableReader>]>,
    /// Interval of the timeout task that the timeouts of the routes need.
    pub(super) tick: Duration,
}

impl WorkerListener {
    /// The current table of a route's pool.
    pub(super) fn table(&self, route: usize) -> LocalTable {
        self.tables[route].borrow_mut().load()
    }

    /// This worker's share of the listener's counters.
    pub(super) fn share(&self) -> &ListenerShare {
        self.serving.stats.share(self.worker.index)
    }
}
