//! What became of the load.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

/// What became of one request.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// When it began, since the load's start.
    pub start: Duration,
    /// How long it took, with the connect where it had one.
    pub took: Duration,
    /// Who answered, or what went wrong.
    pub server: Result<String, String>,
}

/// Every outcome of a load.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// In no particular order.
    pub outcomes: Vec<Outcome>,
}

impl Extend<Outcome> for Report {
    fn extend<T: IntoIterator<Item = Outcome>>(&mut self, outcomes: T) {
        self.outcomes.extend(outcomes);
    }
}

/// A report in a few figures.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// Requests begun.
    pub requests: usize,
    /// Requests that failed.
    pub failed: usize,
    /// Answers by who gave them.
    pub servers: BTreeMap<String, usize>,
    /// Failures by what was wrong.
    pub failures: BTreeMap<String, usize>,
    /// Median, 99th percentile and longest time of the answered ones, in milliseconds.
    pub milliseconds: [f64; 3],
}

impl Report {
    /// Answers by who gave them.
    pub fn servers(&self) -> BTreeMap<String, usize> {
        count(self.outcomes.iter().filter_map(|outcome| outcome.server.as_ref().ok()))
    }

    /// Failures by what was wrong.
    pub fn failures(&self) -> BTreeMap<String, usize> {
        count(self.outcomes.iter().filter_map(|outcome| outcome.server.as_ref().err()))
    }

    /// A few figures.
    pub fn summary(&self) -> Summary {
        let mut took: Vec<_> =
            self.outcomes.iter().filter(|outcome| outcome.server.is_ok()).map(|outcome| outcome.took).collect();
        took.sort_unstable();
        let at = |percent: usize| {
            let index = took.len().saturating_sub(1) * percent / 100;
            took.get(index).map_or(0.0, |took| took.as_secs_f64() * 1e3)
        };
        Summary {
            requests: self.outcomes.len(),
            failed: self.outcomes.len() - took.len(),
            servers: self.servers(),
            failures: self.failures(),
            milliseconds: [at(50), at(99), at(100)],
        }
    }
}

fn count<'a>(names: impl Iterator<Item = &'a String>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for name in names {
        *counts.entry(name.clone()).or_insert(0) += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_counts_servers_failures_and_percentiles() {
        let outcome = |ms, server: Result<&str, &str>| Outcome {
            start: Duration::ZERO,
            took: Duration::from_millis(ms),
            server: server.map(str::to_owned).map_err(str::to_owned),
        };
        let mut report = Report::default();
        report.extend((1..=99).map(|ms| outcome(ms, Ok("a"))));
        report.extend([outcome(500, Err("reset")), outcome(200, Ok("b"))]);
        let summary = report.summary();
        assert_eq!((summary.requests, summary.failed), (101, 1));
        assert_eq!((summary.servers["a"], summary.servers["b"], summary.failures["reset"]), (99, 1, 1));
        assert_eq!(summary.milliseconds.map(f64::round), [50.0, 99.0, 200.0]);
    }
}
