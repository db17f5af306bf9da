//! The config file: YAML into types that cannot be wrong, or all its faults at once.
//!
//! # Layout
//!
//! - this file: the types, and loading
//! - [`parse`], [`parse_pool`], [`parse_check`], [`parse_provider`]: every key, its range and its default
//! - [`reader`]: typed access to YAML that collects faults with their key path
//! - [`diff`]: what differs between two configs
//! - [`effective`]: the other way: the config with every default filled in, as YAML

pub mod diff;

mod effective;
mod parse;
mod parse_check;
mod parse_pool;
mod parse_provider;
mod reader;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::control::ejection;
use crate::control::health::Probe;
use crate::control::publisher::OnDown;
use crate::control::supervisor::docker::Spec;
use crate::proxy::access_log::Format;
use crate::proxy::key::KeyKind;
use crate::proxy::socket::TcpOptions;
use crate::ring::Parameters;

/// The config that is built into the binary: `config.yaml` of the repository.
pub const BUILT_IN: &str = include_str!("../../config.yaml");

/// Where a config comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A file.
    File(PathBuf),
    /// [`BUILT_IN`].
    BuiltIn,
}

impl Source {
    /// Reads the config.
    ///
    /// # Errors
    /// When it cannot be read or is not a valid config.
    pub fn load(&self) -> Result<Config, Error> {
        match self {
            Self::File(path) => Config::load(path),
            Self::BuiltIn => Config::parse(BUILT_IN, &self.to_string()),
        }
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::BuiltIn => f.write_str("the built-in config"),
        }
    }
}

/// Why there is no config.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("{}: {error}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// It is not YAML at all.
    #[error("{origin}: not valid YAML: {error}")]
    NotYaml {
        /// The file, or where else the text came from.
        origin: String,
        /// What the parser says, with line and column.
        error: serde_yaml::Error,
    },
    /// It is YAML, but not a config.
    #[error("{}", list(origin, faults))]
    Faulty {
        /// The file, or where else the text came from.
        origin: String,
        /// Every fault found.
        faults: Vec<Fault>,
    },
}

/// One fault: where, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {problem}")]
pub struct Fault {
    /// The key path: `pools[0].health_check.interval`.
    pub path: String,
    /// What is wrong and what would be right.
    pub problem: String,
}

fn list(origin: &str, faults: &[Fault]) -> String {
    use std::fmt::Write as _;

    let count = faults.len();
    let mut text = format!("{origin}: {count} {}", if count == 1 { "fault" } else { "faults" });
    for fault in faults {
        // Writing to a String cannot fail.
        let _ = write!(text, "\n  {fault}");
    }
    text
}

/// A valid config. `None` stands for "auto": worked out from the machine at start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Worker threads; `None`: as many as there are cores.
    pub workers: Option<usize>,
    /// Connections of the whole process; `None`: what the limit on open files allows.
    pub max_connections: Option<usize>,
    /// How bytes are moved.
    pub relay: Relay,
    /// TCP options of both sides.
    pub tcp: TcpOptions,
    /// A line per connection; `None`: off.
    pub access_log: Option<AccessLog>,
    /// The side port.
    pub api: Api,
    /// How the Docker engine is used, where a pool needs it.
    pub docker: Docker,
    /// How Ringway ends.
    pub shutdown: Shutdown,
    /// Where clients connect; at least one.
    pub listeners: Vec<Listener>,
    /// Where connections go; at least one.
    pub pools: Vec<Pool>,
}

/// How bytes are moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relay {
    /// Whether streams of large reads are spliced.
    pub splice: bool,
    /// Pipes for that; `None`: what the limit on open files allows.
    pub max_pipes: Option<usize>,
    /// Each worker's buffer of the copy path, in KiB: the most that one read moves.
    pub buffer_kib: usize,
    /// Reads of this many KiB speak for splicing; at most the buffer, and half of what a pipe takes.
    pub splice_from_kib: usize,
}

