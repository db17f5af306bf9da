//! The keys of listeners and their routes.

use super::{Form, Key, NAME, minutes, names, seconds};
use crate::config::BackendPort;
use crate::config::parse_listener::Others;
use crate::config::parse_routes::{HELLO_KIB, Undecided};

/// An entry of `listeners`.
pub(super) const LISTENER: &[Key] = &[
    Key::required("name", NAME, "unique name"),
    Key::required(
        "listen",
        Form::Quoted(""),
        "address and port, a [range of ports](#port-ranges) like `0.0.0.0:5000-5149`, or [`unix:/path`](#unix-sockets). `[::]:8000` is IPv6 only; add a second listener for IPv4",
    ),
    Key::usual(
        "mode",
        Form::Any(&[Form::Quoted("^0?[0-7]{3}$"), Form::Integer(100..=777)]),
        "0600",
        "permissions of the file of a Unix socket, in quotes: `\"0660\"`. A user with write permission on the file may connect",
    ),
    Key::optional(
        "interface",
        Form::Text,
        "(all)",
        "network interface through which clients come, like `eth0`, or a VRF. Other clients do not reach the listener",
    ),
    Key::truth(
        "freebind",
        false,
        "true: Ringway listens although the machine does not have the address yet, as with an address that moves between machines",
    ),
    Key::choice(
        "backend_port",
        names::<BackendPort>,
        "own",
        "to which port of a backend connections go. `own`: that of the backend's address. `same`: the port of this listener to which the client has connected, as a [range](#port-ranges) needs it. A PROXY header does not change it",
    ),
    Key::usual(
        "allow",
        ACCESS_LIST,
        "off",
        "networks and addresses of the clients that may connect, like `[10.0.0.0/8, \"fd00::/8\"]`, or `{ file: PATH }`: see [Access lists](#access-lists). Ringway resets all others",
    ),
    Key::usual(
        "deny",
        ACCESS_LIST,
        "off",
        "networks and addresses of the clients that may not connect, also if `allow` has them",
    ),
    Key::optional(
        "routes",
        Form::List(&Form::Section(ROUTE, "")),
        "(none)",
        "which connections go to another pool than `pool`. The first route that matches decides: see [Routes](#routes)",
    ),
    Key::required("pool", Form::Text, "the pool that gets all other connections. `reset`: Ringway resets them"),
    Key::section("hello", HELLO, "{ timeout: 5s }", "how Ringway reads the first TLS message of a client"),
    Key::truth(
        "answer_status",
        false,
        "Ringway answers `GET /api/status` on this listener. This delays protocols in which the server speaks first by 200 ms, because Ringway waits that long for a request before it connects to a backend",
    ),
    Key::integer(
        "backlog",
        1..=65_535,
        4096,
        "connections that the kernel queues. `net.core.somaxconn` is the upper limit",
    ),
    Key::usual(
        "max_connections",
        Form::Any(&[Form::Word("auto"), Form::Integer(1..=1_000_000)]),
        "auto",
        "open connections of this listener. More connections wait in the backlog. auto: the limit of the process",
    ),
    Key::section("per_source", PER_SOURCE, "{ max_connections: 100 }", "limits for each source address"),
    Key::usual(
        "proxy_protocol",
        Form::Any(&[Form::Off, Form::Section(PROXY_PROTOCOL, "{ from: [10.0.0.0/8] }")]),
        "off",
        "PROXY headers that Ringway receives from a balancer before it",
    ),
];

/// Networks in the config, or in a file.
const ACCESS_LIST: Form = Form::Any(&[Form::Off, Form::List(&Form::Text), Form::Section(ACCESS_FILE, "")]);

/// An access list in a file.
const ACCESS_FILE: &[Key] = &[Key::required("file", Form::Text, "a file with one network or address on each line")];

/// An entry of `listeners[].routes`.
const ROUTE: &[Key] = &[
    Key::optional("name", NAME, "(the pool)", "name in metrics and in the access log, unique in the listener"),
    Key::optional(
        "sni",
        Form::List(&Form::Text),
        "(any)",
        "server names in the client's TLS handshake, like `[www.example.com, \"*.example.com\"]`. `*` stands for one label",
    ),
    Key::optional(
        "alpn",
        Form::List(&Form::Text),
        "(any)",
        "application protocols, like `[h2]`. The route takes clients that offer at least one of them",
    ),
    Key::optional("from", Form::List(&Form::Text), "(any)", "networks and addresses of the clients"),
    Key::optional("tls", Form::Truth, "(any)", "false: clients that do not begin with TLS. true: clients that do"),
    Key::required("pool", Form::Text, "the pool that gets the connections of the [route](#routes), or `reset`"),
];

/// Section `listeners[].hello`.
const HELLO: &[Key] = &[
    Key::duration(
        "timeout",
        seconds(1)..=minutes(1),
        seconds(5),
        "how long Ringway waits for the whole first TLS message (ClientHello), if a route, or the pool's `key` or `send_proxy.tlvs`, needs it. 1 s to 1 m",
    ),
    Key::optional(
        "max_kib",
        Form::Integer(1..=HELLO_KIB as u64),
        "(64)",
        "maximum size of this message, 1 to 64, and at most `relay.buffer_kib`. The default is 64, or a smaller `relay.buffer_kib`",
    ),
    Key::choice(
        "undecided",
        names::<Undecided>,
        "reset",
        "what Ringway does with a connection whose first bytes decide no route: see [Routes](#routes). `reset`: it resets the connection. `default`: the connection takes the first route that does not depend on the bytes. This is usually the listener's `pool`",
    ),
];

/// Section `listeners[].per_source`.
const PER_SOURCE: &[Key] = &[
    Key::usual(
        "max_connections",
        Form::Any(&[Form::Off, Form::Integer(1..=1_000_000)]),
        "off",
        "maximum open connections from one source address (IPv6: from one /64). Ringway resets further connections",
    ),
    Key::usual(
        "rate",
        Form::Any(&[Form::Off, Form::Integer(1..=1_000_000), Form::Quoted(r"^\s*\d+\s*/\s*[smh]\s*$")]),
        "off",
        "maximum new connections from one source: `100` or `100/s` (each second), `30/m` or `500/h`. Ringway resets further connections",
    ),
    Key::optional(
        "burst",
        Form::Integer(1..=1_000_000),
        "(the number of the rate)",
        "maximum burst of new connections from one source",
    ),
];

/// Section `listeners[].proxy_protocol`.
const PROXY_PROTOCOL: &[Key] = &[
    Key::required(
        "from",
        Form::List(&Form::Text),
        "networks and addresses of the balancers that send a [PROXY header](#proxy-protocol), like `[10.0.0.0/8, \"fd00::/8\"]`. `unix`: all clients of a Unix socket",
    ),
    Key::truth("required", true, "false: a connection from these balancers may also begin without a header"),
    // A lost packet of the sender is repeated after a second, and once more after two.
    Key::duration("timeout", seconds(3)..=minutes(1), seconds(5), "how long Ringway waits for a header, 3 s to 1 m"),
    Key::choice(
        "others",
        names::<Others>,
        "plain",
        "what happens to all other clients. `plain`: Ringway does not look for a header, and their bytes go to a backend unchanged. `reset`: Ringway resets them",
    ),
    Key::truth(
        "i_trust_everybody",
        false,
        "true allows a network of all addresses (`0.0.0.0/0`) in `from`. Every client can then choose the address that Ringway sees",
    ),
];
