//! Providers: each lists the backends of a pool. For `process` and `docker` the [supervisor](super::supervisor)
//! fills the slots.
//!
//! # Layout
//!
//! - this file: backends and slots that follow from the config or a command
//! - [`names`]: looks up the host names of listed backends
//! - [`discover`]: containers that Ringway does not run itself
//! - [`dns`]: the addresses of a name
//! - [`file`]: the state of a file that lists backends

pub mod discover;
pub mod dns;
pub mod file;
pub mod names;

use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use self::dns::status::DnsStatus;
use self::file::FileStatus;
use crate::address::{Address, host_and_port};
use crate::backend::Membership;
use crate::control::docker::watch::EngineStatus;
use crate::label_enum;
use crate::labels::Tally;

/// What a provider depends on, as it last saw it; for status and metrics.
#[derive(Debug, Clone)]
pub enum ProviderStatus {
    /// It depends on nothing outside of Ringway.
    Independent,
    /// A Docker engine.
    Engine(Arc<EngineStatus>),
    /// Name servers.
    Dns(Arc<DnsStatus>),
    /// A file.
    File(Arc<FileStatus>),
}

label_enum! {
    /// How the backends of a pool change, by what its provider says.
    pub enum ChangeKind {
        /// A backend joined.
        Joined => "joined",
        /// A backend has another address or weight.
        Changed => "changed",
        /// A backend leaves.
        Left => "left",
    }
}

impl ProviderStatus {
    /// The state of the Docker engine, for providers that use one.
    pub fn engine(&self) -> Option<&EngineStatus> {
        if let Self::Engine(status) = self { Some(status) } else { None }
    }

    /// Whether a list says which backends the pool has. It may be empty on purpose.
    pub fn has_list(&self) -> bool {
        match self {
            Self::Independent => true,
            Self::File(status) => status.last().applied.is_some(),
            Self::Engine(_) | Self::Dns(_) => false,
        }
    }

    /// Changes of backends, by kind, for the providers `dns` and `file`.
    pub fn changes(&self) -> Option<&Tally<ChangeKind>> {
        match self {
            Self::Dns(status) => Some(&status.changes),
            Self::File(status) => Some(&status.changes),
            Self::Independent | Self::Engine(_) => None,
        }
    }

    /// The file, for the provider `file`.
    pub fn file(&self) -> Option<&FileStatus> {
        if let Self::File(status) = self { Some(status) } else { None }
    }

    /// The look-ups, for the provider `dns`.
    pub fn dns(&self) -> Option<&DnsStatus> {
        if let Self::Dns(status) = self { Some(status) } else { None }
    }
}

/// Weights of a backend.
pub const WEIGHTS: RangeInclusive<u32> = 0..=1000;

/// Limits of the open connections of a backend.
pub const MOST_CONNECTIONS: RangeInclusive<u32> = 1..=1_000_000;

/// A backend that is listed in the config or by a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Identity on the ring.
    pub id: Arc<str>,
    /// Where it listens.
    pub location: Location,
    /// How it takes part in the pool.
    pub membership: Membership,
}

impl Listed {
    /// Parses a backend from its address. Without an `id` the address is its identity.
    ///
    /// # Errors
    /// When the address is neither `host:port` nor `unix:/path`, or the id is empty. The text names the field and the
    /// remedy.
    pub fn parse(address: &str, id: Option<String>, membership: Membership) -> Result<Self, String> {
        let location = Location::parse(address).map_err(|problem| format!("address: {problem}"))?;
        let id = id.unwrap_or_else(|| address.to_owned());
        if let Some(problem) = Self::id_fault(&id) {
            return Err(format!("id {problem}"));
        }
        Ok(Self { id: id.into(), location, membership })
    }

    /// What is wrong with an id, if anything. An id is a word in log lines and tables.
    pub fn id_fault(id: &str) -> Option<&'static str> {
        let is_word = |c: char| !c.is_whitespace() && !c.is_control();
        match id.len() {
            0 => Some("is empty: set a name, or omit it to use the address as the id"),
            _ if !id.chars().all(is_word) => Some("contains a space or a control character: write one word"),
            254.. => Some("is longer than 253 bytes"),
            _ => None,
        }
    }
}

/// Where a listed backend listens, as the config or a command says it. Its text is `host:port` or `unix:/path`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Location {
    /// A host and its TCP port.
    Host {
        /// IP address or host name.
        host: String,
        /// TCP port.
        port: u16,
    },
    /// A Unix socket, which needs no look-up.
    Unix {
        /// Its path.
        address: Address,
    },
}

impl Location {
    /// Parses `host:port` or `unix:/path`.
    ///
    /// # Errors
    /// What is wrong with the text, and the remedy.
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Some(address) = Address::parse_unix(text) {
            return address.map(|address| Self::Unix { address });
        }
        let problem = match host_and_port(text) {
            Ok(("" | "*", port)) => format!("has no host: write it like 10.0.0.5:{port} or db.local:{port}"),
            Ok((_, 0)) => "has port 0: write the port on which the server listens".to_owned(),
            Ok((host, port)) => return Ok(Self::Host { host: host.to_owned(), port }),
            Err(problem) => problem,
        };
        Err(format!("{text:?} {problem}"))
    }

    /// Whether the host is a name, which needs a look-up.
    pub fn is_name(&self) -> bool {
        matches!(self, Self::Host { host, .. } if host.parse::<IpAddr>().is_err())
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // An IPv6 address.
            Self::Host { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Host { host, port } => write!(f, "{host}:{port}"),
            Self::Unix { address } => address.fmt(f),
        }
    }
}

/// The providers `process` and `docker`: the slots of a pool, `echo-1`, `echo-2` and so on.
pub fn slots(pool: &str, replicas: u32) -> Vec<Arc<str>> {
    (1..=replicas).map(|n| format!("{pool}-{n}").into()).collect()
}

/// The number in a slot's name, from 1 to 1000, the highest number of replicas in a pool.
pub(crate) fn slot_number(pool: &str, name: &str) -> Option<u32> {
    let digits = name.strip_prefix(pool)?.strip_prefix('-')?;
    let number = digits.parse().ok().filter(|number| (1..=1000).contains(number))?;
    // `echo-07` and `echo-+7` are not names of slots.
    (format!("{number}") == digits).then_some(number)
}
