//! Rollouts of containers: the new one starts beside the old one, takes its slot, and no client notices. Ringway and the engine may be
//! killed at any step.

use std::collections::BTreeMap;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::harness::engine::{IMAGE, Owner, PrivateEngine};
use crate::harness::program::{Program, run};
use crate::harness::{Random, Ringway, echoes, eventually, eventually_async, get, seed, soon};
use ringway::backend::State;
use ringway::control::command::Command;

const CHECK: &str = "health_check: { kind: http, path: /heartbeat, interval: 200ms, fall: 2 }\ndrain: 60s";

/// A pool whose containers have this version.
fn yaml(owner: &Owner, replicas: usize, version: &str, rollout: &str) -> String {
    let docker = format!(
        "env: {{ VERSION: {version} }}, rollout: {{ {rollout} }}, restart: {{ start_grace: 2s, crash_loop_after: 3 }}"
    );
    owner.config(replicas, &docker, CHECK)
}

async fn rollout(api: std::net::SocketAddr) -> Value {
    let status: Value = serde_json::from_str(&get(api, "/api/status").await.1).unwrap();
    status["pools"][0]["provider"]["rollout"].clone()
}

/// The names of the owner's containers, with what they are from: the environment, or the image.
fn containers(owner: &Owner, what: &str) -> BTreeMap<String, String> {
    let filter = format!("label=ringway.owner={}", owner.name);
    let list = owner.docker(&["ps", "-a", "--filter", &filter, "--format", "{{.ID}} {{.Names}}"]);
    // One may be gone, or have another name, by the time of the question.
    let with = |line: &str| {
        let (id, name) = line.split_once(' ')?;
        let (is_there, said) = owner.try_docker(&["inspect", "-f", what, id]);
        is_there.then(|| (name.to_owned(), said))
    };
    list.lines().filter_map(with).collect()
}

fn versions(owner: &Owner) -> BTreeMap<String, String> {
    let version = |env: String| env.split_once("VERSION=").map(|(_, rest)| rest[..2].to_owned()).unwrap_or_default();
    containers(owner, "{{.Config.Env}}").into_iter().map(|(name, env)| (name, version(env))).collect()
}

fn all_of(owner: &Owner, replicas: usize, version: &str) -> BTreeMap<String, String> {
    (1..=replicas).map(|n| (owner.container(&format!("echo-{n}")), version.to_owned())).collect()
}

