//! Decides what the supervisor does next: a pure function of the settings, the observed state, and the time.
//!
//! Adapters report to each [`Slot`] what they observe and carry out the [`plan`]. Only Ringway's own clock counts, and
//! only as differences: Ringway does not use the engine's times.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::label_enum;

#[cfg(test)]
mod tests;

/// How long the plan waits for the first verdict on an adopted, outdated replica before it replaces it.
const UNJUDGED: Duration = Duration::from_secs(10);

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

/// The observed state of one slot.
#[derive(Debug, Clone)]
pub struct Slot {
    /// The slot's name, which is the backend's id.
    pub name: Arc<str>,
    phase: Phase,
    /// Replicas in a row that did not last.
    strikes: u32,
    /// The slot's replica is being replaced, and its successor has no verdict yet.
    in_replacement: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Empty {
        start_at: Instant,
    },
    /// A start has begun, and no replica has been seen yet.
    Starting,
    Running {
        since: Instant,
        worth: Worth,
        is_outdated: bool,
    },
    /// The replica's connections may end before it is stopped.
    Draining {
        since: Instant,
        why: Why,
        is_over: bool,
    },
    Stopping {
        since: Instant,
        why: Why,
    },
}

/// The verdict on a running replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Worth {
    Unknown,
    Healthy,
    Unhealthy { since: Instant },
}

label_enum! {
    /// Why a replica is stopped.
    pub enum Why {
        /// The pool no longer has the slot.
        Surplus => "surplus",
        /// The replica runs, but has been unhealthy for too long.
        Unhealthy => "unhealthy",
        /// The replica was created from different settings than the current ones.
        Outdated => "outdated",
    }
}

/// An action on a slot, given by its index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Start a replica.
    Start(usize),
    /// Give the replica no new connections, and let the open ones end.
    Drain(usize, Why),
    /// End the drain of a replica that is needed again.
    Keep(usize),
    /// Stop the replica.
    Stop(usize, Why),
}

/// What to do now, and when to plan again if nothing happens before.
#[derive(Debug, PartialEq, Eq)]
pub struct Plan {
    /// The actions; each slot occurs at most once.
    pub actions: Vec<Action>,
    /// When to plan again; `None`: nothing is due.
    pub wake: Option<Instant>,
}

/// Plans the next actions. The goal: each of the first `wanted` slots has a healthy replica that was created from the
/// current settings, and the other slots are empty.
///
/// The plan replaces one replica at a time, and the next one only once the successor has a verdict: a fault that makes
/// all replicas unhealthy must not take all of them down. An outdated replica is replaced once all are healthy. If it
/// is unhealthy it is replaced at once: nothing is lost, and the new settings may be the remedy. A replica that serves
/// is drained before it is stopped.
pub fn plan(wanted: usize, slots: &[Slot], policy: &Policy, now: Instant) -> Plan {
    let mut plan = Plan { actions: Vec::new(), wake: None };
    let (kept, surplus) = slots.split_at(wanted.min(slots.len()));
    for (index, slot) in kept.iter().enumerate() {
        match slot.phase {
            Phase::Empty { start_at } => plan.do_at(start_at, Action::Start(index), now),
            Phase::Draining { why: Why::Surplus, .. } => plan.actions.push(Action::Keep(index)),
            Phase::Draining { why, is_over: true, .. } => plan.actions.push(Action::Stop(index, why)),
            _ => {}
        }
    }
    for (index, slot) in surplus.iter().enumerate().map(|(index, slot)| (wanted + index, slot)) {
        match slot.phase {
            Phase::Draining { why: Why::Surplus, is_over: true, .. } => {
                plan.actions.push(Action::Stop(index, Why::Surplus));
            }
            Phase::Running { .. } | Phase::Draining { why: Why::Outdated | Why::Unhealthy, .. } => {
                plan.actions.push(Action::Drain(index, Why::Surplus));
            }
            Phase::Draining { .. } | Phase::Empty { .. } | Phase::Starting | Phase::Stopping { .. } => {}
        }
    }
    // The settings have changed again before the successor had a verdict: waiting for it would only delay the remedy.
    let given_up = kept.iter().position(|slot| slot.in_replacement && slot.is_unjudged_and_outdated());
    if let Some(index) = given_up {
        plan.actions.push(Action::Stop(index, Why::Outdated));
    }
    // While the predecessor drains, no successor is due yet: a drain may take long, and other replicas may hang
    // meanwhile.
    if kept.iter().any(|slot| slot.in_replacement && slot.drains_for().is_none()) {
        return plan;
    }
    let unhealthy = kept.iter().enumerate().filter_map(|(index, slot)| Some((slot.unhealthy_since()?, index)));
    if let (Some(patience), Some((since, index))) = (policy.replace_after, unhealthy.min()) {
        plan.do_at(since + patience, Action::Stop(index, Why::Unhealthy), now);
    }
    if kept.iter().any(|slot| slot.in_replacement) {
        return plan;
    }
    let all_healthy = kept.iter().all(Slot::is_healthy);
    let outdated =
        kept.iter().enumerate().filter_map(|(index, slot)| Some((slot.outdated_goes_at(all_healthy)?, index)));
    let is_other_stopped = plan.actions.iter().any(|action| matches!(action, Action::Stop(..)));
    if let Some((at, index)) = outdated.min().filter(|_| !is_other_stopped) {
        let is_of_use = slots[index].unhealthy_since().is_none();
        let action = if is_of_use { Action::Drain(index, Why::Outdated) } else { Action::Stop(index, Why::Outdated) };
        plan.do_at(at, action, now);
    }
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
}

