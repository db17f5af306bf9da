//! Rollouts: the order, the pace, and what happens when a new replica fails.

use super::*;

/// Healthy replicas, all outdated.
fn outdated(count: usize, now: Instant) -> Vec<Slot> {
    let mut slots = healthy(count, now);
    for slot in &mut slots {
        slot.front.outdated(true);
    }
    slots
}

fn act(slots: &[Slot], pace: &Pace, now: Instant) -> Vec<Action> {
    plan(slots.len(), slots, &POLICY, going(pace), now).actions
}

fn wake(slots: &[Slot], pace: &Pace, now: Instant) -> Option<Instant> {
    plan(slots.len(), slots, &POLICY, going(pace), now).wake
}

/// A new replica beside a slot, without a verdict.
fn begin(slot: &mut Slot, now: Instant) {
    slot.beside.starting();
    slot.beside.running(false, now);
}

#[test]
fn a_new_replica_takes_the_slot_when_it_has_been_healthy_for_long_enough_and_the_old_one_drains() {
    let began = Instant::now();
    let mut slots = outdated(2, began);
    assert_eq!(act(&slots, &START_FIRST, began), [Action::Start(Place::beside(0))]);
    slots[0].beside.starting();
    assert_eq!(act(&slots, &START_FIRST, began), []);
    slots[0].beside.running(false, began);
    assert_eq!(act(&slots, &START_FIRST, began), [], "no verdict yet");
    slots[0].beside.judged(Some(true), began);
    let later = began + START_FIRST.healthy_for;
    assert_eq!(wake(&slots, &START_FIRST, began), Some(later));
    slots[0].beside.judged(None, began);
    slots[0].beside.judged(Some(true), later);
    assert_eq!(act(&slots, &START_FIRST, later), [], "it must be healthy without a break");
    let now = later + START_FIRST.healthy_for;
    assert_eq!(act(&slots, &START_FIRST, now), [Action::Flip(0)]);
    slots[0].flip();
    assert_eq!((&*slots[0].front.id, &*slots[0].beside.id), ("echo-1", "echo-1+"));
    assert!(!slots[0].front.is_outdated() && slots[0].beside.is_former);
    assert_eq!(slots[0].beside.drains_for(), Some(Why::Outdated));
    assert_eq!(act(&slots, &START_FIRST, now), [Action::Start(Place::beside(1))], "a drain may take long");
    slots[0].beside.drained();
    assert!(act(&slots, &START_FIRST, now).contains(&Action::Stop(Place::beside(0), Why::Outdated)));
}

#[test]
fn a_slot_whose_old_replica_still_drains_waits_for_its_turn() {
    let now = Instant::now();
    let mut slots = outdated(1, now);
    begin(&mut slots[0], now);
    slots[0].flip();
    slots[0].front.judged(Some(true), now);
    slots[0].front.outdated(true);
    assert_eq!(act(&slots, &START_FIRST, now), []);
    slots[0].beside.drained();
    slots[0].beside.stopping(Why::Outdated);
    slots[0].beside.ended(&POLICY, now);
    assert_eq!(act(&slots, &START_FIRST, now), [Action::Start(Place::beside(0))]);
}

#[test]
fn at_most_parallel_slots_are_replaced_and_each_step_is_followed_by_a_pause() {
    let now = Instant::now();
    for (order, action) in [(Order::StartFirst, "start"), (Order::StopFirst, "drain")] {
        let pace = Pace { order, parallel: 2, pause: Duration::from_secs(3), ..START_FIRST };
        let mut slots = outdated(5, now);
        let expected = |n: usize| match action {
            "start" => Action::Start(Place::beside(n)),
            _ => Action::Drain(Place::front(n), Why::Outdated),
        };
        assert_eq!(act(&slots, &pace, now), [expected(0), expected(1)], "{action}");
        match order {
            Order::StartFirst => slots[1].beside.starting(),
            Order::StopFirst => slots[1].front.draining(Why::Outdated),
        }
        assert_eq!(act(&slots, &pace, now), [expected(0)], "one is under way");
        let paused = Going { last_step: Some(now), ..going(&pace) };
        let later = plan(5, &slots, &POLICY, paused, now);
        assert_eq!((later.actions, later.wake), (vec![], Some(now + pace.pause)), "{action}");
        let back = Going { stage: Stage::RollingBack, ..paused };
        assert_eq!(plan(5, &slots, &POLICY, back, now).actions, [expected(0)], "the way back does not pause");
    }
}

