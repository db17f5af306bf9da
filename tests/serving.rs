//! Ringway spreads connections over live backends and relays their answers.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::backends::Server;
use crate::harness::{
    Ringway, THREE_REPLICAS, config, echoes, eventually, eventually_async, get, http, metric_in, soon, static_config,
};

#[tokio::test]
async fn three_embedded_replicas_answer_the_lines_of_the_readme() {
    let ringway = Ringway::start(&config(THREE_REPLICAS, "answer_status: true", "")).await.all_healthy().await;
    for address in [ringway.web(), ringway.api()] {
        let answer = http(address, "POST", "/api/request", br#"{"data": "example"}"#).await;
        assert_eq!(answer.status(), 200);
        let server = answer.headers()["x-server"].to_str().unwrap().to_owned();
        assert!(server.starts_with("echo-"), "{server}");
        let body = std::str::from_utf8(answer.body()).unwrap().trim();
        assert_eq!(body, format!(r#"{{"server":"{server}","data":{{"data":"example"}}}}"#));

        let (status, body) = get(address, "/api/status").await;
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status, &body["ready"]), (200, &true.into()), "a replica answered instead of Ringway");
        assert_eq!(body["pools"][0]["backends"].as_array().unwrap().len(), 3);
    }
    let mut echo = TcpStream::connect(ringway.web()).await.unwrap();
    echo.write_all(b"hello").await.unwrap();
    echo.shutdown().await.unwrap();
    let mut text = String::new();
    soon("the echo", echo.read_to_string(&mut text)).await.unwrap();
    assert_eq!(text, "hello");
}

/// Opens `count` connections from different ports. Returns the number of connections of each backend.
async fn spread(ringway: &Ringway, count: usize) -> BTreeMap<String, usize> {
    let mut servers = BTreeMap::new();
    for _ in 0..count {
        let answer = http(ringway.web(), "GET", "/heartbeat", b"").await;
        *servers.entry(answer.headers()["x-server"].to_str().unwrap().to_owned()).or_insert(0) += 1;
    }
    servers
}

async fn three_servers() -> [Server; 3] {
    [Server::echo("a").await, Server::echo("b").await, Server::echo("c").await]
}

#[tokio::test]
async fn connections_of_one_address_are_spread_evenly() {
    let servers = three_servers().await;
    let addresses = servers.each_ref().map(|server| server.address);
    let ringway = Ringway::start(&static_config(&addresses, "key: source")).await.all_healthy().await;
    let servers = spread(&ringway, 3000).await;
    assert_eq!(servers.len(), 3, "{servers:?}");
    for (server, count) in servers {
        assert!((850..=1150).contains(&count), "{server} got {count} of 3000");
    }
}

#[tokio::test]
async fn with_source_ip_every_connection_of_a_client_has_the_same_backend() {
    let servers = three_servers().await;
    let addresses = servers.each_ref().map(|server| server.address);
    let ringway = Ringway::start(&static_config(&addresses, "key: source_ip")).await.all_healthy().await;
    let servers = spread(&ringway, 300).await;
    assert_eq!(servers.len(), 1, "{servers:?}");
}

#[tokio::test]
async fn ipv6_works_on_both_sides() {
    let listener = tokio::net::TcpListener::bind("[::1]:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"six").await.unwrap();
    });
    let yaml = static_config(&[address], "health_check: { kind: none }").replace("127.0.0.1:0", "[::1]:0");
    let yaml = yaml.replace("listen: [::1]:0", "listen: \"[::1]:0\"");
    let ringway = Ringway::start(&yaml).await;
    assert!(ringway.web().is_ipv6());
    let mut client = TcpStream::connect(ringway.web()).await.unwrap();
    let mut text = String::new();
    soon("the greeting", client.read_to_string(&mut text)).await.unwrap();
    assert_eq!(text, "six");
    task.await.unwrap();
}

#[tokio::test]
async fn a_host_name_is_resolved_at_start() {
    let server = Server::echo("a").await;
    let provider = format!("static: [{{ address: \"localhost:{}\" }}]", server.address.port());
    let ringway = Ringway::start(&config(&provider, "", "")).await.all_healthy().await;
    let backends = ringway.state().pools[0].table.load();
    assert_eq!(*backends.backends()[0].id, *format!("localhost:{}", server.address.port()));
    assert_eq!(spread(&ringway, 1).await.len(), 1);
}