impl Slot {
    /// An empty slot whose first replica is due at once.
    pub fn new(name: Arc<str>, now: Instant) -> Self {
        Self { name, phase: Phase::Empty { start_at: now }, strikes: 0, in_replacement: false }
    }

    /// Records that a start has begun.
    pub fn starting(&mut self) {
        self.phase = Phase::Starting;
    }

    /// Forgets how the last replicas ended, because their settings have changed. An empty slot starts at once.
    pub fn forgive(&mut self, now: Instant) {
        self.strikes = 0;
        if let Phase::Empty { start_at } = &mut self.phase {
            *start_at = now;
        }
    }

    /// Records that the start could not be tried, which does not count as a strike. Retries no earlier than `start_at`.
    pub fn postponed(&mut self, start_at: Instant) {
        self.phase = Phase::Empty { start_at };
    }

    /// Records that a new replica runs.
    pub fn running(&mut self, is_outdated: bool, now: Instant) {
        self.phase = Phase::Running { since: now, worth: Worth::Unknown, is_outdated };
    }

    /// Records the verdict of the health checks on the running replica; `None` while undecided.
    pub fn judged(&mut self, verdict: Option<bool>, now: Instant) {
        let Phase::Running { worth, .. } = &mut self.phase else { return };
        *worth = match (verdict, *worth) {
            (Some(true), _) => Worth::Healthy,
            (Some(false), Worth::Unhealthy { since }) => Worth::Unhealthy { since },
            (Some(false), _) => Worth::Unhealthy { since: now },
            (None, _) => Worth::Unknown,
        };
        self.in_replacement &= verdict.is_none();
    }

    /// Records whether the running replica was created from different settings than the current ones.
    pub fn outdated(&mut self, outdated: bool) {
        if let Phase::Running { is_outdated, .. } = &mut self.phase {
            *is_outdated = outdated;
        }
    }

    /// Records that the replica gets no new connections from now on.
    pub fn draining(&mut self, why: Why) {
        if let Phase::Running { since, .. } | Phase::Draining { since, .. } = self.phase {
            self.phase = Phase::Draining { since, why, is_over: false };
            self.in_replacement = why != Why::Surplus;
        }
    }

    /// Records that the drain is over: the last connection has ended, or the deadline has passed.
    pub fn drained(&mut self) {
        if let Phase::Draining { is_over, .. } = &mut self.phase {
            *is_over = true;
        }
    }

    /// Records that the drain was cancelled.
    pub fn kept(&mut self, is_outdated: bool) {
        if let Phase::Draining { since, .. } = self.phase {
            self.phase = Phase::Running { since, worth: Worth::Unknown, is_outdated };
        }
    }

    /// Records that a stop has begun.
    pub fn stopping(&mut self, why: Why) {
        if let Phase::Running { since, .. } | Phase::Draining { since, .. } = self.phase {
            self.phase = Phase::Stopping { since, why };
            self.in_replacement = why != Why::Surplus;
        }
    }

    /// Records that the stop failed: the replica still runs.
    pub fn not_stopped(&mut self) {
        if let Phase::Stopping { since, why } = self.phase {
            self.phase = Phase::Running { since, worth: Worth::Unknown, is_outdated: why == Why::Outdated };
            self.in_replacement = false;
        }
    }

