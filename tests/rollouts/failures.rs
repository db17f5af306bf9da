//! Rollouts that fail, pause, are aborted or overtaken.

use std::time::Duration;

use rustix::process::Signal;

use super::{QUICK, pid, pool, rollout, slots};
use crate::harness::program::{Program, run};
use crate::harness::{Ringway, eventually, eventually_async};
use ringway::backend::State;
use ringway::control::command::Command;

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