#[test]
fn with_stop_first_the_next_replica_is_replaced_when_the_new_one_has_been_healthy_for_long_enough() {
    let now = Instant::now();
    let pace = Pace { order: Order::StopFirst, ..START_FIRST };
    let mut slots = outdated(2, now);
    slots[0].front.draining(Why::Outdated);
    slots[0].front.drained();
    slots[0].front.stopping(Why::Outdated);
    slots[0].front.ended(&POLICY, now);
    slots[0].front.running(false, now);
    slots[0].front.judged(Some(true), now);
    let settled = now + pace.healthy_for;
    let waits = plan(2, &slots, &POLICY, going(&pace), now);
    assert_eq!((waits.actions, waits.wake), (vec![], Some(settled)));
    assert!(!slots[0].front.settle(pace.healthy_for, now));
    assert_eq!(act(&slots, &pace, settled), [Action::Drain(Place::front(1), Why::Outdated)]);
    assert!(slots[0].front.settle(pace.healthy_for, settled));
    assert!(!slots[0].front.settle(pace.healthy_for, settled), "once");
}

#[test]
fn an_unhealthy_new_replica_fails_the_rollout_and_goes_while_the_old_one_stays() {
    let now = Instant::now();
    let mut slots = outdated(2, now);
    begin(&mut slots[0], now);
    slots[0].beside.judged(Some(false), now);
    assert_eq!(act(&slots, &START_FIRST, now), [Action::Fail(0, Failure::Unhealthy)]);
    let failed = Going { stage: Stage::Paused, ..going(&START_FIRST) };
    assert_eq!(plan(2, &slots, &POLICY, failed, now).actions, [Action::Stop(Place::beside(0), Why::Surplus)]);
    slots[0].beside.stopping(Why::Surplus);
    slots[0].beside.ended(&POLICY, now);
    assert_eq!(plan(2, &slots, &POLICY, failed, now).actions, [], "both old ones go on serving");
    // After a rollback, the old ones are what is wanted.
    for slot in &mut slots {
        slot.front.outdated(false);
    }
    begin(&mut slots[0], now);
    slots[0].beside.outdated(true);
    let back = Going { stage: Stage::RollingBack, ..going(&START_FIRST) };
    assert_eq!(plan(2, &slots, &POLICY, back, now).actions, [Action::Stop(Place::beside(0), Why::Surplus)]);
}

#[test]
fn new_replicas_that_keep_ending_fail_the_rollout() {
    let mut now = Instant::now();
    let mut slots = outdated(1, now);
    for _ in 0..POLICY.crash_loop_after {
        assert_eq!(act(&slots, &START_FIRST, now), [Action::Start(Place::beside(0))]);
        begin(&mut slots[0], now);
        now += slots[0].beside.ended(&POLICY, now);
    }
    assert_eq!(act(&slots, &START_FIRST, now), [Action::Fail(0, Failure::CrashLoop)]);
    let pace = Pace { order: Order::StopFirst, ..START_FIRST };
    let mut slots = outdated(1, now);
    slots[0].front.stopping(Why::Outdated);
    slots[0].front.ended(&POLICY, now);
    for _ in 0..POLICY.crash_loop_after {
        slots[0].front.running(false, now);
        slots[0].front.ended(&POLICY, now);
    }
    assert_eq!(act(&slots, &pace, now), [Action::Fail(0, Failure::CrashLoop)]);
}

#[test]
fn a_new_replica_takes_the_slot_at_once_if_the_old_one_ends() {
    let now = Instant::now();
    let mut slots = outdated(1, now);
    begin(&mut slots[0], now);
    slots[0].front.ended(&POLICY, now);
    assert_eq!(act(&slots, &START_FIRST, now), [Action::Flip(0)]);
    slots[0].beside.judged(Some(false), now);
    let both = act(&slots, &START_FIRST, now);
    assert!(both.contains(&Action::Start(Place::front(0))), "an unhealthy one is no help: {both:?}");
}

#[test]
fn what_stands_beside_a_surplus_slot_is_stopped() {
    let now = Instant::now();
    let mut slots = outdated(2, now);
    begin(&mut slots[1], now);
    let actions = plan(1, &slots, &POLICY, going(&START_FIRST), now).actions;
    assert!(actions.contains(&Action::Stop(Place::beside(1), Why::Surplus)));
    assert!(actions.contains(&Action::Drain(Place::front(1), Why::Surplus)));
}

