//! Parses every key outside of listeners and pools, with the constraints between keys. Ranges and defaults are in
//! [`keys`](super::keys). No later code validates the config again, except for what run-time changes can break.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde_yaml::Value;

use super::conflicts::{clashing_addresses, clashing_ports, duplicate_names, loops};
use super::document::INCLUDE;
use super::parse_listener::{listener, text_of_address};
use super::parse_pool::pool;
use super::reader::{Faults, Item, Section, check_name, narrow};
use super::{AccessLog, Api, Config, ConfigWatch, Docker, Fault, Metrics, Relay, Shutdown, Upgrade};
use crate::address::listen_ip;
use crate::proxy::socket::{Keepalive, TcpOptions};

pub(super) fn config(value: &Value) -> Result<Config, Vec<Fault>> {
    let faults = Faults::default();
    let mut root = Item::root(value, &faults).section();
    // The document has replaced it.
    root.know(INCLUDE);
    let workers = root.optional_integer("workers").map(narrow);
    let max_connections = root.optional_integer("max_connections").map(narrow);
    let relay = relay(root.section("relay"));
    let tcp = tcp(root.section("tcp"));
    let access_log = root.item("access_log").map(|item| access_log(item.section()));
    let api = api(root.section("api"));
    let mut metrics = root.section("metrics");
    let per_backend = metrics.choice("per_backend");
    metrics.finish();
    let metrics = Metrics { per_backend };
    let docker = docker(root.section("docker"));
    let config_watch = root.item("config_watch").filter(|item| !item.is_off()).map(|item| config_watch(item.section()));
    let mut shutdown = root.section("shutdown");
    let delay = shutdown.duration("delay");
    shutdown.finish();
    let shutdown = Shutdown { delay };
    let mut upgrade = root.section("upgrade");
    let connections = upgrade.choice("connections");
    upgrade.finish();
    let upgrade = Upgrade { connections };
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
            config_watch,
            shutdown,
            upgrade,
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
        splice: section.truth("splice"),
        max_pipes: section.optional_integer("max_pipes").map(narrow),
        buffer_kib: narrow(section.integer("buffer_kib")),
        splice_from_kib: narrow(section.integer("splice_from_kib")),
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
    let user_timeout = section.duration("user_timeout");
    section.finish();
    TcpOptions { keepalive, user_timeout }
}

fn keepalive(tcp: &mut Section<'_>) -> Option<Keepalive> {
    let item = tcp.item("keepalive");
    if item.as_ref().is_some_and(Item::is_off) {
        return None;
    }
    let mut section = item.map_or_else(|| tcp.empty("keepalive"), Item::section);
    let keepalive = Keepalive {
        idle: section.duration("idle"),
        interval: section.duration("interval"),
        probes: narrow(section.integer("probes")),
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
    let format = section.choice("format");
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
    let public_request = section.truth("public_request");
    let (page, history) = (section.truth("page"), section.truth("history"));
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
    let (resync, timeout) = (section.duration("resync"), section.duration("timeout"));
    let auth_file = section.item("auth_file").and_then(|item| item.text()).map(PathBuf::from);
    let docker = Docker { owner, resync, timeout, auth_file };
    section.finish();
    docker
}

fn config_watch(mut section: Section<'_>) -> ConfigWatch {
    let watch = ConfigWatch {
        settle: section.duration("settle"),
        poll: section.duration("poll"),
        max_keys_moved: section.optional_integer("max_keys_moved").map(narrow),
    };
    section.finish();
    watch
}

fn address(item: &Item<'_>) -> Option<SocketAddr> {
    let text = text_of_address(item, "")?;
    listen_ip(text).map_err(|problem| item.fault(problem)).ok()
}
