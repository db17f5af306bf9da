//! Decides what the supervisor does next: a pure function of the settings, the observed state, and the time.
//!
//! Adapters report to each [`Seat`] what they observe and carry out the [`plan`]. Only Ringway's own clock counts, and
//! only as differences: Ringway does not use the engine's times.
//!
//! - this file: the plan
//! - [`seat`]: what is known about the replica in a seat
//! - [`slot`]: the two seats of a slot

use std::time::{Duration, Instant};

pub use self::seat::{Seat, Why};
pub use self::slot::{Place, Role, Slot};
use super::rollout::Stage;
use crate::label_enum;

mod seat;
mod slot;

#[cfg(test)]
mod tests;

/// When Ringway restarts a replica, and when it replaces one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Wait before the second restart in a row after replicas that did not last; doubles with each further restart. The
    /// first restart is immediate.
    pub backoff: Duration,
    /// Longest wait before a restart.
    pub max_backoff: Duration,
    /// A replica that ran for this long counts as having lasted.
    pub stable_after: Duration,
    /// Number of replicas in a row that did not last after which the slot is in a crash loop.
    pub crash_loop_after: u32,
    /// A running replica that has been unhealthy for this long is replaced; `None`: never.
    pub replace_after: Option<Duration>,
}

label_enum! {
    /// In which order a rollout replaces the replica of a slot.
    pub enum Order {
        /// The new replica starts beside the old one, and takes the slot when it is healthy.
        StartFirst => "start_first",
        /// The old replica leaves before the new one starts.
        StopFirst => "stop_first",
    }
}

label_enum! {
    /// What Ringway does when a rollout fails.
    pub enum OnFailure {
        /// Goes back to what the replicas were started from before.
        Rollback => "rollback",
        /// Leaves the replicas as they are and replaces no more of them.
        Pause => "pause",
    }
}

/// How a rollout replaces replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Which replica of a slot is there first.
    pub order: Order,
    /// Slots whose replicas are replaced at the same time, at least 1. One slot stays if the old replicas leave first.
    pub parallel: u32,
    /// Wait between the end of one replacement and the start of the next. On the way back, Ringway does not wait.
    pub pause: Duration,
    /// How long a new replica must have been healthy before it counts.
    pub healthy_for: Duration,
    /// What happens when a new replica fails.
    pub on_failure: OnFailure,
    /// How long the connections of a replaced replica may go on.
    pub drain: Duration,
}

/// A rollout as the plan sees it.
#[derive(Debug, Clone, Copy)]
pub struct Going<'a> {
    /// How it replaces replicas.
    pub pace: &'a Pace,
    /// What it does.
    pub stage: Stage,
    /// Whether the connections of a predecessor have ended. As long as it has some, no replica of its time is stopped.
    pub is_settled: bool,
    /// When the last replacement ended.
    pub last_step: Option<Instant>,
}

label_enum! {
    /// Why a rollout fails.
    pub enum Failure {
        /// A new replica runs, but is unhealthy.
        Unhealthy => "unhealthy",
        /// New replicas keep ending, or cannot be started.
        CrashLoop => "crash_loop",
    }
}

/// An action on a replica, or on a slot, given by its index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Start a replica.
    Start(Place),
    /// Give the replica no new connections, and let the open ones end.
    Drain(Place, Why),
    /// End the drain of a replica that is needed again.
    Keep(usize),
    /// Stop the replica.
    Stop(Place, Why),
    /// Let the replica beside the slot fill it.
    Flip(usize),
    /// The new replica of this slot shows that the rollout fails. What the plan has after this may no longer be wanted.
    Fail(usize, Failure),
}

/// What to do now, and when to plan again if nothing happens before.
#[derive(Debug, PartialEq, Eq)]
pub struct Plan {
    /// The actions; each replica occurs at most once.
    pub actions: Vec<Action>,
    /// When to plan again; `None`: nothing is due.
    pub wake: Option<Instant>,
}

