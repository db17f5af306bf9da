//! Writes the effective config as YAML, with every default filled in. Loading that YAML gives the same config.

mod provider;

use std::time::Duration;

use serde_yaml::{Mapping, Value};

use self::provider::provider;
use super::parse_check::{Match, bytes_value, usual_header};
use super::parse_listener::RATE_UNITS;
use super::parse_pool::KEEP;
use super::parse_routes::RESET;
use super::{AccessList, Api, Config, Ejection, Listener, PerSource, Pool, Relay, Route, variables};
use crate::control::agent;
use crate::control::health::{self, Kind, Step};
use crate::labels::Label as _;
use crate::networks::Networks;
use crate::outgoing::Outgoing;
use crate::proxy::key::KeyKind;
use crate::proxy::{Condition, HelloSettings, ProxyProtocol, Rate};
use crate::proxy_header::{OwnHeader, SendProxy};

/// What is written of access lists that come from files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lists {
    /// The path of the file.
    Paths,
    /// The path, and a word on the contents. The value is not a config.
    PathsAndContents,
    /// The networks, as if the config listed them.
    Networks,
}

pub(super) fn yaml(config: &Config, lists: Lists) -> String {
    let mut value = value(config, lists);
    variables::escape(&mut value);
    // A value that consists of text, numbers, lists and mappings always serializes.
    serde_yaml::to_string(&value).unwrap_or_default()
}

pub(super) fn value(config: &Config, lists: Lists) -> Value {
    let mut root = vec![
        ("workers", auto(config.workers)),
        ("max_connections", auto(config.max_connections)),
        ("relay", relay(&config.relay)),
        ("tcp", tcp(config)),
    ];
    if let Some(log) = &config.access_log {
        let path = log.path.display().to_string();
        root.push(("access_log", map([("path", path.into()), ("format", log.format.as_str().into())])));
    }
    root.push(("api", api(&config.api)));
    root.push(("metrics", map([("per_backend", config.metrics.per_backend.as_str().into())])));
    let docker = &config.docker;
    let mut entries = vec![
        ("owner", auto_text(docker.owner.as_deref())),
        ("resync", duration(docker.resync)),
        ("timeout", duration(docker.timeout)),
    ];
    entries.extend(docker.auth_file.as_ref().map(|path| ("auth_file", path.display().to_string().into())));
    root.push(("docker", map(entries)));
    let watch = config.config_watch.map(|watch| {
        map([
            ("settle", duration(watch.settle)),
            ("poll", duration(watch.poll)),
            ("max_keys_moved", off(watch.max_keys_moved.map(Into::into))),
        ])
    });
    root.push(("config_watch", off(watch)));
    root.push(("shutdown", map([("delay", duration(config.shutdown.delay))])));
    root.push(("upgrade", map([("connections", config.upgrade.connections.as_str().into())])));
    let of_listener = |one: &Listener| listener(one, lists);
    root.push(("listeners", list(config.listeners.iter().map(of_listener))));
    root.push(("pools", list(config.pools.iter().map(pool))));
    map(root)
}

fn api(api: &Api) -> Value {
    let mut entries = vec![("listen", api.listen.to_string().into())];
    entries.extend(api.token_file.as_ref().map(|path| ("token_file", path.display().to_string().into())));
    entries.push(("allowed_hosts", words(&api.allowed_hosts)));
    entries.extend([
        ("public_request", api.public_request.into()),
        ("page", api.page.into()),
        ("history", api.history.into()),
    ]);
    map(entries)
}

fn tcp(config: &Config) -> Value {
    let keepalive = config.tcp.keepalive.map_or("off".into(), |keepalive| {
        map([
            ("idle", duration(keepalive.idle)),
            ("interval", duration(keepalive.interval)),
            ("probes", keepalive.probes.into()),
        ])
    });
    map([("keepalive", keepalive), ("user_timeout", duration(config.tcp.user_timeout))])
}

