//! Binds, updates and closes the listeners of the app.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use super::StartError;
use super::inheritance::{Sockets, other_interface};
use crate::address::Address;
use crate::api::ListenerView;
use crate::config::{self, Config};
use crate::metrics::{self, Exporter};
use crate::outgoing::Refused;
use crate::proxy::access_log::AccessLog;
use crate::proxy::listening::{self, ListeningSocket, Wanted};
use crate::proxy::socket::{self, Binding, overlap};
use crate::proxy::stats::ListenerStats;
use crate::proxy::{
    Condition, DEFAULT, Intercept, Limit, ListenerId, Proxy, Route, Routing, Rule, Serving, SourceLimits, Sources,
};

/// Length of the kernel's accept queue for the side port.
const API_BACKLOG: u16 = 1024;

/// What all listeners need to serve connections.
pub(super) struct ListenerContext<'a> {
    pub(super) config: &'a Config,
    /// The routes of all pools, by name.
    pub(super) routes: &'a HashMap<&'a str, &'a Route>,
    pub(super) exporter: &'a Exporter,
    pub(super) intercept: &'a Intercept,
    pub(super) access_log: Option<&'a AccessLog>,
    /// Number of workers.
    pub(super) workers: usize,
}

/// A listener that is bound but does not accept connections yet. Dropping it removes the file of a Unix socket that this
/// process has created.
#[derive(Debug, Default)]
pub(super) struct Bound {
    sockets: Vec<ListeningSocket>,
    addresses: Vec<Opened>,
}

/// One address of a listener, with duplicates of its sockets for a handover to a successor.
#[derive(Debug)]
pub(super) struct Opened {
    /// The address as in the config, where the port can be 0.
    pub(super) listen: Address,
    pub(super) copies: Vec<ListeningSocket>,
    /// The service manager keeps the sockets open.
    pub(super) is_managed: bool,
    /// This process has opened them, and does not serve on them yet.
    is_new: bool,
}

impl Drop for Bound {
    fn drop(&mut self) {
        self.addresses.iter().filter(|address| address.is_new).for_each(|new| turn_away(&new.copies, &new.listen));
    }
}

/// The socket of the side port.
pub(super) struct SidePort {
    pub(super) socket: TcpListener,
    /// The service manager keeps it open.
    pub(super) is_managed: bool,
}

impl SidePort {
    /// The bound address.
    pub(super) fn address(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }
}

/// A listener that accepts connections.
#[derive(Debug)]
pub(super) struct Listener {
    id: ListenerId,
    config: config::Listener,
    addresses: Vec<Opened>,
    serving: Serving,
    /// The counts of source addresses; kept while a reload turns their limits off.
    sources: Option<Arc<Sources>>,
}

/// Binds the addresses of a listener, each with one socket per worker, or one socket if there are several. Adopts the sockets
/// that `inherited` has for an address. `own` are addresses on which this process listens, or its predecessor: the new ones may
/// overlap with them. Key paths in errors start with `key_path`.
pub(super) fn bind(
    key_path: &str,
    listener: &config::Listener,
    config: &Config,
    workers: usize,
    mut inherited: impl FnMut(&Address) -> Result<Sockets, StartError>,
    own: &[SocketAddr],
) -> Result<Bound, StartError> {
    let mut bound = Bound::default();
    for address in listener.addresses() {
        let binding = Binding {
            beside_own: address.ip().is_some_and(|ip| own.iter().any(|&own| overlap(own, ip))),
            ..binding(listener)
        };
        let count = if listener.ports > 1 { 1 } else { workers };
        let wanted = Wanted { count, backlog: listener.backlog, tcp: &config.tcp, binding, mode: listener.mode };
        let opened = bound.add(&address, inherited(&address)?, &wanted);
        opened.map_err(|error| cannot_listen(key_path, address, error))?;
    }
    Ok(bound)
}

/// How the sockets of a listener are bound.
pub(super) fn binding(listener: &config::Listener) -> Binding<'_> {
    Binding { beside_own: false, interface: listener.interface.as_deref(), freebind: listener.freebind }
}

