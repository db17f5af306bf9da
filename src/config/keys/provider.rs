//! The keys of the providers.

use std::time::Duration;

use super::super::backends_file::FileFormat;
use super::super::provider::ListedState;
use super::replicas::{NUMBER, RESTART, ROLLOUT};
use super::{Form, Key, days, hours, minutes, ms, names, seconds};
use crate::control::provider::dns::Family;
use crate::control::provider::names::Resolve;
use crate::control::supervisor::docker::Pull;

/// Minimum memory of a container in bytes. The Docker engine rejects less.
const LEAST_MEMORY: u64 = 6 << 20;

/// Upper bounds for memory in bytes and for CPUs, beyond any real machine.
const MOST_MEMORY: u64 = 1 << 48;
pub(in crate::config) const MOST_CPUS: f64 = 4096.0;

/// The providers: a section with one of these keys.
pub(super) const PROVIDER: Form = Form::Any(&[
    Form::Section(STATIC, "{ static: [{ address: \"10.0.0.5:80\" }] }"),
    Form::Section(PROCESS, ""),
    Form::Section(CONTAINERS, ""),
    Form::Section(DNS, ""),
    Form::Section(FILES, ""),
]);

/// A file that lists backends as `static` does.
pub(in crate::config) static LISTED: Form = Form::List(&Form::Section(BACKEND, ""));

/// A file that lists backends as Prometheus' `file_sd_configs` does.
pub(in crate::config) static GROUPS: Form = Form::List(&Form::Section(GROUP, ""));

/// An entry of such a file.
const GROUP: &[Key] = &[
    Key::required("targets", Form::List(&Form::Text), "addresses"),
    Key::usual("labels", Form::Pairs, "{}", "labels of the targets"),
];

/// The provider `static`.
const STATIC: &[Key] = &[Key::required("static", Form::List(&Form::Section(BACKEND, "")), "servers that already run")];

/// The provider `process`.
const PROCESS: &[Key] = &[Key::required(
    "process",
    Form::Section(REPLICAS, "{ replicas: 3, command: [server, \"{port}\"] }"),
    "child processes that Ringway starts and keeps alive",
)];

/// The provider `docker`.
const CONTAINERS: &[Key] = &[Key::required(
    "docker",
    Form::Any(&[Form::Section(CREATED, "{ replicas: 3, image: web, port: 80 }"), Form::Section(FOUND, "")]),
    "containers",
)];

/// The provider `dns`.
const DNS: &[Key] = &[Key::required(
    "dns",
    Form::Any(&[Form::Section(ADDRESSES, "{ name: web.example.com., port: 80 }"), Form::Section(SERVICES, "")]),
    "the addresses of a name",
)];

/// The provider `file`.
const FILES: &[Key] =
    &[Key::required("file", Form::Section(FILE, "{ path: /etc/ringway/web.yaml }"), "a file that lists backends")];

/// Section `pools[].provider.file`.
const FILE: &[Key] = &[
    Key::required("path", Form::Text, "path of a YAML or JSON file. Ringway applies its changes"),
    Key::choice(
        "format",
        names::<FileFormat>,
        "auto",
        "`list`: a list as in `static`. `prometheus`: groups of targets as in Prometheus' `file_sd_configs`, where the labels `weight` and `tier` count. `auto`: as the file shows",
    ),
];

