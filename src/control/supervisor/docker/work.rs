//! Starts and stops under way, and what follows when they finish.

use std::sync::Arc;
use std::time::Instant;

use super::Containers;
use super::create::Failure;
use crate::backend::{Exit, Replica};
use crate::control::Event;
use crate::control::docker::engine::EngineError;
use crate::control::supervisor::plan::{Action, Place, Why};
use crate::control::supervisor::rollout::Stage;
use crate::control::supervisor::{Progress, Slots};
use crate::labels::Label as _;

/// Limit of containers being created at once, and likewise of containers being stopped.
const MOST_AT_ONCE: usize = 8;

/// Conflicts in a row after which Ringway no longer assumes that another process is just creating the container.
const MANY_CONFLICTS: u32 = 8;

/// Work in progress on a seat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    Start,
    Stop,
    Examination,
    Naming,
}

/// Finished work on a seat.
pub(super) enum Done {
    /// Whether the engine could create a container from the current settings; the action follows if so.
    Checked(Action, Result<(), Failure>),
    Started(Result<(), Failure>),
    Stopped(Why, Result<(), EngineError>),
    /// The containers of a slot got other names.
    Named(Result<(), EngineError>),
    /// How a container ended.
    Examined(Exit),
    /// The result of removing a container that fills no slot.
    Removed(Arc<str>, Result<(), EngineError>),
}

impl Containers {
    /// Whether work on the slot must wait. When other work finishes, the supervisor plans again.
    pub(super) fn must_wait(&self, place: Place, kind: Work, now: Instant) -> Option<Progress> {
        let is_full = self.busy.values().filter(|&&other| other == kind).count() >= MOST_AT_ONCE;
        if is_full || self.busy.contains_key(&place) {
            return Some(Progress::UnderWay);
        }
        self.backoff.until(&place, now).map(Progress::Later)
    }

    /// Checks that a new container can be created before Ringway gives up the running one. `then` follows if so.
    pub(super) fn check(&mut self, place: Place, then: Action) -> Progress {
        let maker = Arc::clone(&self.maker);
        self.begin(place, Work::Stop, async move { Done::Checked(then, maker.check().await) })
    }

    /// Stops and removes a container.
    pub(super) async fn end(&mut self, slots: &mut Slots, place: Place, why: Why) -> Progress {
        let known = self.known.get_mut(&place).map(|known| {
            // As reported to the publisher below. If the stop fails, the next list reports the container again.
            (known.address, known.is_bad) = (None, false);
            Arc::clone(&known.id)
        });
        let leftover = || self.leftovers.remove(&place).map(|container| container.id);
        let Some(id) = known.or_else(leftover) else { return Progress::UnderWay };
        slots.log_stop(place, why);
        slots[place].stopping(why);
        slots.send(Event::Stopped { id: Arc::clone(&slots[place].id), crash_loop: false, exit: None }).await;
        let (engine, grace) = (self.engine.clone(), self.settings.stop_grace);
        self.begin(place, Work::Stop, async move { Done::Stopped(why, engine.end(&id, grace).await) })
    }

    /// Gives the containers of a slot the names that show what each is to it.
    pub(super) fn name(&mut self, slots: &Slots, slot: usize) {
        let (front, beside) = (Place::front(slot), Place::beside(slot));
        let names = self.maker.names(slots.name(slot));
        // The engine refuses to give a container the name that it has.
        let other_name = |place: Place, wanted: String| {
            let leftover = self.leftovers.get(&place).map(|container| (&container.id, &container.name));
            let (id, name) = self.known.get(&place).map(|known| (&known.id, &known.name)).or(leftover)?;
            (**name != *wanted).then(|| (Arc::clone(id), wanted))
        };
        // The name must be free first.
        let renamed = [other_name(beside, names.former()), other_name(front, names.current())];
        let engine = self.engine.clone();
        self.begin(beside, Work::Naming, async move {
            for (id, name) in renamed.into_iter().flatten() {
                if let Err(error) = engine.rename(&id, &name).await {
                    return Done::Named(Err(error));
                }
            }
            Done::Named(Ok(()))
        });
    }

