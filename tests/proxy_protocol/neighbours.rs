//! Other balancers before and behind Ringway.

use std::process::{Command, Stdio};

use super::*;
use crate::harness::backends::free_ports;
use crate::harness::program::Killed;
use crate::harness::{has_tool, require_tool};

/// A neighbour of Ringway that runs until this is dropped.
struct Neighbour {
    _process: Killed,
    _files: tempfile::TempDir,
}

impl Neighbour {
    /// Starts a program with this config, and waits until it listens on the ports. `FILE` and `FOLDER` in the arguments stand
    /// for the config and its folder.
    async fn start(program: &str, arguments: &[&str], config: &str, ports: [u16; 2]) -> Self {
        let files = tempfile::tempdir().unwrap();
        let file = files.path().join("config");
        std::fs::write(&file, config).unwrap();
        let in_place = |argument: &&str| {
            argument.replace("FILE", &file.display().to_string()).replace("FOLDER", &files.path().display().to_string())
        };
        let process = Command::new(program).args(arguments.iter().map(in_place)).stderr(Stdio::null()).spawn();
        let process = Killed(process.unwrap());
        for port in ports {
            eventually_async("it listens", async || TcpStream::connect(("127.0.0.1", port)).await.is_ok()).await;
        }
        Self { _process: process, _files: files }
    }
}

/// A Ringway that believes its neighbour, and sends headers of this version to the neighbour on this port.
async fn between(send: &str, last: u16) -> Ringway {
    let pool = format!("{NO_CHECK}\nsend_proxy: {send}");
    Ringway::start(&accepting(&[SocketAddr::from(([127, 0, 0, 1], last))], "{ from: [127.0.0.1] }", &pool)).await
}

/// client -> neighbour (`first`) -> Ringway -> neighbour (`last`) -> backend. The client's address comes through, and so do the
/// bytes.
async fn comes_through(ringway: &Ringway, first: u16, backend: &TcpListener, version: Version) {
    // The harness's port checks have made connections too.
    for _ in 0..10 {
        let mut stream = TcpStream::connect(("127.0.0.1", first)).await.unwrap();
        stream.write_all(b"hello").await.unwrap();
        let own = stream.local_addr().unwrap();
        let found = tokio::time::timeout(Duration::from_secs(5), async {
            loop {
                let (mut server, _) = backend.accept().await.unwrap();
                let mut bytes = Vec::new();
                while server.read_buf(&mut bytes).await.is_ok_and(|read| read > 0) {
                    let Parsed::Header(header) = parse(&bytes) else { continue };
                    if bytes[header.length..] == *b"hello" {
                        assert_eq!(header.version, version);
                        assert_eq!(header.ends.unwrap().source, own);
                        return;
                    }
                }
            }
        });
        if found.await.is_ok() {
            assert!(stats(ringway).accepted() > 0);
            return;
        }
    }
    panic!("no connection came through with its client");
}

/// nginx of Debian sends version 1, and reads both.
#[tokio::test]
async fn nginx_understands_ringway_and_ringway_understands_nginx() {
    const MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";
    if !require_tool("nginx") {
        return;
    }
    if !std::path::Path::new(MODULE).exists() {
        return crate::harness::skip("nginx has no stream module");
    }
    for send in ["v1", "v2"] {
        let (backend, address) = recorder().await;
        let [first, last] = free_ports();
        let ringway = between(send, last).await;
        let config = format!(
            "load_module {MODULE};\ndaemon off;\nmaster_process off;\npid nginx.pid;\nerror_log error.log;\nevents {{}}\nstream {{\n\
             server {{ listen 127.0.0.1:{first}; proxy_pass {}; proxy_protocol on; }}\n\
             server {{ listen 127.0.0.1:{last} proxy_protocol; set_real_ip_from 127.0.0.1; proxy_pass {address}; proxy_protocol on; }}\n}}\n",
            ringway.web()
        );
        let arguments = ["-p", "FOLDER", "-c", "FILE", "-e", "error.log"];
        let _nginx = Neighbour::start("nginx", &arguments, &config, [first, last]).await;
        comes_through(&ringway, first, &backend, Version::V1).await;
    }
}

