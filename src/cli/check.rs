//! `ringway check`: validates a config, tries whether it could start here, and says what a reload would change.

use std::io::Write as _;
use std::path::PathBuf;

use clap::Args;
use ringway::app::{Finding, probe};
use ringway::config::{Config, Fault, Source};
use ringway::control::command::Command;
use ringway::limits;

use super::commands::in_words;
use super::side_port::{self, Port};
use super::{Common, Failure, docker_host, print, runtime};

/// Longest body of a call to the side port.
const MOST_SENT: usize = 1 << 20;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Config file [default: as for --config]
    file: Option<PathBuf>,
    /// Check only the file. Do not resolve names or test addresses, programs, files and the Docker engine
    #[arg(long)]
    offline: bool,
    /// Print the config with every default filled in
    #[arg(long)]
    print: bool,
    /// Print what a reload of the file would change in a running Ringway, and how many keys would move [default file: the one
    /// that Ringway was started with]
    #[arg(long, conflicts_with_all = ["offline", "print"])]
    diff: bool,
    #[command(flatten)]
    port: Port,
}

pub(crate) fn check(common: &Common, options: &Options) -> Result<(), Failure> {
    let file = options.file.clone().or_else(|| common.config.clone());
    if options.diff {
        return diff(common, options, file);
    }
    let source = Source::find(file);
    let config = source.load()?;
    let warnings = config.warnings();
    let paths: Vec<_> = warnings.iter().map(|warning| warning.path.as_str()).collect();
    let places = if paths.is_empty() { Vec::new() } else { source.places(&paths) };
    for (warning, place) in std::iter::zip(&warnings, places) {
        warn(&Fault { place, ..warning.clone() });
    }
    if !options.offline {
        try_out(&config, &source)?;
    }
    if options.print {
        return print(&format!("# {source}, with every default filled in\n{}", config.to_yaml()));
    }
    print(&format!("{source}: valid\n"))
}

/// Tries what a start needs. Prints what is missing, and fails if Ringway would not start.
fn try_out(config: &Config, source: &Source) -> Result<(), Failure> {
    let token = std::env::var(side_port::TOKEN).ok();
    // As `run` does.
    limits::raise_open_files();
    let findings = runtime()?.block_on(probe(config, docker_host().as_deref(), token.as_deref()));
    if findings.is_empty() {
        return Ok(());
    }
    let paths: Vec<_> = findings.iter().map(|finding| finding.problem.key_path().unwrap_or_default()).collect();
    let places = source.places(&paths);
    let failures = std::iter::zip(findings, places).map(|(Finding { is_fatal, problem }, place)| {
        let place = place.filter(|_| problem.key_path().is_some());
        (is_fatal, Failure::Start { place, error: problem })
    });
    let (fatal, others): (Vec<_>, Vec<_>) = failures.partition(|(is_fatal, _)| *is_fatal);
    for (_, problem) in others {
        warn(&problem);
    }
    let mut fatal: Vec<_> = fatal.into_iter().map(|(_, failure)| failure).collect();
    match fatal.len() {
        0 => Ok(()),
        1 => Err(fatal.remove(0)),
        count => {
            let lines: Vec<_> = fatal.iter().map(|failure| format!("\n  {failure}")).collect();
            Err(anyhow::anyhow!("{source}: {count} errors{}", lines.concat()).into())
        }
    }
}

fn warn(warning: &impl std::fmt::Display) {
    // Nobody may be reading it.
    let _ = writeln!(std::io::stderr(), "ringway: warning: {warning}");
}

/// What a reload would change.
fn diff(common: &Common, options: &Options, file: Option<PathBuf>) -> Result<(), Failure> {
    let mut common = common.clone();
    let text = match file {
        Some(file) => {
            // The file also says where its Ringway is. A pipe can be read only once.
            if file.is_file() {
                common.config = Some(file.clone());
            }
            let source = Source::File(file);
            // Reports faults with their lines.
            source.load()?;
            let text = source.rendered()?;
            if text.len() > MOST_SENT {
                let problem = "the config is larger than 1 MiB, and --diff sends at most that; without a file, Ringway compares with its own file";
                return Err(anyhow::anyhow!("{problem}").into());
            }
            Some(text)
        }
        None => None,
    };
    let file = common.config.clone().filter(|_| text.is_some());
    let command = Command::Reload { text, is_dry_run: true, is_reset: false, max_keys_moved: None };
    let compared = runtime()?.block_on(async {
        let report = side_port::run(&common, &options.port, &command).await?;
        let running = if file.is_some() { side_port::status(&common, &options.port).await?.config } else { None };
        anyhow::Ok((report, running))
    });
    let (report, running) = compared.map_err(|error| error.context("cannot compare with a running Ringway"))?;
    if let (Some(file), Some(running)) = (file, running)
        && std::path::absolute(&file).is_ok_and(|file| file != *running)
    {
        warn(&format!("compared with a Ringway that was started with another file, {running}"));
    }
    print(&in_words(&report, "no difference\n"))
}
