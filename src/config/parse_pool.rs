//! The keys of a pool: ranges and defaults.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::reader::{DAY, HOUR, Item, MINUTE, MS, SECOND, Section, name, narrow, show};
use super::{Connect, HealthCheck, Pool, Process, Provider, Restart, StaticBackend, Timeouts};
use crate::label_enum;
use crate::proxy::key::KeyKind;
use crate::ring::Parameters;

/// Points of one ring: 50 MB of memory and a third of a second to build.
const MOST_POINTS: u64 = 1 << 22;

label_enum! {
    enum CheckKind { Tcp => "tcp", Http => "http", None => "none", }
}

pub(super) fn pool(mut section: Section<'_>) -> Pool {
    let name = name(&mut section);
    let key = section.choice("key", KeyKind::Source);
    let ring = ring(section.section("ring"));
    let provider = section.required("provider", "one of static, process");
    let provider = provider.map_or(Provider::Static(Vec::new()), |item| provider_of(item.section()));
    let points = points(&provider, ring);
    if points > MOST_POINTS {
        section.fault(format_args!(
            "its ring would have {points} points, and {MOST_POINTS} is the most: take fewer virtual_nodes, backends or weight"
        ));
    }
    let mut connect = section.section("connect");
    let connect = {
        let settings = Connect {
            timeout: connect.duration("timeout", MS..=5 * MINUTE, 2 * SECOND),
            attempts: narrow(connect.integer("attempts", 1..=100, 3)),
        };
        connect.finish();
        settings
    };
    let mut timeouts = section.section("timeouts");
    let timeouts = {
        let settings = Timeouts {
            idle: timeouts.duration("idle", 100 * MS..=30 * DAY, 10 * MINUTE),
            half_closed: timeouts.duration("half_closed", 100 * MS..=30 * DAY, MINUTE),
        };
        timeouts.finish();
        settings
    };
    let health_check = health_check(section.section("health_check"));
    let drain = section.duration("drain", Duration::ZERO..=DAY, 30 * SECOND);
    section.finish();
    Pool { name, key, ring, provider, connect, timeouts, health_check, drain }
}

fn ring(mut section: Section<'_>) -> Parameters {
    let parameters = Parameters {
        virtual_nodes: narrow(section.integer("virtual_nodes", 1..=65_536, 160)),
        probes: narrow(section.integer("probes", 1..=64, 3)),
        seed: section.integer("seed", 0..=u64::MAX, 0),
    };
    section.finish();
    parameters
}

fn points(provider: &Provider, ring: Parameters) -> u64 {
    let weight: u64 = match provider {
        Provider::Static(backends) => backends.iter().map(|backend| u64::from(backend.weight)).sum(),
        Provider::Process(process) => process.replicas.into(),
    };
    weight * u64::from(ring.virtual_nodes)
}

fn provider_of(mut section: Section<'_>) -> Provider {
    let (fixed, process) = (section.item("static"), section.item("process"));
    let provider = match (fixed, process) {
        (Some(item), None) => Provider::Static(static_backends(&item)),
        (None, Some(item)) => Provider::Process(process_of(item.section())),
        (one, _) => {
            let what = if one.is_some() { "has both" } else { "needs one of" };
            section.fault(format_args!(
                "{what} static (a list of addresses) and process (child processes): give exactly one"
            ));
            Provider::Static(Vec::new())
        }
    };
    section.finish();
    provider
}

fn static_backends(list: &Item<'_>) -> Vec<StaticBackend> {
    let items = list.list();
    if items.is_empty() && list.value.is_sequence() {
        list.fault("is empty: give at least one {address: \"host:port\"}");
    }
    let mut seen = HashMap::new();
    let mut backends = Vec::new();
    for item in items {
        let path = item.path.clone();
        let mut section = item.clone().section();
        let address = section.required("address", "host:port").and_then(|item| host_and_port(&item));
        let id = section.item("id").and_then(|item| item.text());
        let weight = narrow(section.integer("weight", 1..=1000, 1));
        section.finish();
        let Some((host, port)) = address else { continue };
        let id = id.unwrap_or_else(|| join_host(&host, port));
        if id.is_empty() {
            item.fault("its id is empty: give a name, or leave it out for the address");
        }
        if let Some(first) = seen.insert(id.clone(), path) {
            item.fault(format_args!("its id {id:?} is that of {first} too: each backend needs its own"));
        }
        backends.push(StaticBackend { id, host, port, weight });
    }
    backends
}

