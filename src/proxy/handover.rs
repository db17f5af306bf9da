//! Hands open connections over to the process that takes over in an upgrade. A relay stops between two moves. Both sockets, the pipes
//! and what is held go to the successor, which goes on with the next byte: [`taking`]. [`record`] is what it learns of a connection.
//!
//! No byte may be moved by both processes. So a connection stands still from the moment at which it is offered until the answer of the
//! successor. The successor begins once it has answered. A connection that it does not take goes on here.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::oneshot;
use tokio::task::yield_now;

pub use self::record::Record;
use super::account::Account;
use super::connect::Try;
use super::connection::{Connection, Served};
use super::context::Worker;
use super::deal::Peer;
use super::relay::Relay;
use super::sessions::Search;
use super::stats::EndReason;

pub(super) mod record;
pub(super) mod taking;

/// How often the other tasks of a worker run until those of the connections that are to be offered have run. A few times are enough.
const TURNS: usize = 1000;

/// An open connection on its way to the successor.
#[derive(Debug)]
pub struct Packed {
    /// What is known about it.
    pub record: Record,
    /// The sockets of client and backend, then the ends of the pipes, those of the direction to the backend first.
    pub descriptors: Vec<OwnedFd>,
    /// The bytes that it holds in memory, those to the backend first.
    pub bytes: Vec<u8>,
}

/// A connection that stands still until somebody decides whether the successor has taken it. Without a decision, it goes on here.
#[derive(Debug)]
pub struct Offered {
    /// The connection.
    pub packed: Packed,
    /// Whether the successor has taken it.
    pub is_taken: oneshot::Sender<bool>,
}

/// Some connections of a worker.
#[derive(Debug, Default)]
pub struct Batch {
    /// Those that can be handed over.
    pub offered: Vec<Offered>,
    /// Where the worker's list goes on; `None`: this is the end.
    pub next: Option<usize>,
}

/// Offers the open connections of all workers, on a thread that may wait.
#[derive(Debug)]
pub struct HandOver(pub(super) Arc<[Peer]>);

impl HandOver {
    /// Number of workers.
    pub fn workers(&self) -> usize {
        self.0.len()
    }

    /// Connections that are open now.
    pub fn open(&self) -> usize {
        let open: u64 = self.0.iter().map(|worker| worker.stats.connections.load(Ordering::Relaxed)).sum();
        usize::try_from(open).unwrap_or(usize::MAX)
    }

    /// Whether no worker runs any more.
    pub fn has_ended(&self) -> bool {
        self.0.iter().all(|worker| worker.searches.is_closed())
    }

    /// Stops at most `most` connections of a worker, from a position of its list on; `None`: the worker has ended.
    pub fn offer(&self, worker: usize, from: usize, most: usize) -> Option<Batch> {
        let (answer, answered) = oneshot::channel();
        self.0.get(worker)?.searches.send(Search::HandOver { from, most, answer }).ok()?;
        answered.blocking_recv().ok()
    }
}

/// Stops at most `most` connections from this position of the worker's list on. Only those with a relay can be handed over.
pub(super) async fn collect(worker: &Worker, from: usize, most: usize) -> Batch {
    let (mut wanted, mut position) = (Vec::new(), from);
    let next = {
        let open = worker.open.borrow();
        while position < open.capacity() && wanted.len() < most {
            let connection = open.get(position);
            position += 1;
            let may_go =
                |connection: &&Rc<Connection>| connection.served.get().is_some() && connection.verdict.get().is_none();
            wanted.extend(connection.filter(may_go).map(Rc::clone));
        }
        (position < open.capacity()).then_some(position)
    };
    for connection in &wanted {
        connection.end(EndReason::HandedOver);
    }
    let has_answered = |connection: &Connection| {
        let offers = worker.offers.borrow();
        connection.verdict.get() != Some(EndReason::HandedOver) || offers.iter().any(|(id, _)| *id == connection.id)
    };
    for _ in 0..TURNS {
        wanted.retain(|connection| !has_answered(connection));
        if wanted.is_empty() {
            break;
        }
        yield_now().await;
    }
    // The tasks of these have not run. They learn of nothing.
    for connection in wanted.into_iter().filter(|connection| !has_answered(connection)) {
        connection.verdict.set(None);
    }
    Batch { offered: worker.offers.take().into_iter().map(|(_, offered)| offered).collect(), next }
}

/// Offers a connection whose relay has stopped between two moves. Returns whether the successor has taken it. Otherwise the relay goes on.
pub(super) async fn offer(relay: &mut Relay, account: &Account) -> bool {
    let connection = &account.connection;
    let is_taken = match connection.served.get().map(|served| pack(relay, connection, served, &account.tries)) {
        Some(Ok(packed)) => {
            let (decide, decision) = oneshot::channel();
            let offered = Offered { packed, is_taken: decide };
            connection.listener.worker.offers.borrow_mut().push((connection.id, offered));
            decision.await.unwrap_or(false)
        }
        Some(Err(error)) => {
            tracing::debug!(id = %connection.id, %error, "cannot hand a connection over");
            false
        }
        None => false,
    };
    if !is_taken {
        if connection.verdict.get() == Some(EndReason::HandedOver) {
            connection.verdict.set(None);
        }
        relay.go_on();
    }
    is_taken
}

fn pack(relay: &Relay, connection: &Connection, served: &Served, tries: &[Try]) -> io::Result<Packed> {
    let (client, backend) = relay.streams();
    let mut luggage = Luggage::default();
    for stream in [client, backend] {
        luggage.descriptors.push(stream.as_fd().try_clone_to_owned()?);
    }
    let (up, down) = relay.directions();
    let halves = [up.pack(&connection.from_client, &mut luggage)?, down.pack(&connection.to_client, &mut luggage)?];
    let Luggage { descriptors, bytes } = luggage;
    Ok(Packed { record: Record::of(connection, served, tries, halves), descriptors, bytes })
}

/// What travels beside a record.
#[derive(Debug, Default)]
pub(super) struct Luggage {
    pub(super) descriptors: Vec<OwnedFd>,
    pub(super) bytes: Vec<u8>,
}
