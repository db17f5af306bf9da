//! `loadtest compare` measures several balancers on the same work in the same run. They take turns in rounds, so a
//! disturbance of the machine affects all of them.

mod measure;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use self::measure::Measure;
use crate::balancers::{Balancer, Kind};
use crate::bench::{Bench, Places, Task};
use crate::findings::{Output, machine};
use crate::plot::{self, Range};
use crate::preflight;
use crate::process::Tree;
use crate::run::progress_bar;
use crate::spread::Spread;
use crate::table::Table;

/// Arguments of `loadtest compare`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Balancers to compare. Balancers that are not installed are left out
    #[arg(long, value_enum, value_delimiter = ',', num_args = 1.., default_values_t = Kind::ALL)]
    pub only: Vec<Kind>,
    /// Work to measure
    #[arg(long, value_enum, value_delimiter = ',', num_args = 1.., default_values_t = Work::ALL)]
    pub work: Vec<Work>,
    /// Number of rounds. In each round every balancer does all of the work
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    /// Duration of each piece of work in seconds
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub seconds: u64,
    /// Number of idle connections for the memory measurement
    #[arg(long, default_value_t = 4000, value_parser = clap::value_parser!(u32).range(100..=9000))]
    pub idle: u32,
    /// Measure every balancer a second time, with Unix sockets to the backends
    #[arg(long)]
    pub unix: bool,
    /// Ringway programs. Ratios use the first one [default: the program in the directory of loadtest]
    #[arg(long, value_name = "FILE", value_delimiter = ',')]
    pub ringway: Vec<PathBuf>,
    #[command(flatten)]
    places: Places,
    #[command(flatten)]
    output: Output,
}

/// The work that the balancers do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Work {
    /// Requests on 64 open connections
    Requests,
    /// Connections with one request, 32 at a time
    Connections,
    /// Connections that a server name leads to their backends, 32 at a time
    Named,
    /// Downloads on one connection
    Bulk,
    /// Downloads on 32 connections
    Streams,
    /// Requests at half the rate of the slowest balancer. Needs `requests`
    Latency,
    /// Requests on 4 connections, beside downloads on 32 connections
    Beside,
    /// Start-up time, program size and memory of idle connections
    Footprint,
}

impl Work {
    /// All kinds of work.
    pub const ALL: [Self; 8] = [
        Self::Requests,
        Self::Connections,
        Self::Named,
        Self::Bulk,
        Self::Streams,
        Self::Latency,
        Self::Beside,
        Self::Footprint,
    ];
}

impl Options {
    /// The number of rounds of this work.
    fn rounds_of(&self, work: Work) -> usize {
        if self.work.contains(&work) { self.rounds as usize } else { 0 }
    }
}

/// A balancer, or the direct connection that serves as the reference.
struct Contestant {
    name: String,
    /// `None` for the direct connection.
    kind: Option<Kind>,
    /// It reaches the backends by Unix sockets.
    by_unix: bool,
    program: PathBuf,
    version: String,
    figures: BTreeMap<Measure, Vec<f64>>,
}

impl Contestant {
    fn record(&mut self, measure: Measure, figure: f64) {
        self.figures.entry(measure).or_default().push(figure);
    }

    /// The figures of all rounds. Empty if the work was not done.
    fn figures(&self, measure: Measure) -> &[f64] {
        self.figures.get(&measure).map_or(&[], Vec::as_slice)
    }

    fn spread(&self, measure: Measure) -> Option<Spread> {
        Spread::of(self.figures(measure))
    }
}

#[derive(Debug, Serialize)]
struct Findings {
    machine: String,
    rounds: u32,
    seconds: u64,
    /// The rate of the latency work.
    requests_offered_per_second: Option<f64>,
    balancers: Vec<Finding>,
}

