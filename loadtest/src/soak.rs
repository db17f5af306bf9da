//! `loadtest soak` runs a mixed load for a long time, with reloads, upgrades, kills of replicas and scrapers. It measures
//! whether requests fail, and whether the memory, the descriptors or the tasks of the balancer grow.
//!
//! - this file: the run; [`verdict`]: what its figures say

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::Serialize;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Interval, MissedTickBehavior, interval};

use self::verdict::{Slope, Verdict, slope};
use crate::client::{Client, Protocol};
use crate::findings::{can_be_written, origin};
use crate::load::{Collect as _, Outcome};
use crate::plot::{self, Line};
use crate::process::Tree;
use crate::record::{Record, Summary};
use crate::run::progress_bar;
use crate::side_port::SidePort;

mod verdict;

/// Interval between two samples.
const SAMPLE: Duration = Duration::from_secs(1);

/// A request or a transfer that takes longer counts as failed.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes of a transfer.
const TRANSFER: usize = 256 * 1024;

/// If a request fails within this time after a kill, the kill explains the failure.
const AFTER_KILL: Duration = Duration::from_secs(2);

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
    /// Number of clients that ask for the metrics without a pause
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=256))]
    pub scrapers: u32,
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
    /// Backends that fail their checks.
    pub unhealthy: f64,
}

/// The results of a soak.
#[derive(Debug, Serialize)]
pub struct Outcomes {
    /// Requests and transfers.
    pub load: Summary,
    /// Failed requests and transfers that ended within two seconds after a kill.
    pub failed_after_a_kill: u64,
    /// Connections that the client reset on purpose.
    pub aborted: u64,
    /// Answered and failed scrapes.
    pub scrapes: u64,
    #[expect(missing_docs, reason = "see above")]
    pub failed_scrapes: u64,
    /// Samples in which a backend failed its checks.
    pub samples_with_an_unhealthy_backend: usize,
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
    /// What the figures say.
    pub verdict: Verdict,
}

/// What the soak does to the balancer.
#[derive(Debug, Clone, Copy)]
enum Action {
    Reload,
    Upgrade,
    Kill,
}

/// How often each action has succeeded, and when replicas were killed.
#[derive(Debug, Default)]
struct Done {
    reloads: usize,
    upgrades: usize,
    kills: Vec<Duration>,
}

impl Done {
    fn count(&mut self, action: Action, at: Duration) {
        match action {
            Action::Reload => self.reloads += 1,
            Action::Upgrade => self.upgrades += 1,
            Action::Kill => self.kills.push(at),
        }
    }

    /// Whether a failure at this time can come from a kill.
    fn explains(&self, at: Duration) -> bool {
        // The kill is counted a moment after it took place.
        let early = Duration::from_millis(500);
        self.kills.iter().any(|&kill| (kill.saturating_sub(early)..=kill + AFTER_KILL).contains(&at))
    }
}

/// Runs the soak, prints the results as JSON and the verdict in words, and writes the plot that `--plot` names.
///
/// # Errors
/// When the side port is unreachable, or refuses a command, or the verdict is bad.
pub async fn soak(options: &Options) -> anyhow::Result<()> {
    if let Some(path) = &options.plot {
        // Before an hour has passed.
        can_be_written(path)?;
    }
    let (outcomes, samples) = churn(options).await?;
    println!("{}", serde_json::to_string_pretty(&outcomes)?);
    options.plot.as_deref().map_or(Ok(()), |path| draw(&samples, path))?;
    for words in &outcomes.verdict.words {
        eprintln!("{words}");
    }
    anyhow::ensure!(outcomes.verdict.is_good, "the soak test failed: see the words above");
    Ok(())
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
    let (mut number, mut done, mut failures) = (0_u64, Done::default(), Vec::new());
    let mut sampled = JoinSet::new();
    let mut scrapers = JoinSet::new();
    for _ in 0..options.scrapers {
        scrapers.spawn(scrape(side_port, began, duration));
    }
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
            _ = sampling.tick(), if commands.is_empty() && sampled.is_empty() => {
                sampled.spawn(sample(side_port, began));
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
            Some(ended) = commands.join_next() => done.count(ended??, began.elapsed()),
            Some(ended) = sampled.join_next() => samples.extend(ended?),
            Some(ended) = exchanges.join_next() => {
                if let Some(outcome) = ended? {
                    add(&mut record, &mut failures, outcome);
                }
            }
        }
    }
    for outcome in exchanges.join_all().await.into_iter().flatten() {
        add(&mut record, &mut failures, outcome);
    }
    let scrapes = scrapers.join_all().await;
    bar.finish_and_clear();
    let load = record.summary(began.elapsed());
    let mut outcomes = Outcomes {
        aborted: number - load.requests,
        failed_after_a_kill: failures.iter().filter(|&&at| done.explains(at)).count() as u64,
        load,
        scrapes: scrapes.iter().map(|(answered, _)| answered).sum(),
        failed_scrapes: scrapes.iter().map(|(_, failed)| failed).sum(),
        samples_with_an_unhealthy_backend: samples.iter().filter(|sample| sample.unhealthy > 0.0).count(),
        reloads: done.reloads,
        upgrades: done.upgrades,
        kills: done.kills.len(),
        memory: slope(&samples, |sample| sample.memory),
        descriptors: slope(&samples, |sample| sample.descriptors),
        tasks: slope(&samples, |sample| sample.tasks),
        verdict: Verdict::default(),
    };
    outcomes.verdict = Verdict::of(&outcomes);
    Ok((outcomes, samples))
}

/// Records an outcome, and the time of a failure.
fn add(record: &mut Record, failures: &mut Vec<Duration>, outcome: Outcome) {
    if outcome.server.is_err() {
        failures.push(outcome.start + outcome.took);
    }
    record.add(outcome);
}

/// Asks for the metrics again and again. Returns the numbers of answers and failures.
async fn scrape(side_port: SidePort, began: Instant, duration: Duration) -> (u64, u64) {
    let (mut answered, mut failed) = (0, 0);
    while began.elapsed() < duration {
        if side_port.metrics().await.is_ok() {
            answered += 1;
        } else {
            failed += 1;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    (answered, failed)
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
    std::fs::write(path, plot::stacked(&plots, &origin())).with_context(|| format!("cannot write {}", path.display()))
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

async fn sample(side_port: SidePort, began: Instant) -> Option<Sample> {
    // Without an answer there is no sample.
    let status = side_port.status().await.ok()?;
    let pid = status["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok())?;
    let pools = status["pools"].as_array().into_iter().flatten();
    let backends = pools.filter_map(|pool| pool["backends"].as_array()).flatten();
    let unhealthy = backends.filter(|backend| backend["state"] == "unhealthy").count() as f64;
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
        unhealthy,
    })
}
