//! Stage account: a guard that counts each connection once when it opens and once when it ends.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::access_log::Line;
use super::context::{KeepaliveState, Progress, Traffic, WorkerListener};
use super::deal::SHORT;
use super::key::{Key, KeyKind};
use super::limit::ConnectionPermit;
use super::proxy_protocol::Origin;
use super::stats::{EndReason, RefusalReason};
use crate::address::Address;
use crate::backend::BackendPermit;
use crate::labels::Label as _;
use crate::stream::Client;

/// The final result of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Ended(EndReason),
    Refused(RefusalReason),
}

impl Outcome {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Ended(end) => end.as_str(),
            Self::Refused(refusal) => refusal.as_str(),
        }
    }
}

impl From<EndReason> for Outcome {
    fn from(end: EndReason) -> Self {
        Self::Ended(end)
    }
}

impl From<RefusalReason> for Outcome {
    fn from(refusal: RefusalReason) -> Self {
        Self::Refused(refusal)
    }
}

/// The guard of one connection. Dropping it closes the account; without an outcome, the reason is
/// [`EndReason::Dropped`].
#[derive(Debug)]
pub(super) struct Account {
    pub(super) listener: Rc<WorkerListener>,
    pub(super) origin: Origin,
    /// The connection's permit, until it is handed over with the connection.
    pub(super) permit: Option<ConnectionPermit>,
    opened: Instant,
    outcome: Outcome,
    served: Option<Served>,
}

/// Details known once the connection has a backend.
#[derive(Debug)]
struct Served {
    id: Arc<str>,
    address: Address,
    connected_after: Duration,
    slot: usize,
    progress: Rc<Progress>,
}

impl Account {
    /// Counts an accepted connection. It is counted for the worker already: see [`Dealer`](super::deal::Dealer).
    pub(super) fn open(listener: Rc<WorkerListener>, client: Client, permit: ConnectionPermit) -> Self {
        listener.share().count_accepted();
        Self {
            listener,
            origin: Origin::Direct(client),
            permit: Some(permit),
            opened: Instant::now(),
            outcome: Outcome::Ended(EndReason::Dropped),
            served: None,
        }
    }

    /// Counts the connection for its backend and registers it with the timeout task.
    pub(super) fn serve(&mut self, id: Arc<str>, address: Address, permit: BackendPermit) -> Rc<Progress> {
        permit.live().total.fetch_add(1, Ordering::Relaxed);
        let now = self.listener.worker.clock.get();
        let progress = Rc::new(Progress {
            listener: Rc::clone(&self.listener),
            permit,
            from_client: Traffic::default(),
            to_client: Traffic::default(),
            is_active: Cell::new(true),
            last_active: Cell::new(now),
            expires: expiry(self.listener.serving.route.max_age, self.origin.client(), now),
            half_closed: Cell::new(false),
            blocked: Cell::new(false),
            keepalive: Cell::new(KeepaliveState::NotYet),
            give_up_pipes: Cell::new(false),
            inspect: Cell::new(false),
            verdict: Cell::new(None),
            waker: RefCell::new(None),
        });
        let slot = self.listener.worker.open.borrow_mut().insert(Rc::clone(&progress));
        self.served =
            Some(Served { id, address, connected_after: self.opened.elapsed(), slot, progress: Rc::clone(&progress) });
        progress
    }

    /// Sets the outcome and closes the account.
    pub(super) fn close(mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let listener = &self.listener;
        let duration = self.opened.elapsed();
        if let Some(served) = &self.served {
            listener.worker.open.borrow_mut().try_remove(served.slot);
            served.progress.report();
            if duration < SHORT {
                listener.worker.short.set(listener.worker.short.get() + 1);
            }
        }
        if let Some(log) = &listener.serving.access_log {
            log.write(&Line {
                listener: &listener.serving.name,
                pool: &listener.serving.route.pool,
                client: self.origin.client(),
                peer: self.origin.peer(),
                backend: self.served.as_ref().map(|served| (&*served.id, &served.address)),
                outcome: self.outcome.as_str(),
                from_client: self.served.as_ref().map_or(0, |served| served.progress.from_client.total()),
                to_client: self.served.as_ref().map_or(0, |served| served.progress.to_client.total()),
                connect: self.served.as_ref().map(|served| served.connected_after),
                duration,
            });
        }
        listener.serving.connection_seconds.record(duration.as_secs_f64());
        match self.outcome {
            Outcome::Ended(end) => listener.share().count_end(end),
            Outcome::Refused(refusal) => listener.share().count_refusal(refusal),
        }
        listener.worker.stats.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The time at which a connection reaches its maximum age. It is up to a tenth sooner than `max_age` from now, so
/// connections that started together do not all end together.
fn expiry(max_age: Option<Duration>, client: Client, now: Duration) -> Option<Duration> {
    let max_age = max_age?;
    let jitter = u32::from(seahash::hash(Key::of(KeyKind::Source, client).as_bytes()).to_le_bytes()[0]);
    Some(now + max_age.saturating_sub(max_age / 10 * jitter / 255))
}
