//! `loadtest large` measures what grows with the size of a config: thousands of backends, a thousand pools with listeners,
//! and several workers.
//!
//! - [`backends`]: one pool with many checked backends, in Ringway and in HAProxy
//! - [`pools`]: many pools, each with a listener
//! - [`workers`]: how evenly connections and streams are spread over workers

mod backends;
mod pools;
mod workers;

use std::cell::RefCell;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::Serialize;
use tempfile::TempDir;

use crate::balancers::{Kind, free_addresses, ringway, spawn};
use crate::findings::{Output, machine};
use crate::process::Tree;
use crate::side_port::SidePort;
use crate::table::Table;

/// The longest wait for one condition.
const PATIENCE: Duration = Duration::from_secs(120);

/// Arguments of `loadtest large`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Number of backends in one pool. 0 skips this part
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(0..=15_000))]
    pub backends: u32,
    /// Number of pools, each with ten backends and a listener. 0 skips this part
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(0..=1500))]
    pub pools: u32,
    /// Numbers of workers. 0 skips this part
    #[arg(long, value_delimiter = ',', default_values_t = [2, 4, 8], value_parser = clap::value_parser!(u32).range(0..=64))]
    pub workers: Vec<u32>,
    /// Number of runs for each number of workers
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// Processor that only the balancer uses, in the parts with backends and pools
    #[arg(long, default_value_t = 0, value_name = "N")]
    balancer_cpu: usize,
    /// Ringway programs [default: the program in the directory of loadtest]
    #[arg(long, value_name = "FILE", value_delimiter = ',')]
    pub ringway: Vec<PathBuf>,
    #[command(flatten)]
    output: Output,
}

/// A figure of one program.
#[derive(Debug, Clone, Serialize)]
struct Figure {
    program: String,
    what: String,
    value: f64,
    unit: &'static str,
}

#[derive(Debug, Serialize)]
struct Findings {
    machine: String,
    figures: Vec<Figure>,
}

/// The figures of one part, by program.
#[derive(Debug, Default)]
struct Figures(Vec<Figure>);

impl Figures {
    fn add(&mut self, program: &str, what: impl Into<String>, value: f64, unit: &'static str) {
        let figure = Figure { program: program.to_owned(), what: what.into(), value, unit };
        // A later measurement may fail.
        eprintln!("{program}: {}: {} {unit}", figure.what, crate::plot::figure(value));
        self.0.push(figure);
    }

    /// A table with a row for each figure and a column for each program.
    fn table(&self, title: &str) -> Table {
        let mut programs: Vec<&str> = Vec::new();
        let mut rows: Vec<(&str, &str)> = Vec::new();
        for figure in &self.0 {
            if !programs.contains(&&*figure.program) {
                programs.push(&figure.program);
            }
            if !rows.contains(&(&*figure.what, figure.unit)) {
                rows.push((&figure.what, figure.unit));
            }
        }
        let mut table = Table::new([title, "unit"].into_iter().chain(programs.iter().copied()));
        for (what, unit) in rows {
            let cell = |program: &&str| {
                let found = self.0.iter().find(|figure| figure.program == *program && figure.what == what);
                found.map_or("-".to_owned(), |figure| crate::plot::figure(figure.value))
            };
            let cells = programs.iter().map(cell);
            table.row([what.to_owned(), unit.to_owned()].into_iter().chain(cells));
        }
        table
    }
}