/// An entry of `pools[].provider.static`.
const BACKEND: &[Key] = &[
    Key::required(
        "address",
        Form::Quoted(""),
        "host and port, or [`unix:/path`](#unix-sockets). For a name, see `resolve`",
    ),
    Key::optional("id", Form::Text, "(the address)", "identity on the ring"),
    Key::integer(
        "weight",
        0..=1000,
        1,
        "multiple of `virtual_nodes`, 0 to 1000. With 0 the backend gets no new connections, and its open ones go on",
    ),
    Key::integer(
        "tier",
        0..=65_535,
        0,
        "[tier](#tiers). A backend of tier 1 gets connections only if too few backends of tier 0 are healthy, and so on",
    ),
    Key::choice(
        "state",
        names::<ListedState>,
        "ready",
        "`drained`: the backend gets no new connections, and open ones may go on for `drain`. It keeps its place on the ring",
    ),
    Key::usual(
        "max_connections",
        Form::Any(&[Form::Word("auto"), Form::Integer(1..=1_000_000)]),
        "auto",
        "open connections of this backend. auto: `max_connections_per_backend` of the pool",
    ),
    Key::choice(
        "resolve",
        names::<Resolve>,
        "refresh",
        "for a name: `refresh` looks it up at start, at each reload and about every 30 s. `once`: only at start and at each reload. Both look it up sooner while the backend fails, and keep the address if a look-up fails",
    ),
];

/// Section `pools[].provider.process`.
const REPLICAS: &[Key] = &[
    Key::required(
        "replicas",
        NUMBER,
        "number of child processes to keep alive. A section: the pool [scales by itself](operations.md#asleep-until-needed)",
    ),
    Key::required(
        "command",
        Form::List(&Form::Text),
        "program and arguments. They or `env` must contain `{port}` or [`{socket}`](#unix-sockets), and may contain `{slot}`. The program `ringway` is the running Ringway binary itself",
    ),
    Key::usual("env", Form::Pairs, "{}", "added to the environment, with the same placeholders"),
    Key::usual(
        "ports",
        Form::Quoted(r"^(auto|\s*\d+\s*-\s*\d+\s*)$"),
        "auto",
        "range like `9001-9010`, for this pool only. auto: the system picks the ports. The replica listens on 127.0.0.1 and must set `SO_REUSEADDR`, as servers do. Only for replicas with `{port}`",
    ),
    Key::section("restart", RESTART, "{ backoff: 1s }", "when Ringway replaces a replica"),
    Key::section(
        "rollout",
        ROLLOUT,
        "{ parallel: 2 }",
        "how Ringway [replaces replicas](operations.md#rollouts) from other settings",
    ),
    Key::duration(
        "stop_grace",
        Duration::ZERO..=hours(1),
        seconds(5),
        "time from SIGTERM to SIGKILL when Ringway replaces a replica or stops",
    ),
];

/// The key of both kinds of `docker`.
const NETWORK: Key = Key::usual(
    "network",
    Form::Text,
    "auto",
    "network on which Ringway reaches the containers. auto: the network of Ringway's own container; outside of a container, `bridge`",
);

/// Section `pools[].provider.docker` for containers that Ringway creates.
const CREATED: &[Key] = &[
    Key::required(
        "replicas",
        NUMBER,
        "number of containers to keep alive. A section: the pool [scales by itself](operations.md#asleep-until-needed)",
    ),
    Key::required("image", Form::Text, "image of the containers"),
    Key::optional("command", Form::List(&Form::Text), "(the image's)", "arguments, with `{port}` and `{slot}`"),
    Key::required(
        "port",
        Form::Integer(1..=65_535),
        "port on which a replica listens in its container. It does not have to be published",
    ),
    NETWORK,
    Key::usual("env", Form::Pairs, "{}", "environment of the containers, with the same placeholders"),
    Key::usual("labels", Form::Pairs, "{}", "labels in addition to Ringway's own"),
    Key::section("resources", RESOURCES, "{ memory: 64MiB }", "limits of each container"),
    Key::choice(
        "pull",
        names::<Pull>,
        "missing",
        "when Ringway pulls the image: `never`, `missing` or `always` (before each container). `docker.auth_file` has the credentials",
    ),
    Key::section("restart", RESTART, "{ backoff: 1s }", "when Ringway replaces a replica"),
    Key::section(
        "rollout",
        ROLLOUT,
        "{ parallel: 2 }",
        "how Ringway [replaces replicas](operations.md#rollouts) from other settings",
    ),
    Key::duration(
        "stop_grace",
        Duration::ZERO..=hours(1),
        seconds(5),
        "time from SIGTERM to SIGKILL when Ringway replaces or removes a replica",
    ),
];

