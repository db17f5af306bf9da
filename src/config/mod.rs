//! The config file. Ringway parses its YAML into validated types, or reports all faults at once.
//!
//! # Layout
//!
//! - this file: the config types and loading
//! - [`keys`]: the table of all keys with their ranges, defaults and meanings; [`schema`]: the table as a JSON Schema
//! - [`parse`], [`parse_listener`], [`parse_routes`], [`parse_pool`], [`parse_check`], [`parse_provider`]: reads them
//! - [`listener`]: listeners, their routes and access lists; [`mod@pool`]: pools; [`provider`]: the kinds of providers
//! - [`source`]: where the text comes from; [`document`]: its YAML, with included files; [`variables`]: `${NAME}`;
//!   [`places`]: the lines of faults
//! - [`conflicts`]: equal names, clashing addresses and ports, and loops
//! - [`reader`]: typed access to YAML; collects each fault with its key path; [`remedy`]: what faults say
//! - [`diff`]: the differences between two configs
//! - [`effective`]: the reverse of parsing: writes the config as YAML, with every default filled in

pub mod diff;

mod backends_file;
mod conflicts;
mod document;
mod effective;
mod keys;
mod listener;
mod parse;
mod parse_check;
mod parse_listener;
mod parse_pool;
mod parse_provider;
mod parse_replicas;
mod parse_routes;
mod places;
mod pool;
mod provider;
mod reader;
mod remedy;
mod schema;
mod source;
mod variables;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::label_enum;
use crate::metrics::PerBackend;
use crate::proxy::access_log::Format;
use crate::proxy::socket::TcpOptions;

pub use self::backends_file::FileFormat;
pub use self::keys::markdown;
pub use self::listener::{AccessList, BackendPort, Listener, MOST_PORTS, PerSource, Route};
pub use self::pool::{Connect, Ejection, Pool, Timeouts};
pub use self::provider::{
    BackendsFile, Containers, Discover, Process, Provider, Restart, Rollout, Scaled, StaticBackend,
};
pub use self::schema::schema;
pub use self::source::{BUILT_IN, Source, USUAL_FILES};

/// A config could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("{}: {problem}", path.display())]
    Unreadable {
        /// Path of the file.
        path: PathBuf,
        /// Why, and the remedy.
        problem: String,
    },
    /// The text is not valid YAML.
    #[error("{origin}{}: {problem}", line.map(|line| format!(":{line}")).unwrap_or_default())]
    NotYaml {
        /// The file, or where else the text came from.
        origin: String,
        /// The line, from 1, if the parser knows it.
        line: Option<usize>,
        /// The parser's error, and the remedy.
        problem: String,
    },
    /// The text is valid YAML but not a valid config.
    #[error("{}", list(origin, faults))]
    Faulty {
        /// The file, or where else the text came from.
        origin: String,
        /// All faults, in the order in which Ringway found them.
        faults: Vec<Fault>,
    },
}

/// One fault in a config: where it is and how to fix it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Key path, like `pools[echo].health_check.interval`. Entries of lists have their name, id or address, else their position
    /// from 0. Empty for the whole config.
    pub path: String,
    /// What is wrong and what to write instead.
    pub problem: String,
    /// Where the key path is; `None` if the line is unknown.
    pub place: Option<Place>,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(place) = &self.place {
            write!(f, "{place}: ")?;
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.problem)
    }
}

/// A line of a config.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file, or where else the text came from.
    pub file: Arc<str>,
    /// The line, from 1.
    pub line: usize,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// Most faults that an error lists.
const MOST_SHOWN: usize = 100;

fn list(origin: &str, faults: &[Fault]) -> String {
    if let [fault] = faults {
        return if fault.place.is_some() { fault.to_string() } else { format!("{origin}: {fault}") };
    }
    let mut lines: Vec<_> = faults.iter().take(MOST_SHOWN).map(|fault| format!("\n  {fault}")).collect();
    if faults.len() > MOST_SHOWN {
        lines.push(format!("\n  and {} more", faults.len() - MOST_SHOWN));
    }
    format!("{origin}: {} errors{}", faults.len(), lines.concat())
}

