//! Limits on open connections: Ringway takes a permit before it accepts a connection.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{Semaphore, SemaphorePermit};

use super::source_limits::SourcePermit;

/// A limit that can be resized while permits are in use.
#[derive(Debug)]
pub struct Limit {
    permits: Arc<Semaphore>,
    size: Mutex<usize>,
}

/// One permit, returned on drop. Tokio's own permit stores a count and is twice as large, and every idle connection
/// holds two permits.
#[derive(Debug)]
struct SinglePermit(Arc<Semaphore>);

impl SinglePermit {
    fn of(permit: SemaphorePermit<'_>, permits: &Arc<Semaphore>) -> Self {
        permit.forget();
        Self(Arc::clone(permits))
    }
}

impl Drop for SinglePermit {
    fn drop(&mut self) {
        self.0.add_permits(1);
    }
}

/// A connection's permits under the limits of its listener, the process and its source. Dropping it returns them.
#[derive(Debug)]
pub struct ConnectionPermit {
    _listener: SinglePermit,
    _process: SinglePermit,
    /// The permit under the limit of its source; `None` when the source is not tracked.
    pub(super) source: Option<SourcePermit>,
}

impl Limit {
    /// The size of an unlimited limit.
    pub const UNLIMITED: u64 = Semaphore::MAX_PERMITS as u64;

    /// Creates a limit of `size` permits; `None`: unlimited.
    pub fn new(size: Option<usize>) -> Self {
        let size = bounded(size);
        Self { permits: Arc::new(Semaphore::new(size)), size: Mutex::new(size) }
    }

    /// The number of permits, free and in use.
    pub fn size(&self) -> usize {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the number of permits to `size`; `None`: unlimited. If more are in use, their holders keep them, and no
    /// new permits are granted until enough have been returned.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn resize(&self, size: Option<usize>) {
        let mut current = self.size.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *current, bounded(size));
        self.permits.add_permits(current.saturating_sub(before));
        let surplus = before.saturating_sub(*current);
        let missing = surplus - self.permits.forget_permits(surplus);
        if let Ok(missing @ 1..) = u32::try_from(missing) {
            let permits = Arc::clone(&self.permits);
            tokio::spawn(async move {
                // The semaphore is fair: later callers wait until this request has been served.
                if let Ok(returned) = permits.acquire_many_owned(missing).await {
                    returned.forget();
                }
            });
        }
    }
}

fn bounded(size: Option<usize>) -> usize {
    size.unwrap_or(Semaphore::MAX_PERMITS).min(Semaphore::MAX_PERMITS)
}

impl ConnectionPermit {
    /// Waits for a permit under both limits. It holds the first permit while it waits for the second. The listener's
    /// comes first, so a full listener holds no permit of the process that other listeners need.
    pub(super) async fn acquire(listener: &Limit, process: &Limit) -> Self {
        let of_listener = acquire(listener).await;
        Self { _listener: of_listener, _process: acquire(process).await, source: None }
    }

    /// Takes a permit under both limits; `None` when either limit is full.
    pub(super) fn try_acquire(listener: &Limit, process: &Limit) -> Option<Self> {
        let of_listener = SinglePermit::of(listener.permits.try_acquire().ok()?, &listener.permits);
        let of_process = SinglePermit::of(process.permits.try_acquire().ok()?, &process.permits);
        Some(Self { _listener: of_listener, _process: of_process, source: None })
    }
}

async fn acquire(limit: &Limit) -> SinglePermit {
    match limit.permits.acquire().await {
        Ok(permit) => SinglePermit::of(permit, &limit.permits),
        // Unreachable: the semaphore is never closed.
        Err(_closed) => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(limit: &Limit) -> Vec<ConnectionPermit> {
        let all = Limit::new(None);
        std::iter::from_fn(|| ConnectionPermit::try_acquire(limit, &all)).take(100).collect()
    }

    #[tokio::test]
    async fn a_limit_grows_and_shrinks_while_permits_are_in_use() {
        let limit = Limit::new(Some(3));
        let mut taken = open(&limit);
        assert_eq!(taken.len(), 3);
        limit.resize(Some(5));
        taken.extend(open(&limit));
        assert_eq!((taken.len(), limit.size()), (5, 5));
        limit.resize(Some(2));
        taken.truncate(3);
        tokio::task::yield_now().await;
        assert!(open(&limit).is_empty(), "three permits are in use under a limit of two");
        taken.clear();
        tokio::task::yield_now().await;
        assert_eq!(open(&limit).len(), 2);
        limit.resize(None);
        assert_eq!(open(&limit).len(), 100);
        limit.resize(Some(1));
        assert_eq!(open(&limit).len(), 1);
    }

    #[tokio::test]
    async fn a_full_listener_takes_no_permit_of_the_process() {
        let (full, other, process) = (Limit::new(Some(0)), Limit::new(Some(1)), Limit::new(Some(1)));
        assert!(ConnectionPermit::try_acquire(&full, &process).is_none());
        assert!(ConnectionPermit::try_acquire(&other, &process).is_some());
    }
}
