//! How many connections may be open at a time: places that are taken before a connection is accepted.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{Semaphore, SemaphorePermit};

use super::sources::SourcePlace;

/// A limit whose size may change while places are taken.
#[derive(Debug)]
pub struct Limit {
    places: Arc<Semaphore>,
    size: Mutex<usize>,
}

/// One place, given back when it is dropped. The semaphore's own permit can be many and is twice as large, in every idle
/// connection.
#[derive(Debug)]
struct Place(Arc<Semaphore>);

impl Place {
    fn of(permit: SemaphorePermit<'_>, places: &Arc<Semaphore>) -> Self {
        permit.forget();
        Self(Arc::clone(places))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.add_permits(1);
    }
}

/// A connection's place under the limits of its listener, of the process and of its source. Dropping it gives it back.
#[derive(Debug)]
pub struct Permit {
    _listener: Place,
    _process: Place,
    /// Its place among those of its source, if they are counted.
    pub(super) source: Option<SourcePlace>,
}

impl Limit {
    /// The size of a limit that is none.
    pub const UNLIMITED: u64 = Semaphore::MAX_PERMITS as u64;

    /// A limit of `size` places; `None`: as many as anybody wants.
    pub fn new(size: Option<usize>) -> Self {
        let size = bounded(size);
        Self { places: Arc::new(Semaphore::new(size)), size: Mutex::new(size) }
    }

    /// How many places there are.
    pub fn size(&self) -> usize {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on there are `size` places. Where more are taken, they are kept by who has them, and no new ones are
    /// given until enough have come back.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn resize(&self, size: Option<usize>) {
        let mut current = self.size.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *current, bounded(size));
        self.places.add_permits(current.saturating_sub(before));
        let surplus = before.saturating_sub(*current);
        let missing = surplus - self.places.forget_permits(surplus);
        if let Ok(missing @ 1..) = u32::try_from(missing) {
            let places = Arc::clone(&self.places);
            tokio::spawn(async move {
                // The semaphore is fair: who comes later waits until these have been given.
                if let Ok(permits) = places.acquire_many_owned(missing).await {
                    permits.forget();
                }
            });
        }
    }
}

fn bounded(size: Option<usize>) -> usize {
    size.unwrap_or(Semaphore::MAX_PERMITS).min(Semaphore::MAX_PERMITS)
}

impl Permit {
    /// Waits for a place under both limits. While it waits for the one it may hold the other's: the listener's comes
    /// first, so that a full listener keeps no place of the process from the others.
    pub(super) async fn acquire(listener: &Limit, process: &Limit) -> Self {
        let of_listener = acquire(listener).await;
        Self { _listener: of_listener, _process: acquire(process).await, source: None }
    }

    /// A place under both limits, if there is one.
    pub(super) fn try_acquire(listener: &Limit, process: &Limit) -> Option<Self> {
        let of_listener = Place::of(listener.places.try_acquire().ok()?, &listener.places);
        let of_process = Place::of(process.places.try_acquire().ok()?, &process.places);
        Some(Self { _listener: of_listener, _process: of_process, source: None })
    }
}

async fn acquire(limit: &Limit) -> Place {
    match limit.places.acquire().await {
        Ok(permit) => Place::of(permit, &limit.places),
        // Nobody ever closes the semaphore.
        Err(_closed) => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(limit: &Limit) -> Vec<Permit> {
        let all = Limit::new(None);
        std::iter::from_fn(|| Permit::try_acquire(limit, &all)).take(100).collect()
    }

    #[tokio::test]
    async fn a_limit_grows_and_shrinks_while_places_are_taken() {
        let limit = Limit::new(Some(3));
        let mut taken = open(&limit);
        assert_eq!(taken.len(), 3);
        limit.resize(Some(5));
        taken.extend(open(&limit));
        assert_eq!((taken.len(), limit.size()), (5, 5));
        limit.resize(Some(2));
        taken.truncate(3);
        tokio::task::yield_now().await;
        assert!(open(&limit).is_empty(), "three are taken of two");
        taken.clear();
        tokio::task::yield_now().await;
        assert_eq!(open(&limit).len(), 2);
        limit.resize(None);
        assert_eq!(open(&limit).len(), 100);
        limit.resize(Some(1));
        assert_eq!(open(&limit).len(), 1);
    }

    #[tokio::test]
    async fn a_full_listener_takes_no_place_from_the_process() {
        let (full, other, process) = (Limit::new(Some(0)), Limit::new(Some(1)), Limit::new(Some(1)));
        assert!(Permit::try_acquire(&full, &process).is_none());
        assert!(Permit::try_acquire(&other, &process).is_some());
    }
}
