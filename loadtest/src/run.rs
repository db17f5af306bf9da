//! `loadtest run` puts one load on a target.

use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use tokio::task::JoinSet;

use crate::client::Protocol;
use crate::findings::{can_be_written, origin};
use crate::load::{self, Direction, Load, Pace, Work};
use crate::plot::{self, Line, figure};
use crate::preflight;
use crate::process::Tree;
use crate::record::{Record, Summary};
use crate::table::{Table, escape, page};

/// The work of the clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Scenario {
    /// Consecutive requests on open connections
    Requests,
    /// A connection for each request
    Connections,
    /// Consecutive transfers on each connection
    Bulk,
    /// Open connections without traffic
    Idle,
    /// Requests on open and on new connections, and transfers
    Mixed,
}

/// Arguments of `loadtest run`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Work of the clients
    #[arg(value_enum)]
    pub scenario: Scenario,
    /// Address of the balancer
    #[arg(long, default_value = "127.0.0.1:8000")]
    pub target: SocketAddr,
    /// Duration in seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    pub seconds: u64,
    /// Number of concurrent clients
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub connections: u32,
    /// Send this many requests, connections or transfers per second (open loop); latency is measured from the scheduled
    /// time [default: closed loop]
    #[arg(long, value_name = "PER_SECOND", value_parser = rate)]
    pub rate: Option<f64>,
    /// Protocol of the clients
    #[arg(long, value_enum, default_value = "http")]
    pub protocol: Protocol,
    /// Direction of transfers
    #[arg(long, value_enum, default_value = "down")]
    pub direction: Direction,
    /// Size of a transfer in MiB
    #[arg(long, default_value_t = 64, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub mib: u32,
    /// Number of addresses in 127.1.0.0/16 that clients connect from. A balancer that hashes addresses needs many. 0 means one
    #[arg(long, default_value_t = 0)]
    pub sources: u16,
    /// Seconds after which an answer counts as missing
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub timeout: u64,
    /// Number of threads that generate the load
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub threads: u32,
    /// Measure the CPU time and memory of this process and its children
    #[arg(long)]
    pub pid: Option<u32>,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
    /// Write a report with plots
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Allow a target on another machine
    #[arg(long)]
    pub allow_remote: bool,
}

/// Parses a rate.
fn rate(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|rate| (0.01..=1e6).contains(rate))
        .ok_or_else(|| "a number from 0.01 to 1000000".to_owned())
}

/// The usage of the watched process at one moment.
#[derive(Debug, Clone, Copy)]
struct Sample {
    at: Duration,
    cpu: Duration,
    resident: u64,
}

/// The results of a run.
#[derive(Debug, Serialize)]
struct Findings {
    scenario: String,
    target: SocketAddr,
    connections: u32,
    /// The rate of an open loop.
    offered: Option<f64>,
    #[serde(flatten)]
    summary: Summary,
    watched: Option<Watched>,
}

/// The usage of the watched process.
#[derive(Debug, Clone, Copy, Serialize)]
struct Watched {
    /// Seconds of CPU time.
    cpu_seconds: f64,
    /// CPU time as a part of one core.
    cpu_share: f64,
    /// Microseconds of CPU time for each answer.
    cpu_microseconds_per_answer: f64,
    /// The highest resident memory in bytes.
    resident: u64,
}

impl Options {
    fn load(&self) -> Load {
        Load {
            target: self.target,
            sources: self.sources,
            work: match self.scenario {
                Scenario::Requests => Work::Requests,
                Scenario::Connections => Work::Connections,
                Scenario::Bulk => Work::Bulk(self.direction, self.mib as usize * 1024 * 1024),
                Scenario::Idle => Work::Idle,
                Scenario::Mixed => Work::Mixed,
            },
            protocol: self.protocol,
            connections: self.connections as usize,
            share: None,
            pace: self.rate.map_or(Pace::Closed, Pace::Open),
            duration: Duration::from_secs(self.seconds),
            timeout: Duration::from_secs(self.timeout),
            precise: true,
        }
    }
}

