//! Docker engines: the engine of this machine, and private engines that a test may stop. Every test removes its
//! containers.

use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::sync::{Mutex, MutexGuard};

use super::program::{Killed, Program};
use super::{PATIENCE, eventually};

/// The image of the repository.
pub(crate) const IMAGE: &str = "ringway:latest";

/// Tests that need an engine run one after the other, because they share it and some of them measure time.
static TURN: Mutex<()> = Mutex::const_new(());

/// A separate owner on an engine. Its containers are removed when it is dropped.
pub(crate) struct Owner {
    pub(crate) name: String,
    /// `DOCKER_HOST` of a private engine.
    host: Option<String>,
    /// Whether the drop removes the containers.
    cleans: bool,
    _turn: Option<MutexGuard<'static, ()>>,
}

impl Owner {
    /// Creates an owner on the engine of this machine, which has the image.
    pub(crate) async fn new() -> Self {
        let turn = TURN.lock().await;
        image();
        Self::named(None, Some(turn))
    }

    /// Creates a second owner in the same test.
    pub(crate) fn beside(&self, name: &str) -> Self {
        Self { name: name.to_owned(), host: self.host.clone(), cleans: true, _turn: None }
    }

    fn named(host: Option<String>, turn: Option<MutexGuard<'static, ()>>) -> Self {
        let name = format!("rwtest{}-{}", std::process::id(), unique());
        Self { name, host, cleans: true, _turn: turn }
    }

    /// Runs `docker` with these words and returns its output. Fails if the command fails.
    pub(crate) fn docker(&self, words: &[&str]) -> String {
        let (done, said) = self.try_docker(words);
        assert!(done, "docker {words:?}: {said}");
        said
    }

    /// Runs `docker` with these words. Returns whether it succeeded, and its output.
    pub(crate) fn try_docker(&self, words: &[&str]) -> (bool, String) {
        docker(self.host.as_deref(), words)
    }

    /// The ids of the containers of this owner in every state.
    pub(crate) fn containers(&self) -> Vec<String> {
        let filter = format!("label=ringway.owner={}", self.name);
        let mut ids: Vec<String> =
            self.docker(&["ps", "-aq", "--no-trunc", "--filter", &filter]).lines().map(str::to_owned).collect();
        ids.sort();
        ids
    }

    /// Creates a network for this owner.
    pub(crate) fn network(&self) -> String {
        let name = format!("{}-net", self.name);
        self.docker(&["network", "create", &name]);
        name
    }

    /// The name of the container of a slot.
    pub(crate) fn container(&self, slot: &str) -> String {
        format!("{}-{slot}", self.name)
    }

    /// A config with this owner and a pool `echo` with replicas of the demo server. `docker` is further keys of the
    /// provider, `pool` is further lines of the pool.
    pub(crate) fn config(&self, replicas: usize, docker: &str, pool: &str) -> String {
        format!("docker: {{ owner: {} }}\n{}", self.name, super::config(&provider(replicas, docker), "", pool))
    }

    /// Starts the program with this config on this engine.
    pub(crate) async fn program(&self, yaml: &str) -> Program {
        match &self.host {
            Some(host) => Program::start_with(yaml, &[("DOCKER_HOST", host)]).await,
            None => Program::start(yaml).await,
        }
    }
}

/// A provider with replicas of the demo server.
pub(crate) fn provider(replicas: usize, docker: &str) -> String {
    let own = if docker.contains("command:") {
        ""
    } else {
        "command: [echo-server, --listen, \"0.0.0.0:{port}\", --name, \"{slot}\", --grace-ms, \"0\"], "
    };
    format!(
        "docker: {{ replicas: {replicas}, image: \"{IMAGE}\", pull: never, port: 9000, stop_grace: 1s, {own}{docker} }}"
    )
}

impl Drop for Owner {
    fn drop(&mut self) {
        if !self.cleans {
            return;
        }
        // The Ringway of this owner may just be ending while it makes a container.
        for _ in 0..3 {
            for filter in ["ringway.owner", "rwtest"] {
                let filter = format!("label={filter}={}", self.name);
                let (_, ids) = self.try_docker(&["ps", "-aq", "--filter", &filter]);
                let ids: Vec<&str> = ids.lines().collect();
                if !ids.is_empty() {
                    self.try_docker(&[&["rm", "-f", "-v"], &ids[..]].concat());
                }
            }
        }
        let network = format!("name={}-net", self.name);
        let (_, id) = self.try_docker(&["network", "ls", "-q", "--filter", &network]);
        if !id.is_empty() {
            self.try_docker(&["network", "rm", &id]);
        }
    }
}

fn unique() -> usize {
    use std::sync::atomic::{AtomicUsize, Ordering};

    static NEXT: AtomicUsize = AtomicUsize::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn docker(host: Option<&str>, words: &[&str]) -> (bool, String) {
    // The timeout keeps an engine that hangs from blocking the tests.
    let mut command = Command::new("timeout");
    command.args(["120", "docker"]);
    if let Some(host) = host {
        command.args(["--host", host]);
    }
    let output = command.args(words).stdin(Stdio::null()).output().expect("docker can be run");
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).trim().to_owned())
}