/// The error of a listener whose key path this is.
pub(super) fn cannot_listen(key_path: &str, address: Address, error: io::Error) -> StartError {
    match Refused::of(&error) {
        Some(refused) => {
            StartError::Unfit { key_path: format!("{key_path}.{}", refused.key), problem: refused.to_string() }
        }
        None => StartError::Listen { key_path: format!("{key_path}.listen"), address, error },
    }
}

/// Binds the side port, or adopts the inherited socket if there is one.
pub(super) fn side_port(config: &Config, inherited: Sockets) -> Result<SidePort, StartError> {
    let (key_path, address) = ("api.listen", config.api.listen);
    let Sockets { list: inherited, is_managed } = inherited;
    let tcp = |socket| if let ListeningSocket::Tcp(socket) = socket { Some(socket) } else { None };
    let open = || {
        if let Some(socket) = inherited.into_iter().find_map(tcp) {
            socket::prepare(&socket, API_BACKLOG.into(), &config.tcp).map(|()| socket)
        } else {
            let sockets = socket::listen(address, 1, API_BACKLOG.into(), &config.tcp, Binding::default())?;
            sockets.into_iter().next().ok_or_else(|| io::ErrorKind::NotFound.into())
        }
    };
    let failed = |error| StartError::Listen { key_path: key_path.to_owned(), address: address.into(), error };
    Ok(SidePort { socket: open().map_err(failed)?, is_managed })
}

impl Bound {
    /// Adds the sockets of an address.
    fn add(&mut self, listen: &Address, inherited: Sockets, wanted: &Wanted<'_>) -> io::Result<()> {
        let Sockets { list: mut inherited, is_managed } = inherited;
        // A socket without its file gets no more clients. The old process accepts those that wait on it.
        inherited.retain(|socket| is_managed || socket.is_reachable());
        let is_new = inherited.is_empty();
        let sockets = if is_new { listening::listen(listen, wanted)? } else { listening::adopt(inherited, wanted)? };
        let mut opened = Opened { listen: listen.clone(), copies: Vec::new(), is_managed, is_new };
        let copies = sockets.iter().map(ListeningSocket::try_clone).collect::<io::Result<_>>();
        match copies {
            Ok(copies) => opened.copies = copies,
            Err(error) => {
                if is_new {
                    turn_away(&sockets, listen);
                }
                return Err(error);
            }
        }
        self.sockets.extend(sockets);
        self.addresses.push(opened);
        Ok(())
    }

    /// The addresses whose sockets this process or another one had before.
    pub(super) fn adopted(&self) -> impl Iterator<Item = &Address> {
        self.addresses.iter().filter(|address| !address.is_new).map(|address| &address.listen)
    }

    /// Starts to accept connections.
    pub(super) fn open(
        mut self,
        listener: &config::Listener,
        context: &ListenerContext<'_>,
        proxy: &mut Proxy,
    ) -> Listener {
        let mut addresses = std::mem::take(&mut self.addresses);
        for address in &mut addresses {
            if !address.is_new && !address.is_managed {
                // Not before this process serves: the old one may have to go on.
                address.set_mode(listener.mode);
            }
            address.is_new = false;
        }
        let serving = serving(listener, context, None);
        let id = proxy.open(std::mem::take(&mut self.sockets), &serving);
        let sources = serving.sources.clone();
        Listener { id, config: listener.clone(), addresses, serving, sources }
    }
}

impl Opened {
    /// Whether clients find the sockets, through this interface. The interface of a socket is lost with the interface,
    /// also if another one gets its name.
    fn serves(&self, interface: Option<&str>) -> bool {
        let is_on = || self.copies.iter().all(|socket| socket.is_on(interface));
        match interface {
            // A socket unit may name an interface that the config does not.
            None if self.is_managed => true,
            _ => is_on() && (self.is_managed || self.copies.iter().all(ListeningSocket::is_reachable)),
        }
    }

    /// The bound address. It has the real port where the config says port 0.
    fn bound(&self) -> Address {
        let bound = self.copies.first().and_then(|socket| socket.address().ok());
        bound.unwrap_or_else(|| self.listen.clone())
    }

    /// Sets the permissions of a Unix socket's file.
    fn set_mode(&self, mode: u32) {
        if let Some(Err(error)) = self.copies.first().map(|socket| socket.set_mode(mode)) {
            tracing::warn!(address = %self.listen, %error, "cannot set the permissions of a Unix socket's file");
        }
    }
}

