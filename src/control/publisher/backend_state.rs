//! The facts about one backend, and what events and time change of them. Pure except for its counters. [`judging`] has the state that
//! they give.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Settings;
use super::drains::{Drains, begin_drain};
use super::warmth::Warmth;
use crate::address::Address;
use crate::backend::{Admission, Backend, Drain, Eviction, Exit, Health, Membership, Replica, State};
use crate::control::Event;
use crate::ring::Member;

mod judging;

/// Interval between checks of whether a draining backend's connections have ended. Also the shortest drain: a worker
/// that picked the backend from an earlier table has begun its connect by then.
pub(super) const LOOK: Duration = Duration::from_millis(100);

/// How long after a drain's deadline a connect that began before it may still complete.
const LATE: Duration = Duration::from_secs(60);

/// Which part of the published table has changed. A greater value includes the smaller ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Change {
    Nothing,
    Backend,
    Ring,
}

/// A backend as it will be published, and the facts its state follows from.
#[derive(Debug)]
pub(super) struct BackendState {
    pub(super) backend: Backend,
    runs: Runs,
    drains: Drains,
    /// What the checks say; `None`: not known.
    verdict: Option<Verdict>,
    crash_loop: bool,
    is_ejected: bool,
    /// The claim to an exclusive pool, while the backend's check passes.
    pub(super) claim: Option<Claim>,
    /// The backend joined a pool without healthy backends and has not been healthy yet. It skips slow start.
    is_first: bool,
    /// How far its slow start is.
    warmth: Warmth,
    /// The backend's position in the published list.
    pub(super) position: usize,
    /// When something is due at the backend, as the publisher has noted it.
    pub(super) next: Option<Instant>,
}

/// The claim of a backend to an exclusive pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Claim {
    /// A later claim has a higher number.
    pub(super) number: u64,
    /// The backend gets the connections.
    pub(super) holds: bool,
}

/// What the checks of a backend say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Healthy,
    Unhealthy,
    /// The backend answers the check, but says no: in an exclusive pool, it is not the primary.
    Declines,
}

/// Tells a restarted replica from a repeated report of the same replica.
#[derive(Debug, Default)]
struct Runs {
    /// The last replica, even if it has ended.
    last: Option<Replica>,
    /// True once a replica has existed.
    any: bool,
    /// An event reported the last replica before it ended.
    is_seen: bool,
}

impl Runs {
    /// What is known if this replica runs.
    fn of(last: Option<Replica>) -> Self {
        Self { last, any: true, is_seen: true }
    }
}

impl BackendState {
    pub(super) fn new(id: Arc<str>, is_first: bool, now: Instant) -> Self {
        Self {
            backend: Backend::new(id, Membership::weighing(0), now),
            runs: Runs::default(),
            drains: Drains::default(),
            verdict: None,
            crash_loop: false,
            is_ejected: false,
            claim: None,
            is_first,
            warmth: Warmth::default(),
            position: 0,
            next: None,
        }
    }

    /// The backend counts as a healthy one of its pool.
    pub(super) fn counts(&self) -> bool {
        self.backend.state == State::Healthy && self.backend.beside.is_none()
    }

    /// Exchanges the incarnation of this slot for the one beside it, whose replica is `next`. The `former` one leaves: its
    /// connections may go on for as long as `within`. What belongs to the slot stays: its weight, the orders of operators, its
    /// counters.
    pub(super) fn flip(
        &mut self,
        beside: &mut Self,
        next: Replica,
        former: Option<Replica>,
        within: Duration,
        now: Instant,
    ) {
        let (here, there) = (&mut self.backend, &mut beside.backend);
        std::mem::swap(&mut here.address, &mut there.address);
        std::mem::swap(&mut here.incarnation, &mut there.incarnation);
        std::mem::swap(&mut here.reported_bad, &mut there.reported_bad);
        std::mem::swap(&mut here.health, &mut there.health);
        std::mem::swap(&mut here.advice, &mut there.advice);
        std::mem::swap(&mut here.live, &mut there.live);
        std::mem::swap(&mut here.other, &mut there.other);
        (here.replica, there.replica) = (Some(next.clone()), former.clone());
        here.restarts += 1;
        std::mem::swap(&mut self.verdict, &mut beside.verdict);
        std::mem::swap(&mut self.is_ejected, &mut beside.is_ejected);
        (self.runs, beside.runs) = (Runs::of(Some(next)), Runs::of(former));
        (self.crash_loop, beside.crash_loop) = (false, false);
        (self.is_first, self.claim) = (false, None);
        self.drains.retiring = None;
        std::mem::swap(&mut self.drains.advised, &mut beside.drains.advised);
        // An earlier deadline of an operator stands.
        let ordered = self.drains.ordered.and_then(|ordered| ordered.deadline);
        let leaving = begin_drain(None, Some(within), true, now);
        let deadline = leaving.deadline.into_iter().chain(ordered).min();
        beside.drains.leaving = Some(Drain { deadline, ..leaving });
        for state in [self, beside] {
            state.show_drain();
            state.show_admission();
        }
    }