/// Starts a server that speaks first, as `MariaDB`, SSH and SMTP servers do.
async fn greeter() -> Server {
    Server::start(|mut stream| async move {
        let _ = stream.write_all(b"220 hello\r\n").await;
        let mut line = [0; 64];
        while let Ok(1..) = stream.read(&mut line).await {}
    })
    .await
}

#[tokio::test]
async fn a_server_can_speak_first_with_and_without_answer_status() {
    let server = greeter().await;
    for listener in ["", "answer_status: true"] {
        let provider = format!("static: [{{ address: \"{}\" }}]", server.address);
        let ringway = Ringway::start(&config(&provider, listener, "")).await;
        let mut client = TcpStream::connect(ringway.web()).await.unwrap();
        let mut line = [0; 11];
        soon("the greeting", client.read_exact(&mut line)).await.unwrap();
        assert_eq!(&line, b"220 hello\r\n");
    }
}

#[tokio::test]
async fn answer_status_recognizes_its_request_and_relays_everything_else() {
    let server = Server::start(|mut stream| async move {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes).await;
        let _ = stream.write_all(&bytes).await;
    })
    .await;
    let provider = format!("static: [{{ address: \"{}\" }}]", server.address);
    let ringway = Ringway::start(&config(&provider, "answer_status: true", "")).await;

    // The request comes in pieces, as from a slow terminal.
    let mut client = TcpStream::connect(ringway.web()).await.unwrap();
    client.set_nodelay(true).unwrap();
    for piece in ["GET /ap", "i/status", "?pretty HTTP/1.1\r\nhost: x\r\n\r\n"] {
        client.write_all(piece.as_bytes()).await.unwrap();
        tokio::task::yield_now().await;
    }
    let mut answer = String::new();
    soon("the status", client.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.contains("\"pools\""), "{answer}");

    // The client ends its side immediately, as `nc -N` does.
    let mut client = TcpStream::connect(ringway.web()).await.unwrap();
    client.write_all(b"GET /api/status HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    client.shutdown().await.unwrap();
    let mut answer = String::new();
    soon("the status", client.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.contains("\"pools\""), "{answer:?}");

    for other in ["GET /api/statusquo HTTP/1.1\r\n\r\n", "GET /api", "POST /api/status HTTP/1.1\r\n\r\n", "G", ""] {
        let mut client = TcpStream::connect(ringway.web()).await.unwrap();
        client.write_all(other.as_bytes()).await.unwrap();
        client.shutdown().await.unwrap();
        let mut back = String::new();
        soon(other, client.read_to_string(&mut back)).await.unwrap();
        assert_eq!(back, other);
    }
    assert!(ringway.metric("ringway_connections_ended_total", &["reason=\"answered\""]).await >= 1.0);
}

#[tokio::test]
async fn a_second_ringway_on_the_same_address_is_refused() {
    let server = Server::echo("a").await;
    let ringway = Ringway::start(&static_config(&[server.address], "")).await;
    let second =
        static_config(&[server.address], "").replacen("listen: 127.0.0.1:0", &format!("listen: {}", ringway.web()), 1);
    let error = Ringway::try_start(&second).await.err().expect("the address is taken");
    assert!(error.starts_with(&format!("listeners[web].listen: cannot listen on {}", ringway.web())), "{error}");
    assert!(error.contains("another Ringway"), "{error}");
}

/// Several workers share one limit. No worker may keep a permit that the connections of another worker wait for.
#[tokio::test]
async fn connections_over_the_limit_wait_in_the_backlog_and_are_served() {
    let server = Server::echo("a").await;
    let yaml = format!("max_connections: 1\n{}", static_config(&[server.address], ""));
    let ringway = Ringway::start(&yaml).await.all_healthy().await;
    let stats = std::sync::Arc::clone(&ringway.state().listeners[0].stats);
    let accepted = || stats.accepted();
    for round in 0..8 {
        let first = TcpStream::connect(ringway.web()).await.unwrap();
        eventually("the first is accepted", || accepted() == 2 * round + 1).await;
        let mut waiting = TcpStream::connect(ringway.web()).await.unwrap();
        waiting.write_all(b"late").await.unwrap();
        let mut late = [0; 4];
        let early = tokio::time::timeout(Duration::from_millis(50), waiting.read_exact(&mut late)).await;
        assert!(early.is_err() && accepted() == 2 * round + 1, "the limit has no effect");
        drop(first);
        soon("its turn", waiting.read_exact(&mut late)).await.unwrap();
        assert_eq!(&late, b"late");
    }
}