    /// Records that the replica ended or could not be started. Returns the wait before the next start.
    pub fn ended(&mut self, policy: &Policy, now: Instant) -> Duration {
        let lasted = match self.phase {
            Phase::Running { since, .. } | Phase::Stopping { since, why: Why::Unhealthy } => {
                now.saturating_duration_since(since) >= policy.stable_after
            }
            Phase::Empty { .. } | Phase::Starting => false,
            // Ringway ended the replica.
            Phase::Stopping { .. } | Phase::Draining { .. } => true,
        };
        // The end of a successor counts as its verdict.
        self.in_replacement &= matches!(self.phase, Phase::Stopping { .. } | Phase::Draining { .. });
        self.strikes = if lasted { 0 } else { self.strikes.saturating_add(1) };
        let wait = self.backoff(policy);
        self.phase = Phase::Empty { start_at: now + wait };
        wait
    }

    /// Whether the slot has a replica.
    pub fn is_running(&self) -> bool {
        matches!(self.phase, Phase::Running { .. } | Phase::Draining { .. } | Phase::Stopping { .. })
    }

    /// Whether the slot still has a replica that was created from different settings than the current ones.
    pub fn is_outdated(&self) -> bool {
        matches!(
            self.phase,
            Phase::Running { is_outdated: true, .. }
                | Phase::Draining { why: Why::Outdated, .. }
                | Phase::Stopping { why: Why::Outdated, .. }
        )
    }

    /// Whether the replica's drain is over.
    pub fn is_drained(&self) -> bool {
        matches!(self.phase, Phase::Draining { is_over: true, .. })
    }

    /// Why the replica is draining; `None` if it is not, or if the drain is over.
    pub fn drains_for(&self) -> Option<Why> {
        match self.phase {
            Phase::Draining { why, is_over: false, .. } => Some(why),
            _ => None,
        }
    }

    /// Why Ringway stops the replica; `None` if it does not.
    pub fn stops_for(&self) -> Option<Why> {
        match self.phase {
            Phase::Stopping { why, .. } => Some(why),
            _ => None,
        }
    }

    /// Whether a start has begun and no replica has been seen yet.
    pub fn is_starting(&self) -> bool {
        self.phase == Phase::Starting
    }

    /// Whether the previous replica lasted, or there was none.
    pub fn is_first_try(&self) -> bool {
        self.strikes == 0
    }

    /// Whether the slot is in a crash loop: too many replicas in a row did not last.
    pub fn is_crash_loop(&self, policy: &Policy) -> bool {
        self.strikes >= policy.crash_loop_after
    }

    fn is_healthy(&self) -> bool {
        matches!(self.phase, Phase::Running { worth: Worth::Healthy, .. })
    }

    fn is_unjudged_and_outdated(&self) -> bool {
        matches!(self.phase, Phase::Running { worth: Worth::Unknown, is_outdated: true, .. })
    }

    /// When an outdated replica may be replaced; `None` if it is still needed, or not outdated.
    fn outdated_goes_at(&self, all_healthy: bool) -> Option<Instant> {
        match self.phase {
            Phase::Running { since, worth, is_outdated: true } => match worth {
                Worth::Healthy => all_healthy.then_some(since),
                Worth::Unhealthy { since } => Some(since),
                Worth::Unknown => Some(since + UNJUDGED),
            },
            _ => None,
        }
    }

    fn unhealthy_since(&self) -> Option<Instant> {
        match self.phase {
            Phase::Running { worth: Worth::Unhealthy { since }, .. } => Some(since),
            _ => None,
        }
    }

    /// The wait before the next start: none after the first strike, then doubling from `backoff` to `max_backoff`.
    /// Reduced by up to a fifth, depending on slot and strike, to keep slots that died together from starting together.
    fn backoff(&self, policy: &Policy) -> Duration {
        let Some(doublings) = self.strikes.checked_sub(2) else { return Duration::ZERO };
        let factor = 1_u32.checked_shl(doublings).unwrap_or(u32::MAX);
        let wait = policy.backoff.saturating_mul(factor).min(policy.max_backoff);
        let mut bytes = self.name.as_bytes().to_vec();
        bytes.extend_from_slice(&self.strikes.to_le_bytes());
        let jitter = u32::from(seahash::hash(&bytes).to_le_bytes()[0]);
        wait.saturating_sub(wait / 5 * jitter / 255)
    }
}
