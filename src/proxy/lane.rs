//! What the connections of one worker share: the worker, its listeners, and each other's progress.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Waker;
use std::time::Duration;

use slab::Slab;

use super::Serving;
use super::pipe::PipePool;
use super::remainders::Remainders;
use super::stats::{End, WorkerStats};
use crate::backend::{Moved, Place};
use crate::table::{Table, TableReader};

/// What a worker's connections share; never crosses to another thread.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) stats: Arc<WorkerStats>,
    pub(super) scratch: RefCell<Box<[u8]>>,
    pub(super) remainders: RefCell<Remainders>,
    pub(super) pipes: RefCell<PipePool>,
    /// Every connection that is relayed, for the sweep.
    pub(super) open: RefCell<Slab<Rc<Progress>>>,
    /// Time since the worker's start as of the last sweep: coarse, and free to read.
    pub(super) clock: Cell<Duration>,
    /// Time between sweeps: what the shortest timeout of any listener needs.
    pub(super) tick: Cell<Duration>,
    /// Bytes of a read that speaks for splicing; `None`: nothing is spliced.
    pub(super) splice_from: Option<usize>,
}

/// A listener as one worker sees it.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) serving: Serving,
    pub(super) worker: Rc<Worker>,
    pub(super) table: RefCell<TableReader>,
}

impl Lane {
    /// The pool's table of this moment.
    pub(super) fn table(&self) -> Arc<Table> {
        Arc::clone(self.table.borrow_mut().load())
    }
}

/// Bytes that a connection moved in one direction, by path.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    pub(super) copied: Cell<u64>,
    pub(super) spliced: Cell<u64>,
    /// What of them the shared counters already have.
    reported: (Cell<u64>, Cell<u64>),
}

impl Traffic {
    pub(super) fn total(&self) -> u64 {
        self.copied.get() + self.spliced.get()
    }

    fn report(&self, moved: &Moved) {
        for (here, reported, shared) in
            [(&self.copied, &self.reported.0, &moved.copied), (&self.spliced, &self.reported.1, &moved.spliced)]
        {
            let new = here.get() - reported.replace(here.get());
            if new > 0 {
                shared.fetch_add(new, Ordering::Relaxed);
            }
        }
    }
}

/// Whether the backend of a connection is probed when it is silent (TCP keepalive).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Probes {
    /// Short connections are spared the calls.
    NotYet,
    /// A sweep has met the connection: it lives long enough.
    Due,
    On,
}

/// What the sweep sees of a connection, and how it speaks to its task.
#[derive(Debug)]
pub(super) struct Progress {
    pub(super) lane: Rc<Lane>,
    pub(super) place: Place,
    pub(super) from_client: Traffic,
    pub(super) to_client: Traffic,
    /// The worker's clock when bytes last moved, or a stream last ended.
    pub(super) last_active: Cell<Duration>,
    /// By the worker's clock, when it is too old.
    pub(super) expires: Option<Duration>,
    /// One side has ended its stream.
    pub(super) half_closed: Cell<bool>,
    /// Bytes wait for a side that does not take them.
    pub(super) blocked: Cell<bool>,
    /// Whether the backend is probed when it is silent.
    pub(super) probes: Cell<Probes>,
    /// Set by the sweep: look whether a side has broken.
    pub(super) inspect: Cell<bool>,
    /// Set by the sweep: end, for this reason.
    pub(super) verdict: Cell<Option<End>>,
    pub(super) waker: RefCell<Option<Waker>>,
}

impl Progress {
    /// Brings the shared counters up to date.
    pub(super) fn report(&self) {
        let live = self.place.live();
        self.from_client.report(&live.from_client);
        self.to_client.report(&live.to_client);
    }
}
