//! Backends that refuse, are silent, or hang: the client gets an answer from another one.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::backends::{Refusing, Server, Silent};
use crate::harness::{Ringway, eventually, eventually_async, http, soon, static_config};
use ringway::backend::State;

/// Every state as the table shows it, in the backends' order.
fn states(ringway: &Ringway) -> Vec<State> {
    ringway.state().pools[0].table.load().backends().iter().map(|backend| backend.state).collect()
}

/// A server that counts nothing and echoes all it got once the client has ended: bytes lost or doubled show.
async fn exact() -> Server {
    Server::start(|mut stream| async move {
        let mut bytes = Vec::new();
        if stream.read_to_end(&mut bytes).await.is_ok() {
            let _ = stream.write_all(&bytes).await;
        }
    })
    .await
}

/// A connection that nobody serves. The reset may come while the client still connects, or when it reads.
async fn expect_reset(ringway: &Ringway) {
    let read = async {
        let mut client = TcpStream::connect(ringway.web()).await?;
        client.read(&mut [0; 1]).await
    };
    let error = soon("the reset", read).await.expect_err("no backend, no clean end");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_backend_that_refuses_or_is_silent_costs_the_client_nothing() {
    let (refusing, silent, good) = (Refusing::new(), Silent::new(), exact().await);
    let yaml = static_config(
        &[refusing.address, silent.address, good.address],
        "health_check: { kind: none }\nconnect: { timeout: 200ms, attempts: 3 }",
    );
    let ringway = Ringway::start(&yaml).await;
    let mut clients = tokio::task::JoinSet::new();
    for n in 0..60_usize {
        let web = ringway.web();
        clients.spawn(async move {
            let mut client = TcpStream::connect(web).await.unwrap();
            let text = format!("client {n} says {}", "x".repeat(n * 997));
            client.write_all(text.as_bytes()).await.unwrap();
            client.shutdown().await.unwrap();
            let mut back = String::new();
            client.read_to_string(&mut back).await.unwrap();
            assert_eq!(back, text);
        });
    }
    soon("all clients", async { while clients.join_next().await.transpose().unwrap().is_some() {} }).await;
    for (backend, cause) in [("backend=\"b0\"", "cause=\"refused\""), ("backend=\"b1\"", "cause=\"timeout\"")] {
        let failures = ringway.metric("ringway_connect_failures_total", &[backend, cause]).await;
        assert!(failures > 0.0, "{backend} {cause}");
    }
    assert_eq!(ringway.metric("ringway_connections_refused_total", &[]).await, 0.0);
}

#[tokio::test]
async fn when_all_refuse_the_client_gets_a_reset() {
    let backends = [Refusing::new(), Refusing::new()];
    let addresses = backends.each_ref().map(|backend| backend.address);
    let ringway = Ringway::start(&static_config(&addresses, "health_check: { kind: none }")).await;
    for _ in 0..20 {
        expect_reset(&ringway).await;
    }
    let refused = ringway.metric("ringway_connections_refused_total", &["reason=\"connect_failed\""]).await;
    assert_eq!(refused, 20.0);
}

#[tokio::test]
async fn no_more_backends_are_tried_than_configured() {
    let backends = [Refusing::new(), Refusing::new(), Refusing::new()];
    let addresses = backends.each_ref().map(|backend| backend.address);
    let yaml = static_config(&addresses, "health_check: { kind: none }\nconnect: { timeout: 1s, attempts: 2 }");
    let ringway = Ringway::start(&yaml).await;
    expect_reset(&ringway).await;
    assert_eq!(ringway.metric("ringway_connect_attempts_total", &[]).await, 2.0);
}

#[tokio::test]
async fn a_backend_that_hangs_is_walked_past_and_comes_back() {
    let (hang, hangs) = tokio::sync::watch::channel(false);
    let moody = Server::start(move |mut stream| {
        let mut hangs = hangs.clone();
        async move {
            let _ = hangs.wait_for(|hangs| !hangs).await;
            let _ = stream.read(&mut [0; 1024]).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nx-server: b0\r\ncontent-length: 0\r\n\r\n").await;
        }
    })
    .await;
    let steady = Server::echo("b1").await;
    let check = "health_check: { kind: http, path: /heartbeat, interval: 50ms, timeout: 300ms, rise: 2, fall: 2 }";
    let ringway = Ringway::start(&static_config(&[moody.address, steady.address], check)).await.all_healthy().await;
    hang.send_replace(true);
    eventually("unhealthy", || states(&ringway) == [State::Unhealthy, State::Healthy]).await;
    for _ in 0..30 {
        let answer = http(ringway.web(), "GET", "/heartbeat", b"").await;
        assert_eq!(answer.headers()["x-server"], "b1");
    }
    hang.send_replace(false);
    eventually("healthy again", || states(&ringway) == [State::Healthy; 2]).await;
    assert!(ringway.metric("ringway_health_checks_total", &["b0", "result=\"failed\""]).await >= 2.0);
}

#[tokio::test]
async fn a_check_that_gets_an_error_status_fails() {
    let ill = Server::start(|mut stream| async move {
        let _ = stream.read(&mut [0; 1024]).await;
        let _ = stream.write_all(b"HTTP/1.1 500 Oh No\r\ncontent-length: 0\r\n\r\n").await;
    })
    .await;
    let well = Server::echo("b1").await;
    let check = "health_check: { kind: http, path: /heartbeat, interval: 50ms }";
    let ringway = Ringway::start(&static_config(&[ill.address, well.address], check)).await;
    eventually("verdicts", || states(&ringway) == [State::Unhealthy, State::Healthy]).await;
    let table = ringway.state().pools[0].table.load();
    assert_eq!(table.backends()[0].health.last.as_deref(), Some("status 500"));
}

#[tokio::test]
async fn where_no_backend_is_healthy_all_are_tried() {
    let server = exact().await;
    let check = "health_check: { kind: http, path: /, interval: 50ms, timeout: 50ms }";
    let ringway = Ringway::start(&static_config(&[server.address], check)).await;
    eventually("unhealthy", || states(&ringway) == [State::Unhealthy]).await;
    let mut client = TcpStream::connect(ringway.web()).await.unwrap();
    client.write_all(b"anyone?").await.unwrap();
    client.shutdown().await.unwrap();
    let mut back = String::new();
    soon("the echo", client.read_to_string(&mut back)).await.unwrap();
    assert_eq!(back, "anyone?");
}

#[tokio::test]
async fn shutdown_lets_connections_finish_until_the_drain_has_passed() {
    let server = exact().await;
    let ringway = Ringway::start(&static_config(&[server.address], "drain: 2s")).await.all_healthy().await;
    let mut finishing = TcpStream::connect(ringway.web()).await.unwrap();
    let mut staying = TcpStream::connect(ringway.web()).await.unwrap();
    let stats = std::sync::Arc::clone(&ringway.state().listeners[0].stats);
    eventually("both accepted", || stats.active.load(std::sync::atomic::Ordering::Relaxed) == 2).await;
    ringway.stop();
    eventually_async("no more accepts", async || TcpStream::connect(ringway.web()).await.is_err()).await;
    finishing.write_all(b"last words").await.unwrap();
    finishing.shutdown().await.unwrap();
    let mut back = String::new();
    soon("the echo", finishing.read_to_string(&mut back)).await.unwrap();
    assert_eq!(back, "last words");
    let error = soon("the drain's end", staying.read(&mut [0; 1])).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    eventually("the end", || ringway.has_ended()).await;
    assert_eq!(stats.ended.of(ringway::proxy::stats::End::Shutdown), 1);
}

#[tokio::test]
async fn a_connect_that_gets_no_answer_ends_at_its_timeout() {
    let silent = Silent::new();
    let yaml =
        static_config(&[silent.address], "health_check: { kind: none }\nconnect: { timeout: 300ms, attempts: 3 }");
    let ringway = Ringway::start(&yaml).await;
    let began = std::time::Instant::now();
    expect_reset(&ringway).await;
    assert!(began.elapsed() >= Duration::from_millis(300));
    assert_eq!(ringway.metric("ringway_connect_failures_total", &["cause=\"timeout\""]).await, 1.0);
}
