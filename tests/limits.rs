//! Limits of descriptors, memory, connections and ports.

use std::time::Duration;

use ringway::backend::State;
use ringway::proxy::stats::{EndReason, RefusalReason};
use rustix::process::{Resource, Rlimit, prlimit};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::backends::{Server, Silent};
use crate::harness::program::Program;
use crate::harness::{
    Ringway, config, echoes, eventually, eventually_async, get, in_namespace, metric_in, served_from, soon,
    static_config,
};

async fn metric(program: &Program, name: &str) -> f64 {
    metric_in(&get(program.api(), "/metrics").await.1, name, &[])
}

#[tokio::test]
async fn without_free_descriptors_ringway_keeps_its_connections_does_not_spin_and_recovers() {
    let server = Server::echo("a").await;
    let check = "health_check: { interval: 100ms }";
    let program = Program::start(&static_config(&[server.address], check)).await.ready().await;
    let mut established = loadtest::open(program.web(), 50).await.unwrap();
    for stream in &mut established {
        assert!(soon("an echo", echoes(stream)).await);
    }
    // The side port keeps its connection during the shortage.
    let limit = Rlimit { current: Some(256), maximum: Some(256) };
    prlimit(Some(program.pid()), Resource::Nofile, limit).unwrap();
    let crowd = loadtest::open(program.web(), 1000).await.unwrap();
    eventually_async("the shortage", async || {
        std::fs::read_dir(format!("/proc/{}/fd", program.pid().as_raw_nonzero())).unwrap().count() >= 255
    })
    .await;

    let before = program.cpu_ticks();
    // An accept loop that spins would use all of this time as CPU time.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let used = program.cpu_ticks() - before;
    assert!(used < 60, "Ringway spins: {used} ticks of 10 ms in 2 s");
    for stream in &mut established {
        assert!(soon("an echo in the shortage", echoes(stream)).await, "an established connection failed");
    }

    drop(crowd);
    let mut late = TcpStream::connect(program.web()).await.unwrap();
    assert!(soon("room again", echoes(&mut late)).await);
    assert!(metric(&program, "ringway_accept_errors_total").await > 0.0);
    assert_eq!(
        metric(&program, "ringway_health_checks_total{pool=\"echo\",backend=\"b0\",result=\"failed\"}").await,
        0.0
    );
    assert!(!program.log().contains("unhealthy"), "Ringway blames the backend for its own shortage");
    for stream in &mut established {
        assert!(soon("an echo after it", echoes(stream)).await);
    }
}

#[tokio::test]
async fn an_idle_connection_costs_little_memory() {
    const CONNECTIONS: usize = 4000;
    let server = Server::echo("a").await;
    let program = Program::start(&static_config(&[server.address], "health_check: { kind: none }")).await;
    // The first connections cause one-time allocations, which do not count.
    drop(loadtest::open(program.web(), 100).await.unwrap());
    eventually_async("none open", async || metric(&program, "ringway_connections_active").await == 0.0).await;
    let before = program.memory();
    // A connection costs more while Ringway connects for it, and a busy machine would let many of them pile up.
    let mut open = Vec::new();
    while open.len() < CONNECTIONS {
        open.extend(loadtest::open(program.web(), 50).await.unwrap());
        eventually_async("all served", async || {
            metric(&program, "ringway_backend_connections_active").await == open.len() as f64
        })
        .await;
    }
    let each = program.memory().saturating_sub(before) / CONNECTIONS as u64;
    println!("{each} bytes for each of {CONNECTIONS} idle connections");
    assert!(each <= 2000, "{each} bytes");
    drop(open);
}

