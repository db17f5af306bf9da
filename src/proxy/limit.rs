//! Limits on open connections: Ringway takes a permit before it accepts a connection.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

use super::source_limits::SourcePermit;

/// A limit that can be resized while permits are in use.
///
/// A connection takes a permit with one atomic operation and returns it with another. Tokio's semaphore takes a lock for each
/// return. A task that finds no free permit waits in a queue, and a task that arrives later does not overtake it.
#[derive(Debug)]
pub struct Limit {
    size: AtomicUsize,
    /// Permits in use. They can be more than the size, after it has shrunk.
    used: AtomicUsize,
    /// Tasks that wait for a permit.
    waiting: AtomicUsize,
    returned: Notify,
}

/// One permit, returned on drop.
#[derive(Debug)]
struct SinglePermit(Arc<Limit>);

impl Drop for SinglePermit {
    fn drop(&mut self) {
        self.0.used.fetch_sub(1, Ordering::SeqCst);
        self.0.wake_next();
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
    pub const UNLIMITED: u64 = usize::MAX as u64;

    /// Creates a limit of `size` permits; `None`: unlimited.
    pub fn new(size: Option<usize>) -> Self {
        Self {
            size: AtomicUsize::new(size.unwrap_or(usize::MAX)),
            used: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            returned: Notify::new(),
        }
    }

    /// The number of permits, free and in use.
    pub fn size(&self) -> usize {
        self.size.load(Ordering::SeqCst)
    }

    /// Changes the number of permits to `size`; `None`: unlimited. If more are in use, their holders keep them, and no
    /// new permits are granted until enough have been returned.
    pub fn resize(&self, size: Option<usize>) {
        self.size.store(size.unwrap_or(usize::MAX), Ordering::SeqCst);
        self.wake_next();
    }

    /// The number of free permits.
    pub(super) fn free(&self) -> usize {
        self.size().saturating_sub(self.used.load(Ordering::SeqCst))
    }

    /// Takes a permit even if none is free: the connection exists already.
    fn take_anyway(self: &Arc<Self>) -> SinglePermit {
        self.used.fetch_add(1, Ordering::SeqCst);
        SinglePermit(Arc::clone(self))
    }

    /// Takes a permit if one is free.
    fn try_take(self: &Arc<Self>) -> Option<SinglePermit> {
        let size = self.size();
        let more = |used: usize| (used < size).then_some(used + 1);
        let taken = self.used.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more);
        taken.is_ok().then(|| SinglePermit(Arc::clone(self)))
    }

    async fn take(self: &Arc<Self>) -> SinglePermit {
        if self.waiting.load(Ordering::SeqCst) == 0
            && let Some(permit) = self.try_take()
        {
            return permit;
        }
        let waiting = Waiting::begin(self);
        let mut returned = pin!(self.returned.notified());
        // Joins the queue. From here on, each returned permit wakes a task in the queue.
        returned.as_mut().enable();
        let mut is_first = waiting.is_first;
        loop {
            // A permit may have been returned before the first task joined the queue.
            if is_first && let Some(permit) = self.try_take() {
                drop(waiting);
                // There may be room for the next one too.
                self.wake_next();
                return permit;
            }
            returned.as_mut().await;
            is_first = true;
            returned.set(self.returned.notified());
            returned.as_mut().enable();
        }
    }

    /// Wakes the task that has waited for longest, if there is room and a task waits.
    fn wake_next(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 && self.used.load(Ordering::SeqCst) < self.size() {
            self.returned.notify_one();
        }
    }
}

/// A task that waits for a permit, counted until this is dropped.
struct Waiting<'a> {
    limit: &'a Limit,
    /// No other task waited.
    is_first: bool,
}

impl<'a> Waiting<'a> {
    fn begin(limit: &'a Limit) -> Self {
        let is_first = limit.waiting.fetch_add(1, Ordering::SeqCst) == 0;
        Self { limit, is_first }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.limit.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

impl ConnectionPermit {
    /// Waits for a permit under both limits. It holds the first permit while it waits for the second. The listener's
    /// comes first, so a full listener holds no permit of the process that other listeners need.
    pub(super) async fn acquire(listener: &Arc<Limit>, process: &Arc<Limit>) -> Self {
        let of_listener = listener.take().await;
        Self { _listener: of_listener, _process: process.take().await, source: None }
    }

    /// Takes permits for a connection that was open before; `None` when the process has none. It counts for the listener even if that is
    /// full.
    pub(super) fn for_open_one(listener: &Arc<Limit>, process: &Arc<Limit>) -> Option<Self> {
        let of_process = process.try_take()?;
        Some(Self { _listener: listener.take_anyway(), _process: of_process, source: None })
    }

    /// Takes a permit under both limits; `None` when either limit is full.
    pub(super) fn try_acquire(listener: &Arc<Limit>, process: &Arc<Limit>) -> Option<Self> {
        let of_listener = listener.try_take()?;
        Some(Self { _listener: of_listener, _process: process.try_take()?, source: None })
    }
}

#[cfg(test)]
mod tests;
