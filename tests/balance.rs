//! Bounded loads and least connections: how connections are spread while clients, weights and the config change.

use std::collections::BTreeMap;

use serde_json::Value;
use tokio::net::TcpStream;

use crate::harness::backends::Server;
use crate::harness::program::run;
use crate::harness::{Ringway, echoes, eventually, get, metric_in, soon, static_config};
use ringway::control::command::Command;

fn yaml(servers: &[Server], more: &str) -> String {
    let addresses: Vec<_> = servers.iter().map(|server| server.address).collect();
    static_config(&addresses, &format!("health_check: {{ kind: none }}\n{more}"))
}

async fn pool(servers: &[Server], more: &str) -> Ringway {
    Ringway::start(&yaml(servers, more)).await.ready().await
}

/// Opens connections and keeps them open.
async fn open(ringway: &Ringway, count: usize) -> Vec<TcpStream> {
    let mut streams = Vec::new();
    for _ in 0..count {
        let mut stream = TcpStream::connect(ringway.web()).await.unwrap();
        assert!(soon("an echo", echoes(&mut stream)).await);
        streams.push(stream);
    }
    streams
}

async fn status(ringway: &Ringway) -> Value {
    let status: Value = serde_json::from_str(&get(ringway.api(), "/api/status").await.1).unwrap();
    status["pools"][0].clone()
}

/// The open connections of each backend.
fn active(ringway: &Ringway) -> BTreeMap<String, u64> {
    let table = ringway.state().pools[0].table.load();
    let active = |one: &ringway::backend::Backend| one.live.active.load(std::sync::atomic::Ordering::Relaxed);
    table.backends().iter().map(|one| (one.id.to_string(), active(one))).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bound_holds_for_one_client_and_over_reloads_and_changes_of_weights() {
    let servers = Server::echoes(3).await;
    let bounded = "key: source_ip\nring: { bound: 125 }";
    let ringway = pool(&servers, bounded).await;
    let explain = async || get(ringway.api(), "/api/explain?from=127.0.0.1").await.1;
    let owner: Value = serde_json::from_str(&explain().await).unwrap();
    let owner = owner["pool"]["backend"].as_str().unwrap().to_owned();
    let mut streams = open(&ringway, 30).await;
    // 30 · 1.25 / 3 = 12.5
    let now = active(&ringway);
    assert!(now.values().sum::<u64>() == 30 && now[&owner] == 13 && now.values().all(|&one| one <= 13), "{now:?}");

    let shown = status(&ringway).await;
    assert_eq!((&shown["balance"], &shown["bound"]), (&"ring".into(), &125.into()));
    let backends = shown["backends"].as_array().unwrap();
    // 31 · 1.25 / 3 = 12.9
    assert!(backends.iter().all(|one| one["limit"] == 13), "{backends:?}");
    let displaced: u64 = backends.iter().map(|one| one["connections"]["displaced"].as_u64().unwrap()).sum();
    let of_owner = backends.iter().find(|one| one["id"] == owner.as_str()).unwrap();
    assert_eq!((displaced, &of_owner["connections"]["displaced"]), (17, &17.into()));
    let metrics = get(ringway.api(), "/metrics").await.1;
    let of = |name: &str| metric_in(&metrics, name, &[&format!("backend=\"{owner}\"")]);
    assert_eq!((of("ringway_bound_displaced_total"), of("ringway_backend_connection_limit")), (17.0, 13.0));
    assert_eq!(metric_in(&metrics, "ringway_pool_bound", &[]), 125.0);
    let text = explain().await;
    assert!(text.contains("at its bound: 13 of 13 connections, so it is tried only if the others fail"), "{text}");

    let (code, said, _) = run(&["status", "--api", &ringway.api().to_string()]);
    let wanted = "pool echo: at most 125 % of the fair share, now 13 for a backend; 17 connections displaced\n";
    assert!(code == Some(0) && said.contains(wanted), "{said}");

    // Without the bound, the client's backend gets all.
    ringway.reload(&yaml(&servers, "key: source_ip")).await.unwrap();
    streams.extend(open(&ringway, 10).await);
    assert_eq!(active(&ringway)[&owner], 23);
    assert!(status(&ringway).await["backends"].as_array().unwrap().iter().all(|one| one["limit"].is_null()));
    let metrics = get(ringway.api(), "/metrics").await.1;
    assert!(!metrics.contains("ringway_bound_displaced_total{") && !metrics.contains("ringway_pool_bound{"));
    // A bound that comes back counts connections that were opened without it.
    ringway.reload(&yaml(&servers, bounded)).await.unwrap();
    streams.extend(open(&ringway, 10).await);
    let now = active(&ringway);
    assert!(now[&owner] == 23 && now.values().sum::<u64>() == 50, "{now:?}");

    // With three fifths of the weight, the owner may have 60 of 80 connections.
    let weight = Command::Weight { pool: "echo".to_owned(), backend: owner.clone(), weight: 3 };
    ringway.send(weight).await.unwrap();
    streams.extend(open(&ringway, 30).await);
    let now = active(&ringway);
    assert!(now[&owner] == 53 && now.values().all(|&one| one == 53 || one <= 21), "{now:?}");
    // What ends makes room.
    streams.truncate(5);
    eventually("5 left", || active(&ringway).values().sum::<u64>() == 5).await;
    let before = active(&ringway)[&owner];
    streams.extend(open(&ringway, 1).await);
    assert_eq!(active(&ringway)[&owner], before + u64::from(before < 5));
}

#[tokio::test]
async fn a_bound_refuses_nobody_while_a_backend_does_not_answer() {
    let servers = Server::echoes(2).await;
    let gone = crate::harness::backends::free_ports::<1>()[0];
    let yaml = yaml(&servers, "ring: { bound: 101 }\nejection: off")
        .replace("static: [", &format!("static: [{{ address: \"127.0.0.1:{gone}\", id: gone }}, "));
    let ringway = Ringway::start(&yaml).await.ready().await;
    let streams = open(&ringway, 40).await;
    assert_eq!(active(&ringway).values().sum::<u64>(), 40);
    drop(streams);
}

#[tokio::test]
async fn least_connections_levels_what_ends() {
    let servers = Server::echoes(3).await;
    let ringway = pool(&servers, "balance: least_connections").await;
    let mut streams = open(&ringway, 9).await;
    assert!(active(&ringway).values().all(|&one| one == 3));
    // Some backends lose their connections, and get the next ones.
    streams.truncate(4);
    eventually("4 left", || active(&ringway).values().sum::<u64>() == 4).await;
    streams.extend(open(&ringway, 8).await);
    assert!(active(&ringway).values().all(|&one| one == 4), "{:?}", active(&ringway));

    let text = get(ringway.api(), "/api/explain?from=127.0.0.1:1").await.1;
    assert!(
        text.contains("of the backends with the smallest load, a random one gets the connection: 4 connections"),
        "{text}"
    );
    assert!(text.contains("\"random\":true"), "{text}");
    assert!(text.contains("\"balance\":\"least_connections\""), "{text}");
    assert_eq!(status(&ringway).await["balance"], "least_connections");
    let command = Command::Drain { pool: "echo".to_owned(), backend: "b0".to_owned(), within: None };
    ringway.send(command).await.unwrap();
    streams.extend(open(&ringway, 4).await);
    assert_eq!(active(&ringway).into_values().collect::<Vec<_>>(), [4, 6, 6]);
}
