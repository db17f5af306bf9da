//! `loadtest rollouts` replaces the replicas of a pool again and again under load, and counts what clients notice: short connections that
//! fail, and long ones that are cut.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::Serialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::balancers::{Kind, free_addresses, ringway};
use crate::findings::{Output, machine};
use crate::large::Running;
use crate::short::Short;
use crate::side_port::SidePort;
use crate::table::Table;

/// Longest wait for the answer to a message.
const PATIENCE: Duration = Duration::from_secs(10);

/// Arguments of `loadtest rollouts`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Numbers of replicas
    #[arg(long, value_delimiter = ',', default_values_t = [3, 10], value_parser = clap::value_parser!(u32).range(1..=50))]
    pub replicas: Vec<u32>,
    /// Number of rollouts in each order
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rollouts: u32,
    /// Short connections per second
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    pub rate: u32,
    /// Number of long connections at a time
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(0..=5000))]
    pub long: u32,
    /// How long a long connection lasts, in seconds
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub lasts: u32,
    /// Ringway program [default: the program in the directory of loadtest]
    #[arg(long, value_name = "FILE")]
    pub ringway: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Serialize)]
struct Finding {
    replicas: u32,
    order: &'static str,
    rollouts: u32,
    seconds: f64,
    /// Short connections, and those that failed.
    short: u64,
    short_failed: u64,
    /// Long connections, and those that ended before their time.
    long: u64,
    long_cut: u64,
    /// The ring is the same as before.
    same_ring: bool,
}

#[derive(Debug, Serialize)]
struct Findings {
    machine: String,
    rate: u32,
    long: u32,
    lasts: u32,
    cases: Vec<Finding>,
}

/// Runs the measurement and prints the results.
///
/// # Errors
/// When Ringway cannot be started, a rollout does not end, or a client noticed one.
pub async fn rollouts(options: &Options) -> anyhow::Result<()> {
    options.output.check()?;
    crate::preflight::open_files(u64::from(2 * options.long + options.rate) + 200)?;
    let program = ringway(options.ringway.as_deref())?;
    let mut cases = Vec::new();
    for &replicas in &options.replicas {
        for order in ["start_first", "stop_first"] {
            cases.push(measure(options, &program, replicas, order).await.with_context(|| order)?);
        }
    }
    let mut table = Table::new([
        "replicas",
        "order",
        "rollouts",
        "seconds",
        "short connections",
        "failed",
        "long connections",
        "cut",
        "same ring",
    ]);
    for one in &cases {
        table.row([
            one.replicas.to_string(),
            one.order.to_owned(),
            one.rollouts.to_string(),
            format!("{:.0}", one.seconds),
            one.short.to_string(),
            one.short_failed.to_string(),
            one.long.to_string(),
            one.long_cut.to_string(),
            one.same_ring.to_string(),
        ]);
    }
    let noticed = cases.iter().any(|one| one.short_failed + one.long_cut > 0 || !one.same_ring);
    let Options { rate, long, lasts, .. } = *options;
    let findings = Findings { machine: machine(), rate, long, lasts, cases };
    eprintln!("{}", findings.machine);
    options.output.show("Rollouts", &findings, &[table], &[])?;
    anyhow::ensure!(!noticed, "a client noticed a rollout");
    Ok(())
}

