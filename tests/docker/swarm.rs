//! The stack of examples/swarm on a Swarm of two nodes.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_yaml::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::backends::free_ports;
use crate::harness::engine::{IMAGE, Owner};
use crate::harness::program::Killed;
use crate::harness::{echoes, eventually, get, http, metric_in, skip};

/// A second engine, on a network of its own that leads to this machine.
struct Node {
    folder: TempDir,
    daemon: Killed,
    /// Holds the network namespace.
    _namespace: Killed,
    /// The addresses of this machine and of the node.
    addresses: [IpAddr; 2],
}

impl Node {
    async fn start(owner: &Owner) -> Self {
        let folder = tempfile::Builder::new().prefix("rwtest-node").tempdir().unwrap();
        let namespace = Killed(Command::new("unshare").args(["--net", "sleep", "600"]).spawn().unwrap());
        let pid = namespace.0.id().to_string();
        let own = std::fs::read_link("/proc/self/ns/net").unwrap();
        eventually("a namespace", || std::fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|one| one != own))
            .await;
        let run = |words: &str| {
            let mut words = words.split(' ');
            let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        };
        let (here, there) = (format!("rwn{}", std::process::id() % 100_000), "rwnode");
        let addresses = [1, 2].map(|last| IpAddr::from([10, 219, (std::process::id() % 250) as u8, last]));
        run(&format!("ip link add {here} type veth peer name {there}"));
        run(&format!("ip link set {there} netns {pid}"));
        run(&format!("ip address add {}/24 dev {here}", addresses[0]));
        run(&format!("ip link set {here} up"));
        for inside in [
            "link set lo up".to_owned(),
            format!("address add {}/24 dev {there}", addresses[1]),
            format!("link set {there} up"),
            // The engine wants one.
            format!("route add default via {}", addresses[0]),
        ] {
            run(&format!("nsenter -t {pid} -n ip {inside}"));
        }
        let path = folder.path().display().to_string();
        let config = serde_json::json!({
            "data-root": format!("{path}/data"), "exec-root": format!("{path}/exec"), "pidfile": format!("{path}/pid"),
            "hosts": [format!("unix://{path}/docker.sock")], "storage-driver": owner.docker(&["info", "--format", "{{.Driver}}"]),
        });
        std::fs::write(folder.path().join("daemon.json"), config.to_string()).unwrap();
        let log = std::fs::File::create(folder.path().join("log")).unwrap();
        let mut daemon = Command::new("nsenter");
        daemon.args(["-t", &pid, "-n", "dockerd", "--config-file"]).arg(folder.path().join("daemon.json"));
        let daemon = Killed(daemon.stdout(Stdio::null()).stderr(log).spawn().unwrap());
        let node = Self { folder, daemon, _namespace: namespace, addresses };
        eventually("the second engine", || node.docker(&["version"]).0).await;
        let load = format!("docker save {IMAGE} | docker --host {} load", node.host());
        run_shell(&load);
        node
    }

    fn host(&self) -> String {
        format!("unix://{}/docker.sock", self.folder.path().display())
    }

    fn docker(&self, words: &[&str]) -> (bool, String) {
        let output = Command::new("docker").args(["--host", &self.host()]).args(words).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&said).into_owned())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.docker(&["swarm", "leave", "--force"]);
        // With time to unmount what it has mounted.
        let _ = kill_process(Pid::from_child(&self.daemon.0), Signal::TERM);
        for _ in 0..200 {
            if !matches!(self.daemon.0.try_wait(), Ok(None)) {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        run_shell(&format!("umount -R {0}/data {0}/exec 2>/dev/null || true", self.folder.path().display()));
    }
}

/// Waits as [`eventually_async`](crate::harness::eventually_async) does, but longer: an engine can take ten seconds to start a
/// container, and Swarm starts one after the other.
async fn patiently(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(300);
    while !condition().await {
        assert!(Instant::now() < deadline, "not within five minutes: {what}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn run_shell(script: &str) {
    assert!(Command::new("sh").args(["-c", script]).stdout(Stdio::null()).status().unwrap().success(), "{script}");
}

/// A stack with a Ringway on each of two nodes, which is removed when it is dropped. The engine then leaves the Swarm.
struct Stack {
    name: String,
    owner: Owner,
    _folder: TempDir,
    /// Of each Ringway: its listener, and its side port.
    ports: [(SocketAddr, SocketAddr); 2],
    node: Node,
}

impl Stack {
    /// `None`: the engine of this machine is in a Swarm of somebody else.
    async fn deploy() -> Option<Self> {
        let owner = Owner::new().await;
        if owner.docker(&["info", "--format", "{{.Swarm.LocalNodeState}}"]) != "inactive" {
            return None;
        }
        let node = Node::start(&owner).await;
        let name = owner.name.replace('-', "x");
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/swarm");
        let [web, api] = free_ports();
        let mut stack: Value =
            serde_yaml::from_str(&std::fs::read_to_string(root.join("stack.yaml")).unwrap()).unwrap();
        stack["configs"]["ringway"]["file"] = root.join("ringway.yaml").display().to_string().into();
        // The test waits for each task.
        stack["services"]["web"]["deploy"]["update_config"]["delay"] = "1s".into();
        stack["services"]["web"]["deploy"]["update_config"]["parallelism"] = 2.into();
        for (n, port) in [web, api].into_iter().enumerate() {
            stack["services"]["ringway"]["ports"][n]["published"] = port.into();
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("stack.yaml");
        std::fs::write(&file, serde_yaml::to_string(&stack).unwrap()).unwrap();
        let ports = node.addresses.map(|ip| (SocketAddr::new(ip, web), SocketAddr::new(ip, api)));
        // From here on, the drop cleans up.
        let stack = Self { name, owner, _folder: folder, ports, node };
        let manager = stack.node.addresses[0].to_string();
        stack.owner.docker(&["swarm", "init", "--advertise-addr", &manager]);
        let token = stack.owner.docker(&["swarm", "join-token", "-q", "worker"]);
        let (joined, said) = stack.node.docker(&["swarm", "join", "--token", &token, &format!("{manager}:2377")]);
        assert!(joined, "{said}");
        let file = file.display().to_string();
        stack.owner.docker(&["stack", "deploy", "--resolve-image", "never", "-c", &file, &stack.name]);
        Some(stack)
    }

    /// Waits until both Ringways have this number of backends, all healthy, and equal rings.
    async fn settles(&self, backends: usize) {
        patiently(&format!("{backends} backends in two equal rings"), async || {
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
        let containers = ["ps", "-aq", "--filter", &filter];
        for _ in 0..300 {
            let left = self.owner.try_docker(&containers).1
                + &self.node.docker(&containers).1
                + &self.owner.try_docker(&["network", "ls", "-q", "--filter", &filter]).1;
            if left.is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        self.owner.try_docker(&["swarm", "leave", "--force"]);
        self.owner.try_docker(&["network", "rm", "docker_gwbridge"]);
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
    let Some(stack) = Stack::deploy().await else { return skip("the Docker engine is in a Swarm") };
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
    patiently("new tasks", async || {
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
    // A task that ends may cut a connection in its queue.
    assert!(failed as f64 <= cut && failed * 1000 <= tried, "{failed} failed, and the service cut {cut}");
}
