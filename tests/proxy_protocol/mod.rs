//! The PROXY protocol: Ringway believes headers of listed balancers only, and tells backends who the client is.

mod fields;
mod neighbours;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ringway::proxy::stats::{EndReason, ListenerStats, ProxyResult, RefusalReason};
use ringway::proxy_header::{Ends, Parsed, Version, parse, write};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixStream};

use crate::harness::backends::Server;
use crate::harness::{Ringway, echoes, eventually, eventually_async, http, soon, static_config};

const NO_CHECK: &str = "health_check: { kind: none }";

fn header(version: Version, source: &str) -> Vec<u8> {
    let ends = Ends { source: source.parse().unwrap(), destination: "203.0.113.1:443".parse().unwrap() };
    write(version, Some(ends))
}

/// A config whose listener has this `proxy_protocol`.
fn accepting(backends: &[SocketAddr], rules: &str, pool: &str) -> String {
    let yaml = static_config(backends, pool);
    yaml.replace("    pool: echo", &format!("    proxy_protocol: {rules}\n    pool: echo"))
}

fn stats(ringway: &Ringway) -> Arc<ListenerStats> {
    Arc::clone(&ringway.state().listeners[0].stats)
}

/// A backend whose connections the test accepts.
async fn recorder() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// The PROXY header at the beginning of the stream, and what follows it up to `length` bytes.
async fn received(stream: &mut TcpStream, length: usize) -> (Version, Option<Ends>, Vec<u8>) {
    let mut bytes = Vec::new();
    loop {
        if let Parsed::Header(header) = parse(&bytes) {
            let rest = bytes[header.length..].to_vec();
            if rest.len() >= length {
                return (header.version, header.ends, rest);
            }
        }
        assert!(soon("bytes", stream.read_buf(&mut bytes)).await.unwrap() > 0, "ended after {bytes:?}");
    }
}

#[tokio::test]
async fn the_client_in_a_header_is_the_client() {
    let servers = [Server::echo("b0").await, Server::echo("b1").await, Server::echo("b2").await];
    let addresses = servers.each_ref().map(|server| server.address);
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let yaml = accepting(&addresses, "{ from: [127.0.0.0/8] }", &format!("{NO_CHECK}\nkey: source_ip"));
    let yaml = yaml.replace("    pool: echo", "    per_source: { max_connections: 5 }\n    pool: echo");
    let ringway = Ringway::start(&format!("access_log: {{ path: {}, format: json }}\n{yaml}", log.display())).await;
    let mut served = 0;
    let mut open = Vec::new();
    for n in 0..20 {
        let mut stream = TcpStream::connect(ringway.web()).await.unwrap();
        let version = if n % 2 == 0 { Version::V1 } else { Version::V2 };
        stream.write_all(&header(version, &format!("198.51.100.7:{}", 1000 + n))).await.unwrap();
        served += usize::from(soon("an echo or a reset", echoes(&mut stream)).await);
        open.push(stream);
    }
    assert_eq!(served, 5, "the limit counts the client, not the balancer");
    let used = (0..3).filter(|&n| ringway.backend(n).live.counters.total.load(Ordering::Relaxed) > 0).count();
    assert_eq!(used, 1, "one client went to several backends");
    let stats = stats(&ringway);
    assert_eq!((stats.proxy_headers(ProxyResult::V1), stats.proxy_headers(ProxyResult::V2)), (10, 10));
    eventually("counted", || stats.refused(RefusalReason::SourceConnections) == 15).await;
    drop(open);
    eventually("log lines", || {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        text.lines().count() == 20
            && text
                .lines()
                .all(|line| line.contains("\"client\":\"198.51.100.7:1") && line.contains("\"peer\":\"127.0.0.1:"))
    })
    .await;
}

#[tokio::test]
async fn a_header_from_anybody_else_is_data() {
    let (backend, address) = recorder().await;
    let ringway = Ringway::start(&accepting(&[address], "{ from: [10.0.0.0/8, unix] }", NO_CHECK)).await;
    let mut stream = TcpStream::connect(ringway.web()).await.unwrap();
    let forged = header(Version::V1, "10.0.0.1:1");
    stream.write_all(&forged).await.unwrap();
    let (mut server, _) = soon("accept", backend.accept()).await.unwrap();
    let mut seen = vec![0; forged.len()];
    soon("the bytes", server.read_exact(&mut seen)).await.unwrap();
    assert_eq!(seen, forged);
    assert_eq!(stats(&ringway).proxy_headers(ProxyResult::V1), 0);
    drop((stream, server));

    ringway.reload(&accepting(&[address], "{ from: [10.0.0.0/8], others: reset }", NO_CHECK)).await.unwrap();
    // The reset can come before the client knows that it is connected.
    if let Ok(mut stream) = TcpStream::connect(ringway.web()).await {
        soon("a reset", stream.read(&mut [0])).await.unwrap_err();
    }
    eventually("counted", || stats(&ringway).refused(RefusalReason::ProxyUntrusted) == 1).await;
}