fn listener(listener: &Listener, lists: Lists) -> Value {
    let mut entries = vec![("name", listener.name.as_str().into()), ("listen", listener.listen_text().into())];
    entries.extend(listener.listen.ip().is_none().then(|| ("mode", format!("{:04o}", listener.mode).into())));
    entries.extend(listener.interface.as_deref().map(|interface| ("interface", interface.into())));
    if listener.listen.ip().is_some() {
        entries.push(("freebind", listener.freebind.into()));
        entries.push(("backend_port", listener.backend_port.as_str().into()));
    }
    entries.extend([
        ("allow", off(listener.allow.as_ref().map(|list| access_list(list, lists)))),
        ("deny", off(listener.deny.as_ref().map(|list| access_list(list, lists)))),
        ("routes", list(listener.routes.iter().map(route))),
        ("pool", listener.pool.as_deref().unwrap_or(RESET).into()),
        ("hello", hello(listener.hello)),
        ("answer_status", listener.answer_status.into()),
        ("backlog", listener.backlog.into()),
        ("max_connections", auto(listener.max_connections)),
        ("per_source", per_source(listener.per_source)),
        ("proxy_protocol", off(listener.proxy_protocol.as_ref().map(proxy_protocol))),
    ]);
    map(entries)
}

fn networks(networks: &Networks) -> Value {
    list(networks.list().iter().map(|network| network.to_string().into()))
}

fn access_list(access: &AccessList, lists: Lists) -> Value {
    let file = access.file.as_ref().filter(|_| lists != Lists::Networks);
    let Some(file) = file else { return networks(&access.networks) };
    let mut entries = vec![("file", file.display().to_string().into())];
    if lists == Lists::PathsAndContents {
        let names: Vec<_> = access.networks.list().iter().map(ToString::to_string).collect();
        let (count, digest) = (names.len(), seahash::hash(names.join(" ").as_bytes()));
        entries.push(("contents", format!("{count} networks, digest {digest:016x}").into()));
    }
    map(entries)
}

fn route(route: &Route) -> Value {
    let Condition { sni, alpn, from, tls } = &route.when;
    let mut entries = vec![("name", route.name.as_str().into())];
    entries.extend((!sni.is_empty()).then(|| ("sni", list(sni.iter().map(|name| name.to_string().into())))));
    entries.extend((!alpn.is_empty()).then(|| ("alpn", words(alpn))));
    entries.extend(from.as_ref().map(|from| ("from", networks(from))));
    entries.extend(tls.map(|tls| ("tls", tls.into())));
    entries.push(("pool", route.pool.as_deref().unwrap_or(RESET).into()));
    map(entries)
}

fn hello(settings: HelloSettings) -> Value {
    map([
        ("timeout", duration(settings.timeout)),
        ("max_kib", (settings.most as u64 / 1024).into()),
        ("undecided", if settings.undecided_takes_default { "default" } else { "reset" }.into()),
    ])
}

fn key(key: KeyKind) -> Value {
    match key {
        KeyKind::SourceNet { v4, v6 } => map([("source_net", map([("v4", v4.into()), ("v6", v6.into())]))]),
        KeyKind::Source | KeyKind::SourceIp | KeyKind::Sni => key.as_str().into(),
    }
}

fn proxy_protocol(rules: &ProxyProtocol) -> Value {
    map([
        ("from", networks(&rules.from)),
        ("required", rules.is_required.into()),
        ("timeout", duration(rules.timeout)),
        ("others", if rules.resets_others { "reset" } else { "plain" }.into()),
        ("i_trust_everybody", rules.from.has_everybody().into()),
    ])
}

fn per_source(limits: PerSource) -> Value {
    let mut entries =
        vec![("max_connections", off(limits.max_connections.map(Into::into))), ("rate", off(limits.rate.map(rate)))];
    entries.extend(limits.rate.map(|rate| ("burst", rate.burst.into())));
    map(entries)
}

