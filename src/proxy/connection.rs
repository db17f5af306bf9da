//! One connection: what the stages have found out about it, and the flags through which the timeout task controls it.

use std::cell::{Cell, OnceCell, RefCell};
use std::fmt;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::io;
use std::net::SocketAddr;
use std::num::ParseIntError;
use std::rc::Rc;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use super::Route;
use super::context::WorkerListener;
use super::handover::Record;
use super::handover::record::Half;
use super::moving::MoveTime;
use super::stats::{EndReason, ProxyResult};
use crate::address::Address;
use crate::backend::{BackendPermit, Moved};
use crate::client_hello::Hello;
use crate::labels::Label as _;
use crate::stream::Client;

/// Identifies a connection. No two connections of a process have the same id. Two processes hardly ever use the same id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionId(u64);

/// Bits of an id that hold the number of the worker. The config allows at most 1024 workers.
const WORKER_BITS: u32 = 10;

impl ConnectionId {
    /// The first id of a worker. It holds the worker's number. The other bits are random.
    pub(super) fn first(worker: usize) -> Self {
        let random = RandomState::new().build_hasher().finish();
        Self(random << WORKER_BITS | worker as u64)
    }

    /// The number of the worker that serves the connection.
    pub(super) fn worker(self) -> usize {
        (self.0 & ((1 << WORKER_BITS) - 1)) as usize
    }

    /// The id of the worker's next connection.
    pub(super) fn next(self) -> Self {
        Self(self.0.wrapping_add(1 << WORKER_BITS))
    }
}

impl FromStr for ConnectionId {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, ParseIntError> {
        u64::from_str_radix(text, 16).map(Self)
    }
}

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A connection, from accept to its end.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) id: ConnectionId,
    pub(super) listener: Rc<WorkerListener>,
    pub(super) opened: Instant,
    /// Who is at the other end of the client's socket.
    pub(super) peer: Client,
    /// What the PROXY header said; empty without one.
    pub(super) proxied: OnceCell<Box<Proxied>>,
    /// What was found where a PROXY header may be.
    pub(super) proxy_header: Cell<Option<ProxyResult>>,
    /// Index of the rule that has matched; `None`: not decided yet.
    pub(super) rule: Cell<Option<u16>>,
    /// The ClientHello, if Ringway has looked for one.
    pub(super) hello: OnceCell<Box<Hello>>,
    /// Empty until the connection has a backend. Boxed: one large allocation would fragment the memory that earlier
    /// connections used while Ringway connected for them.
    pub(super) served: OnceCell<Box<Served>>,
    pub(super) from_client: Traffic,
    pub(super) to_client: Traffic,
    /// Set by the relay when bytes move or a stream ends, until the next tick.
    pub(super) is_active: Cell<bool>,
    /// The worker's clock at the tick that last found the connection active.
    pub(super) last_active: Cell<Duration>,
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
    /// Set by the timeout task or by an operator: the connection ends for this reason.
    pub(super) verdict: Cell<Option<EndReason>>,
    /// Wakes the connection's task.
    pub(super) waker: RefCell<Option<Waker>>,
}

/// What a PROXY header said about a connection.
#[derive(Debug)]
pub(super) struct Proxied {
    pub(super) client: Client,
    /// Where the client connected.
    pub(super) destination: SocketAddr,
    /// Fields for the backend's header, until it has got them.
    pub(super) fields: RefCell<Vec<u8>>,
}

/// The backend of a connection.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) backend: Arc<str>,
    pub(super) address: Address,
    pub(super) permit: BackendPermit,
    /// Time from accept until the connection to the backend was established.
    pub(super) connected_after: Duration,
    /// When the connection reaches its maximum age, by the worker's clock.
    pub(super) expires: Option<Duration>,
    /// When it has to move to the backend to which its key leads; `None`: it stays.
    pub(super) moves: Cell<Option<MoveTime>>,
}

