//! Stage account: a guard that counts a connection once when it opens and once when it ends.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Waker;
use std::time::{Duration, Instant};

use super::access_log::Line;
use super::worker::Lane;
use crate::backend::{Backend, Live, Moved};
use crate::label_enum;
use crate::labels::{Label as _, Tally};

label_enum! {
    /// Why a connection ended that was served.
    pub enum End {
        /// Both sides ended their streams, and everything was delivered.
        Finished => "finished",
        /// The client broke it off; the backend got a reset.
        ClientReset => "client_reset",
        /// The backend broke it off; the client got a reset.
        BackendReset => "backend_reset",
        /// The client stopped answering (keepalive or user timeout).
        ClientLost => "client_lost",
        /// The backend stopped answering (keepalive or user timeout).
        BackendLost => "backend_lost",
        /// Nothing moved for the pool's `idle` timeout.
        IdleTimeout => "idle_timeout",
        /// One side had ended, and nothing moved for the pool's `half_closed` timeout.
        HalfClosedTimeout => "half_closed_timeout",
        /// Ringway stopped and the pool's `drain` had passed.
        Shutdown => "shutdown",
        /// Answered by Ringway itself (`answer_status`).
        Answered => "answered",
        /// Our fault: the system had no memory for it.
        LocalError => "local_error",
        /// Our fault: its task ended without saying why.
        Dropped => "dropped",
    }
}

label_enum! {
    /// Why a connection that was accepted was not served; the client got a reset.
    pub enum Refusal {
        /// The pool has no backend that may get connections.
        NoBackend => "no_backend",
        /// Every backend that was tried failed.
        ConnectFailed => "connect_failed",
        /// Our fault: no file descriptor for the connection to the backend.
        NoDescriptors => "no_descriptors",
    }
}

label_enum! {
    /// Why accepting failed.
    pub enum AcceptError {
        /// The process or the system is out of file descriptors.
        NoDescriptors => "no_descriptors",
        /// The system is out of memory for sockets.
        NoMemory => "no_memory",
        /// The client had gone before it was accepted.
        Aborted => "aborted",
        /// Anything else.
        Other => "other",
    }
}

/// Counters of one listener, shared by all workers. Written once or twice a connection.
#[derive(Debug, Default)]
pub struct ListenerStats {
    /// Connections accepted so far: those active, ended and refused.
    pub accepted: AtomicU64,
    /// Connections open at the moment.
    pub active: AtomicU64,
    /// Connections that ended, by reason.
    pub ended: Tally<End>,
    /// Connections that were not served, by reason.
    pub refused: Tally<Refusal>,
    /// Failed accepts, by error.
    pub accept_errors: Tally<AcceptError>,
}

/// How a connection came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Ended(End),
    Refused(Refusal),
}

impl Outcome {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Ended(end) => end.as_str(),
            Self::Refused(refusal) => refusal.as_str(),
        }
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

/// What the sweep sees of a connection, and how it speaks to its task.
#[derive(Debug)]
pub(super) struct Progress {
    pub(super) lane: Rc<Lane>,
    pub(super) backend: Arc<Live>,
    pub(super) from_client: Traffic,
    pub(super) to_client: Traffic,
    /// The worker's clock when bytes last moved.
    pub(super) last_active: Cell<Duration>,
    /// One side has ended its stream.
    pub(super) half_closed: Cell<bool>,
    /// Bytes wait for a side that does not take them.
    pub(super) blocked: Cell<bool>,
    /// Set by the sweep: look whether a side has broken.
    pub(super) inspect: Cell<bool>,
    /// Set by the sweep: end, for this reason.
    pub(super) verdict: Cell<Option<End>>,
    pub(super) waker: RefCell<Option<Waker>>,
}

impl Progress {
    /// Brings the shared counters up to date.
    pub(super) fn report(&self) {
        self.from_client.report(&self.backend.from_client);
        self.to_client.report(&self.backend.to_client);
    }
}

/// The guard. Dropping it closes the account, with [`End::Dropped`] where no outcome was set.
#[derive(Debug)]
pub(super) struct Account {
    lane: Rc<Lane>,
    client: SocketAddr,
    opened: Instant,
    outcome: Outcome,
    served: Option<Served>,
}

/// What is known once a backend was found.
#[derive(Debug)]
struct Served {
    id: Arc<str>,
    address: SocketAddr,
    connected_after: Duration,
    slot: usize,
    progress: Rc<Progress>,
}

impl Account {
    /// Counts a connection that was accepted.
    pub(super) fn open(lane: &Rc<Lane>, client: SocketAddr) -> Self {
        lane.stats.accepted.fetch_add(1, Ordering::Relaxed);
        lane.stats.active.fetch_add(1, Ordering::Relaxed);
        lane.worker.stats.connections.fetch_add(1, Ordering::Relaxed);
        Self {
            lane: Rc::clone(lane),
            client,
            opened: Instant::now(),
            outcome: Outcome::Ended(End::Dropped),
            served: None,
        }
    }

    /// Counts the connection for its backend, and shows it to the sweep.
    pub(super) fn serve(&mut self, backend: &Backend, address: SocketAddr) -> Rc<Progress> {
        backend.live.total.fetch_add(1, Ordering::Relaxed);
        backend.live.active.fetch_add(1, Ordering::Relaxed);
        let progress = Rc::new(Progress {
            lane: Rc::clone(&self.lane),
            backend: Arc::clone(&backend.live),
            from_client: Traffic::default(),
            to_client: Traffic::default(),
            last_active: Cell::new(self.lane.worker.clock.get()),
            half_closed: Cell::new(false),
            blocked: Cell::new(false),
            inspect: Cell::new(false),
            verdict: Cell::new(None),
            waker: RefCell::new(None),
        });
        let slot = self.lane.worker.open.borrow_mut().insert(Rc::clone(&progress));
        self.served = Some(Served {
            id: Arc::clone(&backend.id),
            address,
            connected_after: self.opened.elapsed(),
            slot,
            progress: Rc::clone(&progress),
        });
        progress
    }

    /// Sets how the connection came out; the account closes.
    pub(super) fn close(mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let lane = &self.lane;
        let duration = self.opened.elapsed();
        if let Some(served) = &self.served {
            lane.worker.open.borrow_mut().try_remove(served.slot);
            served.progress.report();
            served.progress.backend.active.fetch_sub(1, Ordering::Relaxed);
        }
        if let Some(log) = &lane.worker.access_log {
            log.write(&Line {
                listener: &lane.name,
                pool: &lane.route.pool,
                client: self.client,
                backend: self.served.as_ref().map(|served| (&*served.id, served.address)),
                outcome: self.outcome.as_str(),
                from_client: self.served.as_ref().map_or(0, |served| served.progress.from_client.total()),
                to_client: self.served.as_ref().map_or(0, |served| served.progress.to_client.total()),
                connect: self.served.as_ref().map(|served| served.connected_after),
                duration,
            });
        }
        lane.connection_seconds.record(duration.as_secs_f64());
        match self.outcome {
            Outcome::Ended(end) => lane.stats.ended.count(end),
            Outcome::Refused(refusal) => lane.stats.refused.count(refusal),
        }
        lane.worker.stats.connections.fetch_sub(1, Ordering::Relaxed);
        lane.stats.active.fetch_sub(1, Ordering::Relaxed);
    }
}
