//! `loadtest tune` measures the effect of single settings of Ringway. Each variant differs from the baseline in one
//! setting. The baseline does the same work directly before or after the variant, because the speed of a machine changes by
//! the minute. One variant is equal to the baseline, and its ratios show the noise.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use crate::balancers::{Balancer, Settings, ringway};
use crate::bench::{Bench, Places, Task};
use crate::findings::{Output, machine};
use crate::plot::{self, Range};
use crate::preflight;
use crate::run::progress_bar;
use crate::side_port::SidePort;
use crate::spread::Spread;
use crate::table::Table;

/// Interval between two scrapes in the variant with frequent scrapes.
const SCRAPE: Duration = Duration::from_millis(100);

/// Duration of the warm-up before a measurement.
const WARM_UP: Duration = Duration::from_millis(300);

/// Number of idle connections in the variant with idle connections.
const IDLE: usize = 8000;

/// Number of backends in the variant with many backends.
const MANY: usize = 1000;

/// Arguments of `loadtest tune`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Number of rounds. In each round every variant does its work
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    /// Duration of each piece of work in seconds
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub seconds: u64,
    /// Measure only the variants that have this text in their name
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub only: String,
    /// Ringway program [default: the program in the directory of loadtest]
    #[arg(long, value_name = "FILE")]
    pub ringway: Option<PathBuf>,
    #[command(flatten)]
    places: Places,
    #[command(flatten)]
    output: Output,
}

/// A setting that differs from the baseline.
struct Variant {
    name: &'static str,
    tasks: &'static [Task],
    settings: Settings,
    beside: Beside,
    /// CPU times by task and round.
    figures: Vec<Vec<Pair>>,
}

/// CPU times of one piece of work in one round.
#[derive(Clone, Copy, Default)]
struct Pair {
    variant: f64,
    baseline: f64,
}

/// What happens beside the work.
#[derive(Clone, Copy, PartialEq)]
enum Beside {
    Nothing,
    Scrapes,
    Idle,
    ManyBackends,
}

#[derive(Debug, Serialize)]
struct Finding {
    variant: &'static str,
    work: &'static str,
    unit: &'static str,
    cpu: Spread,
    /// The ratio to the baseline in the same round.
    ratio: Spread,
}

#[derive(Debug, Serialize)]
struct Findings {
    machine: String,
    rounds: u32,
    seconds: u64,
    variants: Vec<Finding>,
}

const REQUESTS: &[Task] = &[Task::Requests];
const CONNECTIONS: &[Task] = &[Task::Connections];
const BULK: &[Task] = &[Task::Bulk(1), Task::Bulk(32)];
const ALL: &[Task] = &[Task::Requests, Task::Connections, Task::Bulk(1), Task::Bulk(32)];

fn variants() -> Vec<Variant> {
    let plain = |name, tasks, root: &str, pool: &str| Variant {
        name,
        tasks,
        settings: Settings { root: root.to_owned(), pool: pool.to_owned(), workers: 1 },
        beside: Beside::Nothing,
        figures: vec![Vec::new(); tasks.len()],
    };
    let with = |variant: Variant, beside| Variant { beside, ..variant };
    let mut two_workers = plain("two workers on two cores", REQUESTS, "", "");
    two_workers.settings.workers = 2;
    vec![
        plain("nothing: noise", ALL, "", ""),
        two_workers,
        plain("splice: false", BULK, "relay: { splice: false }", ""),
        plain("splice_from_kib: 8", BULK, "relay: { splice_from_kib: 8 }", ""),
        plain("splice_from_kib: 64", BULK, "relay: { splice_from_kib: 64 }", ""),
        plain("buffer_kib: 32", ALL, "relay: { buffer_kib: 32 }", ""),
        plain("buffer_kib: 256", ALL, "relay: { buffer_kib: 256 }", ""),
        plain("virtual_nodes: 16", CONNECTIONS, "", "ring: { virtual_nodes: 16 }"),
        plain("virtual_nodes: 1000", CONNECTIONS, "", "ring: { virtual_nodes: 1000 }"),
        plain("probes: 1", CONNECTIONS, "", "ring: { probes: 1 }"),
        plain("probes: 21", CONNECTIONS, "", "ring: { probes: 21 }"),
        plain("checks every 50 ms", REQUESTS, "", "health_check: { kind: tcp, interval: 50ms, timeout: 40ms }"),
        plain("checks off", REQUESTS, "", "health_check: { kind: none }"),
        plain("access log to /dev/null", CONNECTIONS, "access_log: { path: /dev/null }", ""),
        plain("keepalive: off", CONNECTIONS, "tcp: { keepalive: off }", ""),
        with(plain("metrics scraped 10 times per second", REQUESTS, "", ""), Beside::Scrapes),
        with(plain("with 8,000 idle connections", REQUESTS, "", ""), Beside::Idle),
        with(plain("1,000 backends instead of 3", CONNECTIONS, "", ""), Beside::ManyBackends),
        with(
            plain("1,000 backends, checks off", CONNECTIONS, "", "health_check: { kind: none }"),
            Beside::ManyBackends,
        ),
    ]
}

