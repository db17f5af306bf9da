//! An engine that hangs, stops and comes back. Clients are served all the time, and Ringway replaces the containers that
//! died meanwhile.

use std::time::Duration;

use rustix::process::Signal;

use crate::harness::engine::PrivateEngine;
use crate::harness::{eventually_async, get, metric_in, soon};

const CHECK: &str = "health_check: { kind: http, path: /heartbeat, interval: 500ms, timeout: 2s }";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a Docker engine"]
async fn no_request_fails_while_the_engine_hangs_or_restarts() {
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
    eventually_async("the staleness is above 15 s", async || {
        metric_in(&get(program.api(), "/metrics").await.1, "ringway_engine_staleness_seconds", &[]) > 15.0
    })
    .await;
    assert_eq!((up().await, healthy().await), (0.0, 3), "Ringway serves the last known replicas");
    let status = program.status().await;
    let view = &status["pools"][0]["provider"]["engine"];
    assert!(view["reachable"] == false && view["error"].as_str().unwrap().contains("no answer within 2 s"), "{view}");
    engine.signal(Signal::CONT);
    eventually_async("the engine is up again", async || up().await == 1.0).await;

    engine.stop();
    eventually_async("the engine is down", async || up().await == 0.0).await;
    engine.run().await;
    eventually_async("the engine is up after the restart", async || up().await == 1.0).await;
    let report = soon("the load", load).await.unwrap();
    assert_eq!((report.failures(), report.servers().len()), (std::collections::BTreeMap::new(), 3));
    assert_eq!(owner.containers(), containers, "Ringway started or stopped a container");

    // The next list shows a container that died while the engine hung, and Ringway replaces it.
    let victim = owner.docker(&["inspect", "-f", "{{.State.Pid}}", &owner.container("echo-2")]).parse().unwrap();
    engine.signal(Signal::STOP);
    rustix::process::kill_process(rustix::process::Pid::from_raw(victim).unwrap(), Signal::KILL).unwrap();
    eventually_async("two healthy replicas", async || healthy().await == 2).await;
    engine.signal(Signal::CONT);
    eventually_async("replaced", async || healthy().await == 3 && owner.containers() != containers).await;
    assert_eq!(owner.containers().len(), 3);
}

/// The engine listens on TCP and starts after Ringway.
#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn an_engine_can_listen_on_tcp_and_start_later() {
    let mut engine = PrivateEngine::start(true).await;
    let owner = engine.owner();
    engine.stop();
    let program = owner.program(&owner.config(2, "", CHECK)).await;
    let error = async || program.status().await["pools"][0]["provider"]["engine"]["error"].clone();
    eventually_async("the error in the status", async || {
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