fn rate(rate: Rate) -> Value {
    match RATE_UNITS.iter().find(|(_, unit)| *unit == rate.per) {
        Some((name, unit)) if *unit > Duration::from_secs(1) => format!("{}/{name}", rate.count).into(),
        _ => rate.count.into(),
    }
}

fn pool(pool: &Pool) -> Value {
    let ring = map([
        ("virtual_nodes", pool.ring.virtual_nodes.into()),
        ("probes", pool.ring.probes.into()),
        ("seed", pool.ring.seed.into()),
        ("bound", off(pool.bound.map(Into::into))),
    ]);
    let mut connect = vec![("timeout", duration(pool.connect.timeout)), ("attempts", pool.connect.attempts.into())];
    connect.extend(pool.connect.outgoing.iter().flat_map(|outgoing| self::outgoing(outgoing)));
    let timeouts = map([
        ("idle", off(pool.timeouts.idle.map(duration))),
        ("half_closed", duration(pool.timeouts.half_closed)),
        ("max_connection_age", off(pool.timeouts.max_connection_age.map(duration))),
    ]);
    map([
        ("name", pool.name.as_str().into()),
        ("key", key(pool.key)),
        ("balance", pool.balance.as_str().into()),
        ("ring", ring),
        ("provider", provider(&pool.provider)),
        ("connect", map(connect)),
        ("send_proxy", off(pool.send_proxy.as_ref().map(send_proxy))),
        ("timeouts", timeouts),
        ("health_check", health_check(pool.health_check.as_ref(), pool.send_proxy.as_ref())),
        ("agent", off(pool.agent.as_ref().map(agent))),
        ("ejection", off(pool.ejection.map(ejection))),
        ("panic_threshold", pool.panic_threshold.into()),
        ("on_down", pool.on_down.as_str().into()),
        ("on_move", pool.on_move.map_or(KEEP.into(), |over| map([("close_over", duration(over))]))),
        ("slow_start", duration(pool.slow_start)),
        ("tiers", map([("spill_below", pool.spill_below.into()), ("exclusive", pool.is_exclusive.into())])),
        ("max_connections_per_backend", off(pool.max_connections_per_backend.map(Into::into))),
        ("drain", duration(pool.drain)),
    ])
}

fn outgoing(outgoing: &Outgoing) -> Vec<(&'static str, Value)> {
    let Outgoing { sources, interface, mark, congestion } = outgoing;
    let sources = match &sources[..] {
        [] => None,
        [one] => Some(one.to_string().into()),
        more => Some(list(more.iter().map(|source| source.to_string().into()))),
    };
    let text = |text: &Option<String>| text.as_deref().map(Value::from);
    let keys = [
        ("source", sources),
        ("interface", text(interface)),
        ("mark", mark.map(Into::into)),
        ("congestion", text(congestion)),
    ];
    keys.into_iter().filter_map(|(key, value)| Some((key, value?))).collect()
}

fn relay(relay: &Relay) -> Value {
    map([
        ("splice", relay.splice.into()),
        ("max_pipes", auto(relay.max_pipes)),
        ("buffer_kib", (relay.buffer_kib as u64).into()),
        ("splice_from_kib", (relay.splice_from_kib as u64).into()),
    ])
}

fn send_proxy(send: &SendProxy) -> Value {
    let version = send.version.as_str();
    if send.tlvs.is_empty() && send.pass.is_empty() {
        return version.into();
    }
    map([
        ("version", version.into()),
        ("tlvs", list(send.tlvs.iter().map(|tlv| tlv.as_str().into()))),
        ("pass", list(send.pass.iter().map(|&kind| kind.into()))),
    ])
}

fn agent(agent: &agent::Settings) -> Value {
    map([
        ("port", agent.port.into()),
        ("interval", duration(agent.interval)),
        ("timeout", duration(agent.timeout)),
        ("send", agent.send.as_str().into()),
    ])
}

