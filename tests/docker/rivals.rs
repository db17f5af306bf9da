//! Two Ringways with the same owner on one engine.

use std::time::{Duration, Instant};

use crate::harness::engine::{IMAGE, Owner};
use crate::harness::program::Program;
use crate::harness::{Random, eventually_async, seed};

async fn all_healthy(program: &Program) -> bool {
    let status = program.status().await;
    status["pools"][0]["backends"].as_array().unwrap().iter().all(|backend| backend["state"] == "healthy")
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn two_ringways_with_one_owner_never_exceed_the_number_of_replicas() {
    let owner = Owner::new().await;
    let mut random = Random(seed());
    let yaml = owner.config(
        3,
        "restart: { backoff: 1ms, max_backoff: 10ms }",
        "health_check: { kind: http, path: /heartbeat }",
    );
    let mark = format!("rwtest={}", owner.name);
    let foreign = owner.docker(&["run", "-d", "--label", &mark, IMAGE, "echo-server", "--listen", "0.0.0.0:9000"]);
    let (one, other) = (owner.program(&yaml).await, owner.program(&yaml).await);
    let began = Instant::now();
    let mut kills = 0;
    while began.elapsed() < Duration::from_secs(60) {
        let containers = owner.containers();
        assert!(containers.len() <= 3, "{} containers", containers.len());
        if let Some(victim) = containers.get(random.below(3)) {
            let words: &[&str] = if random.below(2) == 0 { &["kill"] } else { &["rm", "-f"] };
            kills += u32::from(owner.try_docker(&[words, &[victim]].concat()).0);
        }
        let pause = Instant::now() + Duration::from_millis(random.below(1000) as u64);
        while Instant::now() < pause {
            assert!(owner.containers().len() <= 3);
            // A fourth container would appear in one of these steps.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    println!("{kills} kills");
    assert!(kills > 30, "only {kills} kills");
    eventually_async("both see three healthy ones", async || all_healthy(&one).await && all_healthy(&other).await)
        .await;
    let addresses = async |program: &Program| {
        let status = program.status().await;
        status["pools"][0]["backends"]
            .as_array()
            .unwrap()
            .iter()
            .map(|backend| backend["address"].clone())
            .collect::<Vec<_>>()
    };
    eventually_async("the same three", async || addresses(&one).await == addresses(&other).await).await;
    assert_eq!(owner.containers().len(), 3);
    assert_eq!(
        owner.docker(&["inspect", "-f", "{{.State.Running}} {{.RestartCount}}", &foreign]),
        "true 0",
        "Ringway changed a foreign container"
    );
}
