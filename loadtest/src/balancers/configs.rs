//! The configs of the balancers.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;

use echo_server::Listen;

use super::{Settings, Setup};
use crate::client::SERVER_NAME;

/// A listener of a config: its name, its address and its backends.
pub(super) type Listener<'a> = (&'static str, SocketAddr, &'a [Listen]);

/// The server name that leads to the second backend. [`SERVER_NAME`] leads to the backends.
const OTHER_NAME: &str = "a.example.com";

pub(super) fn ringway(
    listeners: &[Listener<'_>],
    routed: Option<SocketAddr>,
    side_port: SocketAddr,
    settings: &Settings,
) -> String {
    let Settings { root, pool, workers } = settings;
    let check = if pool.contains("health_check") { "" } else { "    health_check: { kind: tcp, interval: 2s }\n" };
    let pool: String = pool.lines().fold(String::new(), |text, line| text + "    " + line + "\n");
    let mut text = format!("workers: {}\n{root}\napi: {{ listen: \"{side_port}\" }}\nlisteners:\n", (*workers).max(1));
    for (name, address, _) in listeners {
        let _ = writeln!(text, "  - {{ name: {name}, listen: \"{address}\", pool: {name} }}");
    }
    if let Some(address) = routed {
        let _ = writeln!(
            text,
            "  - name: by-name\n    listen: \"{address}\"\n    routes: [{{ sni: [{OTHER_NAME}], pool: second }}, {{ sni: [{SERVER_NAME}], pool: web }}]\n    pool: reset"
        );
    }
    text.push_str("pools:\n");
    for (name, _, backends) in listeners {
        let backends: Vec<_> = backends.iter().map(|backend| format!("{{ address: \"{backend}\" }}")).collect();
        let backends = backends.join(", ");
        let _ = write!(
            text,
            "  - name: {name}\n    key: source_ip\n    provider: {{ static: [{backends}] }}\n{check}{pool}"
        );
    }
    text
}

pub(super) fn haproxy(listeners: &[Listener<'_>], routed: Option<SocketAddr>, setup: &Setup) -> String {
    let mut text = format!(
        "global\n  nbthread 1\n  maxconn {}\n  maxpipes 256\n\
         defaults\n  mode tcp\n  timeout connect 2s\n  timeout client 10m\n  timeout server 10m\n  option splice-request\n  \
         option splice-response\n",
        setup.connections
    );
    for (name, address, backends) in listeners {
        let _ = write!(
            text,
            "frontend {name}\n  bind {address} backlog 4096\n  default_backend {name}\n\
             backend {name}\n  balance source\n  hash-type consistent\n"
        );
        for (index, backend) in backends.iter().enumerate() {
            let backend = backend.to_string().replace("unix:", "unix@");
            let _ = writeln!(text, "  server b{index} {backend} check inter 2s");
        }
    }
    if let Some(address) = routed {
        let _ = write!(
            text,
            "frontend by-name\n  bind {address} backlog 4096\n  tcp-request inspect-delay 5s\n  \
             tcp-request content accept if {{ req.ssl_hello_type 1 }}\n  \
             use_backend second if {{ req.ssl_sni -i {OTHER_NAME} }}\n  \
             use_backend web if {{ req.ssl_sni -i {SERVER_NAME} }}\n"
        );
    }
    text
}

pub(super) fn nginx(listeners: &[Listener<'_>], routed: Option<SocketAddr>, setup: &Setup, files: &Path) -> String {
    const MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";
    let module = if Path::new(MODULE).exists() { format!("load_module {MODULE};\n") } else { String::new() };
    let mut text = format!(
        "{module}worker_processes 1;\nerror_log stderr error;\npid {}/pid;\nevents {{ worker_connections {}; }}\nstream {{\n",
        files.display(),
        2 * setup.connections + 64
    );
    for (name, address, backends) in listeners {
        let servers = backends.iter().fold(String::new(), |text, backend| text + &format!("server {backend}; "));
        let _ = write!(
            text,
            "  upstream {name} {{ hash $remote_addr consistent; {servers}}}\n  \
             server {{ listen {address} backlog=4096; proxy_pass {name}; proxy_connect_timeout 2s; proxy_timeout 10m; }}\n"
        );
    }
    if let Some(address) = routed {
        let _ = write!(
            text,
            "  map $ssl_preread_server_name $chosen {{ {OTHER_NAME} second; {SERVER_NAME} web; }}\n  \
             server {{ listen {address} backlog=4096; ssl_preread on; proxy_pass $chosen; proxy_connect_timeout 2s; \
             proxy_timeout 10m; }}\n"
        );
    }
    text + "}\n"
}

/// Envoy reads YAML, and JSON is valid YAML.
pub(super) fn envoy(
    listeners: &[Listener<'_>],
    routed: Option<SocketAddr>,
    side_port: SocketAddr,
    setup: &Setup,
) -> String {
    let socket = |address: SocketAddr| serde_json::json!({ "socket_address": { "address": address.ip().to_string(), "port_value": address.port() } });
    let endpoint = |backend: &Listen| {
        let address = match backend {
            Listen::Ip(address) => socket(*address),
            Listen::Unix(path) => serde_json::json!({ "pipe": { "path": path } }),
        };
        serde_json::json!({ "endpoint": { "address": address } })
    };
    let thresholds =
        serde_json::json!([{ "max_connections": setup.connections, "max_pending_requests": setup.connections }]);
    let proxy = |name: &str| {
        serde_json::json!({
            "name": "envoy.filters.network.tcp_proxy",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                "stat_prefix": name, "cluster": name, "idle_timeout": "600s", "hash_policy": [{ "source_ip": {} }],
            },
        })
    };
    let listener = |(name, address, _): &Listener<'_>| {
        serde_json::json!({
            "name": name, "address": socket(*address), "tcp_backlog_size": 4096,
            "filter_chains": [{ "filters": [proxy(name)] }],
        })
    };
    let chain = |server_name: &str, cluster: &str| {
        serde_json::json!({
            "filter_chain_match": { "server_names": [server_name] }, "filters": [proxy(cluster)],
        })
    };
    let by_name = |address: SocketAddr| {
        serde_json::json!({
            "name": "by-name", "address": socket(address), "tcp_backlog_size": 4096,
            "listener_filters": [{
                "name": "envoy.filters.listener.tls_inspector",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector",
                },
            }],
            "filter_chains": [chain(OTHER_NAME, "second"), chain(SERVER_NAME, "web")],
        })
    };
    let cluster = |(name, _, backends): &Listener<'_>| {
        let endpoints: Vec<_> = backends.iter().map(endpoint).collect();
        serde_json::json!({
            "name": name, "connect_timeout": "2s", "type": "STATIC", "lb_policy": "RING_HASH",
            "circuit_breakers": { "thresholds": thresholds },
            "health_checks": [{
                "timeout": "1s", "interval": "2s", "unhealthy_threshold": 3, "healthy_threshold": 2, "tcp_health_check": {},
            }],
            "load_assignment": { "cluster_name": name, "endpoints": [{ "lb_endpoints": endpoints }] },
        })
    };
    serde_json::json!({
        "admin": { "address": socket(side_port) },
        "static_resources": {
            "listeners": listeners.iter().map(listener).chain(routed.map(by_name)).collect::<Vec<_>>(),
            "clusters": listeners.iter().map(cluster).collect::<Vec<_>>(),
        },
    })
    .to_string()
}
