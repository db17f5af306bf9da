//! Pools of containers that sleep, and whose number of replicas follows the connections.

use std::time::Duration;

use rustix::process::Signal;
use tokio::net::TcpStream;

use crate::harness::engine::Owner;
use crate::harness::program::Program;
use crate::harness::{echoes, eventually, eventually_async, soon};

fn yaml(owner: &Owner, replicas: &str) -> String {
    let check = "health_check: { kind: http, path: /heartbeat, interval: 200ms }\ndrain: 2s";
    owner
        .config(77, "restart: { start_grace: 5s }", check)
        .replace("replicas: 77", &format!("replicas: {{ {replicas} }}"))
}

/// The number of replicas that the pool should have; `None`: Ringway does not know the containers yet.
async fn wanted(program: &Program) -> Option<u64> {
    program.status().await["pools"][0]["provider"]["scaling"]["wanted"].as_u64()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a Docker engine"]
async fn the_first_connection_starts_a_container_and_the_last_one_ends_it() {
    let owner = Owner::new().await;
    let program = owner.program(&yaml(&owner, "min: 0, max: 2, idle_stop: 1s")).await;
    for _ in 0..2 {
        eventually("no container", || owner.containers().is_empty()).await;
        let mut first = TcpStream::connect(program.web()).await.unwrap();
        assert!(soon("an echo", echoes(&mut first)).await);
        eventually("both containers", || owner.containers().len() == 2).await;
        drop(first);
        eventually_async("it sleeps", async || wanted(&program).await == Some(0)).await;
    }
    eventually("no container", || owner.containers().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a Docker engine"]
async fn a_ringway_that_was_killed_goes_on_with_the_containers_that_run() {
    let owner = Owner::new().await;
    let yaml = yaml(&owner, "min: 0, max: 3, idle_stop: 1h, scale_on: { connections_per_replica: 10, cool_down: 1h }");
    let mut program = owner.program(&yaml).await;
    let mut open = loadtest::open(program.web(), 15).await.unwrap();
    for stream in &mut open {
        assert!(soon("an echo", echoes(stream)).await);
    }
    eventually_async("two containers", async || wanted(&program).await == Some(2) && owner.containers().len() == 2)
        .await;
    // A container that does not run yet is not kept.
    let all_healthy = async || {
        let status = program.status().await;
        status["pools"][0]["backends"].as_array().unwrap().iter().all(|one| one["state"] == "healthy")
    };
    eventually_async("both are healthy", all_healthy).await;
    let containers = owner.containers();
    program.signal(Signal::KILL);
    program.ended().await;
    drop(open);
    let mut program = owner.program(&yaml).await;
    eventually_async("it knows them", async || wanted(&program).await == Some(2)).await;
    let mut stream = TcpStream::connect(program.web()).await.unwrap();
    assert!(soon("an echo", echoes(&mut stream)).await);
    program.upgrade().await;
    eventually_async("the successor knows them", async || wanted(&program).await == Some(2)).await;
    // It would have removed one by now.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(owner.containers(), containers);
}