async fn nothing_is_reset(replicas: usize, order: &str, rounds: usize) {
    let owner = Owner::new().await;
    let settings = format!("order: {order}, healthy_for: 200ms, parallel: 2");
    let ringway = Ringway::start(&yaml(&owner, replicas, "v0", &settings)).await.all_healthy().await;
    let (mapping, api) = (ringway.mapping(), ringway.api());
    let digest = || ringway.state().pools[0].table.load().ring().digest();
    let before = digest();
    for round in 1..=rounds {
        let mut open = loadtest::open(ringway.web(), 20).await.unwrap();
        let load = tokio::spawn(loadtest::churn(ringway.web(), 300, Duration::from_secs(5), Duration::from_secs(10)));
        let version = format!("v{round}");
        ringway.reload(&yaml(&owner, replicas, &version, &settings)).await.unwrap();
        let ended = async || rollout(api).await["ended"].as_u64() == Some(round as u64);
        if order == "start_first" {
            eventually_async("the end of the rollout", ended).await;
            assert_eq!((digest(), ringway.mapping()), (before, mapping.clone()), "a key moved");
        }
        // Old replicas wait for these.
        for stream in &mut open {
            assert!(echoes(stream).await, "round {round}: a connection was cut");
        }
        drop(open);
        eventually_async("the end of the rollout", ended).await;
        assert_eq!(rollout(api).await["last"]["result"], "done");
        let report = soon("the load", load).await.unwrap();
        assert_eq!(report.failures(), BTreeMap::new(), "round {round}");
        eventually("only new containers, under their names", || versions(&owner) == all_of(&owner, replicas, &version))
            .await;
    }
    assert_eq!(ringway.mapping(), mapping);
    let status: Value = serde_json::from_str(&get(api, "/api/status").await.1).unwrap();
    for backend in status["pools"][0]["backends"].as_array().unwrap() {
        let name = backend["replica"]["name"].as_str().unwrap();
        assert_eq!(owner.docker(&["inspect", "-f", "{{.Id}}", name]), backend["replica"]["container"], "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a Docker engine"]
async fn rollouts_reset_no_connection_and_move_no_key() {
    nothing_is_reset(3, "start_first", 3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a Docker engine"]
async fn rollouts_that_stop_the_old_container_first_reset_no_connection() {
    nothing_is_reset(3, "stop_first", 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a Docker engine"]
async fn an_image_that_cannot_run_is_rolled_back_and_another_one_rolled_out() {
    let owner = Owner::new().await;
    let [good, bad] = ["good", "bad"].map(|tag| format!("{}:{tag}", owner.name));
    let build = |image: &str, lines: &str| {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("Dockerfile"), format!("FROM {IMAGE}\n{lines}\n")).unwrap();
        owner.docker(&["build", "-q", "-t", image, &folder.path().display().to_string()])
    };
    build(&good, "LABEL rwtest.version=2");
    build(&bad, "ENTRYPOINT [\"/no-such-program\"]");
    let ringway = Ringway::start(&yaml(&owner, 2, "v0", "healthy_for: 200ms")).await.all_healthy().await;
    let (api, before) = (ringway.api(), owner.containers());
    let wait = async |image: &str| {
        let words = ["rollout", "echo", "--wait", "--image", image, "--api", &api.to_string()].map(str::to_owned);
        tokio::task::spawn_blocking(move || run(&words.each_ref().map(String::as_str))).await.unwrap()
    };
    let (code, _, error) = wait(&bad).await;
    assert_eq!(code, Some(1));
    assert!(error.contains("was rolled back: the new replica of echo-"), "{error}");
    assert!(error.contains("does not stay: it cannot be started: "), "{error}");
    eventually("the old containers alone", || owner.containers() == before).await;
    assert_eq!(ringway.states(), [State::Healthy; 2]);
    // A replacement comes from the old image, and is no reason to try the other one again.
    let ended = rollout(api).await["ended"].clone();
    owner.docker(&["kill", &owner.container("echo-2")]);
    eventually("a replacement", || ringway.backend(1).restarts == 1 && ringway.states() == [State::Healthy; 2]).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let state = rollout(api).await;
    assert_eq!((state["state"].clone(), state["ended"].clone()), ("rolled_back".into(), ended));
    let image = containers(&owner, "{{.Config.Image}}");
    assert!(image.values().all(|image| image == IMAGE) && image.len() == 2, "{image:?}");
    let (code, said, error) = wait(&good).await;
    assert_eq!(code, Some(0), "{said}{error}");
    eventually("containers of the good image alone", || {
        let image = containers(&owner, "{{.Config.Image}}");
        image.values().all(|image| *image == good) && image.len() == 2
    })
    .await;
    let status: Value = serde_json::from_str(&get(api, "/api/status").await.1).unwrap();
    assert_eq!(status["pools"][0]["differs"][0]["image"], *good);
    drop(ringway);
    owner.docker(&["rm", "-f", &owner.container("echo-1"), &owner.container("echo-2")]);
    owner.docker(&["rmi", "-f", &good, &bad]);
}

/// The name of an image gets another one: nothing changes until the next rollout, also if a container must be replaced.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a Docker engine"]
async fn all_containers_come_from_one_image_until_a_rollout() {
    let owner = Owner::new().await;
    let name = format!("{}:latest", owner.name);
    let build = |version: &str| {
        let folder = tempfile::tempdir().unwrap();
        let dockerfile = format!("FROM {IMAGE}\nLABEL rwtest.version={version}\n");
        std::fs::write(folder.path().join("Dockerfile"), dockerfile).unwrap();
        owner.docker(&["build", "-q", "-t", &name, &folder.path().display().to_string()]);
        owner.docker(&["inspect", "-f", "{{.Id}}", &name])
    };
    let first = build("1");
    let config = yaml(&owner, 2, "v0", "healthy_for: 200ms").replace(IMAGE, &name);
    let ringway = Ringway::start(&config).await.all_healthy().await;
    let images = || containers(&owner, "{{.Image}}").into_values().collect::<Vec<_>>();
    let second = build("2");
    assert_ne!(first, second);
    owner.docker(&["kill", &owner.container("echo-1")]);
    eventually("a replacement", || ringway.backend(0).restarts == 1 && ringway.states() == [State::Healthy; 2]).await;
    assert_eq!(images(), [first.clone(), first.clone()], "a mixture of images");
    let command = Command::Rollout { pool: "echo".to_owned(), image: Some(name.clone()) };
    let report = ringway.send(command.clone()).await.unwrap();
    assert_eq!(report.changes, ["pool echo: replacing 2 of 2 replicas"]);
    eventually("the new image", || images() == [second.clone(), second.clone()]).await;
    eventually_async("the end", async || rollout(ringway.api()).await["last"]["result"] == "done").await;
    assert_eq!(ringway.send(command).await.unwrap().changes, ["pool echo: no replica is outdated"]);

    // A new Ringway looks at the name, as after `docker compose up` of another image.
    let third = build("3");
    drop(ringway);
    let ringway = Ringway::start(&config).await.all_healthy().await;
    eventually("the newest image", || images() == [third.clone(), third.clone()]).await;
    eventually("both healthy", || ringway.states() == [State::Healthy; 2]).await;
    drop(ringway);
    owner.docker(&["rm", "-f", &owner.container("echo-1"), &owner.container("echo-2")]);
    owner.docker(&["rmi", "-f", &name]);
    owner.docker(&["rmi", "-f", &first, &second]);
}

/// Somebody has removed the name of the image in the middle of the rollout. Its id is enough to go back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a Docker engine"]
async fn a_rollback_needs_only_the_id_of_the_image() {
    let owner = Owner::new().await;
    let [old, new] = ["old", "new"].map(|tag| {
        let (name, folder) = (format!("{}:{tag}", owner.name), tempfile::tempdir().unwrap());
        std::fs::write(folder.path().join("Dockerfile"), format!("FROM {IMAGE}\nLABEL rwtest.tag={tag}\n")).unwrap();
        owner.docker(&["build", "-q", "-t", &name, &folder.path().display().to_string()]);
        name
    });
    let id = owner.docker(&["inspect", "-f", "{{.Id}}", &old]);
    let config = yaml(&owner, 2, "v0", "healthy_for: 100ms, pause: 10m").replace(IMAGE, &old);
    let ringway = Ringway::start(&config).await.all_healthy().await;
    ringway.send(Command::Rollout { pool: "echo".to_owned(), image: Some(new.clone()) }).await.unwrap();
    eventually_async("one of two", async || rollout(ringway.api()).await["updated"] == 1).await;
    owner.docker(&["rmi", "-f", &old]);
    ringway.send(Command::AbortRollout { pool: "echo".to_owned() }).await.unwrap();
    eventually_async("the way back", async || rollout(ringway.api()).await["last"]["result"] == "rolled_back").await;
    eventually("the old image", || {
        let images = containers(&owner, "{{.Image}}");
        images.len() == 2 && images.values().all(|image| *image == id)
    })
    .await;
    drop(ringway);
    owner.docker(&["rm", "-f", &owner.container("echo-1"), &owner.container("echo-2")]);
    owner.docker(&["rmi", "-f", &new, &id]);
}

async fn is_healthy(program: &Program, replicas: usize) -> bool {
    let status = program.status().await;
    let backends = status["pools"][0]["backends"].as_array().unwrap();
    backends.len() == replicas && backends.iter().all(|backend| backend["state"] == "healthy")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a Docker engine"]
async fn ringway_may_be_killed_at_any_step_of_a_rollout() {
    let owner = Owner::new().await;
    let mut random = Random(seed());
    let settings = "healthy_for: 100ms";
    let mut program = owner.program(&yaml(&owner, 2, "v0", settings)).await;
    eventually_async("healthy", async || is_healthy(&program, 2).await).await;
    for round in 1..=12 {
        let version = format!("v{}", round % 10);
        let next = yaml(&owner, 2, &version, settings);
        program.write_config(&next);
        program.signal(Signal::HUP);
        // A rollout takes about two seconds.
        tokio::time::sleep(Duration::from_millis(random.below(2500) as u64)).await;
        program.signal(Signal::KILL);
        program.ended().await;
        let left = versions(&owner);
        let serve = left.keys().filter(|name| !name.ends_with("-next")).count();
        assert!(serve >= 2, "round {round}: a slot lost its container: {left:?}");
        program = owner.program(&next).await;
        eventually_async("the rollout ends", async || {
            is_healthy(&program, 2).await && versions(&owner) == all_of(&owner, 2, &version)
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a Docker engine"]
async fn a_rollout_goes_on_after_an_upgrade_at_any_step() {
    let owner = Owner::new().await;
    let mut random = Random(seed());
    let settings = "healthy_for: 100ms";
    let mut program = owner.program(&yaml(&owner, 2, "v0", settings)).await;
    eventually_async("healthy", async || is_healthy(&program, 2).await).await;
    for round in 1..=5 {
        let version = format!("v{round}");
        program.write_config(&yaml(&owner, 2, &version, settings));
        let load = tokio::spawn(loadtest::churn(program.web(), 100, Duration::from_secs(4), Duration::from_secs(10)));
        assert_eq!(run(&["reload", "--api", &program.api().to_string()]).0, Some(0));
        tokio::time::sleep(Duration::from_millis(random.below(2500) as u64)).await;
        program.upgrade().await;
        eventually_async("the rollout ends", async || {
            is_healthy(&program, 2).await && versions(&owner) == all_of(&owner, 2, &version)
        })
        .await;
        let report = soon("the load", load).await.unwrap();
        assert_eq!(report.failures(), BTreeMap::new(), "round {round}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a Docker engine"]
async fn the_engine_may_restart_at_any_step_of_a_rollout() {
    let mut engine = PrivateEngine::start(false).await;
    let owner = engine.owner();
    let mut random = Random(seed());
    let with = |version: &str| {
        yaml(&owner, 2, version, "healthy_for: 100ms").replace("owner:", "resync: 1s, timeout: 2s, owner:")
    };
    let program = owner.program(&with("v0")).await;
    eventually_async("healthy", async || is_healthy(&program, 2).await).await;
    for round in 1..=4 {
        let version = format!("v{round}");
        let load = tokio::spawn(loadtest::churn(program.web(), 50, Duration::from_secs(8), Duration::from_secs(10)));
        program.write_config(&with(&version));
        program.signal(Signal::HUP);
        tokio::time::sleep(Duration::from_millis(random.below(2500) as u64)).await;
        engine.stop();
        engine.run().await;
        eventually_async("the rollout ends", async || {
            is_healthy(&program, 2).await && versions(&owner) == all_of(&owner, 2, &version)
        })
        .await;
        let report = soon("the load", load).await.unwrap();
        assert_eq!(report.failures(), BTreeMap::new(), "round {round}");
    }
}