#[tokio::test]
async fn wrong_missing_and_late_headers_are_reset() {
    let server = Server::echo("a").await;
    let rules = "{ from: [127.0.0.1], timeout: 3s }";
    let ringway = Ringway::start(&accepting(&[server.address], rules, NO_CHECK)).await;
    let stats = stats(&ringway);
    for (sent, reason) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], RefusalReason::ProxyHeaderMissing),
        (b"PROXY TCP4 1.2.3.4\r\n", RefusalReason::ProxyHeaderInvalid),
        (b"PROXY TCP4 1.2.3.", RefusalReason::ProxyHeaderTimeout),
        (b"", RefusalReason::ProxyHeaderTimeout),
    ] {
        let before = stats.refused(reason);
        let mut stream = TcpStream::connect(ringway.web()).await.unwrap();
        stream.write_all(sent).await.unwrap();
        soon("a reset", stream.read(&mut [0])).await.unwrap_err();
        eventually("counted", || stats.refused(reason) == before + 1).await;
    }
    // A part of a header and an end.
    let before = stats.refused(RefusalReason::ProxyHeaderInvalid);
    let mut stream = TcpStream::connect(ringway.web()).await.unwrap();
    stream.write_all(b"PROXY TC").await.unwrap();
    stream.shutdown().await.unwrap();
    eventually("counted", || stats.refused(RefusalReason::ProxyHeaderInvalid) == before + 1).await;
    // A balancer probes like this. Ringway does not count it as a refusal, because refusals raise an alert.
    let mut stream = TcpStream::connect(ringway.web()).await.unwrap();
    stream.shutdown().await.unwrap();
    eventually("a probe", || stats.proxy_headers(ProxyResult::Probe) == 1 && stats.ended(EndReason::Finished) == 1)
        .await;
    assert_eq!(ringway.metric("ringway_connect_attempts_total", &[]).await, 0.0);
}

#[tokio::test]
async fn without_required_a_connection_may_begin_without_a_header() {
    let server = Server::echo("a").await;
    let rules = "{ from: [127.0.0.1], required: false, timeout: 3s }";
    let ringway = Ringway::start(&accepting(&[server.address], rules, NO_CHECK)).await;
    let mut plain = TcpStream::connect(ringway.web()).await.unwrap();
    assert!(soon("an echo", echoes(&mut plain)).await);
    let mut proxied = TcpStream::connect(ringway.web()).await.unwrap();
    proxied.write_all(&header(Version::V2, "198.51.100.7:1")).await.unwrap();
    assert!(soon("an echo", echoes(&mut proxied)).await);
    // The beginning of a header is not data.
    let mut begun = TcpStream::connect(ringway.web()).await.unwrap();
    begun.write_all(b"PROXY TCP4").await.unwrap();
    soon("a reset", begun.read(&mut [0])).await.unwrap_err();
    let stats = stats(&ringway);
    eventually("counted", || stats.refused(RefusalReason::ProxyHeaderTimeout) == 1).await;
    assert_eq!((stats.proxy_headers(ProxyResult::Plain), stats.proxy_headers(ProxyResult::V2)), (1, 1));
}

