//! One member of a pool: its identity and state in a table snapshot. [`live`] has the counters that outlive snapshots.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

pub use self::live::{BackendPermit, Counters, Eviction, Evictions, Failing, Live, Moved};
pub use self::port_search::PortSearch;
pub use self::waiting::{Waiting, WaitingPermit};
use crate::address::Address;
use crate::label_enum;
use crate::outgoing::Refused;

mod live;
mod port_search;
mod waiting;

label_enum! {
    /// Whether a backend may get connections, and if not, why.
    pub enum State {
        /// The backend has no replica yet, or its replica has not passed a health check.
        Starting => "starting",
        /// The backend gets connections.
        Healthy => "healthy",
        /// The backend answers, but another one of its exclusive pool gets the connections, or none.
        Standby => "standby",
        /// The backend fails its health checks and is skipped.
        Unhealthy => "unhealthy",
        /// The backend passes its health checks, but connects to it keep failing; it is skipped for a while.
        Ejected => "ejected",
        /// The backend gets no new connections; open connections may finish.
        Draining => "draining",
        /// The replica keeps dying soon after each start; the supervisor waits before the next start.
        CrashLoop => "crash_loop",
    }
}

label_enum! {
    /// Why a connect to a backend failed.
    pub enum ConnectFailure {
        /// Nothing listens on the address.
        Refused => "refused",
        /// The backend reset the connection during the handshake.
        Reset => "reset",
        /// There is no route, or the host does not answer on its network.
        Unreachable => "unreachable",
        /// No answer within the connect timeout.
        Timeout => "timeout",
        /// Local failure: no free source port towards this backend.
        NoPorts => "no_ports",
        /// Local failure: no file descriptor or memory for the socket within one second.
        NoDescriptors => "no_descriptors",
        /// Local failure: the system refuses a setting of the pool's section `connect`, like a source address.
        Local => "local",
        /// The backend did not take the PROXY header.
        ProxyHeader => "proxy_header",
        /// Any other error; the debug log has the system's error message.
        Other => "other",
    }
}

impl ConnectFailure {
    /// Classifies the system's error.
    pub fn of(error: &io::Error) -> Self {
        if Refused::of(error).is_some() {
            return Self::Local;
        }
        // A Unix socket on which nobody listens may have no file.
        if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) {
            return Self::Refused;
        }
        match Errno::from_io_error(error) {
            Some(Errno::CONNRESET | Errno::CONNABORTED) => Self::Reset,
            Some(Errno::HOSTUNREACH | Errno::NETUNREACH | Errno::HOSTDOWN | Errno::NETDOWN) => Self::Unreachable,
            Some(Errno::TIMEDOUT) => Self::Timeout,
            // This can mean that only the ports towards this address are used up. Another backend may have free ports.
            Some(Errno::ADDRNOTAVAIL | Errno::AGAIN) => Self::NoPorts,
            Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => Self::NoDescriptors,
            _ => Self::Other,
        }
    }

    /// Whether the failure is local and says nothing about the backend.
    pub fn is_ours(self) -> bool {
        matches!(self, Self::NoPorts | Self::NoDescriptors | Self::Local)
    }
}

/// How a backend takes part in its pool, as its provider says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// Multiple of the ring's virtual nodes, 0 to 1000. With 0, no key leads to the backend.
    pub weight: u32,
    /// A backend of a higher tier gets connections only if too few of the lower tiers are healthy.
    #[serde(default)]
    pub tier: u16,
    /// Maximum of its open connections, at least 1; `None`: as the pool says.
    #[serde(default)]
    pub max_connections: Option<u32>,
    /// Whether the backend is drained for as long as the provider says so.
    #[serde(default)]
    pub is_drained: bool,
}

impl Membership {
    /// The membership of a backend about which its provider says no more than its weight.
    pub const fn weighing(weight: u32) -> Self {
        Self { weight, tier: 0, max_connections: None, is_drained: false }
    }

    /// Whether keys lead to the backend while it is healthy.
    pub const fn takes_keys(&self) -> bool {
        self.weight > 0 && !self.is_drained
    }
}

