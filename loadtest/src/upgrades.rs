//! `loadtest upgrades` upgrades Ringway again and again under load, and counts what clients notice: short connections that fail, and streams
//! that end or have a wrong byte.

use std::cell::Cell;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::Serialize;

use crate::balancers::{Kind as Balancer, free_addresses, ringway};
use crate::findings::{Output, machine};
use crate::large::Running;
use crate::process::Tree;
use crate::short::Short;
use crate::side_port::SidePort;
use crate::spread::Spread;
use crate::streams::{Kind, Server};
use crate::table::Table;

/// Longest wait for the end of an old process.
const PATIENCE: Duration = Duration::from_secs(10);

/// Time between two messages of a stream.
const PAUSE: Duration = Duration::from_millis(250);

/// Time between two upgrades, in which all streams move bytes.
const BETWEEN: Duration = Duration::from_secs(1);

/// Arguments of `loadtest upgrades`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Number of upgrades
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub upgrades: u32,
    /// Number of streams that last all the time
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(100..=4000))]
    pub streams: u32,
    /// Short connections per second
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    pub rate: u32,
    /// Ringway program [default: the program in the directory of loadtest]
    #[arg(long, value_name = "FILE")]
    pub ringway: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Serialize)]
struct Findings {
    machine: String,
    upgrades: u32,
    streams: u32,
    /// Streams in each state, for people.
    states: String,
    /// Bytes of streams that were checked.
    checked: u64,
    short: u64,
    short_failed: u64,
    /// Seconds until `ringway upgrade` is answered.
    answered: Spread,
    /// Seconds from the answer until the old process has ended.
    ended: Spread,
    /// Descriptors and pipes of the first and of the last process.
    descriptors: [f64; 2],
    pipes: [f64; 2],
    /// Resident memory of the first and of the last process, in bytes.
    memory: [f64; 2],
}

/// The process that serves now. Dropping it ends the process.
struct Serving(Cell<u32>);

