//! The provider `dns`: a pool's backends follow a name, through every outage of name servers.

mod outages;
mod services;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::{RData, RecordType};
use ringway::backend::State;
use ringway::control::command::Command;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use crate::harness::backends::{Server, free_ports};
use crate::harness::name_server::{NameServer, Reply, a, aaaa, cname, only, srv};
use crate::harness::program::{Program, file};
use crate::harness::{Ringway, config, echoes, eventually, eventually_async, get, http, skip, soon};

/// Keys of a provider that asks this server, quickly.
fn quick(server: &NameServer) -> String {
    format!("servers: [\"{}\"], refresh: {{ min: 100ms, max: 1s }}, timeout: 300ms, gone_after: 500ms", server.address)
}

/// A pool of the addresses of `web.test.`.
fn addresses(server: &NameServer, port: u16) -> String {
    with(&format!("dns: {{ name: web.test., port: {port}, {} }}", quick(server)))
}

fn with(provider: &str) -> String {
    // A client that has gone does not delay the end of a test with a long drain.
    config(provider, "", "health_check: { interval: 50ms, fall: 1, rise: 1 }\ntimeouts: { half_closed: 100ms }")
}

/// Replies with these A records and no AAAA record.
fn hosts(ttl: u32, addresses: &[&str]) -> impl FnMut(&str, RecordType) -> Reply + Send + 'static {
    let records: Vec<RData> = addresses.iter().map(|address| a(address)).collect();
    move |_, kind| only(RecordType::A, kind, ttl, records.clone())
}

/// Demo backends on one port of these addresses.
async fn echo_at(hosts: &[&str]) -> (u16, Vec<Server>) {
    let [port] = free_ports();
    let mut servers = Vec::new();
    for host in hosts {
        servers.push(Server::echo_at(&format!("{host}:{port}")).await);
    }
    (port, servers)
}

/// The ids of the backends that stay.
fn ids(ringway: &Ringway) -> Vec<String> {
    let table = ringway.state().pools[0].table.load();
    let stays = table.backends().iter().filter(|backend| !backend.drain.is_some_and(|drain| drain.leaves));
    stays.map(|backend| backend.id.to_string()).collect()
}

async fn become_ids(ringway: &Ringway, expected: &[String]) {
    eventually(&format!("{expected:?}"), || ids(ringway) == expected).await;
}

fn at(hosts: &[&str], port: u16) -> Vec<String> {
    hosts.iter().map(|host| format!("{host}:{port}")).collect()
}

/// The number of times that the pool's name has been looked up with this result.
async fn looked_up(ringway: &Ringway, result: &str) -> f64 {
    ringway.metric("ringway_dns_lookups_total", &[&format!("result=\"{result}\"")]).await
}

/// Waits for three more look-ups with this result.
async fn three_more(ringway: &Ringway, result: &str) {
    let before = looked_up(ringway, result).await;
    eventually_async(result, async || looked_up(ringway, result).await >= before + 3.0).await;
}

#[tokio::test]
async fn the_backends_follow_the_addresses_of_a_name() {
    let (port, _servers) = echo_at(&["127.0.0.2", "127.0.0.3", "127.0.0.4"]).await;
    let dns = NameServer::start(hosts(0, &["127.0.0.3", "127.0.0.2"]));
    let ringway = Ringway::start(&addresses(&dns, port)).await.all_healthy().await;
    assert_eq!(ids(&ringway), at(&["127.0.0.2", "127.0.0.3"], port));
    let before = ringway.mapping();
    assert!(soon("an echo", echoes(&mut TcpStream::connect(ringway.web()).await.unwrap())).await);

    // The order has no meaning, and an address that comes twice is one backend.
    let generation = ringway.state().pools[0].table.load().generation();
    dns.now(hosts(0, &["127.0.0.2", "127.0.0.3", "127.0.0.2"]));
    three_more(&ringway, "found").await;
    assert_eq!(ringway.state().pools[0].table.load().generation(), generation);

    dns.now(hosts(0, &["127.0.0.4", "127.0.0.3", "127.0.0.2"]));
    become_ids(&ringway, &at(&["127.0.0.2", "127.0.0.3", "127.0.0.4"], port)).await;
    let ringway = ringway.all_healthy().await;
    let third = format!("127.0.0.4:{port}");
    assert!(ringway.mapping().iter().all(|(key, owner)| *owner == before[key] || *owner == third));

    dns.now(hosts(0, &["127.0.0.4", "127.0.0.3"]));
    become_ids(&ringway, &at(&["127.0.0.3", "127.0.0.4"], port)).await;
    assert_eq!(ringway.metric("ringway_provider_changes_total", &["kind=\"joined\""]).await, 3.0);
    assert_eq!(ringway.metric("ringway_provider_changes_total", &["kind=\"left\""]).await, 1.0);
    assert_eq!(ringway.metric("ringway_dns_addresses", &["pool=\"echo\""]).await, 2.0);
}

