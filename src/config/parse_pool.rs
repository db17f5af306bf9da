//! Parses the keys of a pool.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::parse_routes::RESET;
use super::reader::{Item, Section, kernel_name, name, narrow, show};
use super::remedy::hint;
use super::{Connect, Ejection, Pool, Provider, Timeouts, parse_check, parse_provider};
use crate::control::agent;
use crate::control::ejection;
use crate::control::publisher::OnDown;
use crate::labels::Label as _;
use crate::outgoing::Outgoing;
use crate::proxy::Balance;
use crate::proxy::key::KeyKind;
use crate::proxy_header::{CRC32C, NOOP, SendProxy, Tlv, Version};
use crate::ring::Parameters;

/// Connections stay where they are after a change of the ring.
pub(super) const KEEP: &str = "keep";

/// Most source addresses of a pool.
const MOST_SOURCES: usize = 64;

pub(super) fn pool(mut section: Section<'_>) -> Pool {
    let name = name(&mut section);
    if name == RESET {
        section
            .fault("reset cannot be the name of a pool, because `pool: reset` resets connections: choose another name");
    }
    let key = section.item("key").map_or(KeyKind::Source, |item| key(&item));
    let balance = section.choice("balance");
    let (ring, bound) = ring(section.section("ring"));
    if balance == Balance::LeastConnections {
        check_least_connections(&section, key, bound);
    }
    let provider = section.required("provider", parse_provider::KINDS);
    let provider = provider.map_or(Provider::Static(Arc::default()), |item| parse_provider::provider(item.section()));
    let (grace, on_unix) = (provider.start_grace(), provider.has_unix_sockets());
    let connect = connect(section.section("connect"));
    let send_proxy = section.item("send_proxy").and_then(|item| send_proxy(&item));
    let version = send_proxy.as_ref().map(|send| send.version);
    let mut timeouts = section.section("timeouts");
    let timeouts = {
        let settings = Timeouts {
            idle: timeouts.off_or_duration("idle"),
            half_closed: timeouts.duration("half_closed"),
            max_connection_age: timeouts.off_or_duration("max_connection_age"),
        };
        timeouts.finish();
        settings
    };
    let mut tiers = section.section("tiers");
    let (spill_below, is_exclusive) = (narrow(tiers.integer("spill_below")), tiers.truth("exclusive"));
    tiers.finish();
    let checks = section.section("health_check");
    let mut health_check = parse_check::health_check(checks, grace, on_unix, version, is_exclusive);
    let (panic_threshold, on_down) = (narrow(section.integer("panic_threshold")), section.choice("on_down"));
    let (panic_threshold, on_down) = if is_exclusive {
        check_exclusive(&mut section, health_check.is_some());
        (0, OnDown::Reset)
    } else {
        (panic_threshold, on_down)
    };
    let on_move = section.item("on_move").and_then(|item| on_move(&item));
    let mut agent = section.item("agent").and_then(|item| agent(&item, on_unix));
    // A check from elsewhere would not tell whether connections get through.
    if let Some(health) = &mut health_check {
        health.check.outgoing.clone_from(&connect.outgoing);
    }
    if let Some(agent) = &mut agent {
        agent.outgoing.clone_from(&connect.outgoing);
    }
    let pool = Pool {
        name,
        key,
        balance,
        ring,
        bound,
        provider,
        connect,
        send_proxy,
        timeouts,
        health_check,
        agent,
        ejection: ejection(&mut section),
        panic_threshold,
        spill_below,
        is_exclusive,
        on_down,
        on_move,
        slow_start: section.duration("slow_start"),
        max_connections_per_backend: section.optional_integer("max_connections_per_backend").map(narrow),
        drain: section.duration("drain"),
    };
    if let Some(problem) = pool.too_many_points() {
        section.fault(problem);
    }
    if let Some(why) = pool.cannot_move().filter(|_| pool.on_move.is_some()) {
        section.fault(format_args!("on_move has no use here, because {why}: remove on_move, or change that"));
    }
    section.finish();
    pool
}

