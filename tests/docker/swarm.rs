//! The stack of examples/swarm on a Swarm of one node.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_yaml::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::backends::free_ports;
use crate::harness::engine::Owner;
use crate::harness::{echoes, eventually, eventually_async, get, http, metric_in};

/// A stack of two Ringways, which is removed when it is dropped. The engine leaves the Swarm, if it was not in one before.
struct Stack {
    name: String,
    owner: Owner,
    has_joined: bool,
    _folder: TempDir,
    /// Of each Ringway: its listener, and its side port.
    ports: [(SocketAddr, SocketAddr); 2],
}

impl Stack {
    async fn deploy() -> Self {
        let owner = Owner::new().await;
        let has_joined = owner.docker(&["info", "--format", "{{.Swarm.LocalNodeState}}"]) == "inactive";
        if has_joined {
            owner.docker(&["swarm", "init", "--advertise-addr", "127.0.0.1"]);
        }
        let name = owner.name.replace('-', "x");
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/swarm");
        let ports: [u16; 4] = free_ports();
        let mut stack: Value =
            serde_yaml::from_str(&std::fs::read_to_string(root.join("stack.yaml")).unwrap()).unwrap();
        stack["configs"]["ringway"]["file"] = root.join("ringway.yaml").display().to_string().into();
        stack["configs"]["ringway"]["name"] = format!("{name}-config").into();
        // The test waits for each task.
        stack["services"]["web"]["deploy"]["update_config"]["delay"] = "1s".into();
        let second = stack["services"]["ringway"].clone();
        stack["services"]["second"] = second;
        for (service, ports) in std::iter::zip(["ringway", "second"], ports.chunks(2)) {
            for (n, port) in ports.iter().enumerate() {
                stack["services"][service]["ports"][n]["published"] = (*port).into();
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("stack.yaml");
        std::fs::write(&file, serde_yaml::to_string(&stack).unwrap()).unwrap();
        let at = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        let ports = [(at(ports[0]), at(ports[1])), (at(ports[2]), at(ports[3]))];
        let stack = Self { name, owner, has_joined, _folder: folder, ports };
        stack.owner.docker(&[
            "stack",
            "deploy",
            "--resolve-image",
            "never",
            "-c",
            &file.display().to_string(),
            &stack.name,
        ]);
        stack
    }

    /// Waits until both Ringways have this number of backends, all healthy, and equal rings.
    async fn settles(&self, backends: usize) {
        eventually_async(&format!("{backends} backends in two equal rings"), async || {
            let mut digests = Vec::new();
            for (_, api) in self.ports {
                let Some(status) = status(api).await else { return false };
                let pool = &status["pools"][0];
                let members = pool["backends"].as_array().cloned().unwrap_or_default();
                if members.len() != backends || members.iter().any(|one| one["state"] != "healthy") {
                    return false;
                }
                digests.push(pool["ring"]["digest"].clone());
            }
            digests[0] == digests[1]
        })
        .await;
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        self.owner.try_docker(&["stack", "rm", &self.name]);
        let filter = format!("label=com.docker.stack.namespace={}", self.name);
        for _ in 0..300 {
            let left = self.owner.try_docker(&["ps", "-aq", "--filter", &filter]).1
                + &self.owner.try_docker(&["network", "ls", "-q", "--filter", &filter]).1;
            if left.is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        if self.has_joined {
            self.owner.try_docker(&["swarm", "leave", "--force"]);
        }
    }
}

/// The status of a Ringway; `None` while it does not answer. The engine accepts connections before the container does.
async fn status(api: SocketAddr) -> Option<serde_json::Value> {
    let ask = async {
        let mut stream = TcpStream::connect(api).await.ok()?;
        stream.write_all(b"GET /api/status HTTP/1.0\r\nhost: localhost\r\n\r\n").await.ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await.ok()?;
        serde_json::from_str(text.split_once("\r\n\r\n")?.1).ok()
    };
    tokio::time::timeout(Duration::from_secs(5), ask).await.ok()?
}

/// Where the client with this address goes.
async fn backend_of(api: SocketAddr, client: &str) -> String {
    let answer: serde_json::Value =
        serde_json::from_str(&get(api, &format!("/api/explain?listener=web&from={client}:5000")).await.1).unwrap();
    let walk = answer["pool"]["walk"].as_array().unwrap_or_else(|| panic!("{answer:#}"));
    walk[0]["backend"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a Docker engine"]
async fn two_ringways_of_a_swarm_agree_and_follow_a_service_that_scales_and_is_updated() {
    let stack = Stack::deploy().await;
    stack.settles(3).await;
    let [(web, api), (second_web, second_api)] = stack.ports;
    for n in 0..100 {
        let client = format!("10.1.2.{n}");
        assert_eq!(backend_of(api, &client).await, backend_of(second_api, &client).await, "{client}");
    }
    let server = async |web| {
        let answer = http(web, "POST", "/api/request", b"{}").await;
        serde_json::from_slice::<serde_json::Value>(answer.body()).unwrap()["server"].as_str().unwrap().to_owned()
    };
    let through_one = server(web).await;
    assert!(through_one.starts_with("web-"), "{through_one}");
    assert_eq!(through_one, server(second_web).await, "the same client reaches the same task");

    let service = format!("{}_web", stack.name);
    stack.owner.docker(&["service", "scale", "-d", &format!("{service}=5")]);
    stack.settles(5).await;

    // 500 connections each second, while all tasks are replaced.
    let (stop, tried, failed) =
        (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let mut clients = tokio::task::JoinSet::new();
    for n in 0..50_u64 {
        let (stop, tried, failed) = (Arc::clone(&stop), Arc::clone(&tried), Arc::clone(&failed));
        clients.spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_millis(100));
            tokio::time::sleep(Duration::from_millis(2 * n)).await;
            while !stop.load(Ordering::Relaxed) {
                ticks.tick().await;
                tried.fetch_add(1, Ordering::Relaxed);
                let served = async {
                    let mut stream = TcpStream::connect(if n % 2 == 0 { web } else { second_web }).await.ok()?;
                    echoes(&mut stream).await.then_some(())
                };
                let served = tokio::time::timeout(Duration::from_secs(10), served).await;
                failed.fetch_add(u64::from(served.ok().flatten().is_none()), Ordering::Relaxed);
            }
        });
    }
    let tasks = || stack.owner.docker(&["service", "ps", "-q", "--filter", "desired-state=running", &service]);
    let before: Vec<String> = tasks().lines().map(str::to_owned).collect();
    stack.owner.docker(&["service", "update", "-d", "--force", &service]);
    eventually("new tasks", || {
        let now = tasks();
        now.lines().count() == 5 && !before.iter().any(|old| now.contains(old.as_str()))
    })
    .await;
    stack.settles(5).await;
    stop.store(true, Ordering::Relaxed);
    clients.join_all().await;
    let (tried, failed) = (tried.load(Ordering::Relaxed), failed.load(Ordering::Relaxed));
    let mut cut = 0.0;
    for (_, api) in stack.ports {
        let metrics = get(api, "/metrics").await.1;
        assert_eq!(metric_in(&metrics, "ringway_connections_refused_total", &[]), 0.0, "Ringway refused a connection");
        cut += metric_in(&metrics, "ringway_connections_ended_total", &["backend_reset"]);
    }
    println!("{failed} of {tried} connections failed during the update; the service itself cut {cut}");
    assert!(tried > 1000, "only {tried} connections");
    assert!(failed as f64 <= cut, "{failed} failed, and the service cut {cut}");
}
