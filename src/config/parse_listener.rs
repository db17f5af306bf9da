//! Parses the keys of a listener.

use std::time::Duration;

use super::parse_routes::{RESET, access_list, hello, networks, pool_name, routes};
use super::reader::{Item, Section, kernel_name, name, narrow, show};
use super::{BackendPort, Listener, MOST_PORTS, PerSource, Pool, Relay};
use crate::address::{Address, listen_ports};
use crate::label_enum;
use crate::networks::Networks;
use crate::proxy::{ProxyProtocol, Rate};

/// Permissions of the file of a Unix socket on which only Ringway's own user, and root, may connect.
const OWNER_ONLY: u32 = 0o600;

const SECOND: Duration = Duration::from_secs(1);

/// The units of rates.
pub(super) const RATE_UNITS: [(&str, Duration); 3] =
    [("s", SECOND), ("m", Duration::from_secs(60)), ("h", Duration::from_secs(3600))];

pub(super) fn listener(mut section: Section<'_>, pools: &[Pool], relay: &Relay) -> Listener {
    let name = name(&mut section);
    let listen = section
        .required("listen", "an address like 0.0.0.0:8000 or unix:/run/ringway.sock")
        .and_then(|item| listen_address(&item));
    let (listen, ports) = listen.unzip();
    let mode = section.item("mode").and_then(|item| {
        if matches!(listen, Some(Address::Ip(_))) {
            item.fault("applies only to a Unix socket: listen on unix:/path, or remove this key");
        }
        mode(&item)
    });
    let on_unix = matches!(listen, Some(Address::Unix(_)));
    let of_tcp = |item: &Item<'_>| {
        if on_unix {
            item.fault("applies only to TCP: listen on an IP address, or remove this key");
        }
    };
    let interface = section.item("interface").inspect(of_tcp).and_then(|item| kernel_name(&item));
    let freebind = section.item("freebind").inspect(of_tcp).and_then(|item| item.truth()).unwrap_or_default();
    let backend_port = section.choice("backend_port");
    if on_unix && backend_port == BackendPort::Same {
        section.fault("backend_port: same applies only to TCP: listen on an IP address, or remove this key");
    }
    let allow = access_list(&mut section, "allow");
    let deny = access_list(&mut section, "deny");
    let names: Vec<_> = pools.iter().map(|pool| pool.name.as_str()).collect();
    let routes = section.item("routes").map_or(Vec::new(), |item| routes(&item, &names));
    let pool = section.required("pool", "the name of a pool, or reset").and_then(|item| {
        if item.value.as_str() == Some(RESET) && routes.is_empty() {
            item.fault("resets every connection: give the listener routes, or another pool");
        }
        pool_name(&item, &names)
    });
    let listener = Listener {
        name,
        listen: listen.unwrap_or(Address::Ip(([0, 0, 0, 0], 0).into())),
        ports: ports.unwrap_or(1),
        interface,
        freebind,
        backend_port,
        mode: mode.unwrap_or(OWNER_ONLY),
        allow,
        deny,
        routes,
        pool,
        hello: hello(section.section("hello"), relay),
        answer_status: section.truth("answer_status"),
        backlog: narrow(section.integer("backlog")),
        max_connections: section.optional_integer("max_connections").map(narrow),
        per_source: per_source(section.section("per_source")),
        proxy_protocol: section
            .item("proxy_protocol")
            .filter(|item| !item.is_off())
            .map(|item| proxy_protocol(item.section())),
    };
    section.finish();
    listener
}

fn per_source(mut section: Section<'_>) -> PerSource {
    let max_connections = section.optional_integer("max_connections").map(narrow);
    let rate = section.item("rate").filter(|item| !item.is_off());
    let burst = section.item("burst");
    if let Some(item) = burst.as_ref().filter(|_| rate.is_none()) {
        item.fault("requires rate: set rate, or remove burst");
    }
    let burst = burst.and_then(|item| item.integer()).map(narrow);
    let rate =
        rate.and_then(|item| self::rate(&item)).map(|(count, per)| Rate { count, per, burst: burst.unwrap_or(count) });
    section.finish();
    PerSource { max_connections, rate }
}

