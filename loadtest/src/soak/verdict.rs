//! What the figures of a soak say, in words.

use std::time::Duration;

use serde::Serialize;

use super::{Outcomes, Sample};

/// The first of this many parts of the run does not count, because buffers and pools fill up.
const WARM_UP: usize = 10;

/// The shortest time over which a growth per hour means something.
const LONG_ENOUGH: Duration = Duration::from_secs(15 * 60);

/// The tolerated growth of a figure in an hour, as a part of its mean.
const TOLERATED: f64 = 0.05;

/// The mean of a figure and its growth in an hour by least squares.
#[derive(Debug, Serialize)]
pub struct Slope {
    /// The mean of the samples after the warm-up.
    pub mean: f64,
    /// The growth in an hour; `None` if the run was too short to tell.
    pub per_hour: Option<f64>,
    /// The growth in an hour as a part of the mean.
    pub per_hour_relative: Option<f64>,
}

/// What the figures say.
#[derive(Debug, Default, Serialize)]
pub struct Verdict {
    /// No request failed without a reason, no healthy backend was taken for unhealthy, and nothing grew.
    pub is_good: bool,
    /// A sentence for each figure.
    pub words: Vec<String>,
}

impl Verdict {
    pub(super) fn of(outcomes: &Outcomes) -> Self {
        let mut verdict = Self { is_good: true, words: Vec::new() };
        let (all, failed) = (outcomes.load.requests, outcomes.load.failed);
        let unexplained = failed - outcomes.failed_after_a_kill.min(failed);
        let after_kills = if outcomes.kills > 0 {
            format!(", and {} within two seconds after one of {} kills", failed - unexplained, outcomes.kills)
        } else {
            String::new()
        };
        verdict.say(unexplained == 0, &format!("{unexplained} of {all} requests failed without a reason{after_kills}"));
        if outcomes.scrapes + outcomes.failed_scrapes > 0 {
            let (answered, failed) = (outcomes.scrapes, outcomes.failed_scrapes);
            verdict.say(failed == 0, &format!("{failed} of {} scrapes failed", answered + failed));
        }
        let unhealthy = outcomes.samples_with_an_unhealthy_backend;
        verdict.say(unhealthy == 0, &format!("{unhealthy} samples show a backend that fails its checks"));
        for (name, slope) in
            [("memory", &outcomes.memory), ("descriptors", &outcomes.descriptors), ("tasks", &outcomes.tasks)]
        {
            match slope.per_hour_relative {
                Some(growth) => {
                    verdict.say(growth < TOLERATED, &format!("{name}: {:+.1} % in an hour", growth * 100.0));
                }
                None => verdict.say(true, &format!("{name}: the run is too short to tell whether it grows")),
            }
        }
        verdict
    }

    fn say(&mut self, is_good: bool, words: &str) {
        self.words.push(format!("{} {words}", if is_good { "good:" } else { "BAD: " }));
        self.is_good &= is_good;
    }
}

/// Computes the slope of the samples after the warm-up.
pub(super) fn slope(samples: &[Sample], value: impl Fn(&Sample) -> f64) -> Slope {
    let counted = &samples[samples.len() / WARM_UP..];
    let count = counted.len().max(1) as f64;
    let mean = |of: &dyn Fn(&Sample) -> f64| counted.iter().map(of).sum::<f64>() / count;
    let hours = |sample: &Sample| sample.at.as_secs_f64() / 3600.0;
    let (mid_time, mid_value) = (mean(&hours), mean(&value));
    let spread: f64 = counted.iter().map(|sample| (hours(sample) - mid_time).powi(2)).sum();
    let together: f64 = counted.iter().map(|sample| (hours(sample) - mid_time) * (value(sample) - mid_value)).sum();
    let took = counted.last().map_or(Duration::ZERO, |last| last.at.saturating_sub(counted[0].at));
    let per_hour = (took >= LONG_ENOUGH && spread > 0.0).then(|| together / spread);
    let relative = per_hour.map(|per_hour| if mid_value > 0.0 { per_hour / mid_value } else { 0.0 });
    Slope { mean: mid_value, per_hour, per_hour_relative: relative }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(n: u64, memory: f64) -> Sample {
        Sample {
            at: Duration::from_secs(n * 36),
            memory,
            descriptors: 0.0,
            tasks: 0.0,
            connections: 0.0,
            unhealthy: 0.0,
        }
    }

    #[test]
    fn the_slope_ignores_the_warm_up_and_does_not_extrapolate_from_a_short_run() {
        // The figure grows by 1000 in an hour from 5000 on. The first tenth has other values.
        let samples: Vec<_> =
            (0..100).map(|n| sample(n, if n < 10 { 9.0 } else { 5000.0 + 10.0 * n as f64 })).collect();
        let found = slope(&samples, |sample| sample.memory);
        assert!((found.per_hour.unwrap() - 1000.0).abs() < 1.0, "{found:?}");
        assert_eq!(slope(&samples[..25], |sample| sample.memory).per_hour, None, "13 minutes after the warm-up");
        assert_eq!(slope(&[], |sample| sample.memory).mean, 0.0);
    }

    #[test]
    fn a_failure_without_a_reason_and_a_growth_are_bad() {
        let outcomes = |failed, failed_after_a_kill, growth: f64| {
            let slope = || Slope { mean: 1.0, per_hour: Some(0.0), per_hour_relative: Some(0.0) };
            let mut load = crate::record::Record::default().summary(Duration::from_secs(1));
            (load.requests, load.failed) = (100, failed);
            Outcomes {
                load,
                failed_after_a_kill,
                aborted: 0,
                scrapes: 5,
                failed_scrapes: 0,
                samples_with_an_unhealthy_backend: 0,
                reloads: 0,
                upgrades: 0,
                kills: 1,
                memory: Slope { per_hour_relative: Some(growth), ..slope() },
                descriptors: slope(),
                tasks: slope(),
                verdict: Verdict::default(),
            }
        };
        let is_good = |outcomes: Outcomes| Verdict::of(&outcomes).is_good;
        assert!(is_good(outcomes(0, 0, 0.01)) && is_good(outcomes(2, 2, -0.2)));
        assert!(!is_good(outcomes(2, 1, 0.0)) && !is_good(outcomes(0, 0, 0.3)));
        let unhealthy = Outcomes { samples_with_an_unhealthy_backend: 1, ..outcomes(0, 0, 0.0) };
        assert!(!is_good(unhealthy));
    }
}