#[test]
fn nothing_of_a_predecessor_is_stopped_before_its_connections_have_ended() {
    let now = Instant::now();
    let mut slots = healthy(1, now);
    slots[0].beside.running(false, now);
    slots[0].beside.is_former = true;
    let unsettled = Going { is_settled: false, ..going(&START_FIRST) };
    assert_eq!(plan(1, &slots, &POLICY, unsettled, now).actions, []);
    assert_eq!(act(&slots, &START_FIRST, now), [Action::Drain(Place::beside(0), Why::Outdated)]);
}

/// Whoever fills a slot without proof can still show that the rollout fails.
#[test]
fn a_new_replica_that_took_over_too_early_is_not_proven() {
    let now = Instant::now();
    let mut slots = outdated(1, now);
    begin(&mut slots[0], now);
    slots[0].front.ended(&POLICY, now);
    assert_eq!(act(&slots, &START_FIRST, now), [Action::Flip(0)]);
    slots[0].flip();
    assert!(!slots[0].front.settle(START_FIRST.healthy_for, now));
    slots[0].front.judged(Some(false), now);
    assert_eq!(act(&slots, &START_FIRST, now), [Action::Fail(0, Failure::Unhealthy)]);
    slots[0].front.judged(Some(true), now);
    assert!(slots[0].front.settle(START_FIRST.healthy_for, now + START_FIRST.healthy_for));
    // One that starts in the place of an old one that has ended is no proof either.
    let mut slots = outdated(1, now);
    slots[0].front.ended(&POLICY, now);
    assert_eq!(act(&slots, &START_FIRST, now), [Action::Start(Place::front(0))]);
    slots[0].front.begins_anew();
    slots[0].front.starting();
    slots[0].front.running(false, now);
    slots[0].front.judged(Some(false), now);
    assert_eq!(act(&slots, &START_FIRST, now), [Action::Fail(0, Failure::Unhealthy)]);
}

#[test]
fn an_empty_slot_is_taken_over_even_while_a_predecessor_has_connections() {
    let now = Instant::now();
    let mut slots = healthy(1, now);
    slots[0].beside.running(false, now);
    slots[0].front.ended(&POLICY, now);
    let unsettled = Going { is_settled: false, stage: Stage::Idle, ..going(&START_FIRST) };
    assert_eq!(plan(1, &slots, &POLICY, unsettled, now).actions, [Action::Flip(0)]);
    slots[0].beside.is_former = true;
    assert_eq!(plan(1, &slots, &POLICY, unsettled, now).actions, [Action::Start(Place::front(0))]);
}

#[test]
fn a_slot_that_waits_for_an_old_replica_does_not_hold_up_the_others() {
    let now = Instant::now();
    let mut slots = outdated(2, now);
    begin(&mut slots[0], now);
    slots[0].flip();
    slots[0].front.judged(Some(true), now);
    assert!(slots[0].front.settle(Duration::ZERO, now));
    slots[0].front.outdated(true);
    assert_eq!(act(&slots, &START_FIRST, now), [Action::Start(Place::beside(1))]);
}

#[test]
fn one_slot_stays_if_the_old_replicas_leave_first() {
    let now = Instant::now();
    let pace = Pace { order: Order::StopFirst, parallel: 10, ..START_FIRST };
    let drains = |count: usize| (0..count).map(|n| Action::Drain(Place::front(n), Why::Outdated)).collect::<Vec<_>>();
    assert_eq!(act(&outdated(3, now), &pace, now), drains(2));
    assert_eq!(act(&outdated(1, now), &pace, now), drains(1));
}

/// The replica may have been started from a program that has been replaced since.
#[test]
fn a_command_counts_for_a_replica_whose_start_has_begun() {
    let now = Instant::now();
    let mut slots = outdated(1, now);
    slots[0].beside.starting();
    slots[0].beside.give_up();
    slots[0].beside.running(false, now);
    assert!(slots[0].beside.is_outdated());
    slots[0].beside.stopping(Why::Surplus);
    slots[0].beside.ended(&POLICY, now);
    begin(&mut slots[0], now);
    assert!(!slots[0].beside.is_outdated());
}

/// Without a free port, the old replica drains, and the one that was refused beside it is not tried again.
#[test]
fn a_replica_that_drains_gets_no_successor_beside_it() {
    let now = Instant::now();
    let mut slots = outdated(1, now);
    slots[0].beside.starting();
    slots[0].beside.ended(&POLICY, now);
    assert_eq!(act(&slots, &START_FIRST, now), [Action::Start(Place::beside(0))]);
    slots[0].front.draining(Why::Outdated);
    assert_eq!(act(&slots, &START_FIRST, now), []);
}
