//! A long load of all kinds, with reloads, upgrades and deaths in between, and whether anything grows.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::Serialize;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::client::{Client, Protocol};
use crate::load::{Collect as _, Outcome};
use crate::plot::{self, Line};
use crate::process::Tree;
use crate::record::{Record, Summary};
use crate::run::progress_bar;
use crate::side_port::SidePort;

/// Between samples.
const SAMPLE: Duration = Duration::from_secs(1);

/// After this long a request or a transfer counts as failed.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes of a transfer.
const TRANSFER: usize = 256 * 1024;

/// One part of so many, at the beginning, does not count: buffers and pools fill up.
const WARM_UP: usize = 10;

/// What a soak does.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Where the balancer listens
    #[arg(long, default_value = "127.0.0.1:8000")]
    pub target: SocketAddr,
    /// How long, in seconds
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    pub seconds: u64,
    /// The balancer's side port
    #[arg(long, default_value = "127.0.0.1:8001")]
    pub api: SocketAddr,
    /// New connections a second
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub rate: u32,
    /// Of a hundred connections, those that carry 256 KiB each way instead of a request
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub transfers: u32,
    /// Of a hundred connections, those that the client breaks off
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub aborts: u32,
    /// Seconds between reloads of the config; 0: none
    #[arg(long, default_value_t = 10.0, value_parser = seconds)]
    pub reload_every: f64,
    /// Seconds between upgrades; 0: none
    #[arg(long, default_value_t = 0.0, value_parser = seconds)]
    pub upgrade_every: f64,
    /// Seconds between kills of a replica that is a child process; 0: none. The connections that it has fail
    #[arg(long, default_value_t = 0.0, value_parser = seconds)]
    pub kill_every: f64,
    /// Where a plot is written
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<std::path::PathBuf>,
}

/// The balancer at one moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// Since the run's start.
    pub at: Duration,
    /// Resident memory of the process that serves, in bytes.
    pub memory: f64,
    /// Descriptors that it has open.
    pub descriptors: f64,
    /// Tasks of its runtimes.
    pub tasks: f64,
    /// Connections that it serves.
    pub connections: f64,
}

/// How much a figure grows in an hour, by least squares, and its mean.
#[derive(Debug, Serialize)]
pub struct Slope {
    /// The mean of the samples that count.
    pub mean: f64,
    /// The growth in an hour.
    pub per_hour: f64,
    /// The same as a part of the mean.
    pub per_hour_relative: f64,
}

/// What a soak came to.
#[derive(Debug, Serialize)]
pub struct Outcomes {
    /// Requests and transfers.
    pub load: Summary,
    /// Connections that were broken off on purpose.
    pub aborted: u64,
    /// Reloads, upgrades and kills that were carried out.
    pub reloads: usize,
    /// Processes that took over.
    pub upgrades: usize,
    /// Replicas that were killed.
    pub kills: usize,
    /// Bytes of resident memory.
    pub memory: Slope,
    /// Open descriptors.
    pub descriptors: Slope,
    /// Tasks.
    pub tasks: Slope,
}

/// Runs it, prints what it came to as JSON, and plots it where that is asked for.
///
/// # Errors
/// When the side port is not to be reached, or refuses an order.
pub async fn soak(options: &Options) -> anyhow::Result<()> {
    let (outcomes, samples) = churn(options).await?;
    println!("{}", serde_json::to_string_pretty(&outcomes)?);
    options.plot.as_deref().map_or(Ok(()), |path| draw(&samples, path))
}