impl Listener {
    /// Whether an update to `new` can keep the sockets. Otherwise `new` needs a new bind.
    pub(super) fn can_become(&self, new: &config::Listener) -> bool {
        let old = &self.config;
        let is_same = old.listen == new.listen && (!new.listen.is_any_port() || old.name == new.name);
        let serves = |address: &Opened| address.serves(new.interface.as_deref());
        is_same && old.ports == new.ports && old.interface == new.interface && self.addresses.iter().all(serves)
    }

    /// Duplicates the sockets of an address, if this listener has it: another listener may go on with them, so that no
    /// client in their queues is lost. `name` and `interface` are those of the other listener.
    pub(super) fn share(
        &self,
        name: &str,
        wanted: &Address,
        interface: Option<&str>,
    ) -> Option<Result<Sockets, StartError>> {
        let is_wanted = |address: &&Opened| address.listen == *wanted && !wanted.is_any_port();
        let address = self.addresses.iter().find(is_wanted)?;
        if !address.serves(interface) {
            return address
                .is_managed
                .then_some(interface)
                .flatten()
                .map(|interface| Err(other_interface(name, wanted, interface)));
        }
        let copies = address.copies.iter().map(ListeningSocket::try_clone).collect::<io::Result<_>>();
        let shared = copies.map(|list| Sockets { list, is_managed: address.is_managed });
        Some(shared.map_err(|error| cannot_listen(&format!("listeners[{name}]"), wanted.clone(), error)))
    }

    /// Applies the settings of `new` to connections that the listener accepts from now on.
    pub(super) fn update(&mut self, new: &config::Listener, context: &ListenerContext<'_>, proxy: &Proxy) {
        self.serving = serving(new, context, Some((&self.serving, self.sources.as_ref())));
        self.sources = self.serving.sources.clone().or(self.sources.take());
        if self.config.mode != new.mode {
            self.addresses.iter().filter(|address| !address.is_managed).for_each(|address| address.set_mode(new.mode));
        }
        self.config = new.clone();
        proxy.update(self.id, &self.serving);
    }

    /// Stops accepting. Open connections continue. Other listeners go on with the sockets of the addresses in `kept`, on these
    /// interfaces.
    pub(super) fn close(self, proxy: &Proxy, kept: &HashSet<(Address, Option<String>)>) {
        tracing::info!(listener = %self.config.name, address = self.bound_text(), "listener closed");
        // The service manager would go on with sockets that take no client.
        for address in self.addresses.iter().filter(|address| !address.is_managed) {
            if !kept.contains(&(address.listen.clone(), self.config.interface.clone())) {
                turn_away(&address.copies, &address.listen);
            }
        }
        proxy.close(self.id);
    }

    /// Removes the file of a Unix socket, on which no process will listen. Ringway can still accept the connections in its
    /// queue.
    pub(super) fn remove_file(&self) {
        let is_own_file = |address: &&Opened| address.listen.ip().is_none() && !address.is_managed;
        self.addresses.iter().filter(is_own_file).for_each(|address| turn_away(&address.copies, &address.listen));
    }

    /// The bound addresses, with real ports.
    pub(super) fn bound(&self) -> impl Iterator<Item = Address> {
        self.addresses.iter().map(Opened::bound)
    }

    /// The bound addresses in the form of the config.
    fn bound_text(&self) -> String {
        self.addresses.first().map_or_else(String::new, |first| first.bound().with_ports(self.config.ports))
    }

    /// Returns the config and the sockets of the listener.
    pub(super) fn sockets(&self) -> (&config::Listener, &[Opened]) {
        (&self.config, &self.addresses)
    }

    /// Returns the view of the listener for the side port.
    pub(super) fn view(&self) -> ListenerView {
        ListenerView {
            name: Arc::clone(&self.serving.name),
            address: self.bound().next().unwrap_or_else(|| self.config.listen.clone()),
            addresses: self.bound_text(),
            routing: Arc::clone(&self.serving.routing),
            stats: Arc::clone(&self.serving.stats),
            limit: Arc::clone(&self.serving.limit),
            sources: self.sources.clone(),
        }
    }
}

