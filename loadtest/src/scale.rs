//! `loadtest scale` measures the throughput with more and more servers. The concurrency and the delay of a server are
//! fixed, so its capacity is known. The load is a closed loop with more clients than the servers can serve at a time.

use std::path::PathBuf;
use std::time::Duration;

use echo_server::Listen;
use serde::Serialize;

use crate::balancers::{Balancer, Kind, Settings, Setup, ringway};
use crate::bench::{put, server_with};
use crate::client::Protocol;
use crate::findings::{Output, machine};
use crate::load::{Load, Pace, Work};
use crate::plot::{self, Line, figure};
use crate::preflight;
use crate::run::progress_bar;
use crate::table::Table;

/// The number of addresses that clients connect from.
const SOURCES: u16 = 1000;

/// Arguments of `loadtest scale`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Number of servers in the last step
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub servers: u32,
    /// Delay of a server for each request in milliseconds
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub delay_ms: u32,
    /// Number of requests that a server works on at a time
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub concurrency: u32,
    /// Number of clients for each server
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub clients: u32,
    /// Duration of each step in seconds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub seconds: u64,
    /// Ringway program [default: the program in the directory of loadtest]
    #[arg(long, value_name = "FILE")]
    pub ringway: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Serialize)]
struct Step {
    servers: u32,
    /// The capacity of all servers.
    capacity_per_second: f64,
    answers_per_second: f64,
    /// The answers as a part of the capacity.
    efficiency: f64,
    p50_ms: f64,
    p99_ms: f64,
    /// Answers of the busiest server as a multiple of the average.
    busiest: f64,
}

#[derive(Debug, Serialize)]
struct Findings {
    machine: String,
    steps: Vec<Step>,
}

/// Runs the measurement and prints the results.
///
/// # Errors
/// When Ringway cannot be started or fails a request, or a report cannot be written.
pub async fn scale(options: &Options) -> anyhow::Result<()> {
    options.output.check()?;
    let program = ringway(options.ringway.as_deref())?;
    let most = (options.servers * options.clients) as usize;
    preflight::open_files(2 * most as u64)?;
    let (delay, concurrency) = (options.delay_ms.to_string(), options.concurrency.to_string());
    let mut backends = Vec::new();
    let mut steps = Vec::new();
    let bar = progress_bar(Duration::from_secs(u64::from(options.servers)));
    for servers in 1..=options.servers {
        let name = format!("server-{servers}");
        let arguments = ["--name", &name, "--delay-ms", &delay, "--concurrency", &concurrency];
        backends.push(Listen::Ip(server_with(&arguments, "127.0.0.1:0").await?));
        let setup = Setup {
            backends: backends.clone(),
            second: None,
            by_name: false,
            connections: most,
            processors: Vec::new(),
        };
        let balancer = Balancer::start(Kind::Ringway, &program, &setup, &Settings::default()).await?;
        let load = Load {
            target: balancer.address,
            sources: SOURCES,
            work: Work::Requests,
            protocol: Protocol::Http,
            connections: (servers * options.clients) as usize,
            share: None,
            pace: Pace::Closed,
            duration: Duration::from_secs(options.seconds),
            timeout: Duration::from_secs(30),
            precise: true,
        };
        let (record, took) = put(&load).await?;
        let capacity = f64::from(servers * options.concurrency) * 1000.0 / f64::from(options.delay_ms);
        let per_second = record.answered() as f64 / took.as_secs_f64();
        let busiest = record.servers.values().max().copied().unwrap_or(0) as f64;
        steps.push(Step {
            servers,
            capacity_per_second: capacity,
            answers_per_second: per_second,
            efficiency: per_second / capacity,
            p50_ms: record.percentile(50.0),
            p99_ms: record.percentile(99.0),
            busiest: busiest * f64::from(servers) / (record.answered() as f64).max(1.0),
        });
        bar.inc(1);
    }
    bar.finish_and_clear();
    show(options, &Findings { machine: machine(), steps })
}

fn show(options: &Options, findings: &Findings) -> anyhow::Result<()> {
    let mut table = Table::new([
        "servers",
        "capacity per second",
        "answers per second",
        "efficiency",
        "p50 ms",
        "p99 ms",
        "busiest / average",
    ]);
    for step in &findings.steps {
        table.row([
            step.servers.to_string(),
            figure(step.capacity_per_second),
            figure(step.answers_per_second),
            format!("{:.0} %", step.efficiency * 100.0),
            figure(step.p50_ms),
            figure(step.p99_ms),
            format!("{:.2}", step.busiest),
        ]);
    }
    let line = |name: &str, of: fn(&Step) -> f64| {
        Line::new(name, findings.steps.iter().map(|step| (f64::from(step.servers), of(step))))
    };
    let throughput =
        [line("answers", |step| step.answers_per_second), line("capacity", |step| step.capacity_per_second)];
    let times = [line("p50", |step| step.p50_ms), line("p99", |step| step.p99_ms)];
    let plots = [
        plot::lines("answers per second", "servers", &throughput)?,
        plot::lines("time of an answer in ms", "servers", &times)?,
    ];
    eprintln!(
        "{}; a server takes {} ms for a request and works on {} at a time; {} clients per server",
        findings.machine, options.delay_ms, options.concurrency, options.clients
    );
    options.output.show("More servers", findings, &[table], &plots)
}
