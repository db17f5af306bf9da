//! One member of a pool: its identity and state in a snapshot, and the counters that outlive snapshots.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use rustix::io::Errno;

use crate::label_enum;
use crate::labels::Tally;

label_enum! {
    /// Whether a backend may get connections, and if not, why.
    pub enum State {
        /// No replica yet, or one that has not passed a health check.
        Starting => "starting",
        /// Gets connections.
        Healthy => "healthy",
        /// Fails its health checks; walked past.
        Unhealthy => "unhealthy",
        /// Gets no new connections; old ones may finish.
        Draining => "draining",
        /// Its replica keeps dying soon after each start; the supervisor waits before the next try.
        CrashLoop => "crash_loop",
    }
}

label_enum! {
    /// Why a connect to a backend failed.
    pub enum ConnectFailure {
        /// Nothing listens there.
        Refused => "refused",
        /// Reset during the handshake.
        Reset => "reset",
        /// No route, or the host does not answer on its network.
        Unreachable => "unreachable",
        /// No answer within the connect timeout.
        Timeout => "timeout",
        /// Our fault: no free source port towards this backend.
        NoPorts => "no_ports",
        /// Our fault: no file descriptor or no memory for the socket, for a second.
        NoDescriptors => "no_descriptors",
        /// Anything else; the log at level debug has the system's words.
        Other => "other",
    }
}

impl ConnectFailure {
    /// What the system's error means.
    pub fn of(error: &io::Error) -> Self {
        if error.kind() == io::ErrorKind::ConnectionRefused {
            return Self::Refused;
        }
        match Errno::from_io_error(error) {
            Some(Errno::CONNRESET | Errno::CONNABORTED) => Self::Reset,
            Some(Errno::HOSTUNREACH | Errno::NETUNREACH | Errno::HOSTDOWN | Errno::NETDOWN) => Self::Unreachable,
            Some(Errno::TIMEDOUT) => Self::Timeout,
            // Also when the ports towards this one address are used up: another backend may have some.
            Some(Errno::ADDRNOTAVAIL | Errno::AGAIN) => Self::NoPorts,
            Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => Self::NoDescriptors,
            _ => Self::Other,
        }
    }

    /// Whether it says nothing about the backend.
    pub fn is_ours(self) -> bool {
        matches!(self, Self::NoPorts | Self::NoDescriptors)
    }
}

/// What fills a backend's slot at the moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Replica {
    /// A child process of Ringway.
    Process {
        /// Its process id.
        pid: u32,
    },
    /// A container.
    Container {
        /// The engine's id of it: 64 hexadecimal digits.
        id: Arc<str>,
        /// Its name.
        name: Arc<str>,
    },
}

/// How the last replica of a slot ended, or why none could be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// In a few words: `exit status: 3`, `cannot be started: …`.
    pub reason: String,
    /// Its exit code, where it had one.
    pub code: Option<i64>,
    /// The last lines that it wrote, oldest first.
    pub output: Vec<String>,
    /// When it was noticed.
    pub at: Instant,
}

/// What the health checks last said of a backend.
#[derive(Debug, Clone)]
pub struct Health {
    /// `ok`, or what was wrong in a few words; `None` before the first result.
    pub last: Option<Arc<str>>,
    /// Since when `last` has been the same.
    pub since: Instant,
}

/// A backend as one snapshot of the table shows it.
#[derive(Debug, Clone)]
pub struct Backend {
    /// Stable identity, hashed onto the ring. A supervised replica's is its slot.
    pub id: Arc<str>,
    /// Where it listens; `None` while a slot has no replica.
    pub address: Option<SocketAddr>,
    /// Multiple of the pool's virtual nodes.
    pub weight: u32,
    /// Whether it may get connections.
    pub state: State,
    /// What fills the slot; `None` where Ringway knows no more than an address, or while there is none.
    pub replica: Option<Replica>,
    /// Counts the replicas and addresses that this id has had; tells an old one's news from a new one's.
    pub incarnation: u64,
    /// How often a replica of this slot was started again after the first.
    pub restarts: u64,
    /// How the last replica ended; kept while its successor runs.
    pub last_exit: Option<Arc<Exit>>,
    /// Unhealthy by the word of the engine that runs it, whatever our own checks say.
    pub reported_bad: bool,
    /// What the health checks last said.
    pub health: Health,
    /// Counters, shared by all snapshots.
    pub live: Arc<Live>,
}

impl Backend {
    /// `ok`, or what is wrong in a few words; `None` while nothing is known.
    pub fn last_check(&self) -> Option<&str> {
        if self.reported_bad { Some("unhealthy, says the engine") } else { self.health.last.as_deref() }
    }
}

/// Live counters of a backend. They belong to the id: a replacement goes on with them.
#[derive(Debug, Default)]
pub struct Live {
    /// Connections to this backend open at the moment.
    pub active: AtomicU64,
    /// Connections made to it so far.
    pub total: AtomicU64,
    /// Connects tried so far.
    pub attempts: AtomicU64,
    /// Connects that failed, by cause.
    pub failures: Tally<ConnectFailure>,
    /// Payload moved from clients to it.
    pub from_client: Moved,
    /// Payload moved from it to clients.
    pub to_client: Moved,
    /// Health checks that it passed.
    pub checks_passed: AtomicU64,
    /// Health checks that it failed.
    pub checks_failed: AtomicU64,
}

/// Bytes moved in one direction, by the way they went.
#[derive(Debug, Default)]
pub struct Moved {
    /// Through the worker's buffer.
    pub copied: AtomicU64,
    /// Through a pipe, within the kernel.
    pub spliced: AtomicU64,
}

impl Moved {
    /// Both ways together.
    pub fn total(&self) -> u64 {
        self.copied.load(Ordering::Relaxed) + self.spliced.load(Ordering::Relaxed)
    }
}
