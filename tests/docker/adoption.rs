//! Ringway adopts the containers of an earlier Ringway, which may have ended at any moment.

use std::time::Duration;

use ringway::backend::State;
use rustix::process::Signal;

use crate::harness::engine::{IMAGE, Owner};
use crate::harness::{Random, Ringway, eventually, eventually_async, seed};

const CHECK: &str = "health_check: { kind: http, path: /heartbeat, interval: 200ms }";

/// The arguments of `docker create` for a container like those of Ringway.
fn like_ours<'a>(labels: &'a [String], name: &'a str) -> Vec<&'a str> {
    let mut words = vec!["create", "--name", name];
    for label in labels {
        words.extend(["--label", label]);
    }
    words.extend([IMAGE, "echo-server", "--listen", "0.0.0.0:9000", "--name", "left"]);
    words
}

fn labels(owner: &str, slot: &str) -> Vec<String> {
    vec![format!("ringway.owner={owner}"), "ringway.pool=echo".to_owned(), format!("ringway.slot={slot}")]
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn containers_of_an_earlier_run_are_adopted_without_a_restart() {
    let owner = Owner::new().await;
    let yaml = owner.config(3, "", CHECK);
    let ringway = Ringway::start(&yaml).await.all_healthy().await;
    let (containers, mapping) = (owner.containers(), ringway.mapping());
    drop(ringway);
    assert_eq!(owner.containers(), containers, "the end of Ringway changed its containers");
    let ringway = Ringway::start(&yaml).await.all_healthy().await;
    assert_eq!((owner.containers(), ringway.mapping()), (containers, mapping));
    assert_eq!(ringway.metric("ringway_replica_restarts_total", &[]).await, 0.0, "Ringway restarted a replica");
}

/// The leftovers are a container that was created and not started, a surplus slot, a second container of a slot, and a
/// container with other settings.
#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn leftovers_are_brought_to_the_config_and_foreign_containers_are_not_touched() {
    let owner = Owner::new().await;
    let mark = format!("rwtest={}", owner.name);
    let create = |labels: &[String], name: &str, start: bool| {
        let id = owner.docker(&like_ours(labels, name));
        if start {
            owner.docker(&["start", name]);
        }
        id
    };
    create(&labels(&owner.name, "echo-1"), &owner.container("echo-1"), false);
    let outdated = create(&labels(&owner.name, "echo-2"), &owner.container("echo-2"), true);
    let double = create(&labels(&owner.name, "echo-2"), &owner.container("double"), true);
    let surplus = create(&labels(&owner.name, "echo-9"), &owner.container("echo-9"), true);
    let foreign_labels = [mark.clone(), "ringway.owner=somebody-else".to_owned(), "ringway.slot=echo-3".to_owned()];
    let foreign = create(&foreign_labels, &owner.container("foreign"), true);

    let ringway = Ringway::start(&owner.config(3, "", CHECK)).await.all_healthy().await;
    eventually("the leftovers are removed", || {
        let now = owner.containers();
        now.len() == 3 && ![&outdated, &double, &surplus].iter().any(|id| now.contains(id))
    })
    .await;
    eventually("all healthy", || ringway.states() == [State::Healthy; 3]).await;
    for slot in ["echo-1", "echo-2", "echo-3"] {
        let name = owner.container(slot);
        assert_eq!(owner.docker(&["inspect", "-f", "{{.State.Running}}", &name]), "true", "{name}");
    }
    assert_eq!(
        owner.docker(&["inspect", "-f", "{{.State.Running}} {{.Id}}", &owner.container("foreign")]),
        format!("true {foreign}")
    );
}

