//! Containers that cannot live: bounded tries, visible, and nobody else's trouble.

use std::time::Duration;

use ringway::backend::State;

use crate::harness::engine::{IMAGE, Owner, provider};
use crate::harness::{Ringway, eventually, get, metric_in};

/// A second pool, which is well.
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
async fn an_image_whose_process_exits_at_once_is_made_a_bounded_number_of_times() {
    let owner = Owner::new().await;
    let yaml = with_a_healthy_pool(&owner.config(1, "command: [no-such-command]", "health_check: { kind: none }"));
    let program = owner.program(&yaml).await;
    let since = owner.docker(&["info", "-f", "{{.SystemTime}}"]);
    tokio::time::sleep(Duration::from_secs(60)).await;
    let until = owner.docker(&["info", "-f", "{{.SystemTime}}"]);
    let label = format!("label=ringway.owner={}", owner.name);
    let events = ["events", "--since", &since, "--until", &until, "--filter", "event=create", "--filter", &label];
    let slot = owner.docker(&events).lines().filter(|line| line.contains("ringway.slot=echo-1")).count();
    println!("{slot} containers were made in 60 s");
    // At once twice, then after 0.2 s doubled each time, less up to a fifth.
    assert!((7..=11).contains(&slot), "{slot} containers were made in 60 s");

    let status = program.status().await;
    let backend = &status["pools"][0]["backends"][0];
    assert_eq!(backend["state"], "crash_loop", "{backend}");
    assert_eq!(backend["last_exit"]["code"], 2, "{backend}");
    let output = backend["last_exit"]["output"].to_string();
    assert!(output.contains("unrecognized subcommand 'no-such-command'"), "{output}");
    assert_eq!(status["pools"][1]["backends"][0]["state"], "healthy", "the other pool is not affected");
    let metrics = get(program.api(), "/metrics").await.1;
    assert_eq!(metric_in(&metrics, "ringway_replica_crash_loop", &["echo-1"]), 1.0);
    assert_eq!(metric_in(&metrics, "ringway_replica_crash_loop", &["well-1"]), 0.0);
    let restarts = metric_in(&metrics, "ringway_replica_restarts_total", &["echo-1"]);
    assert!(restarts >= slot as f64 - 2.0, "{restarts} restarts are counted");
    let log = program.log();
    let lines = log.lines().filter(|line| line.contains("slot=echo-1")).count();
    assert_eq!(log.matches("crash loop").count(), 1, "{log}");
    assert!(lines <= 6, "a line for each step, not for each try:\n{log}");
    assert!(owner.containers().len() <= 2);
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn an_image_that_does_not_exist_is_one_clear_message_and_the_rest_runs() {
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
    assert!(reason.as_str().unwrap().contains("there is no image"), "{reason}");
}

/// There is no registry in the tests: that is what a wrong name looks like too.
#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn an_image_that_cannot_be_pulled_says_so() {
    let owner = Owner::new().await;
    let yaml = owner.config(1, "", "").replace(IMAGE, "127.0.0.1:1/no/image").replace("pull: never", "pull: missing");
    let ringway = Ringway::start(&yaml).await;
    eventually("the reason", || ringway.backend(0).last_exit.is_some()).await;
    let reason = ringway.backend(0).last_exit.unwrap().reason.clone();
    assert!(reason.contains("there is no image \"127.0.0.1:1/no/image\", and it cannot be pulled"), "{reason}");
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn a_name_that_a_stranger_holds_is_left_to_it_and_taken_once_it_is_free() {
    let owner = Owner::new().await;
    let (name, mark) = (owner.container("echo-1"), format!("rwtest={}", owner.name));
    let stranger = owner.docker(&["create", "--name", &name, "--label", &mark, IMAGE]);
    let restart = "restart: { backoff: 100ms, max_backoff: 200ms }";
    let yaml = with_a_healthy_pool(&owner.config(2, restart, ""));
    let ringway = Ringway::start(&yaml).await;
    eventually("a reason, and the rest", || {
        ringway.backend(0).last_exit.is_some() && ringway.backend(1).state == State::Healthy && is_well(&ringway)
    })
    .await;
    let reason = ringway.backend(0).last_exit.unwrap().reason.clone();
    assert!(
        reason.contains(&format!("the name {name:?} belongs to a container that this Ringway did not make")),
        "{reason}"
    );
    assert_eq!(owner.docker(&["inspect", "-f", "{{.Id}} {{.State.Status}}", &name]), format!("{stranger} created"));
    owner.docker(&["rm", &name]);
    eventually("the slot is filled", || ringway.states() == [State::Healthy; 2]).await;
}
