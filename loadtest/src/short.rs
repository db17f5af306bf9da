//! Short connections at a constant rate, beside something else that is measured.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Short connections, and those that failed.
#[derive(Debug, Default)]
pub(crate) struct Short {
    is_over: AtomicBool,
    made: AtomicU64,
    failed: AtomicU64,
}

impl Short {
    /// Opens short connections at this rate until [`Short::end`].
    pub(crate) async fn run(self: Arc<Self>, target: SocketAddr, rate: u32) {
        while !self.is_over.load(Ordering::Relaxed) {
            let report = crate::churn(target, rate, Duration::from_secs(2), PATIENCE).await;
            let failed = report.outcomes.iter().filter(|outcome| outcome.server.is_err());
            for outcome in failed.clone().take(3) {
                eprintln!("a short connection failed: {:?}", outcome.server);
            }
            self.failed.fetch_add(failed.count() as u64, Ordering::Relaxed);
            self.made.fetch_add(report.outcomes.len() as u64, Ordering::Relaxed);
        }
    }

    /// Ends the load soon.
    pub(crate) fn end(&self) {
        self.is_over.store(true, Ordering::Relaxed);
    }

    /// The numbers of connections, and of those that failed.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.made.load(Ordering::Relaxed), self.failed.load(Ordering::Relaxed))
    }
}
