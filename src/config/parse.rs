//! Every key of the config, its range and its default. Nothing checks the config again after this.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use serde_yaml::Value;

use super::reader::{Faults, Item, Section, hint, show};
use super::{
    AccessLog, Api, Config, Connect, Fault, HealthCheck, Listener, Pool, Process, Provider, Relay, Restart,
    StaticBackend, Timeouts,
};
use crate::label_enum;
use crate::proxy::access_log::Format;
use crate::proxy::key::KeyKind;
use crate::proxy::socket::{Keepalive, TcpOptions};
use crate::ring::Parameters;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Points of one ring: 50 MB of memory and a third of a second to build.
const MOST_POINTS: u64 = 1 << 22;

label_enum! {
    enum CheckKind { Tcp => "tcp", Http => "http", None => "none", }
}

pub(super) fn config(value: &Value) -> Result<Config, Vec<Fault>> {
    let faults = Faults::default();
    let mut root = Item::root(value, &faults).section();
    let workers = root.auto_or_integer("workers", 1..=1024);
    let max_connections = root.auto_or_integer("max_connections", 1..=1_000_000);
    let relay = relay(root.section("relay"));
    let tcp = tcp(root.section("tcp"));
    let access_log = root.item("access_log").map(|item| access_log(item.section()));
    let api = api(root.section("api"));
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
        items.into_iter().map(|item| listener(item.section(), &pools)).collect::<Vec<_>>()
    });
    root.finish();
    duplicate_names(&faults, "listeners", listeners.iter().map(|listener| listener.name.as_str()));
    duplicate_names(&faults, "pools", pools.iter().map(|pool| pool.name.as_str()));
    clashing_addresses(&faults, &listeners, &api);

    let faults = faults.into_vec();
    if faults.is_empty() {
        Ok(Config { workers, max_connections, relay, tcp, access_log, api, listeners, pools })
    } else {
        Err(faults)
    }
}

fn relay(mut section: Section<'_>) -> Relay {
    let relay =
        Relay { splice: section.truth("splice", true), max_pipes: section.auto_or_integer("max_pipes", 0..=1_000_000) };
    section.finish();
    relay
}

fn tcp(mut section: Section<'_>) -> TcpOptions {
    let keepalive = keepalive(&mut section);
    let user_timeout = section.duration("user_timeout", Duration::ZERO..=DAY, 10 * MINUTE);
    section.finish();
    TcpOptions { keepalive, user_timeout }
}

fn keepalive(tcp: &mut Section<'_>) -> Option<Keepalive> {
    let default = Keepalive { idle: 2 * MINUTE, interval: 30 * SECOND, probes: 4 };
    let Some(item) = tcp.item("keepalive") else { return Some(default) };
    if item.value.as_str() == Some("off") || item.value.as_bool() == Some(false) {
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
    let path = section.required("path", "stdout, stderr or a file").and_then(|item| item.text());
    let format = section.choice("format", Format::Text);
    section.finish();
    AccessLog { path: PathBuf::from(path.unwrap_or_default()), format }
}

fn api(mut section: Section<'_>) -> Api {
    let default = SocketAddr::from(([127, 0, 0, 1], 8001));
    let listen = section.item("listen").and_then(|item| address(&item)).unwrap_or(default);
    section.finish();
    Api { listen }
}

fn listener(mut section: Section<'_>, pools: &[Pool]) -> Listener {
    let name = name(&mut section);
    let listen = section.required("listen", "an address like 0.0.0.0:8000").and_then(|item| address(&item));
    let pool = section.required("pool", "the name of a pool");
    let pool = pool.and_then(|item| {
        let names: Vec<_> = pools.iter().map(|pool| pool.name.as_str()).collect();
        let name = item.text()?;
        if !names.contains(&name.as_str()) {
            item.fault(format_args!(
                "there is no pool {name:?}{}; there are: {}",
                hint(item.value, &names),
                names.join(", ")
            ));
        }
        Some(name)
    });
    let listener = Listener {
        name,
        listen: listen.unwrap_or(SocketAddr::from(([0, 0, 0, 0], 0))),
        pool: pool.unwrap_or_default(),
        answer_status: section.truth("answer_status", false),
        backlog: narrow(section.integer("backlog", 1..=65_535, 4096)),
    };
    section.finish();
    listener
}

fn pool(mut section: Section<'_>) -> Pool {
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

fn name(section: &mut Section<'_>) -> String {
    let Some(item) = section.required("name", "a name") else { return String::new() };
    let name = item.text().unwrap_or_default();
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 63 || !name.chars().all(fits) {
        item.fault(format_args!("{name:?} is not a name: take up to 63 letters, digits, '-', '_' and '.'"));
    }
    name
}

fn address(item: &Item<'_>) -> Option<SocketAddr> {
    let address = item.value.as_str().and_then(|text| text.parse().ok());
    if address.is_none() {
        item.fault(format_args!(
            "{} is not an address with a port: write it like 0.0.0.0:8000 or [::]:8000",
            show(item.value)
        ));
    }
    address
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

fn duplicate_names<'a>(faults: &Faults, list: &str, names: impl Iterator<Item = &'a str>) {
    let mut seen = HashMap::new();
    for (n, name) in names.enumerate().filter(|(_, name)| !name.is_empty()) {
        if let Some(first) = seen.insert(name, n) {
            faults.add(&format!("{list}[{n}].name"), format_args!("{name:?} is the name of {list}[{first}] too"));
        }
    }
}

/// Two addresses clash when one socket would take what the other waits for.
fn clashing_addresses(faults: &Faults, listeners: &[Listener], api: &Api) {
    let mut taken = vec![("api.listen".to_owned(), api.listen)];
    for (n, listener) in listeners.iter().enumerate() {
        let (path, new) = (format!("listeners[{n}].listen"), listener.listen);
        let clash = taken.iter().find(|(_, old)| {
            let same_ip = old.ip() == new.ip()
                || (old.is_ipv4() == new.is_ipv4() && (old.ip().is_unspecified() || new.ip().is_unspecified()));
            new.port() != 0 && old.port() == new.port() && same_ip
        });
        if let Some((other, old)) = clash {
            faults.add(&path, format_args!("{new} clashes with {other} ({old}): choose another port"));
        }
        taken.push((path, new));
    }
}

/// From a number that was read within the range of its type.
fn narrow<T: TryFrom<u64> + Default>(number: u64) -> T {
    T::try_from(number).unwrap_or_default()
}
