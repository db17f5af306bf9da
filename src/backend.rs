//! One member of a pool: its identity and state in a snapshot, and the counters that outlive snapshots.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

use rustix::io::Errno;

use crate::label_enum;
use crate::labels::{Label as _, Tally};

label_enum! {
    /// Whether a backend may get connections, and if not, why.
    pub enum State {
        /// No replica yet, or one that has not passed a health check.
        Starting => "starting",
        /// Gets connections.
        Healthy => "healthy",
        /// Fails its health checks; walked past.
        Unhealthy => "unhealthy",
        /// Passes its checks, but connects to it keep failing; walked past for a while.
        Ejected => "ejected",
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
    /// What they have made of it: healthy, unhealthy, or undecided.
    pub verdict: Option<bool>,
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
    /// Whether its replica is well, also where it is drained; `None`: nobody can tell yet.
    pub well: Option<bool>,
    /// The part of its keys that it takes at the moment.
    pub admission: Admission,
    /// It is to get no new connections; also while it has no replica.
    pub drain: Option<Drain>,
    /// Counters, shared by all snapshots.
    pub live: Arc<Live>,
}

/// A backend that is to get no new connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drain {
    /// When that began.
    pub since: Instant,
    /// When connections that are still open are reset; `None`: never.
    pub deadline: Option<Instant>,
    /// It has no points on the ring any more, and leaves the pool once its last connection has ended.
    pub leaves: bool,
}

/// The part of its keys that a backend takes: all of them, or fewer while it starts slowly. Which ones depends on the
/// key alone, so that each key comes back once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admission(u32);

impl Admission {
    /// Every key.
    pub const ALL: Self = Self(1 << 16);

    /// This part of the keys, from 0 to 1.
    #[expect(clippy::cast_sign_loss, reason = "clamped")]
    pub fn part(part: f64) -> Self {
        Self((part.clamp(0.0, 1.0) * f64::from(Self::ALL.0)) as u32)
    }

    /// From 0 to 1.
    pub fn as_part(self) -> f64 {
        f64::from(self.0) / f64::from(Self::ALL.0)
    }

    /// Whether it takes this key.
    pub fn takes(self, key: &[u8]) -> bool {
        // Seeds of its own: which keys come first has nothing to do with where they lie on the ring.
        self == Self::ALL || (seahash::hash_seeded(key, 1, 2, 3, 4) >> 48) < u64::from(self.0)
    }
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
    /// Connections to this backend that are open or being made at the moment; changed by [`Place`] alone.
    pub active: AtomicU64,
    /// Connections made to it so far.
    pub total: AtomicU64,
    /// Connects tried so far.
    pub attempts: AtomicU64,
    /// Connects that failed, by cause.
    pub failures: Tally<ConnectFailure>,
    /// Connects that failed since the last that did not, but for those that were our own fault.
    pub failed_in_a_row: AtomicU32,
    /// Times that it was ejected.
    pub ejections: AtomicU64,
    /// Orders to end its connections.
    pub evictions: Evictions,
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

/// The data plane's word that connects to a backend keep failing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failing {
    /// The backend's id.
    pub backend: Arc<str>,
    /// The replica that they failed to reach.
    pub incarnation: u64,
}

/// A connection's place at a backend, from before its connect until its end.
#[derive(Debug)]
pub struct Place {
    live: Arc<Live>,
    era: u64,
}

impl Place {
    /// Takes a place; `None` where the backend has `most` connections already. Exact, whoever else is asking.
    pub fn take(live: &Arc<Live>, most: u64) -> Option<Self> {
        if most == u64::MAX {
            live.active.fetch_add(1, Ordering::Relaxed);
        } else {
            let more = |active| (active < most).then_some(active + 1);
            live.active.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        }
        Some(Self { live: Arc::clone(live), era: live.evictions.era() })
    }

    /// The backend.
    pub fn live(&self) -> &Live {
        &self.live
    }

    /// Why the connection is to end, if that was ordered since the place was taken.
    pub fn eviction(&self) -> Option<Eviction> {
        self.live.evictions.since(self.era)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.live.active.fetch_sub(1, Ordering::Relaxed);
    }
}

label_enum! {
    /// Why a backend's connections are ended.
    pub enum Eviction {
        /// Its drain has reached the deadline.
        Drained => "drained",
        /// It is down, and its pool says that connections end then.
        Down => "down",
    }
}

/// Orders to end all connections of a backend: written by the control plane, read by the sweep.
#[derive(Debug, Default)]
pub struct Evictions(AtomicU64);

impl Evictions {
    /// Ends all connections that a backend has now.
    pub fn order(&self, why: Eviction) {
        // The number of orders, and in the lowest byte why the last was given. One writer.
        let number = self.0.load(Ordering::Relaxed) >> 8;
        self.0.store((number + 1) << 8 | why.index() as u64, Ordering::Relaxed);
    }

    /// Stands for the time before the next order.
    pub fn era(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Whether there was an order since `era`.
    pub fn since(&self, era: u64) -> Option<Eviction> {
        let now = self.0.load(Ordering::Relaxed);
        (now != era).then(|| Eviction::ALL[(now & 0xff) as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_places_than_allowed_and_each_is_given_back() {
        let live = Arc::new(Live::default());
        let places: Vec<_> = (0..5).filter_map(|_| Place::take(&live, 3)).collect();
        assert_eq!((places.len(), live.active.load(Ordering::Relaxed)), (3, 3));
        drop(places);
        assert!(Place::take(&live, 1).is_some());
        assert_eq!(live.active.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn an_order_is_for_the_connections_of_before() {
        let evictions = Evictions::default();
        let era = evictions.era();
        assert_eq!(evictions.since(era), None);
        evictions.order(Eviction::Down);
        assert_eq!(evictions.since(era), Some(Eviction::Down));
        let later = evictions.era();
        assert_eq!(evictions.since(later), None);
        evictions.order(Eviction::Drained);
        assert_eq!((evictions.since(era), evictions.since(later)), (Some(Eviction::Drained), Some(Eviction::Drained)));
    }

    #[test]
    fn a_key_that_is_admitted_stays_so() {
        let keys: Vec<_> = (0_u32..10_000).map(u32::to_le_bytes).collect();
        let mut before = 0;
        for percent in 0..=100 {
            let (part, next) = (f64::from(percent) / 100.0, f64::from(percent + 1) / 100.0);
            let taken: Vec<_> = keys.iter().filter(|key| Admission::part(part).takes(&key[..])).collect();
            assert!(taken.iter().all(|key| Admission::part(next).takes(&key[..])));
            assert!((taken.len() as f64 / keys.len() as f64 - part).abs() < 0.02, "{percent} %");
            assert!(taken.len() >= before);
            before = taken.len();
        }
        assert_eq!(before, keys.len());
    }
}
