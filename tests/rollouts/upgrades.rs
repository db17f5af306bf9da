//! Upgrades of Ringway in the middle of a rollout.

use std::collections::BTreeMap;
use std::time::Duration;

use rustix::process::Signal;
use tokio::net::TcpStream;

use super::{QUICK, pid, pool, rollout, slots};
use crate::harness::program::{Program, is_alive, run};
use crate::harness::{echoes, eventually, eventually_async, soon};

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
