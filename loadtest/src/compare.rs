//! `loadtest compare`: balancers beside each other on the same work in the same run, in rounds, so that what disturbs one
//! disturbs all.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use crate::balancers::{Balancer, Kind};
use crate::bench::{Bench, Places, Task};
use crate::findings::{Output, Spread, machine};
use crate::plot::{self, Range};
use crate::process::Tree;
use crate::run::progress_bar;
use crate::table::Table;

/// How `loadtest compare` is called.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Who is compared, of those that are found
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Kind::ALL)]
    pub only: Vec<Kind>,
    /// Which work is done
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Work::ALL)]
    pub work: Vec<Work>,
    /// Rounds: in each, every one does all of the work
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    /// Seconds of each piece of work
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub seconds: u64,
    /// Idle connections by which memory is measured
    #[arg(long, default_value_t = 4000, value_parser = clap::value_parser!(u32).range(100..=9000))]
    pub idle: u32,
    /// Ringway's program, or several of them: ratios are of the first. Default: the one beside this one
    #[arg(long, value_name = "FILE", value_delimiter = ',')]
    pub ringway: Vec<PathBuf>,
    #[command(flatten)]
    places: Places,
    #[command(flatten)]
    output: Output,
}

/// What the balancers do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Work {
    /// Requests on 64 open connections
    Requests,
    /// Connections with one request, 32 at a time
    Connections,
    /// Downloads on one connection
    Bulk,
    /// Downloads on 32 connections
    Streams,
    /// Requests at half of the rate that the slowest could do, which takes `requests`
    Latency,
    /// Start-up, size and idle connections
    Footprint,
}

impl Work {
    /// All of it.
    pub const ALL: [Self; 6] =
        [Self::Requests, Self::Connections, Self::Bulk, Self::Streams, Self::Latency, Self::Footprint];
}

impl Options {
    /// Rounds of this work.
    fn rounds_of(&self, work: Work) -> usize {
        if self.work.contains(&work) { self.rounds as usize } else { 0 }
    }
}

/// What is measured.
const MEASURES: [&str; 10] = [
    "CPU us a request",
    "CPU us a connection",
    "CPU s a GB, 1 stream",
    "CPU s a GB, 32 streams",
    "p50 ms",
    "p99 ms",
    "requests a second",
    "bytes an idle connection",
    "program MB",
    "start-up ms",
];

/// Of the measures, those in which less is better and a ratio says something.
const COMPARED: [usize; 7] = [0, 1, 2, 3, 4, 5, 7];

/// One balancer, or none.
struct Contestant {
    name: String,
    kind: Option<Kind>,
    program: PathBuf,
    version: String,
    /// By measure.
    figures: Vec<Vec<f64>>,
}

#[derive(Debug, Serialize)]
struct Findings {
    machine: String,
    rounds: u32,
    seconds: u64,
    /// In the work on latency.
    requests_offered_per_second: Option<f64>,
    balancers: Vec<Finding>,
}

