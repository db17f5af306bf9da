//! Waits after what the engine did not do although it was told to: longer after each failure in a row.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// After the first failure; doubled with each more.
const FIRST: Duration = Duration::from_millis(250);

/// The longest wait.
const LONGEST: Duration = Duration::from_secs(30);

/// What is held, until when, and after how many failures in a row.
#[derive(Debug)]
pub(super) struct Holds<T>(HashMap<T, (Instant, u32)>);

impl<T> Default for Holds<T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<T: Eq + Hash> Holds<T> {
    /// It failed. How often in a row.
    pub(super) fn fail(&mut self, what: T, now: Instant) -> u32 {
        // What has been well for long begins anew, and is not kept for ever.
        self.0.retain(|_, (until, _)| now.saturating_duration_since(*until) < 2 * LONGEST);
        let (until, count) = self.0.entry(what).or_insert((now, 0));
        *count += 1;
        *until = now + FIRST.saturating_mul(1 << (*count - 1).min(16)).min(LONGEST);
        *count
    }

    /// Until when nothing is to be tried, if that is not over.
    pub(super) fn until(&self, what: &T, now: Instant) -> Option<Instant> {
        self.0.get(what).map(|&(until, _)| until).filter(|&until| now < until)
    }

    /// It succeeded.
    pub(super) fn clear(&mut self, what: &T) {
        self.0.remove(what);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_failure_in_a_row_waits_longer() {
        let (mut holds, mut now) = (Holds::default(), Instant::now());
        let mut waits = Vec::new();
        for count in 1..=20 {
            assert_eq!(holds.fail("a", now), count);
            let until = holds.until(&"a", now).unwrap();
            waits.push(until - now);
            now = until;
            assert_eq!(holds.until(&"a", now), None);
        }
        assert_eq!((waits[0], waits[1], waits[19]), (FIRST, 2 * FIRST, LONGEST));
        assert_eq!(holds.until(&"b", now), None);
        holds.clear(&"a");
        assert_eq!(holds.fail("a", now), 1);
        assert_eq!(holds.fail("a", now + Duration::from_secs(600)), 1, "long ago is not in a row");
    }
}
