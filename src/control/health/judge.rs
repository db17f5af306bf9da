//! Rise and fall: what a row of passed and failed checks makes of a backend. Pure.

/// The judge of one replica.
#[derive(Debug)]
pub(super) struct Judge {
    rise: u32,
    fall: u32,
    verdict: Option<bool>,
    /// Checks in a row that speak against the verdict.
    against: u32,
}

impl Judge {
    /// Goes on from the verdict of before. Without one the first pass makes it healthy, `fall` failures unhealthy.
    pub(super) fn new(rise: u32, fall: u32, verdict: Option<bool>) -> Self {
        Self { rise, fall, verdict, against: 0 }
    }

    /// Healthy, unhealthy, or undecided.
    pub(super) fn verdict(&self) -> Option<bool> {
        self.verdict
    }

    /// Takes the result of one check.
    pub(super) fn observe(&mut self, passed: bool) {
        if self.verdict == Some(passed) {
            self.against = 0;
            return;
        }
        self.against += 1;
        let needed = match (self.verdict, passed) {
            (None, true) => 1,
            (_, true) => self.rise,
            (_, false) => self.fall,
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
        let mut judge = Judge::new(2, 3, None);
        let letter = |verdict| match verdict {
            None => '?',
            Some(true) => 'H',
            Some(false) => 'U',
        };
        checks
            .chars()
            .map(|check| {
                judge.observe(check == '+');
                letter(judge.verdict())
            })
            .collect()
    }

    #[test]
    fn the_first_pass_decides_and_then_rise_and_fall() {
        assert_eq!(verdicts("+---++"), "HHHUUH");
        assert_eq!(verdicts("---+-++"), "??UUUUH");
        assert_eq!(verdicts("+--+--+---"), "HHHHHHHHHU");
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig { failure_persistence: None, ..Default::default() })]

        /// However a backend flaps: two changes take at least `rise + fall` checks.
        #[test]
        fn a_flapping_backend_changes_its_state_a_bounded_number_of_times(
            checks in proptest::collection::vec(proptest::prelude::any::<bool>(), 1..2000),
            rise in 1_u32..6,
            fall in 1_u32..6,
        ) {
            let mut judge = Judge::new(rise, fall, Some(true));
            let (mut changes, mut before) = (0, Some(true));
            for &passed in &checks {
                judge.observe(passed);
                changes += usize::from(judge.verdict() != before);
                before = judge.verdict();
            }
            proptest::prop_assert!(changes <= 2 * checks.len() / (rise + fall) as usize + 2, "{} changes", changes);
        }
    }
}