/// Whatever the cuts, the header is taken exactly, and the rest is relayed and spliced.
#[tokio::test]
async fn what_follows_a_header_arrives_untouched() {
    const BULK: usize = 32 << 20;
    let (backend, address) = recorder().await;
    let ringway = Ringway::start(&accepting(&[address], "{ from: [127.0.0.1] }", NO_CHECK)).await;
    for version in [Version::V1, Version::V2] {
        let header = header(version, "[2001:db8::1]:1");
        for cut in 0..=header.len() {
            let mut stream = TcpStream::connect(ringway.web()).await.unwrap();
            stream.set_nodelay(true).unwrap();
            stream.write_all(&header[..cut]).await.unwrap();
            tokio::task::yield_now().await;
            stream.write_all(&[&header[cut..], b"rest"].concat()).await.unwrap();
            let (mut server, _) = soon("accept", backend.accept()).await.unwrap();
            let mut rest = [0; 4];
            soon("the rest", server.read_exact(&mut rest)).await.unwrap();
            assert_eq!(&rest, b"rest", "{version:?} cut at {cut}");
        }
        let mut stream = TcpStream::connect(ringway.web()).await.unwrap();
        let sending = tokio::spawn(async move {
            stream.write_all(&[header, vec![7; BULK]].concat()).await.unwrap();
            stream.shutdown().await.unwrap();
        });
        let (mut server, _) = soon("accept", backend.accept()).await.unwrap();
        let mut bulk = Vec::new();
        soon("the bulk", server.read_to_end(&mut bulk)).await.unwrap();
        assert!(bulk.len() == BULK && bulk.iter().all(|&byte| byte == 7), "{} bytes", bulk.len());
        sending.await.unwrap();
    }
    eventually_async("most of it is spliced", async || {
        ringway.metric("ringway_bytes_total", &["path=\"spliced\""]).await > BULK as f64
    })
    .await;
}

/// The runtime never clears the readiness of a stream that has ended, so a careless loop would spin.
#[tokio::test]
async fn incomplete_first_bytes_cost_no_processor_time() {
    let server = Server::echo("a").await;
    let rules = "{ from: [127.0.0.1], required: false, timeout: 1m }\n    answer_status: true";
    let program = crate::harness::program::Program::start(&accepting(&[server.address], rules, NO_CHECK)).await;
    let mut waiting = Vec::new();
    for n in 0..40 {
        let mut stream = TcpStream::connect(program.web()).await.unwrap();
        let sent: &[u8] = if n % 2 == 0 { b"PROXY TCP4 1." } else { b"GET /api/sta" };
        stream.write_all(sent).await.unwrap();
        if n % 4 > 1 {
            stream.shutdown().await.unwrap();
        }
        waiting.push(stream);
    }
    let before = program.cpu_ticks();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let used = program.cpu_ticks() - before;
    assert!(used < 30, "{used} ticks of 10 ms in 2 s");
}

#[tokio::test]
async fn backends_learn_the_client_and_the_next_one_if_the_first_fails() {
    let refusing = crate::harness::backends::Refusing::new();
    for (name, version) in [("v1", Version::V1), ("v2", Version::V2)] {
        let (backend, address) = recorder().await;
        let pool = format!("{NO_CHECK}\nsend_proxy: {name}");
        let ringway = Ringway::start(&static_config(&[refusing.address, address], &pool)).await;
        for _ in 0..40 {
            let mut stream = TcpStream::connect(ringway.web()).await.unwrap();
            let (mut server, _) = soon("accept", backend.accept()).await.unwrap();
            // Before the client has sent anything.
            let (seen, ends, _) = received(&mut server, 0).await;
            let ends = ends.unwrap();
            assert_eq!((seen, ends.source, ends.destination), (version, stream.local_addr().unwrap(), ringway.web()));
            stream.write_all(b"hello").await.unwrap();
            let mut hello = [0; 5];
            soon("the bytes", server.read_exact(&mut hello)).await.unwrap();
            assert_eq!(&hello, b"hello");
        }
        assert!(ringway.metric("ringway_connect_failures_total", &["cause=\"refused\""]).await > 0.0);
    }
}

#[tokio::test]
async fn chained_ringways_keep_the_client() {
    let (backend, address) = recorder().await;
    let pool = format!("{NO_CHECK}\nsend_proxy: v2");
    let inner = Ringway::start(&accepting(&[address], "{ from: [127.0.0.1] }", &pool)).await;
    let outer_pool = format!("{NO_CHECK}\nsend_proxy: v1");
    let outer = Ringway::start(&accepting(&[inner.web()], "{ from: [127.0.0.1] }", &outer_pool)).await;
    let mut stream = TcpStream::connect(outer.web()).await.unwrap();
    stream.write_all(&[header(Version::V2, "[2001:db8::7]:4711"), b"x".to_vec()].concat()).await.unwrap();
    let (mut server, _) = soon("accept", backend.accept()).await.unwrap();
    let (_, ends, rest) = received(&mut server, 1).await;
    let ends = ends.unwrap();
    assert_eq!(
        (ends.source, ends.destination),
        ("[2001:db8::7]:4711".parse().unwrap(), "203.0.113.1:443".parse().unwrap())
    );
    assert_eq!(rest, b"x");
}

