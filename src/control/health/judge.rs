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
    /// No verdict yet: the first pass makes it healthy, `fall` failures unhealthy.
    pub(super) fn new(rise: u32, fall: u32) -> Self {
        Self { rise, fall, verdict: None, against: 0 }
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
        let mut judge = Judge::new(2, 3);
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
}
