//! A worker's coarse clock: brings shared counters up to date and ends what has been silent for too long,
//! so that no connection needs a timer of its own.

use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::Route;
use super::lane::{Probes, Progress, Worker};
use super::stats::End;
use crate::backend::Eviction;

/// Longest time between sweeps: how far the counters of a long connection may lag, and how late an order to end a
/// backend's connections may be carried out.
pub(super) const SLOWEST: Duration = Duration::from_millis(500);

/// Time between sweeps once the worker stops: a drain may be short.
const STOPPING: Duration = Duration::from_millis(50);

/// The sweep that a route's timeouts need: an eighth of the shortest, so that none is late by much.
pub(super) fn tick(route: &Route) -> Duration {
    (route.idle.min(route.half_closed).min(route.max_age.unwrap_or(Duration::MAX)) / 8)
        .clamp(Duration::from_millis(10), SLOWEST)
}

/// Sweeps every `worker.tick` until the worker ends.
pub(super) async fn sweep(worker: Rc<Worker>, stop: CancellationToken) {
    let mut last = Instant::now();
    let mut stopped = None;
    loop {
        let tick = worker.tick.get();
        tokio::select! {
            () = tokio::time::sleep(if stopped.is_some() { tick.min(STOPPING) } else { tick }) => {}
            () = stop.cancelled(), if stopped.is_none() => {}
        }
        // Where the whole worker stood still (a paused machine, a starved one), connections had no chance to be
        // active: that time does not count.
        let now = worker.clock.get() + last.elapsed().min(2 * tick);
        last = Instant::now();
        worker.clock.set(now);
        worker.stats.tasks.store(Handle::current().metrics().num_alive_tasks() as u64, Ordering::Relaxed);
        if stop.is_cancelled() && stopped.is_none() {
            stopped = Some(last);
        }
        for (_, progress) in worker.open.borrow().iter() {
            progress.report();
            let verdict = verdict(progress, now, tick, stopped);
            // Such a connection may not notice by itself that a side has broken.
            let inspect = progress.blocked.get() || progress.half_closed.get();
            progress.verdict.set(verdict);
            progress.inspect.set(inspect);
            let probe = progress.probes.get() == Probes::NotYet;
            if probe {
                progress.probes.set(Probes::Due);
            }
            if (verdict.is_some() || inspect || probe)
                && let Some(waker) = progress.waker.take()
            {
                waker.wake();
            }
        }
    }
}

/// Activity is stamped with the time of the sweep before it, which may be two ticks ago, so a timeout counts
/// from then: a connection may live a little longer than configured, never shorter.
fn verdict(progress: &Progress, now: Duration, tick: Duration, stopped: Option<Instant>) -> Option<End> {
    let route = &progress.lane.serving.route;
    let silent = now.saturating_sub(progress.last_active.get()).saturating_sub(2 * tick);
    if progress.half_closed.get() && silent >= route.half_closed {
        return Some(End::HalfClosedTimeout);
    }
    if silent >= route.idle {
        return Some(End::IdleTimeout);
    }
    if progress.expires.is_some_and(|expires| expires <= now) {
        return Some(End::MaxAge);
    }
    if let Some(why) = progress.place.eviction() {
        return Some(match why {
            Eviction::Drained => End::DrainDeadline,
            Eviction::Down => End::BackendDown,
        });
    }
    stopped.filter(|stopped| stopped.elapsed() >= route.drain).map(|_| End::Shutdown)
}