/// What the agent of a backend says: how much of what the backend could take it should get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advice {
    /// The fraction of its keys.
    pub part: Admission,
    /// Maximum of open connections; `None`: no other than the usual one.
    pub max_connections: Option<u32>,
    /// It gets no new connections.
    pub is_drained: bool,
    /// It does not work, whatever its checks say.
    pub is_down: bool,
    /// The answer that has last changed one of them.
    pub text: Arc<str>,
}

impl Advice {
    /// Whether the other one has the same effect.
    pub fn is_like(&self, other: &Self) -> bool {
        let effect = |one: &Self| (one.part, one.max_connections, one.is_drained, one.is_down);
        effect(self) == effect(other)
    }
}

impl Default for Advice {
    fn default() -> Self {
        Self { part: Admission::ALL, max_connections: None, is_drained: false, is_down: false, text: Arc::default() }
    }
}

/// The replica that runs in a backend's slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Replica {
    /// A child process of Ringway.
    Process {
        /// The process id.
        pid: u32,
    },
    /// A Docker container.
    Container {
        /// The engine's container id: 64 hexadecimal digits.
        id: Arc<str>,
        /// The container's name.
        name: Arc<str>,
        /// How its labels say that it is checked; `None`: as the pool says.
        check: Option<OwnCheck>,
    },
}

impl Replica {
    /// How the replica itself says that it is checked; `None`: as the pool says.
    pub fn own_check(&self) -> Option<&OwnCheck> {
        if let Self::Container { check, .. } = self { check.as_ref() } else { None }
    }
}

/// The check of a single replica, in place of its pool's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnCheck {
    /// What the check does.
    pub way: CheckWay,
    /// The port; `None`: that of the backend.
    pub port: Option<u16>,
}

/// What the check of a single replica does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CheckWay {
    /// Nothing: the replica counts as healthy.
    Off,
    /// Connects.
    Tcp,
    /// An HTTP `GET` of this path and query.
    Http(Arc<str>),
}

/// How the last replica of a slot ended, or why no replica could be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// A short reason: `exit status: 3`, `cannot be started: …`.
    pub reason: String,
    /// The exit code, if there was one.
    pub code: Option<i64>,
    /// The last lines of the replica's output, oldest first.
    pub output: Vec<String>,
    /// When Ringway noticed the exit.
    pub at: Instant,
}

/// The last results of a backend's health checks.
#[derive(Debug, Clone)]
pub struct Health {
    /// `ok`, or a short description of the failure; `None` before the first result.
    pub last: Option<Arc<str>>,
    /// The verdict of all checks so far: healthy (`true`), unhealthy (`false`) or undecided (`None`).
    pub verdict: Option<bool>,
    /// Since when `last` has been unchanged.
    pub since: Instant,
}

/// A backend in one snapshot of the table.
#[derive(Debug, Clone)]
pub struct Backend {
    /// Stable identity, hashed onto the ring. For a supervised replica it is the slot.
    pub id: Arc<str>,
    /// The address on which the backend listens; `None` while a slot has no replica.
    pub address: Option<Address>,
    /// How it takes part in its pool.
    pub membership: Membership,
    /// Whether the backend may get connections, and if not, why.
    pub state: State,
    /// The replica in the slot; `None` while the slot is empty, or if Ringway knows only an address.
    pub replica: Option<Replica>,
    /// Counts the replicas and addresses of this id. It separates reports on an old replica from reports on a new one.
    pub incarnation: u64,
    /// How often the slot's replica was restarted after the first start.
    pub restarts: u64,
    /// How the last replica ended; kept while its successor runs.
    pub last_exit: Option<Arc<Exit>>,
    /// The engine reports the backend as unhealthy. This overrides Ringway's own checks.
    pub reported_bad: bool,
    /// The last results of the health checks.
    pub health: Health,
    /// Whether the replica is healthy, even while it drains; `None`: not known yet.
    pub well: Option<bool>,
    /// The fraction of its keys that the backend takes now.
    pub admission: Admission,
    /// What its agent says; `None`: it has none, or that is silent.
    pub advice: Option<Arc<Advice>>,
    /// Set while the backend drains and gets no new connections, even while it has no replica.
    pub drain: Option<Drain>,
    /// The slot that this incarnation stands beside, without points on the ring; `None` for a backend of its own. It comes next,
    /// or has been before and lets its connections end.
    pub beside: Option<Arc<str>>,
    /// Live counters, shared by all snapshots.
    pub live: Arc<Live>,
    /// The incarnation beside it, whose connections count towards the same limit.
    pub other: Option<Arc<Live>>,
}

