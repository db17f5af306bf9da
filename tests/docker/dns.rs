//! The provider `dns` with the engine's own name server, on a network that a user has made.

use std::net::SocketAddr;
use std::time::Instant;

use crate::harness::engine::{IMAGE, Owner};
use crate::harness::program::file;
use crate::harness::{eventually_async, get, http};

/// The ids of the backends that are healthy.
async fn healthy(api: SocketAddr) -> Vec<String> {
    if tokio::net::TcpStream::connect(api).await.is_err() {
        return Vec::new();
    }
    let status: serde_json::Value = serde_json::from_str(&get(api, "/api/status").await.1).unwrap();
    let backends = status["pools"][0]["backends"].as_array().unwrap();
    let healthy = backends.iter().filter(|backend| backend["state"] == "healthy");
    healthy.map(|backend| backend["id"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn the_containers_of_a_service_are_the_backends_of_its_name() {
    let owner = Owner::new().await;
    let (network, label) = (owner.network(), format!("rwtest={}", owner.name));
    let start = |name: &str, words: &[&str]| {
        let name = owner.container(name);
        let run = ["run", "-d", "--name", &name, "--label", &label, "--network", &network];
        owner.docker(&[&run[..], words].concat());
    };
    let serve = |name: &str| {
        let echo = ["echo-server", "--listen", "0.0.0.0:9000", "--name", name, "--grace-ms", "0"];
        start(name, &[&["--network-alias", "web", IMAGE], &echo[..]].concat());
    };
    let address = |name: &str| {
        let format = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
        format!("{}:9000", owner.docker(&["inspect", "-f", format, &owner.container(name)]))
    };
    let sorted = |names: &[&str]| {
        let mut ids: Vec<_> = names.iter().map(|name| address(name)).collect();
        ids.sort();
        ids
    };
    serve("a");
    serve("b");
    let yaml = file(
        "api: { listen: \"0.0.0.0:8001\" }\n\
         listeners: [{ name: web, listen: \"0.0.0.0:8000\", pool: web }]\n\
         pools:\n  - name: web\n    drain: 1s\n    health_check: { kind: http, path: /heartbeat, interval: 500ms, fall: 2 }\n    \
         provider: { dns: { name: web., port: 9000, refresh: { max: 1s }, gone_after: 3s } }\n",
    );
    let readable = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    std::fs::set_permissions(yaml.path(), readable).unwrap();
    let mount = format!("{}:/etc/ringway/config.yaml:ro", yaml.path().display());
    start("ringway", &["-v", &mount, "-p", "127.0.0.1::8000", "-p", "127.0.0.1::8001", IMAGE]);
    let port = |port: &str| -> SocketAddr {
        owner.docker(&["port", &owner.container("ringway"), port]).lines().next().unwrap().parse().unwrap()
    };
    let (web, api) = (port("8000"), port("8001"));
    eventually_async("both", async || healthy(api).await == sorted(&["a", "b"])).await;

    // One more container of the service.
    serve("c");
    let began = Instant::now();
    eventually_async("three", async || healthy(api).await == sorted(&["a", "b", "c"])).await;
    println!("a new container was a healthy backend after {:?}", began.elapsed());

    // A recreated container has another address, while the engine says that the old answer is valid for ten minutes.
    owner.docker(&["rm", "-f", &owner.container("a")]);
    start("guest", &[IMAGE, "echo-server", "--listen", "0.0.0.0:9000"]);
    serve("a");
    let began = Instant::now();
    eventually_async("the recreated one", async || healthy(api).await == sorted(&["a", "b", "c"])).await;
    println!("a recreated container was a healthy backend after {:?}", began.elapsed());
    assert_eq!(http(web, "GET", "/heartbeat", b"").await.status(), 200);

    // The name of a service without containers does not exist, or the engine asks a server that is not there.
    for name in ["a", "b", "c"] {
        owner.docker(&["rm", "-f", &owner.container(name)]);
    }
    eventually_async("none", async || healthy(api).await.is_empty()).await;
    serve("d");
    eventually_async("another one", async || healthy(api).await == sorted(&["d"])).await;
}