/// A line per connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessLog {
    /// `stdout`, `stderr` or a file.
    pub path: PathBuf,
    /// How a line is written.
    pub format: Format,
}

/// The side port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Api {
    /// Its address.
    pub listen: SocketAddr,
    /// A file with the token that calls need which change something.
    pub token_file: Option<PathBuf>,
    /// Names, beside addresses and `localhost`, by which such calls may name this host.
    pub allowed_hosts: Vec<String>,
}

/// How Ringway ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shutdown {
    /// How long connections are accepted after the side port has begun to say not ready.
    pub delay: Duration,
}

/// How the Docker engine is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Docker {
    /// Whose containers are those that Ringway makes; `None`: the compose project that it runs in, or `ringway`.
    pub owner: Option<String>,
    /// The longest time between two full lists of containers.
    pub resync: Duration,
    /// The longest time for a call, in whole seconds.
    pub timeout: Duration,
}

/// An address where clients connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// Unique among listeners.
    pub name: String,
    /// Its address.
    pub listen: SocketAddr,
    /// Name of an existing pool.
    pub pool: String,
    /// Whether `GET /api/status` is answered here by Ringway itself.
    pub answer_status: bool,
    /// Connections that the kernel queues until they are accepted.
    pub backlog: u16,
    /// Connections of this listener; `None`: as many as the process may have.
    pub max_connections: Option<usize>,
    /// What one source address may do.
    pub per_source: PerSource,
}

/// What one source address may do on a listener; an IPv6 source is a /64.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PerSource {
    /// Connections at a time; `None`: any number.
    pub max_connections: Option<u32>,
    /// New connections per second, on average; `None`: any number.
    pub rate: Option<u32>,
    /// New connections at once.
    pub burst: u32,
}

/// A named set of backends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// Unique among pools.
    pub name: String,
    /// What of a connection is hashed.
    pub key: KeyKind,
    /// The shape of the ring.
    pub ring: Parameters,
    /// Where the backends come from.
    pub provider: Provider,
    /// Connecting to them.
    pub connect: Connect,
    /// When a connection is ended for silence.
    pub timeouts: Timeouts,
    /// How backends are checked; `None`: not at all.
    pub health_check: Option<HealthCheck>,
    /// When backends are taken out that fail connects; `None`: never.
    pub ejection: Option<Ejection>,
    /// Percentage of healthy backends under which all are tried; 0: never.
    pub panic_threshold: u8,
    /// What happens to the connections of a backend that goes down.
    pub on_down: OnDown,
    /// Time in which a backend that comes back gets all of its keys again; zero: at once.
    pub slow_start: Duration,
    /// Connections that one backend may have; `None`: any number.
    pub max_connections_per_backend: Option<u32>,
    /// How long open connections may go on when Ringway stops, or when a backend is drained.
    pub drain: Duration,
}

/// When backends are taken out that fail connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ejection {
    /// Failures in a row that it takes.
    pub after: u32,
    /// For how long, and how many at most.
    pub settings: ejection::Settings,
}

/// Where the backends of a pool come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Provider {
    /// Listed in the config; at least one.
    Static(Vec<StaticBackend>),
    /// Child processes.
    Process(Process),
    /// Containers that Ringway makes.
    Containers(Containers),
    /// Containers that somebody else runs.
    Discover(Discover),
}

/// For how many backends room is kept where nobody can know how many there will be.
const DISCOVERED: usize = 32;

impl Provider {
    /// How many replicas the config wants, where they are Ringway's to start.
    pub fn replicas(&self) -> Option<u32> {
        match self {
            Self::Process(process) => Some(process.replicas),
            Self::Containers(containers) => Some(containers.replicas),
            Self::Static(_) | Self::Discover(_) => None,
        }
    }

    /// How many backends it has, or may well have.
    pub fn backends(&self) -> usize {
        match self {
            Self::Static(backends) => backends.len(),
            Self::Process(process) => process.replicas as usize,
            Self::Containers(containers) => containers.replicas as usize,
            Self::Discover(_) => DISCOVERED,
        }
    }
}

