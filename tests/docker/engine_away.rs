//! An engine that hangs, ends and comes back: clients notice nothing, and what died meanwhile is replaced.

use std::time::Duration;

use rustix::process::Signal;

use crate::harness::engine::PrivateEngine;
use crate::harness::{eventually_async, get, metric_in, soon};

const CHECK: &str = "health_check: { kind: http, path: /heartbeat, interval: 500ms, timeout: 2s }";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a Docker engine"]
async fn clients_do_not_notice_an_engine_that_hangs_or_is_restarted() {
    let mut engine = PrivateEngine::start(false).await;
    let owner = engine.owner();
    let yaml = owner.config(3, "", CHECK).replace("owner:", "resync: 2s, timeout: 2s, owner:");
    let program = owner.program(&yaml).await;
    let healthy = async || {
        let status = program.status().await;
        let backends = status["pools"][0]["backends"].as_array().unwrap();
        backends.iter().filter(|backend| backend["state"] == "healthy").count()
    };
    let up = async || metric_in(&get(program.api(), "/metrics").await.1, "ringway_engine_up", &[]);
    eventually_async("three healthy replicas", async || healthy().await == 3).await;
    let containers = owner.containers();
    let load = tokio::spawn(loadtest::churn(program.web(), 50, Duration::from_secs(40), Duration::from_secs(10)));

    engine.signal(Signal::STOP);
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!((up().await, healthy().await), (0.0, 3), "what was seen last is served");
    let metrics = get(program.api(), "/metrics").await.1;
    assert!(metric_in(&metrics, "ringway_engine_staleness_seconds", &[]) > 15.0);
    let status = program.status().await;
    let view = &status["pools"][0]["provider"]["engine"];
    assert!(view["reachable"] == false && view["error"].as_str().unwrap().contains("no answer within 2 s"), "{view}");
    engine.signal(Signal::CONT);
    eventually_async("the engine is seen again", async || up().await == 1.0).await;

    engine.stop();
    eventually_async("it is seen to be gone", async || up().await == 0.0).await;
    engine.run().await;
    eventually_async("it is seen to be back", async || up().await == 1.0).await;
    let report = soon("the load", load).await.unwrap();
    assert_eq!((report.failures(), report.servers().len()), (std::collections::BTreeMap::new(), 3));
    assert_eq!(owner.containers(), containers, "nothing was started or stopped");

    // What dies unseen is replaced with the next list.
    let victim = owner.docker(&["inspect", "-f", "{{.State.Pid}}", &owner.container("echo-2")]).parse().unwrap();
    engine.signal(Signal::STOP);
    rustix::process::kill_process(rustix::process::Pid::from_raw(victim).unwrap(), Signal::KILL).unwrap();
    eventually_async("walked past", async || healthy().await == 2).await;
    engine.signal(Signal::CONT);
    eventually_async("replaced", async || healthy().await == 3 && owner.containers() != containers).await;
    assert_eq!(owner.containers().len(), 3);
}

/// It may come later than Ringway, and be reached over TCP.
#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn an_engine_may_be_remote_and_start_later() {
    let mut engine = PrivateEngine::start(true).await;
    let owner = engine.owner();
    engine.stop();
    let program = owner.program(&owner.config(2, "", CHECK)).await;
    let error = async || program.status().await["pools"][0]["provider"]["engine"]["error"].clone();
    eventually_async("a word about it", async || {
        error().await.to_string().contains("cannot reach the Docker engine at tcp://")
    })
    .await;
    engine.run().await;
    eventually_async("two healthy replicas", async || {
        let status = program.status().await;
        status["pools"][0]["backends"].as_array().unwrap().iter().all(|backend| backend["state"] == "healthy")
    })
    .await;
    assert_eq!(owner.containers().len(), 2);
    assert_eq!(error().await, serde_json::Value::Null);
}
