//! Parses the keys of a pool's health check.

use std::ops::RangeInclusive;
use std::time::Duration;

use hyper::header::HeaderValue;
use serde_yaml::Value;

use super::parse_routes::protocols;
use super::reader::{Item, Section, narrow, show};
use crate::client_hello::host_name;
use crate::control::health::{self, Check, Exec, Expect, Grpc, Http, Kind, Step, Tls};
use crate::label_enum;
use crate::labels::Label as _;
use crate::proxy_header::{OwnHeader, Version};

label_enum! {
    pub(super) enum CheckKind { Tcp => "tcp", Http => "http", Expect => "expect", Tls => "tls", Grpc => "grpc", Exec => "exec", None => "none", }
}

label_enum! {
    pub(super) enum Match { Prefix => "prefix", Contains => "contains", }
}

/// The keys that apply to only one kind of check.
const OF_KINDS: [(&str, CheckKind); 13] = [
    ("path", CheckKind::Http),
    ("host", CheckKind::Http),
    ("status", CheckKind::Http),
    ("body", CheckKind::Http),
    ("send", CheckKind::Expect),
    ("expect", CheckKind::Expect),
    ("match", CheckKind::Expect),
    ("steps", CheckKind::Expect),
    ("goodbye", CheckKind::Expect),
    ("sni", CheckKind::Tls),
    ("alpn", CheckKind::Tls),
    ("service", CheckKind::Grpc),
    ("command", CheckKind::Exec),
];

/// `grace`: how long a new backend may fail its checks and still count as starting.
/// `is_exclusive`: at most one backend may pass. `on_unix`: a backend has a Unix socket. `version`: of the PROXY header that backends get.
pub(super) fn health_check(
    mut section: Section<'_>,
    grace: Duration,
    on_unix: bool,
    version: Option<Version>,
    is_exclusive: bool,
) -> Option<health::Settings> {
    let kind: CheckKind = section.choice("kind");
    for (key, other) in OF_KINDS.into_iter().filter(|&(_, other)| other != kind) {
        if let Some(item) = section.item(key) {
            item.fault(format_args!("applies only to `kind: {}`: set that kind, or remove this key", other.as_str()));
        }
    }
    let wanted = match kind {
        CheckKind::Tcp | CheckKind::None => Kind::Tcp,
        CheckKind::Http => Kind::Http(http(&mut section)),
        CheckKind::Expect => Kind::Expect(expect(&mut section)),
        CheckKind::Tls => Kind::Tls(tls(&mut section)),
        CheckKind::Grpc => Kind::Grpc(grpc(&mut section)),
        CheckKind::Exec => Kind::Exec(exec(&mut section)),
    };
    let port = section.item("port");
    if let Some(item) = port.as_ref().filter(|_| on_unix) {
        item.fault("a backend of this pool has a Unix socket, which has no port: remove this key");
    }
    let port = port.and_then(|item| item.integer()).map(narrow);
    let send_proxy = send_proxy(&mut section, kind, version, port);
    let interval = section.duration("interval");
    let fast_interval = section.item("fast_interval").and_then(|item| item.duration());
    let timeout = section.duration("timeout");
    let check = health::Settings {
        check: Check { kind: wanted, port, send_proxy, outgoing: None },
        interval,
        fast_interval: fast_interval.unwrap_or((interval / 4).max(Duration::from_millis(10))),
        jitter: narrow(section.integer("jitter")),
        timeout,
        rise: narrow(section.integer("rise")),
        fall: narrow(section.integer("fall")),
        grace,
        is_exclusive,
    };
    section.finish();
    (kind != CheckKind::None).then_some(check)
}

/// Which PROXY header a check sends, if nothing else is set. Another port belongs to another server.
pub(super) fn usual_header(version: Option<Version>, port: Option<u16>) -> OwnHeader {
    version.filter(|_| port.is_none()).map_or(OwnHeader::Absent, OwnHeader::Local)
}

fn send_proxy(section: &mut Section<'_>, kind: CheckKind, version: Option<Version>, port: Option<u16>) -> OwnHeader {
    let Some(item) = section.item("send_proxy") else { return usual_header(version, port) };
    match kind {
        CheckKind::None => item.fault("there are no checks: set another kind, or remove this key"),
        CheckKind::Exec if item.value.as_str() != Some("auto") => {
            item.fault("a check of this kind sends no bytes: set another kind, or remove this key");
        }
        CheckKind::Tcp if item.value.is_bool() => {
            item.fault("a check of this kind sends no bytes: set another kind, or remove this key");
        }
        _ => {}
    }
    let is_local = item.value.as_bool() == Some(true);
    let is_addresses = item.value.as_str() == Some("local_as_proxy");
    match (item.value.as_str(), version) {
        (Some("auto"), _) => return usual_header(version, port),
        (None, _) if item.value.as_bool() == Some(false) => {}
        (_, None) if is_local || is_addresses => {
            item.fault("requires the pool's send_proxy: set it, or remove this key");
        }
        (_, Some(version)) if is_local => return OwnHeader::Local(version),
        (_, Some(version)) if is_addresses => return OwnHeader::Addresses(version),
        _ => item.fault(format_args!("{} is not one of auto, true, false, local_as_proxy", show(item.value))),
    }
    OwnHeader::Absent
}

