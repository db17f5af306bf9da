//! The schedule of a client's requests.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Load, Pace};

/// The schedule of a client's requests.
pub(super) struct Schedule {
    /// When the next request is due, since the start of the load. A closed loop does not use it.
    pub(super) next: Duration,
    /// The time between two requests. Zero means a closed loop.
    pub(super) step: Duration,
    pub(super) load: Arc<Load>,
}

impl Schedule {
    /// The first requests of all clients, including those of other generators, are spread over one step.
    pub(super) fn of(number: usize, load: &Arc<Load>) -> Self {
        let (next, step) = match load.pace {
            Pace::Closed => (Duration::ZERO, Duration::ZERO),
            Pace::Open(rate) => {
                let each = 1.0 / rate;
                let clients = load.share.map_or(load.connections, |(_, clients)| clients);
                (Duration::from_secs_f64(each * number as f64), Duration::from_secs_f64(each * clients as f64))
            }
        };
        Self { next, step, load: Arc::clone(load) }
    }

    /// Waits until the next request is due and returns that time. In a closed loop it is due now.
    pub(super) async fn next(&mut self, began: &Instant) -> Option<Duration> {
        if self.step.is_zero() {
            return Some(began.elapsed());
        }
        let due = self.next;
        self.next += self.step;
        if due < self.load.duration {
            until(*began + due, self.load.precise).await;
        }
        Some(due)
    }
}

/// Waits until `at`. The runtime's timers are up to two milliseconds late, which is longer than a fast answer.
async fn until(at: Instant, precise: bool) {
    const GRAIN: Duration = Duration::from_millis(2);
    if !precise {
        return tokio::time::sleep_until(at.into()).await;
    }
    let coarse = at.saturating_duration_since(Instant::now()).saturating_sub(GRAIN);
    if !coarse.is_zero() {
        tokio::time::sleep(coarse).await;
    }
    while Instant::now() < at {
        tokio::task::yield_now().await;
    }
}
