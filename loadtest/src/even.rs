//! `loadtest even` measures how evenly long connections are spread over backends: by the ring with and without a bound, by least
//! connections, and by the same settings of HAProxy. Few clients open most of the connections.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use serde::Serialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::balancers::{Kind, free_addresses, ringway};
use crate::findings::{Output, machine};
use crate::large::{Running, metric};
use crate::side_port::SidePort;
use crate::table::Table;

/// Number of client addresses.
const CLIENTS: usize = 2000;

/// Arguments of `loadtest even`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Number of backends
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u8).range(2..=100))]
    pub backends: u8,
    /// Number of connections that are open at the same time
    #[arg(long, default_value_t = 4000, value_parser = clap::value_parser!(u32).range(100..=9000))]
    pub connections: u32,
    /// Seed of the choice of clients
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Ringway program [default: the program in the directory of loadtest]
    #[arg(long, value_name = "FILE")]
    pub ringway: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

/// A way to spread connections.
struct Way {
    name: &'static str,
    kind: Kind,
    /// Keys of the pool, or lines of HAProxy's backend.
    settings: &'static str,
}

const WAYS: [Way; 8] = [
    Way { name: "ringway, key: source", kind: Kind::Ringway, settings: "key: source" },
    Way {
        name: "ringway, key: source, bound: 110",
        kind: Kind::Ringway,
        settings: "key: source\nring: { bound: 110 }",
    },
    Way { name: "ringway, key: source_ip", kind: Kind::Ringway, settings: "key: source_ip" },
    Way {
        name: "ringway, key: source_ip, bound: 110",
        kind: Kind::Ringway,
        settings: "key: source_ip\nring: { bound: 110 }",
    },
    Way { name: "ringway, least_connections", kind: Kind::Ringway, settings: "balance: least_connections" },
    Way { name: "haproxy, source", kind: Kind::Haproxy, settings: "balance source\nhash-type consistent" },
    Way {
        name: "haproxy, source, factor 110",
        kind: Kind::Haproxy,
        settings: "balance source\nhash-type consistent\nhash-balance-factor 110",
    },
    Way { name: "haproxy, leastconn", kind: Kind::Haproxy, settings: "balance leastconn" },
];

#[derive(Debug, Serialize)]
struct Finding {
    name: &'static str,
    /// The highest number of connections of a backend, as a multiple of the average.
    most: f64,
    /// The same after half of the connections were closed and as many were opened.
    most_after_change: f64,
    /// The part of the connections that went elsewhere because of a bound.
    displaced: Option<f64>,
    /// The part of the connections whose client had its last connection on the same backend.
    returned: f64,
}

#[derive(Debug, Serialize)]
struct Findings {
    machine: String,
    backends: u8,
    connections: u32,
    seed: u64,
    ways: Vec<Finding>,
}

/// Runs the measurement and prints the results.
///
/// # Errors
/// When a balancer cannot be started or refuses a connection.
pub async fn even(options: &Options) -> anyhow::Result<()> {
    options.output.check()?;
    // This process holds both ends of each connection.
    crate::preflight::open_files(2 * u64::from(options.connections) + 100)?;
    let ringway = ringway(options.ringway.as_deref())?;
    let mut ways = Vec::new();
    for way in &WAYS {
        let program = if way.kind == Kind::Ringway { Some(ringway.clone()) } else { way.kind.find() };
        let Some(program) = program else {
            eprintln!("{} is left out: {}", way.name, way.kind.remedy());
            continue;
        };
        ways.push(measure(options, way, &program).await.with_context(|| way.name)?);
    }
    let mut table =
        Table::new(["", "most / average", "after half were replaced", "displaced", "client came back to its backend"]);
    for Finding { name, most, most_after_change, displaced, returned } in &ways {
        let percent = |part: f64| format!("{:.1} %", part * 100.0);
        let displaced = displaced.map_or("-".to_owned(), percent);
        table.row([
            (*name).to_owned(),
            format!("{most:.3}"),
            format!("{most_after_change:.3}"),
            displaced,
            percent(*returned),
        ]);
    }
    let Options { backends, connections, seed, .. } = *options;
    let findings = Findings { machine: machine(), backends, connections, seed, ways };
    eprintln!("{}", findings.machine);
    options.output.show("Even loads", &findings, &[table], &[])
}

async fn measure(options: &Options, way: &Way, program: &Path) -> anyhow::Result<Finding> {
    let servers = Servers::start(options.backends).await?;
    let [web, side_port] = free_addresses()?;
    let config = match way.kind {
        Kind::Ringway => ringway_config(way, web, side_port, &servers),
        _ => haproxy_config(way, web, &servers, options.connections),
    };
    let running = Running::start(way.kind, program, &config, None)?;
    running.when("serving", running.began, async || TcpStream::connect(web).await.is_ok()).await?;
    let settled = || servers.active().values().all(|&active| active == 0);
    running.when("the first connection has ended", running.began, async || settled()).await?;
    let mut clients = Clients::new(web, options.seed);
    for _ in 0..options.connections {
        clients.open().await?;
    }
    let most = servers.most_of_average();
    for _ in 0..options.connections / 2 {
        clients.close();
    }
    let left = u64::from(options.connections - options.connections / 2);
    let has_closed = || servers.active().values().sum::<u64>() == left;
    running.when("half are closed", std::time::Instant::now(), async || has_closed()).await?;
    // The balancer counts a connection until it has closed both sides.
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    for _ in 0..options.connections / 2 {
        clients.open().await?;
    }
    let opened = f64::from(options.connections + options.connections / 2);
    let displaced = match way.kind {
        Kind::Ringway => metric(SidePort::new(side_port), "ringway_bound_displaced_total").await,
        _ => None,
    };
    let displaced = displaced.filter(|_| way.settings.contains("bound")).map(|displaced| displaced / opened);
    let returned = clients.returned as f64 / clients.repeated.max(1) as f64;
    Ok(Finding { name: way.name, most, most_after_change: servers.most_of_average(), displaced, returned })
}

