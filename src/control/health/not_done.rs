//! Logs checks that Ringway could not make: the first one for each cause, then the number of them once a minute.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::backend::ConnectFailure;
use crate::labels::Label as _;

/// Time between two lines about one cause.
const QUIET: Duration = Duration::from_secs(60);

/// Counts the checks that were not made, by cause. Clones share the counts.
#[derive(Debug, Clone, Default)]
pub struct NotDone(Arc<Mutex<BTreeMap<&'static str, Noted>>>);

#[derive(Debug)]
struct Noted {
    logged: Instant,
    since: u64,
}

impl NotDone {
    /// Counts a check that was not made.
    pub(super) fn note(&self, why: ConnectFailure, now: Instant) {
        if let Some(checks) = self.due(why.as_str(), now) {
            tracing::warn!(why = why.as_str(), checks, "could not check backends; they keep their state");
        }
    }

    /// The number of checks to log now.
    fn due(&self, why: &'static str, now: Instant) -> Option<u64> {
        let mut causes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(noted) = causes.get_mut(why) else {
            causes.insert(why, Noted { logged: now, since: 0 });
            return Some(1);
        };
        noted.since += 1;
        if now.saturating_duration_since(noted.logged) < QUIET {
            return None;
        }
        noted.logged = now;
        Some(std::mem::take(&mut noted.since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_is_logged_once_and_then_with_a_count() {
        let (not_done, begin) = (NotDone::default(), Instant::now());
        let at = |seconds, why| not_done.due(why, begin + Duration::from_secs(seconds));
        assert_eq!((at(0, "a"), at(1, "b"), at(2, "a"), at(59, "a")), (Some(1), Some(1), None, None));
        assert_eq!((at(60, "a"), at(61, "b"), at(62, "a")), (Some(3), Some(1), None));
    }
}
