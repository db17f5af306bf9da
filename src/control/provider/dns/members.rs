//! The backends that follow from the answers to a DNS question, and when to ask next. Pure: the time is an argument.
//!
//! The order of an answer has no meaning. A failed look-up removes nothing, for as long as it fails. A complete answer removes
//! a backend that has been missing from complete answers for `gone_after`: some servers rotate a part of their addresses
//! through the answers, and others answer with nothing for a moment. Priorities of SRV records are tiers. A weight is compared with
//! those of all backends that are there and have the same priority, also with those that the last answer misses.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::WEIGHTS;
use super::answer::{Answer, Found};
use crate::address::Address;
use crate::backend::Membership;
use crate::control::Event;

/// Wait after the first failure; doubles with each further one.
const FIRST_RETRY: Duration = Duration::from_secs(1);

/// What applies to the backends of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// How long a backend must be missing from complete answers before it leaves.
    pub gone_after: Duration,
    /// The time that connections have when their backend leaves.
    pub drain: Duration,
    /// The most backends.
    pub most: usize,
    /// Weights are steps from 1 to [`WEIGHTS`], in proportion to the highest. Otherwise all are 1.
    pub has_weights: bool,
}

/// The backends of a pool.
#[derive(Debug, Default)]
pub struct Members {
    known: BTreeMap<Arc<str>, Member>,
    /// When the last answer came, complete or not.
    last: Option<Instant>,
}

#[derive(Debug)]
struct Member {
    /// Unknown for a target of SRV records whose own look-up has failed so far.
    address: Option<SocketAddr>,
    /// The last answer did not have the address, but others of the same target.
    misses_address: bool,
    /// Priority and weight as in the record. Unknown for a backend of an earlier process that no answer has had yet.
    rank: Option<(u16, u16)>,
    /// How the backend has joined; `None`: not yet.
    membership: Option<Membership>,
    /// The time of the first of the complete answers in a row that did not have it. Time in which look-ups failed does not count.
    missing_since: Option<Instant>,
}

/// What an answer has changed.
#[derive(Debug, Default)]
pub struct Changes {
    /// For the publisher, in order.
    pub events: Vec<Event>,
    /// Backends that joined.
    pub joined: u64,
    /// Backends that have another address or weight.
    pub changed: u64,
    /// Backends that leave.
    pub left: u64,
    /// Backends of the answer that found no room.
    pub too_many: usize,
}

impl Members {
    /// Backends that an earlier process knew. They stay until answers say otherwise.
    pub fn inherited(known: impl IntoIterator<Item = (Arc<str>, SocketAddr, Membership)>) -> (Self, Vec<Event>) {
        let mut members = Self::default();
        let mut events = Vec::new();
        for (id, address, membership) in known {
            events.extend(joined(&id, Some(address), membership));
            let (address, membership) = (Some(address), Some(membership));
            members
                .known
                .insert(id, Member { address, misses_address: false, rank: None, membership, missing_since: None });
        }
        (members, events)
    }

    /// Number of backends, with those that are missing from the last answers.
    pub fn count(&self) -> usize {
        self.known.values().filter(|member| member.membership.is_some()).count()
    }

    /// Takes in an answer. `fails` tells whether a backend fails its checks or connects.
    pub fn learn(&mut self, answer: &Answer, rules: &Rules, fails: impl Fn(&str) -> bool, now: Instant) -> Changes {
        let mut changes = Changes::default();
        self.miss(answer, rules, &mut changes, now);
        for found in answer.found.values() {
            if let Some(member) = self.known.get_mut(&found.id) {
                member.rank = Some(found.rank);
                let before = member.address;
                member.find_address(found, fails(&found.id));
                if member.membership.is_some()
                    && let Some(address) = member.address.filter(|_| member.address != before)
                {
                    changes.changed += u64::from(before.is_some());
                    changes.events.push(started(&found.id, address));
                }
            } else if self.known.len() < rules.most {
                let (address, rank) = (found.addresses.first().copied(), Some(found.rank));
                let member = Member { address, misses_address: false, rank, membership: None, missing_since: None };
                self.known.insert(Arc::clone(&found.id), member);
            } else {
                changes.too_many += 1;
            }
        }
        self.show(rules, &mut changes);
        // The publisher may publish in between: backends join before others leave.
        changes.events.sort_by_key(|event| matches!(event, Event::Leaving { .. }));
        self.last = Some(now);
        changes
    }

    /// Removes what complete answers have missed for too long.
    fn miss(&mut self, answer: &Answer, rules: &Rules, changes: &mut Changes, now: Instant) {
        let passed = self.last.map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        self.known.retain(|id, member| {
            if answer.found.contains_key(id) {
                member.missing_since = None;
                return true;
            }
            if !answer.is_complete {
                // A part of an answer shows who is there, and not who is gone.
                member.missing_since = member.missing_since.map(|since| since + passed);
                return true;
            }
            let since = *member.missing_since.get_or_insert(now);
            let stays = now.saturating_duration_since(since) < rules.gone_after;
            if !stays && member.membership.is_some() {
                changes.leave(id, rules);
            }
            stays
        });
    }

