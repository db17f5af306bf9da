//! The data plane: handles a connection from accept to its final accounting.
//!
//! The data plane knows tables, sockets and counters. It knows nothing about providers, HTTP or YAML. Each worker is
//! one thread with its own runtime and its own listening sockets. Workers share no state on the per-message path.
//!
//! # Layout
//!
//! - [`mod@session`]: the path of one connection, one line per stage
//! - [`accept`], [`deal`], [`admit`], [`mod@route`], [`key`], [`mod@pick`], [`mod@connect`], [`relay`], [`account`]: the stages
//! - [`routing`]: what a listener decides for a connection; [`mod@dial`]: one attempt to connect; [`wake`]: the wait for a pool that sleeps
//! - [`connection`]: one connection: what the stages have found out, and the flags of the timeout task
//! - [`direction`], [`pipe`], [`write_backlog`]: one half of a relay, and the pipes and buffers that it uses
//! - [`worker`], [`timeouts`]: a worker's thread, and its timeout task with a coarse clock
//! - [`mod@handover`]: open connections on their way from an old process to the one that takes over
//! - [`moving`]: the end of connections whose keys lead to other backends after a change of the ring
//! - [`context`], [`stats`]: state shared by the connections of one worker, and counters shared by all workers
//! - [`mod@proxy_protocol`], [`mod@peek`]: PROXY headers, and a look at first bytes
//! - [`not_served`]: a client's connection until it has a backend
//! - [`limit`], [`source_limits`]: connection limits of the process and its listeners, and of single source addresses
//! - [`listening`]: listening sockets of both families; [`socket`]: those of TCP, and TCP options
//! - [`access_log`]: one log line per connection; [`explain`]: why a connection goes to its
//!   backend; [`sessions`]: the list of open connections

pub mod access_log;
pub mod explain;
pub mod key;
pub mod listening;
pub mod sessions;
pub mod socket;
pub mod stats;

mod accept;
mod account;
mod admit;
mod connect;
mod connection;
mod context;
mod deal;
mod dial;
mod direction;
mod handover;
mod limit;
mod moving;
mod not_served;
mod peek;
mod pick;
mod pipe;
mod proxy_protocol;
mod relay;
mod route;
mod routing;
mod session;
mod source_limits;
mod timeouts;
mod wake;
mod worker;
mod write_backlog;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use ::metrics::Histogram;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::access_log::AccessLog;
pub use self::connect::{Connected, Try, Want, connect};
pub use self::connection::ConnectionId;
use self::deal::Peer;
pub use self::handover::taking::{TakeOver, Taken};
pub use self::handover::{Batch, HandOver, Offered, Packed, Record};
pub use self::limit::{ConnectionPermit, Limit};
use self::listening::ListeningSocket;
pub use self::pick::Balance;
pub use self::proxy_protocol::ProxyProtocol;
pub use self::routing::{Condition, DEFAULT, HelloSettings, NamePattern, Reports, Route, Routing, Rule};
use self::sessions::Sessions;
use self::socket::TcpOptions;
pub use self::source_limits::{Rate, SourceLimits, Sources};
use self::stats::{ListenerStats, WorkerStats};
pub use self::wake::Wake;
use self::worker::{Setup, WorkerCommand};
use crate::stream::{Client, IdleStream};

/// Settings of the data plane, shared by all workers.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Number of worker threads; at least 1. Each has one runtime and one socket per listener.
    pub workers: usize,
    /// Maximum open connections in the whole process; further connections wait in the kernel's backlog.
    pub max_connections: usize,
    /// Maximum pipes for splicing in the whole process; 0 turns splicing off.
    pub max_pipes: usize,
    /// Size of a worker's buffer in bytes; one read moves at most this much.
    pub buffer: usize,
    /// Reads of at least this many bytes count as large; a series of large reads starts splicing.
    pub splice_from: usize,
}

/// Identifies a listener while it is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ListenerId(u64);

