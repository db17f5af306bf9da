//! The keys of pools, except for those of their providers.

use std::time::Duration;

use super::provider::PROVIDER;
use super::{Form, Key, NAME, days, hours, minutes, ms, names, seconds};
use crate::config::parse_check::{CheckKind, Match};
use crate::config::parse_pool::KEEP;
use crate::control::publisher::OnDown;
use crate::proxy::Balance;
use crate::proxy::key::KeyKind;
use crate::proxy_header::{Tlv, Version};

/// An entry of `pools`.
pub(super) const POOL: &[Key] = &[
    Key::required("name", NAME, "unique name"),
    Key::usual(
        "key",
        Form::Any(&[Form::Choice(key_kinds), Form::Section(KEY, "")]),
        "source",
        "`source`: hash the client's address and port, so each connection may go to a different backend. `source_ip`: hash only the address, so a client keeps its backend. `source_net`: hash only the client's network, an IPv4 /24 or an IPv6 /64. `{ source_net: { v4: 20, v6: 56 } }` sets other prefix lengths. `sni`: hash the server name of the TLS handshake, and without one the address. A client that waits for the server is then delayed by `hello.timeout`. On a [Unix socket](#unix-sockets), Ringway hashes the client's user id instead of the address",
    ),
    Key::choice(
        "balance",
        names::<Balance>,
        "ring",
        "`ring`: the key decides on the consistent-hash ring, so a client can keep its backend. `least_connections`: the backend with [the fewest connections](#bounded-loads) for its weight, whoever the client is",
    ),
    Key::section("ring", RING, "{ virtual_nodes: 160 }", "parameters of the consistent-hash ring"),
    Key::required(
        "provider",
        PROVIDER,
        "where the backends come from: exactly one of `static`, `process`, `docker`, `dns` and `file`",
    ),
    Key::section("connect", CONNECT, "{ timeout: 2s }", "how Ringway connects to a backend"),
    Key::usual(
        "send_proxy",
        Form::Any(&[Form::Off, Form::Choice(names::<Version>), Form::Section(SEND_PROXY, "")]),
        "off",
        "`v1`, `v2`: the version of the [PROXY header](#proxy-protocol) that tells backends the client's address. Or a section with the keys below",
    ),
    Key::section("timeouts", TIMEOUTS, "{ idle: 10m }", "how long a connection may be silent or open"),
    Key::usual(
        "max_connections_per_backend",
        Form::Any(&[Form::Off, Form::Integer(1..=1_000_000)]),
        "off",
        "open connections of a backend. If a backend is full, Ringway tries the next one on the ring",
    ),
    Key::section("health_check", HEALTH_CHECK, "{ kind: http }", "how Ringway checks the backends"),
    Key::usual(
        "agent",
        Form::Any(&[Form::Off, Form::Section(AGENT, "{ port: 9777 }")]),
        "off",
        "programs beside the backends that say [how many connections](operations.md#agents) those should get, as for HAProxy",
    ),
    Key::optional(
        "ejection",
        Form::Any(&[Form::Off, Form::Section(EJECTION, "{ after: 5 }")]),
        "(the keys below)",
        "when Ringway stops using a backend to which connects fail. `off`: never",
    ),
    Key::integer(
        "panic_threshold",
        0..=100,
        50,
        "if less than this percentage of backends is healthy, Ringway tries all of them, whatever their checks say. 0: never. With `tiers.exclusive`, the default and only value is 0",
    ),
    Key::section("tiers", TIERS, "{ spill_below: 50 }", "when backends of higher [tiers](#tiers) get connections"),
    Key::choice(
        "on_down",
        names::<OnDown>,
        "keep",
        "what happens to the connections of a backend that goes down: `keep` or `reset`. With `tiers.exclusive`, the default and only value is `reset`",
    ),
    Key::usual(
        "on_move",
        Form::Any(&[Form::Word(KEEP), Form::Section(ON_MOVE, "{ close_over: 5m }")]),
        KEEP,
        "what happens to open connections whose keys lead to another healthy backend after a change, like more replicas or a backend that is back. `keep`: they stay. `{ close_over: 5m }`: they [move](operations.md#rebalancing). Not with `key: source`",
    ),
    Key::duration(
        "slow_start",
        Duration::ZERO..=hours(1),
        Duration::ZERO,
        "time over which a backend that recovers gets its keys back, step by step",
    ),
    Key::duration(
        "drain",
        Duration::ZERO..=days(1),
        seconds(30),
        "how long open connections may continue when Ringway stops or a backend is drained. Ringway resets the rest",
    ),
];

