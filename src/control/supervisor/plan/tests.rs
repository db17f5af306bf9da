mod rollouts;
mod simulation;

use std::sync::Arc;

use super::seat::UNJUDGED;
use super::*;

const POLICY: Policy = Policy {
    backoff: Duration::from_millis(200),
    max_backoff: Duration::from_secs(30),
    stable_after: Duration::from_secs(60),
    crash_loop_after: 5,
    replace_after: Some(Duration::from_secs(30)),
};

fn slots(count: usize, now: Instant) -> Vec<Slot> {
    (1..=count).map(|n| Slot::new(format!("echo-{n}").into(), now)).collect()
}

/// Slots whose replicas run and are healthy.
fn healthy(count: usize, now: Instant) -> Vec<Slot> {
    let mut slots = slots(count, now);
    for slot in &mut slots {
        slot.front.running(false, now);
        slot.front.judged(Some(true), now);
    }
    slots
}

const PACE: Pace = Pace {
    order: Order::StopFirst,
    parallel: 1,
    pause: Duration::ZERO,
    healthy_for: Duration::ZERO,
    on_failure: OnFailure::Rollback,
    drain: Duration::ZERO,
};

const START_FIRST: Pace = Pace { order: Order::StartFirst, healthy_for: Duration::from_secs(5), ..PACE };

fn going(pace: &Pace) -> Going<'_> {
    Going { pace, stage: Stage::Running, is_settled: true, last_step: None }
}

fn plan_of(wanted: usize, slots: &[Slot], policy: &Policy, now: Instant) -> Plan {
    plan(wanted, slots, policy, going(&PACE), now)
}

fn actions(wanted: usize, slots: &[Slot], now: Instant) -> Vec<Action> {
    plan_of(wanted, slots, &POLICY, now).actions
}

#[test]
fn empty_slots_are_filled_and_surplus_slots_are_drained_and_stopped() {
    let now = Instant::now();
    let mut slots = slots(3, now);
    assert_eq!(
        plan_of(2, &slots, &POLICY, now),
        Plan { actions: vec![Action::Start(Place::front(0)), Action::Start(Place::front(1))], wake: None }
    );
    for slot in &mut slots {
        slot.front.starting();
    }
    assert_eq!(actions(3, &slots, now), [], "a start that has begun is not planned again");
    for slot in &mut slots {
        slot.front.running(false, now);
    }
    assert_eq!(actions(3, &slots, now), []);
    assert_eq!(actions(2, &slots, now), [Action::Drain(Place::front(2), Why::Surplus)]);
    slots[2].front.draining(Why::Surplus);
    assert_eq!(actions(2, &slots, now), []);
    slots[2].front.drained();
    assert_eq!(actions(2, &slots, now), [Action::Stop(Place::front(2), Why::Surplus)]);
    slots[2].front.stopping(Why::Surplus);
    assert_eq!(actions(2, &slots, now), []);
    slots[2].front.not_stopped();
    assert_eq!(actions(2, &slots, now), [Action::Drain(Place::front(2), Why::Surplus)]);
}

#[test]
fn a_draining_surplus_replica_is_kept_if_the_pool_grows_again() {
    let now = Instant::now();
    let mut slots = healthy(3, now);
    slots[2].front.draining(Why::Surplus);
    slots[2].front.drained();
    assert_eq!(actions(3, &slots, now), [Action::Keep(2)]);
    slots[2].front.kept(false);
    assert_eq!(actions(3, &slots, now), []);
    // A replica that drains for another reason leaves for good if its slot becomes surplus.
    slots[2].front.draining(Why::Outdated);
    assert_eq!(actions(3, &slots, now), []);
    assert_eq!(actions(2, &slots, now), [Action::Drain(Place::front(2), Why::Surplus)]);
}

#[test]
fn the_first_restart_is_immediate_and_further_restarts_back_off() {
    let mut now = Instant::now();
    let mut slot = Seat::new("echo-1".into(), now);
    let mut waits = Vec::new();
    for _ in 0..12 {
        slot.running(false, now);
        waits.push(slot.ended(&POLICY, now));
        now += waits.last().copied().unwrap();
    }
    assert_eq!(waits[0], Duration::ZERO);
    for (n, wait) in waits.iter().enumerate().skip(1) {
        let full = POLICY.backoff.saturating_mul(1 << (n - 1)).min(POLICY.max_backoff);
        assert!(*wait <= full && *wait >= full * 4 / 5, "wait {n} is {wait:?} of {full:?}");
    }
    assert!(slot.is_crash_loop(&POLICY));
    slot.running(false, now);
    let lasted = slot.ended(&POLICY, now + POLICY.stable_after);
    assert_eq!(lasted, Duration::ZERO, "a replica that lasted resets the strikes");
    assert!(!slot.is_crash_loop(&POLICY));
}