/// How Ringway serves a listener's connections. It can change while the listener is open; open connections keep the
/// settings that they started with.
#[derive(Debug, Clone)]
pub struct Serving {
    /// The listener's name in the config.
    pub name: Arc<str>,
    /// Who may connect, and which route a connection takes.
    pub routing: Arc<Routing>,
    /// The listener's counters.
    pub stats: Arc<ListenerStats>,
    /// Limits the listener's open connections; further connections wait in the kernel's backlog.
    pub limit: Arc<Limit>,
    /// Limits per source address; `None`: unlimited.
    pub sources: Option<Arc<Sources>>,
    /// From whom the listener accepts a PROXY header; `None`: from nobody.
    pub proxy_protocol: Option<Arc<ProxyProtocol>>,
    /// Recognizes connections by their first bytes and hands them to another task; `None`: every connection goes to a
    /// backend.
    pub intercept: Option<Intercept>,
    /// TCP options of backend sockets and of listening sockets; client sockets inherit the latter.
    pub tcp: TcpOptions,
    /// Length of the kernel's queue of connections that wait for accept.
    pub backlog: u16,
    /// The access log; `None`: no line is written.
    pub access_log: Option<AccessLog>,
    /// Histogram of connection durations, in seconds.
    pub connection_seconds: Histogram,
}

impl Serving {
    /// The longest drain time of the routes.
    fn longest_drain(&self) -> Duration {
        self.routing.routes.iter().map(|route| route.drain).max().unwrap_or_default()
    }
}

/// Takes over connections by their first bytes, which stay in the socket.
#[derive(Debug, Clone)]
pub struct Intercept {
    /// Byte sequences to recognize at the start of a connection.
    pub first_bytes: &'static [&'static [u8]],
    /// Receives the connections. When the channel is full, the connection goes to a backend.
    pub taker: mpsc::Sender<Intercepted>,
}

/// A connection handed over by [`Intercept`].
#[derive(Debug)]
pub struct Intercepted {
    /// The client's socket in non-blocking mode, with no bytes read.
    pub stream: IdleStream,
    /// Who the client is.
    pub client: Client,
    /// The connection's permit under `max_connections`; keep it as long as the stream.
    pub permit: ConnectionPermit,
}

/// The running data plane.
#[derive(Debug)]
pub struct Proxy {
    /// Cancelled when the workers are to stop accepting.
    stop: CancellationToken,
    /// Cancelled when open connections have only their drain times left.
    drain: CancellationToken,
    /// Has a token of each worker that accepts.
    accepting: TaskTracker,
    limit: Arc<Limit>,
    workers: Arc<[Peer]>,
    next_listener: u64,
}

/// Hears of workers that end. A worker that ends before [`Proxy::stop`] has failed.
#[derive(Debug)]
pub struct WorkersEnded {
    ended: mpsc::UnboundedReceiver<usize>,
    running: usize,
}

impl WorkersEnded {
    /// Waits for the next worker to end and returns its index; `None` once all have ended.
    pub async fn next(&mut self) -> Option<usize> {
        if self.running == 0 {
            return None;
        }
        let ended = self.ended.recv().await;
        self.running -= 1;
        ended
    }
}