/// Section `pools[].key`.
const KEY: &[Key] = &[Key::required(
    "source_net",
    Form::Section(SOURCE_NET, "{ v4: 24, v6: 64 }"),
    "a client network as the key, with its prefix lengths",
)];

/// Section `pools[].key.source_net`.
const SOURCE_NET: &[Key] = &[
    Key::integer("v4", 1..=32, 24, "prefix length of IPv4 networks, 1 to 32"),
    Key::integer("v6", 1..=128, 64, "prefix length of IPv6 networks, 1 to 128"),
];

/// Section `pools[].on_move`.
const ON_MOVE: &[Key] = &[Key::duration(
    "close_over",
    seconds(1)..=days(1),
    minutes(5),
    "time in which Ringway resets these connections, evenly, and each at a moment without traffic if there is one",
)];

/// Section `pools[].ring`.
const RING: &[Key] = &[
    Key::integer("virtual_nodes", 1..=65_536, 160, "points of a backend on the ring, per unit of weight"),
    Key::integer("probes", 1..=64, 3, "hashes per key. More make the shares more even and the lookup slower"),
    Key::integer(
        "seed",
        0..=u64::MAX,
        0,
        "seed of the hash. Instances with the same `ring` settings, backend ids and weights pick the same backend for a key",
    ),
    Key::usual(
        "bound",
        Form::Any(&[Form::Off, Form::Integer(101..=1000)]),
        "off",
        "[most connections](#bounded-loads) of a backend, in percent of its fair share. Beyond it, a key goes to the next backend on the ring. 125 suits caches, 150 sessions",
    ),
];

/// Section `pools[].tiers`.
const TIERS: &[Key] = &[
    Key::integer(
        "spill_below",
        0..=100,
        50,
        "if less than this percentage of a tier's weight is healthy, the next tier gets the keys of the backends that are not healthy. 0: only if no backend of the tier is healthy",
    ),
    Key::truth(
        "exclusive",
        false,
        "`true`: at most one backend of the pool gets connections, [the one whose check passes](#exclusive-pools)",
    ),
];

/// Section `pools[].connect`.
const CONNECT: &[Key] = &[
    Key::duration("timeout", ms(1)..=minutes(5), seconds(2), "timeout of each try"),
    Key::integer("attempts", 1..=100, 3, "backends that Ringway tries for one connection"),
    Key::optional(
        "source",
        Form::Any(&[Form::Text, Form::List(&Form::Text)]),
        "(the kernel chooses)",
        "address from which Ringway connects, or a list like `[10.0.0.4, 10.0.0.5]`. [Each one](#source-addresses) allows some 28,000 more connections to each backend. The key chooses the first one to try",
    ),
    Key::optional(
        "interface",
        Form::Text,
        "(the route decides)",
        "network interface that the packets to backends take, like `eth1`, or a VRF",
    ),
    Key::optional(
        "mark",
        Form::Integer(1..=u32::MAX as u64),
        "(none)",
        "mark of the packets to backends, for `ip rule` and nftables. Needs CAP_NET_ADMIN; since Linux 5.17, CAP_NET_RAW is enough",
    ),
    Key::optional("congestion", Form::Text, "(the system's)", "TCP congestion control towards backends, like `bbr`"),
];

