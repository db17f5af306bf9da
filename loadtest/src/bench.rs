//! A bench runs the servers and the load on one processor and a balancer on another. It measures the CPU time of the
//! balancer.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use echo_server::Listen;
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream, UnixListener};

use crate::balancers::{Balancer, Kind, Settings, Setup, pin};
use crate::client::{Client, Protocol};
use crate::load::{self, Direction, Load, Pace, Work};
use crate::preflight;
use crate::process::Tree;
use crate::record::Record;

/// The highest number of addresses that clients connect from.
const SOURCES: u16 = 250;

/// Bytes of one transfer.
const TRANSFER: usize = 64 << 20;

/// The processors of the balancer and of everything else.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Places {
    /// Processor that only the balancer uses
    #[arg(long, default_value_t = 0, value_name = "N")]
    balancer_cpu: usize,
    /// Processor of the servers and the load
    #[arg(long, default_value_t = 1, value_name = "N")]
    load_cpu: usize,
}

/// The servers and the processors.
#[derive(Debug)]
pub(crate) struct Bench {
    /// The addresses of the servers, which run in this process.
    pub(crate) servers: Vec<SocketAddr>,
    /// Their TCP addresses, for the balancers.
    pub(crate) backends: Vec<Listen>,
    /// Their Unix sockets.
    unix: Vec<Listen>,
    /// A server that runs on a thread of its own, behind the second listener.
    pub(crate) second: SocketAddr,
    /// The same server on a Unix socket.
    second_unix: Listen,
    /// The directory of the Unix sockets.
    sockets: TempDir,
    balancer_cpu: usize,
    load_cpu: usize,
}

/// One kind of work with a measured cost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Task {
    /// Requests on 64 connections.
    Requests,
    /// Connections with one request, 32 at a time.
    Connections,
    /// Connections with one request, 32 at a time. The request is the first message of a TLS client.
    Named,
    /// Downloads on this number of connections.
    Bulk(usize),
    /// Requests on 64 connections at this rate.
    Rate(f64),
}

/// The cost of a piece of work.
#[derive(Debug)]
pub(crate) struct Cost {
    /// CPU time of the balancer.
    pub(crate) cpu: Duration,
    /// Duration of the load.
    pub(crate) took: Duration,
    pub(crate) record: Record,
}

impl Cost {
    /// Microseconds of CPU time for each answer.
    pub(crate) fn per_answer(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / (self.record.answered() as f64).max(1.0)
    }

    /// Seconds of CPU time for each GB (10^9 bytes).
    pub(crate) fn per_gigabyte(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e9 / (self.record.bytes() as f64).max(1.0)
    }

    /// Answers per second.
    pub(crate) fn rate(&self) -> f64 {
        self.record.answered() as f64 / self.took.as_secs_f64()
    }
}

impl Bench {
    /// Pins this process and starts the servers. The process must not have other threads yet.
    pub(crate) async fn new(places: &Places, servers: usize, connections: usize) -> anyhow::Result<Self> {
        // This process holds both ends of each connection.
        preflight::open_files(2 * connections as u64)?;
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let highest = places.balancer_cpu.max(places.load_cpu);
        anyhow::ensure!(
            places.balancer_cpu != places.load_cpu && highest < processors,
            "the bench needs two different processors (this machine has {processors}): choose them with \
             --balancer-cpu and --load-cpu"
        );
        pin(&[places.load_cpu]).with_context(|| format!("cannot run on processor {}", places.load_cpu))?;
        let sockets = TempDir::new().context("cannot make a directory for sockets")?;
        // A balancer that root starts may connect as another user (nginx).
        std::fs::set_permissions(sockets.path(), PermissionsExt::from_mode(0o755))?;
        let second_unix = sockets.path().join("second");
        let mut bench = Self {
            servers: Vec::new(),
            backends: Vec::new(),
            unix: Vec::new(),
            second: server_on_thread(&second_unix)?,
            second_unix: Listen::Unix(second_unix),
            balancer_cpu: places.balancer_cpu,
            load_cpu: places.load_cpu,
            sockets,
        };
        for number in 1..=servers {
            let name = format!("server-{number}");
            let address = server_with(&["--name", &name], "127.0.0.1:0").await?;
            let path = bench.sockets.path().join(&name);
            let listener = UnixListener::from_std(listen_on_path(&path)?)?;
            tokio::spawn(echo_server::run(listener, options(&["--name", &name])?, std::future::pending()));
            bench.servers.push(address);
            bench.backends.push(Listen::Ip(address));
            bench.unix.push(Listen::Unix(path));
        }
        Ok(bench)
    }

