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

    /// Takes a permit under both limits; `None` when either limit is full.
    pub(super) fn try_acquire(listener: &Arc<Limit>, process: &Arc<Limit>) -> Option<Self> {
        let of_listener = listener.try_take()?;
        Some(Self { _listener: of_listener, _process: process.try_take()?, source: None })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn limit(size: usize) -> Arc<Limit> {
        Arc::new(Limit::new(Some(size)))
    }

    fn open(limit: &Arc<Limit>) -> Vec<ConnectionPermit> {
        let all = Arc::new(Limit::new(None));
        std::iter::from_fn(|| ConnectionPermit::try_acquire(limit, &all)).take(100).collect()
    }

    #[test]
    fn a_limit_grows_and_shrinks_while_permits_are_in_use() {
        let limit = limit(3);
        let mut taken = open(&limit);
        assert_eq!(taken.len(), 3);
        limit.resize(Some(5));
        taken.extend(open(&limit));
        assert_eq!((taken.len(), limit.size()), (5, 5));
        limit.resize(Some(2));
        taken.truncate(3);
        assert!(open(&limit).is_empty(), "three permits are in use under a limit of two");
        taken.clear();
        assert_eq!(open(&limit).len(), 2);
        limit.resize(None);
        assert_eq!(open(&limit).len(), 100);
        limit.resize(Some(1));
        assert_eq!(open(&limit).len(), 1);
    }

    #[test]
    fn a_full_listener_takes_no_permit_of_the_process() {
        let (full, other, process) = (limit(0), limit(1), limit(1));
        assert!(ConnectionPermit::try_acquire(&full, &process).is_none());
        assert!(ConnectionPermit::try_acquire(&other, &process).is_some());
    }

    #[tokio::test]
    async fn waiting_tasks_get_permits_in_the_order_of_their_arrival() {
        let limit = limit(1);
        let first = limit.take().await;
        let order = Arc::new(std::sync::Mutex::new(Vec::new()));
        let mut tasks = tokio::task::JoinSet::new();
        for number in 0..5 {
            let (limit, order) = (Arc::clone(&limit), Arc::clone(&order));
            tasks.spawn(async move {
                let permit = limit.take().await;
                order.lock().unwrap().push(number);
                tokio::task::yield_now().await;
                drop(permit);
            });
            tokio::task::yield_now().await;
        }
        drop(first);
        // A task that arrives now waits behind the queue.
        let late = limit.take().await;
        assert_eq!(*order.lock().unwrap(), [0, 1, 2, 3, 4]);
        drop(late);
        tasks.join_all().await;
        assert_eq!(limit.waiting.load(Ordering::SeqCst), 0);
    }

    #[tokio::test]
    async fn a_task_that_gives_up_passes_its_turn_to_the_next() {
        let limit = limit(1);
        let held = limit.take().await;
        let mut impatient = Box::pin(limit.take());
        assert!(tokio::time::timeout(Duration::from_millis(1), &mut impatient).await.is_err());
        let other = Arc::clone(&limit);
        let patient = tokio::spawn(async move { drop(other.take().await) });
        tokio::task::yield_now().await;
        // Wakes the impatient one, which ends before it runs.
        drop(held);
        drop(impatient);
        tokio::time::timeout(Duration::from_secs(10), patient).await.unwrap().unwrap();
    }

    /// Threads take and return permits, give up waiting, and resize the limit, all at once.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn no_task_waits_while_there_is_room_and_the_limit_holds() {
        let limit = limit(3);
        let most = Arc::new(AtomicUsize::new(0));
        let mut tasks = tokio::task::JoinSet::new();
        for task in 0..16_u32 {
            let (limit, most) = (Arc::clone(&limit), Arc::clone(&most));
            tasks.spawn(async move {
                for turn in 0..2000_u32 {
                    if (task + turn) % 7 == 0 {
                        // Gives up at once if it must wait.
                        let _ = tokio::time::timeout(Duration::ZERO, limit.take()).await;
                        continue;
                    }
                    let permit = limit.take().await;
                    most.fetch_max(limit.used.load(Ordering::SeqCst), Ordering::SeqCst);
                    if (task + turn) % 3 == 0 {
                        tokio::task::yield_now().await;
                    }
                    drop(permit);
                }
            });
        }
        let resizer = Arc::clone(&limit);
        let resizing = tokio::spawn(async move {
            for size in (1..=5).cycle() {
                resizer.resize(Some(size));
                tokio::time::sleep(Duration::from_micros(100)).await;
            }
        });
        tokio::time::timeout(Duration::from_secs(60), tasks.join_all()).await.expect("a task waits without end");
        resizing.abort();
        let most = most.load(Ordering::SeqCst);
        assert!((1..=5).contains(&most), "{most}");
        // With a size that stays, no more are ever in use.
        let _ = resizing.await;
        limit.resize(Some(2));
        let most = Arc::new(AtomicUsize::new(0));
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..16 {
            let (limit, most) = (Arc::clone(&limit), Arc::clone(&most));
            tasks.spawn(async move {
                for _ in 0..1000 {
                    let permit = limit.take().await;
                    most.fetch_max(limit.used.load(Ordering::SeqCst), Ordering::SeqCst);
                    tokio::task::yield_now().await;
                    drop(permit);
                }
            });
        }
        tokio::time::timeout(Duration::from_secs(60), tasks.join_all()).await.expect("a task waits without end");
        assert_eq!(most.load(Ordering::SeqCst), 2);
        assert_eq!((limit.used.load(Ordering::SeqCst), limit.waiting.load(Ordering::SeqCst)), (0, 0));
    }
}