/// Section `pools[].send_proxy`.
const SEND_PROXY: &[Key] = &[
    Key::required("version", Form::Choice(names::<Version>), "`v1` or `v2`"),
    Key::optional(
        "tlvs",
        Form::List(&Form::Choice(names::<Tlv>)),
        "(none)",
        "with `v2`, fields that Ringway adds. `authority`: the server name of the client's TLS handshake. `alpn`: the protocol that the client prefers. `unique_id`: the connection's id, as in the access log. `crc32c`: a checksum. `authority` and `alpn` delay a client that waits for the server by `hello.timeout`",
    ),
    Key::optional(
        "pass",
        Form::List(&Form::Integer(1..=255)),
        "(none)",
        "with `v2`, types of fields that Ringway passes on from the header that it has received, like `[0xEA]`",
    ),
];

/// Section `pools[].timeouts`.
const TIMEOUTS: &[Key] = &[
    Key::usual_time(
        "idle",
        Form::Any(&[Form::Off, Form::Duration(ms(100)..=days(30))]),
        minutes(10),
        "Ringway resets a connection on which nothing moves for this long. `off`: never",
    ),
    Key::duration("half_closed", ms(100)..=days(30), minutes(1), "idle timeout after one side has ended its stream"),
    Key::usual(
        "max_connection_age",
        Form::Any(&[Form::Off, Form::Duration(seconds(1)..=days(30))]),
        "off",
        "maximum age of a connection. Ringway resets it at this age or up to a tenth sooner",
    ),
];

/// Section `pools[].health_check`.
const HEALTH_CHECK: &[Key] = &[
    Key::choice(
        "kind",
        names::<CheckKind>,
        "tcp",
        "`tcp`: connect, and reset before the server accepts the connection (on a Unix socket: connect and close). `http`: a GET. `expect`: send bytes and expect bytes. `tls`: begin a TLS handshake, and pass at the server's first answer; the check does not look at certificates. `grpc`: ask the health service of a gRPC server without TLS. `exec`: run a program. `none`: no checks",
    ),
    Key::optional(
        "port",
        Form::Integer(1..=65_535),
        "(the backend's)",
        "another port to check. Not for pools with Unix sockets",
    ),
    Key::usual(
        "send_proxy",
        Form::Any(&[Form::Word("auto"), Form::Truth, Form::Word("local_as_proxy")]),
        "auto",
        "the PROXY header of the checks `http`, `expect`, `tls` and `grpc`. `auto`: a header of the pool's version, but none if `port` is set. `true`: a header, even if `port` is set. `false`: no header. `local_as_proxy`: a header with the check's own addresses, for servers that do not understand a header without a client",
    ),
    Key::usual("path", Form::Text, "/", "for `http`"),
    Key::optional(
        "host",
        Form::Text,
        "(the address)",
        "for `http`: the header `host`. On a Unix socket the default is `localhost`",
    ),
    Key::usual(
        "status",
        Form::Any(&[Form::Integer(100..=599), Form::Quoted(r"^\s*\d{3}\s*(-\s*\d{3}\s*)?$")]),
        "200-399",
        "for `http`: a status or a range",
    ),
    Key::optional("body", Form::Text, "(any)", "for `http`: text that the body must contain"),
    Key::optional(
        "send",
        Form::Any(&[Form::Text, Form::Section(HEX, "")]),
        "(nothing)",
        "for `expect`: text like `\"PING\\r\\n\"`, or `{ hex: \"01 ff\" }`",
    ),
    Key::optional(
        "expect",
        Form::Any(&[Form::Text, Form::Section(HEX, "")]),
        "(required)",
        "for `expect`: the required answer, like `+PONG` or `SSH-2.0`",
    ),
    Key::choice(
        "match",
        names::<Match>,
        "prefix",
        "for `expect`: the answer begins with it (`prefix`), or contains it (`contains`)",
    ),
    Key::optional(
        "steps",
        Form::List(&Form::Section(STEP, "")),
        "(one step)",
        "for `expect`: [several exchanges](operations.md#recipes-for-checks), in place of `send`, `expect` and `match`",
    ),
    Key::optional(
        "goodbye",
        Form::Any(&[Form::Text, Form::Section(HEX, "")]),
        "(nothing)",
        "for `expect`: sent before the check closes the connection, like `\"QUIT\\r\\n\"`",
    ),
    Key::optional(
        "sni",
        Form::Text,
        "(none)",
        "for `tls`: the server name for which the check asks. Servers with several certificates need it",
    ),
    Key::optional(
        "alpn",
        Form::List(&Form::Text),
        "(none)",
        "for `tls`: application protocols, like `[h2]`. The check fails if the server refuses all of them",
    ),
    Key::optional("service", Form::Text, "(the whole server)", "for `grpc`: the service to ask for"),
    Key::optional(
        "command",
        Form::List(&Form::Text),
        "(required)",
        "for `exec`: [program and arguments](operations.md#health), with `{address}`, `{host}`, `{port}` and `{backend}`",
    ),
    Key::duration("interval", ms(10)..=hours(1), seconds(2), "time between checks of one backend"),
    Key::optional(
        "fast_interval",
        Form::Duration(ms(10)..=hours(1)),
        "(a quarter of it)",
        "time between checks while results contradict the backend's state",
    ),
    Key::integer("jitter", 0..=100, 10, "largest random delay that Ringway adds to an interval, in percent of it"),
    Key::duration("timeout", ms(1)..=hours(1), seconds(1), "timeout of one check"),
    Key::integer(
        "rise",
        1..=100,
        2,
        "passed checks in a row that make an unhealthy backend healthy. A new backend needs one",
    ),
    Key::integer("fall", 1..=100, 3, "failed checks in a row that make a healthy backend unhealthy"),
];

