//! Parses what a listener decides for a connection: access lists, routes, and how a ClientHello is read.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::reader::{Item, Section, check_name, narrow};
use super::remedy::{hint, not_a_list};
use super::{AccessList, Relay, Route};
use crate::label_enum;
use crate::networks::{Network, Networks};
use crate::proxy::{Condition, DEFAULT, HelloSettings, NamePattern};

/// In place of the name of a pool: Ringway resets the connections.
pub(super) const RESET: &str = "reset";

/// Largest ClientHello in KiB, unless the worker's buffer is smaller. The kernel's receive buffer holds about 120 KiB, and
/// Ringway does not take the bytes out of it.
pub(super) const HELLO_KIB: usize = 64;

/// Most routes of a listener. A connection tries them one after the other.
const MOST_ROUTES: usize = 1000;

/// Largest file of networks, in bytes.
const LARGEST_FILE: u64 = 16 << 20;

/// Faulty lines of a file that are reported one by one.
const SHOWN_LINES: usize = 10;

/// The name of a pool, or `None` for `reset`.
pub(super) fn pool_name(item: &Item<'_>, names: &[&str]) -> Option<String> {
    let name = item.text()?;
    if name == RESET {
        return None;
    }
    // A config without pools already has a fault.
    if !names.is_empty() && !names.contains(&name.as_str()) {
        item.fault(format_args!(
            "pool {name:?} does not exist{}; existing pools: {}",
            hint(item.value, names),
            names.join(", ")
        ));
    }
    Some(name)
}

/// A list of networks in the config.
pub(super) fn networks(item: &Item<'_>) -> Networks {
    let network = |item: &Item<'_>| {
        let network = item.text()?.parse::<Network>();
        network.map_err(|problem| item.fault(problem)).ok()
    };
    item.list().iter().filter_map(network).collect()
}

/// A list of networks in the config, or in a file.
pub(super) fn access_list(section: &mut Section<'_>, key: &'static str) -> Option<AccessList> {
    let item = section.item(key).filter(|item| !item.is_off())?;
    let list = if item.value.is_mapping() {
        let mut section = item.clone().section();
        let file = section.required("file", "the path of a file with one network per line");
        section.finish();
        let (file, path) = file.and_then(|item| Some((item.text()?, item)))?;
        let networks = from_file(Path::new(&file), &path);
        AccessList { networks: Arc::new(networks?), file: Some(file.into()) }
    } else if item.value.is_sequence() {
        AccessList { networks: Arc::new(networks(&item)), file: None }
    } else {
        item.fault(format_args!("{}, {{ file: /path }} or off", not_a_list(item.value)));
        return None;
    };
    if key == "allow" && list.networks.list().is_empty() {
        item.fault("has no networks, so nobody could connect: give at least one, or remove the key");
    }
    Some(list)
}

/// The networks in a file: one per line. A `#` begins a comment.
fn from_file(path: &Path, item: &Item<'_>) -> Option<Networks> {
    let text = read(path).map_err(|error| item.fault(format_args!("cannot read {}: {error}", path.display()))).ok()?;
    let (mut networks, mut faulty) = (Vec::new(), 0);
    for (n, line) in text.lines().enumerate() {
        let line = line.split_once('#').map_or(line, |(entry, _comment)| entry).trim();
        if line.is_empty() {
            continue;
        }
        if let Ok(network) = line.parse::<Network>() {
            networks.push(network);
            continue;
        }
        faulty += 1;
        if faulty <= SHOWN_LINES {
            let (path, n) = (path.display(), n + 1);
            // The message omits the line: otherwise a caller of a dry run could read any file.
            item.fault(format_args!("{path}:{n}: not a network: write one like 10.0.0.0/8, fd00::/8 or 10.0.0.5"));
        }
    }
    if faulty > SHOWN_LINES {
        item.fault(format_args!("{}: {} more lines are wrong", path.display(), faulty - SHOWN_LINES));
    }
    Some(networks.into_iter().collect())
}

fn read(path: &Path) -> io::Result<String> {
    let metadata = std::fs::metadata(path)?;
    // Reading anything else, like a pipe, could take forever.
    if !metadata.is_file() {
        return Err(io::Error::other("not a file"));
    }
    if metadata.len() > LARGEST_FILE {
        return Err(io::Error::other("larger than 16 MiB"));
    }
    std::fs::read_to_string(path)
}

