//! Parses the keys of a pool's provider.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use super::keys::MOST_CPUS;
use super::parse_replicas::{replicas, restart, rollout};
use super::provider::ListedState;
use super::reader::{Item, Section, narrow, show};
use super::{BackendsFile, Containers, Discover, Process, Provider, StaticBackend};
use crate::backend::Membership;
use crate::control::docker::label;
use crate::control::provider::dns::{self, Question, Servers};
use crate::control::provider::{Listed, Location};
use crate::control::supervisor::docker::Spec;
use crate::control::supervisor::handover;

/// The possible providers, for fault messages.
pub(super) const KINDS: &str = "one of static, process, docker, dns, file";

/// The port of a name server without one.
const DNS_PORT: u16 = 53;

/// The keys of the providers.
const PROVIDERS: [&str; 5] = ["static", "process", "docker", "dns", "file"];

pub(super) fn provider(mut section: Section<'_>) -> Provider {
    let given: Vec<_> = PROVIDERS.iter().filter_map(|&name| Some((name, section.item(name)?))).collect();
    let provider = match <[_; 1]>::try_from(given) {
        Ok([(name, item)]) => match name {
            "static" => Provider::Static(static_backends(&item).into()),
            "process" => Provider::Process(process_of(item.section())),
            "docker" => docker_of(item.section()),
            "dns" => Provider::Dns(dns_of(item.section()).into()),
            _ => Provider::File(file_of(item.section())),
        },
        Err(given) => {
            if section.is_mapping() {
                let what = if given.is_empty() { "needs one" } else { "has more than one" };
                section.fault(format_args!(
                    "{what} of static (a list of addresses), process (child processes), docker (containers), dns (the addresses of a name) and file (a file that lists addresses): give exactly one"
                ));
            }
            Provider::Static(Arc::default())
        }
    };
    section.finish();
    provider
}

/// Adds a fault if another backend has this id.
pub(super) fn unique(seen: &mut HashMap<String, String>, id: &str, item: &Item<'_>) {
    if let Some(first) = seen.insert(id.to_owned(), item.path.clone()) {
        item.fault(format_args!("id {id:?} is already the id of {first}: give each backend its own id"));
    }
}

pub(super) fn static_backends(list: &Item<'_>) -> Vec<StaticBackend> {
    if let Some(text) = list.value.as_str() {
        let addresses = text.split([',', ' ']).filter(|address| !address.is_empty());
        let entries: Vec<_> = addresses.map(|address| format!("{{ address: {address:?} }}")).collect();
        list.fault(format_args!("{text:?} is not a list: write [{}]", entries.join(", ")));
        return Vec::new();
    }
    let mut seen = HashMap::new();
    let mut backends = Vec::new();
    for item in list.list() {
        if let Some(text) = item.value.as_str() {
            item.fault(format_args!("{text:?} is not a section: write {{ address: {text:?} }}"));
            continue;
        }
        let mut section = item.clone().section();
        let address = section.required("address", "host:port or unix:/path").and_then(|item| location(&item));
        let id = section.item("id").and_then(|item| item.text());
        let membership = Membership {
            weight: narrow(section.integer("weight")),
            tier: narrow(section.integer("tier")),
            max_connections: section.optional_integer("max_connections").map(narrow),
            is_drained: section.choice::<ListedState>("state") == ListedState::Drained,
        };
        let resolve = section.choice("resolve");
        section.finish();
        let Some(location) = address else { continue };
        let id = id.unwrap_or_else(|| location.to_string());
        if let Some(problem) = Listed::id_fault(&id) {
            item.fault(format_args!("id {problem}"));
        }
        unique(&mut seen, &id, &item);
        backends.push(StaticBackend { id, location, membership, resolve });
    }
    backends
}

fn process_of(mut section: Section<'_>) -> Process {
    let (replicas, scaled) = replicas(&mut section);
    let command =
        section.required("command", "a list of the program and its arguments, with {port} or {socket}").map(|item| {
            let words = words(&item);
            if item.value.is_sequence() && words.first().is_none_or(String::is_empty) {
                item.fault("is empty: give a program and its arguments");
            }
            words
        });
    let env = env(&mut section);
    let spec = handover::Spec { command: command.unwrap_or_default(), env };
    match (spec.mentions(handover::PORT), spec.mentions(handover::SOCKET)) {
        (false, false) if !spec.command.is_empty() => section.fault(
            "neither command nor env contains {port} or {socket}: add {port} where the replica reads its listen port, or \
             {socket} where it reads the path of its Unix socket",
        ),
        (true, true) => section.fault("command and env together contain {port} and {socket}, but a replica listens on only one address: remove {port} or {socket}"),
        _ => {}
    }
    if spec.uses_sockets()
        && let Some(item) = section.item("ports")
    {
        item.fault("applies only to replicas with {port}: remove this key, or write {port} in place of {socket}");
    }
    let ports = ports(&mut section, replicas);
    let restart = restart(section.section("restart"));
    let rollout = rollout(section.section("rollout"));
    let stop_grace = section.duration("stop_grace");
    section.finish();
    Process { replicas, scaled, spec, ports, restart, rollout, stop_grace }
}

