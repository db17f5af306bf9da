//! What a process tells its successor of one open connection: with names in place of positions, and durations in place of points in time,
//! because both differ in the two processes.

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::address::Address;
use crate::client_hello::Hello;
use crate::labels::Label as _;
use crate::proxy::connect::Try;
use crate::proxy::connection::{Connection, ConnectionId, KeepaliveState, Served};
use crate::proxy::direction::{Nodelay, Path};
use crate::proxy::moving::MoveIn;
use crate::stream::Client;

/// An open connection. Its sockets, pipes and held bytes travel beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The connection's id.
    pub(super) id: String,
    pub(in crate::proxy) listener: String,
    /// The rule of the listener that has matched.
    pub(super) rule: Option<String>,
    pub(super) pool: String,
    pub(super) backend: String,
    /// The backend's address that has answered.
    pub(super) address: Address,
    pub(in crate::proxy) peer: Client,
    /// The client in the PROXY header, and where it connected.
    pub(in crate::proxy) proxied: Option<(Client, SocketAddr)>,
    /// What was found where a PROXY header may be.
    pub(in crate::proxy) proxy_header: Option<String>,
    pub(in crate::proxy) hello: Option<Hello>,
    /// The backends that were tried without success, and why; no reason: it had left its pool.
    pub(super) tries: Vec<(String, Option<String>)>,
    /// Time since accept.
    pub(in crate::proxy) age: Duration,
    /// Time from accept until the backend answered.
    pub(super) connected_after: Duration,
    /// Time without a byte.
    pub(in crate::proxy) silent: Duration,
    /// Time until it reaches its maximum age.
    pub(super) expires_in: Option<Duration>,
    pub(super) moves: Option<MoveIn>,
    /// Whether TCP keepalive is on towards the backend.
    pub(in crate::proxy) keepalive: bool,
    pub(in crate::proxy) up: Half,
    pub(in crate::proxy) down: Half,
}

/// One direction of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::proxy) struct Half {
    /// Bytes moved so far, by path.
    pub(in crate::proxy) copied: u64,
    pub(in crate::proxy) spliced: u64,
    pub(in crate::proxy) path: Path,
    pub(in crate::proxy) run: u8,
    pub(in crate::proxy) nodelay: Nodelay,
    /// The source has ended, and the sink was told so.
    pub(in crate::proxy) ended: bool,
    pub(in crate::proxy) holds: Holds,
}

/// Where the bytes are that have been read but not yet written, and their number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::proxy) enum Holds {
    Nothing,
    /// In memory.
    Bytes(usize),
    /// In a pipe.
    Piped(usize),
    /// In memory, from a pipe that was given up.
    MovedOut(usize),
}

impl Holds {
    /// Number of bytes that travel beside the record.
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::Bytes(length) | Self::MovedOut(length) => length,
            Self::Nothing | Self::Piped(_) => 0,
        }
    }

    fn descriptors(self) -> usize {
        if matches!(self, Self::Piped(_)) { 2 } else { 0 }
    }
}

impl Record {
    /// What a process tells of a connection with a backend.
    pub(super) fn of(connection: &Connection, served: &Served, tries: &[Try], [up, down]: [Half; 2]) -> Self {
        let (serving, now) = (&connection.listener.serving, connection.listener.worker.clock.get());
        let rule = connection.rule.get().map(|rule| &serving.routing.rules[usize::from(rule)]);
        let silent = now.saturating_sub(connection.last_active.get());
        Self {
            id: connection.id.to_string(),
            listener: serving.name.to_string(),
            rule: rule.map(|rule| rule.name.to_string()),
            pool: connection.route().map(|route| route.pool.to_string()).unwrap_or_default(),
            backend: served.backend.to_string(),
            address: served.address.clone(),
            peer: connection.peer,
            proxied: connection.proxied.get().map(|proxied| (proxied.client, proxied.destination)),
            proxy_header: connection.proxy_header.get().map(|result| result.as_str().to_owned()),
            hello: connection.hello.get().map(|hello| (**hello).clone()),
            tries: tries
                .iter()
                .map(|one| (one.backend.to_string(), one.failure.map(|failure| failure.as_str().to_owned())))
                .collect(),
            age: connection.opened.elapsed(),
            connected_after: served.connected_after,
            silent: if connection.is_active.get() { Duration::ZERO } else { silent },
            expires_in: served.expires.map(|expires| expires.saturating_sub(now)),
            moves: served.moves.get().map(|time| time.as_of(now)),
            keepalive: connection.keepalive.get() == KeepaliveState::On,
            up,
            down,
        }
    }

    /// The connection's id.
    pub(in crate::proxy) fn id(&self) -> Option<ConnectionId> {
        self.id.parse().ok()
    }

    /// The worker that takes the connection, of this number of workers: an id holds the number of its worker.
    pub(super) fn worker(&self, workers: usize) -> Option<usize> {
        self.id()?.worker().checked_rem(workers)
    }

    /// Number of descriptors that travel beside the record: two sockets, and two ends of each pipe.
    pub fn descriptors(&self) -> usize {
        2 + self.up.holds.descriptors() + self.down.holds.descriptors()
    }

    /// Number of bytes that travel beside the record.
    pub fn bytes(&self) -> usize {
        self.up.holds.bytes().saturating_add(self.down.holds.bytes())
    }
}