#[tokio::test]
async fn long_answers_come_over_tcp() {
    let dns = NameServer::start(|_, kind| {
        let all = (0..500_u16).map(|n| a(&format!("127.1.{}.{}", n / 250, n % 250 + 1))).collect();
        Reply::LongerThanUdp(Box::new(only(RecordType::A, kind, 60, all)))
    });
    let provider = format!("dns: {{ name: web.test., port: 9, {} }}", quick(&dns));
    let ringway = Ringway::start(&config(&provider, "", "health_check: { kind: none }")).await;
    assert_eq!(ids(&ringway).len(), 500);
}

#[tokio::test]
async fn answers_with_a_part_of_the_addresses_lead_to_all_of_them() {
    let round = AtomicUsize::new(0);
    let dns = NameServer::start(move |_, kind| {
        let first = if kind == RecordType::A { round.fetch_add(8, Ordering::Relaxed) } else { 0 };
        let part = (first..first + 8).map(|n| a(&format!("127.1.0.{}", n % 20 + 1))).collect();
        only(RecordType::A, kind, 0, part)
    });
    let provider = format!("dns: {{ name: web.test., port: 9, {} }}", quick(&dns).replace("500ms", "30s"));
    let ringway = Ringway::start(&config(&provider, "", "health_check: { kind: none }")).await;
    eventually("20 backends", || ids(&ringway).len() == 20).await;
    for _ in 0..3 {
        three_more(&ringway, "found").await;
    }
    assert_eq!(ids(&ringway).len(), 20);
    assert_eq!(ringway.metric("ringway_provider_changes_total", &["kind=\"left\""]).await, 0.0);
}

#[tokio::test]
async fn names_lead_to_other_names() {
    let (port, _servers) = echo_at(&["127.0.0.2"]).await;
    // In one answer, and in several.
    let chain = |name: &str, kind| match name {
        "web.test." => Reply::Records(0, vec![cname("WEB.other.test."), cname("real.test.")]),
        "real.test." => only(RecordType::A, kind, 0, vec![a("127.0.0.2")]),
        _ => Reply::Records(0, Vec::new()),
    };
    let dns = NameServer::start(chain);
    let ringway = Ringway::start(&addresses(&dns, port)).await.all_healthy().await;
    assert_eq!(ids(&ringway), at(&["127.0.0.2"], port));
    // A circle has no end, and is no answer.
    let circles = [vec![cname("web.test.")], vec![cname("two.test.")], vec![cname("two.test."), cname("web.test.")]];
    for circle in circles {
        let back = vec![cname("web.test.")];
        dns.now(move |name, _| Reply::Records(0, if name == "web.test." { circle.clone() } else { back.clone() }));
        three_more(&ringway, "failed").await;
    }
    // So is a chain without an address, but that is an answer.
    assert_eq!(ids(&ringway).len(), 1);
    dns.now(|name, _| Reply::Records(0, if name == "web.test." { vec![cname("real.test.")] } else { Vec::new() }));
    become_ids(&ringway, &[]).await;
    dns.now(chain);
    become_ids(&ringway, &at(&["127.0.0.2"], port)).await;
}

#[tokio::test]
async fn a_firewall_may_stop_udp() {
    let (port, _servers) = echo_at(&["127.0.0.2"]).await;
    let dns = NameServer::start(|_, kind| Reply::OnlyTcp(Box::new(only(RecordType::A, kind, 0, vec![a("127.0.0.2")]))));
    let ringway = Ringway::start(&addresses(&dns, port)).await;
    assert_eq!(ids(&ringway), at(&["127.0.0.2"], port));
}

#[tokio::test]
async fn an_answer_that_no_server_can_have_is_ignored() {
    let dns = NameServer::start(hosts(0, &["0.0.0.0", "255.255.255.255", "224.0.0.1", "127.0.0.2"]));
    let ringway = Ringway::start(&addresses(&dns, 9)).await;
    assert_eq!(ids(&ringway), ["127.0.0.2:9"]);
}

#[tokio::test]
async fn one_of_several_servers_is_enough() {
    let (port, _servers) = echo_at(&["127.0.0.2"]).await;
    for reply in [Reply::Code(ResponseCode::ServFail), Reply::Code(ResponseCode::Refused), Reply::Silent] {
        let bad = NameServer::start(move |_, _| reply.clone());
        let good = NameServer::start(hosts(0, &["127.0.0.2"]));
        let servers = format!("servers: [\"{}\", \"{}\"]", bad.address, good.address);
        let yaml = addresses(&good, port).replace(&format!("servers: [\"{}\"]", good.address), &servers);
        let ringway = Ringway::start(&yaml).await;
        assert_eq!(ids(&ringway), at(&["127.0.0.2"], port));
    }
}