#[derive(Debug, Serialize)]
struct Finding {
    name: String,
    version: String,
    figures: Vec<(&'static str, Option<Spread>)>,
}

/// Runs it and prints what it came to.
///
/// # Errors
/// When a balancer cannot be started or fails a request, or a report cannot be written.
pub async fn compare(options: &Options) -> anyhow::Result<()> {
    let machine = machine();
    anyhow::ensure!(
        !options.work.contains(&Work::Latency) || options.work.contains(&Work::Requests),
        "--work latency takes --work requests: it is at half of that rate"
    );
    let mut contestants = contestants(options)?;
    let bench = Bench::new(&options.places, 3, options.idle as usize).await?;
    let duration = Duration::from_secs(options.seconds);
    let steps = u64::from(options.rounds) * (options.work.len() * contestants.len()) as u64;
    let bar = progress_bar(Duration::from_secs(steps));
    let running = start_all(&bench, &contestants).await?;
    let mut rate = f64::MAX;
    for round in 0..options.rounds as usize {
        for (index, work, task) in [
            (0, Work::Requests, Task::Requests),
            (1, Work::Connections, Task::Connections),
            (2, Work::Bulk, Task::Bulk(1)),
            (3, Work::Streams, Task::Bulk(32)),
        ] {
            if !options.work.contains(&work) {
                continue;
            }
            for turn in turns(round, contestants.len()) {
                bar.set_message(format!("{}: {}", contestants[turn].name, MEASURES[index]));
                let (target, tree) = place(&bench, running[turn].as_ref());
                let cost = bench.measure(task, target, tree, duration).await?;
                bar.inc(1);
                if task == Task::Requests {
                    contestants[turn].figures[6].push(cost.rate());
                    rate = rate.min(cost.rate() / 2.0);
                }
                if tree.is_some() {
                    let figure = if matches!(task, Task::Bulk(_)) { cost.per_gigabyte() } else { cost.per_answer() };
                    contestants[turn].figures[index].push(figure);
                }
            }
        }
    }
    // At a rate that leaves the slowest half of its time.
    for round in 0..options.rounds_of(Work::Latency) {
        for turn in turns(round, contestants.len()) {
            bar.set_message(format!("{}: latency", contestants[turn].name));
            let (target, tree) = place(&bench, running[turn].as_ref());
            let cost = bench.measure(Task::Rate(rate), target, tree, duration).await?;
            bar.inc(1);
            contestants[turn].figures[4].push(cost.record.percentile(50.0));
            contestants[turn].figures[5].push(cost.record.percentile(99.0));
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

/// Who takes part: what is asked for and found, and none.
fn contestants(options: &Options) -> anyhow::Result<Vec<Contestant>> {
    let mut contestants = Vec::new();
    for kind in &options.only {
        let programs = match kind {
            Kind::Ringway if !options.ringway.is_empty() => options.ringway.clone(),
            _ => kind.find().into_iter().collect(),
        };
        if programs.is_empty() {
            eprintln!("without {}, which is not found; to have it: {}", kind.name(), kind.remedy());
        }
        for (index, program) in programs.into_iter().enumerate() {
            let name = if index == 0 { kind.name().to_owned() } else { format!("{} {}", kind.name(), index + 1) };
            contestants.push(Contestant {
                name,
                kind: Some(*kind),
                version: kind.version(&program),
                program,
                figures: vec![Vec::new(); MEASURES.len()],
            });
        }
    }
    anyhow::ensure!(!contestants.is_empty(), "there is nobody to compare");
    contestants.push(Contestant {
        name: "no balancer".to_owned(),
        kind: None,
        program: PathBuf::new(),
        version: String::new(),
        figures: vec![Vec::new(); MEASURES.len()],
    });
    Ok(contestants)
}

async fn start_all(bench: &Bench, contestants: &[Contestant]) -> anyhow::Result<Vec<Option<Balancer>>> {
    let mut running = Vec::new();
    for Contestant { kind, program, .. } in contestants {
        running.push(match kind {
            Some(kind) => Some(bench.start(*kind, program, 512).await?),
            None => None,
        });
    }
    Ok(running)
}

/// Another one begins in each round.
fn turns(round: usize, contestants: usize) -> impl Iterator<Item = usize> {
    (0..contestants).map(move |turn| (turn + round) % contestants)
}

/// Where the load goes, and whose CPU time counts.
fn place(bench: &Bench, balancer: Option<&Balancer>) -> (std::net::SocketAddr, Option<Tree>) {
    balancer.map_or((bench.servers[0], None), |balancer| (balancer.address, Some(balancer.tree())))
}

/// Start-up, size, and the memory of idle connections, of one that is started anew.
async fn footprint(bench: &Bench, contestant: &mut Contestant, idle: usize) -> anyhow::Result<()> {
    let Some(kind) = contestant.kind else { return Ok(()) };
    let balancer = bench.start(kind, &contestant.program, idle).await?;
    let (size, start_up) = (std::fs::metadata(&contestant.program)?.len(), balancer.start_up);
    // What the first connections cost once and for all is not theirs.
    let first = bench.idle(balancer.address, 100).await?;
    let before = balancer.tree().proportional();
    let open = bench.idle(balancer.address, idle).await?;
    let after = balancer.tree().proportional();
    drop((first, open));
    // What is left to do for those that have gone must not delay the next one's start.
    drop(balancer);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let figures = [
        (7, after.saturating_sub(before) as f64 / idle as f64),
        (8, size as f64 / 1e6),
        (9, start_up.as_secs_f64() * 1e3),
    ];
    for (index, figure) in figures {
        contestant.figures[index].push(figure);
    }
    Ok(())
}

fn show(options: &Options, contestants: &[Contestant], machine: String, rate: Option<f64>) -> anyhow::Result<()> {
    let mut all = Table::new(std::iter::once("").chain(contestants.iter().map(|one| one.name.as_str())));
    for (index, measure) in MEASURES.iter().enumerate() {
        if contestants.iter().all(|one| one.figures[index].is_empty()) {
            continue;
        }
        let cells = contestants
            .iter()
            .map(|one| Spread::of(&one.figures[index]).map_or("-".to_owned(), |spread| spread.text()));
        all.row(std::iter::once((*measure).to_owned()).chain(cells));
    }
    all.row(std::iter::once("version").chain(contestants.iter().map(|one| one.version.as_str())));
    let mut tables = vec![all];
    let mut plots = Vec::new();
    let ringway = contestants.iter().find(|one| one.kind == Some(Kind::Ringway));
    let is_peer = |one: &&Contestant| one.kind.is_some() && ringway.is_some_and(|ringway| ringway.name != one.name);
    let peers: Vec<_> = contestants.iter().filter(is_peer).collect();
    if let (Some(ringway), false) = (ringway, peers.is_empty()) {
        let mut ratios =
            Table::new(std::iter::once("Ringway to".to_owned()).chain(peers.iter().map(|peer| peer.name.clone())));
        for index in COMPARED.into_iter().filter(|index| !ringway.figures[*index].is_empty()) {
            let ratio = |peer: &&Contestant| {
                let (one, other) = (Spread::of(&ringway.figures[index])?, Spread::of(&peer.figures[index])?);
                Some(one.median / other.median)
            };
            let cells = peers.iter().map(|peer| ratio(peer).map_or("-".to_owned(), |ratio| format!("{ratio:.2}")));
            ratios.row(std::iter::once(MEASURES[index].to_owned()).chain(cells));
        }
        tables.push(ratios);
    }
    for index in COMPARED {
        let ranges: Vec<_> = contestants
            .iter()
            .filter_map(|one| {
                let Spread { min, median, max } = Spread::of(&one.figures[index])?;
                Some(Range { name: one.name.clone(), figures: [min, median, max] })
            })
            .collect();
        // Of work that was not done there is no plot.
        plots.extend(plot::ranges(MEASURES[index], 0.0, &ranges));
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
                figures: std::iter::zip(MEASURES, &one.figures)
                    .map(|(measure, figures)| (measure, Spread::of(figures)))
                    .collect(),
            })
            .collect(),
    };
    let latency = rate.map_or(String::new(), |rate| format!("; latency at {rate:.0} requests a second"));
    eprintln!("{}; {} rounds of {} s{latency}", findings.machine, options.rounds, options.seconds);
    options.output.show("Balancers beside each other", &findings, &tables, &plots)
}
