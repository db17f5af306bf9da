//! Backends that refuse, are silent or hang. Another backend answers the client.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::backends::{Refusing, Server, Silent};
use crate::harness::program::{Killed, Program, is_alive};
use crate::harness::{
    Ringway, THREE_REPLICAS, config, eventually, eventually_async, get, http, metric_in, soon, static_config,
};
use ringway::backend::State;
use ringway::control::command::Command;

/// The states of all backends in the order of the table.
fn states(ringway: &Ringway) -> Vec<State> {
    ringway.state().pools[0].table.load().backends().iter().map(|backend| backend.state).collect()
}

/// Starts a server that echoes everything after the client has ended. It shows lost and doubled bytes.
async fn exact() -> Server {
    Server::start(|mut stream| async move {
        let mut bytes = Vec::new();
        if stream.read_to_end(&mut bytes).await.is_ok() {
            let _ = stream.write_all(&bytes).await;
        }
    })
    .await
}

/// Opens a connection and expects a reset. The reset may come during the connect or the read.
async fn expect_reset(ringway: &Ringway) {
    let read = async {
        let mut client = TcpStream::connect(ringway.web()).await?;
        client.read(&mut [0; 1]).await
    };
    let error = soon("the reset", read).await.expect_err("a connection without a backend ended cleanly");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn every_client_is_served_while_one_backend_refuses_and_one_is_silent() {
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
async fn the_client_gets_a_reset_when_all_backends_refuse() {
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
async fn ringway_tries_at_most_the_configured_number_of_backends() {
    let backends = [Refusing::new(), Refusing::new(), Refusing::new()];
    let addresses = backends.each_ref().map(|backend| backend.address);
    let yaml = static_config(&addresses, "health_check: { kind: none }\nconnect: { timeout: 1s, attempts: 2 }");
    let ringway = Ringway::start(&yaml).await;
    expect_reset(&ringway).await;
    assert_eq!(ringway.metric("ringway_connect_attempts_total", &[]).await, 2.0);
}

#[tokio::test]
async fn a_backend_that_hangs_is_skipped_and_comes_back() {
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
async fn all_backends_are_tried_if_no_backend_is_healthy() {
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
async fn a_shutdown_lets_connections_finish_within_the_drain() {
    let server = exact().await;
    let ringway = Ringway::start(&static_config(&[server.address], "drain: 2s")).await.all_healthy().await;
    let mut finishing = TcpStream::connect(ringway.web()).await.unwrap();
    let mut staying = TcpStream::connect(ringway.web()).await.unwrap();
    let stats = std::sync::Arc::clone(&ringway.state().listeners[0].stats);
    eventually("both accepted", || stats.active() == 2).await;
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
    assert_eq!(stats.ended(ringway::proxy::stats::EndReason::Shutdown), 1);
}

#[tokio::test]
async fn a_connect_without_an_answer_ends_at_its_timeout() {
    let silent = Silent::new();
    let yaml =
        static_config(&[silent.address], "health_check: { kind: none }\nconnect: { timeout: 300ms, attempts: 3 }");
    let ringway = Ringway::start(&yaml).await;
    let began = std::time::Instant::now();
    expect_reset(&ringway).await;
    assert!(began.elapsed() >= Duration::from_millis(300));
    assert_eq!(ringway.metric("ringway_connect_failures_total", &["cause=\"timeout\""]).await, 1.0);
}

/// Puts load on Ringway at a constant rate while `during` runs. Returns the report and the start of the load.
async fn churned<T>(ringway: &Ringway, during: impl Future<Output = T>) -> (loadtest::Report, std::time::Instant, T) {
    let began = std::time::Instant::now();
    let load = tokio::spawn(loadtest::churn(ringway.web(), 250, Duration::from_secs(4), Duration::from_secs(20)));
    let done = during.await;
    (soon("the load", load).await.unwrap(), began, done)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backend_that_starts_to_refuse_under_load_fails_only_its_accepted_connections() {
    let servers = [Server::echo("b0").await, Server::echo("b1").await];
    let dying = Server::echo("b2").await;
    let addresses = [servers[0].address, servers[1].address, dying.address];
    let yaml = static_config(&addresses, "health_check: { kind: http, path: /heartbeat, interval: 200ms }");
    let ringway = Ringway::start(&yaml).await.all_healthy().await;
    let (report, ..) = churned(&ringway, async {
        let reached = || ringway.backend(2).live.counters.total.load(std::sync::atomic::Ordering::Relaxed) > 0;
        eventually("the load reaches the third backend", reached).await;
        // The backend still serves the connections that it has accepted.
        drop(dying);
        eventually("the backend is unhealthy or ejected", || {
            matches!(states(&ringway)[2], State::Unhealthy | State::Ejected)
        })
        .await;
    })
    .await;
    let failures: Vec<_> = report.outcomes.iter().filter(|outcome| outcome.server.is_err()).collect();
    // The connections that the kernel had accepted for the backend fail with it.
    let live = &ringway.backend(2).live;
    let refused = live.counters.failures.of(ringway::backend::ConnectFailure::Refused);
    assert!(refused > 0, "the backend refused no connection");
    assert!(failures.len() <= 2, "{} of {}: {:?}", failures.len(), report.outcomes.len(), failures.first());
    let attempts = ringway.metric("ringway_connect_attempts_total", &[]).await;
    assert!(attempts <= 2.0 * report.outcomes.len() as f64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_backend_delays_clients_only_before_its_ejection() {
    const TIMEOUT: Duration = Duration::from_millis(400);
    let servers = [Server::echo("b0").await, Server::echo("b1").await];
    let silent = Silent::new();
    let addresses = [servers[0].address, servers[1].address, silent.address];
    let extra =
        "health_check: { kind: none }\nejection: { after: 5, base: 1m }\nconnect: { timeout: 400ms, attempts: 2 }";
    let ringway = Ringway::start(&static_config(&addresses, extra)).await;
    let (report, began, ejected) = churned(&ringway, async {
        eventually("ejected", || states(&ringway)[2] == State::Ejected).await;
        std::time::Instant::now()
    })
    .await;
    assert!(report.failures().is_empty(), "{:?}", report.failures());
    let waited: Vec<_> = report.outcomes.iter().filter(|outcome| outcome.took >= TIMEOUT).collect();
    assert!(!waited.is_empty(), "no client went to the silent backend");
    for outcome in waited {
        let after = (began + outcome.start).checked_duration_since(ejected);
        assert!(after.is_none(), "a client that began {after:?} after the ejection took {:?}", outcome.took);
    }
    let attempts = ringway.metric("ringway_connect_attempts_total", &[]).await;
    assert!(attempts <= 2.0 * report.outcomes.len() as f64, "{attempts}");
}

/// Starts an echo server as a process, which is killed when it is dropped.
fn echo_process(name: &str) -> (Killed, std::net::SocketAddr) {
    use std::io::{BufRead as _, BufReader};

    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_ringway"));
    command.args(["echo-server", "--listen", "127.0.0.1:0", "--name", name]);
    let mut child = Killed(command.stdout(std::process::Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(child.0.stdout.take().unwrap()).lines().map_while(Result::ok);
    let address = lines.find_map(|line| line.split_whitespace().find_map(|word| word.parse().ok()));
    std::thread::spawn(move || lines.for_each(drop));
    (child, address.expect("an address"))
}

#[tokio::test]
async fn the_clients_of_a_dead_backend_spread_over_the_others_with_few_attempts() {
    const CLIENTS: usize = 1500;
    ringway::limits::raise_open_files();
    let mut backends: Vec<_> = (0..4).map(|n| echo_process(&format!("b{n}"))).collect();
    let addresses: Vec<_> = backends.iter().map(|(_, address)| *address).collect();
    let yaml = static_config(&addresses, "health_check: { kind: http, path: /heartbeat, interval: 500ms }");
    let program = Program::start(&yaml).await.ready().await;
    let mut clients = loadtest::open(program.web(), CLIENTS).await.unwrap();
    let active = async || -> Vec<f64> {
        let text = get(program.api(), "/metrics").await.1;
        let of = |n| metric_in(&text, "ringway_backend_connections_active", &[&format!("backend=\"b{n}\"")]);
        (0..4).map(of).collect()
    };
    eventually_async("all open", async || active().await.iter().sum::<f64>() == CLIENTS as f64).await;
    let before = active().await;
    drop(backends.remove(0));
    // Each client that loses its connection connects again immediately.
    let web = program.web();
    let mut coming_back = tokio::task::JoinSet::new();
    for mut client in clients.drain(..) {
        coming_back.spawn(async move {
            let cut_off = tokio::time::timeout(Duration::from_secs(2), client.read(&mut [0; 1])).await.is_ok();
            if cut_off { TcpStream::connect(web).await.unwrap() } else { client }
        });
    }
    let clients = soon("all are back", coming_back.join_all()).await;
    eventually_async("all open again", async || active().await[1..].iter().sum::<f64>() == CLIENTS as f64).await;
    let after = active().await;
    let won: Vec<_> = (1..4).map(|n| after[n] - before[n]).collect();
    let share = before[0] / 3.0;
    println!("{} came back: {won:?}", before[0]);
    assert!(won.iter().all(|won| (0.5..1.6).contains(&(won / share))), "{won:?} of {share} each");
    let text = get(program.api(), "/metrics").await.1;
    let attempts = metric_in(&text, "ringway_connect_attempts_total", &[]);
    assert!(attempts <= (CLIENTS as f64) + 2.0 * before[0], "{attempts} attempts");
    assert_eq!(metric_in(&text, "ringway_connections_refused_total", &[]), 0.0);
    drop(clients);
}

#[tokio::test]
async fn transfers_that_end_within_the_drain_are_complete_and_no_child_is_left() {
    const TRANSFERS: usize = 300;
    const HALF: usize = 12_000;
    let yaml = config(THREE_REPLICAS, "", "health_check: { kind: http, path: /heartbeat }\ndrain: 20s");
    let mut program = Program::start(&yaml).await.ready().await;
    let replicas = program.replicas().await;
    let (go, gone) = tokio::sync::watch::channel(false);
    let mut transfers = tokio::task::JoinSet::new();
    for _ in 0..TRANSFERS {
        let (web, mut gone) = (program.web(), gone.clone());
        transfers.spawn(async move {
            let mut stream = TcpStream::connect(web).await.unwrap();
            let mut back = vec![0; HALF];
            stream.write_all(&[b'a'; HALF]).await.unwrap();
            stream.read_exact(&mut back).await.unwrap();
            let _ = gone.wait_for(|&gone| gone).await;
            stream.write_all(&[b'b'; HALF]).await.unwrap();
            stream.shutdown().await.unwrap();
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).await.unwrap();
            assert_eq!(rest, [b'b'; HALF]);
        });
    }
    eventually_async("all in the middle", async || {
        let text = get(program.api(), "/metrics").await.1;
        metric_in(&text, "ringway_bytes_total", &["to_client"]) >= (TRANSFERS * HALF) as f64
    })
    .await;
    program.signal(rustix::process::Signal::TERM);
    eventually_async("no more accepts", async || TcpStream::connect(program.web()).await.is_err()).await;
    go.send_replace(true);
    soon("all transfers", transfers.join_all()).await;
    assert_eq!(program.ended().await.code(), Some(0));
    eventually("no child is left", || !replicas.iter().any(|&pid| is_alive(pid))).await;
}

#[tokio::test]
async fn during_the_shutdown_delay_ringway_is_not_ready_and_still_accepts() {
    let server = exact().await;
    let yaml = format!("shutdown: {{ delay: 1s }}\n{}", static_config(&[server.address], "health_check: {}"));
    let mut program = Program::start(&yaml).await.ready().await;
    let began = std::time::Instant::now();
    program.signal(rustix::process::Signal::TERM);
    eventually_async("not ready", async || get(program.api(), "/readyz").await.0 == 503).await;
    let mut late = TcpStream::connect(program.web()).await.unwrap();
    late.write_all(b"late").await.unwrap();
    late.shutdown().await.unwrap();
    let mut back = String::new();
    soon("an echo", late.read_to_string(&mut back)).await.unwrap();
    assert_eq!(back, "late");
    assert_eq!(program.ended().await.code(), Some(0));
    assert!(began.elapsed() >= Duration::from_secs(1));
}

/// A connection that waits for a connect timeout outlives changes of its pool.
#[tokio::test]
async fn a_connection_does_not_reach_a_backend_that_left_while_it_was_connecting() {
    let (silent, leaving, good) = (Silent::new(), Server::echo("b1").await, Server::echo("b2").await);
    let yaml = static_config(
        &[silent.address, leaving.address, good.address],
        "health_check: { kind: none }\nejection: off\nconnect: { timeout: 1s, attempts: 3 }\ndrain: 1s",
    );
    let ringway = Ringway::start(&yaml).await.ready().await;
    let backends = ringway.state().pools[0].table.load().backends().clone();
    let active = |n: usize| backends[n].live.active.load(std::sync::atomic::Ordering::Relaxed);
    let clients = loadtest::open(ringway.web(), 60).await.unwrap();
    eventually("connections wait for the silent backend", || active(0) + active(1) + active(2) == 60).await;
    assert!(active(0) > 10, "{} wait", active(0));
    let at_leaving = active(1);
    ringway.send(Command::Remove { pool: "echo".to_owned(), backend: "b1".to_owned() }).await.unwrap();
    eventually("no connection waits", || active(0) == 0).await;
    assert!(active(1) <= at_leaving, "connections have reached a backend that has left");
    // The drain of the others ends too.
    eventually("the backend has left", || ringway.states().len() == 2 && active(1) == 0).await;
    drop(clients);
}
