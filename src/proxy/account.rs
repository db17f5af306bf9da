//! Stage account: a guard that counts a connection once when it opens and once when it ends.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::access_log::Line;
use super::key::{Key, KeyKind};
use super::lane::{Lane, Probes, Progress, Traffic};
use super::limit::Permit;
use super::stats::{End, Refusal};
use crate::backend::{Backend, Place};
use crate::labels::Label as _;

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

impl From<End> for Outcome {
    fn from(end: End) -> Self {
        Self::Ended(end)
    }
}

impl From<Refusal> for Outcome {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// The guard. Dropping it closes the account, with [`End::Dropped`] where no outcome was set.
#[derive(Debug)]
pub(super) struct Account {
    pub(super) lane: Rc<Lane>,
    pub(super) client: SocketAddr,
    /// Its place under the limits, until it is handed over with the connection.
    pub(super) permit: Option<Permit>,
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
    pub(super) fn open(lane: Rc<Lane>, client: SocketAddr, permit: Permit) -> Self {
        lane.serving.stats.accepted.fetch_add(1, Ordering::Relaxed);
        lane.serving.stats.active.fetch_add(1, Ordering::Relaxed);
        lane.worker.stats.connections.fetch_add(1, Ordering::Relaxed);
        Self {
            lane,
            client,
            permit: Some(permit),
            opened: Instant::now(),
            outcome: Outcome::Ended(End::Dropped),
            served: None,
        }
    }

    /// Counts the connection for its backend, and shows it to the sweep.
    pub(super) fn serve(&mut self, backend: &Backend, address: SocketAddr, place: Place) -> Rc<Progress> {
        backend.live.total.fetch_add(1, Ordering::Relaxed);
        let now = self.lane.worker.clock.get();
        let progress = Rc::new(Progress {
            lane: Rc::clone(&self.lane),
            place,
            from_client: Traffic::default(),
            to_client: Traffic::default(),
            last_active: Cell::new(now),
            expires: expiry(self.lane.serving.route.max_age, self.client, now),
            half_closed: Cell::new(false),
            blocked: Cell::new(false),
            probes: Cell::new(Probes::NotYet),
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
        }
        if let Some(log) = &lane.serving.access_log {
            log.write(&Line {
                listener: &lane.serving.name,
                pool: &lane.serving.route.pool,
                client: self.client,
                backend: self.served.as_ref().map(|served| (&*served.id, served.address)),
                outcome: self.outcome.as_str(),
                from_client: self.served.as_ref().map_or(0, |served| served.progress.from_client.total()),
                to_client: self.served.as_ref().map_or(0, |served| served.progress.to_client.total()),
                connect: self.served.as_ref().map(|served| served.connected_after),
                duration,
            });
        }
        lane.serving.connection_seconds.record(duration.as_secs_f64());
        match self.outcome {
            Outcome::Ended(end) => lane.serving.stats.ended.count(end),
            Outcome::Refused(refusal) => lane.serving.stats.refused.count(refusal),
        }
        lane.worker.stats.connections.fetch_sub(1, Ordering::Relaxed);
        lane.serving.stats.active.fetch_sub(1, Ordering::Relaxed);
    }
}

/// When a connection is too old: up to a tenth sooner than `max_age` from now, so that those that began together do not
/// end together.
fn expiry(max_age: Option<Duration>, client: SocketAddr, now: Duration) -> Option<Duration> {
    let max_age = max_age?;
    let jitter = u32::from(seahash::hash(Key::of(KeyKind::Source, client).as_bytes()).to_le_bytes()[0]);
    Some(now + max_age.saturating_sub(max_age / 10 * jitter / 255))
}