/// Envoy sends and reads both versions. The gate has no Envoy, so the test runs where somebody has installed it.
#[tokio::test]
#[ignore = "needs Envoy"]
async fn envoy_understands_ringway_and_ringway_understands_envoy() {
    // In CI too: there is no package of Envoy for Debian.
    if !has_tool("envoy") {
        println!("skipped: envoy is not installed");
        return;
    }
    for (send, version, name) in [("v1", Version::V1, "V1"), ("v2", Version::V2, "V2")] {
        let (backend, address) = recorder().await;
        let [first, last] = free_ports();
        let ringway = between(send, last).await;
        let socket = |address: SocketAddr| {
            format!("{{ socket_address: {{ address: {}, port_value: {} }} }}", address.ip(), address.port())
        };
        let at = |port: u16| socket(SocketAddr::from(([127, 0, 0, 1], port)));
        let listener = |name: &str, port: u16, filters: &str| {
            format!(
                "  - name: {name}\n    address: {}\n    listener_filters: [{filters}]\n    filter_chains: [{{ filters: [{{ name: envoy.filters.network.tcp_proxy, typed_config: \
                 {{ \"@type\": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: {name}, cluster: {name} }} }}] }}]\n",
                at(port)
            )
        };
        let cluster = |to: &str, address: SocketAddr| {
            format!(
                "  - name: {to}\n    connect_timeout: 5s\n    load_assignment: {{ cluster_name: {to}, endpoints: [{{ lb_endpoints: [{{ endpoint: {{ address: {} }} }}] }}] }}\n\
                 \x20   transport_socket: {{ name: envoy.transport_sockets.upstream_proxy_protocol, typed_config: {{ \
                 \"@type\": type.googleapis.com/envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport, config: {{ version: {name} }}, \
                 transport_socket: {{ name: envoy.transport_sockets.raw_buffer, typed_config: {{ \"@type\": type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer }} }} }} }}\n",
                socket(address)
            )
        };
        let reads = "{ name: envoy.filters.listener.proxy_protocol, typed_config: { \"@type\": \
                     type.googleapis.com/envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol } }";
        let config = format!(
            "static_resources:\n  listeners:\n{}{}  clusters:\n{}{}",
            listener("first", first, ""),
            listener("last", last, reads),
            cluster("first", ringway.web()),
            cluster("last", address),
        );
        let arguments =
            ["--base-id", &first.to_string(), "--concurrency", "1", "--config-yaml", &config, "--log-level", "error"];
        let _envoy = Neighbour::start("envoy", &arguments, &config, [first, last]).await;
        comes_through(&ringway, first, &backend, version).await;
    }
}

/// HAProxy before Ringway sends each version, and HAProxy behind Ringway understands each.
#[tokio::test]
async fn haproxy_understands_ringway_and_ringway_understands_haproxy() {
    if !require_tool("haproxy") {
        return;
    }
    for (send, option, version) in [("v1", "send-proxy", Version::V1), ("v2", "send-proxy-v2", Version::V2)] {
        let (backend, address) = recorder().await;
        let [first, last] = free_ports();
        // client -> haproxy (first) -> ringway -> haproxy (last) -> backend
        let ringway = between(send, last).await;
        let text = format!(
            "global\n  nbthread 1\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n\
             listen first\n  bind 127.0.0.1:{first}\n  server ringway {} {option}\n\
             listen last\n  bind 127.0.0.1:{last} accept-proxy\n  server backend {address} {option}\n",
            ringway.web()
        );
        let file = crate::harness::program::file(&text);
        let haproxy = Command::new("haproxy").arg("-db").arg("-f").arg(file.path()).stderr(Stdio::null()).spawn();
        let _haproxy = Killed(haproxy.unwrap());
        let mut stream = None;
        eventually_async("haproxy listens", async || {
            stream = TcpStream::connect(("127.0.0.1", first)).await.ok();
            stream.is_some()
        })
        .await;
        let mut stream = stream.unwrap();
        stream.write_all(b"hello").await.unwrap();
        let (mut server, _) = soon("accept", backend.accept()).await.unwrap();
        let (seen, ends, rest) = received(&mut server, 5).await;
        assert_eq!((seen, ends.unwrap().source, &rest[..]), (version, stream.local_addr().unwrap(), &b"hello"[..]));
    }
}