impl Drop for Serving {
    fn drop(&mut self) {
        for pid in Tree(self.0.get()).processes() {
            if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
                // The process may have exited already.
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

/// The number of streams in each state.
fn states(streams: u32) -> [(Kind, usize); 6] {
    let part = |percent: u32| (streams * percent / 100) as usize;
    let others = [
        (Kind::Exchange, 25),
        (Kind::ClosedByClient, 10),
        (Kind::ClosedByServer, 10),
        (Kind::Bulk, 1),
        (Kind::Blocked, 1),
    ];
    let [exchange, by_client, by_server, bulk, blocked] = others.map(|(kind, percent)| (kind, part(percent)));
    let idle = streams as usize - exchange.1 - by_client.1 - by_server.1 - bulk.1 - blocked.1;
    [(Kind::Idle, idle), exchange, by_client, by_server, bulk, blocked]
}

/// Runs the measurement and prints the results.
///
/// # Errors
/// When Ringway cannot be started, an upgrade fails, an old process does not end, or a client noticed something.
pub async fn upgrades(options: &Options) -> anyhow::Result<()> {
    options.output.check()?;
    // A stream has an end in the client and one in the server, both in this process.
    crate::preflight::open_files(u64::from(2 * options.streams + options.rate) + 200)?;
    let findings = measure(options).await?;
    eprintln!("{}", findings.machine);
    let mut table = Table::new(["what", "figure"]);
    let of_both = |[first, last]: [f64; 2]| format!("{first:.0} and {last:.0}");
    let mut row = |what: &str, figure: String| table.row([what.to_owned(), figure]);
    row("streams", format!("{} ({})", findings.streams, findings.states));
    row("upgrades", findings.upgrades.to_string());
    row("bytes checked", format!("{:.2} GB", findings.checked as f64 / 1e9));
    row("streams with a wrong or missing byte", "0".to_owned());
    row("short connections", findings.short.to_string());
    row("short connections that failed", findings.short_failed.to_string());
    row("seconds until the answer", findings.answered.text());
    row("seconds from the answer to the end of the old process", findings.ended.text());
    row("descriptors of the first and the last process", of_both(findings.descriptors));
    row("pipes of the first and the last process", of_both(findings.pipes));
    row("resident memory of the first and the last process, MB", of_both(findings.memory.map(|bytes| bytes / 1e6)));
    options.output.show("Upgrades", &findings, &[table], &[])?;
    anyhow::ensure!(findings.short_failed == 0, "a client noticed an upgrade");
    Ok(())
}

async fn measure(options: &Options) -> anyhow::Result<Findings> {
    let program = ringway(options.ringway.as_deref())?;
    let server = Server::start(PAUSE).await?;
    let [streaming, web, api] = free_addresses()?;
    let config = format!(
        "api: {{ listen: \"{api}\" }}\nupgrade: {{ connections: hand_over }}\nlisteners:\n  - {{ name: streams, listen: \"{streaming}\", \
         pool: streams }}\n  - {{ name: web, listen: \"{web}\", pool: web }}\npools:\n  - name: streams\n    drain: 10m\n    \
         provider: {{ static: [{{ address: \"{}\" }}] }}\n  - name: web\n    drain: 10m\n    provider:\n      process:\n        replicas: 3\n        \
         command: [ringway, echo-server, --listen, \"127.0.0.1:{{port}}\", --name, \"{{slot}}\"]\n",
        server.address
    );
    let running = Running::start(Balancer::Ringway, &program, &config, None)?;
    let side_port = SidePort::new(api);
    running.when("Ringway is ready", running.began, || side_port.is_ready()).await?;
    let serving = Serving(Cell::new(pid(side_port).await?));

    let states = states(options.streams);
    let streams = server.open(streaming, &states).await?;
    let short = Arc::new(Short::default());
    let load = tokio::spawn(Arc::clone(&short).run(web, options.rate));
    tokio::time::sleep(BETWEEN).await;
    let first = resources(side_port, serving.0.get()).await?;
    let (mut answered, mut ended) = (Vec::new(), Vec::new());
    for _ in 0..options.upgrades {
        let (old, began) = (serving.0.get(), Instant::now());
        side_port.post("/api/upgrade").await?;
        answered.push(began.elapsed().as_secs_f64());
        let began = Instant::now();
        while is_alive(old) {
            anyhow::ensure!(began.elapsed() < PATIENCE, "the old process still runs after {} s", PATIENCE.as_secs());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        ended.push(began.elapsed().as_secs_f64());
        serving.0.set(pid(side_port).await?);
        tokio::time::sleep(BETWEEN).await;
    }
    let last = resources(side_port, serving.0.get()).await?;
    short.end();
    load.await?;
    let checked = streams.finish().await?;
    let states = states.map(|(kind, count)| format!("{count} {kind:?}")).join(", ");
    let (short, short_failed) = short.counts();
    Ok(Findings {
        machine: machine(),
        upgrades: options.upgrades,
        streams: options.streams,
        states,
        checked,
        short,
        short_failed,
        answered: Spread::of(&answered).context("no upgrade")?,
        ended: Spread::of(&ended).context("no upgrade")?,
        descriptors: [first.0, last.0],
        pipes: [first.1, last.1],
        memory: [first.2, last.2],
    })
}

/// The id of the process that answers at the side port.
async fn pid(side_port: SidePort) -> anyhow::Result<u32> {
    let status = side_port.status().await?;
    status["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).context("the status has no pid")
}

fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // A process that has ended stays as a zombie until its parent asks.
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

/// Descriptors, pipes and resident memory of the process.
async fn resources(side_port: SidePort, pid: u32) -> anyhow::Result<(f64, f64, f64)> {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count() as f64;
    let pipes = crate::large::metric(side_port, "ringway_splice_pipes").await.context("no metrics")?;
    Ok((descriptors, pipes, Tree::resident_alone(pid).unwrap_or_default()))
}
