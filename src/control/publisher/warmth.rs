//! Slow start: the fraction of its keys that a backend gets after it has recovered. Pure: the time is an argument.

use std::time::{Duration, Instant};

use crate::backend::Admission;

/// Number of steps in which slow start gives a backend its keys back.
const STEPS: u32 = 20;

/// How far the slow start of a backend is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Warmth {
    /// When it began; `None`: the backend does not start slowly.
    since: Option<Instant>,
    /// The fraction of its keys that the backend gets.
    pub(super) part: Admission,
}

impl Default for Warmth {
    /// The backend gets all of its keys.
    fn default() -> Self {
        Self { since: None, part: Admission::ALL }
    }
}

impl Warmth {
    /// A slow start that begins now.
    pub(super) fn begin(now: Instant) -> Self {
        Self { since: Some(now), part: Admission::part(1.0 / f64::from(STEPS)) }
    }

    /// Applies the passing of time, where a slow start takes this `whole` time. It ends with the backend's health. Returns
    /// whether the backend gets another fraction of its keys.
    pub(super) fn pass(&mut self, whole: Duration, is_healthy: bool, now: Instant) -> bool {
        let Some(since) = self.since else { return false };
        let passed = now.saturating_duration_since(since);
        let step = (whole / STEPS).max(Duration::from_millis(1));
        let steps = u32::try_from(passed.as_nanos() / step.as_nanos()).unwrap_or(STEPS) + 1;
        let part = if steps >= STEPS { Admission::ALL } else { Admission::part(f64::from(steps) / f64::from(STEPS)) };
        if part == Admission::ALL || !is_healthy {
            self.since = None;
        }
        std::mem::replace(&mut self.part, part) != part
    }

    /// When to call [`pass`](Self::pass) again.
    pub(super) fn due(&self, whole: Duration, now: Instant) -> Option<Instant> {
        self.since.map(|_| now + whole / STEPS)
    }
}