fn docker_of(mut section: Section<'_>) -> Provider {
    let network = section.item("network").and_then(|item| network(&item));
    if let Some(discover) = section.item("discover") {
        if section.item("image").or_else(|| section.item("replicas")).is_some() {
            section.fault("has both discover (existing containers) and replicas of an image (containers that Ringway creates): remove one");
        }
        let provider = Provider::Discover(discover_of(discover.section(), network));
        section.finish();
        return provider;
    }
    let (replicas, scaled) = replicas(&mut section);
    let image = section.required("image", "the name of an image").and_then(|item| {
        let image = item.text()?;
        if !Provider::is_image(&image) {
            item.fault(format_args!("{image:?} is not an image name: write it like nginx:1.27"));
        }
        Some(image)
    });
    let command = section.item("command").map(|item| words(&item));
    let port = port(&mut section);
    let env = env(&mut section);
    let labels = pairs(&mut section, "labels", |name| match name {
        "" => Err("is not a label name: write it like team"),
        name if name.starts_with(label::PREFIX) => Err("is reserved for Ringway: choose another label name"),
        _ => Ok(()),
    });
    let (memory, milli_cpus) = resources(section.section("resources"));
    let pull = section.choice("pull");
    let restart = restart(section.section("restart"));
    let rollout = rollout(section.section("rollout"));
    let stop_grace = section.duration("stop_grace");
    section.finish();
    let spec = Spec { image: image.unwrap_or_default(), command, port, env, labels, memory, milli_cpus, pull };
    Provider::Containers(Containers { replicas, scaled, spec, network, restart, rollout, stop_grace })
}

/// Parses a network name. Engine modes without a separate container network are rejected: replicas would share the
/// network of the host, or Ringway could not reach them.
fn network(item: &Item<'_>) -> Option<String> {
    let name = item.text()?;
    if ["host", "none", "default"].contains(&name.as_str()) || name.contains(':') || name.is_empty() {
        item.fault(format_args!(
            "{name:?} is not a container network: use auto, bridge, or a network that you created"
        ));
    }
    (name != "auto").then_some(name)
}

fn discover_of(mut section: Section<'_>, network: Option<String>) -> Discover {
    let reads_labels = section.truth("labels");
    let label = if reads_labels {
        section.item("label")
    } else {
        section.required("label", "a label of the containers, like app=web")
    };
    let label = label.and_then(|item| {
        let label = item.text()?;
        if label.is_empty() || label.starts_with('=') {
            item.fault(format_args!("{label:?} is not a label: write it like app or app=web"));
        }
        Some(label)
    });
    let port = if reads_labels {
        section.item("port").and_then(|item| item.integer()).map(narrow)
    } else {
        Some(port(&mut section))
    };
    section.finish();
    Discover { label, reads_labels, port, network }
}

fn dns_of(mut section: Section<'_>) -> dns::Settings {
    let name = |item: &Item<'_>| {
        let name = item.text()?;
        if let Some(problem) = dns::name_fault(&name) {
            item.fault(problem);
        }
        Some(name)
    };
    let question = if let Some(item) = section.item("srv") {
        if let Some(item) = section.item("name").or_else(|| section.item("port")) {
            item.fault("does not apply with srv, whose records have names and ports: remove this key or srv");
        }
        Question::Services { name: name(&item).unwrap_or_default() }
    } else {
        let item = section.required("name", "a name with A or AAAA records, or srv with a name with SRV records");
        let port = port(&mut section);
        Question::Addresses { name: item.and_then(|item| name(&item)).unwrap_or_default(), port }
    };
    let family = section.choice("family");
    let servers = section.item("servers").map_or(Servers::System, |item| servers(&item));
    let mut refresh = section.section("refresh");
    let (min, max) = (refresh.duration("min"), refresh.duration("max"));
    if max < min {
        refresh.fault("max is shorter than min: set max to min or longer");
    }
    refresh.finish();
    let (timeout, gone_after) = (section.duration("timeout"), section.duration("gone_after"));
    section.finish();
    dns::Settings { question, family, servers, refresh: min..=max, timeout, gone_after }
}

