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
mod pipe;
mod relay;
mod remainders;
mod session;
mod sweep;
mod worker;

use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use ::metrics::Histogram;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use self::access_log::AccessLog;
pub use self::connect::{Connected, connect};
use self::key::KeyKind;
use self::socket::TcpOptions;
use self::stats::{ListenerStats, WorkerStats};
use crate::table::TableCell;

/// What all workers are run with.
#[derive(Debug)]
pub struct Settings {
    /// Threads, each with one runtime and one socket per listener; at least 1.
    pub workers: usize,
    /// Connections open at a time in the whole process; the rest waits in the backlog.
    pub max_connections: usize,
    /// Pipes of the splice path in the whole process; 0 turns splicing off.
    pub max_pipes: usize,
    /// Options of sockets towards backends; those of clients are inherited from the listening socket.
    pub tcp: TcpOptions,
    /// Where a line per connection goes, if anywhere.
    pub access_log: Option<AccessLog>,
    /// Where clients connect.
    pub listeners: Vec<Listener>,
}

/// A bound listener and where its connections go.
#[derive(Debug)]
pub struct Listener {
    /// Its name in the config.
    pub name: Arc<str>,
    /// One listening socket for each worker.
    pub sockets: Vec<TcpListener>,
    /// The pool behind it.
    pub route: Route,
    /// Counters.
    pub stats: Arc<ListenerStats>,
    /// Connections that are answered by someone else, told by their first bytes.
    pub intercept: Option<Intercept>,
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
    /// Longest time for one connect.
    pub connect_timeout: Duration,
    /// Backends tried for one connection; at least 1.
    pub connect_attempts: usize,
    /// A connection on which nothing moves for this long is reset.
    pub idle: Duration,
    /// The same once one side has ended its stream.
    pub half_closed: Duration,
    /// How long open connections may go on after the data plane was told to stop.
    pub drain: Duration,
    /// Takes the time of each successful connect, in seconds.
    pub connect_seconds: Histogram,
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
    pub permit: OwnedSemaphorePermit,
}

/// The running data plane.
#[derive(Debug)]
pub struct Proxy {
    stop: CancellationToken,
    workers: Vec<Arc<WorkerStats>>,
    ended: mpsc::UnboundedReceiver<usize>,
    running: usize,
}

impl Proxy {
    /// Starts the workers.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(settings: Settings) -> io::Result<Self> {
        let stop = CancellationToken::new();
        let limit = Arc::new(Semaphore::new(settings.max_connections.min(Semaphore::MAX_PERMITS)));
        let (ended_sender, ended) = mpsc::unbounded_channel();
        let setups = worker::setups(settings, &limit, &stop, &ended_sender);
        let workers = setups.iter().map(|setup| Arc::clone(&setup.stats)).collect();
        // Dropped by an error, it stops the workers that have started.
        let proxy = Self { stop, workers, ended, running: setups.len() };
        for setup in setups {
            std::thread::Builder::new().name(format!("worker-{}", setup.index)).spawn(move || worker::run(setup))?;
        }
        Ok(proxy)
    }

    /// The counters of each worker.
    pub fn workers(&self) -> &[Arc<WorkerStats>] {
        &self.workers
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
