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
    // For each pool: its backends that are listeners, with their places in the config and the pools behind them.
    let next: Vec<Vec<(usize, usize)>> = pools
        .iter()
        .map(|pool| {
            // The ports of listeners that keep their clients' port. Every port of a backend can then be meant.
            let keeps = |listener: &&Listener| {
                listener.backend_port == BackendPort::Same && listener.pools().any(|name| name == pool.name)
            };
            let kept: Vec<_> = listeners.iter().filter(keeps).filter_map(ports_of).collect();
            let index = |name: &str| pools.iter().position(|pool| pool.name == name);
            let backends = pool.provider.static_backends().unwrap_or_default().iter().enumerate();
            let behind = backends.flat_map(|(n, backend)| {
                let alike = listeners.iter().filter(|listener| leads_to(&backend.location, &kept, listener));
                alike.flat_map(Listener::pools).filter_map(index).map(|pool| (n, pool)).collect::<Vec<_>>()
            });
            behind.collect()
        })
        .collect();
    let paths = Paths::of_pools(pools);
    for (n, ways) in next.iter().enumerate() {
        let mut told = None;
        for &(backend, behind) in ways {
            let (mut seen, mut open) = (HashSet::new(), vec![behind]);
            while let Some(pool) = open.pop() {
                if seen.insert(pool) {
                    open.extend(next[pool].iter().map(|(_, behind)| behind));
                }
            }
            // One backend can lead to several pools.
            if seen.contains(&n) && told.replace(backend) != Some(backend) {
                faults.add(
                    &format!("{}.provider.static[{}].address", paths.path(n), backend_label(&pools[n], backend)),
                    "is a listener of this config that leads back to this pool: connections would loop forever",
                );
            }
        }
    }
}

/// The first and the last port of a listener; `None` on a Unix socket.
fn ports_of(listener: &Listener) -> Option<(u16, u16)> {
    let first = listener.listen.ip()?.port();
    Some((first, first + (listener.ports - 1)))
}

/// What stands for a static backend in key paths.
fn backend_label(pool: &Pool, n: usize) -> &str {
    pool.provider.static_backends().and_then(|backends| backends.get(n)).map_or("", |backend| &backend.id)
}

/// Whether a backend's address leads to this listener, at its own port or at one of the `kept` ones.
fn leads_to(backend: &Location, kept: &[(u16, u16)], listener: &Listener) -> bool {
    let (host, port, listen) = match (backend, &listener.listen) {
        (Location::Host { host, port }, Address::Ip(listen)) => (host, *port, listen),
        (Location::Unix { address }, listen) => return address == listen,
        (Location::Host { .. }, Address::Unix(_)) => return false,
    };
    let has = |&(first, last): &(u16, u16)| {
        ports_of(listener).is_some_and(|(of_first, of_last)| first <= of_last && of_first <= last)
    };
    if !has(&(port, port)) && !kept.iter().any(has) {
        return false;
    }
    let ip = if host.eq_ignore_ascii_case("localhost") { Some(Ipv4Addr::LOCALHOST.into()) } else { host.parse().ok() };
    let is_same = |ip: IpAddr| {
        ip == listen.ip() || listen.ip().is_unspecified() && ip.is_loopback() && ip.is_ipv4() == listen.is_ipv4()
    };
    // Loopback has an interface of its own.
    let is_through = |ip: IpAddr| !ip.is_loopback() || listener.interface.as_deref().is_none_or(|name| name == "lo");
    ip.is_some_and(|ip| is_same(ip) && is_through(ip))
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
