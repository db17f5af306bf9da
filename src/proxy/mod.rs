//! The data plane: the way of a connection from accept to its closing account.
//!
//! It knows tables, sockets and counters, and nothing of providers, HTTP or YAML. One thread per worker,
//! each with its own runtime and its own listening sockets; workers share nothing per message.
//!
//! # Layout
//!
//! - [`mod@session`]: the corridor, one line a stage
//! - [`accept`], [`admit`], [`key`], [`connect`], [`relay`], [`account`]: the stages (pick is
//!   [`Table::candidates`](crate::table::Table::candidates))
//! - [`direction`], [`pipe`], [`remainders`]: one half of a relay, and what its two paths need
//! - [`worker`], [`sweep`]: a worker's thread, and its coarse clock for timeouts
//! - [`lane`], [`stats`]: what a worker's connections share, and what all workers do
//! - [`limit`], [`sources`]: how many connections there may be, in all and of one source
//! - [`socket`]: listening sockets and TCP options
//! - [`access_log`]: a line per connection

pub mod access_log;
pub mod key;
pub mod socket;
pub mod stats;

mod accept;
mod account;
mod admit;
mod connect;
mod direction;
mod lane;
mod limit;
mod pipe;
mod relay;
mod remainders;
mod session;
mod sources;
mod sweep;
mod worker;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ::metrics::Histogram;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use self::access_log::AccessLog;
pub use self::connect::{Connected, connect};
use self::key::KeyKind;
pub use self::limit::{Limit, Permit};
use self::socket::TcpOptions;
pub use self::sources::{SourceLimits, Sources};
use self::stats::{ListenerStats, PoolStats, WorkerStats};
use self::worker::{Command, Setup};
use crate::backend::{Backend, Failing};
use crate::table::{Table, TableCell};

/// What all workers are run with.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Threads, each with one runtime and one socket per listener; at least 1.
    pub workers: usize,
    /// Connections open at a time in the whole process; the rest waits in the backlog.
    pub max_connections: usize,
    /// Pipes of the splice path in the whole process; 0 turns splicing off.
    pub max_pipes: usize,
    /// Bytes of a worker's buffer, which is the most that one read moves.
    pub buffer: usize,
    /// Bytes of a read that speaks for splicing.
    pub splice_from: usize,
}

/// Names a listener for as long as it is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ListenerId(u64);

/// How the connections of a listener are served. It may change while the listener is open; a connection goes on as it
/// began.
#[derive(Debug, Clone)]
pub struct Serving {
    /// The listener's name in the config.
    pub name: Arc<str>,
    /// Where its connections go.
    pub route: Route,
    /// Counters.
    pub stats: Arc<ListenerStats>,
    /// Its connections open at a time; the rest waits in the backlog.
    pub limit: Arc<Limit>,
    /// What one source address may do, if that is limited.
    pub sources: Option<Arc<Sources>>,
    /// Connections that are answered by someone else, told by their first bytes.
    pub intercept: Option<Intercept>,
    /// Options of sockets towards backends and of listening sockets, which clients' inherit.
    pub tcp: TcpOptions,
    /// Connections that the kernel queues.
    pub backlog: u16,
    /// Where a line per connection goes, if anywhere.
    pub access_log: Option<AccessLog>,
    /// Takes the duration of each connection, in seconds.
    pub connection_seconds: Histogram,
}

/// How connections of a listener are balanced over a pool.
#[derive(Debug, Clone)]
pub struct Route {
    /// The pool's name.
    pub pool: Arc<str>,
    /// What of a connection is hashed.
    pub key: KeyKind,
    /// The pool's table.
    pub table: TableCell,
    /// Connections that one backend may have; the walk goes on past one that has them.
    pub most_per_backend: u64,
    /// Longest time for one connect.
    pub connect_timeout: Duration,
    /// Backends tried for one connection; at least 1.
    pub connect_attempts: usize,
    /// A connection on which nothing moves for this long is reset.
    pub idle: Duration,
    /// The same once one side has ended its stream.
    pub half_closed: Duration,
    /// A connection as old as this is reset, up to a tenth sooner; `None`: never.
    pub max_age: Option<Duration>,
    /// How long open connections may go on after the data plane was told to stop.
    pub drain: Duration,
    /// Takes the time of each successful connect, in seconds.
    pub connect_seconds: Histogram,
    /// Who hears of backends to which connects keep failing, if anybody does.
    pub failing: Option<Reports>,
    /// Counters of the pool.
    pub stats: Arc<PoolStats>,
}

