//! Waits between retries of failed commands to the engine. Each failure in a row makes the wait longer.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// Wait after the first failure; doubles with each further failure.
const FIRST: Duration = Duration::from_millis(250);

/// The longest wait.
const LONGEST: Duration = Duration::from_secs(30);

/// For each key: the end of its wait, and its number of failures in a row.
#[derive(Debug)]
pub(super) struct Backoff<T>(HashMap<T, (Instant, u32)>);

impl<T> Default for Backoff<T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<T: Eq + Hash> Backoff<T> {
    /// Records a failure. Returns the number of failures in a row.
    pub(super) fn fail(&mut self, what: T, now: Instant) -> u32 {
        // Drop keys without recent failures: they start over, and the map stays small.
        self.0.retain(|_, (until, _)| now.saturating_duration_since(*until) < 2 * LONGEST);
        let (until, count) = self.0.entry(what).or_insert((now, 0));
        *count += 1;
        *until = now + FIRST.saturating_mul(1 << (*count - 1).min(16)).min(LONGEST);
        *count
    }

    /// The end of the wait, if it is not over.
    pub(super) fn until(&self, what: &T, now: Instant) -> Option<Instant> {
        self.0.get(what).map(|&(until, _)| until).filter(|&until| now < until)
    }

    /// Records a success.
    pub(super) fn clear(&mut self, what: &T) {
        self.0.remove(what);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_failure_in_a_row_waits_longer() {
        let (mut backoff, mut now) = (Backoff::default(), Instant::now());
        let mut waits = Vec::new();
        for count in 1..=20 {
            assert_eq!(backoff.fail("a", now), count);
            let until = backoff.until(&"a", now).unwrap();
            waits.push(until - now);
            now = until;
            assert_eq!(backoff.until(&"a", now), None);
        }
        assert_eq!((waits[0], waits[1], waits[19]), (FIRST, 2 * FIRST, LONGEST));
        assert_eq!(backoff.until(&"b", now), None);
        backoff.clear(&"a");
        assert_eq!(backoff.fail("a", now), 1);
        assert_eq!(backoff.fail("a", now + Duration::from_secs(600)), 1, "a failure long ago does not count");
    }
}