async fn churn(options: &Options) -> anyhow::Result<(Outcomes, Vec<Sample>)> {
    anyhow::ensure!(
        options.transfers + options.aborts <= 100,
        "--transfers and --aborts are parts of a hundred connections"
    );
    let (target, duration) = (options.target, Duration::from_secs(options.seconds));
    let side_port = SidePort::new(options.api);
    side_port.status().await.context("a soak watches the balancer by its side port (--api)")?;
    let began = Instant::now();
    let bar = progress_bar(duration);
    let mut connections = ticks(1.0 / f64::from(options.rate));
    let mut sampling = ticks(SAMPLE.as_secs_f64());
    let (mut reloads, mut upgrades, mut kills) =
        (ticks(options.reload_every), ticks(options.upgrade_every), ticks(options.kill_every));
    let (mut record, mut samples, mut exchanges, mut orders) =
        (Record::default(), Vec::new(), JoinSet::new(), JoinSet::new());
    let (mut number, mut done) = (0_u64, [0_usize; 3]);
    while began.elapsed() < duration {
        tokio::select! {
            _ = connections.tick() => {
                number += 1;
                // Spread evenly: 37 and 100 have no common divisor.
                let chance = (number % 100 * 37 % 100) as u32;
                if chance < options.transfers {
                    exchanges.spawn(exchange(target, began, true));
                } else if chance < options.transfers + options.aborts {
                    exchanges.spawn(abort(target, began));
                } else {
                    exchanges.spawn(exchange(target, began, false));
                }
            }
            // Not while an order is under way: samples and orders are of one process.
            _ = sampling.tick(), if orders.is_empty() => {
                samples.extend(sample(&side_port, began).await);
                bar.set_position(began.elapsed().as_secs());
                bar.set_message(format!("{} answers, {} failed", record.answered(), record.failed()));
            }
            _ = reloads.tick(), if options.reload_every > 0.0 && orders.is_empty() => {
                orders.spawn(order(side_port, "/api/reload", 0));
            }
            _ = upgrades.tick(), if options.upgrade_every > 0.0 && orders.is_empty() => {
                orders.spawn(order(side_port, "/api/upgrade", 1));
            }
            _ = kills.tick(), if options.kill_every > 0.0 && orders.is_empty() => {
                orders.spawn(kill(side_port, number as usize));
            }
            Some(ended) = orders.join_next() => done[ended??] += 1,
            Some(ended) = exchanges.join_next(), if !exchanges.is_empty() => {
                if let Some(outcome) = ended? {
                    record.add(outcome);
                }
            }
        }
    }
    for outcome in exchanges.join_all().await.into_iter().flatten() {
        record.add(outcome);
    }
    bar.finish_and_clear();
    let load = record.summary(began.elapsed());
    let outcomes = Outcomes {
        aborted: number - load.requests,
        load,
        reloads: done[0],
        upgrades: done[1],
        kills: done[2],
        memory: slope(&samples, |sample| sample.memory),
        descriptors: slope(&samples, |sample| sample.descriptors),
        tasks: slope(&samples, |sample| sample.tasks),
    };
    Ok((outcomes, samples))
}

/// What may grow, over time.
fn draw(samples: &[Sample], path: &Path) -> anyhow::Result<()> {
    let over_time = |title: &str, figure: fn(&Sample) -> f64| {
        let points = samples.iter().map(|sample| (sample.at.as_secs_f64(), figure(sample)));
        plot::lines(title, "second of the run", &[Line::new(title, points)])
    };
    let plots = [
        over_time("resident memory, MiB", |sample| sample.memory / f64::from(1 << 20))?,
        over_time("open descriptors", |sample| sample.descriptors)?,
        over_time("tasks", |sample| sample.tasks)?,
        over_time("connections", |sample| sample.connections)?,
    ];
    std::fs::write(path, plot::stacked(&plots)).with_context(|| format!("cannot write {}", path.display()))
}

/// Seconds between orders, as clap takes them.
fn seconds(text: &str) -> Result<f64, String> {
    let is_fine = |seconds: &f64| *seconds == 0.0 || (0.01..=1e6).contains(seconds);
    text.parse().ok().filter(is_fine).ok_or_else(|| "a number from 0.01 to 1000000, or 0".to_owned())
}

/// Ticks every so many seconds, the first time after as many.
fn ticks(seconds: f64) -> Interval {
    let period = Duration::from_secs_f64(if seconds > 0.0 { seconds } else { 3600.0 });
    let mut ticks = interval(period);
    ticks.reset();
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    ticks
}

/// A connection with a request, or with bytes there and back.
async fn exchange(target: SocketAddr, began: Instant, transfers: bool) -> Option<Outcome> {
    let start = began.elapsed();
    let mut client = Client::new(target, None, Protocol::Http);
    let answer = tokio::time::timeout(TIMEOUT, async {
        if transfers { client.exchange(TRANSFER, |_| {}).await } else { client.request().await }
    });
    let server = answer.await.unwrap_or_else(|_| Err("no answer in time".to_owned()));
    Some(Outcome { start, took: began.elapsed().saturating_sub(start), server })
}