    /// The backend as a member of the ring. A leaving backend has weight 0, so it has no points.
    pub(super) fn member(&self) -> Member<'_> {
        Member { id: &self.backend.id, weight: if self.leaves() { 0 } else { self.backend.membership.weight } }
    }

    /// The backend belongs to the pool in this way. A leaving backend stays. `drain` is the time that its connections have if it
    /// is drained from now on.
    pub(super) fn joined(&mut self, membership: Membership, drain: Duration, now: Instant) -> Change {
        let before = std::mem::replace(&mut self.backend.membership, membership);
        let stays = self.drains.leaving.take().is_some();
        if before.is_drained != membership.is_drained {
            self.drains.listed = membership.is_drained.then(|| begin_drain(None, Some(drain), false, now));
        }
        self.show_drain();
        match before {
            _ if before.weight != membership.weight || stays => Change::Ring,
            _ if before != membership => Change::Backend,
            _ => Change::Nothing,
        }
    }

    /// Applies any event other than joining, leaving and new settings. `next` is the incarnation of a new replica.
    pub(super) fn apply(&mut self, event: Event, next: u64, settings: &Settings, now: Instant) -> Change {
        match event {
            Event::Started { address, replica, .. } => {
                // A repeated report changes nothing.
                if self.backend.address.as_ref() == Some(&address)
                    && replica.is_some()
                    && self.backend.replica == replica
                {
                    return Change::Nothing;
                }
                self.backend.incarnation = next;
                self.started(address, replica, now);
            }
            Event::Renamed { replica, .. } => return self.renamed(replica),
            Event::Stopped { crash_loop, exit, .. } => self.stopped(crash_loop, exit, now),
            Event::Reported { healthy, .. } => {
                if self.backend.reported_bad != healthy {
                    return Change::Nothing;
                }
                self.backend.reported_bad = !healthy;
            }
            Event::Checked { incarnation, healthy, has_declined, result, .. } => {
                // The event is about an earlier replica, or the replica died during the check.
                if self.backend.incarnation != incarnation || self.backend.address.is_none() {
                    return Change::Nothing;
                }
                self.verdict = healthy.map(|healthy| match (healthy, has_declined) {
                    (true, _) => Verdict::Healthy,
                    (false, true) => Verdict::Declines,
                    (false, false) => Verdict::Unhealthy,
                });
                self.backend.health.verdict = healthy;
                if self.backend.health.last.as_ref() != Some(&result) {
                    self.backend.health = Health { last: Some(result), verdict: healthy, since: now };
                }
            }
            Event::Ejected { incarnation, .. } => {
                if self.backend.incarnation != incarnation || self.is_ejected {
                    return Change::Nothing;
                }
                self.is_ejected = true;
                self.backend.live.counters.ejections.fetch_add(1, Ordering::Relaxed);
            }
            Event::Readmitted { incarnation, .. } => {
                if self.backend.incarnation != incarnation || !self.is_ejected {
                    return Change::Nothing;
                }
                self.is_ejected = false;
                self.backend.live.failed_in_a_row.store(0, Ordering::Relaxed);
            }
            Event::Advised { incarnation, advice, .. } => {
                // The event is about an earlier replica, or the replica died meanwhile.
                let is_late = self.backend.incarnation != incarnation || self.backend.address.is_none();
                if is_late || self.backend.advice == advice {
                    return Change::Nothing;
                }
                let drains = advice.as_ref().is_some_and(|advice| advice.is_drained);
                if drains != self.drains.advised.is_some() {
                    self.drains.advised = drains.then(|| begin_drain(None, Some(settings.drain), false, now));
                }
                self.backend.advice = advice;
                self.show_drain();
                self.show_admission();
            }
            Event::DrainRequested { within, .. } => {
                self.drains.ordered = Some(begin_drain(self.drains.ordered, within, false, now));
                self.show_drain();
            }
            Event::DrainCancelled { .. } => {
                if self.drains.ordered.take().is_none() {
                    return Change::Nothing;
                }
                self.show_drain();
            }
            Event::Retiring { within, .. } => {
                self.drains.retiring = Some(begin_drain(self.drains.retiring, within, false, now));
                self.show_drain();
            }
            Event::Spared { .. } => {
                if self.drains.retiring.take().is_none() {
                    return Change::Nothing;
                }
                self.show_drain();
            }
            Event::Leaving { within, .. } => {
                let is_new = !self.leaves();
                self.drains.leaving = Some(begin_drain(self.drains.leaving, Some(within), true, now));
                self.show_drain();
                return if is_new { Change::Ring } else { Change::Backend };
            }
            Event::Joined { .. }
            | Event::Beside { .. }
            | Event::Flipped { .. }
            | Event::Left { .. }
            | Event::Configured(_)
            | Event::Awaited(_) => {
                return Change::Nothing;
            }
        }
        Change::Backend
    }

    fn started(&mut self, address: Address, replica: Option<Replica>, now: Instant) {
        let backend = &mut self.backend;
        // The same container with a new address is not a restart.
        if replica.is_some() && self.runs.last != replica {
            backend.restarts += u64::from(self.runs.any);
            self.runs = Runs::of(replica.clone());
        }
        backend.address = Some(address);
        backend.replica = replica;
        self.forget(now);
        self.crash_loop = false;
    }

    /// The replica has another name, and is the same one.
    fn renamed(&mut self, replica: Replica) -> Change {
        if self.backend.replica.is_none() {
            return Change::Nothing;
        }
        self.backend.replica = Some(replica.clone());
        self.runs.last = Some(replica);
        Change::Backend
    }

    fn stopped(&mut self, crash_loop: bool, exit: Option<Arc<Exit>>, now: Instant) {
        (self.backend.address, self.backend.replica) = (None, None);
        if let Some(exit) = exit {
            // An exit code proves that the replica ran, even if no event reported it as started.
            if exit.code.is_some() && !std::mem::take(&mut self.runs.is_seen) {
                self.backend.restarts += u64::from(self.runs.any);
                self.runs.any = true;
            }
            self.backend.last_exit = Some(exit);
        }
        self.forget(now);
        self.crash_loop = crash_loop;
    }

    /// Publishes the drain.
    fn show_drain(&mut self) {
        self.backend.drain = self.drains.shown();
    }

    /// Publishes the fraction of its keys that the backend gets: what slow start gives it, and its agent advises.
    fn show_admission(&mut self) {
        let advised = self.backend.advice.as_ref().map_or(Admission::ALL, |advice| advice.part);
        self.backend.admission = self.warmth.part.of(advised);
    }

    /// Whether the agent says that the backend does not work.
    fn is_advised_down(&self) -> bool {
        self.backend.advice.as_ref().is_some_and(|advice| advice.is_down)
    }

    /// Whether a command has drained the backend.
    pub(super) fn is_drain_ordered(&self) -> bool {
        self.drains.ordered.is_some()
    }

    fn leaves(&self) -> bool {
        self.drains.leaving.is_some()
    }

    /// Clears what was known about the previous replica, because it does not apply to the next.
    fn forget(&mut self, now: Instant) {
        self.backend.health = Health { last: None, verdict: None, since: now };
        (self.verdict, self.backend.reported_bad, self.is_ejected) = (None, false, false);
        (self.drains.retiring, self.drains.advised, self.backend.advice) = (None, None, None);
        self.show_drain();
        self.show_admission();
        self.backend.live.failed_in_a_row.store(0, Ordering::Relaxed);
    }

    /// The backend became healthy. It starts slowly if other backends can carry its load meanwhile.
    pub(super) fn begin(&mut self, others_serve: bool, settings: &Settings, now: Instant) {
        let is_first = std::mem::take(&mut self.is_first);
        let is_slow = others_serve && !is_first && !settings.slow_start.is_zero();
        self.warmth = if is_slow { Warmth::begin(now) } else { Warmth::default() };
        self.show_admission();
    }

    /// Applies the passing of time: slow start returns keys, and Ringway resets connections whose drain deadline has
    /// passed.
    pub(super) fn pass(&mut self, settings: &Settings, now: Instant) -> Change {
        if self.drains.deadline().is_some_and(|deadline| deadline <= now) && self.active() > 0 {
            self.backend.live.evictions.request(Eviction::Drained);
        }
        if !self.warmth.pass(settings.slow_start, self.backend.state == State::Healthy, now) {
            return Change::Nothing;
        }
        self.show_admission();
        Change::Backend
    }

    /// When to call [`pass`](Self::pass) again.
    pub(super) fn due(&self, settings: &Settings, now: Instant) -> Option<Instant> {
        let drain = match self.drains.deadline() {
            _ if self.leaves() => Some(now + LOOK),
            Some(deadline) if deadline > now => Some(deadline),
            Some(_) if self.active() > 0 => Some(now + LOOK),
            // A connect that began before the deadline may complete late.
            Some(deadline) if now < deadline + LATE => Some(now + LATE / 60),
            _ => None,
        };
        drain.into_iter().chain(self.warmth.due(settings.slow_start, now)).min()
    }

    /// The backend leaves, and it has no connections left.
    pub(super) fn is_gone(&self, now: Instant) -> bool {
        let has_settled = |drain: Drain| now.saturating_duration_since(drain.since) >= LOOK;
        self.drains.leaving.is_some_and(has_settled) && self.active() == 0
    }

    fn active(&self) -> u64 {
        self.backend.live.active.load(Ordering::Relaxed)
    }
}