/// Runs the load and prints the results.
///
/// # Errors
/// When the target is unreachable, this machine cannot put the load on it, or a report cannot be written.
pub async fn run(options: &Options) -> anyhow::Result<()> {
    let load = options.load();
    anyhow::ensure!(
        options.rate.is_none() || options.scenario != Scenario::Idle,
        "--rate has no meaning for idle connections: leave it out"
    );
    preflight::check(&load, options.allow_remote).await?;
    if let Some(path) = &options.html {
        can_be_written(path)?;
    }
    if let Some(pid) = options.pid {
        anyhow::ensure!(!Tree(pid).processes().is_empty(), "--pid {pid}: there is no such process");
    }
    let (record, samples, took) = put(&load, options).await?;
    let summary = record.summary(took);
    let watched = watched(&samples, record.answered());
    let result = Findings {
        scenario: format!("{:?}", options.scenario).to_lowercase(),
        target: options.target,
        connections: options.connections,
        offered: options.rate,
        summary,
        watched,
    };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&result)?);
    } else {
        println!("{} on {}", result.scenario, result.target);
        print!("{}", figures(&result).text());
        for (failure, count) in &result.summary.failures {
            println!("failed {count} times: {failure}");
        }
    }
    if let Some(path) = &options.html {
        let html = html(&result, &record, &samples, took);
        std::fs::write(path, html).with_context(|| format!("cannot write {}", path.display()))?;
    }
    anyhow::ensure!(record.answered() > 0 || record.bytes() > 0, "no response received");
    Ok(())
}

/// Puts the load on the target from the requested number of threads, and measures the watched process.
async fn put(load: &Load, options: &Options) -> anyhow::Result<(Record, Vec<Sample>, Duration)> {
    let began = Instant::now();
    let threads = (options.threads as usize).min(load.connections);
    let records: Vec<_> = (0..threads).map(|_| Arc::new(Mutex::new(Record::default()))).collect();
    let (mut generators, mut first) = (JoinSet::new(), 0);
    for (index, record) in records.iter().enumerate() {
        let mut share = load.clone();
        share.connections = load.connections / threads + usize::from(index < load.connections % threads);
        share.share = Some((first, load.connections));
        first += share.connections;
        let record = Arc::clone(record);
        generators.spawn_blocking(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(load::run(&share, &record));
            anyhow::Ok(())
        });
    }
    let bar = progress_bar(load.duration);
    let sample =
        || options.pid.map(|pid| Sample { at: began.elapsed(), cpu: Tree(pid).cpu(), resident: Tree(pid).resident() });
    let mut samples: Vec<_> = sample().into_iter().collect();
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    ticks.tick().await;
    loop {
        tokio::select! {
            ended = generators.join_next() => match ended {
                None => break,
                Some(ended) => ended??,
            },
            _ = ticks.tick() => {
                samples.extend(sample());
                let of = |count: fn(&Record) -> u64| -> u64 {
                    records.iter().map(|record| count(&record.lock().unwrap_or_else(PoisonError::into_inner))).sum()
                };
                bar.set_position(began.elapsed().min(load.duration).as_secs());
                bar.set_message(format!("{} answers, {} failed, {} MiB", of(Record::answered), of(Record::failed), of(Record::bytes) >> 20));
            }
        }
    }
    bar.finish_and_clear();
    samples.extend(sample());
    let took = began.elapsed();
    let mut all = Record::default();
    for record in records {
        all.merge(std::mem::take(&mut *record.lock().unwrap_or_else(PoisonError::into_inner)));
    }
    Ok((all, samples, took))
}

/// Shows a progress bar if standard error is a terminal.
pub(crate) fn progress_bar(duration: Duration) -> ProgressBar {
    let target =
        if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(duration.as_secs()), target);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos} of {len}  {msg}") {
        bar.set_style(style);
    }
    bar
}

fn watched(samples: &[Sample], answers: u64) -> Option<Watched> {
    let (first, last) = (samples.first()?, samples.last()?);
    let cpu = last.cpu.saturating_sub(first.cpu).as_secs_f64();
    Some(Watched {
        cpu_seconds: cpu,
        cpu_share: cpu / last.at.saturating_sub(first.at).as_secs_f64().max(f64::MIN_POSITIVE),
        cpu_microseconds_per_answer: cpu * 1e6 / (answers as f64).max(1.0),
        resident: samples.iter().map(|sample| sample.resident).max().unwrap_or(0),
    })
}

