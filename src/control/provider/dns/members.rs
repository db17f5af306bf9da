//! The backends that follow from the answers to a DNS question, and when to ask next. Pure: the time is an argument.
//!
//! The order of an answer has no meaning. A failed look-up removes nothing, for as long as it fails. A complete answer removes
//! a backend that has been missing from complete answers for `gone_after`: some servers rotate a part of their addresses
//! through the answers, and others answer with nothing for a moment.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::lookup::{Answer, Found};
use crate::address::Address;
use crate::control::Event;

/// The most backends of a pool. An answer over TCP has room for 4,000 addresses.
const MOST: usize = 1000;

/// Wait after the first failure; doubles with each further one.
const FIRST_RETRY: Duration = Duration::from_secs(1);

/// The backends of a pool.
#[derive(Debug, Default)]
pub struct Members {
    known: BTreeMap<Arc<str>, Member>,
}

#[derive(Debug)]
struct Member {
    /// Unknown for a target of SRV records whose own look-up has failed so far.
    address: Option<SocketAddr>,
    weight: u32,
    /// The time of the first of the complete answers in a row that did not have it.
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
    /// Backends that an earlier process knew: their ids, addresses and weights. They stay until answers say otherwise.
    pub fn inherited(known: impl IntoIterator<Item = (Arc<str>, SocketAddr, u32)>) -> (Self, Vec<Event>) {
        let mut members = Self::default();
        let mut events = Vec::new();
        for (id, address, weight) in known {
            events.extend(joined(&id, Some(address), weight));
            members.known.insert(id, Member { address: Some(address), weight, missing_since: None });
        }
        (members, events)
    }

    /// Number of backends, with those that are missing from the last answers.
    pub fn count(&self) -> usize {
        self.known.len()
    }

    /// Whether one of the backends has this id.
    pub fn has(&self, id: &str) -> bool {
        self.known.contains_key(id)
    }

    /// Takes in an answer. `drain` is the time that connections have when their backend leaves.
    pub fn learn(&mut self, answer: &Answer, gone_after: Duration, drain: Duration, now: Instant) -> Changes {
        let mut changes = Changes::default();
        for found in answer.found.values() {
            if let Some(member) = self.known.get_mut(&found.id) {
                member.missing_since = None;
                let address = choose(member.address, found);
                if member.weight != found.weight {
                    member.weight = found.weight;
                    changes.changed += 1;
                    changes.events.push(Event::Joined { id: Arc::clone(&found.id), weight: found.weight });
                }
                if let Some(new) = address.filter(|_| address != member.address) {
                    changes.changed += u64::from(member.address.is_some());
                    member.address = Some(new);
                    changes.events.push(started(&found.id, new));
                }
            } else if self.known.len() < MOST {
                let address = choose(None, found);
                changes.joined += 1;
                changes.events.extend(joined(&found.id, address, found.weight));
                let member = Member { address, weight: found.weight, missing_since: None };
                self.known.insert(Arc::clone(&found.id), member);
            } else {
                changes.too_many += 1;
            }
        }
        // A part of an answer shows who is there, and not who is gone.
        if answer.fault.is_none() {
            self.known.retain(|id, member| {
                if answer.found.contains_key(id) {
                    return true;
                }
                let since = *member.missing_since.get_or_insert(now);
                let stays = now.saturating_duration_since(since) < gone_after;
                if !stays {
                    changes.left += 1;
                    changes.events.push(Event::Leaving { id: Arc::clone(id), within: drain });
                }
                stays
            });
        }
        changes
    }

    /// When the next backend is due to leave, if the answers go on missing it.
    fn next_gone(&self, gone_after: Duration) -> Option<Instant> {
        let missing = self.known.values().filter_map(|member| member.missing_since).min()?;
        missing.checked_add(gone_after)
    }
}

/// The address to use: the current one unless a complete answer does not have it, else the first one.
fn choose(current: Option<SocketAddr>, found: &Found) -> Option<SocketAddr> {
    let stays = current.filter(|address| found.is_partial || found.addresses.contains(address));
    stays.or_else(|| found.addresses.first().copied())
}

fn joined(id: &Arc<str>, address: Option<SocketAddr>, weight: u32) -> impl Iterator<Item = Event> {
    let joined = Event::Joined { id: Arc::clone(id), weight };
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
        if answer.fault.is_some() {
            let wait = doubled(self.failures, refresh);
            self.failures = self.failures.saturating_add(1);
            self.next = now + wait;
            return;
        }
        self.failures = 0;
        let ttl = answer.ttl.unwrap_or(*refresh.start()).clamp(*refresh.start(), *refresh.end());
        let wait = ttl.mul_f64(1.0 - chance / 10.0).max(*refresh.start());
        let gone = members.next_gone(gone_after).map(|at| at.max(now + *refresh.start()));
        self.next = [Some(now + wait), gone].into_iter().flatten().min().unwrap_or(now + wait);
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
