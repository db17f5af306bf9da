//! State that the connections of one worker share: the worker, its listeners, and the progress of each connection.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Waker;
use std::time::Duration;

use slab::Slab;
use tokio::sync::Notify;

use super::Serving;
use super::pipe::PipePool;
use super::stats::{EndReason, ListenerShare, WorkerStats};
use super::write_backlog::WriteBacklog;
use crate::backend::{BackendPermit, Moved};
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
    /// Every connection that is being relayed, for the timeout task.
    pub(super) open: RefCell<Slab<Rc<Progress>>>,
    /// Time from the worker's start to the last tick of the timeout task: coarse, and cheap to read.
    pub(super) clock: Cell<Duration>,
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
    pub(super) table: RefCell<TableReader>,
    /// Interval of the timeout task that the timeouts of the route need.
    pub(super) tick: Duration,
}

impl WorkerListener {
    /// The pool's current table.
    pub(super) fn table(&self) -> LocalTable {
        self.table.borrow_mut().load()
    }

    /// This worker's share of the listener's counters.
    pub(super) fn share(&self) -> &ListenerShare {
        self.serving.stats.share(self.worker.index)
    }
}

/// Bytes that a connection moved in one direction, by path.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    pub(super) copied: Cell<u64>,
    pub(super) spliced: Cell<u64>,
    /// The bytes (copied, spliced) already added to the shared counters.
    reported: (Cell<u64>, Cell<u64>),
}

impl Traffic {
    pub(super) fn total(&self) -> u64 {
        self.copied.get() + self.spliced.get()
    }

    /// Adds the bytes since the last report to the shared counters, and returns their number.
    fn report(&self, moved: &Moved) -> u64 {
        let mut sum = 0;
        for (here, reported, shared) in
            [(&self.copied, &self.reported.0, &moved.copied), (&self.spliced, &self.reported.1, &moved.spliced)]
        {
            let new = here.get() - reported.replace(here.get());
            if new > 0 {
                shared.fetch_add(new, Ordering::Relaxed);
            }
            sum += new;
        }
        sum
    }
}

/// Whether TCP keepalive is on towards a connection's backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KeepaliveState {
    /// Off: short connections save the system calls.
    NotYet,
    /// The timeout task has seen the connection, so it is not a short one. The relay turns keepalive on next.
    Due,
    On,
}

/// The state of a connection that the timeout task reads, and the flags through which it controls the relay.
#[derive(Debug)]
pub(super) struct Progress {
    pub(super) listener: Rc<WorkerListener>,
    pub(super) permit: BackendPermit,
    pub(super) from_client: Traffic,
    pub(super) to_client: Traffic,
    /// Set by the relay when bytes move or a stream ends, until the next tick.
    pub(super) is_active: Cell<bool>,
    /// The worker's clock at the tick that last found the connection active.
    pub(super) last_active: Cell<Duration>,
    /// When the connection reaches its maximum age, by the worker's clock.
    pub(super) expires: Option<Duration>,
    /// One side has ended its stream.
    pub(super) half_closed: Cell<bool>,
    /// Bytes wait for a side that does not accept them.
    pub(super) blocked: Cell<bool>,
    /// Whether TCP keepalive is on towards the backend.
    pub(super) keepalive: Cell<KeepaliveState>,
    /// Set by the timeout task: the relay moves the bytes of its pipes to memory.
    pub(super) give_up_pipes: Cell<bool>,
    /// Set by the timeout task: the relay checks whether a side has broken.
    pub(super) inspect: Cell<bool>,
    /// Set by the timeout task: the relay ends the connection for this reason.
    pub(super) verdict: Cell<Option<EndReason>>,
    pub(super) waker: RefCell<Option<Waker>>,
}

impl Progress {
    /// Adds the bytes moved since the last report to the shared counters.
    pub(super) fn report(&self) {
        let live = self.permit.live();
        let moved = self.from_client.report(&live.from_client) + self.to_client.report(&live.to_client);
        let worker = &self.listener.worker;
        worker.bytes.set(worker.bytes.get() + moved);
    }
}