/// A connection that is reset in the middle of a request; an outcome only where it could not be made.
async fn abort(target: SocketAddr, began: Instant) -> Option<Outcome> {
    let aborted = async {
        let mut stream = TcpStream::connect(target).await?;
        stream.write_all(b"GET /home HT").await?;
        stream.set_zero_linger()
    };
    let error = aborted.await.err()?;
    Some(Outcome { start: began.elapsed(), took: Duration::ZERO, server: Err(format!("connect: {error}")) })
}

async fn order(side_port: SidePort, path: &'static str, kind: usize) -> anyhow::Result<usize> {
    side_port.post(path).await.with_context(|| format!("POST {path}"))?;
    Ok(kind)
}

/// Kills one of the replicas that are child processes on this machine.
async fn kill(side_port: SidePort, number: usize) -> anyhow::Result<usize> {
    let status = side_port.status().await?;
    let backends = status["pools"].as_array().into_iter().flatten().filter_map(|pool| pool["backends"].as_array());
    let pids: Vec<_> = backends.flatten().filter_map(|backend| backend["replica"]["pid"].as_i64()).collect();
    anyhow::ensure!(!pids.is_empty(), "--kill-every is for replicas that are child processes, and there are none");
    let pid = i32::try_from(pids[number % pids.len()]).ok().and_then(rustix::process::Pid::from_raw);
    if let Some(pid) = pid {
        // It may just have ended by itself.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
    Ok(2)
}

async fn sample(side_port: &SidePort, began: Instant) -> Option<Sample> {
    // A moment without an answer is a sample less.
    let pid = side_port.status().await.ok()?["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok())?;
    let metrics = side_port.metrics().await.ok()?;
    let sum = |name: &str| -> f64 {
        let of_name = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']));
        metrics.lines().filter(of_name).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    };
    Some(Sample {
        at: began.elapsed(),
        memory: Tree::resident_alone(pid)?,
        descriptors: sum("ringway_open_files"),
        tasks: sum("ringway_tasks"),
        connections: sum("ringway_connections_active"),
    })
}

/// By least squares over what comes after the warm-up.
fn slope(samples: &[Sample], value: impl Fn(&Sample) -> f64) -> Slope {
    let counted = &samples[samples.len() / WARM_UP..];
    let count = counted.len().max(1) as f64;
    let mean = |of: &dyn Fn(&Sample) -> f64| counted.iter().map(of).sum::<f64>() / count;
    let hours = |sample: &Sample| sample.at.as_secs_f64() / 3600.0;
    let (mid_time, mid_value) = (mean(&hours), mean(&value));
    let spread: f64 = counted.iter().map(|sample| (hours(sample) - mid_time).powi(2)).sum();
    let together: f64 = counted.iter().map(|sample| (hours(sample) - mid_time) * (value(sample) - mid_value)).sum();
    let per_hour = if spread > 0.0 { together / spread } else { 0.0 };
    let relative = if mid_value > 0.0 { per_hour / mid_value } else { 0.0 };
    Slope { mean: mid_value, per_hour, per_hour_relative: relative }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slope_is_what_comes_after_the_warm_up() {
        let sample = |n: u64, memory: f64| Sample {
            at: Duration::from_secs(n * 36),
            memory,
            descriptors: 0.0,
            tasks: 0.0,
            connections: 0.0,
        };
        // Grows by 1000 in an hour from 5000 on; the first tenth is something else.
        let samples: Vec<_> =
            (0..100).map(|n| sample(n, if n < 10 { 9.0 } else { 5000.0 + 10.0 * n as f64 })).collect();
        let found = slope(&samples, |sample| sample.memory);
        assert!((found.per_hour - 1000.0).abs() < 1.0, "{found:?}");
        assert!(slope(&samples[..1], |sample| sample.memory).per_hour.abs() < 1e-9);
        let flat = slope(&[], |sample| sample.memory);
        assert_eq!((flat.mean, flat.per_hour), (0.0, 0.0));
    }
}