/// A valid config. `None` means `auto` where the key accepts it: Ringway derives the value from the machine at start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Number of worker threads; `None`: one per CPU core.
    pub workers: Option<usize>,
    /// Maximum of open connections in the whole process; `None`: derived from the open-file limit.
    pub max_connections: Option<usize>,
    /// How payload bytes are forwarded.
    pub relay: Relay,
    /// TCP options of the client and the backend sockets.
    pub tcp: TcpOptions,
    /// The access log; `None`: off.
    pub access_log: Option<AccessLog>,
    /// Settings of the side port, which serves the API and the metrics.
    pub api: Api,
    /// What the metrics show.
    pub metrics: Metrics,
    /// Settings for pools that use the Docker engine.
    pub docker: Docker,
    /// How Ringway watches the config; `None`: it does not.
    pub config_watch: Option<ConfigWatch>,
    /// Settings of a graceful shutdown.
    pub shutdown: Shutdown,
    /// Settings of upgrades.
    pub upgrade: Upgrade,
    /// Addresses that accept clients; at least one.
    pub listeners: Vec<Listener>,
    /// Pools of backends; at least one.
    pub pools: Vec<Pool>,
}

/// How Ringway watches the config.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConfigWatch {
    /// How long the files must stay the same before Ringway reloads.
    pub settle: Duration,
    /// Longest time until Ringway sees a change that the kernel does not report.
    pub poll: Duration,
    /// The most keys of a pool that may move, in percent; `None`: all.
    pub max_keys_moved: Option<u8>,
}

/// How payload bytes are forwarded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relay {
    /// Whether Ringway splices streams that arrive in large reads.
    pub splice: bool,
    /// Maximum of pipes for splicing; `None`: derived from the open-file limit.
    pub max_pipes: Option<usize>,
    /// Size of each worker's copy buffer in KiB. One read moves at most this much.
    pub buffer_kib: usize,
    /// Ringway counts reads of at least this many KiB towards splicing. At most the copy buffer and half of a pipe's
    /// capacity.
    pub splice_from_kib: usize,
}

/// Settings of the access log, which has one line per connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessLog {
    /// Destination: `stdout`, `stderr` or the path of a file.
    pub path: PathBuf,
    /// Format of each line.
    pub format: Format,
}

/// Settings of the side port, which serves the API and the metrics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Api {
    /// Listen address of the side port.
    pub listen: SocketAddr,
    /// File with the token that calls must send to change something.
    pub token_file: Option<PathBuf>,
    /// Host names that such calls may use in the `host` header, in addition to IP addresses and `localhost`.
    pub allowed_hosts: Vec<String>,
    /// Whether everyone who reaches the side port may call `/api/request`.
    pub public_request: bool,
    /// Whether `GET /` shows a page for people.
    pub page: bool,
    /// Whether Ringway keeps a history of pools and backends in memory.
    pub history: bool,
}

/// What the metrics show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metrics {
    /// Which metrics each backend has.
    pub per_backend: PerBackend,
}

/// Settings of a graceful shutdown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shutdown {
    /// How long Ringway still accepts connections after `/readyz` reports not ready.
    pub delay: Duration,
}

/// Settings of upgrades.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Upgrade {
    /// What happens to the connections of the old process.
    pub connections: OpenConnections,
}

label_enum! {
    /// What happens in an upgrade to the connections that are open in the old process.
    pub enum OpenConnections {
        /// They finish there, within the drain times of their pools.
        Finish => "finish",
        /// They go on in the new process.
        HandOver => "hand_over",
    }
}