/// How Ringway connects to the backends.
fn connect(mut section: Section<'_>) -> Connect {
    let (timeout, attempts) = (section.duration("timeout"), narrow(section.integer("attempts")));
    let outgoing = Outgoing {
        sources: section.item("source").map_or(Vec::new(), |item| sources(&item)),
        interface: section.item("interface").and_then(|item| kernel_name(&item)),
        mark: section.item("mark").and_then(|item| item.integer()).map(narrow),
        congestion: section.item("congestion").and_then(|item| kernel_name(&item)),
    };
    section.finish();
    let outgoing = (outgoing != Outgoing::default()).then(|| Arc::new(outgoing));
    Connect { timeout, attempts, outgoing }
}

/// One source address, or a list of them.
fn sources(item: &Item<'_>) -> Vec<IpAddr> {
    let mut sources = Vec::new();
    let items = if item.value.is_sequence() { item.list() } else { vec![item.clone()] };
    if items.is_empty() || items.len() > MOST_SOURCES {
        item.fault(format_args!("has {} addresses: give 1 to {MOST_SOURCES}, or remove the key", items.len()));
    }
    for item in items {
        let Some(text) = item.text() else { continue };
        match text.parse::<IpAddr>() {
            Err(_) => item.fault(format_args!("{text:?} is not an IP address: write it like 10.0.0.5, without a port")),
            Ok(ip) if ip.to_canonical() != ip => {
                item.fault(format_args!("{text:?} is an IPv4 address in IPv6 form: write {}", ip.to_canonical()));
            }
            Ok(ip) if ip.is_unspecified() || ip.is_multicast() => item.fault(format_args!(
                "{text:?} is not an address of one network interface: write one that `ip address` lists, or remove the key"
            )),
            Ok(ip) if sources.contains(&ip) => item.fault(format_args!("{text:?} is there twice: remove one")),
            Ok(ip) => sources.push(ip),
        }
    }
    sources
}

/// Adds a fault for each key that contradicts an exclusive pool.
fn check_exclusive(section: &mut Section<'_>, has_check: bool) {
    if let Some(item) = section.item("panic_threshold").filter(|item| item.integer().is_some_and(|percent| percent > 0))
    {
        item.fault("contradicts tiers.exclusive, which never uses a backend whose check fails: remove this key");
    }
    if let Some(item) = section.item("on_down").filter(|item| item.value.as_str() == Some(OnDown::Keep.as_str())) {
        item.fault("contradicts tiers.exclusive, which never lets two backends have connections: remove this key");
    }
    if !has_check {
        section.fault("tiers.exclusive needs a health check: set health_check to one that only the primary passes");
    }
}

/// The part of a connection that is hashed: a name, or a section for a kind that has settings.
fn key(item: &Item<'_>) -> KeyKind {
    let net = |mut section: Section<'_>| {
        let v4 = narrow(section.integer("v4"));
        let v6 = narrow(section.integer("v6"));
        section.finish();
        KeyKind::SourceNet { v4, v6 }
    };
    if item.value.is_mapping() {
        let mut section = item.clone().section();
        let kind = section.required("source_net", "a section with v4 and v6").map(|item| net(item.section()));
        section.finish();
        return kind.unwrap_or(KeyKind::Source);
    }
    match item.value.as_str() {
        Some("source") => KeyKind::Source,
        Some("source_ip") => KeyKind::SourceIp,
        Some("source_net") => KeyKind::SourceNet { v4: 24, v6: 64 },
        Some("sni") => KeyKind::Sni,
        _ => {
            let (names, hint) = (KeyKind::NAMES.join(", "), hint(item.value, &KeyKind::NAMES));
            item.fault(format_args!("{} is not one of {names}{hint}", show(item.value)));
            KeyKind::Source
        }
    }
}

