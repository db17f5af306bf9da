//! When to check which replica, and what the results say. Pure: the time is an argument.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Settings;
use super::check::Outcome;
use super::rise_fall::RiseFall;
use crate::address::Address;
use crate::backend::{Backend, Live, OwnCheck, Replica, State};
use crate::control::Event;
use crate::table::Members;

/// Interval between checks of a backend without a verdict, which should serve as soon as it can.
const EAGER: Duration = Duration::from_millis(100);

/// The replicas under check, and the times of their next checks.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    subjects: BTreeMap<Arc<str>, Subject>,
    /// The next check of each subject that is not being checked. Entries of subjects that have gone are skipped.
    due: BinaryHeap<Reverse<(Instant, Ticket)>>,
    /// The roster that the subjects are from.
    roster: Option<u64>,
    /// The number of the last subject.
    number: u64,
}

/// Identifies a subject while it is checked.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ticket {
    /// Distinguishes the subject from earlier ones with the same id.
    number: u64,
    id: Arc<str>,
}

/// A replica under check.
#[derive(Debug)]
struct Subject {
    number: u64,
    incarnation: u64,
    address: Address,
    /// How the replica itself says that it is checked.
    own: Option<OwnCheck>,
    live: Arc<Live>,
    rise_fall: RiseFall,
    since: Instant,
    /// Checks so far.
    checks: u64,
    /// Checks without an answer since the last one that had one, yes or no; `None`: none has had one.
    silent: Option<u32>,
    /// What the publisher was told last: the verdict, whether the answers say no, and the result.
    reported: Option<(Option<bool>, bool, Arc<str>)>,
}

impl Ticket {
    /// The id of the backend.
    pub(super) fn id(&self) -> &str {
        &self.id
    }
}

impl Schedule {
    /// Follows the table: adds new replicas, and drops those that have gone. `trusts`: a replica that serves counts as healthy.
    pub(super) fn follow(&mut self, members: &Members, trusts: bool, now: Instant) {
        if self.roster.replace(members.roster()) == Some(members.roster()) {
            return;
        }
        let before = std::mem::take(&mut self.subjects).into_iter();
        let mut before: HashMap<_, _> = before.map(|(id, subject)| (subject.incarnation, (id, subject))).collect();
        for backend in members {
            let Some(address) = &backend.address else { continue };
            let known = before.remove(&backend.incarnation);
            let mut begin = || {
                self.number += 1;
                let ticket = Ticket { number: self.number, id: Arc::clone(&backend.id) };
                self.due.push(Reverse((now, ticket)));
                self.number
            };
            let subject = match known {
                Some((id, subject)) if id == backend.id => subject,
                // The replica that stood beside the slot fills it now: what is known about it stays true.
                // The publisher may have missed the last result, which came under the other id.
                Some((_, subject)) => Subject { number: begin(), reported: None, ..subject },
                None => Subject::of(backend, address, begin(), trusts, now),
            };
            self.subjects.insert(Arc::clone(&backend.id), subject);
        }
    }

    /// When the next check is due.
    pub(super) fn next(&self) -> Option<Instant> {
        self.due.peek().map(|Reverse((at, _))| *at)
    }

    /// Takes a check that is due. Returns the address to check, and how the replica itself says that it is checked.
    pub(super) fn start(&mut self, now: Instant) -> Option<(Ticket, Address, Option<OwnCheck>)> {
        while self.next().is_some_and(|at| at <= now) {
            let Reverse((_, ticket)) = self.due.pop()?;
            if let Some(subject) = self.subjects.get(&ticket.id).filter(|subject| subject.number == ticket.number) {
                return Some((ticket, subject.address.clone(), subject.own.clone()));
            }
        }
        None
    }

