//! Listeners: addresses that accept clients, with their routes and access lists.

use std::path::PathBuf;
use std::sync::Arc;

use crate::address::Address;
use crate::label_enum;
use crate::networks::Networks;
use crate::proxy::{Condition, HelloSettings, ProxyProtocol, Rate};

/// Most ports of a listener.
pub const MOST_PORTS: u16 = 1024;

/// An address that accepts clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// Name, unique among the listeners.
    pub name: String,
    /// Listen address; port 0 lets the system choose a port.
    pub listen: Address,
    /// Number of ports, beginning with that of `listen`; 1 to [`MOST_PORTS`].
    pub ports: u16,
    /// The network interface through which clients come; `None`: all.
    pub interface: Option<String>,
    /// Whether the machine need not have the address yet.
    pub freebind: bool,
    /// To which port of a backend connections go.
    pub backend_port: BackendPort,
    /// Permissions of the file of a Unix socket. A user with write permission may connect.
    pub mode: u32,
    /// Clients that may connect; `None`: all.
    pub allow: Option<AccessList>,
    /// Clients that may not connect; `None`: nobody.
    pub deny: Option<AccessList>,
    /// Routes for some of the connections. The first one that matches decides.
    pub routes: Vec<Route>,
    /// Name of the pool that serves all other connections. The pool exists. `None`: they are reset.
    pub pool: Option<String>,
    /// How Ringway reads a ClientHello.
    pub hello: HelloSettings,
    /// Whether Ringway answers `GET /api/status` on this listener itself.
    pub answer_status: bool,
    /// Length of the kernel's queue of connections that are not accepted yet.
    pub backlog: u16,
    /// Maximum of open connections on this listener; `None`: only the process-wide limit applies.
    pub max_connections: Option<usize>,
    /// Limits for each source address.
    pub per_source: PerSource,
    /// From whom the listener accepts a PROXY header; `None`: from nobody.
    pub proxy_protocol: Option<ProxyProtocol>,
}

/// Which connections of a listener go to a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Name, unique among the routes of the listener.
    pub name: String,
    /// Which connections take the route.
    pub when: Condition,
    /// Name of the pool. The pool exists. `None`: the connections are reset.
    pub pool: Option<String>,
}

/// A list of networks, in the config or in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessList {
    /// The networks, also those of a file.
    pub networks: Arc<Networks>,
    /// The file from which they come.
    pub file: Option<PathBuf>,
}

/// Limits for each source address on a listener. All addresses of an IPv6 /64 count as one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PerSource {
    /// Maximum of open connections per source; `None`: unlimited.
    pub max_connections: Option<u32>,
    /// Maximum rate of new connections; `None`: unlimited.
    pub rate: Option<Rate>,
}

label_enum! {
    /// To which port of a backend a listener's connections go.
    pub enum BackendPort {
        /// That of the backend's address.
        Own => "own",
        /// The one to which the client has connected.
        Same => "same",
    }
}

impl Listener {
    /// The addresses on which it listens, one for each port.
    pub fn addresses(&self) -> impl Iterator<Item = Address> + use<'_> {
        let first = self.listen.ip().map(|ip| ip.port());
        (0..self.ports).map(move |n| self.listen.at_port(first.map(|first| first.saturating_add(n))))
    }

    /// The addresses in the form of the config.
    pub fn listen_text(&self) -> String {
        self.listen.with_ports(self.ports)
    }

    /// Number of sockets, with this number of workers. Each port of a range has one, and workers take turns with them.
    pub fn sockets(&self, workers: usize) -> usize {
        if self.ports > 1 { self.ports.into() } else { workers }
    }

    /// The names of all pools to which the listener leads, the default last. A name can be there twice.
    pub fn pools(&self) -> impl Iterator<Item = &str> {
        let of_routes = self.routes.iter().filter_map(|route| route.pool.as_deref());
        of_routes.chain(self.pool.as_deref())
    }

    /// Whether `allow` lacks a balancer that sends a PROXY header. A health check of a balancer has a header without a
    /// client, so the balancer itself is the client.
    pub fn refuses_its_balancers(&self) -> bool {
        let (Some(allow), Some(rules)) = (&self.allow, &self.proxy_protocol) else { return false };
        !allow.networks.covers(&rules.from)
    }

    /// The pool for which the listener's name stands in commands: the default, or that of the first route.
    pub fn main_pool(&self) -> Option<&str> {
        self.pool.as_deref().or_else(|| self.pools().next())
    }
}
