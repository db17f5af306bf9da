//! Rise and fall: turns a series of passed and failed checks into a verdict. Pure.

/// The rise and fall counter of one replica.
#[derive(Debug)]
pub(super) struct RiseFall {
    verdict: Option<bool>,
    /// Checks in a row that contradict the verdict.
    against: u32,
}

impl RiseFall {
    /// Starts with an earlier verdict. Without one, the first pass makes the replica healthy.
    pub(super) fn new(verdict: Option<bool>) -> Self {
        Self { verdict, against: 0 }
    }

    /// `Some(true)`: healthy; `Some(false)`: unhealthy; `None`: undecided.
    pub(super) fn verdict(&self) -> Option<bool> {
        self.verdict
    }

    /// Counts the result of one check. `rise` passes in a row make an unhealthy replica healthy, and `fall` failures in a row
    /// make any replica unhealthy.
    pub(super) fn observe(&mut self, passed: bool, rise: u32, fall: u32) {
        if self.verdict == Some(passed) {
            self.against = 0;
            return;
        }
        self.against += 1;
        let needed = match (self.verdict, passed) {
            (None, true) => 1,
            (_, true) => rise,
            (_, false) => fall,
        };
        if self.against >= needed {
            (self.verdict, self.against) = (Some(passed), 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdicts(checks: &str) -> String {
        let mut rise_fall = RiseFall::new(None);
        let letter = |verdict| match verdict {
            None => '?',
            Some(true) => 'H',
            Some(false) => 'U',
        };
        checks
            .chars()
            .map(|check| {
                rise_fall.observe(check == '+', 2, 3);
                letter(rise_fall.verdict())
            })
            .collect()
    }

    #[test]
    fn the_first_pass_makes_healthy_and_later_changes_need_rise_or_fall_checks() {
        assert_eq!(verdicts("+---++"), "HHHUUH");
        assert_eq!(verdicts("---+-++"), "??UUUUH");
        assert_eq!(verdicts("+--+--+---"), "HHHHHHHHHU");
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig { failure_persistence: None, ..Default::default() })]

        /// Two changes of state take at least `rise + fall` checks, however the backend flaps.
        #[test]
        fn a_flapping_backend_changes_state_a_bounded_number_of_times(
            checks in proptest::collection::vec(proptest::prelude::any::<bool>(), 1..2000),
            rise in 1_u32..6,
            fall in 1_u32..6,
        ) {
            let mut rise_fall = RiseFall::new(Some(true));
            let (mut changes, mut before) = (0, Some(true));
            for &passed in &checks {
                rise_fall.observe(passed, rise, fall);
                changes += usize::from(rise_fall.verdict() != before);
                before = rise_fall.verdict();
            }
            proptest::prop_assert!(changes <= 2 * checks.len() / (rise + fall) as usize + 2, "{} changes", changes);
        }
    }
}
