//! Connections that wait until a sleeping pool has a healthy backend.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

/// The connections of a pool that wait. The data plane counts them, and the supervisor wakes the pool.
#[derive(Debug, Default)]
pub struct Waiting {
    now: AtomicUsize,
    begun: Notify,
}

/// A place among the connections that wait. Dropping it gives it back.
#[derive(Debug)]
pub struct WaitingPermit(Arc<Waiting>);

impl Waiting {
    /// Number of connections that wait now.
    pub fn now(&self) -> usize {
        self.now.load(Ordering::Relaxed)
    }

    /// Takes a place and calls the supervisor; `None` if `most` connections wait already. The limit is exact across all workers.
    pub fn enter(self: &Arc<Self>, most: usize) -> Option<WaitingPermit> {
        let more = |now: usize| (now < most).then_some(now + 1);
        self.now.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        self.begun.notify_one();
        Some(WaitingPermit(Arc::clone(self)))
    }

    /// Waits until a connection begins to wait. One that has begun since the last call counts.
    pub async fn called(&self) {
        self.begun.notified().await;
    }
}

impl Drop for WaitingPermit {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_so_many_wait_and_whoever_leaves_makes_room() {
        let waiting = Arc::new(Waiting::default());
        let permits: Vec<_> = std::iter::from_fn(|| waiting.enter(3)).collect();
        assert_eq!((permits.len(), waiting.now()), (3, 3));
        drop(permits);
        assert!(waiting.now() == 0 && waiting.enter(1).is_some());
    }

    #[tokio::test]
    async fn a_call_is_not_lost() {
        let waiting = Arc::new(Waiting::default());
        drop(waiting.enter(1));
        waiting.called().await;
    }
}
