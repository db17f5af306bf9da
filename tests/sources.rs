//! Where connections to backends come from.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};

use ringway::backend::State;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};

use crate::harness::backends::Server;
use crate::harness::{Ringway, echoes, eventually, eventually_async, in_namespace, served_from, soon, static_config};

/// A server that remembers from where clients come. It says hello and then echoes.
struct Witness {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<IpAddr>>>,
    task: JoinHandle<()>,
}

impl Witness {
    async fn start(hello: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, seen) = (listener.local_addr().unwrap(), Arc::new(Mutex::new(Vec::new())));
        let witnessed = Arc::clone(&seen);
        let task = tokio::spawn(async move {
            while let Ok((mut stream, client)) = listener.accept().await {
                witnessed.lock().unwrap().push(client.ip());
                tokio::spawn(async move {
                    let (mut reader, mut writer) = stream.split();
                    let _ = writer.write_all(hello.as_bytes()).await;
                    let _ = tokio::io::copy(&mut reader, &mut writer).await;
                });
            }
        });
        Self { address, seen, task }
    }

    /// Takes the addresses of the clients so far.
    fn clients(&self) -> Vec<IpAddr> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[tokio::test]
async fn connections_checks_and_questions_come_from_the_pool_s_source_addresses() {
    let (server, agent) = (Witness::start("").await, Witness::start("100%\n").await);
    let agent_port = agent.address.port();
    let yaml = |source: &str| {
        let pool = format!(
            "key: source_ip\nconnect: {{ source: {source} }}\nhealth_check: {{ kind: expect, send: \"?\", expect: \"?\", interval: 100ms }}\n\
             agent: {{ port: {agent_port}, interval: 100ms }}"
        );
        static_config(&[server.address], &pool)
    };
    let ringway = Ringway::start(&yaml("[127.0.0.7, 127.0.0.8]")).await.all_healthy().await;
    let ours: BTreeSet<IpAddr> = ["127.0.0.7", "127.0.0.8"].map(|ip| ip.parse().unwrap()).into();
    eventually("an answer of the agent", || ringway.backend(0).advice.is_some()).await;
    let checks: BTreeSet<_> = server.clients().into_iter().collect();
    assert!(checks.is_subset(&ours) && checks.len() == 1, "the checks of a backend have one source: {checks:?}");
    assert!(agent.clients().iter().all(|ip| ours.contains(ip)));

    // Without checks, only connections are left.
    let without =
        |source: &str| yaml(source).replace("kind: expect, send: \"?\", expect: \"?\", interval: 100ms", "kind: none");
    ringway.reload(&without("[127.0.0.7, 127.0.0.8]")).await.unwrap();
    server.clients();
    let mut of_client = BTreeMap::new();
    for round in 0..2 {
        for n in 1..=30_u8 {
            drop(served_from(&format!("127.0.5.{n}"), ringway.web()).await.expect("an echo"));
            // A check that was on its way may have come before it.
            let source = server.clients().pop().unwrap();
            let before = of_client.insert(n, source);
            assert!(round == 0 || before == Some(source), "a client keeps its source address");
        }
    }
    assert_eq!(of_client.values().copied().collect::<BTreeSet<_>>(), ours, "clients are spread over the addresses");

    // An address that this machine does not have is an error, and the old one stays.
    let error = ringway.reload(&without("198.51.100.1")).await.unwrap_err().to_string();
    assert!(
        error.contains("pools[echo].connect.source: 198.51.100.1: this machine does not have that address"),
        "{error}"
    );
    drop(served_from("127.0.5.1", ringway.web()).await.expect("an echo"));
    assert_eq!(server.clients(), [of_client[&1]]);
    ringway.reload(&without("127.0.0.9")).await.unwrap();
    drop(served_from("127.0.5.1", ringway.web()).await.expect("an echo"));
    assert_eq!(server.clients(), ["127.0.0.9".parse::<IpAddr>().unwrap()]);
    let error = Ringway::try_start(&without("[127.0.0.1, 198.51.100.1]")).await.err().unwrap();
    assert!(error.contains("pools[echo].connect.source: 198.51.100.1: this machine"), "{error}");
}

