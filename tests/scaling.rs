//! Pools that scale by themselves: they sleep without connections, the first connection wakes them, and their number of replicas follows the
//! connections.

use std::time::Duration;

use loadtest::churn;
use rustix::process::{Signal, kill_process};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;

use crate::harness::program::{Program, is_alive, run};
use crate::harness::{Ringway, config, echoes, eventually, eventually_async, get, http, metric_in, soon};
use ringway::backend::State;
use ringway::proxy::stats::RefusalReason;

/// A config whose pool has this in `replicas`.
fn scaled(replicas: &str) -> String {
    let command = "command: [ringway, echo-server, --listen, \"127.0.0.1:{port}\", --name, \"{slot}\"]";
    config(
        &format!("process: {{ replicas: {{ {replicas} }}, {command} }}"),
        "",
        "health_check: { kind: http, path: /heartbeat, interval: 200ms }\ndrain: 1s",
    )
}

/// The number of replicas that the pool should have, and the number of those that run.
async fn counts(program: &Program) -> (u64, usize) {
    let status = program.status().await;
    // The supervisor may not have looked yet.
    let wanted = status["pools"][0]["provider"]["scaling"]["wanted"].as_u64();
    (wanted.unwrap_or(u64::MAX), program.replicas().await.len())
}

#[tokio::test]
async fn the_first_connection_wakes_a_pool_and_it_falls_asleep_again() {
    let program = Program::start(&scaled("min: 0, max: 2, idle_stop: 1s")).await;
    // A pool that sleeps does not keep Ringway from being ready.
    eventually_async("ready", async || get(program.api(), "/readyz").await.0 == 200).await;
    eventually_async("asleep", async || counts(&program).await == (0, 0)).await;
    let (_, out, _) = run(&["status", "--api", &program.api().to_string()]);
    assert!(out.contains("pool echo: it sleeps until a connection comes") && !out.contains("no backends"), "{out}");
    for _ in 0..2 {
        let mut first = TcpStream::connect(program.web()).await.unwrap();
        assert!(soon("an echo", echoes(&mut first)).await);
        eventually_async("both run", async || counts(&program).await == (2, 2)).await;
        let replicas = program.replicas().await;
        // As long as there is a connection, it stays awake.
        tokio::time::sleep(Duration::from_millis(1500)).await;
        assert!(echoes(&mut first).await && counts(&program).await == (2, 2));
        drop(first);
        eventually_async("it sleeps", async || counts(&program).await == (0, 0)).await;
        eventually("no process is left", || !replicas.iter().any(|&pid| is_alive(pid))).await;
    }
    let text = get(program.api(), "/metrics").await.1;
    assert_eq!(metric_in(&text, "ringway_scaling_changes_total", &["up"]), 2.0);
    assert_eq!(metric_in(&text, "ringway_scaling_changes_total", &["down"]), 2.0);
    assert_eq!(metric_in(&text, "ringway_scaling_replicas", &[]), 0.0);
    assert_eq!(metric_in(&text, "ringway_connections_refused_total", &[]), 0.0);
    let (code, _, err) = run(&["scale", "echo", "2", "--api", &program.api().to_string()]);
    assert!(code == Some(1) && err.contains("scales by itself"), "{err}");
}

#[tokio::test]
async fn five_hundred_clients_at_once_wake_a_pool_and_all_are_served() {
    let program = Program::start(&scaled("min: 0, max: 3, scale_on: { connections_per_replica: 100 }")).await;
    let clients = (0..500).map(|_| {
        let web = program.web();
        tokio::spawn(async move { echoes(&mut TcpStream::connect(web).await.unwrap()).await })
    });
    for client in clients.collect::<Vec<_>>() {
        assert!(soon("an echo", client).await.unwrap());
    }
    eventually_async("three replicas", async || counts(&program).await == (3, 3)).await;
    assert_eq!(program.status().await["pools"][0]["provider"]["scaling"]["waiting"], 0);
}