impl Route {
    /// Stage pick: the backends to try for `key`, in their order.
    pub fn pick<'t>(
        &self,
        table: &'t Table,
        key: &'t [u8],
    ) -> impl Iterator<Item = (&'t Backend, SocketAddr)> + use<'t> {
        if table.is_panic() {
            self.stats.picked_in_panic.fetch_add(1, Ordering::Relaxed);
        }
        table.candidates(key)
    }
}

/// How backends are reported to which connects keep failing.
#[derive(Debug, Clone)]
pub struct Reports {
    /// Failures in a row that make a report, and each time as many more; at least 1.
    pub after: u32,
    /// Where it goes. While nobody takes it, it is lost: the next failures make another.
    pub to: mpsc::Sender<Failing>,
}

/// Takes over connections by their first bytes, which stay unread.
#[derive(Debug, Clone)]
pub struct Intercept {
    /// Any of these at the beginning of a connection.
    pub first_bytes: &'static [&'static [u8]],
    /// Who answers. When it cannot take one more, the connection goes to a backend.
    pub taker: mpsc::Sender<Intercepted>,
}

/// A connection handed over by [`Intercept`].
#[derive(Debug)]
pub struct Intercepted {
    /// In non-blocking mode, nothing read.
    pub stream: std::net::TcpStream,
    /// Its place under `max_connections`, to be kept as long as the stream.
    pub permit: Permit,
}

/// The running data plane.
#[derive(Debug)]
pub struct Proxy {
    stop: CancellationToken,
    limit: Arc<Limit>,
    workers: Vec<WorkerHandle>,
    next_listener: u64,
    ended: mpsc::UnboundedReceiver<usize>,
    running: usize,
}

#[derive(Debug)]
struct WorkerHandle {
    stats: Arc<WorkerStats>,
    commands: mpsc::UnboundedSender<Command>,
}

impl WorkerHandle {
    fn tell(&self, command: Command) {
        // One that has ended is told of by `worker_ended`.
        let _ = self.commands.send(command);
    }
}

impl Proxy {
    /// Starts the workers, with no listener yet.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(settings: Settings) -> io::Result<Self> {
        let workers = settings.workers.max(1);
        let (ended_sender, ended) = mpsc::unbounded_channel();
        let mut proxy = Self {
            stop: CancellationToken::new(),
            limit: Arc::new(Limit::new(Some(settings.max_connections))),
            workers: Vec::new(),
            next_listener: 0,
            ended,
            running: workers,
        };
        for index in 0..workers {
            let (sender, commands) = mpsc::unbounded_channel();
            let setup = Setup {
                index,
                stats: Arc::default(),
                max_pipes: settings.max_pipes / workers + usize::from(index < settings.max_pipes % workers),
                buffer: settings.buffer,
                splice_from: settings.splice_from,
                limit: Arc::clone(&proxy.limit),
                commands,
                stop: proxy.stop.clone(),
                ended: ended_sender.clone(),
            };
            proxy.workers.push(WorkerHandle { stats: Arc::clone(&setup.stats), commands: sender });
            // An error drops the proxy, which stops the workers that have started.
            std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || worker::run(setup))?;
        }
        Ok(proxy)
    }

    /// Begins to accept. Worker `n` takes the sockets `n`, `n + workers` and so on.
    pub fn open(&mut self, sockets: Vec<TcpListener>, serving: &Serving) -> ListenerId {
        self.next_listener += 1;
        let id = ListenerId(self.next_listener);
        for (socket, worker) in std::iter::zip(sockets, self.workers.iter().cycle()) {
            worker.tell(Command::Open(id, socket, serving.clone()));
        }
        id
    }

    /// Serves connections that are accepted from now on like this.
    pub fn update(&self, id: ListenerId, serving: &Serving) {
        self.workers.iter().for_each(|worker| worker.tell(Command::Update(id, serving.clone())));
    }

    /// Stops accepting on a listener. Its open connections go on.
    pub fn close(&self, id: ListenerId) {
        self.workers.iter().for_each(|worker| worker.tell(Command::Close(id)));
    }

    /// Places for connections of the whole process.
    pub fn limit(&self) -> &Arc<Limit> {
        &self.limit
    }

    /// The counters of each worker.
    pub fn workers(&self) -> Vec<Arc<WorkerStats>> {
        self.workers.iter().map(|worker| Arc::clone(&worker.stats)).collect()
    }

    /// Stops accepting. Open connections may finish until their pool's `drain` has passed.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// Waits for the next worker to end; `None` when all have. Before [`Proxy::stop`] that is a fault.
    pub async fn worker_ended(&mut self) -> Option<usize> {
        if self.running == 0 {
            return None;
        }
        let ended = self.ended.recv().await;
        self.running -= 1;
        ended
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