/// Each backend has 100 ports for each of 3 source addresses. Ports that were taken for all backends together would allow 300
/// connections to both.
#[tokio::test]
#[ignore = "needs root"]
async fn each_source_address_has_all_ports_for_each_backend() {
    const NAME: &str = "sources::each_source_address_has_all_ports_for_each_backend";
    if !in_namespace(NAME, ":").await {
        return;
    }
    let servers = [Server::echo("a").await, Server::echo("b").await];
    let pool = "connect: { source: [127.0.2.1, 127.0.2.2, 127.0.2.3] }\nhealth_check: { kind: none }";
    let ringway = Ringway::start(&static_config(&servers.each_ref().map(|server| server.address), pool)).await;
    // The ports on which somebody listens are not among these.
    std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "20000 20099").unwrap();
    let web = ringway.web();
    let mut clients = JoinSet::new();
    for n in 0..600_u16 {
        clients.spawn(async move { served_from(&format!("127.0.{}.{}", 3 + n / 200, 1 + n % 200), web).await });
    }
    let mut open: Vec<_> = soon("600 connections", clients.join_all()).await.into_iter().flatten().collect();
    assert_eq!(open.len(), 600);
    for stream in &mut open {
        assert!(soon("an echo", echoes(stream)).await);
    }
    // There is no port left. The metric names the addresses that were tried.
    assert!(served_from("127.0.9.1", web).await.is_none());
    for source in ["127.0.2.1", "127.0.2.2", "127.0.2.3"] {
        assert!(ringway.metric("ringway_connect_source_skipped_total", &[source]).await >= 2.0, "{source}");
    }
    assert!(ringway.metric("ringway_connect_failures_total", &["no_ports"]).await >= 1.0);
    assert_eq!(ringway.states(), [State::Healthy; 2]);
    drop(open);
    eventually_async("room again", async || served_from("127.0.9.1", web).await.is_some()).await;
}

/// In the namespace, packets with the mark 7 have no route, and d0 is an interface behind which nobody is.
#[tokio::test]
#[ignore = "needs root"]
async fn packets_to_backends_have_the_pool_s_mark_interface_and_congestion_control() {
    const NAME: &str = "sources::packets_to_backends_have_the_pool_s_mark_interface_and_congestion_control";
    const SETUP: &str = "ip rule add pref 20 lookup local; ip rule del pref 0; ip rule add pref 10 fwmark 7 unreachable; \
                         ip link add d0 type veth peer name d1; ip link set d0 up; ip link set d1 up; ip address add 10.9.0.1/24 dev d0";
    if !in_namespace(NAME, SETUP).await {
        return;
    }
    let server = Server::echo("a").await;
    for (connect, state, cause) in [
        ("mark: 7", State::Unhealthy, "unreachable"),
        ("mark: 8", State::Healthy, ""),
        ("interface: d0", State::Unhealthy, "timeout"),
        ("interface: lo", State::Healthy, ""),
        ("congestion: reno", State::Healthy, ""),
        ("mark: 8, interface: lo, congestion: reno, source: 127.0.0.9", State::Healthy, ""),
    ] {
        let pool = format!(
            "connect: {{ {connect}, timeout: 500ms }}\npanic_threshold: 0\nhealth_check: {{ kind: tcp, interval: 100ms, timeout: 100ms, fall: 1 }}"
        );
        let ringway = Ringway::start(&static_config(&[server.address], &pool)).await;
        eventually(connect, || ringway.states() == [state]).await;
        // The data plane does as the checks do.
        let ringway = Ringway::start(&static_config(
            &[server.address],
            &pool.replace("kind: tcp, interval: 100ms, timeout: 100ms, fall: 1", "kind: none"),
        ))
        .await;
        let served = served_from("127.0.0.1", ringway.web()).await;
        assert_eq!(served.is_some(), state == State::Healthy, "{connect}");
        if state == State::Unhealthy {
            assert!(ringway.metric("ringway_connect_failures_total", &[cause]).await >= 1.0, "{connect}");
        }
        if connect.contains("congestion") {
            let sockets =
                std::process::Command::new("ss").args(["-tin", &format!("dport = {}", server.address.port())]).output();
            let text = String::from_utf8(sockets.unwrap().stdout).unwrap();
            assert!(text.contains(" reno "), "{connect}: {text}");
        }
    }
}