/// An entry of `pools[].health_check.steps`.
const STEP: &[Key] = &[
    Key::optional("send", Form::Any(&[Form::Text, Form::Section(HEX, "")]), "(nothing)", "bytes to send"),
    Key::required("expect", Form::Any(&[Form::Text, Form::Section(HEX, "")]), "the required answer"),
    Key::choice("match", names::<Match>, "prefix", "the answer begins with it (`prefix`), or contains it (`contains`)"),
];

/// Bytes as hexadecimal digits.
const HEX: &[Key] = &[Key::required("hex", Form::Text, "pairs of hexadecimal digits, like `01 ff`")];

/// Section `pools[].agent`.
const AGENT: &[Key] = &[
    Key::required("port", Form::Integer(1..=65_535), "port of the agents, at the addresses of the backends"),
    Key::duration("interval", ms(10)..=hours(1), seconds(2), "time between questions to one agent"),
    Key::optional(
        "timeout",
        Form::Duration(ms(1)..=hours(1)),
        "(1s, or the interval)",
        "timeout of one question, at most `interval`. The default is 1s, or the interval if that is shorter",
    ),
    Key::optional("send", Form::Text, "(nothing)", "text to send first, with `{backend}`, like `\"{backend}\\n\"`"),
];

/// Section `pools[].ejection`.
const EJECTION: &[Key] = &[
    Key::integer("after", 1..=1000, 5, "failed connects in a row after which Ringway ejects a backend"),
    Key::duration(
        "base",
        ms(1)..=hours(1),
        seconds(30),
        "duration of the first ejection. The n-th consecutive ejection lasts n times as long",
    ),
    Key::duration("max", ms(1)..=days(1), minutes(5), "longest ejection"),
    Key::integer(
        "max_share",
        1..=100,
        50,
        "largest share of a pool's backends that may be ejected at once, in percent. Ringway may always eject one backend, but never the last one that is left",
    ),
];

fn key_kinds() -> Vec<&'static str> {
    KeyKind::NAMES.to_vec()
}