#[tokio::test]
async fn a_source_over_its_limit_is_reset_and_others_are_not() {
    let server = Server::echo("a").await;
    let listener = "per_source: { max_connections: 3 }";
    let yaml = config_with(&server, listener, "health_check: { kind: none }");
    let ringway = Ringway::start(&yaml).await;
    let mut served = Vec::new();
    for _ in 0..10 {
        served.extend(served_from("127.0.0.2", ringway.web()).await);
    }
    assert_eq!(served.len(), 3);
    for n in 0..20 {
        assert!(served_from(&format!("127.0.1.{}", n + 1), ringway.web()).await.is_some());
    }
    let stats = std::sync::Arc::clone(&ringway.state().listeners[0].stats);
    assert_eq!(stats.refused(ringway::proxy::stats::RefusalReason::SourceConnections), 7);
    served.pop();
    eventually_async("room again", async || served_from("127.0.0.2", ringway.web()).await.is_some()).await;
}

#[tokio::test]
async fn a_source_that_connects_too_fast_is_reset_and_others_are_not() {
    let server = Server::echo("a").await;
    let yaml = config_with(&server, "per_source: { rate: 1, burst: 5 }", "health_check: { kind: none }");
    let ringway = Ringway::start(&yaml).await;
    let mut served = 0;
    let began = std::time::Instant::now();
    for n in 0..30 {
        served += u64::from(served_from("127.0.0.2", ringway.web()).await.is_some());
        assert!(served_from(&format!("127.0.2.{}", n + 1), ringway.web()).await.is_some());
    }
    let most = 5 + began.elapsed().as_secs() + 1;
    assert!((5..=most).contains(&served), "{served} of {most}");
    assert!(ringway.metric("ringway_connections_refused_total", &["source_rate"]).await >= 20.0);
}

#[tokio::test]
async fn a_full_backend_is_skipped_and_the_limit_is_exact() {
    let servers = [Server::echo("b0").await, Server::echo("b1").await];
    let addresses = servers.each_ref().map(|server| server.address);
    let yaml = static_config(&addresses, "health_check: { kind: none }\nmax_connections_per_backend: 20");
    let ringway = Ringway::start(&yaml).await;
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let web = ringway.web();
        clients.spawn(async move { served_from("127.0.0.1", web).await });
    }
    let open: Vec<_> = soon("all", clients.join_all()).await.into_iter().flatten().collect();
    assert_eq!(open.len(), 40);
    let active = |n| ringway.backend(n).live.active.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!((active(0), active(1)), (20, 20));
    assert_eq!(ringway.metric("ringway_connections_refused_total", &["backends_full"]).await, 60.0);
    assert!(ringway.metric("ringway_backends_full_total", &[]).await >= 60.0);
    drop(open);
    eventually_async("room again", async || served_from("127.0.0.1", ringway.web()).await.is_some()).await;
}

#[tokio::test]
async fn connections_over_a_listener_s_limit_wait_in_the_backlog_and_other_listeners_still_serve() {
    let server = Server::echo("a").await;
    let yaml = config_with(&server, "max_connections: 2", "health_check: { kind: none }");
    let yaml = yaml.replace("pools:\n", "  - { name: other, listen: \"127.0.0.1:0\", pool: echo }\npools:\n");
    let ringway = Ringway::start(&yaml).await;
    let open = loadtest::open(ringway.web(), 5).await.unwrap();
    let active = || ringway.state().listeners[0].stats.active();
    eventually_async("two", async || active() == 2).await;
    assert!(served_from("127.0.0.1", ringway.state().listeners[1].address.ip().unwrap()).await.is_some());
    assert_eq!(active(), 2);
    // Ringway serves the waiting connections as soon as there is room.
    let mut clients = tokio::task::JoinSet::new();
    for mut stream in open {
        clients.spawn(async move { assert!(soon("an echo", echoes(&mut stream)).await) });
    }
    soon("all five", clients.join_all()).await;
}

