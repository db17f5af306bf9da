//! Containers that do not start. Ringway limits the tries, reports them, and serves the other pools.

use std::time::Duration;

use ringway::backend::State;

use crate::harness::engine::{IMAGE, Owner, provider};
use crate::harness::{Ringway, eventually, get, metric_in};

/// Adds a second pool, which is healthy.
fn with_a_healthy_pool(yaml: &str) -> String {
    let provider = provider(1, "");
    let listener = "  - { name: well, listen: \"127.0.0.1:0\", pool: well }\npools:\n";
    let yaml = yaml.replace("pools:\n", listener);
    format!("{yaml}\n  - {{ name: well, drain: 0s, provider: {{ {provider} }} }}")
}

fn is_well(ringway: &Ringway) -> bool {
    ringway.state().pools[1].table.load().backends().iter().all(|backend| backend.state == State::Healthy)
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn a_replica_that_exits_at_its_start_is_made_a_limited_number_of_times() {
    let owner = Owner::new().await;
    let yaml = with_a_healthy_pool(&owner.config(1, "command: [no-such-command]", "health_check: { kind: none }"));
    let program = owner.program(&yaml).await;
    let since = owner.docker(&["info", "-f", "{{.SystemTime}}"]);
    // Without a backoff the supervisor would make hundreds of containers in this time.
    tokio::time::sleep(Duration::from_secs(60)).await;
    let until = owner.docker(&["info", "-f", "{{.SystemTime}}"]);
    let label = format!("label=ringway.owner={}", owner.name);
    let events = ["events", "--since", &since, "--until", &until, "--filter", "event=create", "--filter", &label];
    let slot = owner.docker(&events).lines().filter(|line| line.contains("ringway.slot=echo-1")).count();
    println!("{slot} containers were made in 60 s");
    // The first two tries are immediate. The backoff starts at 0.2 s, doubles each time, and has a jitter of a fifth.
    assert!((7..=11).contains(&slot), "{slot} containers were made in 60 s");

    let status = program.status().await;
    let backend = &status["pools"][0]["backends"][0];
    assert_eq!(backend["state"], "crash_loop", "{backend}");
    assert_eq!(backend["last_exit"]["code"], 2, "{backend}");
    let output = backend["last_exit"]["output"].to_string();
    assert!(output.contains("unrecognized subcommand 'no-such-command'"), "{output}");
    assert_eq!(status["pools"][1]["backends"][0]["state"], "healthy", "the other pool is affected");
    let metrics = get(program.api(), "/metrics").await.1;
    assert_eq!(metric_in(&metrics, "ringway_replica_crash_loop", &["echo-1"]), 1.0);
    assert_eq!(metric_in(&metrics, "ringway_replica_crash_loop", &["well-1"]), 0.0);
    let restarts = metric_in(&metrics, "ringway_replica_restarts_total", &["echo-1"]);
    assert!(restarts >= slot as f64 - 2.0, "{restarts} restarts are counted");
    let log = program.log();
    let lines = log.lines().filter(|line| line.contains("slot=echo-1")).count();
    assert_eq!(log.matches("crash loop").count(), 1, "{log}");
    assert!(lines <= 6, "the log has a line for each try:\n{log}");
    assert!(owner.containers().len() <= 2);
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn a_missing_image_is_one_message_and_the_other_pool_runs() {
    let owner = Owner::new().await;
    let yaml = owner.config(3, "", "health_check: { kind: none }").replace(IMAGE, "no-such-image:1.0");
    let program = owner.program(&with_a_healthy_pool(&yaml)).await;
    crate::harness::eventually_async("the breaker, and a healthy pool", async || {
        let status = program.status().await;
        let state = |pool: usize, backend: usize| status["pools"][pool]["backends"][backend]["state"].clone();
        state(1, 0) == "healthy" && (0..3).all(|backend| state(0, backend) == "crash_loop")
    })
    .await;
    let log = program.log();
    assert_eq!(log.matches("no-such-image:1.0").count(), 1, "{log}");
    assert!(log.contains("and `pull: never` is set"), "{log}");
    let status = program.status().await;
    let reason = &status["pools"][0]["backends"][2]["last_exit"]["reason"];
    assert!(reason.as_str().unwrap().contains("lacks the image"), "{reason}");
}

/// The tests have no registry. A wrong name fails in the same way.
#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn an_image_that_cannot_be_pulled_is_the_reason_of_the_exit() {
    let owner = Owner::new().await;
    let yaml = owner.config(1, "", "").replace(IMAGE, "127.0.0.1:1/no/image").replace("pull: never", "pull: missing");
    let ringway = Ringway::start(&yaml).await;
    eventually("the reason", || ringway.backend(0).last_exit.is_some()).await;
    let reason = ringway.backend(0).last_exit.unwrap().reason.clone();
    assert!(reason.contains("the engine lacks the image \"127.0.0.1:1/no/image\" and cannot pull it"), "{reason}");
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn a_missing_image_is_pulled_once_for_all_slots() {
    let owner = Owner::new().await;
    let restart = "restart: { backoff: 10ms, max_backoff: 100ms, crash_loop_after: 20 }";
    let yaml =
        owner.config(3, restart, "").replace(IMAGE, "127.0.0.1:1/no/image").replace("pull: never", "pull: missing");
    let program = owner.program(&yaml).await;
    crate::harness::eventually_async("many tries of each slot", async || {
        let status = program.status().await;
        (0..3).all(|backend| status["pools"][0]["backends"][backend]["state"] == "crash_loop")
    })
    .await;
    let log = program.log();
    assert_eq!(log.matches("pulling the image").count(), 1, "{log}");
    assert!(log.contains("Ringway waits at least 10 s"), "{log}");
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn a_slot_waits_until_a_foreign_container_frees_its_name() {
    let owner = Owner::new().await;
    let (name, mark) = (owner.container("echo-1"), format!("rwtest={}", owner.name));
    let stranger = owner.docker(&["create", "--name", &name, "--label", &mark, IMAGE]);
    let restart = "restart: { backoff: 100ms, max_backoff: 200ms }";
    let yaml = with_a_healthy_pool(&owner.config(2, restart, ""));
    let ringway = Ringway::start(&yaml).await;
    eventually("the reason, and the healthy backends", || {
        ringway.backend(0).last_exit.is_some() && ringway.backend(1).state == State::Healthy && is_well(&ringway)
    })
    .await;
    let reason = ringway.backend(0).last_exit.unwrap().reason.clone();
    assert!(
        reason.contains(&format!("the name {name:?} belongs to a container that this Ringway did not create")),
        "{reason}"
    );
    assert_eq!(owner.docker(&["inspect", "-f", "{{.Id}} {{.State.Status}}", &name]), format!("{stranger} created"));
    owner.docker(&["rm", &name]);
    eventually("the slot is filled", || ringway.states() == [State::Healthy; 2]).await;
}
