//! The outcomes of a load as figures of bounded size.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::load::{Collect, Outcome};

/// The figures of a load.
#[derive(Debug)]
pub struct Record {
    /// The times of all answers in nanoseconds, with three digits.
    pub latency: Histogram<u64>,
    /// The figures of each second of the run.
    pub seconds: Vec<Second>,
    /// The number of answers by server.
    pub servers: BTreeMap<Arc<str>, u64>,
    /// The number of failures by cause.
    pub failures: BTreeMap<String, u64>,
}

/// The figures of one second.
#[derive(Debug)]
pub struct Second {
    /// The times of the answers of this second in nanoseconds, with two digits.
    pub latency: Histogram<u64>,
    /// Requests that failed in this second.
    pub failed: u64,
    /// Bytes of transfers.
    pub bytes: u64,
}

/// The summary of a record.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// Duration of the run in seconds.
    pub seconds: f64,
    /// Requests, connections or transfers.
    pub requests: u64,
    /// Failed requests, connections or transfers.
    pub failed: u64,
    /// Answers per second.
    pub per_second: f64,
    /// Bytes of transfers per second.
    pub bytes_per_second: f64,
    /// The times of the answers.
    pub milliseconds: Milliseconds,
    /// The number of answers by server.
    pub servers: BTreeMap<Arc<str>, u64>,
    /// The number of failures by cause.
    pub failures: BTreeMap<String, u64>,
}

/// Percentiles in milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
#[expect(missing_docs, reason = "the names describe the fields")]
pub struct Milliseconds {
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
}

impl Default for Record {
    fn default() -> Self {
        Self { latency: histogram(3), seconds: Vec::new(), servers: BTreeMap::new(), failures: BTreeMap::new() }
    }
}

/// Creates a histogram of times that grows on demand.
fn histogram(digits: u8) -> Histogram<u64> {
    let mut histogram =
        Histogram::new_with_bounds(1, 1_000_000_000, digits).unwrap_or_else(|_| unreachable!("these are valid bounds"));
    histogram.auto(true);
    histogram
}

/// Records a time. A histogram that grows accepts every time.
fn record(histogram: &mut Histogram<u64>, time: Duration) {
    let _ = histogram.record(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(1));
}

impl Record {
    fn second(&mut self, at: Duration) -> &mut Second {
        let index = usize::try_from(at.as_secs()).unwrap_or(0);
        while self.seconds.len() <= index {
            self.seconds.push(Second { latency: histogram(2), failed: 0, bytes: 0 });
        }
        &mut self.seconds[index]
    }

    /// The number of answers.
    pub fn answered(&self) -> u64 {
        self.latency.len()
    }

    /// The number of failures.
    pub fn failed(&self) -> u64 {
        self.failures.values().sum()
    }

    /// Bytes of transfers.
    pub fn bytes(&self) -> u64 {
        self.seconds.iter().map(|second| second.bytes).sum()
    }

    /// A percentile of the times in milliseconds.
    pub fn percentile(&self, percent: f64) -> f64 {
        self.latency.value_at_quantile(percent / 100.0) as f64 / 1e6
    }

    /// Adds the record of another generator of the same load.
    pub fn merge(&mut self, other: Self) {
        add(&mut self.latency, &other.latency);
        for (index, second) in other.seconds.into_iter().enumerate() {
            let here = self.second(Duration::from_secs(index as u64));
            add(&mut here.latency, &second.latency);
            here.failed += second.failed;
            here.bytes += second.bytes;
        }
        for (server, count) in other.servers {
            *self.servers.entry(server).or_default() += count;
        }
        for (failure, count) in other.failures {
            *self.failures.entry(failure).or_default() += count;
        }
    }

    /// Summarizes a run of this duration.
    pub fn summary(&self, duration: Duration) -> Summary {
        let seconds = duration.as_secs_f64().max(f64::MIN_POSITIVE);
        Summary {
            seconds,
            requests: self.answered() + self.failed(),
            failed: self.failed(),
            per_second: self.answered() as f64 / seconds,
            bytes_per_second: self.bytes() as f64 / seconds,
            milliseconds: Milliseconds {
                mean: self.latency.mean() / 1e6,
                p50: self.percentile(50.0),
                p90: self.percentile(90.0),
                p99: self.percentile(99.0),
                p999: self.percentile(99.9),
                max: self.latency.max() as f64 / 1e6,
            },
            servers: self.servers.clone(),
            failures: self.failures.clone(),
        }
    }
}

/// Adds a histogram. A histogram that grows accepts every other one.
fn add(sum: &mut Histogram<u64>, other: &Histogram<u64>) {
    let _ = sum.add(other);
}

impl Collect for Record {
    fn add(&mut self, outcome: Outcome) {
        let second = self.second(outcome.start + outcome.took);
        match outcome.server {
            Ok(server) => {
                record(&mut second.latency, outcome.took);
                record(&mut self.latency, outcome.took);
                *self.servers.entry(server).or_default() += 1;
            }
            Err(failure) => {
                second.failed += 1;
                *self.failures.entry(failure).or_default() += 1;
            }
        }
    }

    fn moved(&mut self, at: Duration, bytes: usize) {
        self.second(at).bytes += bytes as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(start: u64, ms: u64, server: Result<&str, &str>) -> Outcome {
        Outcome {
            start: Duration::from_millis(start),
            took: Duration::from_millis(ms),
            server: server.map(Arc::from).map_err(str::to_owned),
        }
    }

    #[test]
    fn a_summary_counts_servers_failures_and_percentiles() {
        let mut record = Record::default();
        for ms in 1..=99 {
            record.add(outcome(0, ms, Ok("a")));
        }
        record.add(outcome(1000, 500, Err("reset")));
        record.add(outcome(1900, 200, Ok("b")));
        record.add(outcome(1000, 7000, Ok("b")));
        record.moved(Duration::from_millis(2500), 1000);
        let summary = record.summary(Duration::from_secs(4));
        assert_eq!((summary.requests, summary.failed), (102, 1));
        assert_eq!((summary.servers["a"], summary.servers["b"], summary.failures["reset"]), (99, 2, 1));
        let ms = summary.milliseconds;
        assert_eq!([ms.p50, ms.p90, ms.max.floor()].map(f64::round), [51.0, 91.0, 7000.0]);
        assert!((summary.per_second - 25.25).abs() < 1e-9 && (summary.bytes_per_second - 250.0).abs() < 1e-9);
        let of_seconds: Vec<_> = record.seconds.iter().map(|s| (s.latency.len(), s.failed, s.bytes)).collect();
        assert_eq!(
            of_seconds,
            [(99, 0, 0), (0, 1, 0), (1, 0, 1000), (0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0), (1, 0, 0)],
            "an outcome counts when it ends"
        );
    }

    #[test]
    fn records_merge() {
        let (mut one, mut two) = (Record::default(), Record::default());
        one.add(outcome(0, 10, Ok("a")));
        two.add(outcome(2000, 90_000, Ok("a")));
        two.add(outcome(2000, 1, Err("reset")));
        two.moved(Duration::ZERO, 7);
        one.merge(two);
        let summary = one.summary(Duration::from_secs(1));
        assert_eq!((summary.requests, summary.failed, summary.servers["a"], one.bytes()), (3, 1, 2, 7));
        assert!((summary.milliseconds.max - 90_000.0).abs() < 100.0, "{}", summary.milliseconds.max);
    }
}