/// Plans the next actions. The goal: each of the first `wanted` slots has a healthy replica that was created from the
/// current settings, and the other slots are empty.
///
/// The plan replaces one unhealthy replica at a time, and the next one only once the successor has a verdict: a fault that makes
/// all replicas unhealthy must not take all of them down. A rollout replaces outdated replicas, at most `parallel` at a time, once
/// all others are healthy. If an outdated replica is unhealthy it is replaced at once: nothing is lost, and the new settings may be
/// the remedy. A replica that serves is drained before it is stopped.
pub fn plan(wanted: usize, slots: &[Slot], policy: &Policy, going: Going<'_>, now: Instant) -> Plan {
    let mut plan = Plan { actions: Vec::new(), wake: None };
    let (kept, surplus) = slots.split_at(wanted.min(slots.len()));
    for (n, slot) in kept.iter().enumerate() {
        plan.fill(n, slot, going, now);
        if going.is_settled {
            plan.go_on(n, slot, policy, going, now);
        }
    }
    for (n, slot) in surplus.iter().enumerate().map(|(n, slot)| (wanted + n, slot)) {
        plan.clear(n, slot);
    }
    plan.replace(kept, policy, now);
    plan.roll_out(kept, going, now);
    plan
}

impl Plan {
    fn do_at(&mut self, at: Instant, action: Action, now: Instant) {
        if at <= now {
            self.actions.push(action);
        } else {
            self.wake = Some(self.wake.map_or(at, |wake| wake.min(at)));
        }
    }

    /// Fills the first seat of a slot that the pool has.
    fn fill(&mut self, n: usize, slot: &Slot, going: Going<'_>, now: Instant) {
        let front = &slot.front;
        if slot.is_taken_over(going.stage) {
            self.actions.push(Action::Flip(n));
        } else if let Some(at) = front.starts_at() {
            // Whoever starts beside the slot fills it sooner.
            if !slot.beside.is_starting() {
                self.do_at(at, Action::Start(Place::front(n)), now);
            }
        } else if front.drains_or_drained() == Some(Why::Surplus) {
            self.actions.push(Action::Keep(n));
        } else if let (true, Some(why)) = (front.is_drained(), front.drains_or_drained()) {
            self.actions.push(Action::Stop(Place::front(n), why));
        }
    }

    /// Empties a slot that the pool no longer has.
    fn clear(&mut self, n: usize, slot: &Slot) {
        match slot.front.drains_or_drained() {
            Some(Why::Surplus) if slot.front.is_drained() => {
                self.actions.push(Action::Stop(Place::front(n), Why::Surplus));
            }
            Some(Why::Surplus) => {}
            Some(_) => self.actions.push(Action::Drain(Place::front(n), Why::Surplus)),
            None if slot.front.serves() => self.actions.push(Action::Drain(Place::front(n), Why::Surplus)),
            None => {}
        }
        if slot.beside.serves() || slot.beside.is_drained() {
            self.actions.push(Action::Stop(Place::beside(n), Why::Surplus));
        }
    }

    /// Decides about the new replica of a slot, and about the one beside it.
    fn go_on(&mut self, n: usize, slot: &Slot, policy: &Policy, going: Going<'_>, now: Instant) {
        let (front, beside, place) = (&slot.front, &slot.beside, Place::beside(n));
        let healthy_for = going.pace.healthy_for;
        if beside.is_drained() {
            self.actions.push(Action::Stop(place, Why::Outdated));
        } else if beside.serves() && beside.is_former {
            self.actions.push(Action::Drain(place, Why::Outdated));
        } else if beside.serves() && !slot.is_taken_over(going.stage) {
            let is_needed =
                going.stage != Stage::Paused && (front.is_outdated() || !front.is_running()) && !beside.is_outdated();
            if !is_needed {
                self.actions.push(Action::Stop(place, Why::Surplus));
            } else if beside.unhealthy_since().is_some() {
                self.fail(n, Failure::Unhealthy, going);
            } else if let Some(since) = beside.healthy_since() {
                self.do_at(since + healthy_for, Action::Flip(n), now);
            }
        } else if let (Some(at), true) = (beside.starts_at(), slot.waits_for_another()) {
            if beside.is_crash_loop(policy) {
                self.fail(n, Failure::CrashLoop, going);
            } else if going.stage != Stage::Paused {
                self.do_at(at, Action::Start(place), now);
            }
        }
        if front.is_new() && !front.is_outdated() {
            if front.unhealthy_since().is_some() {
                self.fail(n, Failure::Unhealthy, going);
            } else if front.starts_at().is_some() && front.is_crash_loop(policy) {
                self.fail(n, Failure::CrashLoop, going);
            } else if let Some(since) = front.healthy_since().filter(|&since| since + healthy_for > now) {
                self.wake = self.wake.into_iter().chain([since + healthy_for]).min();
            }
        }
    }