#[test]
fn the_plan_returns_when_a_wait_ends() {
    let now = Instant::now();
    let mut slots = slots(1, now);
    slots[0].front.ended(&POLICY, now);
    let wait = slots[0].front.ended(&POLICY, now);
    assert_eq!(plan_of(1, &slots, &POLICY, now), Plan { actions: Vec::new(), wake: Some(now + wait) });
    assert_eq!(actions(1, &slots, now + wait), [Action::Start(Place::front(0))]);
}

#[test]
fn a_start_that_could_not_be_tried_is_not_a_strike() {
    let now = Instant::now();
    let mut slots = slots(1, now);
    for _ in 0..20 {
        slots[0].front.starting();
        slots[0].front.postponed(now);
    }
    assert!(!slots[0].front.is_crash_loop(&POLICY));
    assert_eq!(actions(1, &slots, now), [Action::Start(Place::front(0))]);
}

#[test]
fn unhealthy_replicas_are_replaced_one_at_a_time() {
    let began = Instant::now();
    let patience = POLICY.replace_after.unwrap();
    let mut slots = healthy(3, began);
    for (n, slot) in slots.iter_mut().enumerate() {
        slot.front.judged(Some(false), began + Duration::from_secs(3 - n as u64));
    }
    let first_due = began + Duration::from_secs(1) + patience;
    assert_eq!(plan_of(3, &slots, &POLICY, began), Plan { actions: vec![], wake: Some(first_due) });
    let now = began + Duration::from_secs(60);
    assert_eq!(
        actions(3, &slots, now),
        [Action::Stop(Place::front(2), Why::Unhealthy)],
        "the replica that has been unhealthy longest goes first"
    );
    slots[2].front.stopping(Why::Unhealthy);
    assert_eq!(actions(3, &slots, now), []);
    slots[2].front.ended(&POLICY, now);
    assert_eq!(actions(3, &slots, now), [Action::Start(Place::front(2))]);
    slots[2].front.starting();
    slots[2].front.running(false, now);
    assert_eq!(actions(3, &slots, now), [], "the successor has no verdict yet");
    slots[2].front.judged(Some(true), now);
    assert_eq!(actions(3, &slots, now), [Action::Stop(Place::front(1), Why::Unhealthy)]);
}

#[test]
fn an_unhealthy_successor_does_not_block_other_replacements() {
    let began = Instant::now();
    let mut slots = healthy(2, began);
    slots[0].front.judged(Some(false), began);
    slots[1].front.judged(Some(false), began + Duration::from_secs(1));
    let now = began + Duration::from_secs(40);
    slots[0].front.stopping(Why::Unhealthy);
    slots[0].front.ended(&POLICY, now);
    slots[0].front.running(false, now);
    slots[0].front.judged(Some(false), now);
    assert_eq!(actions(2, &slots, now), [Action::Stop(Place::front(1), Why::Unhealthy)]);
}

#[test]
fn a_replica_that_recovers_is_not_replaced() {
    let began = Instant::now();
    let mut slots = healthy(1, began);
    let late = began + Duration::from_secs(29);
    slots[0].front.judged(Some(false), began);
    slots[0].front.judged(Some(true), late);
    slots[0].front.judged(Some(false), late);
    assert_eq!(actions(1, &slots, began + Duration::from_secs(31)), []);
    assert_eq!(
        plan_of(1, &slots, &Policy { replace_after: None, ..POLICY }, late + Duration::from_secs(900)).actions,
        []
    );
}