/// Section `pools[].provider.docker` for containers that run already.
const FOUND: &[Key] = &[
    Key::required(
        "discover",
        Form::Section(DISCOVER, "{ label: app=web, port: 80 }"),
        "running containers with a label, which Ringway neither starts nor stops",
    ),
    NETWORK,
];

/// Section `pools[].provider.docker.discover`.
const DISCOVER: &[Key] = &[
    Key::truth(
        "labels",
        false,
        "true: [labels of the containers](docker.md#labels) name their port, weight, tier and check. `label` and `port` may then be absent",
    ),
    Key::optional(
        "label",
        Form::Text,
        "(required without `labels`)",
        "label, `name` or `name=value`. With `labels`, the default is `ringway.pool` with the name of the pool. The running containers with this label are the backends. With `discover`, `network` is the only other `docker` key that the pool may have",
    ),
    Key::optional(
        "port",
        Form::Integer(1..=65_535),
        "(required without `labels`)",
        "port on which the containers listen. With `labels`, the default is the only TCP port that the container exposes",
    ),
];

/// Section `pools[].provider.docker.resources`.
const RESOURCES: &[Key] = &[
    Key::optional(
        "memory",
        Form::Any(&[Form::Integer(LEAST_MEMORY..=MOST_MEMORY), Form::Quoted(r"^\d+\s*(B|[KMG]iB)\s*$")]),
        "(no limit)",
        "memory limit, like `64MiB`",
    ),
    Key::optional("cpus", Form::Decimal(0.01, MOST_CPUS), "(no limit)", "CPU limit, like 0.5"),
];

/// Section `pools[].provider.dns` for A and AAAA records.
const ADDRESSES: &[Key] = &[
    Key::required(
        "name",
        Form::Text,
        "name whose A and AAAA records are the backends. End it with a dot: without one, Ringway also tries the domains of the system's search list. Use either `name` or `srv`",
    ),
    Key::required("port", Form::Integer(1..=65_535), "port on which the backends listen. Only with `name`"),
    FAMILY,
    SERVERS,
    REFRESH,
    TIMEOUT,
    GONE_AFTER,
];

/// Section `pools[].provider.dns` for SRV records.
const SERVICES: &[Key] = &[
    Key::required(
        "srv",
        Form::Text,
        "name whose SRV records are the backends, like `_redis._tcp.example.com.`. Their ports, weights and priorities apply",
    ),
    FAMILY,
    SERVERS,
    REFRESH,
    TIMEOUT,
    GONE_AFTER,
];

const FAMILY: Key = Key::choice(
    "family",
    names::<Family>,
    "any",
    "addresses to use: `any`, `ipv4` (A records) or `ipv6` (AAAA records)",
);

const SERVERS: Key = Key::usual(
    "servers",
    Form::Any(&[Form::Word("system"), Form::List(&Form::Quoted(""))]),
    "system",
    "name servers to ask, in this order, like `[10.0.0.2, \"10.0.0.3:8600\"]`. `system`: those in `/etc/resolv.conf`, which Ringway reads at start, at a reload and after failures",
);

const REFRESH: Key = Key::section(
    "refresh",
    &[
        Key::duration("min", ms(100)..=hours(1), seconds(1), "shortest time from one look-up to the next"),
        Key::duration(
            "max",
            seconds(1)..=days(1),
            seconds(30),
            "longest time from one look-up to the next. Between both, the TTL of the answer decides. While a backend fails, Ringway asks earlier",
        ),
    ],
    "{ max: 10s }",
    "how often Ringway looks the name up",
);

const TIMEOUT: Key =
    Key::duration("timeout", ms(100)..=minutes(1), seconds(2), "longest wait for the answer of one name server");

const GONE_AFTER: Key = Key::duration(
    "gone_after",
    Duration::ZERO..=days(1),
    seconds(30),
    "how long complete answers must miss a backend before Ringway drains and removes it. Failed look-ups remove nothing",
);