#[derive(Debug, Serialize)]
struct Finding {
    name: String,
    version: String,
    figures: Vec<(&'static str, Option<Spread>)>,
}

/// Runs the comparison and prints the results.
///
/// # Errors
/// When a balancer cannot be started or fails a request, or a report cannot be written.
pub async fn compare(options: &Options) -> anyhow::Result<()> {
    let machine = machine();
    anyhow::ensure!(
        !options.work.contains(&Work::Latency) || options.work.contains(&Work::Requests),
        "--work latency needs --work requests, which measures the rate"
    );
    options.output.check()?;
    let mut contestants = contestants(options)?;
    preflight::warn_if_noisy(options.rounds).await;
    let bench = Bench::new(&options.places, 3, options.idle as usize).await?;
    let duration = Duration::from_secs(options.seconds);
    let steps = u64::from(options.rounds) * (options.work.len() * contestants.len()) as u64;
    let bar = progress_bar(Duration::from_secs(steps));
    let running = start_all(&bench, &contestants, options.work.contains(&Work::Named)).await?;
    let mut rate = f64::MAX;
    for round in 0..options.rounds as usize {
        for (measure, work, task) in [
            (Measure::RequestCpu, Work::Requests, Task::Requests),
            (Measure::ConnectionCpu, Work::Connections, Task::Connections),
            (Measure::NamedCpu, Work::Named, Task::Named),
            (Measure::BulkCpu, Work::Bulk, Task::Bulk(1)),
            (Measure::StreamsCpu, Work::Streams, Task::Bulk(32)),
        ] {
            if !options.work.contains(&work) {
                continue;
            }
            for turn in turns(round, contestants.len()) {
                bar.set_message(format!("{}: {}", contestants[turn].name, measure.label()));
                let (mut target, tree) = place(&bench, running[turn].as_ref());
                if let (Task::Named, Some(balancer)) = (task, &running[turn]) {
                    target = balancer.by_name;
                }
                let cost = bench.measure(task, target, tree, duration).await?;
                bar.inc(1);
                if task == Task::Requests {
                    contestants[turn].record(Measure::RequestRate, cost.rate());
                    rate = rate.min(cost.rate() / 2.0);
                }
                if tree.is_some() {
                    let figure = if matches!(task, Task::Bulk(_)) { cost.per_gigabyte() } else { cost.per_answer() };
                    contestants[turn].record(measure, figure);
                }
            }
        }
    }
    // At this rate the slowest balancer is idle half of the time.
    for round in 0..options.rounds_of(Work::Latency) {
        for turn in turns(round, contestants.len()) {
            bar.set_message(format!("{}: latency", contestants[turn].name));
            let (target, tree) = place(&bench, running[turn].as_ref());
            let cost = bench.measure(Task::Rate(rate), target, tree, duration).await?;
            bar.inc(1);
            contestants[turn].record(Measure::P50, cost.record.percentile(50.0));
            contestants[turn].record(Measure::P99, cost.record.percentile(99.0));
        }
    }
    for round in 0..options.rounds_of(Work::Beside) {
        for turn in turns(round, contestants.len()) {
            bar.set_message(format!("{}: requests beside streams", contestants[turn].name));
            let (target, _) = place(&bench, running[turn].as_ref());
            let second = running[turn].as_ref().map_or(bench.second, |balancer| balancer.second);
            let record = bench.beside(target, second, duration).await?;
            bar.inc(1);
            contestants[turn].record(Measure::BesideP50, record.percentile(50.0));
            contestants[turn].record(Measure::BesideP99, record.percentile(99.0));
        }
    }
    drop(running);
    for round in 0..options.rounds_of(Work::Footprint) {
        for turn in turns(round, contestants.len()) {
            bar.inc(1);
            footprint(&bench, &mut contestants[turn], options.idle as usize).await?;
        }
    }
    bar.finish_and_clear();
    let rate = options.work.contains(&Work::Latency).then_some(rate);
    show(options, &contestants, machine, rate)
}

/// The requested balancers that are installed, and the direct connection.
fn contestants(options: &Options) -> anyhow::Result<Vec<Contestant>> {
    let mut contestants = Vec::new();
    for kind in &options.only {
        let programs = match kind {
            Kind::Ringway if !options.ringway.is_empty() => options.ringway.clone(),
            _ => kind.find().into_iter().collect(),
        };
        if programs.is_empty() {
            eprintln!("{} is not installed and is left out; to install it: {}", kind.name(), kind.remedy());
        }
        for (index, program) in programs.into_iter().enumerate() {
            let name = if index == 0 { kind.name().to_owned() } else { format!("{} {}", kind.name(), index + 1) };
            let version = kind.version(&program);
            for by_unix in [false, true].into_iter().filter(|&by_unix| !by_unix || options.unix) {
                contestants.push(Contestant {
                    name: if by_unix { format!("{name}, Unix") } else { name.clone() },
                    kind: Some(*kind),
                    by_unix,
                    version: version.clone(),
                    program: program.clone(),
                    figures: BTreeMap::new(),
                });
            }
        }
    }
    anyhow::ensure!(!contestants.is_empty(), "no balancer to compare is installed");
    contestants.push(Contestant {
        name: "no balancer".to_owned(),
        kind: None,
        by_unix: false,
        program: PathBuf::new(),
        version: String::new(),
        figures: BTreeMap::new(),
    });
    Ok(contestants)
}

async fn start_all(bench: &Bench, contestants: &[Contestant], by_name: bool) -> anyhow::Result<Vec<Option<Balancer>>> {
    let mut running = Vec::new();
    for Contestant { kind, program, by_unix, .. } in contestants {
        running.push(match kind {
            Some(kind) => Some(bench.start(*kind, program, 512, *by_unix, by_name).await?),
            None => None,
        });
    }
    Ok(running)
}

/// The order of a round. Each round starts with another contestant.
fn turns(round: usize, contestants: usize) -> impl Iterator<Item = usize> {
    (0..contestants).map(move |turn| (turn + round) % contestants)
}

/// The target of the load, and the processes whose CPU time counts.
fn place(bench: &Bench, balancer: Option<&Balancer>) -> (std::net::SocketAddr, Option<Tree>) {
    balancer.map_or((bench.servers[0], None), |balancer| (balancer.address, Some(balancer.tree())))
}

/// Starts a new process and measures its start-up time, its size, and the memory of idle connections.
async fn footprint(bench: &Bench, contestant: &mut Contestant, idle: usize) -> anyhow::Result<()> {
    let Some(kind) = contestant.kind else { return Ok(()) };
    let balancer = bench.start(kind, &contestant.program, idle, contestant.by_unix, false).await?;
    let (size, start_up) = (std::fs::metadata(&contestant.program)?.len(), balancer.start_up);
    // The first connections cause one-time allocations, which do not count.
    let first = bench.idle(balancer.address, 100).await?;
    let before = balancer.tree().proportional();
    let open = bench.idle(balancer.address, idle).await?;
    let after = balancer.tree().proportional();
    drop((first, open));
    // The cleanup of the closed connections must not delay the start of the next balancer.
    drop(balancer);
    tokio::time::sleep(Duration::from_millis(500)).await;
    contestant.record(Measure::IdleMemory, after.saturating_sub(before) as f64 / idle as f64);
    contestant.record(Measure::ProgramSize, size as f64 / 1e6);
    contestant.record(Measure::StartUp, start_up.as_secs_f64() * 1e3);
    Ok(())
}

fn show(options: &Options, contestants: &[Contestant], machine: String, rate: Option<f64>) -> anyhow::Result<()> {
    let mut all = Table::new(std::iter::once("").chain(contestants.iter().map(|one| one.name.as_str())));
    for measure in Measure::ALL {
        if contestants.iter().all(|one| one.figures(measure).is_empty()) {
            continue;
        }
        let cells = contestants.iter().map(|one| one.spread(measure).map_or("-".to_owned(), |spread| spread.text()));
        all.row(std::iter::once(measure.label().to_owned()).chain(cells));
    }
    all.row(std::iter::once("version").chain(contestants.iter().map(|one| one.version.as_str())));
    let mut tables = vec![all];
    let mut plots = Vec::new();
    for by_unix in [false, true] {
        let of_family = || contestants.iter().filter(|one| one.kind.is_some() && one.by_unix == by_unix);
        let Some(ringway) = of_family().find(|one| one.kind == Some(Kind::Ringway)) else { continue };
        let peers: Vec<_> = of_family().filter(|one| one.name != ringway.name).collect();
        if peers.is_empty() {
            continue;
        }
        let title = if by_unix { "Ringway / other balancer, Unix" } else { "Ringway / other balancer" };
        let mut ratios =
            Table::new(std::iter::once(title.to_owned()).chain(peers.iter().map(|peer| peer.name.clone())));
        for measure in Measure::COMPARED.into_iter().filter(|measure| !ringway.figures(*measure).is_empty()) {
            let ratio = |peer: &&Contestant| {
                let (one, other) = (ringway.spread(measure)?, peer.spread(measure)?);
                Some(one.median / other.median)
            };
            let cells = peers.iter().map(|peer| ratio(peer).map_or("-".to_owned(), |ratio| format!("{ratio:.2}")));
            ratios.row(std::iter::once(measure.label().to_owned()).chain(cells));
        }
        tables.push(ratios);
    }
    for measure in Measure::COMPARED {
        let ranges: Vec<_> = contestants
            .iter()
            .filter_map(|one| {
                let is_own = one.kind == Some(Kind::Ringway);
                Some(Range { name: format!("{} {}", one.name, one.version), spread: one.spread(measure)?, is_own })
            })
            .collect();
        // Work that was not done has no plot.
        plots.extend(plot::ranges(&format!("{} (less is better)", measure.label()), 0.0, &ranges));
    }
    let findings = Findings {
        machine,
        rounds: options.rounds,
        seconds: options.seconds,
        requests_offered_per_second: rate,
        balancers: contestants
            .iter()
            .map(|one| Finding {
                name: one.name.clone(),
                version: one.version.clone(),
                figures: Measure::ALL.into_iter().map(|measure| (measure.label(), one.spread(measure))).collect(),
            })
            .collect(),
    };
    let latency = rate.map_or(String::new(), |rate| format!("; latency at {rate:.0} requests per second"));
    eprintln!("{}; {} rounds of {} s{latency}", findings.machine, options.rounds, options.seconds);
    options.output.show("Comparison of balancers", &findings, &tables, &plots)
}