fn ringway_config(way: &Way, web: SocketAddr, side_port: SocketAddr, servers: &Servers) -> String {
    let backends: Vec<_> = servers.addresses.iter().map(|one| format!("{{ address: \"{one}\" }}")).collect();
    let settings = way.settings.replace('\n', "\n    ");
    format!(
        "api: {{ listen: \"{side_port}\" }}\nlisteners: [{{ name: web, listen: \"{web}\", pool: web }}]\npools:\n  - name: web\n    \
         {settings}\n    health_check: {{ kind: none }}\n    provider: {{ static: [{}] }}\n",
        backends.join(", ")
    )
}

fn haproxy_config(way: &Way, web: SocketAddr, servers: &Servers, connections: u32) -> String {
    let mut config = format!(
        "global\n  maxconn {}\ndefaults\n  mode tcp\n  timeout connect 2s\n  timeout client 10m\n  timeout server 10m\n\
         frontend web\n  bind {web}\n  default_backend web\nbackend web\n  {}\n",
        connections + 100,
        way.settings.replace('\n', "\n  ")
    );
    for (n, address) in servers.addresses.iter().enumerate() {
        let _ = writeln!(config, "  server b{n} {address}");
    }
    config
}

/// One server on several addresses. It answers a connection with the number of the address, and keeps it open.
struct Servers {
    addresses: Vec<SocketAddr>,
    active: Arc<Mutex<BTreeMap<IpAddr, u64>>>,
    accepting: tokio::task::AbortHandle,
}

impl Servers {
    async fn start(count: u8) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("0.0.0.0:0").await?;
        let port = listener.local_addr()?.port();
        let ips = (1..=count).map(|n| IpAddr::from([127, 3, 0, n]));
        let active: Arc<Mutex<BTreeMap<_, _>>> = Arc::new(Mutex::new(ips.clone().map(|ip| (ip, 0)).collect()));
        let counted = Arc::clone(&active);
        let accepting = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let Ok(local) = stream.local_addr() else { continue };
                let active = Arc::clone(&counted);
                let count = move |change: i64| {
                    let mut active = active.lock().unwrap_or_else(PoisonError::into_inner);
                    let count = active.entry(local.ip()).or_insert(0_u64);
                    *count = count.saturating_add_signed(change);
                };
                count(1);
                tokio::spawn(async move {
                    let IpAddr::V4(ip) = local.ip() else { return };
                    let _ = stream.write_all(&[ip.octets()[3]]).await;
                    let _ = stream.read(&mut [0]).await;
                    count(-1);
                });
            }
        });
        let addresses = ips.map(|ip| SocketAddr::new(ip, port)).collect();
        Ok(Self { addresses, active, accepting: accepting.abort_handle() })
    }

    fn active(&self) -> BTreeMap<IpAddr, u64> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn most_of_average(&self) -> f64 {
        let active = self.active();
        let (sum, most) = (active.values().sum::<u64>(), active.values().max().copied().unwrap_or(0));
        most as f64 * active.len() as f64 / sum.max(1) as f64
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Clients that open and close connections. Client `n` does so with a probability in proportion to 1/n^1.2 (Zipf).
struct Clients {
    target: SocketAddr,
    random: fastrand::Rng,
    /// Sums of the probabilities.
    sums: Vec<f64>,
    open: Vec<TcpStream>,
    /// The last backend of each client.
    last: BTreeMap<usize, u8>,
    repeated: u64,
    returned: u64,
}

impl Clients {
    fn new(target: SocketAddr, seed: u64) -> Self {
        let mut sum = 0.0;
        let up_to = |n: usize| {
            sum += (n as f64).powf(-1.2);
            sum
        };
        let (sums, random) = ((1..=CLIENTS).map(up_to).collect(), fastrand::Rng::with_seed(seed));
        Self { target, random, sums, open: Vec::new(), last: BTreeMap::new(), repeated: 0, returned: 0 }
    }

    async fn open(&mut self) -> anyhow::Result<()> {
        let at = self.random.f64() * self.sums[CLIENTS - 1];
        let client = self.sums.partition_point(|&sum| sum < at).min(CLIENTS - 1);
        let source = u32::from(Ipv4Addr::new(127, 4, 0, 1)) + u32::try_from(client)?;
        let socket = TcpSocket::new_v4()?;
        socket.bind((Ipv4Addr::from(source), 0).into())?;
        let mut stream = socket.connect(self.target).await?;
        let mut backend = [0];
        stream.read_exact(&mut backend).await.context("a connection was not served")?;
        if let Some(last) = self.last.insert(client, backend[0]) {
            self.repeated += 1;
            self.returned += u64::from(last == backend[0]);
        }
        self.open.push(stream);
        Ok(())
    }

    fn close(&mut self) {
        let nth = self.random.usize(..self.open.len());
        drop(self.open.swap_remove(nth));
    }
}
