//! What the supervisor does next: a pure function of what is wanted, what is observed, and the time.

use std::sync::Arc;
use std::time::{Duration, Instant};

#[cfg(test)]
mod tests;

/// When a dead replica is started again.
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// Before the second start in a row that did not last; doubled with each more. The first is at once.
    pub backoff: Duration,
    /// The longest wait.
    pub max_backoff: Duration,
    /// A replica that ran this long has lasted.
    pub stable_after: Duration,
    /// Starts in a row that did not last after which the slot counts as in a crash loop.
    pub crash_loop_after: u32,
}

/// What is observed of one slot.
#[derive(Debug, Clone)]
pub struct Slot {
    /// Its name, which is the backend's id.
    pub name: Arc<str>,
    phase: Phase,
    /// Replicas in a row that did not last.
    strikes: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Down { start_at: Instant },
    Up { since: Instant },
    Stopping,
}

/// What to do with a slot, given by its index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Start a replica.
    Start(usize),
    /// Stop the replica: the slot is not wanted any more.
    Stop(usize),
}

/// What to do now, and when to ask again if nothing happens before.
#[derive(Debug, PartialEq, Eq)]
pub struct Plan {
    /// Each slot occurs once at most.
    pub actions: Vec<Action>,
    /// `None`: nothing is due.
    pub wake: Option<Instant>,
}

/// The first `wanted` slots should have a replica each, the others none.
pub fn plan(wanted: usize, slots: &[Slot], now: Instant) -> Plan {
    let mut plan = Plan { actions: Vec::new(), wake: None };
    for (index, slot) in slots.iter().enumerate() {
        match slot.phase {
            Phase::Down { start_at } if index < wanted && start_at <= now => plan.actions.push(Action::Start(index)),
            Phase::Down { start_at } if index < wanted => {
                plan.wake = Some(plan.wake.map_or(start_at, |wake| wake.min(start_at)));
            }
            Phase::Up { .. } if index >= wanted => plan.actions.push(Action::Stop(index)),
            Phase::Down { .. } | Phase::Up { .. } | Phase::Stopping => {}
        }
    }
    plan
}

impl Slot {
    /// An empty slot whose first replica is due at once.
    pub fn new(name: Arc<str>, now: Instant) -> Self {
        Self { name, phase: Phase::Down { start_at: now }, strikes: 0 }
    }

    /// A replica was started.
    pub fn started(&mut self, now: Instant) {
        self.phase = Phase::Up { since: now };
    }

    /// The replica was told to stop.
    pub fn stopping(&mut self) {
        self.phase = Phase::Stopping;
    }

    /// The replica ended, or could not be started. Returns how long the next start waits.
    pub fn ended(&mut self, policy: &Policy, now: Instant) -> Duration {
        let lasted = match self.phase {
            Phase::Up { since } => now.saturating_duration_since(since) >= policy.stable_after,
            Phase::Down { .. } => false,
            // Ended because it was told to.
            Phase::Stopping => true,
        };
        self.strikes = if lasted { 0 } else { self.strikes.saturating_add(1) };
        let wait = self.backoff(policy);
        self.phase = Phase::Down { start_at: now + wait };
        wait
    }

    /// Whether so many replicas in a row did not last that something must be wrong with them.
    pub fn is_crash_loop(&self, policy: &Policy) -> bool {
        self.strikes >= policy.crash_loop_after
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
        wait.checked_sub(wait / 5 * jitter / 255).unwrap()
    }
}
