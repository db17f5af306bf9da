//! The new process: takes connections over from the old one.

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{oneshot, watch};

use super::{Packed, Record};
use crate::backend::{Backend, BackendPermit, ConnectFailure};
use crate::labels::Label as _;
use crate::proxy::account::Account;
use crate::proxy::connect::Try;
use crate::proxy::connection::{Connection, Served};
use crate::proxy::context::WorkerListener;
use crate::proxy::deal::Peer;
use crate::proxy::direction::Direction;
use crate::proxy::limit::{ConnectionPermit, Limit};
use crate::proxy::moving::MoveTime;
use crate::proxy::relay::Relay;
use crate::proxy::routing::Rule;
use crate::proxy::worker::WorkerCommand;
use crate::stream::{IdleStream, Stream};
use crate::table::Table;

/// What came beside a record, while it is unpacked.
pub(in crate::proxy) struct Unpacking {
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
    pub(in crate::proxy) fn pipe(&mut self) -> Option<[OwnedFd; 2]> {
        Some([self.descriptors.next()?, self.descriptors.next()?])
    }

    /// The next bytes.
    pub(in crate::proxy) fn bytes(&mut self, length: usize) -> Vec<u8> {
        self.bytes.by_ref().take(length).collect()
    }
}

/// Takes connections over from the old process, on a thread that may wait.
#[derive(Debug)]
pub struct TakeOver {
    pub(in crate::proxy) workers: Arc<[Peer]>,
    pub(in crate::proxy) limit: Arc<Limit>,
}

/// Connections that one worker is to take over.
#[derive(Debug)]
pub(in crate::proxy) struct Arriving {
    /// The connections.
    pub(in crate::proxy) packed: Vec<Packed>,
    /// Becomes true when they may move bytes. If it closes before, the old process keeps them.
    pub(in crate::proxy) go: watch::Receiver<bool>,
    /// Which of them the worker has taken.
    pub(in crate::proxy) answer: oneshot::Sender<Vec<bool>>,
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
pub(in crate::proxy) fn unpack(
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
        let fits = |rule: &Rule| rule.route == Some(nth) && name.is_none_or(|name| *rule.name == *name);
        routing.rules.iter().position(fits)
    };
    let rule = record.rule.as_deref().and_then(|name| leads(Some(name))).or_else(|| leads(None));
    let rule = rule.and_then(|rule| u16::try_from(rule).ok()).ok_or_else(|| not_here("no rule leads to the pool"))?;
    let table = listener.table(nth);
    let backend = backend_of(table.as_ref(), &record, routing.keeps_port);
    let backend = backend.ok_or_else(|| not_here("no backend of this id has this address"))?;
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
    let now = listener.worker.clock.get();
    let served = Box::new(Served {
        backend: Arc::clone(&backend.id),
        address: record.address,
        permit: BackendPermit::take_over(&backend.live),
        connected_after: record.connected_after,
        expires: record.expires_in.map(|left| now.saturating_add(left)),
        moves: Cell::new(record.moves.map(|moves| MoveTime::after(now, moves))),
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

/// The backend of a connection: one that listens at the address that has answered. During a rollout, two incarnations have the same slot, with
/// different addresses.
fn backend_of<'a>(table: &'a Table, record: &Record, keeps_port: bool) -> Option<&'a Backend> {
    let port = record.address.ip().map(|address| address.port()).filter(|_| keeps_port);
    let is_there =
        |backend: &&Backend| backend.address.as_ref().is_some_and(|address| address.at_port(port) == record.address);
    let own = table.backends().find(&record.backend)?;
    let stands_beside = |other: &&Backend| other.beside.as_deref() == Some(&*record.backend) && is_there(other);
    // A look at all backends only where there is one beside the slot.
    Some(own).filter(is_there).or_else(|| table.backends().iter().find(stands_beside).filter(|_| own.other.is_some()))
}