fn file_of(mut section: Section<'_>) -> BackendsFile {
    let path = section.required("path", "the path of a file that lists backends").and_then(|item| {
        let path = item.text()?;
        if path.is_empty() {
            item.fault("is empty: write the path of a file");
        }
        Some(path)
    });
    let format = section.choice("format");
    section.finish();
    BackendsFile { path: Path::new(&path.unwrap_or_default()).into(), format }
}

fn servers(item: &Item<'_>) -> Servers {
    if item.value.as_str() == Some("system") {
        return Servers::System;
    }
    let items = item.list();
    if items.is_empty() && item.value.is_sequence() {
        item.fault("is empty: list name servers like 10.0.0.2, or write system");
    }
    let server = |item: &Item<'_>| {
        let text = item.text()?;
        let ip = text.parse().map(|ip| SocketAddr::new(ip, DNS_PORT));
        let server = ip.or_else(|_| text.parse::<SocketAddr>()).ok().filter(|server| server.port() > 0);
        if server.is_none() {
            item.fault(format_args!(
                "{text:?} is not the address of a name server: write it like 10.0.0.2 or 10.0.0.2:53"
            ));
        }
        server
    };
    Servers::Listed(items.iter().filter_map(server).collect())
}

fn port(section: &mut Section<'_>) -> u16 {
    let port = section.required("port", "the port on which the backends listen");
    narrow(port.and_then(|item| item.integer()).unwrap_or(1))
}

fn words(list: &Item<'_>) -> Vec<String> {
    list.list().iter().filter_map(Item::text).collect()
}

/// Returns memory in bytes and CPU time in thousandths of a core.
#[expect(clippy::cast_sign_loss, reason = "the range is checked")]
fn resources(mut section: Section<'_>) -> (Option<u64>, Option<u64>) {
    let memory = section.item("memory").and_then(|item| {
        let bytes = item.value.as_u64().or_else(|| bytes(item.value.as_str()?));
        let bytes = bytes.filter(|&bytes| item.fits(bytes));
        if bytes.is_none() {
            item.fault(format_args!(
                "{} is not a size of at least 6MiB: write it like 64MiB or 1GiB",
                show(item.value)
            ));
        }
        bytes
    });
    let milli_cpus = section.item("cpus").and_then(|item| {
        let cpus = item.value.as_f64().filter(|cpus| (0.01..=MOST_CPUS).contains(cpus));
        if cpus.is_none() {
            item.fault(format_args!(
                "{} is not a number of CPUs from 0.01 to {MOST_CPUS}: write it like 0.5",
                show(item.value)
            ));
        }
        cpus.map(|cpus| (cpus * 1000.0).round() as u64)
    });
    section.finish();
    (memory, milli_cpus)
}

/// Parses a size with a unit: B, KiB, MiB or GiB, like `64MiB`.
fn bytes(text: &str) -> Option<u64> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit())?);
    let unit: u64 = match unit.trim() {
        "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(unit)
}

fn env(section: &mut Section<'_>) -> Vec<(String, String)> {
    pairs(section, "env", |name| {
        let is_fine = !name.is_empty() && !name.contains(['=', '\0']);
        is_fine.then_some(()).ok_or("is not a valid name of an environment variable")
    })
}

/// Reads a section of `name: value` lines and checks each name. `check` returns a fault text for an invalid name.
pub(super) fn pairs(
    section: &mut Section<'_>,
    key: &'static str,
    check: impl Fn(&str) -> Result<(), &'static str>,
) -> Vec<(String, String)> {
    let Some(item) = section.item(key) else { return Vec::new() };
    let Some(map) = item.value.as_mapping() else {
        item.fault(format_args!("{} is not a section of `name: value` lines", show(item.value)));
        return Vec::new();
    };
    let mut pairs = Vec::new();
    for (name, value) in map {
        let entry = item.entry(show(name).trim_matches('"'), value);
        match check(name.as_str().unwrap_or_default()) {
            Ok(()) => pairs.extend(entry.text().map(|value| (name.as_str().unwrap_or_default().to_owned(), value))),
            Err(problem) => entry.fault(problem),
        }
    }
    pairs
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
        None => item.fault(format_args!("{text:?} is neither auto nor a range of ports: write it like 9001-9010")),
        Some((first, last)) if u32::from(last - first) + 1 < replicas => {
            item.fault(format_args!(
                "{text} has fewer ports than the {replicas} replicas need: widen the range or lower replicas"
            ));
        }
        Some(_) => {}
    }
    range
}

fn location(item: &Item<'_>) -> Option<Location> {
    let Some(text) = item.value.as_str() else {
        item.fault(format_args!("{} is not an address: write host:port or unix:/path, in quotes", show(item.value)));
        return None;
    };
    Location::parse(text).map_err(|problem| item.fault(problem)).ok()
}
