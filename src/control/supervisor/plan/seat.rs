//! The state of one seat: what is known about the replica in it, and about those before. Pure: the time is an argument.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Policy;
use crate::label_enum;

/// How long the plan waits for the first verdict on an adopted, outdated replica before it replaces it.
pub(super) const UNJUDGED: Duration = Duration::from_secs(10);

/// The observed state of one seat.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "each is an independent fact")]
pub struct Seat {
    /// The id under which the publisher knows the replica in this seat.
    pub id: Arc<str>,
    phase: Phase,
    /// Replicas in a row that did not last.
    strikes: u32,
    /// The replica is being replaced in its own seat, and its successor has no verdict yet.
    in_replacement: bool,
    /// The replica has come in the place of an outdated one, and has not been healthy for long enough yet.
    is_new: bool,
    /// A command wants another replica in its place, even one from the same settings.
    is_given_up: bool,
    /// The replica has filled the slot before, and leaves once its connections have ended.
    pub is_former: bool,
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
    Healthy { since: Instant },
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

impl Seat {
    /// An empty seat whose first replica is due at once.
    pub fn new(id: Arc<str>, now: Instant) -> Self {
        Self {
            id,
            phase: Phase::Empty { start_at: now },
            strikes: 0,
            in_replacement: false,
            is_new: false,
            is_given_up: false,
            is_former: false,
        }
    }

    /// Records that a start has begun.
    pub fn starting(&mut self) {
        (self.phase, self.is_former, self.is_given_up) = (Phase::Starting, false, false);
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
        self.is_former = false;
        // A command may have come since its start began.
        self.phase = Phase::Running { since: now, worth: Worth::Unknown, is_outdated: is_outdated || self.is_given_up };
    }

    /// Records the verdict of the health checks on the running replica; `None` while undecided.
    pub fn judged(&mut self, verdict: Option<bool>, now: Instant) {
        let Phase::Running { worth, .. } = &mut self.phase else { return };
        *worth = match (verdict, *worth) {
            (Some(true), Worth::Healthy { since }) => Worth::Healthy { since },
            (Some(true), _) => Worth::Healthy { since: now },
            (Some(false), Worth::Unhealthy { since }) => Worth::Unhealthy { since },
            (Some(false), _) => Worth::Unhealthy { since: now },
            (None, _) => Worth::Unknown,
        };
        self.in_replacement &= verdict.is_none();
    }

    /// Records whether the running replica was created from different settings than the current ones.
    pub fn outdated(&mut self, outdated: bool) {
        if let Phase::Running { is_outdated, .. } = &mut self.phase {
            *is_outdated = outdated || self.is_given_up;
        }
    }

    /// Records that the running replica shall be replaced, whatever its settings.
    pub fn give_up(&mut self) {
        self.is_given_up = true;
        self.outdated(true);
    }

    /// Records that the replica that is about to start may be from other settings than the one before.
    pub fn begins_anew(&mut self) {
        self.is_new = true;
    }

    /// Records that the replica shall stay, if its settings are the current ones.
    pub fn forget_giving_up(&mut self) {
        self.is_given_up = false;
    }

    /// Records that a new replica has been healthy for long enough, if it has. Returns whether it has.
    pub fn settle(&mut self, healthy_for: Duration, now: Instant) -> bool {
        let is_over = self.is_new && self.healthy_since().is_some_and(|since| since + healthy_for <= now);
        self.is_new &= !is_over;
        is_over
    }

    /// Records that the replica gets no new connections from now on.
    pub fn draining(&mut self, why: Why) {
        if let Phase::Running { since, .. } | Phase::Draining { since, .. } = self.phase {
            self.phase = Phase::Draining { since, why, is_over: false };
            self.leaves(why);
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
            self.leaves(why);
        }
    }

    fn leaves(&mut self, why: Why) {
        self.in_replacement = why != Why::Surplus;
        self.is_new |= why == Why::Outdated;
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
        self.is_given_up = false;
        self.strikes = if lasted { 0 } else { self.strikes.saturating_add(1) };
        let wait = self.backoff(policy);
        self.phase = Phase::Empty { start_at: now + wait };
        wait
    }

    /// Whether the seat has a replica.
    pub fn is_running(&self) -> bool {
        matches!(self.phase, Phase::Running { .. } | Phase::Draining { .. } | Phase::Stopping { .. })
    }

    /// Whether the seat still has a replica that was created from different settings than the current ones.
    pub fn is_outdated(&self) -> bool {
        matches!(
            self.phase,
            Phase::Running { is_outdated: true, .. }
                | Phase::Draining { why: Why::Outdated, .. }
                | Phase::Stopping { why: Why::Outdated, .. }
        )
    }

    /// Why the replica is draining, or has drained.
    pub(super) fn drains_or_drained(&self) -> Option<Why> {
        if let Phase::Draining { why, .. } = self.phase { Some(why) } else { None }
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

    /// When the next start is due; `None` if the seat is not empty.
    pub(super) fn starts_at(&self) -> Option<Instant> {
        if let Phase::Empty { start_at } = self.phase { Some(start_at) } else { None }
    }

    /// Whether the replica runs, and neither drains nor stops.
    pub(super) fn serves(&self) -> bool {
        matches!(self.phase, Phase::Running { .. })
    }

    /// Since when the replica has been healthy; `None` if it is not.
    pub(super) fn healthy_since(&self) -> Option<Instant> {
        match self.phase {
            Phase::Running { worth: Worth::Healthy { since }, .. } => Some(since),
            _ => None,
        }
    }

    /// Whether the replica has come in the place of an outdated one, and has not been healthy for long enough yet.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// Whether the replica is being replaced, or is a new one without a verdict.
    pub fn is_replaced(&self) -> bool {
        self.in_replacement
    }

    /// Records that the replica fills the slot from now on. It is new until it has been healthy for long enough.
    pub fn fills(&mut self) {
        (self.in_replacement, self.is_new) = (false, true);
    }

    /// Records that another replica fills the slot from now on.
    pub fn leaves_slot(&mut self) {
        (self.is_former, self.is_new, self.strikes) = (true, false, 0);
    }

    pub(super) fn is_healthy(&self) -> bool {
        matches!(self.phase, Phase::Running { worth: Worth::Healthy { .. }, .. })
    }

    pub(super) fn is_unjudged_and_outdated(&self) -> bool {
        matches!(self.phase, Phase::Running { worth: Worth::Unknown, is_outdated: true, .. })
    }

    /// When an outdated replica may be replaced; `None` if it is still needed, or not outdated.
    pub(super) fn outdated_goes_at(&self, all_healthy: bool) -> Option<Instant> {
        match self.phase {
            Phase::Running { since, worth, is_outdated: true } => match worth {
                Worth::Healthy { .. } => all_healthy.then_some(since),
                Worth::Unhealthy { since } => Some(since),
                Worth::Unknown => Some(since + UNJUDGED),
            },
            _ => None,
        }
    }

    pub(super) fn unhealthy_since(&self) -> Option<Instant> {
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
        let mut bytes = self.id.as_bytes().to_vec();
        bytes.extend_from_slice(&self.strikes.to_le_bytes());
        let jitter = u32::from(seahash::hash(&bytes).to_le_bytes()[0]);
        wait.saturating_sub(wait / 5 * jitter / 255)
    }
}