    /// The new replica of a slot has failed, and the rollout with it, unless that has failed before.
    fn fail(&mut self, n: usize, failure: Failure, going: Going<'_>) {
        if matches!(going.stage, Stage::Running | Stage::RollingBack) {
            self.actions.push(Action::Fail(n, failure));
        }
    }

    /// Replaces an unhealthy replica, and one that has become outdated before it had a verdict.
    fn replace(&mut self, kept: &[Slot], policy: &Policy, now: Instant) {
        // The settings have changed again before the successor had a verdict: waiting for it would only delay the remedy.
        let given_up = kept.iter().position(|slot| slot.front.is_replaced() && slot.front.is_unjudged_and_outdated());
        if let Some(n) = given_up {
            self.actions.push(Action::Stop(Place::front(n), Why::Outdated));
        }
        // While the predecessor drains, no successor is due yet: a drain may take long, and other replicas may hang
        // meanwhile.
        if kept.iter().any(|slot| slot.front.is_replaced() && slot.front.drains_for().is_none()) {
            return;
        }
        let alone = kept.iter().enumerate().filter(|(_, slot)| !slot.has_successor());
        let unhealthy = alone.filter_map(|(n, slot)| Some((slot.front.unhealthy_since()?, n)));
        if let (Some(patience), Some((since, n))) = (policy.replace_after, unhealthy.min()) {
            self.do_at(since + patience, Action::Stop(Place::front(n), Why::Unhealthy), now);
        }
    }

    /// Begins to replace outdated replicas.
    fn roll_out(&mut self, kept: &[Slot], going: Going<'_>, now: Instant) {
        let Pace { order, parallel, pause, healthy_for, .. } = *going.pace;
        let is_new = |slot: &Slot| {
            let is_proven = slot.front.healthy_since().is_some_and(|since| since + healthy_for <= now);
            slot.front.is_new() && !slot.front.is_outdated() && !is_proven
        };
        let is_changing =
            |slot: &Slot| slot.front.is_replaced() || is_new(slot) || slot.has_successor() || slot.waits_for_another();
        let changing = kept.iter().filter(|slot| is_changing(slot)).count();
        // Where the old replica leaves first, one must stay.
        let most = if order == Order::StopFirst { kept.len().saturating_sub(1).max(1) } else { kept.len() };
        let room = most.min(parallel as usize).saturating_sub(changing);
        if going.stage == Stage::Paused
            || !going.is_settled
            || room == 0
            || self.actions.iter().any(|action| matches!(action, Action::Stop(..)))
        {
            return;
        }
        let all_healthy = kept.iter().filter(|slot| !is_changing(slot)).all(|slot| slot.front.is_healthy());
        // The one before the last may still be beside the slot, and its connections may go on for long.
        let has_place = |slot: &Slot| order == Order::StopFirst || !slot.beside.is_running();
        let may_change =
            |slot: &Slot| !is_changing(slot) && (has_place(slot) || slot.front.unhealthy_since().is_some());
        let outdated = kept.iter().enumerate().filter(|(_, slot)| may_change(slot));
        let mut outdated: Vec<_> =
            outdated.filter_map(|(n, slot)| Some((slot.front.outdated_goes_at(all_healthy)?, n))).collect();
        outdated.sort_unstable();
        for (at, n) in outdated.into_iter().take(room) {
            let slot = &kept[n];
            let action = match order {
                _ if slot.front.unhealthy_since().is_some() => Action::Stop(Place::front(n), Why::Outdated),
                Order::StartFirst => Action::Start(Place::beside(n)),
                Order::StopFirst => Action::Drain(Place::front(n), Why::Outdated),
            };
            // An unhealthy one has nothing to lose, and what has failed is not left to serve for longer than it must.
            let is_urgent = matches!(action, Action::Stop(..)) || going.stage == Stage::RollingBack;
            let paused = going.last_step.filter(|_| !is_urgent).map(|last| last + pause);
            let at = paused.map_or(at, |paused| at.max(paused));
            self.do_at(at, action, now);
        }
    }
}
