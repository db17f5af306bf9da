//! Discovery of containers that Ringway does not manage.

use std::process::{Command, Stdio};

use ringway::backend::State;
use tokio::net::TcpStream;

use crate::harness::engine::{IMAGE, Owner};
use crate::harness::program::Killed;
use crate::harness::{Ringway, config, echoes, eventually, eventually_async, get, soon};

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn backends_follow_the_label_and_ringway_starts_and_stops_no_container() {
    let owner = Owner::new().await;
    let label = format!("rwtest={}", owner.name);
    let run = |name: &str| {
        let (name, echo) = (owner.container(name), ["echo-server", "--listen", "0.0.0.0:9000", "--name", name]);
        owner.docker(&[&["run", "-d", "--name", &name, "--label", &label, IMAGE], &echo[..]].concat());
    };
    let provider = format!("docker: {{ discover: {{ label: {label}, port: 9000 }} }}");
    let ringway = Ringway::start(&config(&provider, "", "health_check: { kind: http, path: /heartbeat }")).await;
    let members = || -> Vec<String> {
        let table = ringway.state().pools[0].table.load();
        let healthy = table.backends().iter().filter(|backend| backend.state == State::Healthy);
        healthy.map(|backend| backend.id.to_string()).collect()
    };
    assert_eq!(get(ringway.api(), "/readyz").await.0, 503, "ready without a container");
    run("a");
    eventually("the first", || members() == [owner.container("a")]).await;
    run("b");
    eventually("the second", || members() == [owner.container("a"), owner.container("b")]).await;
    let (mapping, digest) = (ringway.mapping(), ringway.state().pools[0].table.load().ring().digest());

    owner.docker(&["stop", "-t", "0", &owner.container("a")]);
    eventually("one left", || members() == [owner.container("b")]).await;
    assert_eq!(
        owner.docker(&["inspect", "-f", "{{.State.Running}}", &owner.container("a")]),
        "false",
        "Ringway started the container"
    );
    eventually_async("the metrics of the backend are removed", async || {
        !get(ringway.api(), "/metrics").await.1.contains(&format!("backend=\"{}\"", owner.container("a")))
    })
    .await;
    assert_eq!(ringway.metric("ringway_pool_backends_healthy", &[]).await, 1.0);
    owner.docker(&["rm", &owner.container("a")]);
    run("a");
    eventually("the new container is a backend", || members() == [owner.container("a"), owner.container("b")]).await;
    assert_eq!(ringway.mapping(), mapping, "the new container has other keys");
    assert_eq!(ringway.state().pools[0].table.load().ring().digest(), digest);
    drop(ringway);
    assert_eq!(
        owner.docker(&["ps", "-q", "--filter", &format!("label={label}")]).lines().count(),
        2,
        "Ringway stopped a container"
    );
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn labels_of_containers_say_how_they_take_part() {
    let owner = Owner::new().await;
    let (one, two) = (format!("{}.one", owner.name), format!("{}.two", owner.name));
    let run = |name: &str, pool: &str, listen: &str, labels: &[&str]| {
        let (name, ours) = (owner.container(name), format!("rwtest={}", owner.name));
        let pool = format!("ringway.pool={pool}");
        let mut words = vec!["run", "-d", "--name", &name, "--label", &ours, "--label", &pool];
        words.extend(labels.iter().flat_map(|label| ["--label", label]));
        words.extend([IMAGE, "echo-server", "--listen", listen, "--name", "x", "--grace-ms", "0"]);
        owner.docker(&words);
    };
    run("a", &one, "0.0.0.0:9001", &["ringway.port=9001", "ringway.weight=3", "ringway.check=/heartbeat"]);
    run("b", &one, "0.0.0.0:9002", &["ringway.port=9002", "ringway.max_connections=7"]);
    run("spare", &one, "0.0.0.0:9003", &["ringway.port=9003", "ringway.tier=1"]);
    run("wrong", &one, "0.0.0.0:9004", &["ringway.port=9004", "ringway.weight=many"]);
    run("sick", &two, "0.0.0.0:9005", &["ringway.port=9005", "ringway.check=/no-such-page"]);
    run("off", &two, "0.0.0.0:9006", &["ringway.port=9007", "ringway.check=off"]);
    run("elsewhere", &two, "0.0.0.0:9008", &["ringway.port=9009", "ringway.check=tcp", "ringway.check.port=9008"]);
    let yaml = format!(
        "api: {{ listen: \"127.0.0.1:0\" }}\nlisteners: [{{ name: web, listen: \"127.0.0.1:0\", pool: {one} }}]\npools:\n\
         \u{20} - {{ name: {one}, provider: {{ docker: {{ discover: {{ labels: true }} }} }}, health_check: {{ interval: 200ms }} }}\n\
         \u{20} - {{ name: {two}, provider: {{ docker: {{ discover: {{ labels: true }} }} }}, panic_threshold: 0, \
            health_check: {{ interval: 200ms, fall: 1 }} }}"
    );
    let ringway = Ringway::start(&yaml).await;
    let pool = |n: usize| -> Vec<(String, State, u32, u16, Option<u32>)> {
        let table = ringway.state().pools[n].table.load();
        let prefix = owner.container("");
        let of = |backend: &ringway::backend::Backend| {
            let ringway::backend::Membership { weight, tier, max_connections, .. } = backend.membership;
            (backend.id.replace(&prefix, ""), backend.state, weight, tier, max_connections)
        };
        table.backends().iter().map(of).collect()
    };
    let healthy = |name: &str, weight, tier, most| (name.to_owned(), State::Healthy, weight, tier, most);
    // The container with the wrong label is no backend.
    let expected = [healthy("a", 3, 0, None), healthy("b", 1, 0, Some(7)), healthy("spare", 1, 1, None)];
    eventually("the pool", || pool(0) == expected).await;
    let sick = ("sick".to_owned(), State::Unhealthy, 1, 0, None);
    eventually("the other pool", || {
        pool(1) == [healthy("elsewhere", 1, 0, None), healthy("off", 1, 0, None), sick.clone()]
    })
    .await;
    let mut client = TcpStream::connect(ringway.web()).await.unwrap();
    assert!(soon("an echo", echoes(&mut client)).await);
    // A new container of the same name may have other labels.
    owner.docker(&["rm", "-f", &owner.container("a")]);
    run("a", &one, "0.0.0.0:9001", &["ringway.port=9001", "ringway.weight=5"]);
    eventually("the new weight", || pool(0)[0] == healthy("a", 5, 0, None)).await;
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn a_container_that_is_told_to_stop_gets_no_new_connections_while_it_ends() {
    let owner = Owner::new().await;
    let label = format!("rwtest={}", owner.name);
    for name in ["a", "b"] {
        let echo = ["echo-server", "--listen", "0.0.0.0:9000", "--name", name, "--grace-ms", "60000"];
        let name = owner.container(name);
        owner.docker(&[&["run", "-d", "--name", &name, "--label", &label, IMAGE], &echo[..]].concat());
    }
    let provider = format!("docker: {{ discover: {{ label: {label}, port: 9000 }} }}");
    let ringway = Ringway::start(&config(&provider, "", "panic_threshold: 0")).await.all_healthy().await;
    let states = || ringway.states();
    eventually("both", || states() == [State::Healthy; 2]).await;
    let a = owner.container("a");
    // A signal that does not stop it.
    owner.docker(&["kill", "-s", "WINCH", &a]);
    let mut open = Vec::new();
    while ringway.backend(0).live.active.load(std::sync::atomic::Ordering::Relaxed) == 0 {
        let mut client = TcpStream::connect(ringway.web()).await.unwrap();
        assert!(soon("an echo", echoes(&mut client)).await);
        open.push(client);
    }
    assert_eq!(states(), [State::Healthy; 2]);

    // The demo server stops accepting at the signal, and ends when its connections have ended.
    let _stopping =
        Killed(Command::new("docker").args(["stop", "-t", "60", &a]).stdout(Stdio::null()).spawn().unwrap());
    eventually("the drain", || states() == [State::Draining, State::Healthy]).await;
    assert_eq!(owner.docker(&["inspect", "-f", "{{.State.Running}}", &a]), "true");
    let failed = ringway.metric("ringway_connect_failures_total", &[&a]).await;
    for _ in 0..50 {
        let mut client = TcpStream::connect(ringway.web()).await.unwrap();
        assert!(soon("an echo", echoes(&mut client)).await);
    }
    assert_eq!(ringway.metric("ringway_connect_failures_total", &[&a]).await, failed, "a new connection went there");
    for client in &mut open {
        assert!(soon("an echo of an open connection", echoes(client)).await);
    }
    assert_eq!(states(), [State::Draining, State::Healthy]);
    drop(open);
    eventually("its end", || states() == [State::Healthy]).await;
    owner.docker(&["start", &a]);
    eventually("its return", || states() == [State::Healthy; 2]).await;
}
