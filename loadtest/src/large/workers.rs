//! How evenly connections and streams are spread over workers. More workers than processors are fine for counts.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Figures, Options, Running, addresses, metric};
use crate::balancers::Kind;
use crate::bench::{put, server_with};
use crate::client::Protocol;
use crate::load::{Direction, Load, Pace, Work};
use crate::side_port::SidePort;
use crate::spread::Spread;

/// Numbers of long connections.
const CONNECTIONS: [usize; 2] = [8, 128];

/// Runs of bulk streams, and the duration of each.
const BULK_RUNS: u32 = 20;
const BULK: Duration = Duration::from_secs(2);

/// How long connections stay open.
const LONG: Duration = Duration::from_millis(200);

/// Bytes of one transfer.
const TRANSFER: usize = 4 << 20;

pub(super) async fn measure(options: &Options, programs: &[(String, PathBuf)]) -> anyhow::Result<Figures> {
    let mut figures = Figures::default();
    for &workers in options.workers.iter().filter(|&&workers| workers > 0) {
        for (name, program) in programs {
            eprintln!("{name}: {workers} workers");
            spread(options, name, program, workers, &mut figures).await?;
        }
    }
    for (name, program) in programs {
        eprintln!("{name}: 8 streams on 2 workers");
        streams(name, program, &mut figures).await?;
    }
    Ok(figures)
}

fn start(program: &Path, workers: u32, server: std::net::SocketAddr) -> anyhow::Result<(Running, Load, SidePort)> {
    let [web, api] = addresses()?;
    let config = format!(
        "workers: {workers}\napi: {{ listen: \"{api}\" }}\nlisteners: [{{ name: web, listen: \"{web}\", pool: web }}]\n\
         pools: [{{ name: web, provider: {{ static: [{{ address: \"{server}\" }}] }} }}]\n"
    );
    let running = Running::start(Kind::Ringway, program, &config, None)?;
    let load = Load {
        target: web,
        sources: 0,
        work: Work::Bulk(Direction::Down, TRANSFER),
        protocol: Protocol::Echo,
        connections: 8,
        share: None,
        pace: Pace::Closed,
        duration: BULK,
        timeout: Duration::from_secs(10),
        precise: true,
    };
    Ok((running, load, SidePort::new(api)))
}

/// The connections of the busiest worker as a multiple of the average: the mean and the worst of all runs.
async fn spread(
    options: &Options,
    name: &str,
    program: &Path,
    workers: u32,
    figures: &mut Figures,
) -> anyhow::Result<()> {
    let server = server_with(&["--name", "one"], "127.0.0.1:0").await?;
    let (running, load, side_port) = start(program, workers, server)?;
    running.when("ready", running.began, async || side_port.is_ready().await).await?;
    for connections in CONNECTIONS {
        let mut ratios = Vec::new();
        for _ in 0..options.runs {
            let is =
                async |count: usize| metric(side_port, "ringway_worker_connections_active").await == Some(count as f64);
            let open = crate::open(load.target, connections).await?;
            running.when("all open", std::time::Instant::now(), async || is(connections).await).await?;
            let text = side_port.metrics().await?;
            let counts = text.lines().filter(|line| line.starts_with("ringway_worker_connections_active{"));
            let counts = counts.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
            let busiest = counts.fold(0.0, f64::max);
            ratios.push(busiest * f64::from(workers) / connections as f64);
            // Ringway spreads short connections less evenly, and these are to be long ones.
            tokio::time::sleep(LONG).await;
            drop(open);
            running.when("all closed", std::time::Instant::now(), async || is(0).await).await?;
        }
        let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
        let what = format!("{connections} connections on {workers} workers: busiest / average");
        figures.add(name, format!("{what}, mean"), mean, "");
        figures.add(name, format!("{what}, worst"), ratios.iter().copied().fold(0.0, f64::max), "");
    }
    Ok(())
}

async fn streams(name: &str, program: &Path, figures: &mut Figures) -> anyhow::Result<()> {
    let server = server_with(&["--name", "one"], "127.0.0.1:0").await?;
    let (running, load, side_port) = start(program, 2, server)?;
    running.when("ready", running.began, async || side_port.is_ready().await).await?;
    let (mut rates, mut tails) = (Vec::new(), Vec::new());
    for _ in 0..BULK_RUNS {
        let (record, took) = put(&load).await?;
        rates.push(record.bytes() as f64 / took.as_secs_f64() / 1e9);
        tails.push(record.percentile(99.0));
    }
    if let (Some(rates), Some(tails)) = (Spread::of(&rates), Spread::of(&tails)) {
        figures.add(name, "8 streams on 2 workers: median", rates.median, "GB per s");
        figures.add(name, "8 streams on 2 workers: worst run", rates.min, "GB per s");
        figures.add(name, "8 streams on 2 workers: p99 of 4 MiB, median", tails.median, "ms");
        figures.add(name, "8 streams on 2 workers: p99 of 4 MiB, worst run", tails.max, "ms");
    }
    Ok(())
}
