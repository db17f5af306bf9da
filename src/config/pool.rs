//! A pool, and what it can have.

use std::sync::Arc;
use std::time::Duration;

use super::{Listener, Provider, StaticBackend, conflicts, reader};
use crate::control::agent;
use crate::control::ejection;
use crate::control::health;
use crate::control::publisher::OnDown;
use crate::outgoing::Outgoing;
use crate::proxy::Balance;
use crate::proxy::key::KeyKind;
use crate::proxy_header::{OwnHeader, SendProxy};
use crate::ring::{MOST_POINTS, Parameters};

/// The most backends that a provider may find, as many as a pool may have replicas.
const MOST_FOUND: u64 = 1000;

/// A named set of backends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// Name, unique among the pools.
    pub name: String,
    /// The part of a connection that Ringway hashes to pick a backend.
    pub key: KeyKind,
    /// How a backend is chosen.
    pub balance: Balance,
    /// Parameters of the consistent-hash ring.
    pub ring: Parameters,
    /// The most connections of a backend, in percent of its fair share; `None`: unlimited.
    pub bound: Option<u16>,
    /// The source of the backends.
    pub provider: Provider,
    /// How Ringway connects to the backends.
    pub connect: Connect,
    /// The PROXY header that backends get; `None`: none.
    pub send_proxy: Option<SendProxy>,
    /// Timeouts and the maximum age of a connection.
    pub timeouts: Timeouts,
    /// Health checks of the backends; `None`: off.
    pub health_check: Option<health::Settings>,
    /// The agents of the backends; `None`: none.
    pub agent: Option<agent::Settings>,
    /// Ejection of backends after failed connects; `None`: off.
    pub ejection: Option<Ejection>,
    /// Panic mode starts when fewer than this percentage of backends are healthy. Ringway then uses all backends.
    /// 0: off.
    pub panic_threshold: u8,
    /// The next tier gets connections if less than this percentage of a tier's weight is healthy. 0: if no backend is.
    pub spill_below: u8,
    /// At most one backend gets connections.
    pub is_exclusive: bool,
    /// What Ringway does with the open connections of a backend that goes down.
    pub on_down: OnDown,
    /// After a change of the ring, connections whose keys lead to other backends end within this time; `None`: they stay.
    pub on_move: Option<Duration>,
    /// Time in which Ringway ramps up a recovered backend to its full share of keys; zero: at once.
    pub slow_start: Duration,
    /// Maximum of open connections per backend; `None`: unlimited.
    pub max_connections_per_backend: Option<u32>,
    /// How long open connections may continue when Ringway stops or a backend drains.
    pub drain: Duration,
}

/// Ejection of backends after failed connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ejection {
    /// Number of consecutive failed connects that eject a backend.
    pub after: u32,
    /// Duration of an ejection and the maximum share of ejected backends.
    pub settings: ejection::Settings,
}

/// How Ringway connects to a backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connect {
    /// Timeout of one connect attempt.
    pub timeout: Duration,
    /// Maximum number of backends that Ringway tries for one connection.
    pub attempts: u16,
    /// Where connections come from, checks and questions to agents included; `None`: the kernel decides.
    pub outgoing: Option<Arc<Outgoing>>,
}

/// Timeouts and the maximum age of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// Maximum time without data while both directions are open; `None`: no limit.
    pub idle: Option<Duration>,
    /// Maximum time without data after one side has closed its direction.
    pub half_closed: Duration,
    /// Ringway resets a connection at this age; `None`: never.
    pub max_connection_age: Option<Duration>,
}

impl Pool {
    /// The parameters of the pool's ring. A backend has its weight times as many points as the virtual nodes here.
    pub fn parameters(&self) -> Parameters {
        Parameters { virtual_nodes: self.ring.virtual_nodes.div_ceil(self.provider.usual_weight()), ..self.ring }
    }