fn figures(result: &Findings) -> Table {
    let (summary, ms) = (&result.summary, &result.summary.milliseconds);
    let mut table = Table::new(["figure", "value"]);
    if let Some(offered) = result.offered {
        table.row(["offered per second".to_owned(), figure(offered)]);
    }
    table.row(["answers".to_owned(), (summary.requests - summary.failed).to_string()]);
    table.row(["answers per second".to_owned(), figure(summary.per_second)]);
    table.row(["failed".to_owned(), summary.failed.to_string()]);
    if summary.bytes_per_second > 0.0 {
        table.row(["MiB per second".to_owned(), figure(summary.bytes_per_second / f64::from(1 << 20))]);
    }
    for (name, value) in
        [("mean", ms.mean), ("p50", ms.p50), ("p90", ms.p90), ("p99", ms.p99), ("p99.9", ms.p999), ("longest", ms.max)]
    {
        table.row([format!("{name}, ms"), format!("{value:.3}")]);
    }
    for (server, count) in &summary.servers {
        table.row([format!("answered by {server}"), count.to_string()]);
    }
    if let Some(watched) = result.watched {
        table.row(["CPU of the target, s".to_owned(), format!("{:.2}", watched.cpu_seconds)]);
        table.row(["CPU of the target, share of a core".to_owned(), format!("{:.0} %", watched.cpu_share * 100.0)]);
        table.row(["CPU of the target, µs per answer".to_owned(), figure(watched.cpu_microseconds_per_answer)]);
        table.row(["memory of the target, MiB".to_owned(), figure(watched.resident as f64 / f64::from(1 << 20))]);
    }
    table
}

fn html(result: &Findings, record: &Record, samples: &[Sample], took: Duration) -> String {
    let mut parts = vec![format!("<p>{}</p>\n", escape(&origin()).replace('\n', "<br>")), figures(result).html()];
    // The last second is not a whole one, and would look like a drop.
    let whole = usize::try_from(took.as_secs()).unwrap_or(usize::MAX).clamp(1, record.seconds.len().max(1));
    for (failure, count) in &result.summary.failures {
        parts.push(format!("<p>failed {count} times: {}</p>\n", escape(failure)));
    }
    // The axis shows the share of slower answers in powers of ten: 1 is 90 %, 2 is 99 %.
    let percentiles = record.latency.iter_quantiles(4).map(|at| (at.quantile_iterated_to(), at.value_iterated_to()));
    let tail = percentiles
        .filter(|(quantile, _)| *quantile < 1.0)
        .map(|(quantile, value)| (-(1.0 - quantile).log10(), value as f64 / 1e6));
    let over_time = |name: &str, of: &dyn Fn(&crate::record::Second) -> f64| {
        Line::new(
            name,
            record.seconds.iter().take(whole).enumerate().map(|(second, of_it)| (second as f64 + 1.0, of(of_it))),
        )
    };
    let at = |percent: f64| {
        move |second: &crate::record::Second| second.latency.value_at_quantile(percent / 100.0) as f64 / 1e6
    };
    let mut plots = Vec::new();
    if record.answered() > 0 {
        plots.push(plot::lines(
            "time of an answer in ms, by percentile",
            "nines (1: 90 %, 2: 99 %, 3: 99.9 %)",
            &[Line::new("ms", tail)],
        ));
        plots.push(plot::lines(
            "time of an answer in ms",
            "second of the run",
            &[over_time("p50", &at(50.0)), over_time("p99", &at(99.0))],
        ));
        plots.push(plot::lines(
            "answers and failures per second",
            "second of the run",
            &[
                over_time("answers", &|second| second.latency.len() as f64),
                over_time("failed", &|second| second.failed as f64),
            ],
        ));
    }
    if record.bytes() > 0 {
        plots.push(plot::lines(
            "MiB per second",
            "second of the run",
            &[over_time("MiB", &|second| second.bytes as f64 / f64::from(1 << 20))],
        ));
    }
    let servers: Vec<_> = record.servers.iter().map(|(name, count)| (name.to_string(), *count as f64)).collect();
    plots.push(plot::bars("answers by server", &servers));
    if samples.len() > 2 {
        let cpu = samples.windows(2).map(|two| {
            let (used, passed) = (two[1].cpu.saturating_sub(two[0].cpu), two[1].at.saturating_sub(two[0].at));
            (two[1].at.as_secs_f64(), 100.0 * used.as_secs_f64() / passed.as_secs_f64().max(f64::MIN_POSITIVE))
        });
        plots.push(plot::lines("CPU of the target, % of a core", "second of the run", &[Line::new("CPU", cpu)]));
        let memory =
            samples.iter().map(|sample| (sample.at.as_secs_f64(), sample.resident as f64 / f64::from(1 << 20)));
        plots.push(plot::lines("memory of the target, MiB", "second of the run", &[Line::new("MiB", memory)]));
    }
    // A plot without data is left out.
    parts.extend(plots.into_iter().flatten());
    page(&format!("{} on {}", result.scenario, result.target), &parts)
}
