//! Hands open connections over to the process that takes over in an upgrade, and takes them over there. A relay stops between two moves.
//! Both sockets, the pipes and what is held go to the successor, which goes on with the next byte.
//!
//! No byte may be moved by both processes. So a connection stands still from the moment at which it is offered until the answer of the
//! successor. The successor begins once it has answered. A connection that it does not take goes on here.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{oneshot, watch};
use tokio::task::yield_now;

pub use self::record::Record;
use super::account::Account;
use super::connect::Try;
use super::connection::{Connection, Served};
use super::context::{Worker, WorkerListener};
use super::deal::Peer;
use super::direction::Direction;
use super::limit::{ConnectionPermit, Limit};
use super::moving::MoveTime;
use super::relay::Relay;
use super::sessions::Search;
use super::stats::EndReason;
use super::worker::WorkerCommand;
use crate::address::Address;
use crate::backend::{Backend, BackendPermit, ConnectFailure};
use crate::labels::Label as _;
use crate::stream::{IdleStream, Stream};
use crate::table::Table;

pub(super) mod record;

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
    for connection in wanted {
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

/// What came beside a record, while it is unpacked.
pub(super) struct Unpacking {
    descriptors: std::vec::IntoIter<OwnedFd>,
    bytes: std::vec::IntoIter<u8>,
}

impl Unpacking {
    /// The next socket.
    fn socket(&mut self) -> io::Result<Stream> {
        let socket = self.descriptors.next().ok_or(io::ErrorKind::InvalidData)?;
        Stream::try_from(IdleStream::try_from(socket)?)
    }

    /// The ends of the next pipe.
    pub(super) fn pipe(&mut self) -> Option<[OwnedFd; 2]> {
        Some([self.descriptors.next()?, self.descriptors.next()?])
    }

    /// The next bytes.
    pub(super) fn bytes(&mut self, length: usize) -> Vec<u8> {
        self.bytes.by_ref().take(length).collect()
    }
}

/// Takes connections over from the old process, on a thread that may wait.
#[derive(Debug)]
pub struct TakeOver {
    pub(super) workers: Arc<[Peer]>,
    pub(super) limit: Arc<Limit>,
}

/// Connections that one worker is to take over.
#[derive(Debug)]
pub(super) struct Arriving {
    /// The connections.
    pub(super) packed: Vec<Packed>,
    /// Becomes true when they may move bytes. If it closes before, the old process keeps them.
    pub(super) go: watch::Receiver<bool>,
    /// Which of them the worker has taken.
    pub(super) answer: oneshot::Sender<Vec<bool>>,
}

/// Connections that have been taken over but do not move bytes yet. Dropping it leaves them to the old process.
#[derive(Debug)]
pub struct Taken {
    go: watch::Sender<bool>,
    /// Which of the connections were taken, in their order.
    pub taken: Vec<bool>,
}

impl Taken {
    /// Lets the connections go on: the old process does not have them any more.
    pub fn go(self) {
        self.go.send_replace(true);
    }
}

impl TakeOver {
    /// Number of connections for which the process has room.
    pub fn room(&self) -> usize {
        self.limit.free()
    }

    /// Takes connections over, each by the worker that has its number in its id.
    pub fn take(&self, packed: Vec<Packed>) -> Taken {
        let (go, may_go) = watch::channel(false);
        let mut taken = vec![false; packed.len()];
        let mut of_workers: Vec<(Vec<usize>, Vec<Packed>)> = self.workers.iter().map(|_| Default::default()).collect();
        for (n, packed) in packed.into_iter().enumerate() {
            let Some(worker) = packed.record.worker(of_workers.len()) else { continue };
            let (numbers, list) = &mut of_workers[worker];
            numbers.push(n);
            list.push(packed);
        }
        let asked: Vec<_> = std::iter::zip(of_workers, &*self.workers)
            .filter(|((numbers, _), _)| !numbers.is_empty())
            .map(|((numbers, packed), worker)| {
                let (answer, answered) = oneshot::channel();
                worker.tell(WorkerCommand::TakeOver(Arriving { packed, go: may_go.clone(), answer }));
                (numbers, answered)
            })
            .collect();
        for (numbers, answered) in asked {
            // A worker that has ended takes none.
            for (n, is_taken) in std::iter::zip(numbers, answered.blocking_recv().unwrap_or_default()) {
                taken[n] = is_taken;
            }
        }
        Taken { go, taken }
    }
}

/// Rebuilds a connection of the old process. It moves no byte before its relay is told to go on.
///
/// # Errors
/// Why this process cannot serve it.
pub(super) fn unpack(
    packed: Packed,
    listener: &Rc<WorkerListener>,
    process: &Arc<Limit>,
) -> io::Result<(Relay, Account)> {
    let Packed { record, descriptors, bytes } = packed;
    let not_here = |what: &str| io::Error::new(io::ErrorKind::NotFound, what.to_owned());
    let routing = &listener.serving.routing;
    let nth = routing.routes.iter().position(|route| *route.pool == *record.pool);
    let nth = nth.ok_or_else(|| not_here("the listener leads to no pool with this name"))?;
    let leads = |name: Option<&str>| {
        let fits = |rule: &super::Rule| rule.route == Some(nth) && name.is_none_or(|name| *rule.name == *name);
        routing.rules.iter().position(fits)
    };
    let rule = record.rule.as_deref().and_then(|name| leads(Some(name))).or_else(|| leads(None));
    let rule = rule.and_then(|rule| u16::try_from(rule).ok()).ok_or_else(|| not_here("no rule leads to the pool"))?;
    let table = listener.table(nth);
    let backend =
        backend_of(table.as_ref(), &record.backend, &record.address).ok_or_else(|| not_here("the backend has left"))?;
    let full = || io::Error::new(io::ErrorKind::QuotaExceeded, "this process has max_connections");
    let mut permit = ConnectionPermit::for_open_one(&listener.serving.limit, process).ok_or_else(full)?;
    if record.descriptors() != descriptors.len() || record.bytes() != bytes.len() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut unpacking = Unpacking { descriptors: descriptors.into_iter(), bytes: bytes.into_iter() };
    let (client, to_backend) = (unpacking.socket()?, unpacking.socket()?);

    let connection = Connection::taken_over(Rc::clone(listener), &record, rule)?;
    if let Some(sources) = &listener.serving.sources {
        permit.source = sources.count_open(connection.client(), Instant::now());
    }
    let live = &backend.live;
    // It counts, whatever the limit is.
    let of_backend = BackendPermit::take(live, u64::MAX).ok_or(io::ErrorKind::QuotaExceeded)?;
    let now = listener.worker.clock.get();
    let served = Box::new(Served {
        backend: Arc::clone(&backend.id),
        address: record.address,
        permit: of_backend,
        connected_after: record.connected_after,
        expires: record.expires_in.map(|left| now.saturating_add(left)),
        moves: std::cell::Cell::new(record.moves.map(|moves| MoveTime::after(now, moves))),
    });
    // A new connection has no backend yet.
    let _ = connection.served.set(served);
    let tries = record.tries.into_iter().map(|(backend, failure)| Try {
        backend: backend.into(),
        incarnation: 0,
        failure: failure.and_then(|failure| ConnectFailure::named(&failure)),
    });
    let account = Account::take_over(connection, permit, tries.collect());
    let worker = &listener.worker;
    let directions = [record.up, record.down].map(|half| Direction::unpack(&half, &mut unpacking, worker));
    Ok((Relay::taken_over(client, to_backend, directions, Rc::clone(&account.connection)), account))
}

/// The backend of a connection. During a rollout, two incarnations have the same slot, with different addresses.
fn backend_of<'a>(table: &'a Table, id: &str, address: &Address) -> Option<&'a Backend> {
    let own = table.backends().find(id)?;
    if own.other.is_none() || own.address.as_ref() == Some(address) {
        return Some(own);
    }
    let stands_beside =
        |other: &&Backend| other.beside.as_deref() == Some(id) && other.address.as_ref() == Some(address);
    Some(table.backends().iter().find(stands_beside).unwrap_or(own))
}
