//! Parses every key outside of listeners and pools: ranges, defaults and constraints between keys. No later code validates the config
//! again, except for what run-time changes can break.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde_yaml::Value;

use super::conflicts::{clashing_addresses, clashing_ports, duplicate_names, loops};
use super::document::INCLUDE;
use super::parse_listener::{listener, text_of_address};
use super::parse_pool::pool;
use super::reader::{DAY, Faults, HOUR, Item, MINUTE, SECOND, Section, check_name, narrow, show};
use super::{AccessLog, Api, Config, Docker, Fault, Metrics, Relay, Shutdown};
use crate::address::listen_ip;
use crate::metrics::PerBackend;
use crate::proxy::access_log::Format;
use crate::proxy::socket::{Keepalive, TcpOptions};

pub(super) fn config(value: &Value) -> Result<Config, Vec<Fault>> {
    let faults = Faults::default();
    let mut root = Item::root(value, &faults).section();
    // The document has replaced it.
    root.know(INCLUDE);
    let workers = root.auto_or_integer("workers", 1..=1024);
    let max_connections = root.auto_or_integer("max_connections", 1..=1_000_000);
    let relay = relay(root.section("relay"));
    let tcp = tcp(root.section("tcp"));
    let access_log = root.item("access_log").map(|item| access_log(item.section()));
    let api = api(root.section("api"));
    let mut metrics = root.section("metrics");
    let per_backend = metrics.choice("per_backend", PerBackend::Full);
    metrics.finish();
    let metrics = Metrics { per_backend };
    let docker = docker(root.section("docker"));
    let mut shutdown = root.section("shutdown");
    let delay = shutdown.duration("delay", Duration::ZERO..=HOUR, Duration::ZERO);
    shutdown.finish();
    let shutdown = Shutdown { delay };
    let pools = root.required("pools", "at least one pool").map(|item| (item.list(), item));
    let pools = pools.map_or(Vec::new(), |(items, list)| {
        if items.is_empty() && list.value.is_sequence() {
            list.fault("is empty: give at least one pool");
        }
        items.into_iter().map(|item| pool(item.section())).collect::<Vec<_>>()
    });
    let listeners = root.required("listeners", "at least one listener").map(|item| (item.list(), item));
    let listeners = listeners.map_or(Vec::new(), |(items, list)| {
        if items.is_empty() && list.value.is_sequence() {
            list.fault("is empty: give at least one listener");
        }
        items.into_iter().map(|item| listener(item.section(), &pools, &relay)).collect::<Vec<_>>()
    });
    root.finish();
    duplicate_names(&faults, "listeners", listeners.iter().map(|listener| listener.name.as_str()));
    duplicate_names(&faults, "pools", pools.iter().map(|pool| pool.name.as_str()));
    clashing_addresses(&faults, &listeners, &api);
    clashing_ports(&faults, &pools, &listeners, &api);
    loops(&faults, &pools, &listeners);

    let faults = faults.into_vec();
    if faults.is_empty() {
        Ok(Config {
            workers,
            max_connections,
            relay,
            tcp,
            access_log,
            api,
            metrics,
            docker,
            shutdown,
            listeners,
            pools,
        })
    } else {
        Err(faults)
    }
}

/// Parses the section `api` alone.
pub(super) fn only_api(value: &Value) -> Result<Api, Vec<Fault>> {
    let faults = Faults::default();
    let api = api(Item::root(value, &faults).section().section("api"));
    let faults = faults.into_vec();
    if faults.is_empty() { Ok(api) } else { Err(faults) }
}

fn relay(mut section: Section<'_>) -> Relay {
    let relay = Relay {
        splice: section.truth("splice", true),
        max_pipes: section.auto_or_integer("max_pipes", 0..=1_000_000),
        buffer_kib: narrow(section.integer("buffer_kib", 4..=1024, 64)),
        splice_from_kib: narrow(section.integer("splice_from_kib", 1..=128, 32)),
    };
    if relay.splice_from_kib > relay.buffer_kib {
        section.fault(format_args!(
            "splice_from_kib ({}) is larger than buffer_kib ({}): lower splice_from_kib or raise buffer_kib",
            relay.splice_from_kib, relay.buffer_kib
        ));
    }
    section.finish();
    relay
}