    /// Starts a balancer on its processor, in front of the servers, which it reaches by TCP or by Unix sockets. With
    /// `by_name` it also has a listener with routes by server name.
    pub(crate) async fn start(
        &self,
        kind: Kind,
        program: &Path,
        connections: usize,
        by_unix: bool,
        by_name: bool,
    ) -> anyhow::Result<Balancer> {
        let mut setup = self.setup(if by_unix { &self.unix } else { &self.backends }, connections);
        setup.by_name = by_name;
        if by_unix {
            setup.second = Some(self.second_unix.clone());
        }
        Balancer::start(kind, program, &setup, &Settings::default()).await
    }

    /// Starts Ringway in front of these backends. With several workers, Ringway runs on both processors.
    pub(crate) async fn start_before(
        &self,
        program: &Path,
        backends: &[Listen],
        connections: usize,
        settings: &Settings,
    ) -> anyhow::Result<Balancer> {
        let mut setup = self.setup(backends, connections);
        if settings.workers > 1 {
            setup.processors.push(self.load_cpu);
        }
        Balancer::start(Kind::Ringway, program, &setup, settings).await
    }

    fn setup(&self, backends: &[Listen], connections: usize) -> Setup {
        Setup {
            backends: backends.to_vec(),
            second: Some(Listen::Ip(self.second)),
            by_name: false,
            connections: connections + 512,
            processors: vec![self.balancer_cpu],
        }
    }

    /// Creates this number of backends. They are loopback addresses of one server.
    pub(crate) async fn many(&self, backends: usize) -> anyhow::Result<Vec<Listen>> {
        let server = server_with(&["--name", "many"], "0.0.0.0:0").await?;
        let address = |number: usize| {
            anyhow::Ok(Listen::Ip(SocketAddr::new(load::loopback(u16::try_from(number)?), server.port())))
        };
        (1..=backends).map(address).collect()
    }

    /// Puts work on the target and measures the CPU time of the processes in `tree`.
    pub(crate) async fn measure(
        &self,
        task: Task,
        target: SocketAddr,
        tree: Option<Tree>,
        duration: Duration,
    ) -> anyhow::Result<Cost> {
        let load = Self::load(task, target, duration);
        let before = tree.map(Tree::cpu).unwrap_or_default();
        let (record, took) = put(&load).await?;
        let cpu = tree.map(Tree::cpu).unwrap_or_default().saturating_sub(before);
        Ok(Cost { cpu, took, record })
    }