fn http(section: &mut Section<'_>) -> Http {
    let path = section.item("path").and_then(|item| {
        let path = item.text()?;
        let uri = path.parse().ok().filter(|_| path.starts_with('/'));
        if uri.is_none() {
            item.fault(format_args!("{path:?} is not a path: write it like /heartbeat"));
        }
        uri
    });
    let host = section.item("host").and_then(|item| {
        let host = item.text()?;
        if host.is_empty() || HeaderValue::from_str(&host).is_err() {
            item.fault(format_args!("{host:?} is not a valid value of the host header: write it like www.example"));
        }
        Some(host)
    });
    let status = section.item("status").and_then(|item| status(&item));
    let body = section.item("body").and_then(|item| item.text());
    Http { path: path.unwrap_or_default(), host, status: status.unwrap_or(200..=399), body }
}

/// Parses one status code like `200`, or a range like `200-399`.
fn status(item: &Item<'_>) -> Option<RangeInclusive<u16>> {
    let text = item.text()?;
    let (first, last) = text.split_once('-').unwrap_or((&text, &text));
    let range = first.trim().parse().ok().zip(last.trim().parse().ok());
    let range = range.filter(|&(first, last)| (100..=last).contains(&first) && last <= 599);
    if range.is_none() {
        item.fault(format_args!(
            "{} is neither a status code nor a range: write it like 200 or 200-399",
            show(item.value)
        ));
    }
    range.map(|(first, last): (u16, u16)| first..=last)
}

/// One step from the keys of the check, or several from `steps`.
fn expect(section: &mut Section<'_>) -> Expect {
    let steps = if let Some(item) = section.item("steps") {
        if let Some(item) = ["send", "expect", "match"].into_iter().find_map(|key| section.item(key)) {
            item.fault("does not apply with steps, which have keys of their own: move it into a step");
        }
        let steps = item.list();
        if steps.is_empty() && item.value.is_sequence() {
            item.fault("is empty: give at least one step like { send: \"PING\\r\\n\", expect: \"+PONG\" }");
        }
        let of = |item: Item<'_>| {
            if let Some(text) = item.value.as_str() {
                item.fault(format_args!("{text:?} is not a section: write {{ expect: {text:?} }}"));
                return None;
            }
            let mut section = item.section();
            let step = step(&mut section);
            section.finish();
            Some(step)
        };
        steps.into_iter().filter_map(of).collect()
    } else {
        vec![step(section)]
    };
    let goodbye = section.item("goodbye").and_then(|item| bytes(&item)).unwrap_or_default();
    Expect { steps, goodbye }
}

fn step(section: &mut Section<'_>) -> Step {
    let send = section.item("send").and_then(|item| bytes(&item)).unwrap_or_default();
    let expect = section.required("expect", "the bytes that the answer starts with or contains").and_then(|item| {
        let bytes = bytes(&item)?;
        if bytes.is_empty() {
            item.fault("is empty: give at least one byte, or use `kind: tcp`");
        }
        Some(bytes)
    });
    let is_prefix = section.choice::<Match>("match") == Match::Prefix;
    Step { send, expect: expect.unwrap_or_default(), is_prefix }
}

/// Longest name of a gRPC service in bytes.
const LONGEST_SERVICE: usize = 127;

fn grpc(section: &mut Section<'_>) -> Grpc {
    let service = section.item("service").and_then(|item| {
        let name = item.text()?;
        if name.len() > LONGEST_SERVICE {
            item.fault(format_args!("is longer than {LONGEST_SERVICE} bytes"));
        }
        Some(name)
    });
    Grpc { service: service.unwrap_or_default() }
}

fn exec(section: &mut Section<'_>) -> Exec {
    let command = section.required("command", "a list of the program and its arguments").map(|item| {
        let words: Vec<_> = item.list().iter().filter_map(Item::text).collect();
        if item.value.is_sequence() && words.first().is_none_or(String::is_empty) {
            item.fault("is empty: give a program and its arguments");
        }
        words
    });
    Exec { command: command.unwrap_or_default() }
}

fn tls(section: &mut Section<'_>) -> Tls {
    let sni = section.item("sni").and_then(|item| {
        let name = item.text()?;
        let parsed = host_name(&name);
        if parsed.is_none() {
            item.fault(format_args!("{name:?} is not a server name: write it like www.example.com"));
        }
        parsed
    });
    Tls { sni, alpn: protocols(section) }
}

/// Parses bytes: plain text, or `{ hex: "01 ff" }` for bytes that are not valid text.
fn bytes(item: &Item<'_>) -> Option<Vec<u8>> {
    if !item.value.is_mapping() {
        return item.text().map(String::into_bytes);
    }
    let mut section = item.clone().section();
    let digits = section.required("hex", "pairs of hexadecimal digits").and_then(|item| {
        let digits: String = item.text()?.split_whitespace().collect();
        let bytes = (0..digits.len()).step_by(2).map(|at| {
            let pair = digits.get(at..at + 2).filter(|pair| !pair.starts_with('+'))?;
            u8::from_str_radix(pair, 16).ok()
        });
        let bytes: Option<Vec<u8>> = bytes.collect();
        if bytes.is_none() {
            item.fault(format_args!(
                "{} is not a list of hexadecimal digit pairs: write it like \"01 ff\"",
                show(item.value)
            ));
        }
        bytes
    });
    section.finish();
    digits
}

/// Writes bytes in the form that [`bytes()`] parses.
pub(super) fn bytes_value(bytes: &[u8]) -> Value {
    let text = std::str::from_utf8(bytes).ok().filter(|text| !text.contains('\0'));
    text.map_or_else(
        || {
            let pairs: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            Value::Mapping([("hex".into(), pairs.join(" ").into())].into_iter().collect())
        },
        Into::into,
    )
}