    /// Reports the name of the container that fills a slot, if it has got another one.
    async fn show_name(&mut self, slots: &Slots, front: Place) {
        let name = self.maker.names(slots.name(front.slot)).current();
        let Some(known) = self.known.get_mut(&front) else { return };
        let replica = Replica::Container { id: Arc::clone(&known.id), name: name.into(), check: None };
        if known.replica != replica {
            known.replica = replica.clone();
            slots.send(Event::Renamed { id: Arc::clone(&slots[front].id), replica }).await;
        }
    }

    pub(super) fn begin(
        &mut self,
        place: Place,
        kind: Work,
        work: impl Future<Output = Done> + Send + 'static,
    ) -> Progress {
        self.busy.insert(place, kind);
        self.work.spawn(async move { (place, work.await) });
        Progress::UnderWay
    }

    pub(super) async fn finished(&mut self, slots: &mut Slots, place: Place, done: Done) {
        let now = Instant::now();
        self.poke.notify_one();
        if let Done::Removed(id, result) = done {
            self.doubles.remove(&id);
            if let Err(error) = result {
                let count = self.double_backoff.fail(id, now);
                log_failure(slots, place, count, "could not remove a duplicate or misnamed container", &error);
            }
            return;
        }
        self.busy.remove(&place);
        self.changed.insert(place, now);
        match done {
            // The next list shows the replica. `Removed` is handled above.
            Done::Started(Ok(())) | Done::Removed(..) => {}
            Done::Started(Err(Failure::Conflict)) => {
                slots[place].postponed(now);
                if self.backoff.fail(place, now) == MANY_CONFLICTS {
                    let reason = "the engine reports a name conflict but does not list the container";
                    slots.refused(place, reason).await;
                }
            }
            // Only a failed list means that the engine is unreachable.
            Done::Started(Err(Failure::Engine(error))) => {
                slots[place].postponed(now);
                let count = self.backoff.fail(place, now);
                log_failure(slots, place, count, "the engine did not answer a start", &error);
            }
            Done::Started(Err(Failure::Refused(reason))) => {
                self.backoff.clear(&place);
                slots.refused(place, &reason).await;
            }
            Done::Stopped(Why::Surplus, Ok(())) => {
                self.known.remove(&place);
                slots.emptied(place, now).await;
            }
            Done::Stopped(why, Ok(())) => {
                self.known.remove(&place);
                self.backoff.clear(&place);
                let reason = format!("stopped: {}", why.as_str());
                slots.ended(place, Exit { reason, code: None, output: Vec::new(), at: now }).await;
            }
            Done::Stopped(_, Err(error)) => {
                slots[place].not_stopped();
                let count = self.backoff.fail(place, now);
                log_failure(slots, place, count, "could not stop a container", &error);
            }
            Done::Named(Ok(())) => {
                self.backoff.clear(&place);
                self.show_name(slots, Place::front(place.slot)).await;
            }
            // The next list shows the names, and Ringway tries again if they are wrong.
            Done::Named(Err(error)) => {
                let count = self.backoff.fail(place, now);
                log_failure(slots, place, count, "could not rename the containers of a slot", &error);
            }
            Done::Examined(exit) => slots.ended(place, exit).await,
            // Somebody has ended the rollout meanwhile, or put the old settings back.
            Done::Checked(_, Ok(())) if !slots[place].is_outdated() || slots.stage == Stage::Paused => {}
            Done::Checked(Action::Drain(_, why), Ok(())) => slots.drain(place, why).await,
            Done::Checked(_, Ok(())) => {
                self.end(slots, place, Why::Outdated).await;
            }
            Done::Checked(_, Err(failure)) => {
                let count = self.backoff.fail(place, now);
                log_failure(slots, place, count, "could not roll out the new settings", &failure);
                if matches!(failure, Failure::Refused(_)) && count >= slots.settings.policy.crash_loop_after {
                    let name = slots.name(place.slot);
                    slots.failure = Some(format!("no new replica of {name} can be started: {failure}"));
                }
            }
        }
    }
}

/// Logs a failure: the first in a row as a warning, further ones at debug level.
fn log_failure(slots: &Slots, place: Place, count: u32, what: &str, error: &dyn std::fmt::Display) {
    let (pool, slot) = (slots.pool(), &slots[place].id);
    if count == 1 {
        tracing::warn!(%pool, %slot, "{what}; Ringway retries: {error}");
    } else {
        tracing::debug!(%pool, %slot, count, "{what}: {error}");
    }
}