/// The PROXY header that backends get: its version, or a section for one with further fields.
fn send_proxy(item: &Item<'_>) -> Option<SendProxy> {
    let version = |text: Option<&str>| Version::ALL.iter().find(|version| Some(version.as_str()) == text).copied();
    let mut send = SendProxy { version: Version::V2, tlvs: Vec::new(), pass: Vec::new() };
    if item.is_off() {
        return None;
    }
    if !item.value.is_mapping() {
        let Some(version) = version(item.value.as_str()) else {
            item.fault(format_args!(
                "{} is neither off, v1 or v2, nor a section with version, tlvs and pass",
                show(item.value)
            ));
            return None;
        };
        return Some(SendProxy { version, ..send });
    }
    let mut section = item.clone().section();
    if let Some(item) = section.required("version", "v1 or v2") {
        match version(item.value.as_str()) {
            Some(version) => send.version = version,
            None => item.fault(format_args!("{} is not one of v1, v2", show(item.value))),
        }
    }
    let (tlvs, pass) = (section.item("tlvs"), section.item("pass"));
    for item in tlvs.iter().chain(&pass).filter(|_| send.version == Version::V1) {
        item.fault("version 1 has no further fields: set version to v2, or remove this key");
    }
    for item in tlvs.iter().flat_map(Item::list) {
        let names: Vec<_> = Tlv::ALL.iter().map(|tlv| tlv.as_str()).collect();
        let found = Tlv::ALL.iter().find(|tlv| Some(tlv.as_str()) == item.value.as_str());
        if found.is_none() {
            let hint = hint(item.value, &names);
            item.fault(format_args!("{} is not one of {}{hint}", show(item.value), names.join(", ")));
        }
        send.tlvs.extend(found);
    }
    for item in pass.iter().flat_map(Item::list) {
        let Some(kind) = item.integer().map(narrow) else { continue };
        if kind == CRC32C || kind == NOOP {
            item.fault("belongs to one header only, so it cannot be passed on: remove it");
        }
        send.pass.push(kind);
    }
    section.finish();
    Some(send)
}

/// How long Ringway waits for an agent if nothing else is set.
const USUAL_TIMEOUT: Duration = Duration::from_secs(1);

/// The agents of the backends. `on_unix`: a backend has a Unix socket.
fn agent(item: &Item<'_>, on_unix: bool) -> Option<agent::Settings> {
    if item.is_off() {
        return None;
    }
    if on_unix {
        item.fault("a backend of this pool has a Unix socket, and an agent needs an IP address: remove this key");
    }
    let mut section = item.clone().section();
    let port = section.required("port", "the port on which the agents listen").and_then(|item| item.integer());
    let interval = section.duration("interval");
    let timeout = section.item("timeout").and_then(|item| item.duration());
    if timeout.is_some_and(|timeout| timeout > interval) {
        section.fault("timeout is longer than interval: set it to interval or shorter");
    }
    let settings = agent::Settings {
        port: narrow(port.unwrap_or(1)),
        interval,
        timeout: timeout.unwrap_or(interval.min(USUAL_TIMEOUT)),
        send: section.item("send").and_then(|item| item.text()).unwrap_or_default(),
        outgoing: None,
    };
    section.finish();
    Some(settings)
}

fn ejection(pool: &mut Section<'_>) -> Option<Ejection> {
    let item = pool.item("ejection");
    if item.as_ref().is_some_and(Item::is_off) {
        return None;
    }
    let mut section = item.map_or_else(|| pool.empty("ejection"), Item::section);
    let ejection = Ejection {
        after: narrow(section.integer("after")),
        settings: ejection::Settings {
            base: section.duration("base"),
            max: section.duration("max"),
            max_share: narrow(section.integer("max_share")),
        },
    };
    if ejection.settings.max < ejection.settings.base {
        section.fault("max is shorter than base: set max to base or longer");
    }
    section.finish();
    Some(ejection)
}

/// Reports keys that have no effect beside `balance: least_connections`.
fn check_least_connections(pool: &Section<'_>, key: KeyKind, bound: Option<u16>) {
    if key != KeyKind::Source {
        pool.fault("balance: least_connections ignores the key: remove `key`, or write `balance: ring`");
    }
    if bound.is_some() {
        pool.fault(
            "ring.bound has no effect with balance: least_connections, which spreads connections evenly anyway: remove it, or \
             write `balance: ring`",
        );
    }
}

/// The time in which connections move to the backends to which their keys lead.
fn on_move(item: &Item<'_>) -> Option<Duration> {
    if item.value.as_str() == Some(KEEP) {
        return None;
    }
    let mut section = item.clone().section();
    let over = section.duration("close_over");
    section.finish();
    Some(over)
}

/// The parameters of the ring, and the bound.
fn ring(mut section: Section<'_>) -> (Parameters, Option<u16>) {
    let parameters = Parameters {
        virtual_nodes: narrow(section.integer("virtual_nodes")),
        probes: narrow(section.integer("probes")),
        seed: section.integer("seed"),
    };
    let bound = section.optional_integer("bound").map(narrow);
    section.finish();
    (parameters, bound)
}