impl Proxy {
    /// Starts the workers. No listener is open yet.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(settings: Settings) -> io::Result<(Self, WorkersEnded)> {
        let workers = settings.workers.max(1);
        let (ended_sender, ended) = mpsc::unbounded_channel();
        let (peers, queues): (Vec<_>, Vec<_>) = (0..workers)
            .map(|_| {
                let (commands, queue) = mpsc::unbounded_channel();
                let (searches, to_search) = mpsc::unbounded_channel();
                (Peer { stats: Arc::default(), commands, searches }, (queue, to_search))
            })
            .unzip();
        let proxy = Self {
            stop: CancellationToken::new(),
            drain: CancellationToken::new(),
            accepting: TaskTracker::new(),
            limit: Arc::new(Limit::new(Some(settings.max_connections))),
            workers: peers.into(),
            next_listener: 0,
        };
        for (index, (commands, searches)) in queues.into_iter().enumerate() {
            let setup = Setup {
                index,
                stats: Arc::clone(&proxy.workers[index].stats),
                workers: Arc::clone(&proxy.workers),
                max_pipes: settings.max_pipes / workers + usize::from(index < settings.max_pipes % workers),
                buffer: settings.buffer,
                splice_from: settings.splice_from,
                limit: Arc::clone(&proxy.limit),
                commands,
                searches,
                stop: proxy.stop.clone(),
                drain: proxy.drain.clone(),
                accepts: proxy.accepting.token(),
                ended: ended_sender.clone(),
            };
            // On an error, `proxy` is dropped, which stops the workers that have started.
            std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || worker::run(setup))?;
        }
        Ok((proxy, WorkersEnded { ended, running: workers }))
    }

    /// Starts accepting on `sockets`. Worker `n` takes the sockets `n`, `n + workers` and so on.
    pub fn open(&mut self, sockets: Vec<ListeningSocket>, serving: &Serving) -> ListenerId {
        self.next_listener += 1;
        let (id, serving) = (ListenerId(self.next_listener), Arc::new(serving.clone()));
        for (socket, worker) in std::iter::zip(sockets, self.workers.iter().cycle()) {
            worker.tell(WorkerCommand::Open(id, socket, Arc::clone(&serving)));
        }
        id
    }

    /// Applies `serving` to connections accepted from now on.
    pub fn update(&self, id: ListenerId, serving: &Serving) {
        let serving = Arc::new(serving.clone());
        self.workers.iter().for_each(|worker| worker.tell(WorkerCommand::Update(id, Arc::clone(&serving))));
    }

    /// Stops accepting on a listener. Its open connections continue.
    pub fn close(&self, id: ListenerId) {
        self.workers.iter().for_each(|worker| worker.tell(WorkerCommand::Close(id)));
    }

    /// The connection limit of the whole process.
    pub fn limit(&self) -> &Arc<Limit> {
        &self.limit
    }

    /// Searches the open connections.
    pub fn sessions(&self) -> Sessions {
        Sessions::new(Arc::clone(&self.workers))
    }

    /// Finds out whether all workers run.
    pub fn pulse(&self) -> Pulse {
        Pulse(Arc::clone(&self.workers))
    }

    /// The counters of each worker.
    pub fn workers(&self) -> Vec<Arc<WorkerStats>> {
        self.workers.iter().map(|worker| Arc::clone(&worker.stats)).collect()
    }

    /// Offers the open connections to a successor.
    pub fn hand_over(&self) -> HandOver {
        HandOver(Arc::clone(&self.workers))
    }

    /// Takes over connections of an old process.
    pub fn take_over(&self) -> TakeOver {
        TakeOver { workers: Arc::clone(&self.workers), limit: Arc::clone(&self.limit) }
    }

    /// Stops accepting.
    pub fn stop_accepting(&self) {
        self.stop.cancel();
        self.accepting.close();
    }

    /// Stops accepting. Open connections may finish until their pool's `drain` time has passed.
    pub fn stop(&self) {
        self.stop_accepting();
        self.drain.cancel();
    }

    /// Waits after [`Proxy::stop_accepting`] until no worker accepts any more.
    pub async fn stopped(&self) {
        self.accepting.wait().await;
    }
}

/// Finds out whether all workers run.
#[derive(Debug)]
pub struct Pulse(Arc<[Peer]>);

impl Pulse {
    /// Waits until every worker has answered, each in its next turn. A worker that has ended need not answer.
    pub async fn beat(&self) {
        let answers: Vec<_> = self.0.iter().map(Peer::ask).collect();
        for answer in answers {
            let _ = answer.await;
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.cancel();
        self.drain.cancel();
    }
}