/// A header of a health check or of the side port says that Ringway speaks for itself.
#[tokio::test]
async fn checks_and_the_side_port_send_a_header_too() {
    let (backend, address) = recorder().await;
    let check = "health_check: { kind: expect, send: PING, expect: PONG, interval: 100ms, timeout: 5s }";
    let ringway = Ringway::start(&static_config(&[address], &format!("{check}\nsend_proxy: v2"))).await;
    let serving = tokio::spawn(async move {
        loop {
            let (mut server, _) = backend.accept().await.unwrap();
            tokio::spawn(async move {
                let (_, ends, rest) = received(&mut server, 4).await;
                assert_eq!(ends, None);
                let answer = if rest.starts_with(b"PING") {
                    &b"PONG"[..]
                } else {
                    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
                };
                let _ = server.write_all(answer).await;
                let _ = server.read(&mut [0; 4096]).await;
            });
        }
    });
    let ringway = ringway.all_healthy().await;
    let answer = http(ringway.api(), "POST", "/api/request", b"x").await;
    assert_eq!((answer.status().as_u16(), &answer.body()[..]), (200, &b"ok"[..]));
    serving.abort();
}

#[tokio::test]
async fn the_header_of_checks_can_be_chosen() {
    let (backend, address) = recorder().await;
    let check = |header: &str| {
        format!(
            "health_check: {{ kind: expect, send: PING, expect: PONG, interval: 20ms, send_proxy: {header} }}\nsend_proxy: v2"
        )
    };
    let ringway = Ringway::start(&static_config(&[address], &check("false"))).await;
    let mut bytes = [0; 16];
    let (mut server, _) = soon("accept", backend.accept()).await.unwrap();
    soon("the check", server.read_exact(&mut bytes[..4])).await.unwrap();
    assert_eq!(&bytes[..4], b"PING");
    ringway.reload(&static_config(&[address], &check("local_as_proxy"))).await.unwrap();
    eventually_async("a header with addresses", async || {
        let (mut server, client) = soon("accept", backend.accept()).await.unwrap();
        soon("the check", server.read_exact(&mut bytes)).await.unwrap();
        if &bytes[..4] == b"PING" {
            return false;
        }
        let length = usize::from(u16::from_be_bytes([bytes[14], bytes[15]]));
        let mut rest = vec![0; length];
        soon("the header", server.read_exact(&mut rest)).await.unwrap();
        let Parsed::Header(header) = parse(&[&bytes[..], &rest].concat()) else { panic!("{bytes:?}") };
        assert_eq!(header.ends, Some(Ends { source: client, destination: address }));
        true
    })
    .await;
    // On another port, only if the config says so.
    let elsewhere =
        |header: &str| check(header).replace("send: PING", &format!("port: {}, send: PING", address.port()));
    for (header, first) in [("auto", &b"PING"[..]), ("true", b"\r\n\r\n")] {
        ringway.reload(&static_config(&[address], &elsewhere(header))).await.unwrap();
        eventually_async(header, async || {
            let (mut server, _) = soon("accept", backend.accept()).await.unwrap();
            soon("the check", server.read_exact(&mut bytes[..4])).await.unwrap();
            &bytes[..4] == first
        })
        .await;
    }
}

/// A balancer on this host may connect through a Unix socket.
#[tokio::test]
async fn a_unix_client_can_send_a_header() {
    let (backend, address) = recorder().await;
    let folder = tempfile::tempdir().unwrap();
    let web = folder.path().join("web");
    let yaml = accepting(&[address], "{ from: [unix] }", &format!("{NO_CHECK}\nsend_proxy: v1"))
        .replace("    listen: 127.0.0.1:0", &format!("    listen: unix:{}", web.display()));
    let ringway = Ringway::start(&yaml).await;
    let mut stream = UnixStream::connect(&web).await.unwrap();
    stream.write_all(&header(Version::V2, "198.51.100.7:4711")).await.unwrap();
    let (mut server, _) = soon("accept", backend.accept()).await.unwrap();
    assert_eq!(received(&mut server, 0).await.1.unwrap().source, "198.51.100.7:4711".parse().unwrap());
    drop(ringway);
}