#[tokio::test]
async fn who_waits_too_long_or_in_too_great_a_number_is_reset() {
    let yaml = scaled("min: 0, max: 1, wake_timeout: 5s, max_waiting: 5").replace(
        "[ringway, echo-server, --listen, \"127.0.0.1:{port}\", --name, \"{slot}\"]",
        "[sleep, \"1000{port}\"]",
    );
    let ringway = Ringway::start(&yaml).await;
    let mut clients = loadtest::open(ringway.web(), 8).await.unwrap();
    let refused = |reason| ringway.state().listeners[0].stats.refused(reason);
    eventually("three are too many", || refused(RefusalReason::TooManyWaiting) == 3).await;
    assert_eq!(refused(RefusalReason::WakeTimeout), 0);
    assert_eq!(ringway.metric("ringway_pool_waiting_connections", &[]).await, 5.0);
    eventually("five wait too long", || refused(RefusalReason::WakeTimeout) == 5).await;
    for client in &mut clients {
        let ended = soon("a reset", client.read(&mut [0])).await;
        assert_eq!(ended.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    }
}

#[tokio::test]
async fn the_number_of_replicas_follows_the_connections() {
    let program = Program::start(&scaled("min: 1, max: 4, scale_on: { connections_per_replica: 10, cool_down: 1s }"))
        .await
        .ready()
        .await;
    assert_eq!(counts(&program).await, (1, 1));
    let mut open = Vec::new();
    for (connections, replicas) in [(10, 1), (11, 2), (35, 4), (60, 4)] {
        open.extend(loadtest::open(program.web(), connections - open.len()).await.unwrap());
        for stream in &mut open {
            assert!(soon("an echo", echoes(stream)).await);
        }
        eventually_async("more replicas", async || counts(&program).await == (replicas, replicas as usize)).await;
    }
    // Connections to the replica that stays are not touched.
    let list: serde_json::Value =
        serde_json::from_str(&get(program.api(), "/api/sessions?backend=echo-1").await.1).unwrap();
    let stays: Vec<_> =
        list["sessions"].as_array().unwrap().iter().map(|one| one["client"].as_str().unwrap()).collect();
    open.retain(|stream| stays.contains(&&*stream.local_addr().unwrap().to_string()));
    open.truncate(9);
    eventually_async("one replica", async || counts(&program).await == (1, 1)).await;
    for stream in &mut open {
        assert!(soon("an echo", echoes(stream)).await);
    }
}

#[tokio::test]
async fn no_connection_fails_while_the_number_rises_and_falls() {
    let program = Program::start(&scaled(
        "min: 0, max: 3, idle_stop: 1s, scale_on: { connections_per_replica: 5, cool_down: 1s }",
    ))
    .await;
    for rate in [50, 400, 20] {
        let report = churn(program.web(), rate, Duration::from_secs(2), Duration::from_secs(20)).await;
        let failed: Vec<_> = report.outcomes.iter().filter(|outcome| outcome.server.is_err()).collect();
        assert!(failed.is_empty() && !report.outcomes.is_empty(), "{} fail: {:?}", failed.len(), failed.first());
        let mut open = loadtest::open(program.web(), 15).await.unwrap();
        for stream in &mut open {
            assert!(soon("an echo", echoes(stream)).await);
        }
        drop(open);
        eventually_async("it sleeps", async || counts(&program).await == (0, 0)).await;
    }
}

#[tokio::test]
async fn short_connections_keep_a_pool_awake() {
    let program = Program::start(&scaled("min: 0, max: 1, idle_stop: 1s")).await;
    let report = churn(program.web(), 10, Duration::from_secs(5), Duration::from_secs(20)).await;
    assert_eq!(report.failures(), std::collections::BTreeMap::new());
    let text = get(program.api(), "/metrics").await.1;
    assert_eq!(metric_in(&text, "ringway_scaling_changes_total", &["down"]), 0.0);
    eventually_async("it sleeps", async || counts(&program).await == (0, 0)).await;
}

#[tokio::test]
async fn an_upgrade_and_a_reload_keep_the_number() {
    let yaml = scaled("min: 0, max: 3, scale_on: { connections_per_replica: 10, cool_down: 1h }");
    let mut program = Program::start(&yaml).await;
    program.upgrade().await;
    eventually_async("asleep", async || counts(&program).await == (0, 0)).await;
    let open = loadtest::open(program.web(), 15).await.unwrap();
    eventually_async("two replicas", async || counts(&program).await == (2, 2)).await;
    let replicas = program.replicas().await;
    drop(open);
    program.upgrade().await;
    eventually_async("the same replicas", async || program.replicas().await == replicas).await;
    eventually_async("the same number", async || counts(&program).await.0 == 2).await;
    // From there to a fixed number, and back.
    program.write_config(&scaled("X").replace("{ X }", "3"));
    assert_eq!(http(program.api(), "POST", "/api/reload", b"").await.status(), 200);
    eventually_async("three replicas", async || program.replicas().await.len() == 3).await;
    assert!(program.status().await["pools"][0]["provider"]["scaling"].is_null());
    assert_eq!(program.replicas().await[..2], replicas);
    program.write_config(&yaml);
    assert_eq!(http(program.api(), "POST", "/api/reload", b"").await.status(), 200);
    eventually_async("it scales again", async || {
        program.status().await["pools"][0]["provider"]["scaling"]["wanted"] == 3
    })
    .await;
    // One that dies is replaced.
    kill_process(replicas[0], Signal::KILL).unwrap();
    eventually_async("a new one", async || {
        let now = program.replicas().await;
        now.len() == 3 && now[0] != replicas[0]
    })
    .await;
}

#[tokio::test]
async fn a_sleeping_pool_answers_requests_of_the_side_port() {
    let ringway = Ringway::start(&scaled("max: 1")).await;
    assert!(ringway.states().is_empty());
    let answer = soon("an answer", http(ringway.api(), "POST", "/api/request", b"x")).await;
    assert_eq!(answer.status(), 200);
    assert_eq!(ringway.states(), [State::Healthy]);
}

/// The replica goes on to accept for two seconds after SIGTERM.
#[tokio::test]
async fn a_replica_that_is_being_stopped_gets_no_connection_when_the_pool_wakes() {
    let server = format!("{} echo-server --listen 127.0.0.1:{{port}}", env!("CARGO_BIN_EXE_ringway"));
    let script = format!("trap 'sleep 2; exit' TERM; {server} & while true; do wait; done");
    let yaml = scaled("min: 0, max: 1, idle_stop: 1s").replace(
        "[ringway, echo-server, --listen, \"127.0.0.1:{port}\", --name, \"{slot}\"]",
        &format!("[sh, -c, \"{script}\"]"),
    );
    let program = Program::start(&yaml).await;
    let mut first = TcpStream::connect(program.web()).await.unwrap();
    assert!(soon("an echo", echoes(&mut first)).await);
    drop(first);
    eventually("the stop", || program.log().contains("stopping the replica")).await;
    let mut second = TcpStream::connect(program.web()).await.unwrap();
    for _ in 0..30 {
        assert!(soon("an echo of the next replica", echoes(&mut second)).await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
