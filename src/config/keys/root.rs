//! The keys of the whole config outside of listeners and pools.

use std::time::Duration;

use super::listener::LISTENER;
use super::pool::POOL;
use super::{Form, Key, days, hours, minutes, ms, names, seconds};
use crate::config::OpenConnections;
use crate::metrics::PerBackend;
use crate::proxy::access_log::Format;

/// The keys of the whole config.
pub(in crate::config) const ROOT: &[Key] = &[
    Key::optional(
        "include",
        Form::Any(&[Form::Text, Form::List(&Form::Text)]),
        "(none)",
        "further files, whose `listeners` and `pools` Ringway adds: one path, or a list of paths. See [Variables, anchors and further files](#variables-anchors-and-further-files)",
    ),
    Key::usual(
        "workers",
        Form::Any(&[Form::Word("auto"), Form::Integer(1..=1024)]),
        "auto",
        "threads of the data plane. auto: one per core",
    ),
    Key::usual(
        "max_connections",
        Form::Any(&[Form::Word("auto"), Form::Integer(1..=1_000_000)]),
        "auto",
        "open connections of the whole process. auto: half of the limit on open files, minus a reserve. Ringway lowers a larger value to that, and logs a warning",
    ),
    Key::section("relay", RELAY, "{ splice: false }", "how Ringway forwards bytes"),
    Key::section("tcp", TCP, "{ user_timeout: 30s }", "TCP options of the sockets of clients and backends"),
    Key::section("access_log", ACCESS_LOG, "{ path: stdout }", "the access log, with one line per connection"),
    Key::section("api", API, "{ listen: 127.0.0.1:8001 }", "the side port: status, metrics, commands and a page"),
    Key::section("metrics", METRICS, "{ per_backend: compact }", "what the metrics show"),
    Key::section("docker", DOCKER, "{ owner: shop }", "settings for pools that use the Docker engine"),
    Key::usual(
        "config_watch",
        Form::Any(&[Form::Off, Form::Section(CONFIG_WATCH, "{ settle: 1s }")]),
        "off",
        "whether Ringway reloads by itself when the config, an included file or the file of an access list [changes](operations.md#watch-the-config). `{}`: with the defaults below",
    ),
    Key::section("shutdown", SHUTDOWN, "{ delay: 5s }", "how Ringway stops"),
    Key::section("upgrade", UPGRADE, "{ connections: hand_over }", "how a new process takes over"),
    Key::required("listeners", Form::List(&Form::Section(LISTENER, "")), "addresses that accept clients"),
    Key::required("pools", Form::List(&Form::Section(POOL, "")), "sets of backends"),
];

/// Section `config_watch`.
const CONFIG_WATCH: &[Key] = &[
    Key::duration(
        "settle",
        ms(100)..=hours(1),
        seconds(1),
        "how long the files must stay the same before Ringway reloads",
    ),
    Key::duration(
        "poll",
        ms(100)..=hours(1),
        seconds(5),
        "longest time until Ringway sees a change that the kernel does not report, as on NFS",
    ),
    Key::usual(
        "max_keys_moved",
        Form::Any(&[Form::Off, Form::Integer(0..=100)]),
        "off",
        "if more than this percentage of the keys of a pool would move to other backends, Ringway does not reload by itself. `ringway reload` applies the change. Changes of `dns`, `file` and `discover` are not counted",
    ),
];

/// Section `relay`.
const RELAY: &[Key] = &[
    Key::truth("splice", true, "splice streams. false: always copy"),
    Key::usual(
        "max_pipes",
        Form::Any(&[Form::Word("auto"), Form::Integer(0..=1_000_000)]),
        "auto",
        "pipes for splicing in the whole process. If no pipe is free, Ringway copies the stream",
    ),
    Key::integer(
        "buffer_kib",
        4..=1024,
        64,
        "size of each worker's buffer for copying small messages. One read moves at most this much",
    ),
    Key::integer(
        "splice_from_kib",
        1..=128,
        32,
        "threshold for splicing. Ringway splices a stream after four consecutive reads of at least this size, and copies again after four consecutive splices of less than half this size. Maximum: 128",
    ),
];

