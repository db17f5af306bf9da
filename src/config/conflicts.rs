//! Reports entries of a config that conflict with one another: equal names, clashing addresses and ports, and loops.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::reader::Faults;
use super::{Api, BackendPort, Listener, Pool, Process, Provider};
use crate::address::Address;
use crate::control::provider::Location;

/// The key paths of the entries of a list: with their names, or with positions where two entries have the same name.
struct Paths<'a> {
    list: &'a str,
    names: Vec<&'a str>,
}

impl<'a> Paths<'a> {
    fn of_pools(pools: &'a [Pool]) -> Self {
        Self { list: "pools", names: pools.iter().map(|pool| pool.name.as_str()).collect() }
    }

    fn of_listeners(listeners: &'a [Listener]) -> Self {
        Self { list: "listeners", names: listeners.iter().map(|listener| listener.name.as_str()).collect() }
    }

    fn path(&self, n: usize) -> String {
        let (list, name) = (self.list, self.names[n]);
        let is_unique = !name.is_empty() && self.names.iter().filter(|&&other| other == name).nth(1).is_none();
        if is_unique { format!("{list}[{name}]") } else { format!("{list}[{n}]") }
    }
}

/// Reports duplicate names.
pub(super) fn duplicate_names<'a>(faults: &Faults, list: &str, names: impl Iterator<Item = &'a str>) {
    let mut seen = HashMap::new();
    for (n, name) in names.enumerate().filter(|(_, name)| !name.is_empty()) {
        if let Some(first) = seen.insert(name, n) {
            faults.add(
                &format!("{list}[{n}].name"),
                format_args!("{name:?} is already the name of {list}[{first}]: choose another name"),
            );
        }
    }
}

/// Reports port ranges of replicas that overlap each other, a listener or the side port. Replicas listen on 127.0.0.1.
pub(super) fn clashing_ports(faults: &Faults, pools: &[Pool], listeners: &[Listener], api: &Api) {
    let on_loopback = |address: SocketAddr| {
        address.is_ipv4() && (address.ip().is_unspecified() || address.ip().is_loopback()) && address.port() != 0
    };
    let mut taken: Vec<(String, u16, u16)> = Vec::new();
    let (of_listeners, of_pools) = (Paths::of_listeners(listeners), Paths::of_pools(pools));
    let on_ip =
        listeners.iter().enumerate().filter_map(|(n, listener)| Some((n, listener.listen.ip()?, listener.ports)));
    for (n, listen, ports) in on_ip.filter(|&(_, listen, _)| on_loopback(listen)) {
        taken.push((of_listeners.path(n) + ".listen", listen.port(), listen.port() + (ports - 1)));
    }
    if on_loopback(api.listen) {
        taken.push(("api.listen".to_owned(), api.listen.port(), api.listen.port()));
    }
    for (n, pool) in pools.iter().enumerate() {
        let Provider::Process(Process { ports: Some((first, last)), .. }) = pool.provider else { continue };
        let path = of_pools.path(n) + ".provider.process.ports";
        if let Some((other, ..)) = taken.iter().find(|&&(_, from, to)| first <= to && from <= last) {
            faults.add(&path, format_args!("{first}-{last} overlaps {other}: choose other ports"));
        }
        taken.push((path, first, last));
    }
}

/// Reports static backends that lead back to the listener that they serve, directly or through other pools. Each
/// connection, and each health check, would cause another one without end.
pub(super) fn loops(faults: &Faults, pools: &[Pool], listeners: &[Listener]) {
    // Groups the listeners by port. Listeners on Unix sockets have the key `None`.
    let mut by_port = HashMap::<Option<u16>, Vec<&Listener>>::new();
    for listener in listeners {
        ports_of(listener).for_each(|port| by_port.entry(port).or_default().push(listener));
    }
    // For each pool: the ports of listeners that keep their clients' port. Every port of a backend can then be meant.
    let kept = |pool: &Pool| {
        let keeps = |listener: &&Listener| {
            listener.backend_port == BackendPort::Same && listener.pools().any(|name| name == pool.name)
        };
        listeners.iter().filter(keeps).flat_map(ports_of).collect::<Vec<_>>()
    };
    // For each pool: its backends that are listeners, with their places in the config and the pools behind them.
    let next: Vec<Vec<(usize, usize)>> = pools
        .iter()
        .map(|pool| {
            let kept = kept(pool);
            let backends = pool.provider.static_backends().unwrap_or_default().iter().enumerate();
            let behind = backends.filter_map(|(n, backend)| {
                let port = if let Location::Host { port, .. } = backend.location { Some(port) } else { None };
                let mut alike = std::iter::once(&port).chain(&kept).filter_map(|port| by_port.get(port)).flatten();
                let listener = alike.find(|listener| is_here(&backend.location, &listener.listen))?;
                let index = |name: &str| pools.iter().position(|pool| pool.name == name);
                Some(listener.pools().filter_map(index).map(move |pool| (n, pool)).collect::<Vec<_>>())
            });
            behind.flatten().collect()
        })
        .collect();
    let paths = Paths::of_pools(pools);
    for (n, ways) in next.iter().enumerate() {
        for &(backend, behind) in ways {
            let (mut seen, mut open) = (HashSet::new(), vec![behind]);
            while let Some(pool) = open.pop() {
                if seen.insert(pool) {
                    open.extend(next[pool].iter().map(|(_, behind)| behind));
                }
            }
            if seen.contains(&n) {
                faults.add(
                    &format!("{}.provider.static[{}].address", paths.path(n), backend_label(&pools[n], backend)),
                    "is a listener of this config that leads back to this pool: connections would loop forever",
                );
            }
        }
    }
}