#[tokio::test]
async fn a_connection_that_is_too_old_is_reset() {
    let server = Server::echo("a").await;
    let yaml = static_config(&[server.address], "health_check: { kind: none }\ntimeouts: { max_connection_age: 2s }");
    let ringway = Ringway::start(&yaml).await;
    let mut stream = TcpStream::connect(ringway.web()).await.unwrap();
    let began = std::time::Instant::now();
    let mut ended = None;
    while ended.is_none() {
        // The test sends every 20 ms, so an idle timeout cannot be the reason of the reset.
        ended = (!soon("an echo", echoes(&mut stream)).await).then(|| began.elapsed());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(ended.unwrap() >= Duration::from_millis(1800), "{ended:?}");
    assert_eq!(ringway.metric("ringway_connections_ended_total", &["max_connection_age"]).await, 1.0);
}

/// The test runs itself again in a network namespace with 32 ephemeral ports, which needs root.
#[tokio::test]
#[ignore = "needs root"]
async fn without_ephemeral_ports_ringway_blames_no_backend_and_recovers() {
    const NAME: &str = "limits::without_ephemeral_ports_ringway_blames_no_backend_and_recovers";
    if !in_namespace(NAME, "echo 40000 40031 > /proc/sys/net/ipv4/ip_local_port_range").await {
        return;
    }
    let server = Server::echo("a").await;
    let pool = "health_check: { kind: tcp, interval: 50ms, timeout: 1s, fall: 1 }\nejection: { after: 1 }";
    let ringway = Ringway::start(&static_config(&[server.address], pool)).await.all_healthy().await;
    // Each client has its own address and so 32 ports. Ringway has 32 ports for all backend connections.
    let mut open = Vec::new();
    for n in 0..40 {
        open.extend(served_from(&format!("127.0.3.{}", n + 1), ringway.web()).await);
    }
    assert!((1..=32).contains(&open.len()), "{} were served", open.len());
    let short = async || ringway.metric("ringway_connect_failures_total", &["no_ports"]).await;
    assert!(short().await >= (40 - open.len()) as f64);
    // The checks find no port either. A check without a port does not count as failed.
    let checks = ringway.metric("ringway_health_checks_total", &["failed"]).await;
    // About ten checks run in this time, and each would count as failed.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(ringway.metric("ringway_health_checks_total", &["failed"]).await, checks);
    assert_eq!(ringway.metric("ringway_backend_ejections_total", &[]).await, 0.0);
    assert_eq!(ringway.states(), [State::Healthy]);
    drop(open);
    eventually_async("room again", async || served_from("127.0.4.1", ringway.web()).await.is_some()).await;
}

/// A config with one static backend. `listener` and `pool` are further lines of the listener and the pool.
fn config_with(server: &Server, listener: &str, pool: &str) -> String {
    config(&format!("static: [{{ address: \"{}\", id: b0 }}]", server.address), listener, pool)
}

/// The backend's address answers no handshake.
#[tokio::test]
async fn clients_that_have_gone_hold_no_permits_while_ringway_connects_for_them() {
    let silent = Silent::new();
    let listener = "max_connections: 20";
    let provider = format!("static: [{{ address: \"{}\", id: b0 }}]", silent.address);
    let pool = "health_check: { kind: none }\nconnect: { timeout: 1m, attempts: 1 }";
    let ringway = Ringway::start(&config(&provider, listener, pool)).await;
    let stats = ringway.state().listeners[0].stats.clone();
    let active = || stats.active();
    let clients = loadtest::open(ringway.web(), 20).await.unwrap();
    eventually("all wait", || active() == 20).await;
    // The end of its stream is no reason to give a client up.
    let mut patient = TcpStream::connect(ringway.web()).await.unwrap();
    patient.shutdown().await.unwrap();
    for client in &clients {
        client.set_zero_linger().unwrap();
    }
    drop(clients);
    eventually("only the patient one waits", || active() == 1 && stats.ended(EndReason::ClientReset) == 20).await;
    assert_eq!(stats.refused(RefusalReason::ConnectFailed), 0);
}

/// A client that reads nothing blocks its stream, with a pipe full of bytes.
#[tokio::test]
async fn slow_readers_do_not_keep_the_pipes_from_others() {
    const BULK: usize = 64 << 20;
    let server = Server::start(|mut stream| async move {
        let block = vec![b'x'; 256 * 1024];
        for _ in 0..BULK / block.len() {
            if stream.write_all(&block).await.is_err() {
                return;
            }
        }
    })
    .await;
    let yaml = static_config(&[server.address], "health_check: { kind: none }").replace("workers: 2", "workers: 1");
    let ringway = Ringway::start(&format!("relay: {{ max_pipes: 2 }}\n{yaml}")).await.ready().await;
    let bytes = async |path: &str| ringway.metric("ringway_bytes_total", &["to_client", path]).await;
    let mut idle = Vec::new();
    for _ in 0..8 {
        idle.push(TcpStream::connect(ringway.web()).await.unwrap());
    }
    eventually_async("spliced bytes of the slow readers", async || bytes("spliced").await > 1e6).await;
    eventually_async("an honest stream is spliced", async || {
        let before = (bytes("spliced").await, bytes("copied").await);
        let mut client = TcpStream::connect(ringway.web()).await.unwrap();
        let mut sink = vec![0; 256 * 1024];
        let mut read = 0;
        while read < BULK {
            read += soon("bytes", client.read(&mut sink)).await.unwrap();
        }
        drop(client);
        let after = (bytes("spliced").await, bytes("copied").await);
        after.0 - before.0 > 0.9 * BULK as f64 && after.1 - before.1 < 0.1 * BULK as f64
    })
    .await;
    // The slow readers have lost nothing.
    for mut client in idle {
        let mut read = Vec::new();
        soon("the rest", client.read_to_end(&mut read)).await.unwrap();
        assert!(read.len() == BULK && read.iter().all(|&byte| byte == b'x'), "{} bytes", read.len());
    }
}

#[tokio::test]
async fn a_reload_keeps_the_counts_of_source_addresses() {
    let server = Server::echo("a").await;
    let yaml = |limit: &str| {
        let provider = format!("static: [{{ address: \"{}\", id: b0 }}]", server.address);
        config(&provider, &format!("per_source: {{ max_connections: {limit} }}"), "health_check: { kind: none }")
    };
    let ringway = Ringway::start(&yaml("2")).await.ready().await;
    // The reset of a refused connection may come during the connect.
    let connect = async || {
        let mut stream = TcpStream::connect(ringway.web()).await.ok()?;
        soon("an answer", echoes(&mut stream)).await.then_some(stream)
    };
    let _open = (connect().await.unwrap(), connect().await.unwrap());
    assert!(connect().await.is_none());
    ringway.reload(&yaml("3")).await.unwrap();
    let third = connect().await.unwrap();
    assert!(connect().await.is_none(), "the first two are forgotten");
    ringway.reload(&yaml("off")).await.unwrap();
    assert!(ringway.state().listeners[0].sources.is_some(), "the metrics forget sources that were not tracked");
    let _not_counted = connect().await.unwrap();
    ringway.reload(&yaml("3")).await.unwrap();
    assert!(connect().await.is_none(), "the first three are forgotten");
    drop(third);
    eventually_async("room for another one", async || connect().await.is_some()).await;
}

#[tokio::test]
async fn a_renamed_listener_keeps_its_connections_in_its_counters() {
    let server = Server::echo("a").await;
    let yaml = static_config(&[server.address], "health_check: { kind: none }").replacen(
        "listen: 127.0.0.1:0\n",
        &format!("listen: 127.0.0.1:{}\n", free_port()),
        1,
    );
    let ringway = Ringway::start(&yaml).await.ready().await;
    let open = loadtest::open(ringway.web(), 5).await.unwrap();
    let active = || ringway.state().listeners[0].stats.active();
    eventually("open", || active() == 5).await;
    ringway.reload(&yaml.replacen("name: web", "name: renamed", 1)).await.unwrap();
    assert_eq!((&*ringway.state().listeners[0].name, active()), ("renamed", 5));
    drop(open);
    eventually("ended", || active() == 0).await;
    assert_eq!(ringway.state().listeners[0].stats.total_ended(), 5);
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