fn tcp(mut section: Section<'_>) -> TcpOptions {
    let keepalive = keepalive(&mut section);
    let user_timeout = section.duration("user_timeout", Duration::ZERO..=DAY, Duration::ZERO);
    section.finish();
    TcpOptions { keepalive, user_timeout }
}

fn keepalive(tcp: &mut Section<'_>) -> Option<Keepalive> {
    let default = Keepalive { idle: 2 * MINUTE, interval: 30 * SECOND, probes: 4 };
    let Some(item) = tcp.item("keepalive") else { return Some(default) };
    if item.is_off() {
        return None;
    }
    if !item.value.is_mapping() {
        item.fault(format_args!("{} is neither off nor a section with idle, interval and probes", show(item.value)));
        return None;
    }
    let mut section = item.section();
    let keepalive = Keepalive {
        idle: section.duration("idle", SECOND..=9 * HOUR, default.idle),
        interval: section.duration("interval", SECOND..=9 * HOUR, default.interval),
        probes: narrow(section.integer("probes", 1..=127, default.probes.into())),
    };
    section.finish();
    Some(keepalive)
}

fn access_log(mut section: Section<'_>) -> AccessLog {
    let path = section.required("path", "stdout, stderr or a file").and_then(|item| {
        let path = item.text()?;
        if path.is_empty() {
            item.fault("is empty: give stdout, stderr or a file");
        }
        Some(path)
    });
    let format = section.choice("format", Format::Text);
    section.finish();
    AccessLog { path: PathBuf::from(path.unwrap_or_default()), format }
}

fn api(mut section: Section<'_>) -> Api {
    let default = SocketAddr::from(([127, 0, 0, 1], 8001));
    let listen = section.item("listen").and_then(|item| address(&item)).unwrap_or(default);
    let token_file = section.item("token_file").and_then(|item| item.text()).map(PathBuf::from);
    let allowed_hosts = section.item("allowed_hosts").map_or(Vec::new(), |item| {
        let hosts = item.list();
        hosts.iter().filter_map(host).collect()
    });
    let public_request = section.truth("public_request", false);
    let (page, history) = (section.truth("page", true), section.truth("history", true));
    section.finish();
    Api { listen, token_file, allowed_hosts, public_request, page, history }
}

/// Parses a host name as it appears in the `host` header, without the port.
fn host(item: &Item<'_>) -> Option<String> {
    let name = item.text()?;
    if name.is_empty() || name.contains([':', '/', ' ', '*']) {
        item.fault(format_args!("{name:?} is not a host name: write it without a port, like balancer.example"));
    }
    Some(name)
}

fn docker(mut section: Section<'_>) -> Docker {
    let owner = section.item("owner").and_then(|item| {
        let owner = item.text()?;
        if owner == "auto" {
            return None;
        }
        check_name(&item, &owner);
        if !owner.is_empty() && !owner.starts_with(|c: char| c.is_ascii_alphanumeric()) {
            item.fault(format_args!(
                "{owner:?} cannot be the prefix of container names: start it with a letter or a digit"
            ));
        }
        Some(owner)
    });
    let docker = Docker {
        owner,
        resync: section.duration("resync", SECOND..=HOUR, 30 * SECOND),
        timeout: section.duration("timeout", SECOND..=5 * MINUTE, 10 * SECOND),
    };
    section.finish();
    docker
}

fn address(item: &Item<'_>) -> Option<SocketAddr> {
    let text = text_of_address(item, "")?;
    listen_ip(text).map_err(|problem| item.fault(problem)).ok()
}
