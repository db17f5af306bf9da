//! Rollouts of child processes: new replicas take the places of the old ones, and no client notices.

mod failures;
mod upgrades;

use std::collections::BTreeMap;
use std::time::Duration;

use rustix::process::Pid;
use serde_json::Value;
use tokio::net::TcpStream;

use crate::harness::program::{is_alive, run};
use crate::harness::{Random, Ringway, config, echoes, eventually, eventually_async, get, http, seed, soon};
use ringway::backend::State;
use ringway::control::command::{Command, CommandError};

/// A pool with replicas of this version. Those of `bad-SLOT` exit in this slot, and those of `sick-SLOT` answer nothing.
fn pool(replicas: usize, version: &str, rollout: &str, more: &str) -> String {
    let script = "case $1 in bad-$2) exit 3;; sick-$2) exec sleep 600;; esac; \
                  exec $0 echo-server --listen 127.0.0.1:{port} --name {slot}";
    let provider = format!(
        "process: {{ replicas: {replicas}, rollout: {{ {rollout} }}, restart: {{ backoff: 50ms, max_backoff: 50ms, start_grace: 1s, \
         crash_loop_after: 3 }}, stop_grace: 1s, \
         command: [sh, -c, {script:?}, {:?}, {version:?}, \"{{slot}}\"] }}",
        env!("CARGO_BIN_EXE_ringway")
    );
    let check = "health_check: { kind: http, path: /heartbeat, interval: 200ms, fall: 2 }";
    config(&provider, "", &format!("{check}\ndrain: 60s\n{more}"))
}

const QUICK: &str = "healthy_for: 300ms";

/// The processes of the pool's slots.
async fn slots(api: std::net::SocketAddr) -> BTreeMap<String, u64> {
    let status: Value = serde_json::from_str(&get(api, "/api/status").await.1).unwrap();
    let backends = status["pools"][0]["backends"].as_array().unwrap().clone();
    let slots = backends.iter().filter(|one| one.get("beside").is_none());
    slots.filter_map(|one| Some((one["id"].as_str()?.to_owned(), one["replica"]["pid"].as_u64()?))).collect()
}

/// The state of the rollout.
async fn rollout(api: std::net::SocketAddr) -> Value {
    let status: Value = serde_json::from_str(&get(api, "/api/status").await.1).unwrap();
    status["pools"][0]["provider"]["rollout"].clone()
}

fn pid(number: u64) -> Pid {
    Pid::from_raw(i32::try_from(number).unwrap()).unwrap()
}