async fn measure(options: &Options, program: &Path, replicas: u32, order: &'static str) -> anyhow::Result<Finding> {
    let [web, api] = free_addresses()?;
    let config = format!(
        "api: {{ listen: \"{api}\" }}\nlisteners: [{{ name: web, listen: \"{web}\", pool: web }}]\npools:\n  - name: web\n    \
         drain: 10m\n    health_check: {{ kind: http, path: /heartbeat, interval: 500ms }}\n    provider:\n      process:\n        \
         replicas: {replicas}\n        rollout: {{ order: {order}, healthy_for: 500ms }}\n        \
         command: [ringway, echo-server, --listen, \"127.0.0.1:{{port}}\", --name, \"{{slot}}\"]\n"
    );
    let running = Running::start(Kind::Ringway, program, &config, None)?;
    let side_port = SidePort::new(api);
    let all_healthy = async || {
        let Ok(status) = side_port.status().await else { return false };
        let backends = status["pools"][0]["backends"].as_array().cloned().unwrap_or_default();
        backends.len() == replicas as usize && backends.iter().all(|one| one["state"] == "healthy")
    };
    running.when("all replicas are healthy", running.began, all_healthy).await?;
    let digest = async || anyhow::Ok(side_port.status().await?["pools"][0]["ring"]["digest"].clone());
    let (before, began, load) = (digest().await?, Instant::now(), Arc::new(Load::default()));
    let short = Arc::new(Short::default());
    let mut clients = JoinSet::new();
    for n in 0..options.long {
        let (load, lasts) = (Arc::clone(&load), Duration::from_secs(options.lasts.into()));
        let first_part = f64::from(n + 1) / f64::from(options.long);
        clients.spawn(async move { load.long(web, lasts, first_part).await });
    }
    let short_load = tokio::spawn(Arc::clone(&short).run(web, options.rate));
    for n in 1..=options.rollouts {
        side_port.post("/api/pools/web/rollout").await?;
        let has_ended = async {
            loop {
                let status = side_port.status().await?;
                let rollout = &status["pools"][0]["provider"]["rollout"];
                if rollout["ended"].as_u64() >= Some(n.into()) {
                    return anyhow::Ok(rollout["last"]["result"].clone());
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        // The old replicas wait for their long connections, in the worst case one after the other.
        let patience = Duration::from_secs(u64::from(replicas * options.lasts + 120));
        let result = tokio::time::timeout(patience, has_ended).await.context("a rollout did not end")??;
        anyhow::ensure!(result == "done", "a rollout ended as {result}");
    }
    let seconds = began.elapsed().as_secs_f64();
    load.is_over.store(true, Ordering::Relaxed);
    short.end();
    short_load.await?;
    while clients.join_next().await.is_some() {}
    let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let (short, short_failed) = short.counts();
    Ok(Finding {
        replicas,
        order,
        rollouts: options.rollouts,
        seconds,
        short,
        short_failed,
        long: of(&load.long),
        long_cut: of(&load.long_cut),
        same_ring: digest().await? == before,
    })
}

/// The long connections of one measurement, and what their clients noticed.
#[derive(Debug, Default)]
struct Load {
    is_over: AtomicBool,
    long: AtomicU64,
    long_cut: AtomicU64,
}

impl Load {
    /// Opens one long connection after the other until the measurement is over. The first one lasts for a part of the time, so that
    /// they do not all end at once.
    async fn long(&self, target: SocketAddr, lasts: Duration, first_part: f64) {
        let mut lasts_now = lasts.mul_f64(first_part);
        while !self.is_over.load(Ordering::Relaxed) {
            self.long.fetch_add(1, Ordering::Relaxed);
            if let Err(error) = self.talk(target, lasts_now).await {
                eprintln!("a long connection was cut: {error:#}");
                self.long_cut.fetch_add(1, Ordering::Relaxed);
            }
            lasts_now = lasts;
        }
    }

    /// Sends a request each second, and waits for its answer.
    async fn talk(&self, target: SocketAddr, lasts: Duration) -> anyhow::Result<()> {
        let began = Instant::now();
        let mut stream = TcpStream::connect(target).await?;
        while began.elapsed() < lasts && !self.is_over.load(Ordering::Relaxed) {
            stream.write_all(b"GET /heartbeat HTTP/1.1\r\nhost: a\r\n\r\n").await?;
            let mut buffer = [0; 1024];
            let count = tokio::time::timeout(PATIENCE, stream.read(&mut buffer)).await.context("no answer")??;
            anyhow::ensure!(count > 0, "ended after {:.1} s", began.elapsed().as_secs_f64());
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        Ok(())
    }
}
