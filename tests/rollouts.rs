//! Rollouts of child processes: new replicas take the places of the old ones, and no client notices.

use std::collections::BTreeMap;
use std::time::Duration;

use rustix::process::{Pid, Signal};
use serde_json::Value;
use tokio::net::TcpStream;

use crate::harness::program::{Program, is_alive, run};
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

/// Replicas that exit at once, and replicas that never become healthy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_that_fails_leaves_the_old_replicas_serving_and_removes_the_new_one() {
    for (version, why) in [("bad-echo-1", "exit status: 3"), ("sick-echo-1", "unhealthy")] {
        let mut program = Program::start(&pool(3, "v0", QUICK, "")).await.ready().await;
        let api = program.api();
        eventually_async("three replicas", async || slots(api).await.len() == 3).await;
        let before = slots(api).await;
        program.write_config(&pool(3, version, QUICK, ""));
        program.signal(Signal::HUP);
        eventually_async("the failure", async || rollout(api).await["last"]["result"] == "rolled_back").await;
        let state = rollout(api).await;
        assert_eq!((state["state"].clone(), state["updated"].clone()), ("rolled_back".into(), 0.into()));
        assert!(state["reason"].as_str().unwrap().contains(why), "{state}");
        assert_eq!(slots(api).await, before, "an old replica was replaced");
        eventually_async("only the slots", async || {
            program.status().await["pools"][0]["backends"].as_array().unwrap().len() == 3
        })
        .await;
        let said = run(&["status", "--api", &api.to_string()]).1;
        let line = "pool echo: rollout: it did not succeed, and all replicas have the settings before: the new replica of echo-1";
        assert!(said.contains(line), "{said}");
        // It is not tried again before somebody asks.
        program.write_config(&pool(3, version, QUICK, "slow_start: 1s"));
        program.signal(Signal::HUP);
        eventually_async("the reload", async || program.log().contains("slow_start")).await;
        assert_eq!((rollout(api).await["state"].clone(), slots(api).await), ("rolled_back".into(), before.clone()));
        let (code, shown, error) = run(&["rollout", "echo", "--wait", "--api", &api.to_string()]);
        assert_eq!(code, Some(1), "{shown}{error}");
        assert!(
            error.contains("the rollout of pool echo failed and was rolled back: the new replica of echo-1"),
            "{error}"
        );
        assert_eq!(slots(api).await, before);
        // Nor by a successor.
        program.upgrade().await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(
            (rollout(program.api()).await["state"].clone(), slots(program.api()).await),
            ("rolled_back".into(), before.clone())
        );
        let api = program.api();
        // Other settings may be the remedy.
        program.write_config(&pool(3, "v2", QUICK, ""));
        assert_eq!(run(&["reload", "--api", &api.to_string()]).0, Some(0));
        eventually_async("the rollout", async || rollout(api).await["last"]["result"] == "done").await;
        assert!(slots(api).await.iter().all(|(slot, pid)| before[slot] != *pid));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_that_fails_half_way_goes_back_to_what_the_replicas_were_started_from() {
    for order in ["start_first", "stop_first"] {
        let settings = format!("{QUICK}, order: {order}, drain: 100ms");
        let ringway = Ringway::start(&pool(3, "v0", &settings, "")).await.all_healthy().await;
        let (before, mapping) = (slots(ringway.api()).await, ringway.mapping());
        ringway.reload(&pool(3, "bad-echo-2", &settings, "")).await.unwrap();
        eventually_async("the rollback", async || rollout(ringway.api()).await["last"]["result"] == "rolled_back")
            .await;
        eventually("all healthy", || ringway.mapping() == mapping).await;
        let after = slots(ringway.api()).await;
        assert_eq!(before["echo-3"], after["echo-3"], "{order}: the rollout had not come to it");
        assert_ne!(before["echo-1"], after["echo-1"], "{order}: it went there and back");
        assert_eq!(ringway.metric("ringway_rollouts_total", &["result=\"rolled_back\""]).await, 1.0, "{order}");
        // The command line of each replica shows what it was started from.
        for pid in after.values() {
            let words = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
            assert!(!words.contains("bad"), "{order}: {words:?}");
        }
    }
}

/// The only replica dies while its sick successor has no verdict. The successor takes the slot, fails, and the old settings come back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_that_had_to_take_over_can_still_fail() {
    let ringway = Ringway::start(&pool(1, "v0", QUICK, "")).await.all_healthy().await;
    let before = slots(ringway.api()).await["echo-1"];
    ringway.reload(&pool(1, "sick-echo-1", QUICK, "")).await.unwrap();
    eventually("a new replica", || ringway.state().pools[0].table.load().backends().find("echo-1+").is_some()).await;
    rustix::process::kill_process(pid(before), Signal::KILL).unwrap();
    eventually_async("the rollback", async || rollout(ringway.api()).await["last"]["result"] == "rolled_back").await;
    eventually("healthy", || ringway.states() == [State::Healthy]).await;
    let words = std::fs::read_to_string(format!("/proc/{}/cmdline", slots(ringway.api()).await["echo-1"])).unwrap();
    assert!(!words.contains("sick"), "{words:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_that_pauses_leaves_the_replicas_as_they_are() {
    let settings = format!("{QUICK}, on_failure: pause");
    let ringway = Ringway::start(&pool(3, "v0", &settings, "")).await.all_healthy().await;
    let before = slots(ringway.api()).await;
    ringway.reload(&pool(3, "sick-echo-2", &settings, "")).await.unwrap();
    eventually_async("the failure", async || rollout(ringway.api()).await["state"] == "paused").await;
    let state = rollout(ringway.api()).await;
    assert_eq!((state["updated"].clone(), state["total"].clone()), (1.into(), 3.into()));
    let after = slots(ringway.api()).await;
    let same: Vec<_> = before.iter().filter(|(slot, pid)| after[*slot] == **pid).map(|(slot, _)| slot).collect();
    assert_eq!(same, ["echo-2", "echo-3"]);
    eventually("only the slots", || ringway.state().pools[0].table.load().backends().len() == 3).await;
    ringway.reload(&pool(3, "v2", &settings, "")).await.unwrap();
    eventually_async("the end", async || rollout(ringway.api()).await["last"]["result"] == "done").await;
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

/// A second order counts for the replicas that were to come next, and the third puts the old settings back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_order_or_the_old_settings_end_what_was_under_way() {
    let slow = "healthy_for: 2s";
    let ringway = Ringway::start(&pool(2, "v0", slow, "")).await.all_healthy().await;
    let api = ringway.api();
    let command = || Command::Rollout { pool: "echo".to_owned(), image: None };
    let beside = || {
        let table = ringway.state().pools[0].table.load();
        let beside = table.backends().iter().find(|one| one.beside.is_some())?;
        beside.replica.clone()
    };
    ringway.send(command()).await.unwrap();
    eventually("a new replica", || beside().is_some()).await;
    let first = beside();
    ringway.send(command()).await.unwrap();
    eventually("another new replica", || beside().is_some() && beside() != first).await;
    // Two aborts leave everything as it is, and a reload of the settings that the replicas have is no failure.
    ringway.reload(&pool(2, "v1", slow, "")).await.unwrap();
    eventually_async("a rollout", async || rollout(api).await["state"] == "running").await;
    for _ in 0..2 {
        let _ = ringway.send(Command::AbortRollout { pool: "echo".to_owned() }).await;
    }
    ringway.reload(&pool(2, "v0", slow, "")).await.unwrap();
    eventually_async("quiet", async || rollout(api).await["state"] == "idle").await;
    eventually("only the slots", || ringway.states() == [State::Healthy; 2]).await;
}

/// The old process has connections after an upgrade. Until they have ended, a rollout waits, and says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_waits_for_the_connections_of_an_old_process() {
    let mut program = Program::start(&pool(2, "v0", QUICK, "")).await.ready().await;
    eventually_async("two replicas", async || slots(program.api()).await.len() == 2).await;
    let before = slots(program.api()).await;
    let mut open = loadtest::open(program.web(), 3).await.unwrap();
    for stream in &mut open {
        assert!(echoes(stream).await);
    }
    program.upgrade().await;
    let api = program.api();
    let said = run(&["rollout", "echo", "--api", &api.to_string()]).1;
    assert_eq!(said, "pool echo: replacing 2 of 2 replicas\n");
    let state = rollout(api).await;
    assert_eq!(
        (state["state"].clone(), state["held"].clone(), state["total"].clone()),
        ("running".into(), true.into(), 2.into())
    );
    let said = run(&["status", "--api", &api.to_string()]).1;
    assert!(said.contains("Ringway waits until the old process has no connections"), "{said}");
    for stream in &mut open {
        assert!(echoes(stream).await, "a connection was cut");
    }
    assert_eq!(slots(api).await, before);
    drop(open);
    eventually_async("the rollout", async || rollout(api).await["last"]["result"] == "done").await;
    assert!(slots(api).await.iter().all(|(slot, pid)| before[slot] != *pid));
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

/// The successor takes over the old replica and the new one beside it, and goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_goes_on_after_an_upgrade() {
    let slow = "healthy_for: 4s, parallel: 2";
    let mut program = Program::start(&pool(2, "v0", slow, "")).await.ready().await;
    eventually_async("two replicas", async || slots(program.api()).await.len() == 2).await;
    let before = slots(program.api()).await;
    let mut open = loadtest::open(program.web(), 10).await.unwrap();
    program.write_config(&pool(2, "v1", slow, ""));
    program.signal(Signal::HUP);
    let beside = async |program: &Program| -> BTreeMap<String, u64> {
        let backends = program.status().await["pools"][0]["backends"].as_array().unwrap().clone();
        let beside = backends.iter().filter(|one| one.get("beside").is_some() && one["state"] == "healthy");
        beside.filter_map(|one| Some((one["beside"].as_str()?.to_owned(), one["replica"]["pid"].as_u64()?))).collect()
    };
    eventually_async("two new replicas", async || beside(&program).await.len() == 2).await;
    let next = beside(&program).await;
    let web = program.web();
    let load = tokio::spawn(loadtest::churn(web, 100, Duration::from_secs(8), Duration::from_secs(10)));
    program.upgrade().await;
    assert_eq!(slots(program.api()).await, before);
    for stream in &mut open {
        assert!(echoes(stream).await, "a connection was cut");
    }
    drop(open);
    eventually_async("the new replicas", async || slots(program.api()).await == next).await;
    let report = soon("the load", load).await.unwrap();
    assert!(report.outcomes.iter().all(|outcome| outcome.server.is_ok()));
    eventually("the end of the old replicas", || before.values().all(|&old| !is_alive(pid(old)))).await;
    eventually_async("the end of the rollout", async || rollout(program.api()).await["last"]["result"] == "done").await;
}

/// Between the flip and the end of the old replica.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_replica_still_drains_after_an_upgrade() {
    let mut program = Program::start(&pool(1, "v0", QUICK, "")).await.ready().await;
    eventually_async("a replica", async || slots(program.api()).await.len() == 1).await;
    let before = slots(program.api()).await;
    let mut open = loadtest::open(program.web(), 3).await.unwrap();
    program.write_config(&pool(1, "v1", QUICK, ""));
    program.signal(Signal::HUP);
    eventually_async("the end of the rollout", async || rollout(program.api()).await["last"]["result"] == "done").await;
    let after = slots(program.api()).await;
    assert_ne!(after, before);
    program.upgrade().await;
    assert_eq!(slots(program.api()).await, after);
    let mut fresh = TcpStream::connect(program.web()).await.unwrap();
    assert!(echoes(&mut fresh).await);
    for stream in &mut open {
        assert!(echoes(stream).await, "a connection of the old process was cut");
    }
    assert!(is_alive(pid(before["echo-1"])));
    drop(open);
    eventually("the end of the old replica", || !is_alive(pid(before["echo-1"]))).await;
    assert_eq!(slots(program.api()).await, after);
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