/// Rollouts under load, with connections that last longer than they take.
async fn nothing_is_reset(replicas: usize, settings: &str) {
    let ringway = Ringway::start(&pool(replicas, "v0", settings, "")).await.all_healthy().await;
    let (mapping, first) = (ringway.mapping(), slots(ringway.api()).await);
    let mut open = loadtest::open(ringway.web(), 40).await.unwrap();
    let digest = ringway.state().pools[0].table.load().ring().digest();
    let web = ringway.web();
    let load = tokio::spawn(loadtest::churn(web, 200, Duration::from_secs(7), Duration::from_secs(10)));
    for version in ["v1", "v2"] {
        let ended = rollout(ringway.api()).await["ended"].as_u64().unwrap();
        ringway.reload(&pool(replicas, version, settings, "")).await.unwrap();
        eventually_async("the end of the rollout", async || {
            let rollout = rollout(ringway.api()).await;
            rollout["ended"].as_u64() == Some(ended + 1) && rollout["last"]["result"] == "done"
        })
        .await;
        let table = ringway.state().pools[0].table.load();
        assert_eq!((table.ring().digest(), ringway.mapping()), (digest, mapping.clone()), "a key moved");
        for stream in &mut open {
            assert!(echoes(stream).await, "a connection was cut");
        }
        // Old replicas with connections still drain, and a slot has only one place for them.
        open.truncate(open.len() / 2);
        if version == "v1" {
            open = loadtest::open(ringway.web(), 40).await.unwrap();
            eventually("the end of the old replicas", || {
                ringway.state().pools[0].table.load().backends().len() == replicas
            })
            .await;
        }
    }
    let report = soon("the load", load).await.unwrap();
    let failed: Vec<_> = report.outcomes.iter().filter(|outcome| outcome.server.is_err()).collect();
    assert!(failed.is_empty() && report.outcomes.len() > 1000, "{} failed: {failed:?}", failed.len());
    let last = slots(ringway.api()).await;
    assert!(first.iter().all(|(slot, pid)| last.contains_key(slot) && last[slot] != *pid));
    drop(open);
    eventually("the end of the old replicas", || first.values().all(|&old| !is_alive(pid(old)))).await;
    assert_eq!(ringway.metric("ringway_rollouts_total", &["result=\"done\""]).await, 2.0);
    assert_eq!(ringway.metric("ringway_rollout_progress", &[]).await, 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_resets_no_connection_and_moves_no_key() {
    nothing_is_reset(3, QUICK).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_of_several_replicas_at_a_time_resets_no_connection_and_moves_no_key() {
    nothing_is_reset(4, "healthy_for: 100ms, parallel: 3, pause: 50ms").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_replaces_all_replicas_and_can_be_aborted() {
    let ringway = Ringway::start(&pool(2, "v0", QUICK, "")).await.all_healthy().await;
    let (api, before) = (ringway.api(), slots(ringway.api()).await);
    let command = |image: Option<&str>| Command::Rollout { pool: "echo".to_owned(), image: image.map(str::to_owned) };
    let abort = || Command::AbortRollout { pool: "web".to_owned() };
    assert_eq!(ringway.send(abort()).await, Err(CommandError::NoRollout("echo".to_owned())));
    assert_eq!(ringway.send(command(Some("web:2"))).await, Err(CommandError::NoImage("echo".to_owned())));
    let words = ["rollout", "echo", "--dry-run", "--api", &api.to_string()].map(str::to_owned);
    let dry = tokio::task::spawn_blocking(move || run(&words.each_ref().map(String::as_str))).await.unwrap();
    assert_eq!(dry.1, "pool echo: 2 replicas would be replaced\n");
    assert_eq!(slots(api).await, before);
    let words = ["rollout", "echo", "--wait", "--api", &api.to_string()].map(str::to_owned);
    let done = tokio::task::spawn_blocking(move || run(&words.each_ref().map(String::as_str))).await.unwrap();
    assert_eq!(done.0, Some(0), "{done:?}");
    assert!(done.1.starts_with("pool echo: replacing 2 of 2 replicas\n"), "{}", done.1);
    assert!(done.1.ends_with("echo: 2 of 2 replicas\n"), "{}", done.1);
    let after = slots(api).await;
    assert!(before.iter().all(|(slot, pid)| after[slot] != *pid), "{before:?} {after:?}");

    ringway.reload(&pool(2, "v0", "healthy_for: 10m", "")).await.unwrap();
    let report = ringway.send(command(None)).await.unwrap();
    assert_eq!(report.changes, ["pool echo: replacing 2 of 2 replicas"]);
    eventually("a new replica", || ringway.state().pools[0].table.load().backends().find("echo-1+").is_some()).await;
    ringway.send(abort()).await.unwrap();
    eventually("its end", || ringway.state().pools[0].table.load().backends().len() == 2).await;
    assert_eq!(rollout(api).await["reason"], "a command has aborted it");
    assert_eq!(slots(api).await, after);
}

#[tokio::test]
async fn without_a_free_port_the_old_replica_leaves_first() {
    let [port] = crate::harness::backends::free_ports::<1>();
    let yaml = |version: &str| {
        pool(1, version, QUICK, "").replace("replicas: 1,", &format!("replicas: 1, ports: \"{port}-{port}\","))
    };
    let ringway = Ringway::start(&yaml("v0")).await.all_healthy().await;
    let before = slots(ringway.api()).await;
    ringway.reload(&yaml("v1")).await.unwrap();
    eventually_async("the rollout", async || rollout(ringway.api()).await["last"]["result"] == "done").await;
    assert_ne!(slots(ringway.api()).await, before);
    assert_eq!(ringway.backend(0).address.unwrap().ip().unwrap().port(), port);
}

/// One spare port is enough for all slots in turn, and it is free again afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spare_port_serves_one_slot_after_the_other_and_then_a_larger_pool() {
    // Below the ephemeral ports, nothing else takes one meanwhile.
    let is_free = |port: u16| std::net::TcpListener::bind(("127.0.0.1", port)).is_ok();
    let start = 20_000 + u16::try_from(Random(seed()).below(10_000)).unwrap();
    let first = (start..32_000).find(|&first| (first..first + 3).all(is_free)).unwrap();
    let range = format!("ports: \"{first}-{}\",", first + 2);
    let yaml = |version: &str, replicas: usize| {
        pool(replicas, version, QUICK, "").replace("rollout:", &format!("{range} rollout:"))
    };
    let ringway = Ringway::start(&yaml("v0", 2)).await.all_healthy().await;
    let mapping = ringway.mapping();
    ringway.reload(&yaml("v1", 2)).await.unwrap();
    eventually_async("the rollout", async || {
        assert!(ringway.mapping() == mapping, "a slot was empty");
        rollout(ringway.api()).await["last"]["result"] == "done"
    })
    .await;
    eventually("the end of the old replicas", || ringway.state().pools[0].table.load().backends().len() == 2).await;
    ringway.reload(&yaml("v1", 3)).await.unwrap();
    eventually("three healthy replicas", || ringway.states() == [State::Healthy; 3]).await;
}

#[tokio::test]
async fn wrong_calls_are_answered_with_the_remedy() {
    let ringway = Ringway::start(&pool(1, "v0", QUICK, "")).await.all_healthy().await;
    for (body, code, words) in [
        (r#"{"image": "web:2"}"#, 409, "processes, which have no image"),
        (r#"{"abort": true}"#, 409, "no rollout of pool echo is under way"),
        (r#"{"image": "web:2", "abort": true}"#, 400, "contradict each other"),
        (r#"{"picture": 1}"#, 400, "unknown field"),
    ] {
        let answer = http(ringway.api(), "POST", "/api/pools/echo/rollout", body.as_bytes()).await;
        let text = String::from_utf8_lossy(answer.body()).into_owned();
        assert_eq!(answer.status().as_u16(), code, "{text}");
        assert!(text.contains(words), "{text}");
    }
    let answer = http(ringway.api(), "POST", "/api/pools/other/rollout", b"").await;
    assert_eq!(answer.status().as_u16(), 404);
}

/// Never may two replicas of such a pool have connections at once: the old one leaves first, whatever the order says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_an_exclusive_pool_no_replica_stands_beside_another() {
    let exclusive = "tiers: { exclusive: true }";
    let ringway =
        Ringway::start(&pool(2, "v0", &format!("{QUICK}, order: start_first"), exclusive)).await.ready().await;
    let before = slots(ringway.api()).await;
    ringway.reload(&pool(2, "v1", &format!("{QUICK}, order: start_first"), exclusive)).await.unwrap();
    eventually_async("the end of the rollout", async || {
        let table = ringway.state().pools[0].table.load();
        assert!(table.backends().iter().all(|one| one.beside.is_none()));
        rollout(ringway.api()).await["last"]["result"] == "done"
    })
    .await;
    let after = slots(ringway.api()).await;
    assert!(before.len() == 2 && before.iter().all(|(slot, pid)| after[slot] != *pid), "{before:?} {after:?}");
}

/// Old and new replica of a slot together never have more connections than one backend may have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_and_bounds_hold_through_a_rollout() {
    let most = 6;
    let more = format!("max_connections_per_backend: {most}\nring: {{ bound: 150 }}");
    let ringway = Ringway::start(&pool(3, "v0", QUICK, &more)).await.all_healthy().await;
    let active = || {
        let table = ringway.state().pools[0].table.load();
        let mut slots = BTreeMap::<String, u64>::new();
        for backend in table.backends() {
            let slot = backend.beside.as_ref().unwrap_or(&backend.id).to_string();
            *slots.entry(slot).or_default() += backend.live.active.load(std::sync::atomic::Ordering::Relaxed);
        }
        slots
    };
    let mut open = loadtest::open(ringway.web(), 3 * most).await.unwrap();
    for stream in &mut open {
        assert!(echoes(stream).await);
    }
    let full: BTreeMap<_, _> = (1..=3).map(|n| (format!("echo-{n}"), most as u64)).collect();
    assert_eq!(active(), full);
    ringway.reload(&pool(3, "v1", QUICK, &more)).await.unwrap();
    eventually_async("the end of the rollout", async || {
        assert_eq!(active(), full);
        if let Ok(mut stream) = TcpStream::connect(ringway.web()).await {
            assert!(!echoes(&mut stream).await, "one connection too many");
        }
        rollout(ringway.api()).await["last"]["result"] == "done"
    })
    .await;
    for stream in &mut open {
        assert!(echoes(stream).await, "a connection was cut");
    }
    // Each one that ends makes room for one to a new replica.
    for _ in 0..most {
        drop(open.swap_remove(0));
        eventually("room", || active().values().sum::<u64>() < 3 * most as u64).await;
        let mut stream = TcpStream::connect(ringway.web()).await.unwrap();
        assert!(echoes(&mut stream).await, "no room although one has ended: {:?}", active());
        assert!(active().values().all(|&active| active <= most as u64), "{:?}", active());
        open.push(stream);
    }
}