/// Section `tcp`.
const TCP: &[Key] = &[
    Key::optional(
        "keepalive",
        Form::Any(&[Form::Off, Form::Section(KEEPALIVE, "{ idle: 2m, interval: 30s, probes: 4 }")]),
        "(the keys below)",
        "packets that find out whether a silent peer is still there. `off`: none. With the defaults, Ringway detects a vanished peer after 4 minutes",
    ),
    Key::duration(
        "user_timeout",
        Duration::ZERO..=days(1),
        Duration::ZERO,
        "how long sent data may stay unacknowledged. `0s`: the system's default, about 15 minutes. Any other value also cuts off a peer that is alive but takes no data, and replaces `probes`",
    ),
];

/// Section `tcp.keepalive`.
const KEEPALIVE: &[Key] = &[
    Key::duration(
        "idle",
        seconds(1)..=hours(9),
        minutes(2),
        "silence before Ringway sends keepalive packets, on both sides",
    ),
    Key::duration("interval", seconds(1)..=hours(9), seconds(30), "time between keepalive packets"),
    Key::integer("probes", 1..=127, 4, "unanswered keepalive packets after which the peer counts as lost"),
];

/// Section `access_log`.
const ACCESS_LOG: &[Key] = &[
    Key::required(
        "path",
        Form::Text,
        "`stdout`, `stderr`, a file or a FIFO. Without this section, there is no access log. One line per connection. Ringway does not wait for a reader of the log. It counts lines that it cannot write",
    ),
    Key::choice("format", names::<Format>, "text", "`text` or `json`"),
];

/// Section `api`.
const API: &[Key] = &[
    Key::usual(
        "listen",
        Form::Quoted(r"^\[?[0-9a-fA-F.:]+(%\d+)?\]?:\d+$"),
        "127.0.0.1:8001",
        "address of the side port",
    ),
    Key::optional(
        "token_file",
        Form::Text,
        "(none)",
        "file with the token that [calls which change something](api.md#access) require. Without this key, Ringway uses the variable `RINGWAY_TOKEN`. Without a token, a side port that is not on loopback is read-only",
    ),
    Key::usual(
        "allowed_hosts",
        Form::List(&Form::Text),
        "[]",
        "names of this host that calls under `/api` may use, besides addresses and `localhost`",
    ),
    Key::truth(
        "public_request",
        false,
        "true: everyone who reaches the side port may call `/api/request`. false: the call needs the same rights as a change",
    ),
    Key::truth(
        "page",
        true,
        "whether the side port serves a [page](operations.md#page) at `/`. Off loopback, the page needs a token",
    ),
    Key::truth(
        "history",
        true,
        "whether Ringway keeps a history of pools and backends in memory, for the page: about 12 KB for each, and at most 1,000 backends",
    ),
];

/// Section `metrics`.
const METRICS: &[Key] = &[Key::choice(
    "per_backend",
    names::<PerBackend>,
    "full",
    "[metrics](metrics.md) of each backend. `compact`: whether it is up or draining, and its connections, failed connects and bytes. `off`: only the metrics of pools. With `off`, the alert `RingwayBackendDown` never fires. With `compact` or `off`, the alert `RingwayCrashLoop` never fires",
)];

/// Section `docker`.
const DOCKER: &[Key] = &[
    Key::usual(
        "owner",
        Form::Text,
        "auto",
        "owner label and name prefix of the containers that Ringway creates. A Ringway instance never touches containers of another owner. auto: the compose project that Ringway runs in, else `ringway`. Two Ringways with the same owner must have the same pools",
    ),
    Key::duration(
        "resync",
        seconds(1)..=hours(1),
        seconds(30),
        "longest time between two full lists of containers. Ringway reacts to container events immediately, but notices a change of a container's networks only in the next full list",
    ),
    Key::duration("timeout", seconds(1)..=minutes(5), seconds(10), "timeout of each call to the engine"),
    Key::optional(
        "auth_file",
        Form::Text,
        "(no credentials)",
        "file with [credentials](docker.md#private-images) for registries, as `docker login` writes it, like `/etc/ringway/registries.json`. Ringway reads it before each pull",
    ),
];

/// Section `upgrade`.
const UPGRADE: &[Key] = &[Key::choice(
    "connections",
    names::<OpenConnections>,
    "finish",
    "what happens to connections that are open in the old process. finish: they finish there, within the `drain` of their pools. hand_over: they [go on in the new process](operations.md#open-connections). The config of the new process decides",
)];

/// Section `shutdown`.
const SHUTDOWN: &[Key] = &[Key::duration(
    "delay",
    Duration::ZERO..=hours(1),
    Duration::ZERO,
    "how long Ringway accepts connections after `/readyz` starts to answer 503",
)];
