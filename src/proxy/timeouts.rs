//! A worker's timeout task: updates the coarse clock and the shared counters, and ends connections that have timed
//! out. One task per worker means that no connection needs its own timer.

use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::Route;
use super::connection::{Connection, KeepaliveState, Served};
use super::context::Worker;
use super::moving::{Movers, must_move};
use super::stats::EndReason;
use crate::backend::Eviction;

/// Maximum interval of the timeout task. The counters of long connections lag by at most this time, and a request to
/// end a backend's connections takes effect within it.
pub(super) const SLOWEST: Duration = Duration::from_millis(500);

/// The clock of a worker at its start. It is not zero, because a connection that is taken over may have been silent for long.
pub(super) const START: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Maximum interval once the worker drains, because a drain can be short.
const DRAINING: Duration = Duration::from_millis(50);

/// The interval that a route's timeouts need: an eighth of the shortest, so each timeout fires nearly on time.
pub(super) fn tick(route: &Route) -> Duration {
    (route.idle.min(route.half_closed).min(route.max_age.unwrap_or(Duration::MAX)) / 8)
        .clamp(Duration::from_millis(10), SLOWEST)
}

/// Interval of inspections: how long a half-closed or blocked connection may go on after a side has broken.
const INSPECTION: Duration = Duration::from_secs(1);

/// How long a side may accept no bytes before the connection gives up a pipe that others need.
const PIPE_HELD: Duration = Duration::from_secs(1);

/// Runs the timeout task as often as the timeouts of the listeners and of the open connections need, until the worker
/// ends. From `drain` on, connections have the drain times of their routes.
pub(super) async fn watch(worker: Rc<Worker>, drain: CancellationToken) {
    let mut last = Instant::now();
    let mut drains = None;
    let mut inspected = Duration::ZERO;
    let mut of_open = SLOWEST;
    let mut movers = Movers::default();
    loop {
        let tick = worker.tick.get().min(of_open);
        tokio::select! {
            () = tokio::time::sleep(if drains.is_some() { tick.min(DRAINING) } else { tick }) => {}
            () = worker.new_tick.notified() => {}
            () = drain.cancelled(), if drains.is_none() => {}
        }
        // While the whole worker is suspended (a paused or overloaded machine), connections cannot be active. So at
        // most two ticks of that time count.
        let passed = last.elapsed();
        let now = worker.clock.get() + passed.min(2 * tick);
        last = Instant::now();
        worker.clock.set(now);
        worker.stats.tasks.store(Handle::current().metrics().num_alive_tasks() as u64, Ordering::Relaxed);
        if drain.is_cancelled() && drains.is_none() {
            drains = Some(last);
        }
        let is_short_of_pipes = worker.pipes.borrow_mut().tick();
        let inspects = now.saturating_sub(inspected) >= INSPECTION;
        if inspects {
            inspected = now;
        }
        of_open = SLOWEST;
        movers.begin(now);
        for (_, connection) in worker.open.borrow().iter() {
            // A connection without a backend has other timeouts.
            let Some(served) = connection.served.get() else { continue };
            connection.report();
            of_open = of_open.min(connection.listener.tick);
            if connection.is_active.take() {
                connection.last_active.set(now);
            }
            // Since the tick that found it active: a connection can live one tick longer than configured, never shorter.
            let silent = now.saturating_sub(connection.last_active.get());
            let route = connection.route();
            if let Some(route) = route.filter(|route| route.on_move.is_some()) {
                movers.see(connection, route, served);
            }
            let verdict = route.and_then(|route| verdict(connection, route, served, now, silent, drains));
            // A connection in this state does not notice by itself that a side has broken.
            let inspect = inspects && (connection.blocked.get() || connection.half_closed.get());
            let give_up_pipes = is_short_of_pipes && connection.blocked.get() && silent >= PIPE_HELD;
            // What an operator has decided stands.
            if verdict.is_some() && connection.verdict.get().is_none() {
                connection.verdict.set(verdict);
            }
            connection.inspect.set(inspect);
            connection.give_up_pipes.set(give_up_pipes);
            let needs_keepalive = connection.keepalive.get() == KeepaliveState::NotYet;
            if needs_keepalive {
                connection.keepalive.set(KeepaliveState::Due);
            }
            if (verdict.is_some() || inspect || give_up_pipes || needs_keepalive)
                && let Some(waker) = connection.waker.take()
            {
                waker.wake();
            }
        }
        movers.finish(now);
        let milliseconds = u64::try_from(passed.as_millis()).unwrap_or(u64::MAX).max(1);
        worker.stats.short_per_second.store(worker.short.take() * 1000 / milliseconds, Ordering::Relaxed);
        worker.stats.bytes_lately.store(worker.bytes.take(), Ordering::Relaxed);
    }
}

fn verdict(
    connection: &Connection,
    route: &Route,
    served: &Served,
    now: Duration,
    silent: Duration,
    drains: Option<Instant>,
) -> Option<EndReason> {
    if connection.half_closed.get() && silent >= route.half_closed {
        return Some(EndReason::HalfClosedTimeout);
    }
    if silent >= route.idle {
        return Some(EndReason::IdleTimeout);
    }
    if served.expires.is_some_and(|expires| expires <= now) {
        return Some(EndReason::MaxAge);
    }
    if let Some(why) = served.permit.eviction() {
        return Some(match why {
            Eviction::Drained => EndReason::DrainDeadline,
            Eviction::Down => EndReason::BackendDown,
        });
    }
    if must_move(connection, route, served, now, silent) {
        return Some(EndReason::Moved);
    }
    drains.filter(|since| since.elapsed() >= route.drain).map(|_| EndReason::Shutdown)
}