/// The ports of a listener; one `None` on a Unix socket.
fn ports_of(listener: &Listener) -> impl Iterator<Item = Option<u16>> + use<'_> {
    listener.addresses().map(|address| address.ip().map(|ip| ip.port()))
}

/// What stands for a static backend in key paths.
fn backend_label(pool: &Pool, n: usize) -> &str {
    pool.provider.static_backends().and_then(|backends| backends.get(n)).map_or("", |backend| &backend.id)
}

/// Whether a backend's address leads to this listener. Paths must be equal. For hosts, the caller has compared the ports.
fn is_here(backend: &Location, listen: &Address) -> bool {
    let (host, listen) = match (backend, listen) {
        (Location::Host { host, .. }, Address::Ip(listen)) => (host, listen),
        (Location::Unix { address }, listen) => return address == listen,
        (Location::Host { .. }, Address::Unix(_)) => return false,
    };
    let ip = if host.eq_ignore_ascii_case("localhost") { Some(Ipv4Addr::LOCALHOST.into()) } else { host.parse().ok() };
    let is_same = |ip: IpAddr| {
        ip == listen.ip() || listen.ip().is_unspecified() && ip.is_loopback() && ip.is_ipv4() == listen.is_ipv4()
    };
    ip.is_some_and(is_same)
}

/// Where something listens.
struct Taken<'a> {
    path: String,
    address: Address,
    ports: u16,
    interface: Option<&'a str>,
}

impl Taken<'_> {
    /// Whether one socket would receive connections that are meant for the other.
    fn clashes(&self, other: &Self) -> bool {
        let (Some(one), Some(two)) = (self.address.ip(), other.address.ip()) else {
            return self.address == other.address;
        };
        let is_any = one.ip().is_unspecified() || two.ip().is_unspecified();
        let is_same_ip = one.ip() == two.ip() || is_any && one.is_ipv4() == two.is_ipv4();
        let is_apart = self.interface.is_some() && other.interface.is_some() && self.interface != other.interface;
        let last = |ip: SocketAddr, ports: u16| ip.port() + (ports - 1);
        let share_a_port =
            one.port() != 0 && one.port() <= last(two, other.ports) && two.port() <= last(one, self.ports);
        share_a_port && is_same_ip && !is_apart
    }
}

/// Reports listen addresses that clash: one socket would receive connections that are meant for the other.
pub(super) fn clashing_addresses(faults: &Faults, listeners: &[Listener], api: &Api) {
    let paths = Paths::of_listeners(listeners);
    let side_port = Taken { path: "api.listen".to_owned(), address: api.listen.into(), ports: 1, interface: None };
    let mut taken = vec![side_port];
    for (n, listener) in listeners.iter().enumerate() {
        let (path, interface) = (paths.path(n) + ".listen", listener.interface.as_deref());
        let new = Taken { path, address: listener.listen.clone(), ports: listener.ports, interface };
        if let Some(old) = taken.iter().find(|old| new.clashes(old)) {
            let what = if new.address.ip().is_some() { "port" } else { "path" };
            let text = |one: &Taken<'_>| one.address.with_ports(one.ports);
            let problem = format!("{} clashes with {} ({}): choose another {what}", text(&new), old.path, text(old));
            faults.add(&new.path, problem);
        }
        taken.push(new);
    }
}