/// Turns clients away from sockets that are about to close.
pub(super) fn turn_away(sockets: &[ListeningSocket], address: &Address) {
    for socket in sockets {
        if let Err(error) = socket.turn_away() {
            match socket {
                ListeningSocket::Tcp(_) => {
                    tracing::debug!(%address, %error, "cannot turn clients away from a socket that closes");
                }
                ListeningSocket::Unix(_) => tracing::warn!(%address, %error, "cannot remove the file of a Unix socket"),
            }
        }
    }
}

/// Builds the settings with which the data plane serves a listener. Limits and counters carry over from `before`.
fn serving(
    listener: &config::Listener,
    context: &ListenerContext<'_>,
    before: Option<(&Serving, Option<&Arc<Sources>>)>,
) -> Serving {
    let (before, known) = before.unzip();
    let limit = before.map_or_else(
        || Arc::new(Limit::new(listener.max_connections)),
        |before| {
            before.limit.resize(listener.max_connections);
            Arc::clone(&before.limit)
        },
    );
    let sources = source_limits(listener.per_source).map(|limits| match known.flatten() {
        Some(known) => {
            known.set_limits(limits);
            Arc::clone(known)
        }
        None => Arc::new(Sources::new(limits)),
    });
    // A histogram has its listener's name, so a renamed listener starts with a new one.
    let same = before.filter(|before| *before.name == listener.name);
    Serving {
        name: listener.name.as_str().into(),
        routing: Arc::new(routing(listener, context.routes, context.exporter, same)),
        stats: before.map_or_else(|| Arc::new(ListenerStats::new(context.workers)), |before| Arc::clone(&before.stats)),
        keeps_port: listener.backend_port == config::BackendPort::Same,
        limit,
        sources,
        proxy_protocol: listener.proxy_protocol.clone().map(Arc::new),
        intercept: listener.answer_status.then(|| context.intercept.clone()),
        tcp: context.config.tcp,
        backlog: listener.backlog,
        access_log: context.access_log.cloned(),
        connection_seconds: same.map_or_else(
            || context.exporter.histogram(&metrics::CONNECTION_SECONDS, &[&listener.name]),
            |same| same.connection_seconds.clone(),
        ),
    }
}

/// Builds what a listener decides for its connections. The counters of rules carry over from `before`, by name.
pub(super) fn routing(
    listener: &config::Listener,
    of_pools: &HashMap<&str, &Route>,
    exporter: &Exporter,
    before: Option<&Serving>,
) -> Routing {
    let default = (DEFAULT, Condition::default(), listener.pool.as_deref());
    let rules = listener.routes.iter().map(|route| (route.name.as_str(), route.when.clone(), route.pool.as_deref()));
    let mut routes: Vec<Route> = Vec::new();
    let rules = rules.chain([default]).map(|(name, when, pool)| {
        // The config has checked that the pool exists.
        let route = pool.and_then(|pool| of_pools.get(pool)).map(|&route| {
            let known = routes.iter().position(|known| known.pool == route.pool);
            known.unwrap_or_else(|| {
                routes.push(route.clone());
                routes.len() - 1
            })
        });
        let known = before.and_then(|before| before.routing.rules.iter().find(|rule| *rule.name == *name));
        let matched = known.map_or_else(Arc::default, |rule| Arc::clone(&rule.matched));
        Rule { name: name.into(), when, route, matched }
    });
    let rules = rules.collect();
    let networks = |list: &Option<config::AccessList>| list.as_ref().map(|list| Arc::clone(&list.networks));
    Routing {
        allow: networks(&listener.allow),
        deny: networks(&listener.deny),
        rules,
        routes: routes.into(),
        hello: listener.hello,
        hello_bytes: before.map_or_else(
            || exporter.histogram(&metrics::HELLO_BYTES, &[&listener.name]),
            |before| before.routing.hello_bytes.clone(),
        ),
    }
}

fn source_limits(limits: config::PerSource) -> Option<SourceLimits> {
    let config::PerSource { max_connections, rate } = limits;
    (max_connections.is_some() || rate.is_some())
        .then(|| SourceLimits { max_connections: max_connections.unwrap_or(u32::MAX), rate })
}
