//! The figures of repeated measurements, and their output.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::Serialize;

use crate::table::{Table, page};

/// A figure of a repeated measurement.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The lowest figure.
    pub min: f64,
    /// The median.
    pub median: f64,
    /// The highest figure.
    pub max: f64,
}

impl Spread {
    /// Computes the spread of these figures. `None` if the list is empty.
    pub fn of(figures: &[f64]) -> Option<Self> {
        let mut sorted = figures.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median =
            if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) };
        Some(Self { min, median, max })
    }

    /// Formats the spread as `median (lowest to highest)`. The median sets the number of digits.
    pub fn text(&self) -> String {
        let digits = match self.median.abs() {
            size if size >= 100.0 => 0,
            size if size >= 10.0 => 1,
            size if size >= 1.0 => 2,
            _ => 3,
        };
        format!("{:.digits$} ({:.digits$} to {:.digits$})", self.median, self.min, self.max)
    }
}

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
            let parts: Vec<_> = tables.iter().map(Table::html).chain(plots.iter().cloned()).collect();
            write(path, &page(title, &parts))?;
        }
        if let Some(path) = &self.svg {
            write(path, &crate::plot::stacked(plots))?;
        }
        Ok(())
    }
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Describes this machine in one line: processor, cores and kernel.
pub fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let model = model.map_or("unknown processor", |(_, name)| name.trim());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{model}, {cores} cores, Linux {}", kernel.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_takes_any_number_of_figures() {
        assert_eq!(Spread::of(&[]), None);
        assert_eq!(Spread::of(&[3.0, 1.0, 2.0]), Some(Spread { min: 1.0, median: 2.0, max: 3.0 }));
        assert_eq!(Spread::of(&[4.0, 1.0, 2.0, 3.0]).unwrap().text(), "2.50 (1.00 to 4.00)");
        assert_eq!(Spread::of(&[0.1234]).unwrap().text(), "0.123 (0.123 to 0.123)");
    }
}