/// Builds the image from this source, once for all tests.
pub(crate) fn image() {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/docker/image.sh");
        let output = Command::new(script).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "docker/image.sh: {said}");
    });
}

/// A private engine that has the image. A test may stop, continue and restart it.
pub(crate) struct PrivateEngine {
    folder: TempDir,
    bridge: String,
    daemon: Option<Killed>,
    port: u16,
    owner: Option<Owner>,
    _turn: MutexGuard<'static, ()>,
}

impl PrivateEngine {
    /// Starts `dockerd` with separate folders and a separate bridge. With `tcp` the owner connects by TCP.
    pub(crate) async fn start(tcp: bool) -> Self {
        let turn = TURN.lock().await;
        image();
        let folder = tempfile::Builder::new().prefix("rwtest-engine").tempdir().unwrap();
        let bridge = format!("rwt{}", std::process::id() % 100_000);
        let subnet = 1 + unique() % 250;
        ip(&["link", "add", "name", &bridge, "type", "bridge"]);
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut engine = Self { folder, bridge, daemon: None, port, owner: None, _turn: turn };
        ip(&["address", "add", &format!("10.213.{subnet}.1/24"), "dev", &engine.bridge]);
        ip(&["link", "set", &engine.bridge, "up"]);
        let driver = docker(None, &["info", "--format", "{{.Driver}}"]).1;
        let path = engine.folder.path().display();
        let config = serde_json::json!({
            "data-root": format!("{path}/data"), "exec-root": format!("{path}/exec"), "pidfile": format!("{path}/pid"),
            "hosts": [engine.socket(), format!("tcp://127.0.0.1:{port}")], "bridge": engine.bridge,
            "iptables": false, "ip6tables": false, "live-restore": true, "storage-driver": driver,
        });
        std::fs::write(engine.folder.path().join("daemon.json"), config.to_string()).unwrap();
        engine.run().await;
        let load = format!("docker save {IMAGE} | docker --host {} load", engine.socket());
        assert!(Command::new("sh").args(["-c", &load]).stdout(Stdio::null()).status().unwrap().success(), "{load}");
        let host = if tcp { format!("tcp://127.0.0.1:{}", engine.port) } else { engine.socket() };
        engine.owner = Some(Owner::named(Some(host), None));
        engine
    }

    /// The owner on this engine. The engine removes the containers, because it may have to continue first.
    pub(crate) fn owner(&self) -> Owner {
        let owner = self.owner.as_ref().unwrap();
        Owner { name: owner.name.clone(), host: owner.host.clone(), cleans: false, _turn: None }
    }

    fn socket(&self) -> String {
        format!("unix://{}/docker.sock", self.folder.path().display())
    }

    /// Starts the daemon and waits until it answers.
    pub(crate) async fn run(&mut self) {
        let log = std::fs::File::create(self.folder.path().join("log")).unwrap();
        let daemon = Command::new("dockerd")
            .arg("--config-file")
            .arg(self.folder.path().join("daemon.json"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        self.daemon = Some(Killed(daemon.unwrap()));
        let (log, socket) = (self.folder.path().join("log"), self.socket());
        eventually("the private engine", || {
            let child = &mut self.daemon.as_mut().unwrap().0;
            let log = || std::fs::read_to_string(&log).unwrap_or_default();
            assert!(child.try_wait().unwrap().is_none(), "dockerd ended:\n{}", log());
            docker(Some(&socket), &["version"]).0
        })
        .await;
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let daemon = self.daemon.as_ref().unwrap();
        kill_process(Pid::from_child(&daemon.0), signal).unwrap();
    }

    /// Stops the daemon and waits for its end. The containers continue.
    pub(crate) fn stop(&mut self) {
        self.signal(Signal::TERM);
        if let Some(mut daemon) = self.daemon.take() {
            ended(&mut daemon.0);
        }
    }
}

impl Drop for PrivateEngine {
    fn drop(&mut self) {
        if self.daemon.is_some() {
            // The daemon may be suspended.
            self.signal(Signal::CONT);
        }
        // The drop of the owner removes the containers.
        self.owner = None;
        if self.daemon.is_some() {
            self.stop();
        }
        let _ = Command::new("ip").args(["link", "delete", &self.bridge]).status();
        let path = self.folder.path().display();
        // The engine mounts its folder onto itself.
        let _ = Command::new("umount").args(["-R", &format!("{path}/data")]).stderr(Stdio::null()).status();
    }
}

fn ended(child: &mut Child) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() && std::time::Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn ip(words: &[&str]) {
    let done = Command::new("ip").args(words).status().expect("ip can be run");
    assert!(done.success(), "ip {words:?}");
}