impl Connection {
    pub(super) fn new(listener: Rc<WorkerListener>, peer: Client) -> Self {
        let worker = &listener.worker;
        let (id, now) = (worker.next_id.get(), worker.clock.get());
        worker.next_id.set(id.next());
        Self {
            id,
            opened: Instant::now(),
            peer,
            proxied: OnceCell::new(),
            proxy_header: Cell::new(None),
            rule: Cell::new((!listener.serving.routing.has_rules()).then_some(0)),
            hello: OnceCell::new(),
            served: OnceCell::new(),
            from_client: Traffic::default(),
            to_client: Traffic::default(),
            is_active: Cell::new(true),
            last_active: Cell::new(now),
            half_closed: Cell::new(false),
            blocked: Cell::new(false),
            keepalive: Cell::new(KeepaliveState::NotYet),
            give_up_pipes: Cell::new(false),
            inspect: Cell::new(false),
            verdict: Cell::new(None),
            waker: RefCell::new(None),
            listener,
        }
    }

    /// A connection that an old process has handed over, and the position of the rule that leads to its pool.
    ///
    /// # Errors
    /// When its id is wrong.
    pub(super) fn taken_over(listener: Rc<WorkerListener>, record: &Record, rule: u16) -> io::Result<Self> {
        let id = record.id().ok_or(io::ErrorKind::InvalidData)?;
        let mut connection = Self::new(listener, record.peer);
        let worker = &connection.listener.worker;
        connection.id = id;
        connection.opened = connection.opened.checked_sub(record.age).unwrap_or(connection.opened);
        connection.rule.set(Some(rule));
        connection.is_active.set(record.silent.is_zero());
        connection.last_active.set(worker.clock.get().saturating_sub(record.silent));
        connection.proxy_header.set(record.proxy_header.as_deref().and_then(ProxyResult::named));
        connection.keepalive.set(if record.keepalive { KeepaliveState::On } else { KeepaliveState::NotYet });
        connection.from_client = Traffic::taken_over(&record.up);
        connection.to_client = Traffic::taken_over(&record.down);
        // Both cells of a new connection are empty.
        if let Some((client, destination)) = record.proxied {
            let _ = connection.proxied.set(Box::new(Proxied { client, destination, fields: RefCell::default() }));
        }
        if let Some(hello) = &record.hello {
            let _ = connection.hello.set(Box::new(hello.clone()));
        }
        Ok(connection)
    }

    /// The client: the one in the PROXY header, or the peer itself.
    pub(super) fn client(&self) -> Client {
        self.proxied.get().map_or(self.peer, |proxied| proxied.client)
    }

    /// The balancer before Ringway that has sent a PROXY header.
    pub(super) fn balancer(&self) -> Option<Client> {
        self.proxied.get().map(|_| self.peer)
    }

    /// The server name for which the client asks, if Ringway has looked for one.
    pub(super) fn server_name(&self) -> Option<&str> {
        self.hello.get()?.server_name.as_deref()
    }

    /// The route, once it is decided.
    pub(super) fn route(&self) -> Option<&Route> {
        let routing = &self.listener.serving.routing;
        let rule = &routing.rules[usize::from(self.rule.get()?)];
        Some(&routing.routes[rule.route?])
    }

    /// Ends the connection for this reason: its task learns of it when it runs next.
    pub(super) fn end(&self, reason: EndReason) {
        self.verdict.set(Some(reason));
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Waits until somebody ends the connection, before it has a relay.
    pub(super) fn ended_early(&self) -> impl Future<Output = EndReason> + '_ {
        std::future::poll_fn(|cx| {
            if let Some(reason) = self.verdict.get() {
                return Poll::Ready(reason);
            }
            self.waker.replace(Some(cx.waker().clone()));
            Poll::Pending
        })
    }

    /// Adds the bytes moved since the last report to the shared counters.
    pub(super) fn report(&self) {
        let Some(served) = self.served.get() else { return };
        let live = served.permit.live();
        let moved =
            self.from_client.report(&live.counters.from_client) + self.to_client.report(&live.counters.to_client);
        let worker = &self.listener.worker;
        worker.bytes.set(worker.bytes.get() + moved);
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
    /// The bytes that the old process has moved and reported.
    fn taken_over(half: &Half) -> Self {
        let both = || (Cell::new(half.copied), Cell::new(half.spliced));
        let (copied, spliced) = both();
        Self { copied, spliced, reported: both() }
    }

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
