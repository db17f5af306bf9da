//! A bench runs the servers and the load on one processor and a balancer on another. It measures the CPU time of the
//! balancer.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::net::{TcpListener, TcpStream};

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
    /// A server that runs on a thread of its own, behind the second listener.
    pub(crate) second: SocketAddr,
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
        let second = server_on_thread()?;
        let mut bench =
            Self { servers: Vec::new(), second, balancer_cpu: places.balancer_cpu, load_cpu: places.load_cpu };
        for number in 0..servers {
            bench.servers.push(server_with(&["--name", &format!("server-{}", number + 1)], "127.0.0.1:0").await?);
        }
        Ok(bench)
    }

    /// Starts a balancer on its processor, in front of the servers.
    pub(crate) async fn start(&self, kind: Kind, program: &Path, connections: usize) -> anyhow::Result<Balancer> {
        Balancer::start(kind, program, &self.setup(&self.servers, connections), &Settings::default()).await
    }

    /// Starts Ringway in front of these backends. With several workers, Ringway runs on both processors.
    pub(crate) async fn start_before(
        &self,
        program: &Path,
        backends: &[SocketAddr],
        connections: usize,
        settings: &Settings,
    ) -> anyhow::Result<Balancer> {
        let mut setup = self.setup(backends, connections);
        if settings.workers > 1 {
            setup.processors.push(self.load_cpu);
        }
        Balancer::start(Kind::Ringway, program, &setup, settings).await
    }

    fn setup(&self, backends: &[SocketAddr], connections: usize) -> Setup {
        Setup {
            backends: backends.to_vec(),
            second: Some(self.second),
            connections: connections + 512,
            processors: vec![self.balancer_cpu],
        }
    }

    /// Creates this number of backends. They are loopback addresses of one server.
    pub(crate) async fn many(&self, backends: usize) -> anyhow::Result<Vec<SocketAddr>> {
        let server = server_with(&["--name", "many"], "0.0.0.0:0").await?;
        let address =
            |number: usize| anyhow::Ok(SocketAddr::new(load::loopback(u16::try_from(number)?), server.port()));
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
            Task::Connections => (Work::Connections, 32, Pace::Closed),
            Task::Bulk(streams) => (Work::Bulk(Direction::Down, TRANSFER), streams, Pace::Closed),
            Task::Rate(rate) => (Work::Requests, 64, Pace::Open(rate)),
        };
        Load {
            target,
            sources: SOURCES,
            work,
            protocol: Protocol::Echo,
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

/// Starts an echo server on a thread of its own.
fn server_on_thread() -> anyhow::Result<SocketAddr> {
    use clap::Parser as _;

    let listener = std::net::TcpListener::bind("127.0.0.1:0").context("cannot listen")?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let options = echo_server::Options::try_parse_from(["echo-server", "--name", "second"])?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("second".to_owned()).spawn(move || {
        runtime.block_on(async move {
            // The listener is valid, and the runtime has an I/O driver.
            if let Ok(listener) = TcpListener::from_std(listener) {
                echo_server::run(listener, options, std::future::pending()).await;
            }
        });
    })?;
    Ok(address)
}

/// Starts an echo server with these arguments in this process.
pub(crate) async fn server_with(arguments: &[&str], address: &str) -> anyhow::Result<SocketAddr> {
    use clap::Parser as _;

    let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
    let address = listener.local_addr()?;
    let options = echo_server::Options::try_parse_from(std::iter::once(&"echo-server").chain(arguments))?;
    tokio::spawn(echo_server::run(listener, options, std::future::pending()));
    Ok(address)
}
