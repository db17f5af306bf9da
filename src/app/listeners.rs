//! Opens, updates and closes the listeners of the app.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;

use super::bound::{Bound, Opened, turn_away};
use super::inheritance::Sockets;
use crate::address::Address;
use crate::api::ListenerView;
use crate::config::{self, Config};
use crate::metrics::{self, Exporter};
use crate::proxy::access_log::AccessLog;
use crate::proxy::listening::ListeningSocket;
use crate::proxy::stats::ListenerStats;
use crate::proxy::{
    Condition, DEFAULT, Intercept, Limit, ListenerId, Proxy, Route, Routing, Rule, Serving, SourceLimits, Sources,
};

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

impl Listener {
    /// Starts to accept connections.
    pub(super) fn open(
        bound: Bound,
        listener: &config::Listener,
        context: &ListenerContext<'_>,
        proxy: &mut Proxy,
    ) -> Self {
        let (sockets, mut addresses) = bound.into_parts(listener.mode);
        let serving = serving(listener, context, None);
        let id = proxy.open(sockets, &serving);
        if addresses.iter_mut().any(|address| std::mem::take(&mut address.is_shared)) {
            // Their options are those of the other listener.
            proxy.update(id, &serving);
        }
        let sources = serving.sources.clone();
        Self { id, config: listener.clone(), addresses, serving, sources }
    }

    /// Whether an update to `new` can keep the sockets. Otherwise `new` needs a new bind.
    pub(super) fn can_become(&self, new: &config::Listener) -> bool {
        let old = &self.config;
        let is_same = old.listen == new.listen && (!new.listen.is_any_port() || old.name == new.name);
        let serves = |address: &Opened| address.serves(new.interface.as_deref());
        is_same && old.ports == new.ports && old.interface == new.interface && self.addresses.iter().all(serves)
    }

    /// Duplicates the sockets of an address, if they serve clients through this interface: another listener may go on with
    /// them, so that no client in their queues is lost.
    ///
    /// # Errors
    /// When the process has no free descriptor.
    pub(super) fn share(&self, wanted: &Address, interface: Option<&str>) -> Option<io::Result<Sockets>> {
        let address = self.address(wanted).filter(|address| address.serves(interface))?;
        let copies = address.copies.iter().map(ListeningSocket::try_clone).collect::<io::Result<_>>();
        Some(copies.map(|list| Sockets { list, is_managed: address.is_managed, is_shared: true }))
    }

    /// Whether the service manager has opened this address, so that Ringway cannot.
    pub(super) fn is_managed_at(&self, wanted: &Address) -> bool {
        self.address(wanted).is_some_and(|address| address.is_managed)
    }

    fn address(&self, wanted: &Address) -> Option<&Opened> {
        self.addresses.iter().find(|address| address.listen == *wanted && !wanted.is_any_port())
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
        keeps_port: listener.backend_port == config::BackendPort::Same,
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
