//! Discovery of containers that Ringway does not manage.

use ringway::backend::State;

use crate::harness::engine::{IMAGE, Owner};
use crate::harness::{Ringway, config, eventually, eventually_async, get};

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