    /// Lets all backends join, each with its weight and with its priority as its tier.
    fn show(&mut self, rules: &Rules, changes: &mut Changes) {
        // Weights of different priorities have nothing to do with each other (RFC 2782).
        let mut most = BTreeMap::new();
        for (priority, weight) in self.known.values().filter_map(|member| member.rank) {
            let most = most.entry(priority).or_insert(weight);
            *most = weight.max(*most);
        }
        for (id, member) in &mut self.known {
            // Without a rank, nobody knows better than the earlier process.
            let Some((priority, weight)) = member.rank else { continue };
            let weight = if rules.has_weights { scaled(weight, most[&priority]) } else { 1 };
            let wanted = Membership { tier: priority, ..Membership::weighing(weight) };
            match member.membership.replace(wanted) {
                None => {
                    changes.joined += 1;
                    changes.events.extend(joined(id, member.address, wanted));
                }
                Some(before) if before != wanted => {
                    changes.changed += 1;
                    changes.events.push(Event::Joined { id: Arc::clone(id), membership: wanted });
                }
                Some(_) => {}
            }
        }
    }

    /// When the next backend is due to leave, if the answers go on missing it.
    fn next_gone(&self, gone_after: Duration) -> Option<Instant> {
        let missing = self.known.values().filter_map(|member| member.missing_since).min()?;
        missing.checked_add(gone_after)
    }
}

impl Changes {
    fn leave(&mut self, id: &Arc<str>, rules: &Rules) {
        self.left += 1;
        self.events.push(Event::Leaving { id: Arc::clone(id), within: rules.drain });
    }
}

impl Member {
    /// Chooses the address to use. A backend that works keeps its address until two answers in a row miss it. One that fails tries the
    /// next address of its name.
    fn find_address(&mut self, found: &Found, fails: bool) {
        let position = self.address.and_then(|address| found.addresses.iter().position(|one| *one == address));
        let next = match (self.address, position) {
            (Some(_), Some(position)) if fails => (position + 1) % found.addresses.len(),
            (Some(_), Some(_)) => {
                self.misses_address = false;
                return;
            }
            (Some(_), None) if found.is_partial => return,
            (Some(_), None) if !fails && !std::mem::replace(&mut self.misses_address, true) => return,
            _ => 0,
        };
        self.misses_address = false;
        self.address = found.addresses.get(next).copied().or(self.address);
    }
}

/// A weight from 1 to [`WEIGHTS`], in proportion to the highest. All have the highest if all are 0.
fn scaled(weight: u16, most: u16) -> u32 {
    if most == 0 {
        return WEIGHTS;
    }
    let (weight, most) = (u32::from(weight), u32::from(most));
    ((weight * WEIGHTS + most / 2) / most).max(1)
}

fn joined(id: &Arc<str>, address: Option<SocketAddr>, membership: Membership) -> impl Iterator<Item = Event> {
    let joined = Event::Joined { id: Arc::clone(id), membership };
    [joined].into_iter().chain(address.map(|address| started(id, address)))
}

fn started(id: &Arc<str>, address: SocketAddr) -> Event {
    Event::Started { id: Arc::clone(id), address: Address::Ip(address), replica: None }
}

/// When to ask next.
#[derive(Debug)]
pub struct Schedule {
    /// Failures in a row.
    failures: u32,
    /// Questions in a row that were asked early because a backend fails.
    hurried: u32,
    /// When the next question is due.
    pub next: Instant,
}

impl Schedule {
    /// Asks at once.
    pub fn new(now: Instant) -> Self {
        Self { failures: 0, hurried: 0, next: now }
    }

    /// Failures in a row.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Sets the next question after an answer: as its TTL says within `refresh`, or when a missing backend is due to leave. After
    /// a failure, the wait doubles from 1 s to the longest `refresh`. `chance` from 0 to 1 makes a TTL up to 10 % shorter, so that
    /// instances do not all ask at the same moment.
    pub fn answered(
        &mut self,
        answer: &Answer,
        members: &Members,
        refresh: &RangeInclusive<Duration>,
        gone_after: Duration,
        chance: f64,
        now: Instant,
    ) {
        let retry = if answer.fault.is_some() {
            let wait = doubled(self.failures, refresh);
            self.failures = self.failures.saturating_add(1);
            Some(now + wait)
        } else {
            self.failures = 0;
            None
        };
        let expiry = answer.is_complete.then(|| {
            let ttl = answer.ttl.unwrap_or(*refresh.start()).clamp(*refresh.start(), *refresh.end());
            now + ttl.mul_f64(1.0 - chance / 10.0).max(*refresh.start())
        });
        let gone = members.next_gone(gone_after).map(|at| at.max(now + *refresh.start()));
        let next = [retry, expiry, gone.filter(|_| answer.is_complete)].into_iter().flatten().min();
        self.next = next.unwrap_or(now + *refresh.end());
    }

    /// A backend fails its checks or connects: the name may have other addresses by now. Asks earlier, and less and less
    /// early while backends go on failing. Without failing backends, the next failure is in a hurry again.
    pub fn hurry(&mut self, any_fails: bool, refresh: &RangeInclusive<Duration>, now: Instant) {
        if any_fails {
            self.next = self.next.min(now + doubled(self.hurried, refresh));
        } else {
            self.hurried = 0;
        }
    }

    /// A question is asked now, while a backend fails or not.
    pub fn asks(&mut self, any_fails: bool) {
        self.hurried = if any_fails { self.hurried.saturating_add(1) } else { 0 };
    }
}

/// The wait after this number of failures.
fn doubled(times: u32, refresh: &RangeInclusive<Duration>) -> Duration {
    let first = FIRST_RETRY.clamp(*refresh.start(), *refresh.end());
    first.saturating_mul(1 << times.min(20)).min(*refresh.end())
}
