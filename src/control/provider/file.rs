//! The state of a file that lists backends, for status and metrics. The app reads the file, because its entries have the form of
//! the config.

use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;

use super::ChangeKind;
use crate::labels::Tally;

/// The state of a file. One task writes; others read at any time.
#[derive(Debug)]
pub struct FileStatus {
    /// Changes of backends, by kind.
    pub changes: Tally<ChangeKind>,
    last: ArcSwap<Last>,
}

/// What the file last led to.
#[derive(Debug, Clone)]
pub struct Last {
    /// The path.
    pub path: Arc<str>,
    /// When Ringway last applied the file; `None`: it has not been able to.
    pub applied: Option<Instant>,
    /// Backends of the list that Ringway last applied.
    pub backends: usize,
    /// Why the current file does not apply; `None`: it does.
    pub error: Option<Arc<str>>,
}

impl FileStatus {
    /// The status before the first read.
    pub fn new(path: &str) -> Self {
        let last = Last { path: path.into(), applied: None, backends: 0, error: None };
        Self { changes: Tally::default(), last: ArcSwap::from_pointee(last) }
    }

    /// What the file last led to.
    pub fn last(&self) -> Arc<Last> {
        self.last.load_full()
    }

    /// Ringway applied a list of this many backends.
    pub fn applied(&self, backends: usize, now: Instant) {
        let path = Arc::clone(&self.last().path);
        self.last.store(Arc::new(Last { path, applied: Some(now), backends, error: None }));
    }

    /// The file does not apply. What Ringway last applied stays.
    pub fn refused(&self, error: &str) {
        self.last.rcu(|last| Last { error: Some(error.into()), ..Last::clone(last) });
    }
}