/// Rolls out `after` over replicas with the settings `before`. Returns the lowest number of healthy replicas after two
/// were healthy.
async fn roll_out(owner: &Owner, before: &str, after: &str) -> usize {
    drop(Ringway::start(&owner.config(3, before, CHECK)).await.all_healthy().await);
    let old = owner.containers();
    let ringway = Ringway::start(&owner.config(3, after, CHECK)).await;
    let mut fewest = None;
    eventually("three new ones", || {
        let healthy = ringway.states().iter().filter(|&&state| state == State::Healthy).count();
        if healthy >= 2 || fewest.is_some() {
            fewest = Some(fewest.unwrap_or(healthy).min(healthy));
        }
        let now = owner.containers();
        healthy == 3 && now.len() == 3 && now.iter().all(|id| !old.contains(id))
    })
    .await;
    fewest.unwrap()
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn changed_settings_are_rolled_out_one_replica_at_a_time() {
    let owner = Owner::new().await;
    let after = "rollout: { order: stop_first, healthy_for: 0s }, env: { VERSION: \"2\" }";
    assert_eq!(roll_out(&owner, "", after).await, 2);
    for id in owner.containers() {
        assert!(owner.docker(&["inspect", "-f", "{{.Config.Env}}", &id]).contains("VERSION=2"));
    }
}

/// Ringway reaches the old replicas at their old port until it replaces them.
#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn another_port_is_rolled_out_without_an_outage() {
    let owner = Owner::new().await;
    let command = "command: [echo-server, --listen, \"0.0.0.0:{port}\", --name, \"{slot}\"]";
    let other = format!("{command}, stop_grace: 2s, rollout: {{ healthy_for: 0s }}").replace("{port}", "9001");
    // The lines of the provider have port 9000.
    let config = owner.config(3, &other, CHECK).replace("port: 9000", "port: 9001").replace("stop_grace: 1s, ", "");
    drop(Ringway::start(&owner.config(3, "", CHECK)).await.all_healthy().await);
    let old = owner.containers();
    let ringway = Ringway::start(&config).await.all_healthy().await;
    eventually("three new ones", || {
        let healthy = ringway.states().iter().filter(|&&state| state == State::Healthy).count();
        assert!(healthy >= 2, "{:?}", ringway.states());
        let now = owner.containers();
        healthy == 3 && now.len() == 3 && now.iter().all(|id| !old.contains(id))
    })
    .await;
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn another_network_is_rolled_out_without_an_outage() {
    let owner = Owner::new().await;
    let network = owner.network();
    assert!(roll_out(&owner, "", &format!("network: {network}, rollout: {{ healthy_for: 0s }}")).await >= 2);
}

/// A mistake in the config must not stop running replicas.
#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn invalid_settings_are_not_rolled_out() {
    let owner = Owner::new().await;
    let good = owner.config(2, "", CHECK);
    drop(Ringway::start(&good).await.all_healthy().await);
    let containers = owner.containers();
    for (bad, message) in [
        (owner.config(2, "network: no-such-network", CHECK), "\\\"no-such-network\\\" does not exist; create it"),
        (good.replace(IMAGE, "no-such-image"), "the engine lacks the image \\\"no-such-image\\\""),
    ] {
        let program = owner.program(&bad).await;
        let told = || {
            program
                .log()
                .lines()
                .filter(|line| line.replace("\\\"", "\"").contains(&message.replace("\\\"", "\"")))
                .count()
        };
        eventually("the error in the log", || told() > 0).await;
        eventually_async("both healthy", async || {
            let status = program.status().await;
            status["pools"][0]["backends"].as_array().unwrap().iter().all(|backend| backend["state"] == "healthy")
        })
        .await;
        // A supervisor that rolls out the bad settings would replace the containers in this time.
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(owner.containers(), containers, "{}", program.log());
        assert!(told() <= 2, "the log has a line for each try:\n{}", program.log());
    }
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn a_replica_that_loses_its_network_is_replaced() {
    let owner = Owner::new().await;
    let yaml = owner.config(2, "restart: { replace_after: 1s }", CHECK);
    let ringway = Ringway::start(&yaml).await.all_healthy().await;
    let before = owner.containers();
    owner.docker(&["network", "disconnect", "bridge", &owner.container("echo-1")]);
    // The engine sends no event of the container for a change of its network. The next list shows the change.
    owner.docker(&["kill", "--signal", "CONT", &owner.container("echo-1")]);
    eventually("replaced", || owner.containers() != before && ringway.states() == [State::Healthy; 2]).await;
    assert_eq!(owner.containers().len(), 2);
}

/// Ringway is killed at random moments while it makes, replaces and removes containers.
#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn after_each_of_fifty_kills_ringway_has_three_replicas() {
    let owner = Owner::new().await;
    let mut random = Random(seed());
    let yaml = owner.config(3, "restart: { backoff: 1ms, max_backoff: 10ms }", CHECK);
    for round in 0..=50 {
        let program = owner.program(&yaml).await;
        eventually_async("all healthy", async || {
            let status = program.status().await;
            let backends = status["pools"][0]["backends"].as_array().unwrap();
            backends.iter().all(|backend| backend["state"] == "healthy")
        })
        .await;
        let containers = owner.containers();
        assert_eq!(containers.len(), 3, "round {round}: an orphan or a second container of a slot");
        // These changes give Ringway work, so that the kill interrupts it.
        for container in containers {
            match random.below(3) {
                0 => drop(owner.try_docker(&["kill", &container])),
                1 => drop(owner.try_docker(&["rm", "-f", &container])),
                _ => {}
            }
        }
        // The kill hits a random moment of the work.
        tokio::time::sleep(Duration::from_millis(random.below(400) as u64)).await;
        program.signal(Signal::KILL);
        drop(program);
        assert!(owner.containers().len() <= 3, "round {round}: more containers than replicas");
    }
}