/// A start does not fail because a name server is away: a machine may start before it.
#[tokio::test]
async fn a_pool_without_an_answer_starts_empty_and_fills() {
    let (port, _servers) = echo_at(&["127.0.0.2"]).await;
    let dns = NameServer::start(|_, _| Reply::Silent);
    let ringway = Ringway::start(&addresses(&dns, port)).await;
    assert!(ids(&ringway).is_empty());
    assert_eq!(get(ringway.api(), "/readyz").await.0, 503);
    dns.now(hosts(0, &["127.0.0.2"]));
    let ringway = ringway.ready().await;
    assert_eq!(ids(&ringway), at(&["127.0.0.2"], port));
    assert_eq!(get(ringway.api(), "/readyz").await.0, 200);
}

#[tokio::test]
async fn all_addresses_change_under_load_and_no_connection_fails() {
    let (port, old) = echo_at(&["127.0.0.2", "127.0.0.3"]).await;
    let dns = NameServer::start(hosts(0, &["127.0.0.2", "127.0.0.3"]));
    let yaml = format!("{}\n    drain: 5s", addresses(&dns, port).replace("    drain: 100ms\n", ""));
    let ringway = Ringway::start(&yaml).await.all_healthy().await;
    let (web, done) = (ringway.web(), Arc::new(AtomicUsize::new(0)));
    let stop = CancellationToken::new();
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (done, stop) = (Arc::clone(&done), stop.clone());
            tokio::spawn(async move {
                while !stop.is_cancelled() {
                    let mut stream = TcpStream::connect(web).await.unwrap();
                    assert!(soon("an echo", echoes(&mut stream)).await, "a connection failed");
                    done.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            })
        })
        .collect();
    let mut new = Vec::new();
    for host in ["127.0.0.4", "127.0.0.5"] {
        new.push(Server::echo_at(&format!("{host}:{port}")).await);
    }
    dns.now(hosts(0, &["127.0.0.4", "127.0.0.5"]));
    become_ids(&ringway, &at(&["127.0.0.4", "127.0.0.5"], port)).await;
    let table = || ringway.state().pools[0].table.load();
    eventually("the old backends have left", || table().backends().len() == 2).await;
    drop(old);
    let before = done.load(Ordering::Relaxed);
    eventually("more connections", || done.load(Ordering::Relaxed) > before + 100).await;
    stop.cancel();
    for client in clients {
        soon("the end of a client", client).await.unwrap();
    }
}

/// The TTL of the answer is ten minutes, and the new server is a backend at once.
#[tokio::test]
async fn a_failing_backend_is_a_reason_to_ask() {
    let (port, mut servers) = echo_at(&["127.0.0.2"]).await;
    let dns = NameServer::start(hosts(600, &["127.0.0.2"]));
    let yaml = addresses(&dns, port).replace("max: 1s", "max: 1h");
    let ringway = Ringway::start(&yaml).await.all_healthy().await;
    let _new = Server::echo_at(&format!("127.0.0.3:{port}")).await;
    dns.now(hosts(600, &["127.0.0.3"]));
    servers.clear();
    become_ids(&ringway, &at(&["127.0.0.3"], port)).await;
}

#[tokio::test]
async fn a_reload_asks_at_once_and_another_name_drains_the_backends_of_the_old_one() {
    let (port, _servers) = echo_at(&["127.0.0.2", "127.0.0.3"]).await;
    let dns = NameServer::start(|name, kind| {
        let address = if name == "web.test." { "127.0.0.2" } else { "127.0.0.3" };
        only(RecordType::A, kind, 86_400, vec![a(address)])
    });
    let yaml = addresses(&dns, port).replace("max: 1s", "max: 1h");
    let ringway = Ringway::start(&yaml).await.all_healthy().await;
    let before = dns.asked("web.test.", RecordType::A);
    ringway.reload(&yaml).await.unwrap();
    eventually("another look-up", || dns.asked("web.test.", RecordType::A) > before).await;
    let mut open = TcpStream::connect(ringway.web()).await.unwrap();
    assert!(soon("an echo", echoes(&mut open)).await);
    // Other servers are asked from now on, although the old one still answers.
    let second = NameServer::start(|_, kind| only(RecordType::A, kind, 86_400, vec![a("127.0.0.2")]));
    let elsewhere = yaml.replace(&dns.address.to_string(), &second.address.to_string());
    ringway.reload(&elsewhere).await.unwrap();
    eventually("a look-up there", || second.asked("web.test.", RecordType::A) > 0).await;
    ringway.reload(&yaml).await.unwrap();
    // A name that nobody answers for is refused, and nothing changes.
    let away = yaml.replace("web.test.", "other.test.").replace(&dns.address.to_string(), "127.0.0.1:9");
    let error = ringway.reload(&away).await.unwrap_err().to_string();
    assert!(error.contains("pools[echo].provider.dns: the look-up failed: other.test. A: 127.0.0.1:9"), "{error}");
    assert_eq!(ids(&ringway), at(&["127.0.0.2"], port));
    let other = yaml.replace("web.test.", "other.test.").replace("drain: 100ms", "drain: 1h");
    ringway.reload(&other).await.unwrap();
    become_ids(&ringway, &at(&["127.0.0.3"], port)).await;
    assert!(soon("an echo of the old backend", echoes(&mut open)).await);
    let mut new = TcpStream::connect(ringway.web()).await.unwrap();
    assert!(soon("an echo of the new backend", echoes(&mut new)).await);
}