fn process_of(mut section: Section<'_>) -> Process {
    let replicas = section.required("replicas", "how many, from 1 to 1000").and_then(|item| item.integer(&(1..=1000)));
    let command: Option<Vec<_>> = section
        .required("command", "a list: program and arguments, with {port}")
        .map(|item| item.list().iter().filter_map(Item::text).collect());
    let env = env(&mut section);
    if let Some(command) = &command {
        if command.first().is_none_or(String::is_empty) {
            section.fault("its command is empty: give a program and its arguments");
        } else if !command.iter().chain(env.iter().map(|(_, value)| value)).any(|text| text.contains("{port}")) {
            section.fault("neither command nor env has {port}: a replica must be told the port to listen on");
        }
    }
    let replicas = narrow(replicas.unwrap_or(1));
    let ports = ports(&mut section, replicas);
    let restart = restart(section.section("restart"));
    let stop_grace = section.duration("stop_grace", Duration::ZERO..=HOUR, 5 * SECOND);
    section.finish();
    Process { replicas, command: command.unwrap_or_default(), env, ports, restart, stop_grace }
}

fn env(section: &mut Section<'_>) -> Vec<(String, String)> {
    let Some(item) = section.item("env") else { return Vec::new() };
    let Some(map) = item.value.as_mapping() else {
        item.fault(format_args!("{} is not a section of `NAME: value` lines", show(item.value)));
        return Vec::new();
    };
    let mut env = Vec::new();
    for (name, value) in map {
        let entry = item.entry(show(name).trim_matches('"'), value);
        match name.as_str() {
            Some(name) if !name.is_empty() && !name.contains(['=', '\0']) => {
                env.extend(entry.text().map(|value| (name.to_owned(), value)));
            }
            _ => entry.fault("is not a name for an environment variable"),
        }
    }
    env
}

fn ports(section: &mut Section<'_>, replicas: u32) -> Option<(u16, u16)> {
    let item = section.item("ports")?;
    let text = item.text()?;
    if text == "auto" {
        return None;
    }
    let range = text.split_once('-').and_then(|(first, last)| {
        let range: (u16, u16) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        (range.0 > 0 && range.0 <= range.1).then_some(range)
    });
    match range {
        None => item.fault(format_args!("{text:?} is neither auto nor a range of ports like 9001-9010")),
        Some((first, last)) if u32::from(last - first) + 1 < replicas => {
            item.fault(format_args!("{text} has fewer ports than the {replicas} replicas need"));
        }
        Some(_) => {}
    }
    range
}

fn restart(mut section: Section<'_>) -> Restart {
    let restart = Restart {
        backoff: section.duration("backoff", MS..=HOUR, 200 * MS),
        max_backoff: section.duration("max_backoff", MS..=HOUR, 30 * SECOND),
        stable_after: section.duration("stable_after", MS..=DAY, MINUTE),
        crash_loop_after: narrow(section.integer("crash_loop_after", 1..=1000, 5)),
    };
    if restart.max_backoff < restart.backoff {
        section.fault("max_backoff is shorter than backoff: make it at least as long");
    }
    section.finish();
    restart
}

fn health_check(mut section: Section<'_>) -> Option<HealthCheck> {
    let kind = section.choice("kind", CheckKind::Tcp);
    let path = section.item("path");
    if let Some(item) = path.as_ref().filter(|_| kind != CheckKind::Http) {
        item.fault("is only for `kind: http`: set that kind, or leave the path out");
    }
    let path = path.and_then(|item| {
        let path = item.text()?;
        let is_path = path.starts_with('/') && path.parse::<hyper::Uri>().is_ok();
        if !is_path {
            item.fault(format_args!("{path:?} is not a path like /heartbeat"));
        }
        is_path.then_some(path)
    });
    let interval = section.duration("interval", 10 * MS..=HOUR, 2 * SECOND);
    let timeout = section.duration("timeout", MS..=HOUR, SECOND);
    let counts: RangeInclusive<u64> = 1..=100;
    let rise = narrow(section.integer("rise", counts.clone(), 2));
    let fall = narrow(section.integer("fall", counts, 3));
    section.finish();
    let http_path = match kind {
        CheckKind::None => return None,
        CheckKind::Tcp => None,
        CheckKind::Http => Some(path.unwrap_or_else(|| "/".to_owned())),
    };
    Some(HealthCheck { http_path, interval, timeout, rise, fall })
}

fn host_and_port(item: &Item<'_>) -> Option<(String, u16)> {
    let text = item.value.as_str().unwrap_or_default();
    let parts = text.rsplit_once(':').and_then(|(host, port)| {
        let port = port.parse().ok().filter(|&port: &u16| port > 0)?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let is_fine = match bare {
            Some(ip) => ip.parse::<std::net::Ipv6Addr>().is_ok(),
            None => !host.is_empty() && !host.contains([':', '[', ']', '/', ' ']),
        };
        is_fine.then(|| (bare.unwrap_or(host).to_owned(), port))
    });
    if parts.is_none() {
        item.fault(format_args!(
            "{} is not host:port: write it like 10.0.0.5:6379, [::1]:6379 or db.local:5432",
            show(item.value)
        ));
    }
    parts
}

/// `host:port`, an IPv6 address in brackets.
pub(super) fn join_host(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}