/// The drain of a backend that gets no new connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drain {
    /// When the drain began.
    pub since: Instant,
    /// When connections that are still open are reset; `None`: never.
    pub deadline: Option<Instant>,
    /// The backend has left the ring, and leaves the pool once its last connection has ended.
    pub leaves: bool,
}

/// The fraction of its keys that a backend takes: all keys, or fewer during a slow start or on the advice of its agent. The key alone decides whether
/// it is in the fraction, so each key returns to the backend exactly once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admission(u32);

impl Admission {
    /// Takes every key.
    pub const ALL: Self = Self(1 << 16);

    /// Takes this fraction of the keys, from 0 to 1.
    #[expect(clippy::cast_sign_loss, reason = "clamped")]
    pub fn part(part: f64) -> Self {
        Self((part.clamp(0.0, 1.0) * f64::from(Self::ALL.0)) as u32)
    }

    /// The fraction of a fraction.
    #[must_use]
    pub fn of(self, other: Self) -> Self {
        Self(((u64::from(self.0) * u64::from(other.0)) >> 16) as u32)
    }

    /// The fraction, in 65,536ths.
    pub fn raw(self) -> u64 {
        self.0.into()
    }

    /// The fraction, from 0 to 1.
    pub fn as_part(self) -> f64 {
        f64::from(self.0) / f64::from(Self::ALL.0)
    }

    /// Whether the backend takes this key.
    pub fn takes(self, key: &[u8]) -> bool {
        // The hash has its own seeds, so a key's position on the ring does not decide when the key is taken.
        self == Self::ALL || (seahash::hash_seeded(key, 1, 2, 3, 4) >> 48) < u64::from(self.0)
    }
}

impl Backend {
    /// A backend that has just joined: it is nowhere yet.
    pub fn new(id: Arc<str>, membership: Membership, now: Instant) -> Self {
        Self {
            id,
            address: None,
            membership,
            state: State::Starting,
            replica: None,
            incarnation: 0,
            restarts: 0,
            last_exit: None,
            reported_bad: false,
            health: Health { last: None, verdict: None, since: now },
            well: None,
            admission: Admission::ALL,
            advice: None,
            drain: None,
            beside: None,
            live: Arc::default(),
            other: None,
        }
    }

    /// What is counted for the backend; `None` beside a slot, whose counters it continues.
    pub fn counters(&self) -> Option<&Counters> {
        self.beside.is_none().then_some(&self.live.counters)
    }

    /// Maximum of open connections, where the pool allows `most` per backend.
    pub fn most_connections(&self, most: u64) -> u64 {
        let usual = self.membership.max_connections.map_or(most, u64::from);
        let advised = self.advice.as_ref().and_then(|advice| advice.max_connections);
        let most = advised.map_or(usual, |advised| usual.min(advised.into()));
        match &self.other {
            Some(other) if most < u64::MAX => most.saturating_sub(other.active.load(Ordering::Relaxed)),
            _ => most,
        }
    }

    /// The membership with the weight that it has on the ring: a backend that leaves has no points.
    pub fn membership_on_ring(&self) -> Membership {
        let leaves = self.drain.is_some_and(|drain| drain.leaves);
        Membership { weight: if leaves { 0 } else { self.membership.weight }, ..self.membership }
    }

    /// Whether the backend is healthy, or stands by and would be if the primary failed.
    pub fn claims(&self) -> bool {
        match self.state {
            State::Healthy => self.beside.is_none(),
            State::Standby => self.membership.weight > 0 && self.health.verdict != Some(false),
            _ => false,
        }
    }

    /// `ok`, or a short description of the failure; `None` before the first result.
    pub fn last_check(&self) -> Option<&str> {
        if self.reported_bad {
            Some("unhealthy or paused, according to the engine")
        } else if let Some(advice) = self.advice.as_ref().filter(|advice| advice.is_down) {
            Some(&advice.text)
        } else {
            self.health.last.as_deref()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_admitted_key_stays_admitted_as_the_fraction_grows() {
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
