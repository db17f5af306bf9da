//! Stage account: a guard that counts each connection once when it opens and once when it ends.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::access_log::Line;
use super::connect::Try;
use super::connection::{Connection, Served};
use super::context::WorkerListener;
use super::deal::SHORT;
use super::key::{Key, KeyKind};
use super::limit::ConnectionPermit;
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
    pub(super) connection: Rc<Connection>,
    /// The connection's permit, until it is handed over with the connection.
    pub(super) permit: Option<ConnectionPermit>,
    /// The backends that Ringway tried without success.
    pub(super) tries: Vec<Try>,
    /// Position in the worker's list of open connections.
    slot: usize,
    outcome: Outcome,
}

impl Account {
    /// Counts an accepted connection. It is counted for the worker already: see [`Dealer`](super::deal::Dealer).
    pub(super) fn open(listener: Rc<WorkerListener>, peer: Client, permit: ConnectionPermit) -> Self {
        listener.share().count_accepted();
        let connection = Rc::new(Connection::new(listener, peer));
        let slot = connection.listener.worker.open.borrow_mut().insert(Rc::clone(&connection));
        Self { connection, permit: Some(permit), tries: Vec::new(), slot, outcome: Outcome::Ended(EndReason::Dropped) }
    }

    /// Counts a connection that an old process has handed over. It is counted for the worker already.
    pub(super) fn take_over(connection: Connection, permit: ConnectionPermit, tries: Vec<Try>) -> Self {
        connection.listener.share().count_taken_over();
        let connection = Rc::new(connection);
        let slot = connection.listener.worker.open.borrow_mut().insert(Rc::clone(&connection));
        Self { connection, permit: Some(permit), tries, slot, outcome: Outcome::Ended(EndReason::Dropped) }
    }

    /// Counts the connection for its backend. From now on, the timeout task watches it.
    pub(super) fn serve(&mut self, backend: Arc<str>, address: Address, permit: BackendPermit) {
        permit.live().counters.total.fetch_add(1, Ordering::Relaxed);
        let connection = &self.connection;
        let now = connection.listener.worker.clock.get();
        connection.last_active.set(now);
        let max_age = connection.route().and_then(|route| route.max_age);
        let expires = max_age.map(|max_age| expiry(max_age, connection.client(), now));
        let connected_after = connection.opened.elapsed();
        let served = Box::new(Served { backend, address, permit, connected_after, expires, moves: Cell::new(None) });
        // A connection is served once.
        let _ = connection.served.set(served);
    }

    /// Sets the outcome and closes the account.
    pub(super) fn close(mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let (connection, listener) = (&*self.connection, &self.connection.listener);
        let duration = connection.opened.elapsed();
        listener.worker.open.borrow_mut().try_remove(self.slot);
        if connection.served.get().is_some() {
            connection.report();
            if duration < SHORT {
                listener.worker.short.set(listener.worker.short.get() + 1);
            }
        }
        let is_kept_out = matches!(self.outcome, Outcome::Refused(refusal) if refusal.is_by_list());
        let is_over = self.outcome != Outcome::Ended(EndReason::HandedOver);
        if let Some(log) = listener.serving.access_log.as_ref().filter(|_| is_over && !is_kept_out) {
            log.write(&Line { connection, tries: &self.tries, outcome: self.outcome.as_str(), duration });
        }
        if is_over {
            listener.serving.connection_seconds.record(duration.as_secs_f64());
        }
        if let (Outcome::Ended(EndReason::DrainDeadline), Some(served)) = (self.outcome, connection.served.get()) {
            served.permit.live().counters.cut_by_drain.fetch_add(1, Ordering::Relaxed);
            if let Some(route) = connection.route() {
                route.stats.cut_by_drain.fetch_add(1, Ordering::Relaxed);
            }
        }
        match self.outcome {
            Outcome::Ended(end) => listener.share().count_end(end),
            Outcome::Refused(refusal) => listener.share().count_refusal(refusal),
        }
        listener.worker.stats.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The time at which a connection reaches its maximum age. It is up to a tenth sooner than `max_age` from now, so
/// connections that started together do not all end together.
fn expiry(max_age: Duration, client: Client, now: Duration) -> Duration {
    let jitter = u32::from(seahash::hash(Key::of(KeyKind::Source, client, None).as_bytes()).to_le_bytes()[0]);
    now + max_age.saturating_sub(max_age / 10 * jitter / 255)
}
