//! Every outcome of a load, for tests that check each of them.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::load::{Collect, Outcome};

/// Every outcome of a load.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// The outcomes in the order of their ends.
    pub outcomes: Vec<Outcome>,
}

impl Collect for Report {
    fn add(&mut self, outcome: Outcome) {
        self.outcomes.push(outcome);
    }

    fn moved(&mut self, _at: Duration, _bytes: usize) {}
}

impl Report {
    /// The number of answers by server.
    pub fn servers(&self) -> BTreeMap<String, usize> {
        count(self.outcomes.iter().filter_map(|outcome| outcome.server.as_deref().ok()))
    }

    /// The number of failures by cause.
    pub fn failures(&self) -> BTreeMap<String, usize> {
        count(self.outcomes.iter().filter_map(|outcome| outcome.server.as_ref().err().map(String::as_str)))
    }
}

fn count<'a>(names: impl Iterator<Item = &'a str>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for name in names {
        *counts.entry(name.to_owned()).or_insert(0) += 1;
    }
    counts
}
