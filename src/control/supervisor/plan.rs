//! What the supervisor does next: a pure function of what is wanted, what is observed, and the time.
//!
//! Adapters tell each [`Slot`] what they see and carry out what [`plan`] says. Only their own clock counts, and
//! only as differences: what an engine says of times is not used.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::label_enum;

#[cfg(test)]
mod tests;

/// An outdated replica that has not become healthy within this time after it was adopted is not waited for.
const UNJUDGED: Duration = Duration::from_secs(10);

/// When a replica is started again, and when it is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Before the second start in a row that did not last; doubled with each more. The first is at once.
    pub backoff: Duration,
    /// The longest wait.
    pub max_backoff: Duration,
    /// A replica that ran this long has lasted.
    pub stable_after: Duration,
    /// Starts in a row that did not last after which the slot counts as in a crash loop.
    pub crash_loop_after: u32,
    /// A replica that runs but has been unhealthy for this long is replaced; `None`: never.
    pub replace_after: Option<Duration>,
}

/// What is observed of one slot.
#[derive(Debug, Clone)]
pub struct Slot {
    /// Its name, which is the backend's id.
    pub name: Arc<str>,
    phase: Phase,
    /// Replicas in a row that did not last.
    strikes: u32,
    /// Its replica was stopped to be replaced, and the next one has not shown yet what it is worth.
    in_replacement: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Empty {
        start_at: Instant,
    },
    /// A start was ordered, and no replica has been seen yet.
    Starting,
    Running {
        since: Instant,
        worth: Worth,
        is_outdated: bool,
    },
    /// Its connections may end before it is stopped.
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

/// What a running replica is worth, as far as is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Worth {
    Unknown,
    Healthy,
    Unhealthy { since: Instant },
}

label_enum! {
    /// Why a replica is stopped.
    pub enum Why {
        /// The slot is not wanted any more.
        Surplus => "surplus",
        /// It runs, but has been unhealthy for too long.
        Unhealthy => "unhealthy",
        /// It was made from other settings than those of now.
        Outdated => "outdated",
    }
}

/// What to do with a slot, given by its index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Start a replica.
    Start(usize),
    /// Let the replica's connections end, and give it no new ones.
    Drain(usize, Why),
    /// It was to be drained, and is wanted again.
    Keep(usize),
    /// Stop the replica.
    Stop(usize, Why),
}

/// What to do now, and when to ask again if nothing happens before.
#[derive(Debug, PartialEq, Eq)]
pub struct Plan {
    /// Each slot occurs once at most.
    pub actions: Vec<Action>,
    /// `None`: nothing is due.
    pub wake: Option<Instant>,
}

/// The first `wanted` slots should have a replica each that is healthy and made from the settings of now, the
/// others none.
///
/// One replica at a time is replaced, and the next only once its successor has shown what it is worth: whatever
/// makes all of them unhealthy must not take all of them down. An outdated one waits until all are healthy, or goes
/// at once where it is unhealthy: then nothing is lost, and the new settings may be the remedy. What serves is drained
/// before it is stopped.
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
    // While its predecessor drains, a successor is not due yet: that may take long, and others may hang meanwhile.
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

    /// A start was ordered.
    pub fn starting(&mut self) {
        self.phase = Phase::Starting;
    }

    /// The start could not be tried, which is not the replica's fault: not before `start_at` again.
    pub fn postponed(&mut self, start_at: Instant) {
        self.phase = Phase::Empty { start_at };
    }

    /// A replica runs that has not been seen before.
    pub fn running(&mut self, is_outdated: bool, now: Instant) {
        self.phase = Phase::Running { since: now, worth: Worth::Unknown, is_outdated };
    }

    /// What health checks say of the running replica; `None` while they have not made up their mind.
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

    /// The settings have changed: whether the running replica was made from others than those of now.
    pub fn outdated(&mut self, outdated: bool) {
        if let Phase::Running { is_outdated, .. } = &mut self.phase {
            *is_outdated = outdated;
        }
    }

    /// The replica gets no new connections from now on.
    pub fn draining(&mut self, why: Why) {
        if let Phase::Running { since, .. } | Phase::Draining { since, .. } = self.phase {
            self.phase = Phase::Draining { since, why, is_over: false };
            self.in_replacement = why != Why::Surplus;
        }
    }

    /// Its last connection has ended, or their time is over.
    pub fn drained(&mut self) {
        if let Phase::Draining { is_over, .. } = &mut self.phase {
            *is_over = true;
        }
    }

    /// It is not to be drained any more.
    pub fn kept(&mut self, is_outdated: bool) {
        if let Phase::Draining { since, .. } = self.phase {
            self.phase = Phase::Running { since, worth: Worth::Unknown, is_outdated };
        }
    }

    /// The replica was told to stop.
    pub fn stopping(&mut self, why: Why) {
        if let Phase::Running { since, .. } | Phase::Draining { since, .. } = self.phase {
            self.phase = Phase::Stopping { since, why };
            self.in_replacement = why != Why::Surplus;
        }
    }

    /// It could not be told so: it is as it was before.
    pub fn not_stopped(&mut self) {
        if let Phase::Stopping { since, why } = self.phase {
            self.phase = Phase::Running { since, worth: Worth::Unknown, is_outdated: why == Why::Outdated };
            self.in_replacement = false;
        }
    }

    /// The replica ended, or could not be started. Returns how long the next start waits.
    pub fn ended(&mut self, policy: &Policy, now: Instant) -> Duration {
        let lasted = match self.phase {
            Phase::Running { since, .. } | Phase::Stopping { since, why: Why::Unhealthy } => {
                now.saturating_duration_since(since) >= policy.stable_after
            }
            Phase::Empty { .. } | Phase::Starting => false,
            // Ended because it was told to.
            Phase::Stopping { .. } | Phase::Draining { .. } => true,
        };
        // A successor that ends has shown what it is worth.
        self.in_replacement &= matches!(self.phase, Phase::Stopping { .. } | Phase::Draining { .. });
        self.strikes = if lasted { 0 } else { self.strikes.saturating_add(1) };
        let wait = self.backoff(policy);
        self.phase = Phase::Empty { start_at: now + wait };
        wait
    }

    /// Whether a replica is there that may end or be judged.
    pub fn is_running(&self) -> bool {
        matches!(self.phase, Phase::Running { .. } | Phase::Draining { .. } | Phase::Stopping { .. })
    }

    /// Whether it was drained, and that is over.
    pub fn is_drained(&self) -> bool {
        matches!(self.phase, Phase::Draining { is_over: true, .. })
    }

    /// Why it is drained, while that is not over.
    pub fn drains_for(&self) -> Option<Why> {
        match self.phase {
            Phase::Draining { why, is_over: false, .. } => Some(why),
            _ => None,
        }
    }

    /// Whether a start was ordered that has not shown a replica yet.
    pub fn is_starting(&self) -> bool {
        self.phase == Phase::Starting
    }

    /// Whether no replica before this one has failed to last.
    pub fn is_first_try(&self) -> bool {
        self.strikes == 0
    }

    /// Whether so many replicas in a row did not last that something must be wrong with them.
    pub fn is_crash_loop(&self, policy: &Policy) -> bool {
        self.strikes >= policy.crash_loop_after
    }

    fn is_healthy(&self) -> bool {
        matches!(self.phase, Phase::Running { worth: Worth::Healthy, .. })
    }

    /// When a replica that was made from other settings may go; `None` while it is needed, or is not one.
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

    /// Nothing after the first strike, then doubling from `backoff` to `max_backoff`. Up to a fifth is taken
    /// off, by slot and strike, so that slots that died together do not start together.
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
