//! Starts and stops under way, and what follows when they finish.

use std::sync::Arc;
use std::time::Instant;

use super::Containers;
use super::create::Failure;
use crate::backend::Exit;
use crate::control::Event;
use crate::control::docker::engine::EngineError;
use crate::control::supervisor::plan::{Action, Why};
use crate::control::supervisor::{Progress, Slots};
use crate::labels::Label as _;

/// Limit of containers being created at once, and likewise of containers being stopped.
const MOST_AT_ONCE: usize = 8;

/// Conflicts in a row after which Ringway no longer assumes that another process is just creating the container.
const MANY_CONFLICTS: u32 = 8;

/// Work in progress on a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    Start,
    Stop,
    Examination,
}

/// Finished work on a slot.
pub(super) enum Done {
    /// Whether the engine could create a container from the current settings; the action follows if so.
    Checked(Action, Result<(), Failure>),
    Started(Result<(), Failure>),
    Stopped(Why, Result<(), EngineError>),
    /// How a container ended.
    Examined(Exit),
    /// The result of removing a container that fills no slot.
    Removed(Arc<str>, Result<(), EngineError>),
}

impl Containers {
    /// Whether work on the slot must wait. When other work finishes, the supervisor plans again.
    pub(super) fn must_wait(&self, slot: usize, kind: Work, now: Instant) -> Option<Progress> {
        let is_full = self.busy.values().filter(|&&other| other == kind).count() >= MOST_AT_ONCE;
        if is_full || self.busy.contains_key(&slot) {
            return Some(Progress::UnderWay);
        }
        self.backoff.until(&slot, now).map(Progress::Later)
    }

    /// Checks that a new container can be created before Ringway gives up the running one. `then` follows if so.
    pub(super) fn check(&mut self, slot: usize, then: Action) -> Progress {
        let maker = Arc::clone(&self.maker);
        self.begin(slot, Work::Stop, async move { Done::Checked(then, maker.check().await) })
    }

    /// Stops and removes the container of a slot.
    pub(super) async fn end(&mut self, slots: &mut Slots, slot: usize, why: Why) -> Progress {
        let known = self.known.get_mut(&slot).map(|known| {
            // As reported to the publisher below. If the stop fails, the next list reports the container again.
            (known.address, known.is_bad) = (None, false);
            Arc::clone(&known.id)
        });
        let leftover = || self.leftovers.remove(&slot).map(|container| container.id);
        let Some(id) = known.or_else(leftover) else { return Progress::UnderWay };
        slots.log_stop(slot, why);
        slots[slot].stopping(why);
        slots.send(Event::Stopped { id: Arc::clone(&slots[slot].name), crash_loop: false, exit: None }).await;
        let (engine, grace) = (self.engine.clone(), self.settings.stop_grace);
        self.begin(slot, Work::Stop, async move { Done::Stopped(why, engine.end(&id, grace).await) })
    }

    pub(super) fn begin(
        &mut self,
        slot: usize,
        kind: Work,
        work: impl Future<Output = Done> + Send + 'static,
    ) -> Progress {
        self.busy.insert(slot, kind);
        self.work.spawn(async move { (slot, work.await) });
        Progress::UnderWay
    }

    pub(super) async fn finished(&mut self, slots: &mut Slots, slot: usize, done: Done) {
        let now = Instant::now();
        self.poke.notify_one();
        if let Done::Removed(id, result) = done {
            self.doubles.remove(&id);
            if let Err(error) = result {
                let count = self.double_backoff.fail(id, now);
                log_failure(slots, slot, count, "could not remove a duplicate or misnamed container", &error);
            }
            return;
        }
        self.busy.remove(&slot);
        self.changed.insert(slot, now);
        match done {
            // The next list shows the replica. `Removed` is handled above.
            Done::Started(Ok(())) | Done::Removed(..) => {}
            Done::Started(Err(Failure::Conflict)) => {
                slots[slot].postponed(now);
                if self.backoff.fail(slot, now) == MANY_CONFLICTS {
                    let reason = "the engine reports a name conflict but does not list the container";
                    slots.refused(slot, reason).await;
                }
            }
            // Only a failed list means that the engine is unreachable.
            Done::Started(Err(Failure::Engine(error))) => {
                slots[slot].postponed(now);
                let count = self.backoff.fail(slot, now);
                log_failure(slots, slot, count, "the engine did not answer a start", &error);
            }
            Done::Started(Err(Failure::Refused(reason))) => {
                self.backoff.clear(&slot);
                slots.refused(slot, &reason).await;
            }
            Done::Stopped(Why::Surplus, Ok(())) => {
                self.known.remove(&slot);
                slots.emptied(slot, now);
            }
            Done::Stopped(why, Ok(())) => {
                self.known.remove(&slot);
                self.backoff.clear(&slot);
                let reason = format!("stopped: {}", why.as_str());
                slots.ended(slot, Exit { reason, code: None, output: Vec::new(), at: now }).await;
            }
            Done::Stopped(_, Err(error)) => {
                slots[slot].not_stopped();
                let count = self.backoff.fail(slot, now);
                log_failure(slots, slot, count, "could not stop a container", &error);
            }
            Done::Examined(exit) => slots.ended(slot, exit).await,
            Done::Checked(Action::Drain(_, why), Ok(())) => slots.drain(slot, why).await,
            Done::Checked(_, Ok(())) => {
                self.end(slots, slot, Why::Outdated).await;
            }
            Done::Checked(_, Err(failure)) => {
                let count = self.backoff.fail(slot, now);
                log_failure(slots, slot, count, "could not roll out the new settings", &failure);
            }
        }
    }
}

/// Logs a failure: the first in a row as a warning, further ones at debug level.
fn log_failure(slots: &Slots, slot: usize, count: u32, what: &str, error: &dyn std::fmt::Display) {
    let (pool, slot) = (slots.pool(), &slots[slot].name);
    if count == 1 {
        tracing::warn!(%pool, %slot, "{what}; Ringway retries: {error}");
    } else {
        tracing::debug!(%pool, %slot, count, "{what}: {error}");
    }
}