    /// Counts a result and schedules the next check. Returns what the publisher does not know yet.
    pub(super) fn finish(
        &mut self,
        ticket: &Ticket,
        outcome: Outcome,
        settings: &Settings,
        now: Instant,
    ) -> Option<Event> {
        let subject = self.subjects.get_mut(&ticket.id).filter(|subject| subject.number == ticket.number)?;
        subject.checks += 1;
        let (passed, result): (_, Arc<str>) = match outcome {
            Outcome::Passed => {
                subject.silent = Some(0);
                (true, "ok".into())
            }
            Outcome::Failed(reason) => {
                // One lost answer does not make a standby unhealthy.
                let is_answer = reason.is_answer;
                subject.silent = if is_answer { Some(0) } else { subject.silent.map(|count| count.saturating_add(1)) };
                (false, (*reason).into())
            }
            Outcome::NotDone(_) => {
                self.due.push(Reverse((now + settings.interval, ticket.clone())));
                return None;
            }
        };
        let has_declined = subject.silent.is_some_and(|count| count < settings.fall);
        let counter = if passed { &subject.live.counters.checks_passed } else { &subject.live.counters.checks_failed };
        counter.fetch_add(1, Ordering::Relaxed);
        let is_forgiven = !passed
            && subject.rise_fall.verdict().is_none()
            && now.saturating_duration_since(subject.since) < settings.grace;
        if !is_forgiven {
            subject.rise_fall.observe(passed, settings.rise, settings.fall);
        }
        let verdict = subject.rise_fall.verdict();
        let wait = match verdict {
            None => settings.interval.min(EAGER),
            Some(verdict) if verdict != passed => {
                spread(ticket, settings.fast_interval, settings.jitter, subject.checks)
            }
            Some(_) => spread(ticket, settings.interval, settings.jitter, subject.checks),
        };
        self.due.push(Reverse((now + wait, ticket.clone())));
        let report = (verdict, has_declined, Arc::clone(&result));
        if subject.reported.as_ref() == Some(&report) {
            return None;
        }
        subject.reported = Some(report);
        let (id, incarnation) = (Arc::clone(&ticket.id), subject.incarnation);
        Some(Event::Checked { id, incarnation, healthy: verdict, has_declined, result })
    }
}

impl Subject {
    fn of(backend: &Backend, address: &Address, number: u64, trusts: bool, now: Instant) -> Self {
        // If checks were off before, a backend that serves counts as healthy.
        let verdict = backend.health.verdict.or_else(|| (backend.state == State::Healthy).then_some(true));
        let verdict = verdict.filter(|_| trusts);
        Self {
            number,
            incarnation: backend.incarnation,
            address: address.clone(),
            own: backend.replica.as_ref().and_then(Replica::own_check).cloned(),
            live: Arc::clone(&backend.live),
            rise_fall: RiseFall::new(verdict),
            since: now,
            checks: 0,
            // A standby has answered.
            silent: (backend.state == State::Standby).then_some(0),
            reported: None,
        }
    }
}

