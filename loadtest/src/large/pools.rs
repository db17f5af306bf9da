//! Many pools, each with ten checked backends and a listener.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::{Figures, Options, Running, addresses, metric};
use crate::balancers::Kind;
use crate::bench::server_with;
use crate::client::{Client, Protocol};
use crate::side_port::SidePort;

/// Backends of a pool.
const BACKENDS: u32 = 10;

/// Time between two requests that look for pauses.
const PROBE: Duration = Duration::from_millis(2);

pub(super) async fn measure(options: &Options, programs: &[(String, PathBuf)]) -> anyhow::Result<Figures> {
    let mut figures = Figures::default();
    for (name, program) in programs {
        eprintln!("{name}: {} pools", options.pools);
        of_ringway(options, name, program, &mut figures).await?;
    }
    Ok(figures)
}

fn config(pools: u32, api: SocketAddr, ports: &[u16], server: SocketAddr, shift: u32) -> String {
    let mut text = format!("workers: 1\napi: {{ listen: \"{api}\" }}\nlisteners:\n");
    for (pool, port) in ports.iter().enumerate() {
        let _ = writeln!(text, "  - {{ name: l{pool}, listen: \"127.0.0.1:{port}\", pool: p{pool} }}");
    }
    text.push_str("pools:\n");
    for pool in 0..pools {
        let _ = write!(text, "  - {{ name: p{pool}, health_check: {{ interval: 2s }}, provider: {{ static: [");
        for backend in 0..BACKENDS {
            // A shift changes one address of each pool.
            let host = backend + 1 + if backend == 0 { shift } else { 0 };
            let (high, low) = (pool / 250, pool % 250);
            let _ = write!(text, "{{ address: \"127.{}.{high}.{low}:{}\" }}, ", host, server.port());
        }
        text.push_str("] } }\n");
    }
    text
}

async fn of_ringway(options: &Options, name: &str, program: &Path, figures: &mut Figures) -> anyhow::Result<()> {
    let server = server_with(&["--name", "many"], "0.0.0.0:0").await?;
    let [_, api] = addresses()?;
    // All are bound at the same time, so they differ. The program binds them a moment later.
    let reserved = (0..options.pools).map(|_| std::net::TcpListener::bind("127.0.0.1:0"));
    let reserved: Vec<_> = reserved.collect::<Result<_, _>>()?;
    let ports: Vec<u16> = reserved.iter().filter_map(|listener| Some(listener.local_addr().ok()?.port())).collect();
    drop(reserved);
    let first = config(options.pools, api, &ports, server, 0);
    let running = Running::start(Kind::Ringway, program, &first, Some(options.balancer_cpu))?;
    let side_port = SidePort::new(api);
    let wanted = f64::from(options.pools * BACKENDS);
    let healthy = async || metric(side_port, "ringway_pool_backends_healthy").await;
    let took = running.when("ready", running.began, async || side_port.is_ready().await).await?;
    figures.add(name, "start: ready after", took.as_secs_f64(), "s");
    running.when("all healthy", running.began, async || healthy().await == Some(wanted)).await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    figures.add(name, "memory before a scrape", running.tree().proportional() as f64 / 1e6, "MB");

    let (before, memory, began) = (running.tree().cpu(), running.tree().proportional(), Instant::now());
    let mut most = memory;
    let scrape = tokio::spawn(async move { side_port.metrics().await });
    while !scrape.is_finished() {
        most = most.max(running.tree().proportional());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let text = scrape.await??;
    let took = began.elapsed();
    figures.add(name, "/metrics: size", text.len() as f64 / 1e6, "MB");
    figures.add(name, "/metrics: time", took.as_secs_f64(), "s");
    let cpu = running.tree().cpu().saturating_sub(before).as_secs_f64();
    figures.add(name, "/metrics: CPU time, with the checks meanwhile", cpu, "s");
    figures.add(name, "/metrics: more memory", most.saturating_sub(memory) as f64 / 1e6, "MB");
    let began = Instant::now();
    let status = side_port.status().await?.to_string();
    figures.add(name, "/api/status: size", status.len() as f64 / 1e6, "MB");
    figures.add(name, "/api/status: time", began.elapsed().as_secs_f64(), "s");

    running.write_config(&config(options.pools, api, &ports, server, 20))?;
    let (stop, stopped) = watch::channel(false);
    let target = SocketAddr::from(([127, 0, 0, 1], ports[0]));
    let of_clients = tokio::spawn(longest_request(target, stopped.clone()));
    let of_side_port = tokio::spawn(longest_health(side_port, stopped));
    tokio::time::sleep(Duration::from_millis(500)).await;
    let began = Instant::now();
    side_port.post("/api/reload").await?;
    figures.add(name, "reload, an address in each pool: answered after", began.elapsed().as_secs_f64(), "s");
    let took = running.when("all healthy again", began, async || healthy().await == Some(wanted)).await?;
    figures.add(name, "reload: new addresses healthy after", took.as_secs_f64(), "s");
    stop.send_replace(true);
    figures.add(name, "reload: longest request meanwhile", of_clients.await??.as_secs_f64() * 1e3, "ms");
    figures.add(name, "reload: longest /healthz meanwhile", of_side_port.await??.as_secs_f64() * 1e3, "ms");
    let began = Instant::now();
    side_port.post("/api/upgrade").await?;
    figures.add(name, "upgrade: answered after", began.elapsed().as_secs_f64(), "s");
    if let Some(pid) = side_port.status().await?["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()) {
        // The successor is no child of this process.
        let _ = rustix::process::Pid::from_raw(pid)
            .map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::KILL));
    }
    Ok(())
}

type Stop = watch::Receiver<bool>;

/// The longest request on one connection, until `stop`.
async fn longest_request(target: SocketAddr, stop: Stop) -> anyhow::Result<Duration> {
    let mut client = Client::new(target, None, Protocol::Echo);
    client.request().await.map_err(anyhow::Error::msg)?;
    let mut longest = Duration::ZERO;
    while !*stop.borrow() {
        let began = Instant::now();
        client.request().await.map_err(anyhow::Error::msg)?;
        longest = longest.max(began.elapsed());
        tokio::time::sleep(PROBE).await;
    }
    Ok(longest)
}

/// The longest `/healthz`, until `stop`.
async fn longest_health(side_port: SidePort, stop: Stop) -> anyhow::Result<Duration> {
    let mut longest = Duration::ZERO;
    while !*stop.borrow() {
        let began = Instant::now();
        side_port.health().await?;
        longest = longest.max(began.elapsed());
        tokio::time::sleep(PROBE).await;
    }
    Ok(longest)
}