/// Runs the measurements and prints the results.
///
/// # Errors
/// When a balancer cannot be started, or does not get into the expected state in time.
pub async fn large(options: &Options) -> anyhow::Result<()> {
    options.output.check()?;
    crate::preflight::warn_if_noisy(options.runs).await;
    crate::preflight::open_files(u64::from(options.backends.max(options.pools * 4)))?;
    let programs = if options.ringway.is_empty() { vec![ringway(None)?] } else { options.ringway.clone() };
    let name = |index: usize| if index == 0 { "ringway".to_owned() } else { format!("ringway {}", index + 1) };
    let programs: Vec<_> = programs.into_iter().enumerate().map(|(index, path)| (name(index), path)).collect();
    let (mut all, mut tables) = (Vec::new(), Vec::new());
    let mut done = |title: &str, figures: Figures| {
        tables.push(figures.table(title));
        all.extend(figures.0);
    };
    if options.backends > 0 {
        done(&format!("{} backends", options.backends), backends::measure(options, &programs).await?);
    }
    if options.pools > 0 {
        done(&format!("{} pools with 10 backends", options.pools), pools::measure(options, &programs).await?);
    }
    if options.workers.iter().any(|&workers| workers > 0) {
        done("workers", workers::measure(options, &programs).await?);
    }
    let findings = Findings { machine: machine(), figures: all };
    eprintln!("{}", findings.machine);
    options.output.show("Large configs", &findings, &tables, &[])
}

/// A balancer with a config of its own. It ends when it is dropped.
pub(crate) struct Running {
    child: RefCell<Child>,
    pid: u32,
    pub(crate) began: Instant,
    files: TempDir,
}

impl Running {
    /// Starts a balancer on this processor, or on all.
    pub(crate) fn start(kind: Kind, program: &Path, config: &str, processor: Option<usize>) -> anyhow::Result<Self> {
        let files = TempDir::new().context("cannot make a directory for configs")?;
        let path = files.path().join("config");
        std::fs::write(&path, config)?;
        let log = std::fs::File::create(files.path().join("log"))?;
        let mut command = Command::new(program);
        if kind == Kind::Ringway {
            command.arg("--config").arg(&path);
        } else {
            command.arg("-db").arg("-f").arg(&path);
        }
        command.current_dir(files.path()).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let began = Instant::now();
        let child = spawn(command, processor.into_iter().collect())
            .with_context(|| format!("cannot start {}", program.display()))?;
        Ok(Self { pid: child.id(), child: RefCell::new(child), began, files })
    }

    fn write_config(&self, config: &str) -> anyhow::Result<()> {
        Ok(std::fs::write(self.files.path().join("config"), config)?)
    }

    fn tree(&self) -> Tree {
        Tree(self.pid)
    }

    /// Seconds of CPU time per second, over this time.
    async fn cpu_over(&self, time: Duration) -> f64 {
        let (before, began) = (self.tree().cpu(), Instant::now());
        tokio::time::sleep(time).await;
        self.tree().cpu().saturating_sub(before).as_secs_f64() / began.elapsed().as_secs_f64()
    }

    /// The end of the log, for errors.
    fn log(&self) -> String {
        let log = std::fs::read_to_string(self.files.path().join("log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(5)..].join("\n")
    }

    /// Waits for a condition, and returns the time since `began`.
    pub(crate) async fn when(
        &self,
        what: &str,
        began: Instant,
        mut condition: impl AsyncFnMut() -> bool,
    ) -> anyhow::Result<Duration> {
        while !condition().await {
            let has_ended = !matches!(self.child.borrow_mut().try_wait(), Ok(None));
            anyhow::ensure!(
                !has_ended && began.elapsed() < PATIENCE,
                "not in time: {what}; the end of the log:\n{}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        Ok(began.elapsed())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for pid in self.tree().processes() {
            if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
                // The process may have exited already.
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        let _ = self.child.get_mut().wait();
    }
}

/// The sum of a metric; `None` while the side port does not answer.
pub(crate) async fn metric(side_port: SidePort, name: &str) -> Option<f64> {
    let text = side_port.metrics().await.ok()?;
    let of_name = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']));
    Some(text.lines().filter(of_name).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
}

/// Two free addresses: of a listener, and of a side port.
fn addresses() -> anyhow::Result<[SocketAddr; 2]> {
    Ok(free_addresses()?)
}