/// A backend listed in the config.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StaticBackend {
    /// Unique within the pool.
    pub id: String,
    /// An address or a name that is resolved at start.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Multiple of the ring's virtual nodes.
    pub weight: u32,
}

/// Child processes as backends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// How many.
    pub replicas: u32,
    /// Program and arguments, with `{port}` and `{slot}`; `ringway` as the program is this very binary.
    pub command: Vec<String>,
    /// Added to the environment, with the same placeholders.
    pub env: Vec<(String, String)>,
    /// First and last port of a range; `None`: the system picks.
    pub ports: Option<(u16, u16)>,
    /// When a dead one is started again.
    pub restart: Restart,
    /// From SIGTERM to SIGKILL when Ringway stops.
    pub stop_grace: Duration,
}

/// Containers as backends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Containers {
    /// How many.
    pub replicas: u32,
    /// What each is made from.
    pub spec: Spec,
    /// Where they are reached; `None`: the network that Ringway itself is on.
    pub network: Option<String>,
    /// When a dead one is replaced.
    pub restart: Restart,
    /// From SIGTERM to SIGKILL where one is stopped.
    pub stop_grace: Duration,
}

/// Containers that somebody else runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Discover {
    /// `name` or `name=value`.
    pub label: String,
    /// The port on which they listen.
    pub port: u16,
    /// Where they are reached; `None`: the network that Ringway itself is on.
    pub network: Option<String>,
}

/// When a dead replica is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restart {
    /// Before the second start in a row that did not last; doubled with each more. The first is at once.
    pub backoff: Duration,
    /// The longest wait.
    pub max_backoff: Duration,
    /// A replica that ran this long has lasted.
    pub stable_after: Duration,
    /// Starts in a row that did not last after which the slot counts as in a crash loop.
    pub crash_loop_after: u32,
    /// How long a new replica may fail its checks and still count as starting.
    pub start_grace: Duration,
    /// A replica that runs but has been unhealthy for this long is replaced; `None`: never.
    pub replace_after: Option<Duration>,
}

/// Connecting to a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connect {
    /// Longest time for one try.
    pub timeout: Duration,
    /// Backends tried for one connection.
    pub attempts: u16,
}

/// When a connection is ended for silence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// While both sides are open.
    pub idle: Duration,
    /// Once one side has ended its stream.
    pub half_closed: Duration,
    /// A connection as old as this is reset; `None`: never.
    pub max_connection_age: Option<Duration>,
}

/// How backends are checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthCheck {
    /// What one check does.
    pub probe: Probe,
    /// Between checks of one backend.
    pub interval: Duration,
    /// The same while its checks speak against its state.
    pub fast_interval: Duration,
    /// Most of an interval that is added to it, at random, in percent.
    pub jitter: u8,
    /// Longest time for one check.
    pub timeout: Duration,
    /// Passes in a row that make an unhealthy backend healthy.
    pub rise: u32,
    /// Failures in a row that make a healthy backend unhealthy.
    pub fall: u32,
}

impl Config {
    /// Loads a file.
    ///
    /// # Errors
    /// When it cannot be read or is not a valid config.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(|error| Error::Unreadable { path: path.to_owned(), error })?;
        Self::parse(&text, &path.display().to_string())
    }

    /// Reads a config from text; `origin` names it in errors.
    ///
    /// # Errors
    /// When it is not a valid config.
    pub fn parse(text: &str, origin: &str) -> Result<Self, Error> {
        let value = serde_yaml::from_str(text).map_err(|error| Error::NotYaml { origin: origin.to_owned(), error })?;
        parse::config(&value).map_err(|faults| Error::Faulty { origin: origin.to_owned(), faults })
    }

    /// The whole config as YAML, every default filled in. Loading it gives the same config.
    pub fn to_yaml(&self) -> String {
        effective::yaml(self)
    }
}