/// The successor knows what the old process knew, even if no name server answers it.
#[tokio::test]
async fn an_upgrade_keeps_the_backends_while_the_name_server_is_away() {
    let (port, _servers) = echo_at(&["127.0.0.2", "127.0.0.3"]).await;
    let dns = NameServer::start(hosts(0, &["127.0.0.2", "127.0.0.3"]));
    let mut program = Program::start(&addresses(&dns, port)).await.ready().await;
    dns.now(|_, _| Reply::Code(ResponseCode::ServFail));
    program.upgrade().await;
    let status = program.status().await;
    let backends = status["pools"][0]["backends"].as_array().unwrap().clone();
    let known: Vec<_> = backends.iter().map(|backend| backend["id"].as_str().unwrap().to_owned()).collect();
    assert_eq!(known, at(&["127.0.0.2", "127.0.0.3"], port));
    assert!(soon("an echo", echoes(&mut TcpStream::connect(program.web()).await.unwrap())).await);
    dns.now(hosts(0, &["127.0.0.2"]));
    eventually_async("one backend", async || {
        program.status().await["pools"][0]["backends"].as_array().unwrap().len() == 1
    })
    .await;
}

#[tokio::test]
async fn a_drain_lasts_while_a_backend_leaves_and_comes_back() {
    let (port, _servers) = echo_at(&["127.0.0.2", "127.0.0.3"]).await;
    let dns = NameServer::start(hosts(0, &["127.0.0.2", "127.0.0.3"]));
    let yaml = addresses(&dns, port).replace("drain: 100ms", "drain: 1h");
    let ringway = Ringway::start(&yaml).await.all_healthy().await;
    let backend = format!("127.0.0.2:{port}");
    // A connection to it, with which it stays while it leaves.
    let mut open = Vec::new();
    eventually_async("a connection to it", async || {
        let mut stream = TcpStream::connect(ringway.web()).await.unwrap();
        assert!(soon("an echo", echoes(&mut stream)).await);
        open.push(stream);
        ringway.backend(0).live.active.load(Ordering::Relaxed) > 0
    })
    .await;
    let drain = Command::Drain { pool: "echo".into(), backend: backend.clone(), within: None };
    ringway.send(drain).await.unwrap();
    dns.now(hosts(0, &["127.0.0.3"]));
    become_ids(&ringway, &at(&["127.0.0.3"], port)).await;
    assert!(ringway.backend(0).drain.unwrap().leaves);
    dns.now(hosts(0, &["127.0.0.2", "127.0.0.3"]));
    become_ids(&ringway, &at(&["127.0.0.2", "127.0.0.3"], port)).await;
    assert!(ringway.backend(0).drain.is_some_and(|drain| !drain.leaves), "the drain is lost");
}

#[tokio::test]
async fn a_short_name_has_the_domains_of_the_system() {
    if !rustix::process::geteuid().is_root() {
        skip("only root can give a process its own /etc/resolv.conf");
        return;
    }
    let (port, _servers) = echo_at(&["127.0.0.2"]).await;
    let dns = NameServer::start_at("127.0.0.154:53", |name, kind| match name {
        "web.second.test." => only(RecordType::A, kind, 60, vec![a("127.0.0.2")]),
        _ => Reply::Code(ResponseCode::NXDomain),
    });
    let resolver = file("nameserver 127.0.0.154\nsearch first.test second.test\n");
    let hosts = file("127.0.0.1 localhost\n");
    let yaml = with(&format!("dns: {{ name: web, port: {port} }}"));
    let program = Program::start_with_names(&yaml, hosts.path(), resolver.path()).await.ready().await;
    assert_eq!(program.status().await["pools"][0]["backends"][0]["id"], format!("127.0.0.2:{port}"));
    assert_eq!(dns.names(), ["web.first.test.", "web.second.test."]);
    assert_eq!(http(program.web(), "GET", "/heartbeat", b"").await.status(), 200);
}