#[tokio::test]
async fn every_connection_is_counted_once() {
    let servers = three_servers().await;
    let addresses = servers.each_ref().map(|server| server.address);
    let log = tempfile::NamedTempFile::new().unwrap();
    let yaml = static_config(&addresses, "");
    let yaml = format!("access_log: {{ path: {:?}, format: json }}\n{yaml}", log.path().display().to_string());
    let ringway = Ringway::start(&yaml).await.all_healthy().await;
    spread(&ringway, 50).await;
    let ended = ["reason=\"finished\""];
    crate::harness::eventually_async("all ended", async || {
        ringway.metric("ringway_connections_ended_total", &ended).await >= 50.0
    })
    .await;
    assert_eq!(ringway.metric("ringway_connections_accepted_total", &[]).await, 50.0);
    assert_eq!(ringway.metric("ringway_connections_active", &[]).await, 0.0);
    assert_eq!(ringway.metric("ringway_connections_ended_total", &[]).await, 50.0);
    assert_eq!(ringway.metric("ringway_backend_connections_total", &[]).await, 50.0);
    assert_eq!(ringway.metric("ringway_backend_connections_active", &[]).await, 0.0);
    assert_eq!(ringway.metric("ringway_connect_seconds_count", &[]).await, 50.0);
    assert_eq!(ringway.metric("ringway_connection_seconds_count", &[]).await, 50.0);
    drop(ringway);

    let lines = std::fs::read_to_string(log.path()).unwrap();
    assert_eq!(lines.lines().count(), 50);
    for line in lines.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(
            (&line["listener"], &line["pool"], &line["end"]),
            (&"web".into(), &"echo".into(), &"finished".into())
        );
        assert!(line["to_client"].as_u64().unwrap() > 30 && line["duration_ms"].as_f64().unwrap() > 0.0, "{line}");
    }
}

#[tokio::test]
async fn the_access_log_has_a_text_format() {
    let server = Server::echo("a").await;
    let log = tempfile::NamedTempFile::new().unwrap();
    let yaml = static_config(&[server.address], "");
    let yaml = format!("access_log: {{ path: {:?} }}\n{yaml}", log.path().display().to_string());
    let ringway = Ringway::start(&yaml).await.all_healthy().await;
    spread(&ringway, 1).await;
    let stats = std::sync::Arc::clone(&ringway.state().listeners[0].stats);
    eventually("its end", || stats.total_ended() == 1).await;
    drop(ringway);
    let line = std::fs::read_to_string(log.path()).unwrap();
    for part in [
        " listener=web route=default pool=echo client=127.0.0.1:",
        &format!(" backend=b0 address={} tries=- end=finished from_client=", server.address),
        " connect_ms=0.",
        " duration_ms=",
    ] {
        assert!(line.contains(part), "{line:?} lacks {part:?}");
    }
}

#[tokio::test]
async fn lost_lines_of_the_access_log_are_counted() {
    let server = Server::echo("a").await;
    let yaml = format!("access_log: {{ path: /dev/full }}\n{}", static_config(&[server.address], ""));
    let ringway = Ringway::start(&yaml).await.all_healthy().await;
    spread(&ringway, 3).await;
    crate::harness::eventually_async("three lost lines", async || {
        ringway.metric("ringway_access_log_lost_lines_total", &[]).await == 3.0
    })
    .await;
}

#[tokio::test]
async fn workers_have_equal_numbers_of_connections() {
    let server = Server::echo("a").await;
    for workers in [2, 8] {
        let yaml = static_config(&[server.address], "health_check: { kind: none }");
        let yaml = yaml.replace("workers: 2", &format!("workers: {workers}"));
        let ringway = Ringway::start(&yaml).await.ready().await;
        let mut open = Vec::new();
        for each in [1, 4, 16] {
            open.extend(loadtest::open(ringway.web(), each * workers - open.len()).await.unwrap());
            let counts = async || {
                let text = get(ringway.api(), "/metrics").await.1;
                let of = |worker| metric_in(&text, "ringway_worker_connections_active", &[&format!("\"{worker}\"")]);
                (0..workers).map(of).collect::<Vec<_>>()
            };
            eventually_async("all open", async || counts().await.iter().sum::<f64>() == (each * workers) as f64).await;
            assert_eq!(counts().await, vec![each as f64; workers], "{workers} workers");
        }
        // Each worker serves what others have accepted.
        for stream in &mut open {
            assert!(soon("an echo", echoes(stream)).await);
        }
        drop(open);
        let active = async || ringway.metric("ringway_worker_connections_active", &[]).await;
        eventually_async("all ended", async || active().await == 0.0).await;
    }
}