/// The routes of a listener.
pub(super) fn routes(item: &Item<'_>, pools: &[&str]) -> Vec<Route> {
    let items = item.list();
    if items.len() > MOST_ROUTES {
        item.fault(format_args!("has {} routes, and the maximum is {MOST_ROUTES}: use more listeners", items.len()));
        return Vec::new();
    }
    let before = item.faults.count();
    let routes: Vec<_> = items.iter().map(|item| route(item.clone().section(), pools)).collect();
    // A faulty condition matches more than it should, so it may seem to cover others.
    let are_sound = item.faults.count() == before;
    for (n, route) in routes.iter().enumerate().filter(|_| are_sound) {
        let Some(first) = routes[..n].iter().position(|first| first.name == route.name) else { continue };
        let (name, path) = (&route.name, &item.path);
        items[n].fault(if items[n].value.get("name").is_some() {
            format!("name: {name:?} is already the name of {path}[{first}]: choose another name")
        } else {
            format!("has the name of its pool, {name:?}, and {path}[{first}] has the same name: give this route another name")
        });
    }
    for (n, route) in routes.iter().enumerate().filter(|_| are_sound) {
        if let Some(before) = routes[..n].iter().position(|before| before.when.covers(&route.when)) {
            items[n].fault(format_args!(
                "never matches, because {path}[{before}] takes all of its connections: remove this route, or move it before \
                 {path}[{before}]",
                path = item.path
            ));
        }
    }
    routes
}

fn route(mut section: Section<'_>, pools: &[&str]) -> Route {
    let sni = section
        .item("sni")
        .map_or(Vec::new(), |item| some(&item, "server name").iter().filter_map(server_name).collect());
    let alpn = protocols(&mut section);
    let from = section.item("from").map(|item| {
        let networks = networks(&item);
        if item.value.as_sequence().is_some_and(Vec::is_empty) {
            item.fault("is empty: give at least one network, or remove the key");
        }
        networks
    });
    let tls = section.item("tls").and_then(|item| item.truth());
    let when = Condition { sni, alpn, from, tls };
    if when == Condition::default() {
        section.fault(
            "has no condition: give sni, alpn, from or tls. The listener's own pool takes all other connections",
        );
    }
    if when.tls == Some(false) && when.needs_tls() == Some(true) {
        section.fault(
            "never matches: a connection without TLS has neither sni nor alpn. Remove tls, or remove sni and alpn",
        );
    }
    let pool = section.required("pool", "the name of a pool, or reset").and_then(|item| pool_name(&item, pools));
    let name = section.item("name").and_then(|item| {
        let name = item.text()?;
        check_name(&item, &name);
        Some(name)
    });
    let name = name.unwrap_or_else(|| pool.clone().unwrap_or_else(|| RESET.to_owned()));
    if name == DEFAULT {
        section.fault("has the name default, which stands for the listener's own pool: give the route another name");
    }
    section.finish();
    Route { name, when, pool }
}

/// The items of a list, which must not be empty.
fn some<'a>(item: &Item<'a>, what: &str) -> Vec<Item<'a>> {
    let items = item.list();
    if items.is_empty() && item.value.is_sequence() {
        item.fault(format_args!("is empty: give at least one {what}, or remove the key"));
    }
    items
}

fn server_name(item: &Item<'_>) -> Option<NamePattern> {
    item.text()?.parse().map_err(|problem: String| item.fault(problem)).ok()
}

/// The key `alpn`: application protocols.
pub(super) fn protocols(section: &mut Section<'_>) -> Vec<String> {
    section.item("alpn").map_or(Vec::new(), |item| some(&item, "protocol").iter().filter_map(protocol).collect())
}

fn protocol(item: &Item<'_>) -> Option<String> {
    let name = item.text()?;
    if name.is_empty() || name.len() > 255 {
        item.fault(format_args!("{name:?} is not the name of a protocol: write it like h2 or http/1.1"));
    }
    Some(name)
}

label_enum! {
    pub(super) enum Undecided { Reset => "reset", Default => "default", }
}

/// How a listener reads a ClientHello.
pub(super) fn hello(mut section: Section<'_>, relay: &Relay) -> HelloSettings {
    let timeout = section.duration("timeout");
    let max_kib: usize = match section.item("max_kib") {
        Some(item) => {
            let max_kib = item.integer().map_or(HELLO_KIB.min(relay.buffer_kib), narrow);
            if max_kib > relay.buffer_kib {
                item.fault(format_args!(
                    "{max_kib} is larger than relay.buffer_kib ({}): lower it, or raise relay.buffer_kib",
                    relay.buffer_kib
                ));
            }
            max_kib
        }
        None => HELLO_KIB.min(relay.buffer_kib),
    };
    let undecided: Undecided = section.choice("undecided");
    section.finish();
    HelloSettings { timeout, most: max_kib * 1024, undecided_takes_default: undecided == Undecided::Default }
}