/// A number of connections in a unit of time: `100` or `100/s`, `30/m`, `500/h`.
fn rate(item: &Item<'_>) -> Option<(u32, Duration)> {
    let per_second = item.value.as_u64().map(|number| (number, SECOND));
    let with_unit = || {
        let (number, unit) = item.value.as_str()?.split_once('/')?;
        let (_, unit) = RATE_UNITS.iter().find(|(name, _)| *name == unit.trim())?;
        Some((number.trim().parse().ok()?, *unit))
    };
    let rate = per_second.or_else(with_unit).filter(|&(number, _)| item.fits(number));
    if rate.is_none() {
        item.fault(format_args!(
            "{} is neither off nor a rate of 1 to 1000000 connections: write it like 100 (each second), 30/m or 500/h",
            show(item.value)
        ));
    }
    rate.map(|(number, unit)| (narrow(number), unit))
}

label_enum! {
    pub(super) enum Others { Plain => "plain", Reset => "reset", }
}

fn proxy_protocol(mut section: Section<'_>) -> ProxyProtocol {
    let trusts_everybody = section.truth("i_trust_everybody");
    let (is_required, others) = (section.truth("required"), section.choice::<Others>("others"));
    let timeout = section.duration("timeout");
    let list = section.required("from", "the addresses of the balancers that send the header, like 10.0.0.0/8");
    let from = list.map_or_else(Networks::default, |list| {
        let from = networks(&list);
        if list.value.as_sequence().is_some_and(Vec::is_empty) {
            list.fault("is empty: give the addresses of the balancers that send the header, like 10.0.0.0/8");
        }
        if from.has_everybody() && !trusts_everybody {
            list.fault(
                "has every address: anybody could choose the client address. Give the balancers' addresses, or set \
                 i_trust_everybody to true",
            );
        }
        from
    });
    section.finish();
    ProxyProtocol { from, is_required, resets_others: others == Others::Reset, timeout }
}

/// The address of a listener: `ip:port`, `ip:first-last` or `unix:/path`, and its number of ports.
fn listen_address(item: &Item<'_>) -> Option<(Address, u16)> {
    let text = text_of_address(item, "unix:/run/web.sock")?;
    let on_ip = || listen_ports(text, MOST_PORTS).map(|(ip, ports)| (Address::Ip(ip), ports));
    let address = Address::parse_unix(text).map_or_else(on_ip, |unix| Ok((unix?, 1)));
    address.map_err(|problem| item.fault(problem)).ok()
}

/// The text of an address. A bare number is a port, which YAML does not take for text. `other`: another way to write an address,
/// or nothing.
pub(super) fn text_of_address<'a>(item: &Item<'a>, other: &str) -> Option<&'a str> {
    let text = item.value.as_str();
    if text.is_none() {
        let or = if other.is_empty() { String::new() } else { format!(", or {other}") };
        let port = item.value.as_u64().filter(|port| (1..=65_535).contains(port)).unwrap_or(8000);
        item.fault(format_args!(
            "{} is not an address: write it like 0.0.0.0:{port} or [::]:{port}{or}",
            show(item.value)
        ));
    }
    text
}

/// The permissions of a file, as octal digits.
fn mode(item: &Item<'_>) -> Option<u32> {
    let is_octal = |text: &&str| (3..=4).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    // A number counts as its digits: whoever writes 660 means that.
    let digits = item.value.as_str().map(str::to_owned).or_else(|| Some(item.value.as_u64()?.to_string()));
    let digits = digits.as_deref().filter(is_octal);
    let mode = digits.and_then(|digits| u32::from_str_radix(digits, 8).ok()).filter(|&mode| mode <= 0o777);
    if mode.is_none() {
        item.fault(format_args!(
            "{} is not a file mode: write octal digits in quotes, like \"0660\"",
            show(item.value)
        ));
    }
    mode
}