/// Runs the measurement and prints the results.
///
/// # Errors
/// When Ringway cannot be started or fails a request, or a report cannot be written.
pub async fn tune(options: &Options) -> anyhow::Result<()> {
    let machine = machine();
    options.output.check()?;
    preflight::warn_if_noisy(options.rounds).await;
    let program = ringway(options.ringway.as_deref())?;
    let mut variants = variants();
    variants.retain(|variant| variant.name.contains(&options.only));
    anyhow::ensure!(!variants.is_empty(), "--only {}: no variant has that in its name", options.only);
    let bench = Bench::new(&options.places, 3, IDLE + 512).await?;
    let many = bench.many(MANY).await?;
    let duration = Duration::from_secs(options.seconds);
    let pieces: usize = variants.iter().map(|variant| variant.tasks.len()).sum();
    let bar = progress_bar(Duration::from_secs(u64::from(options.rounds) * pieces as u64));
    let baseline = bench.start_before(&program, &bench.backends, IDLE, &Settings::default()).await?;
    for round in 0..options.rounds as usize {
        for turn in 0..variants.len() {
            let number = (turn + round) % variants.len();
            let variant = &mut variants[number];
            let backends = if variant.beside == Beside::ManyBackends { &many } else { &bench.backends };
            let balancer = bench.start_before(&program, backends, IDLE, &variant.settings).await?;
            let beside = Company::join(&bench, &balancer, variant.beside).await?;
            for (index, task) in variant.tasks.iter().enumerate() {
                bar.set_message(variant.name);
                // The baseline runs all the time and its buffers are allocated. The warm-up brings the variant to the same state.
                bench.measure(*task, balancer.address, None, WARM_UP).await?;
                let mut pair = Pair::default();
                let mut turns = [(&balancer, &mut pair.variant), (&baseline, &mut pair.baseline)];
                // The variant goes first in even rounds, the baseline in odd rounds.
                if round % 2 == 1 {
                    turns.reverse();
                }
                for (measured, figure) in turns {
                    let cost = bench.measure(*task, measured.address, Some(measured.tree()), duration).await?;
                    *figure = if matches!(task, Task::Bulk(_)) { cost.per_gigabyte() } else { cost.per_answer() };
                }
                variant.figures[index].push(pair);
                bar.inc(1);
            }
            drop(beside);
        }
    }
    bar.finish_and_clear();
    let findings =
        Findings { machine, rounds: options.rounds, seconds: options.seconds, variants: findings(&variants) };
    show(options, &findings)
}

/// Runs the activity beside the work until it is dropped.
struct Company {
    _open: Vec<tokio::net::TcpStream>,
    scraping: Option<tokio::task::AbortHandle>,
}

impl Company {
    async fn join(bench: &Bench, balancer: &Balancer, beside: Beside) -> anyhow::Result<Self> {
        let open = if beside == Beside::Idle { bench.idle(balancer.address, IDLE).await? } else { Vec::new() };
        let scraping = (beside == Beside::Scrapes).then(|| {
            let side_port = SidePort::new(balancer.side_port);
            let scraping = async move {
                let mut ticks = tokio::time::interval(SCRAPE);
                loop {
                    ticks.tick().await;
                    // A failed scrape does not count, and the next tick starts another one.
                    let _ = side_port.metrics().await;
                }
            };
            tokio::spawn(scraping).abort_handle()
        });
        Ok(Self { _open: open, scraping })
    }
}

impl Drop for Company {
    fn drop(&mut self) {
        if let Some(scraping) = &self.scraping {
            scraping.abort();
        }
    }
}

fn findings(variants: &[Variant]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for variant in variants {
        for (task, pairs) in std::iter::zip(variant.tasks, &variant.figures) {
            let (work, unit) = match task {
                Task::Requests | Task::Rate(_) => ("requests", "CPU µs per request"),
                Task::Connections | Task::Named => ("connections", "CPU µs per connection"),
                Task::Bulk(1) => ("bulk, 1 stream", "CPU s per GB"),
                Task::Bulk(_) => ("bulk, 32 streams", "CPU s per GB"),
            };
            let own: Vec<_> = pairs.iter().map(|pair| pair.variant).collect();
            let ratios: Vec<_> = pairs.iter().map(|pair| pair.variant / pair.baseline).collect();
            if let (Some(cpu), Some(ratio)) = (Spread::of(&own), Spread::of(&ratios)) {
                findings.push(Finding { variant: variant.name, work, unit, cpu, ratio });
            }
        }
    }
    findings
}

fn show(options: &Options, findings: &Findings) -> anyhow::Result<()> {
    let mut table = Table::new(["setting", "work", "CPU", "unit", "ratio to the baseline"]);
    for Finding { variant, work, unit, cpu, ratio } in &findings.variants {
        table.row([(*variant).to_owned(), (*work).to_owned(), cpu.text(), (*unit).to_owned(), ratio.text()]);
    }
    let ranges: Vec<_> = findings
        .variants
        .iter()
        .map(|finding| Range {
            name: format!("{}, {}", finding.variant, finding.work),
            spread: finding.ratio,
            is_own: finding.variant.starts_with("nothing"),
        })
        .collect();
    let plots: Vec<_> = plot::ranges("CPU time, ratio to the adjacent baseline run (less is better)", 1.0, &ranges)
        .into_iter()
        .collect();
    eprintln!("{}; {} rounds of {} s", findings.machine, findings.rounds, findings.seconds);
    options.output.show("Settings of Ringway", findings, &[table], &plots)
}