/// Settings for pools that use the Docker engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Docker {
    /// Owner label of the containers that Ringway creates; `None`: the name of the Compose project that Ringway runs
    /// in, or `ringway`.
    pub owner: Option<String>,
    /// Maximum time between two complete container lists.
    pub resync: Duration,
    /// Timeout of one call to the engine, in whole seconds.
    pub timeout: Duration,
    /// Credentials for registries, as `docker login` writes them; `None`: none.
    pub auth_file: Option<PathBuf>,
}

impl AccessLog {
    /// Whether the log is a file, and not an output of this process.
    pub fn is_file(&self) -> bool {
        !matches!(self.path.to_str(), Some("stdout" | "stderr"))
    }
}

impl Config {
    /// Reads and validates a config file.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read or does not contain a valid config.
    pub fn load(path: &Path) -> Result<Self, Error> {
        document::Document::read(path)?.config()
    }

    /// Parses a config from YAML text, which can neither include files nor use variables. Error messages name the text by
    /// `origin`.
    ///
    /// # Errors
    /// Returns an error if the text is not a valid config.
    pub fn parse(text: &str, origin: &str) -> Result<Self, Error> {
        document::Document::parse(text.to_owned(), origin)?.config()
    }

    /// The first static backend that leads back to its own listener. The parser has checked the file; a command can add a
    /// backend.
    pub fn loop_fault(&self) -> Option<Fault> {
        let faults = reader::Faults::default();
        conflicts::loops(&faults, &self.pools, &self.listeners);
        faults.into_vec().into_iter().next()
    }

    /// What is valid but hardly intended, with key paths.
    pub fn warnings(&self) -> Vec<Fault> {
        let warning = |path: String, problem: &str| Fault { path, problem: problem.to_owned(), place: None };
        let is_used = |name: &str| self.listeners.iter().any(|listener| listener.pools().any(|pool| pool == name));
        let unused = self.pools.iter().filter(|pool| !is_used(&pool.name));
        let unused = unused.map(|pool| warning(format!("pools[{}]", pool.name), "no listener leads to this pool"));
        let refuses = self.listeners.iter().filter(|listener| listener.refuses_its_balancers());
        let refuses = refuses.map(|listener| {
            let what = "has no entry for some balancers in proxy_protocol.from, and Ringway refuses their health checks: add the balancers";
            warning(format!("listeners[{}].allow", listener.name), what)
        });
        let escapes = self.pools.iter().filter(|pool| pool.has_literal_escapes());
        let escapes = escapes.map(|pool| {
            let what = "has a backslash before a letter, which YAML takes literally: write the text in double quotes, like \"PING\\r\\n\"";
            warning(format!("pools[{}].health_check", pool.name), what)
        });
        let twice = self.pools.iter().filter_map(|pool| {
            let backends = pool.provider.static_backends()?;
            let mut seen = HashMap::new();
            let again = backends.iter().find_map(|backend| {
                let first = seen.insert(backend.location.to_string(), &backend.id)?;
                Some((first, &backend.id))
            });
            let (first, second) = again?;
            let what =
                format!("has the address of {first}: two backends with one address are one server with a larger share");
            Some(warning(format!("pools[{}].provider.static[{second}]", pool.name), &what))
        });
        let idle = self.pools.iter().filter_map(|pool| {
            let backends = pool.provider.static_backends()?;
            let what = "has no backend that gets connections: Ringway resets the connections of this pool";
            (!backends.iter().any(|one| one.membership.takes_keys()))
                .then(|| warning(format!("pools[{}].provider.static", pool.name), what))
        });
        unused.chain(refuses).chain(escapes).chain(twice).chain(idle).collect()
    }

    /// Writes the whole config as YAML, with every default filled in. Loading that YAML gives the same config.
    pub fn to_yaml(&self) -> String {
        effective::yaml(self, effective::Lists::Paths)
    }

    /// As [`Config::to_yaml`], with the networks of access lists in place of the paths of their files. The files can change
    /// before another process reads the config.
    pub fn to_yaml_without_files(&self) -> String {
        effective::yaml(self, effective::Lists::Networks)
    }
}