/// The interval plus up to `percent` of it. The addition differs by backend and by check.
fn spread(ticket: &Ticket, interval: Duration, percent: u8, check: u64) -> Duration {
    let chance = u32::from(seahash::hash_seeded(ticket.id.as_bytes(), check, 0, 0, 0).to_le_bytes()[0]);
    interval + interval / 100 * u32::from(percent) * chance / 255
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Membership;
    use crate::control::health::check::Reason;
    use crate::control::health::{Check, Kind};
    use crate::control::publisher::{self, Publisher};

    const SECOND: Duration = Duration::from_secs(1);

    fn settings() -> Settings {
        Settings {
            check: Check {
                kind: Kind::Tcp,
                port: None,
                send_proxy: crate::proxy_header::OwnHeader::Absent,
                outgoing: None,
            },
            interval: 2 * SECOND,
            fast_interval: SECOND,
            jitter: 0,
            timeout: SECOND,
            rise: 2,
            fall: 3,
            grace: Duration::ZERO,
            is_exclusive: false,
        }
    }

    /// The members of a pool in which these backends have an address.
    fn members(started: &[(&str, u16)]) -> Members {
        let settings = publisher::Settings { is_checked: true, ..publisher::Settings::plain() };
        let known = started.iter().flat_map(|&(id, port)| {
            let address = Address::Ip(([127, 0, 0, 1], port).into());
            [
                Event::Joined { id: id.into(), membership: Membership::weighing(1) },
                Event::Started { id: id.into(), address, replica: None },
            ]
        });
        Publisher::new("p".into(), settings, known, Instant::now()).table().load().backends().clone()
    }

    fn failed() -> Outcome {
        Outcome::Failed("refused".into())
    }

    #[test]
    fn a_check_follows_the_last_one_after_the_interval_and_sooner_after_a_change() {
        let (mut schedule, mut now, settings) = (Schedule::default(), Instant::now(), settings());
        schedule.follow(&members(&[("a", 1)]), true, now);
        let mut step = |outcome: Outcome| {
            let (ticket, ..) = schedule.start(now).unwrap();
            assert!(schedule.start(now).is_none(), "one check at a time");
            let event = schedule.finish(&ticket, outcome, &settings, now);
            let wait = schedule.next().unwrap() - now;
            now += wait;
            let verdict = event.map(|event| match event {
                Event::Checked { healthy, result, .. } => (healthy, result.to_string()),
                other => panic!("{other:?}"),
            });
            (wait, verdict)
        };
        let said = |healthy: bool, text: &str| Some((Some(healthy), text.to_owned()));
        assert_eq!(step(Outcome::Passed), (2 * SECOND, said(true, "ok")));
        assert_eq!(step(Outcome::Passed), (2 * SECOND, None), "a repeated result is no news");
        assert_eq!(step(failed()), (SECOND, said(true, "refused")));
        assert_eq!(step(failed()), (SECOND, None));
        assert_eq!(step(failed()), (2 * SECOND, said(false, "refused")));
        assert_eq!(step(Outcome::NotDone(crate::backend::ConnectFailure::NoPorts)), (2 * SECOND, None));
        assert_eq!(step(Outcome::Passed), (SECOND, said(false, "ok")));
        assert_eq!(step(Outcome::Passed), (2 * SECOND, said(true, "ok")));
    }

    #[test]
    fn what_is_known_about_a_replica_goes_with_it_to_the_id_of_its_slot() {
        let (mut schedule, now, settings) = (Schedule::default(), Instant::now(), settings());
        let known = members(&[("a", 1), ("a+", 2)]);
        schedule.follow(&known, true, now);
        for result in [Outcome::Passed, failed()] {
            let (ticket, ..) = schedule.start(now).unwrap();
            schedule.finish(&ticket, result, &settings, now);
        }
        let verdicts = |schedule: &Schedule| {
            schedule.subjects.iter().map(|(id, one)| (id.to_string(), one.rise_fall.verdict())).collect::<Vec<_>>()
        };
        let before = verdicts(&schedule);
        let [first, second] = [&known[0], &known[1]];
        let other = |one: &Backend, of: &Backend| Backend { id: Arc::clone(&one.id), ..of.clone() };
        let flipped = Members::new([other(first, second), other(second, first)], known.roster() + 1);
        schedule.follow(&flipped, true, now);
        let after = verdicts(&schedule);
        assert_eq!((&after[0].1, &after[1].1), (&before[1].1, &before[0].1));
        let (ticket, address, _) = schedule.start(now).unwrap();
        assert_eq!(address, *flipped.find(ticket.id()).unwrap().address.as_ref().unwrap());
        assert!(schedule.finish(&ticket, Outcome::Passed, &settings, now).is_some());
    }

    #[test]
    fn the_result_of_a_replica_that_has_gone_counts_for_nothing() {
        let (mut schedule, now, settings) = (Schedule::default(), Instant::now(), settings());
        schedule.follow(&members(&[("a", 1), ("b", 2)]), true, now);
        let (old, ..) = schedule.start(now).unwrap();
        // A publisher gives each replica of a pool another number.
        let replaced =
            members(&[("b", 3)]).iter().map(|one| Backend { incarnation: 3, ..one.clone() }).collect::<Vec<_>>();
        let replaced = Members::new(replaced, 99);
        schedule.follow(&replaced, true, now + SECOND);
        assert!(schedule.finish(&old, failed(), &settings, now).is_none());
        let later = now + 10 * SECOND;
        let mut started = Vec::new();
        while let Some((ticket, address, _)) = schedule.start(later) {
            started.push((ticket.id, address.ip().unwrap().port()));
        }
        assert_eq!(started, [("b".into(), 3)], "only the new replica is checked");
    }

    #[test]
    fn one_lost_answer_does_not_make_a_standby_silent() {
        let (mut schedule, mut now, settings) = (Schedule::default(), Instant::now(), settings());
        schedule.follow(&members(&[("a", 1)]), false, now);
        let mut step = |outcome: Outcome| {
            let (ticket, ..) = schedule.start(now).expect("a check is due");
            let event = schedule.finish(&ticket, outcome, &settings, now);
            now = schedule.next().unwrap();
            match event {
                Some(Event::Checked { healthy, has_declined, .. }) => Some((healthy, has_declined)),
                other => {
                    assert!(other.is_none(), "{other:?}");
                    None
                }
            }
        };
        let no = || Outcome::Failed(Reason::answer("status 503"));
        for expected in [Some((None, true)), None, Some((Some(false), true))] {
            assert_eq!(step(no()), expected);
        }
        assert_eq!(step(failed()), Some((Some(false), true)));
        assert_eq!(step(failed()), None);
        assert_eq!(step(failed()), Some((Some(false), false)));
        assert_eq!(step(no()), Some((Some(false), true)));
        // Not yet the primary, and not silent either.
        assert_eq!(step(Outcome::Passed), Some((Some(false), true)));
        assert_eq!(step(Outcome::Passed), Some((Some(true), true)));
        for expected in [Some((Some(true), true)), None, Some((Some(false), false))] {
            assert_eq!(step(failed()), expected);
        }
    }
}
