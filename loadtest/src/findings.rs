//! The figures of repeated measurements, and their output.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::Serialize;

use crate::table::{Table, escape, page};

/// The output of results.
#[derive(Debug, Clone, clap::Args)]
pub struct Output {
    /// Print the result as JSON
    #[arg(long, conflicts_with = "markdown")]
    pub json: bool,
    /// Print the tables as Markdown
    #[arg(long)]
    pub markdown: bool,
    /// Write a report with plots
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Write only the plots
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

impl Output {
    /// Checks that the requested files can be written, before a long run.
    ///
    /// # Errors
    /// When one cannot be written.
    pub fn check(&self) -> anyhow::Result<()> {
        self.html.iter().chain(&self.svg).try_for_each(|path| can_be_written(path))
    }

    /// Prints the results and writes the requested files.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn show(
        &self,
        title: &str,
        findings: &impl Serialize,
        tables: &[Table],
        plots: &[String],
    ) -> anyhow::Result<()> {
        if self.json {
            println!("{}", serde_json::to_string_pretty(findings)?);
        } else {
            let form = if self.markdown { Table::markdown } else { Table::text };
            println!("{}", tables.iter().map(form).collect::<Vec<_>>().join("\n"));
        }
        if let Some(path) = &self.html {
            let origin = format!("<p>{}</p>\n", escape(&origin()).replace('\n', "<br>"));
            let parts = std::iter::once(origin).chain(tables.iter().map(Table::html)).chain(plots.iter().cloned());
            write(path, &page(title, &parts.collect::<Vec<_>>()))?;
        }
        if let Some(path) = &self.svg {
            write(path, &crate::plot::stacked(plots, &origin()))?;
        }
        Ok(())
    }
}

/// Checks that a file can be written.
///
/// # Errors
/// When it cannot.
pub(crate) fn can_be_written(path: &Path) -> anyhow::Result<()> {
    let opened = std::fs::OpenOptions::new().create(true).append(true).open(path);
    opened.map(drop).with_context(|| format!("cannot write {}", path.display()))
}

/// When and where the figures were made, and by which command: two lines.
pub(crate) fn origin() -> String {
    let date = humantime::format_rfc3339_seconds(std::time::SystemTime::now());
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    format!("{date}, {}, loadtest {}\nloadtest {}", machine(), env!("CARGO_PKG_VERSION"), arguments.join(" "))
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Describes this machine in one line: processor, cores and kernel.
pub fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let model = model.map_or("unknown processor", |(_, name)| name.trim());
    // Counts the cores of the machine. A bench pins this process to some of them.
    let cores = info.lines().filter(|line| line.starts_with("processor")).count();
    let plural = if cores == 1 { "" } else { "s" };
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{model}, {cores} core{plural}, Linux {}", kernel.trim())
}
