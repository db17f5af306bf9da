//! `loadtest soak` runs a mixed load for a long time, with reloads, upgrades and kills of replicas. It measures whether
//! the memory, the descriptors or the tasks of the balancer grow.

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

/// Interval between two samples.
const SAMPLE: Duration = Duration::from_secs(1);

/// A request or a transfer that takes longer counts as failed.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes of a transfer.
const TRANSFER: usize = 256 * 1024;

/// The first of this many parts of the run does not count, because buffers and pools fill up.
const WARM_UP: usize = 10;

/// Arguments of `loadtest soak`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Address of the balancer
    #[arg(long, default_value = "127.0.0.1:8000")]
    pub target: SocketAddr,
    /// Duration in seconds
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    pub seconds: u64,
    /// Address of the balancer's side port
    #[arg(long, default_value = "127.0.0.1:8001")]
    pub api: SocketAddr,
    /// New connections per second
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub rate: u32,
    /// Percentage of connections that carry 256 KiB each way instead of a request
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub transfers: u32,
    /// Percentage of connections that the client resets
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub aborts: u32,
    /// Seconds between reloads of the config. 0 disables reloads
    #[arg(long, default_value_t = 10.0, value_parser = seconds)]
    pub reload_every: f64,
    /// Seconds between upgrades. 0 disables upgrades
    #[arg(long, default_value_t = 0.0, value_parser = seconds)]
    pub upgrade_every: f64,
    /// Seconds between kills of a replica that is a child process. 0 disables kills. The connections of the replica fail
    #[arg(long, default_value_t = 0.0, value_parser = seconds)]
    pub kill_every: f64,
    /// Write a plot to this file
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<std::path::PathBuf>,
}

/// The balancer at one moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// Time since the start of the run.
    pub at: Duration,
    /// Resident memory of the balancer's process in bytes.
    pub memory: f64,
    /// Open descriptors.
    pub descriptors: f64,
    /// Tasks of the balancer's runtimes.
    pub tasks: f64,
    /// Active connections.
    pub connections: f64,
}

/// The mean of a figure and its growth in an hour by least squares.
#[derive(Debug, Serialize)]
pub struct Slope {
    /// The mean of the samples after the warm-up.
    pub mean: f64,
    /// The growth in an hour.
    pub per_hour: f64,
    /// The growth in an hour as a part of the mean.
    pub per_hour_relative: f64,
}

/// The results of a soak.
#[derive(Debug, Serialize)]
pub struct Outcomes {
    /// Requests and transfers.
    pub load: Summary,
    /// Connections that the client reset on purpose.
    pub aborted: u64,
    /// Successful reloads.
    pub reloads: usize,
    /// Successful upgrades.
    pub upgrades: usize,
    /// Killed replicas.
    pub kills: usize,
    /// Bytes of resident memory.
    pub memory: Slope,
    /// Open descriptors.
    pub descriptors: Slope,
    /// Tasks.
    pub tasks: Slope,
}

/// What the soak does to the balancer.
#[derive(Debug, Clone, Copy)]
enum Action {
    Reload,
    Upgrade,
    Kill,
}

/// How often each action has succeeded.
#[derive(Debug, Default)]
struct Done {
    reloads: usize,
    upgrades: usize,
    kills: usize,
}

impl Done {
    fn count(&mut self, action: Action) {
        match action {
            Action::Reload => self.reloads += 1,
            Action::Upgrade => self.upgrades += 1,
            Action::Kill => self.kills += 1,
        }
    }
}

/// Runs the soak, prints the results as JSON, and writes the plot that `--plot` names.
///
/// # Errors
/// When the side port is unreachable, or refuses a command.
pub async fn soak(options: &Options) -> anyhow::Result<()> {
    let (outcomes, samples) = churn(options).await?;
    println!("{}", serde_json::to_string_pretty(&outcomes)?);
    options.plot.as_deref().map_or(Ok(()), |path| draw(&samples, path))
}

