//! Checks of all kinds, ejection, panic, and the connections of a backend that goes down.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use ringway::backend::State;
use ringway::proxy::stats::EndReason;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::backends::{Refusing, Server};
use crate::harness::{Ringway, eventually, eventually_async, get, http, soon, static_config};

/// Starts a server that sends `greeting` first, and answers each line with `answer`.
async fn talker(greeting: &'static [u8], answer: &'static [u8]) -> Server {
    Server::start(move |mut stream| async move {
        let _ = stream.write_all(greeting).await;
        let mut line = [0; 256];
        while stream.read(&mut line).await.is_ok_and(|read| read > 0) {
            let _ = stream.write_all(answer).await;
        }
    })
    .await
}

#[tokio::test]
async fn a_check_can_send_and_expect_bytes() {
    let redis = talker(b"", b"+PONG\r\n").await;
    let ssh = talker(b"SSH-2.0-Test_1\r\n", b"").await;
    let cases = [
        (&redis, r#"send: "PING\r\n", expect: "+PONG""#, "ok"),
        (&redis, r#"send: { hex: "50 49 4e 47 0d 0a" }, expect: PONG, match: contains"#, "ok"),
        (&redis, r#"send: "PING\r\n", expect: PONG"#, "unexpected answer \"+PONG\\r\\n\""),
        (&redis, r#"expect: "+PONG""#, "timeout"),
        (&ssh, r#"expect: "SSH-2.0""#, "ok"),
        (&ssh, "expect: Test, match: contains", "ok"),
        (&ssh, r#"expect: "SSH-1""#, "unexpected answer \"SSH-2.0-Test_1\\r\\n\""),
    ];
    for (server, expect, result) in cases {
        let check = format!("health_check: {{ kind: expect, {expect}, interval: 50ms, timeout: 300ms, fall: 1 }}");
        let ringway = Ringway::start(&static_config(&[server.address], &check)).await;
        eventually(expect, || ringway.backend(0).health.last.as_deref() == Some(result)).await;
        let state = if result == "ok" { State::Healthy } else { State::Unhealthy };
        eventually(expect, || ringway.states() == [state]).await;
    }
}

#[tokio::test]
async fn a_tls_check_says_what_a_server_without_tls_answers() {
    let redis = talker(b"", b"-ERR unknown command\r\n").await;
    let ssh = talker(b"SSH-2.0-Test_1\r\n", b"").await;
    let closes = Server::start(|stream| async move { drop(stream) }).await;
    for (server, result) in [
        (&redis, "no TLS answer: \"-ERR unknown command\\r\\n\""),
        (&ssh, "no TLS answer: \"SSH-2.0-Test_1\\r\\n\""),
        (&closes, "no TLS answer: "),
    ] {
        let check = "health_check: { kind: tls, interval: 50ms, timeout: 300ms, fall: 1 }";
        let ringway = Ringway::start(&static_config(&[server.address], check)).await;
        let last = || ringway.backend(0).health.last.as_deref().map(str::to_owned).unwrap_or_default();
        eventually(result, || last().starts_with(result)).await;
        eventually(result, || ringway.states() == [State::Unhealthy]).await;
    }
}

#[tokio::test]
async fn an_http_check_uses_status_body_host_and_port() {
    let server = Server::start(|mut stream| async move {
        let mut request = vec![0; 4096];
        let read = stream.read(&mut request).await.unwrap_or(0);
        let request = String::from_utf8_lossy(&request[..read]).to_lowercase();
        let host = if request.contains("host: www.example\r\n") { "known" } else { "unknown" };
        let answer = format!("HTTP/1.1 503 Busy\r\ncontent-length: {}\r\n\r\n{host}", host.len());
        let _ = stream.write_all(answer.as_bytes()).await;
    })
    .await;
    let other = Refusing::new();
    let port = server.address.port();
    let cases = [
        ("status: 503".to_owned(), "ok"),
        ("status: 500-599, host: www.example, body: known".to_owned(), "ok"),
        ("status: 200-299".to_owned(), "status 503"),
        ("status: 503, body: nothing of the kind".to_owned(), "the body lacks the expected text"),
    ];
    for (keys, result) in cases {
        let check = format!("health_check: {{ kind: http, port: {port}, interval: 50ms, fall: 1, {keys} }}");
        let ringway = Ringway::start(&static_config(&[other.address], &check)).await;
        eventually(&keys, || ringway.backend(0).health.last.as_deref() == Some(result)).await;
    }
}

/// MariaDB counts every connection that ends before a login, and locks out a host with too many of them.
#[tokio::test]
async fn a_tcp_check_ends_before_the_server_accepts_it() {
    let accepted = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&accepted);
    let server = Server::start(move |stream| {
        seen.fetch_add(1, Ordering::Relaxed);
        async move { drop(stream) }
    })
    .await;
    let ringway = Ringway::start(&static_config(&[server.address], "health_check: { interval: 20ms }")).await;
    let passed = || ringway.backend(0).live.counters.checks_passed.load(Ordering::Relaxed);
    eventually("checks", || passed() >= 50).await;
    // A check that its thread ends too late is accepted.
    let accepted = accepted.load(Ordering::Relaxed);
    assert!(accepted <= 5, "the server accepted {accepted} of {} checks", passed());
    assert_eq!(ringway.states(), [State::Healthy]);
}

/// As scripts behind inetd do.
#[tokio::test]
async fn an_http_answer_counts_although_the_server_did_not_read_the_request() {
    let server = Server::start(|mut stream| async move {
        let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nfine\n").await;
    })
    .await;
    for body in ["", ", body: fine"] {
        let check = format!("health_check: {{ kind: http, interval: 10ms, fall: 1{body} }}");
        let ringway = Ringway::start(&static_config(&[server.address], &check)).await;
        let live = Arc::clone(&ringway.backend(0).live);
        eventually("checks", || live.counters.checks_passed.load(Ordering::Relaxed) >= 100).await;
        assert_eq!(live.counters.checks_failed.load(Ordering::Relaxed), 0, "{:?}", ringway.backend(0).health.last);
    }
}

#[tokio::test]
async fn an_http_check_does_not_read_an_endless_body() {
    let server = Server::start(|mut stream| async move {
        let _ = stream.read(&mut [0; 4096]).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
        while stream.write_all(&[b'x'; 8192]).await.is_ok() {}
    })
    .await;
    let check = "health_check: { kind: http, interval: 20ms, timeout: 10s }";
    let ringway = Ringway::start(&static_config(&[server.address], check)).await.all_healthy().await;
    let live = Arc::clone(&ringway.backend(0).live);
    eventually("checks", || live.counters.checks_passed.load(Ordering::Relaxed) >= 10).await;
    assert_eq!(live.counters.checks_failed.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_backend_that_fails_connects_is_ejected_and_comes_back() {
    let (refusing, good) = (Refusing::new(), Server::echo("b1").await);
    let extra =
        "health_check: { kind: none }\nejection: { after: 3, base: 500ms }\nconnect: { timeout: 1s, attempts: 2 }";
    let ringway = Ringway::start(&static_config(&[refusing.address, good.address], extra)).await;
    let ask = async || http(ringway.web(), "GET", "/heartbeat", b"").await.status() == 200;
    eventually_async("ejected", async || {
        assert!(ask().await, "a client got no answer");
        ringway.states() == [State::Ejected, State::Healthy]
    })
    .await;
    let failed = ringway.metric("ringway_connect_failures_total", &["b0"]).await;
    assert!((3.0..4.0).contains(&failed), "{failed} failures, although clients connect one by one");
    for _ in 0..20 {
        assert!(ask().await);
    }
    assert_eq!(
        ringway.metric("ringway_connect_failures_total", &["b0"]).await,
        failed,
        "a client tried the ejected backend"
    );
    assert_eq!(ringway.metric("ringway_backend_ejected", &["b0"]).await, 1.0);
    eventually("readmitted", || ringway.states() == [State::Healthy; 2]).await;
    assert_eq!(ringway.metric("ringway_backend_ejections_total", &["b0"]).await, 1.0);
}

#[tokio::test]
async fn below_the_panic_threshold_all_backends_are_tried_and_the_metrics_show_it() {
    let (good, ill) = (Server::echo("b0").await, [Server::echo("b1").await, Server::echo("b2").await]);
    let check = "health_check: { kind: expect, expect: never, interval: 50ms, timeout: 50ms, fall: 1 }";
    for (threshold, panic) in [(50, true), (0, false), (30, false)] {
        // Two of three backends fail their checks, so 33 % are healthy.
        let kinds = [good.address, ill[0].address, ill[1].address];
        let well = Server::start(|mut stream| async move {
            let _ = stream.write_all(b"never").await;
            let _ = stream.read(&mut [0; 16]).await;
        })
        .await;
        let yaml =
            static_config(&[well.address, kinds[1], kinds[2]], &format!("{check}\npanic_threshold: {threshold}"));
        let ringway = Ringway::start(&yaml).await;
        eventually("verdicts", || ringway.states() == [State::Healthy, State::Unhealthy, State::Unhealthy]).await;
        let pools = ringway.state();
        let owners: std::collections::BTreeSet<_> = ringway.mapping().into_values().collect();
        assert_eq!(owners.len(), if panic { 3 } else { 1 }, "threshold {threshold}");
        assert_eq!(ringway.metric("ringway_pool_panic", &[]).await, f64::from(u8::from(panic)));
        let _connections = loadtest::open(ringway.web(), 5).await.unwrap();
        let stats = Arc::clone(&pools.listeners[0].stats);
        eventually("accepted", || stats.active() == 5).await;
        let picks = ringway.metric("ringway_pool_panic_picks_total", &[]).await;
        assert_eq!(picks > 0.0, panic, "{picks}");
    }
}

/// Starts a server that always serves clients. While `ill` is set, it fails the checks, which it recognizes by the first byte.
async fn moody(ill: &Arc<AtomicBool>) -> Server {
    let ill = Arc::clone(ill);
    Server::start(move |mut stream| {
        let ill = Arc::clone(&ill);
        async move {
            let mut byte = [0; 1];
            while stream.read_exact(&mut byte).await.is_ok() {
                let answer = if byte == *b"?" && ill.load(Ordering::Relaxed) { b"-" } else { b"+" };
                let _ = stream.write_all(answer).await;
            }
        }
    })
    .await
}

#[tokio::test]
async fn connections_of_a_backend_that_goes_down_are_kept_or_reset() {
    for (on_down, is_kept) in [("keep", true), ("reset", false)] {
        let ill = Arc::new(AtomicBool::new(false));
        let moody = moody(&ill).await;
        let check = "health_check: { kind: expect, send: \"?\", expect: \"+\", interval: 50ms, fall: 2 }";
        let yaml = static_config(&[moody.address], &format!("{check}\non_down: {on_down}"));
        let ringway = Ringway::start(&yaml).await.all_healthy().await;
        let mut client = TcpStream::connect(ringway.web()).await.unwrap();
        let mut byte = [0; 1];
        client.write_all(b"x").await.unwrap();
        soon("an answer", client.read_exact(&mut byte)).await.unwrap();
        ill.store(true, Ordering::Relaxed);
        eventually("down", || ringway.states() == [State::Unhealthy]).await;
        if is_kept {
            // With `on_down: reset` the timeout task would reset the connection in this time.
            tokio::time::sleep(Duration::from_millis(700)).await;
            client.write_all(b"x").await.unwrap();
            soon("an answer", client.read_exact(&mut byte)).await.unwrap();
        } else {
            let error = soon("the reset", client.read_exact(&mut byte)).await.unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
            let stats = Arc::clone(&ringway.state().listeners[0].stats);
            eventually("counted", || stats.ended(EndReason::BackendDown) == 1).await;
        }
    }
}

#[tokio::test]
async fn a_backend_that_comes_back_gets_its_keys_step_by_step() {
    let ill = Arc::new(AtomicBool::new(false));
    let (moody, steady) = (moody(&ill).await, moody(&Arc::default()).await);
    let check = "health_check: { kind: expect, send: \"?\", expect: \"+\", interval: 30ms, rise: 1, fall: 1 }";
    let yaml =
        static_config(&[moody.address, steady.address], &format!("{check}\nslow_start: 2s\npanic_threshold: 10"));
    let ringway = Ringway::start(&yaml).await.all_healthy().await;
    let share = || {
        let mapping = ringway.mapping();
        mapping.values().filter(|owner| *owner == "b0").count() as f64 / mapping.len() as f64
    };
    let before = share();
    assert!((0.4..0.6).contains(&before), "the first backends have no slow start: {before}");
    ill.store(true, Ordering::Relaxed);
    eventually("b0 is down", || ringway.states() == [State::Unhealthy, State::Healthy]).await;
    ill.store(false, Ordering::Relaxed);
    let mut shares = Vec::new();
    eventually("b0 is back with all of its keys", || {
        shares.push(share());
        ringway.backend(0).admission.as_part() >= 1.0 && ringway.states() == [State::Healthy; 2]
    })
    .await;
    assert!(shares.windows(2).all(|pair| pair[0] <= pair[1]), "the share decreased: {shares:?}");
    shares.dedup();
    assert!(shares.len() >= 5, "the share has too few steps: {shares:?}");
    assert_eq!(share(), before);
}

/// The keys of a backend whose first check takes long would go to others, and come back.
#[tokio::test]
async fn ringway_is_ready_once_every_backend_has_its_first_verdict() {
    let (release, _) = tokio::sync::watch::channel(false);
    let slow = Server::start({
        let release = release.clone();
        move |mut stream| {
            let mut released = release.subscribe();
            async move {
                released.wait_for(|&released| released).await.unwrap();
                let _ = stream.write_all(b"+").await;
            }
        }
    })
    .await;
    let quick = talker(b"+", b"").await;
    let check = "health_check: { kind: expect, expect: \"+\", timeout: 4s }";
    let ringway = Ringway::start(&static_config(&[quick.address, slow.address], check)).await;
    eventually("one is healthy", || ringway.states() == [State::Healthy, State::Starting]).await;
    let is_ready = async || get(ringway.api(), "/readyz").await.0 == 200;
    // Ready with the first healthy backend, it would be within this time.
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert!(!is_ready().await);
    release.send_replace(true);
    eventually_async("ready", is_ready).await;
    assert_eq!(ringway.states(), [State::Healthy; 2]);
}