    /// Puts requests on 4 connections on `second`, beside downloads on 32 connections on `target`. Measures the requests. Their
    /// clients and their server run on threads of their own, so they do not wait in the queues of the downloads.
    pub(crate) async fn beside(
        &self,
        target: SocketAddr,
        second: SocketAddr,
        duration: Duration,
    ) -> anyhow::Result<Record> {
        let (requests, bulk) = (
            Load { connections: 4, ..Self::load(Task::Requests, second, duration) },
            Self::load(Task::Bulk(32), target, duration),
        );
        let (sender, measured) = tokio::sync::oneshot::channel();
        std::thread::Builder::new().name("requests".to_owned()).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let measured = runtime.map_err(anyhow::Error::from).and_then(|runtime| runtime.block_on(put(&requests)));
            // The caller may have failed meanwhile.
            let _ = sender.send(measured);
        })?;
        put(&bulk).await?;
        Ok(measured.await.context("the requests ended early")??.0)
    }

    fn load(task: Task, target: SocketAddr, duration: Duration) -> Load {
        let (work, connections, pace) = match task {
            Task::Requests => (Work::Requests, 64, Pace::Closed),
            Task::Connections | Task::Named => (Work::Connections, 32, Pace::Closed),
            Task::Bulk(streams) => (Work::Bulk(Direction::Down, TRANSFER), streams, Pace::Closed),
            Task::Rate(rate) => (Work::Requests, 64, Pace::Open(rate)),
        };
        Load {
            target,
            sources: SOURCES,
            work,
            protocol: if task == Task::Named { Protocol::Hello } else { Protocol::Echo },
            connections,
            share: None,
            pace,
            duration,
            timeout: Duration::from_secs(10),
            precise: true,
        }
    }

    /// Opens connections through the target, and returns when the servers have accepted all of them.
    pub(crate) async fn idle(&self, target: SocketAddr, connections: usize) -> anyhow::Result<Vec<TcpStream>> {
        let mut open = Vec::with_capacity(connections);
        for number in 0..connections {
            let source = load::loopback(u16::try_from(number % usize::from(SOURCES))?);
            open.push(crate::client::connect(target, Some(source)).await?);
        }
        // The servers accept the last connection after all others, so its answer shows that they have accepted all.
        let mut last = Client::new(target, None, Protocol::Echo);
        let answer = tokio::time::timeout(Duration::from_secs(10), last.request()).await;
        answer.context("no answer after the idle connections")?.map_err(anyhow::Error::msg)?;
        tokio::time::sleep(Duration::from_millis(500)).await;
        Ok(open)
    }
}

/// Puts the load on its target. Any failure is an error.
pub(crate) async fn put(load: &Load) -> anyhow::Result<(Record, Duration)> {
    preflight::tracking()?;
    let record = Arc::new(Mutex::new(Record::default()));
    let began = Instant::now();
    load::run(load, &record).await;
    let took = began.elapsed();
    let record = std::mem::take(&mut *record.lock().unwrap_or_else(PoisonError::into_inner));
    if let Some((failure, count)) = record.failures.iter().next() {
        anyhow::bail!("{:?} on {}: failed {count} times: {failure}", load.work, load.target);
    }
    anyhow::ensure!(
        record.answered() > 0 || record.bytes() > 0,
        "{:?} on {}: no response received",
        load.work,
        load.target
    );
    Ok((record, took))
}

/// Listens on a Unix socket to which every user may connect.
fn listen_on_path(path: &Path) -> anyhow::Result<std::os::unix::net::UnixListener> {
    let listener = std::os::unix::net::UnixListener::bind(path)
        .with_context(|| format!("cannot listen on unix:{}", path.display()))?;
    listener.set_nonblocking(true)?;
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o777))?;
    Ok(listener)
}

/// Starts an echo server on a thread of its own. It listens on a Unix socket too.
fn server_on_thread(path: &Path) -> anyhow::Result<SocketAddr> {
    let unix = listen_on_path(path)?;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").context("cannot listen")?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let options = options(&["--name", "second"])?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("second".to_owned()).spawn(move || {
        runtime.block_on(async move {
            // The listeners are valid, and the runtime has an I/O driver.
            if let (Ok(listener), Ok(unix)) = (TcpListener::from_std(listener), UnixListener::from_std(unix)) {
                let on_unix = echo_server::run(unix, options.clone(), std::future::pending());
                tokio::join!(echo_server::run(listener, options, std::future::pending()), on_unix);
            }
        });
    })?;
    Ok(address)
}

/// Starts an echo server with these arguments in this process.
pub(crate) async fn server_with(arguments: &[&str], address: &str) -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
    let address = listener.local_addr()?;
    tokio::spawn(echo_server::run(listener, options(arguments)?, std::future::pending()));
    Ok(address)
}

fn options(arguments: &[&str]) -> anyhow::Result<echo_server::Options> {
    use clap::Parser as _;

    Ok(echo_server::Options::try_parse_from(std::iter::once(&"echo-server").chain(arguments))?)
}