async fn churn(options: &Options) -> anyhow::Result<(Outcomes, Vec<Sample>)> {
    anyhow::ensure!(
        options.transfers + options.aborts <= 100,
        "--transfers and --aborts are percentages, and their sum is 100 at most"
    );
    let (target, duration) = (options.target, Duration::from_secs(options.seconds));
    let side_port = SidePort::new(options.api);
    side_port.status().await.context("the soak needs the side port of the balancer (--api)")?;
    let began = Instant::now();
    let bar = progress_bar(duration);
    let mut connections = ticks(1.0 / f64::from(options.rate));
    let mut sampling = ticks(SAMPLE.as_secs_f64());
    let (mut reloads, mut upgrades, mut kills) =
        (ticks(options.reload_every), ticks(options.upgrade_every), ticks(options.kill_every));
    let (mut record, mut samples, mut exchanges, mut commands) =
        (Record::default(), Vec::new(), JoinSet::new(), JoinSet::new());
    let (mut number, mut done) = (0_u64, Done::default());
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
            // The soak takes no sample during a command, because an upgrade changes the process.
            _ = sampling.tick(), if commands.is_empty() => {
                samples.extend(sample(&side_port, began).await);
                bar.set_position(began.elapsed().as_secs());
                bar.set_message(format!("{} answers, {} failed", record.answered(), record.failed()));
            }
            _ = reloads.tick(), if options.reload_every > 0.0 && commands.is_empty() => {
                commands.spawn(post(side_port, "/api/reload", Action::Reload));
            }
            _ = upgrades.tick(), if options.upgrade_every > 0.0 && commands.is_empty() => {
                commands.spawn(post(side_port, "/api/upgrade", Action::Upgrade));
            }
            _ = kills.tick(), if options.kill_every > 0.0 && commands.is_empty() => {
                commands.spawn(kill(side_port, number as usize));
            }
            Some(ended) = commands.join_next() => done.count(ended??),
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
        reloads: done.reloads,
        upgrades: done.upgrades,
        kills: done.kills,
        memory: slope(&samples, |sample| sample.memory),
        descriptors: slope(&samples, |sample| sample.descriptors),
        tasks: slope(&samples, |sample| sample.tasks),
    };
    Ok((outcomes, samples))
}

/// Draws the samples over time.
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

/// Parses the seconds between two commands.
fn seconds(text: &str) -> Result<f64, String> {
    let is_fine = |seconds: &f64| *seconds == 0.0 || (0.01..=1e6).contains(seconds);
    text.parse().ok().filter(is_fine).ok_or_else(|| "a number from 0.01 to 1000000, or 0".to_owned())
}

/// Creates an interval whose first tick comes after one period.
fn ticks(seconds: f64) -> Interval {
    let period = Duration::from_secs_f64(if seconds > 0.0 { seconds } else { 3600.0 });
    let mut ticks = interval(period);
    ticks.reset();
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    ticks
}

/// Opens a connection for a request, or for a transfer both ways.
async fn exchange(target: SocketAddr, began: Instant, transfers: bool) -> Option<Outcome> {
    let start = began.elapsed();
    let mut client = Client::new(target, None, Protocol::Http);
    let answer = tokio::time::timeout(TIMEOUT, async {
        if transfers { client.exchange(TRANSFER, |_| {}).await } else { client.request().await }
    });
    let server = answer.await.unwrap_or_else(|_| Err("no answer in time".to_owned()));
    Some(Outcome { start, took: began.elapsed().saturating_sub(start), server })
}

/// Opens a connection and resets it in the middle of a request. Returns an outcome only if the connection failed.
async fn abort(target: SocketAddr, began: Instant) -> Option<Outcome> {
    let aborted = async {
        let mut stream = TcpStream::connect(target).await?;
        stream.write_all(b"GET /home HT").await?;
        stream.set_zero_linger()
    };
    let error = aborted.await.err()?;
    Some(Outcome { start: began.elapsed(), took: Duration::ZERO, server: Err(format!("connect: {error}")) })
}

/// Sends a command to the side port.
async fn post(side_port: SidePort, path: &'static str, action: Action) -> anyhow::Result<Action> {
    side_port.post(path).await.with_context(|| format!("POST {path}"))?;
    Ok(action)
}

/// Kills one of the replicas that are child processes on this machine.
async fn kill(side_port: SidePort, number: usize) -> anyhow::Result<Action> {
    let status = side_port.status().await?;
    let backends = status["pools"].as_array().into_iter().flatten().filter_map(|pool| pool["backends"].as_array());
    let pids: Vec<_> = backends.flatten().filter_map(|backend| backend["replica"]["pid"].as_i64()).collect();
    anyhow::ensure!(
        !pids.is_empty(),
        "--kill-every needs replicas that are child processes, and the balancer has no such replica"
    );
    let pid = i32::try_from(pids[number % pids.len()]).ok().and_then(rustix::process::Pid::from_raw);
    if let Some(pid) = pid {
        // The replica may have exited already.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
    Ok(Action::Kill)
}

async fn sample(side_port: &SidePort, began: Instant) -> Option<Sample> {
    // Without an answer there is no sample.
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

/// Computes the slope of the samples after the warm-up.
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
    fn the_slope_ignores_the_warm_up() {
        let sample = |n: u64, memory: f64| Sample {
            at: Duration::from_secs(n * 36),
            memory,
            descriptors: 0.0,
            tasks: 0.0,
            connections: 0.0,
        };
        // The figure grows by 1000 in an hour from 5000 on. The first tenth has other values.
        let samples: Vec<_> =
            (0..100).map(|n| sample(n, if n < 10 { 9.0 } else { 5000.0 + 10.0 * n as f64 })).collect();
        let found = slope(&samples, |sample| sample.memory);
        assert!((found.per_hour - 1000.0).abs() < 1.0, "{found:?}");
        assert!(slope(&samples[..1], |sample| sample.memory).per_hour.abs() < 1e-9);
        let flat = slope(&[], |sample| sample.memory);
        assert_eq!((flat.mean, flat.per_hour), (0.0, 0.0));
    }
}