fn ejection(ejection: Ejection) -> Value {
    map([
        ("after", ejection.after.into()),
        ("base", duration(ejection.settings.base)),
        ("max", duration(ejection.settings.max)),
        ("max_share", ejection.settings.max_share.into()),
    ])
}

fn health_check(check: Option<&health::Settings>, send: Option<&SendProxy>) -> Value {
    let Some(check) = check else { return map([("kind", "none".into())]) };
    let mut entries = match &check.check.kind {
        Kind::Tcp => vec![("kind", "tcp".into())],
        Kind::Http(http) => {
            let (first, last) = (http.status.start(), http.status.end());
            let mut entries = vec![
                ("kind", "http".into()),
                ("path", http.path.to_string().into()),
                ("status", format!("{first}-{last}").into()),
            ];
            entries.extend(http.host.as_deref().map(|host| ("host", host.into())));
            entries.extend(http.body.as_deref().map(|body| ("body", body.into())));
            entries
        }
        Kind::Expect(expect) => {
            let step = |step: &Step| {
                let kind = if step.is_prefix { Match::Prefix } else { Match::Contains };
                let (send, expect) = (bytes_value(&step.send), bytes_value(&step.expect));
                [("send", send), ("expect", expect), ("match", kind.as_str().into())]
            };
            let mut entries = vec![("kind", "expect".into())];
            match &expect.steps[..] {
                [one] => entries.extend(step(one)),
                steps => entries.push(("steps", list(steps.iter().map(|one| map(step(one)))))),
            }
            entries.push(("goodbye", bytes_value(&expect.goodbye)));
            entries
        }
        Kind::Grpc(grpc) => vec![("kind", "grpc".into()), ("service", grpc.service.as_str().into())],
        Kind::Exec(exec) => {
            let command = list(exec.command.iter().map(|word| word.as_str().into()));
            vec![("kind", "exec".into()), ("command", command)]
        }
        Kind::Tls(tls) => {
            let mut entries = vec![("kind", "tls".into())];
            entries.extend(tls.sni.as_deref().map(|name| ("sni", name.into())));
            if !tls.alpn.is_empty() {
                entries.push(("alpn", list(tls.alpn.iter().map(|name| name.as_str().into()))));
            }
            entries
        }
    };
    entries.extend(check.check.port.map(|port| ("port", port.into())));
    let usual = usual_header(send.map(|send| send.version), check.check.port);
    let header: Value = match check.check.send_proxy {
        header if header == usual => "auto".into(),
        OwnHeader::Absent => false.into(),
        OwnHeader::Local(_) => true.into(),
        OwnHeader::Addresses(_) => "local_as_proxy".into(),
    };
    entries.push(("send_proxy", header));
    entries.extend([
        ("interval", duration(check.interval)),
        ("fast_interval", duration(check.fast_interval)),
        ("jitter", check.jitter.into()),
        ("timeout", duration(check.timeout)),
        ("rise", check.rise.into()),
        ("fall", check.fall.into()),
    ]);
    map(entries)
}

fn words(words: &[String]) -> Value {
    list(words.iter().map(|word| word.as_str().into()))
}

fn auto_text(text: Option<&str>) -> Value {
    text.unwrap_or("auto").into()
}

fn map(entries: impl IntoIterator<Item = (&'static str, Value)>) -> Value {
    Value::Mapping(entries.into_iter().map(|(key, value)| (key.into(), value)).collect::<Mapping>())
}

fn list(items: impl Iterator<Item = Value>) -> Value {
    Value::Sequence(items.collect())
}

/// Writes `None` as `off`.
fn off(value: Option<Value>) -> Value {
    value.unwrap_or_else(|| "off".into())
}

fn auto(number: Option<usize>) -> Value {
    number.map_or("auto".into(), |number| (number as u64).into())
}

fn duration(duration: Duration) -> Value {
    humantime::format_duration(duration).to_string().into()
}