#[test]
fn outdated_replicas_are_replaced_one_at_a_time_while_all_others_are_healthy() {
    let now = Instant::now();
    let mut slots = slots(3, now);
    for slot in &mut slots {
        slot.front.running(true, now);
    }
    assert_eq!(plan_of(3, &slots, &POLICY, now), Plan { actions: vec![], wake: Some(now + UNJUDGED) });
    assert_eq!(
        actions(3, &slots, now + UNJUDGED),
        [Action::Drain(Place::front(0), Why::Outdated)],
        "the wait for a verdict is over"
    );
    for slot in &mut slots {
        slot.front.judged(Some(true), now);
    }
    for n in 0..3 {
        assert_eq!(actions(3, &slots, now), [Action::Drain(Place::front(n), Why::Outdated)]);
        slots[n].front.draining(Why::Outdated);
        assert_eq!(actions(3, &slots, now), [], "no other replica is drained meanwhile");
        let mut other_hangs = slots.clone();
        other_hangs[(n + 1) % 3].front.judged(Some(false), now);
        let late = now + Duration::from_secs(31);
        let others: Vec<_> = actions(3, &other_hangs, late);
        assert_eq!(
            others,
            [Action::Stop(Place::front((n + 1) % 3), Why::Unhealthy)],
            "an unhealthy replica is still replaced"
        );
        slots[n].front.drained();
        assert_eq!(actions(3, &slots, now), [Action::Stop(Place::front(n), Why::Outdated)]);
        slots[n].front.stopping(Why::Outdated);
        assert_eq!(slots[n].front.ended(&POLICY, now), Duration::ZERO, "a stop by Ringway is not a strike");
        slots[n].front.running(false, now);
        assert_eq!(actions(3, &slots, now), []);
        slots[n].front.judged(Some(true), now);
        assert!(slots[n].front.settle(Duration::ZERO, now));
    }
    assert_eq!(actions(3, &slots, now), []);
}

/// Who has put a wrong change right must not wait for the verdict on it.
#[test]
fn a_successor_without_a_verdict_is_replaced_immediately_if_the_settings_change_again() {
    let now = Instant::now();
    let mut slots = slots(2, now);
    for slot in &mut slots {
        slot.front.running(true, now);
        slot.front.judged(Some(true), now);
    }
    slots[0].front.draining(Why::Outdated);
    slots[0].front.drained();
    slots[0].front.stopping(Why::Outdated);
    slots[0].front.ended(&POLICY, now);
    slots[0].front.running(false, now);
    assert_eq!(actions(2, &slots, now), [], "the successor has no verdict yet");
    slots[0].front.outdated(true);
    assert_eq!(actions(2, &slots, now), [Action::Stop(Place::front(0), Why::Outdated)]);
    slots[0].front.stopping(Why::Outdated);
    assert_eq!(slots[0].front.ended(&POLICY, now), Duration::ZERO);
    slots[0].front.running(false, now);
    assert_eq!(actions(2, &slots, now), [], "one at a time");
}

#[test]
fn changed_settings_start_a_slot_in_a_crash_loop_at_once() {
    let now = Instant::now();
    let mut slots = slots(1, now);
    for _ in 0..POLICY.crash_loop_after {
        slots[0].front.running(false, now);
        slots[0].front.ended(&POLICY, now);
    }
    assert!(slots[0].front.is_crash_loop(&POLICY) && actions(1, &slots, now).is_empty());
    slots[0].front.forgive(now);
    assert_eq!(actions(1, &slots, now), [Action::Start(Place::front(0))]);
    assert!(!slots[0].front.is_crash_loop(&POLICY) && slots[0].front.is_first_try());
}

/// Otherwise a change of the network or the port, which makes all replicas unhealthy, would never be rolled out.
#[test]
fn unhealthy_outdated_replicas_are_replaced_immediately_and_one_at_a_time() {
    let now = Instant::now();
    let mut slots = slots(2, now);
    for slot in &mut slots {
        slot.front.running(true, now);
        slot.front.judged(Some(false), now);
    }
    let patient = Policy { replace_after: None, ..POLICY };
    for policy in [patient, POLICY] {
        assert_eq!(plan_of(2, &slots, &policy, now).actions, [Action::Stop(Place::front(0), Why::Outdated)]);
    }
    slots[0].front.stopping(Why::Outdated);
    assert_eq!(actions(2, &slots, now), []);
    slots[0].front.ended(&POLICY, now);
    slots[0].front.running(false, now);
    slots[0].front.judged(Some(true), now);
    assert_eq!(
        actions(2, &slots, now),
        [Action::Stop(Place::front(1), Why::Outdated)],
        "an unhealthy replica needs no drain"
    );
    let late = now + Duration::from_secs(40);
    assert_eq!(actions(2, &slots, late).len(), 1, "one action, even if the replica is also due as unhealthy");
}