    /// The most backends that a provider may find: beyond it, the ring would have too many points.
    pub fn most_backends(&self) -> usize {
        (MOST_POINTS / u64::from(self.ring.virtual_nodes.max(1))).min(MOST_FOUND) as usize
    }

    /// The largest sum of weights for which the ring has room.
    pub fn most_weight(&self) -> u64 {
        MOST_POINTS / u64::from(self.parameters().virtual_nodes.max(1))
    }

    /// Why connections cannot move to other backends after a change of the ring, in words.
    pub fn cannot_move(&self) -> Option<&'static str> {
        if self.balance == Balance::LeastConnections {
            Some("balance: least_connections has no keys")
        } else if self.is_exclusive {
            Some("with tiers.exclusive, one backend gets all connections anyway")
        } else if self.key == KeyKind::Source {
            Some("key: source gives a client another key when it connects again")
        } else {
            None
        }
    }

    /// Whether the pool can have these backends.
    ///
    /// # Errors
    /// Why it cannot, and the remedy.
    pub fn fits(&self, backends: &[StaticBackend], listeners: &[Listener]) -> Result<(), String> {
        let listed = Self { provider: Provider::Static(backends.to_vec().into()), ..self.clone() };
        let faults = reader::Faults::default();
        conflicts::loops(&faults, std::slice::from_ref(&listed), listeners);
        let in_loop = faults.into_vec().into_iter().next().map(|fault| fault.problem);
        let fault = listed.too_many_points().or_else(|| listed.check_port_fault()).or(in_loop);
        fault.map_or(Ok(()), Err)
    }

    /// Whether the check sends or expects the characters `\\r` or `\\n`, which single quotes do not turn into line ends.
    pub(super) fn has_literal_escapes(&self) -> bool {
        let Some(health::Kind::Expect(expect)) = self.health_check.as_ref().map(|health| &health.check.kind) else {
            return false;
        };
        let has = |bytes: &[u8]| bytes.windows(2).any(|pair| matches!(pair, b"\\r" | b"\\n"));
        expect.steps.iter().any(|step| has(&step.send) || has(&step.expect)) || has(&expect.goodbye)
    }

    /// The PROXY header that the side port sends to backends. It follows the checks only for `local_as_proxy`.
    pub fn own_header(&self) -> OwnHeader {
        let Some(send) = &self.send_proxy else { return OwnHeader::Absent };
        match self.health_check.as_ref().map(|health| health.check.send_proxy) {
            Some(OwnHeader::Addresses(version)) => OwnHeader::Addresses(version),
            _ => OwnHeader::Local(send.version),
        }
    }

    /// Why the check or the agent cannot use its port, in words. The parser has checked the file; a command can add a backend.
    pub fn check_port_fault(&self) -> Option<String> {
        let of_check =
            self.health_check.as_ref().and_then(|health| health.check.port).map(|port| ("health_check", port));
        let (key, port) = of_check.or(self.agent.as_ref().map(|agent| ("agent", agent.port)))?;
        let problem =
            "needs backends with a TCP address, and a backend has a Unix socket: remove the backend, or the key";
        self.provider.has_unix_sockets().then(|| format!("{key}.port {problem} (port {port})"))
    }

    /// Returns a fault text if the pool's ring would have too many points.
    pub fn too_many_points(&self) -> Option<String> {
        let points = weights(&self.provider).saturating_mul(u64::from(self.ring.virtual_nodes));
        (points > MOST_POINTS).then(|| {
            format!(
                "the ring would have {points} points, but the maximum is {MOST_POINTS}: lower virtual_nodes, weights or the number of backends"
            )
        })
    }
}

/// The expected sum of the weights of all backends.
fn weights(provider: &Provider) -> u64 {
    match provider {
        Provider::Static(backends) => backends.iter().map(|backend| u64::from(backend.membership.weight)).sum(),
        provider => provider.backends() as u64,
    }
}
