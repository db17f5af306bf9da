use proptest::prelude::*;

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
        slot.running(false, now);
        slot.judged(Some(true), now);
    }
    slots
}

fn actions(wanted: usize, slots: &[Slot], now: Instant) -> Vec<Action> {
    plan(wanted, slots, &POLICY, now).actions
}

#[test]
fn empty_slots_are_filled_and_surplus_slots_are_drained_and_stopped() {
    let now = Instant::now();
    let mut slots = slots(3, now);
    assert_eq!(plan(2, &slots, &POLICY, now), Plan { actions: vec![Action::Start(0), Action::Start(1)], wake: None });
    for slot in &mut slots {
        slot.starting();
    }
    assert_eq!(actions(3, &slots, now), [], "a start that has begun is not planned again");
    for slot in &mut slots {
        slot.running(false, now);
    }
    assert_eq!(actions(3, &slots, now), []);
    assert_eq!(actions(2, &slots, now), [Action::Drain(2, Why::Surplus)]);
    slots[2].draining(Why::Surplus);
    assert_eq!(actions(2, &slots, now), []);
    slots[2].drained();
    assert_eq!(actions(2, &slots, now), [Action::Stop(2, Why::Surplus)]);
    slots[2].stopping(Why::Surplus);
    assert_eq!(actions(2, &slots, now), []);
    slots[2].not_stopped();
    assert_eq!(actions(2, &slots, now), [Action::Drain(2, Why::Surplus)]);
}

#[test]
fn a_draining_surplus_replica_is_kept_if_the_pool_grows_again() {
    let now = Instant::now();
    let mut slots = healthy(3, now);
    slots[2].draining(Why::Surplus);
    slots[2].drained();
    assert_eq!(actions(3, &slots, now), [Action::Keep(2)]);
    slots[2].kept(false);
    assert_eq!(actions(3, &slots, now), []);
    // A replica that drains for another reason leaves for good if its slot becomes surplus.
    slots[2].draining(Why::Outdated);
    assert_eq!(actions(3, &slots, now), []);
    assert_eq!(actions(2, &slots, now), [Action::Drain(2, Why::Surplus)]);
}

#[test]
fn the_first_restart_is_immediate_and_further_restarts_back_off() {
    let mut now = Instant::now();
    let mut slot = Slot::new("echo-1".into(), now);
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
    slots[0].ended(&POLICY, now);
    let wait = slots[0].ended(&POLICY, now);
    assert_eq!(plan(1, &slots, &POLICY, now), Plan { actions: Vec::new(), wake: Some(now + wait) });
    assert_eq!(actions(1, &slots, now + wait), [Action::Start(0)]);
}

#[test]
fn a_start_that_could_not_be_tried_is_not_a_strike() {
    let now = Instant::now();
    let mut slots = slots(1, now);
    for _ in 0..20 {
        slots[0].starting();
        slots[0].postponed(now);
    }
    assert!(!slots[0].is_crash_loop(&POLICY));
    assert_eq!(actions(1, &slots, now), [Action::Start(0)]);
}

#[test]
fn unhealthy_replicas_are_replaced_one_at_a_time() {
    let began = Instant::now();
    let patience = POLICY.replace_after.unwrap();
    let mut slots = healthy(3, began);
    for (n, slot) in slots.iter_mut().enumerate() {
        slot.judged(Some(false), began + Duration::from_secs(3 - n as u64));
    }
    let first_due = began + Duration::from_secs(1) + patience;
    assert_eq!(plan(3, &slots, &POLICY, began), Plan { actions: vec![], wake: Some(first_due) });
    let now = began + Duration::from_secs(60);
    assert_eq!(
        actions(3, &slots, now),
        [Action::Stop(2, Why::Unhealthy)],
        "the replica that has been unhealthy longest goes first"
    );
    slots[2].stopping(Why::Unhealthy);
    assert_eq!(actions(3, &slots, now), []);
    slots[2].ended(&POLICY, now);
    assert_eq!(actions(3, &slots, now), [Action::Start(2)]);
    slots[2].starting();
    slots[2].running(false, now);
    assert_eq!(actions(3, &slots, now), [], "the successor has no verdict yet");
    slots[2].judged(Some(true), now);
    assert_eq!(actions(3, &slots, now), [Action::Stop(1, Why::Unhealthy)]);
}

#[test]
fn an_unhealthy_successor_does_not_block_other_replacements() {
    let began = Instant::now();
    let mut slots = healthy(2, began);
    slots[0].judged(Some(false), began);
    slots[1].judged(Some(false), began + Duration::from_secs(1));
    let now = began + Duration::from_secs(40);
    slots[0].stopping(Why::Unhealthy);
    slots[0].ended(&POLICY, now);
    slots[0].running(false, now);
    slots[0].judged(Some(false), now);
    assert_eq!(actions(2, &slots, now), [Action::Stop(1, Why::Unhealthy)]);
}

#[test]
fn a_replica_that_recovers_is_not_replaced() {
    let began = Instant::now();
    let mut slots = healthy(1, began);
    let late = began + Duration::from_secs(29);
    slots[0].judged(Some(false), began);
    slots[0].judged(Some(true), late);
    slots[0].judged(Some(false), late);
    assert_eq!(actions(1, &slots, began + Duration::from_secs(31)), []);
    assert_eq!(plan(1, &slots, &Policy { replace_after: None, ..POLICY }, late + Duration::from_secs(900)).actions, []);
}

#[test]
fn outdated_replicas_are_replaced_one_at_a_time_while_all_others_are_healthy() {
    let now = Instant::now();
    let mut slots = slots(3, now);
    for slot in &mut slots {
        slot.running(true, now);
    }
    assert_eq!(plan(3, &slots, &POLICY, now), Plan { actions: vec![], wake: Some(now + UNJUDGED) });
    assert_eq!(actions(3, &slots, now + UNJUDGED), [Action::Drain(0, Why::Outdated)], "the wait for a verdict is over");
    for slot in &mut slots {
        slot.judged(Some(true), now);
    }
    for n in 0..3 {
        assert_eq!(actions(3, &slots, now), [Action::Drain(n, Why::Outdated)]);
        slots[n].draining(Why::Outdated);
        assert_eq!(actions(3, &slots, now), [], "no other replica is drained meanwhile");
        let mut other_hangs = slots.clone();
        other_hangs[(n + 1) % 3].judged(Some(false), now);
        let late = now + Duration::from_secs(31);
        let others: Vec<_> = actions(3, &other_hangs, late);
        assert_eq!(others, [Action::Stop((n + 1) % 3, Why::Unhealthy)], "an unhealthy replica is still replaced");
        slots[n].drained();
        assert_eq!(actions(3, &slots, now), [Action::Stop(n, Why::Outdated)]);
        slots[n].stopping(Why::Outdated);
        assert_eq!(slots[n].ended(&POLICY, now), Duration::ZERO, "a stop by Ringway is not a strike");
        slots[n].running(false, now);
        assert_eq!(actions(3, &slots, now), []);
        slots[n].judged(Some(true), now);
    }
    assert_eq!(actions(3, &slots, now), []);
}

/// Who has put a wrong change right must not wait for the verdict on it.
#[test]
fn a_successor_without_a_verdict_is_replaced_immediately_if_the_settings_change_again() {
    let now = Instant::now();
    let mut slots = slots(2, now);
    for slot in &mut slots {
        slot.running(true, now);
        slot.judged(Some(true), now);
    }
    slots[0].draining(Why::Outdated);
    slots[0].drained();
    slots[0].stopping(Why::Outdated);
    slots[0].ended(&POLICY, now);
    slots[0].running(false, now);
    assert_eq!(actions(2, &slots, now), [], "the successor has no verdict yet");
    slots[0].outdated(true);
    assert_eq!(actions(2, &slots, now), [Action::Stop(0, Why::Outdated)]);
    slots[0].stopping(Why::Outdated);
    assert_eq!(slots[0].ended(&POLICY, now), Duration::ZERO);
    slots[0].running(false, now);
    assert_eq!(actions(2, &slots, now), [], "one at a time");
}

#[test]
fn changed_settings_start_a_slot_in_a_crash_loop_at_once() {
    let now = Instant::now();
    let mut slots = slots(1, now);
    for _ in 0..POLICY.crash_loop_after {
        slots[0].running(false, now);
        slots[0].ended(&POLICY, now);
    }
    assert!(slots[0].is_crash_loop(&POLICY) && actions(1, &slots, now).is_empty());
    slots[0].forgive(now);
    assert_eq!(actions(1, &slots, now), [Action::Start(0)]);
    assert!(!slots[0].is_crash_loop(&POLICY) && slots[0].is_first_try());
}

/// Otherwise a change of the network or the port, which makes all replicas unhealthy, would never be rolled out.
#[test]
fn unhealthy_outdated_replicas_are_replaced_immediately_and_one_at_a_time() {
    let now = Instant::now();
    let mut slots = slots(2, now);
    for slot in &mut slots {
        slot.running(true, now);
        slot.judged(Some(false), now);
    }
    let patient = Policy { replace_after: None, ..POLICY };
    for policy in [patient, POLICY] {
        assert_eq!(plan(2, &slots, &policy, now).actions, [Action::Stop(0, Why::Outdated)]);
    }
    slots[0].stopping(Why::Outdated);
    assert_eq!(actions(2, &slots, now), []);
    slots[0].ended(&POLICY, now);
    slots[0].running(false, now);
    slots[0].judged(Some(true), now);
    assert_eq!(actions(2, &slots, now), [Action::Stop(1, Why::Outdated)], "an unhealthy replica needs no drain");
    let late = now + Duration::from_secs(40);
    assert_eq!(actions(2, &slots, late).len(), 1, "one action, even if the replica is also due as unhealthy");
}

/// A step of a simulated history.
#[derive(Debug, Clone)]
enum Happening {
    /// Time passes, in milliseconds.
    Pause(u64),
    /// The replica of a slot dies.
    Death(usize),
    /// The replica of a slot hangs: it runs, but is unhealthy from now on.
    Hang(usize),
    /// The adapter sees nothing until the next `Sight`.
    Blindness,
    /// Events are lost: the adapter sees changes only in the next list, up to 30 s later.
    Deaf(bool),
    /// The adapter sees the current state, once or twice.
    Sight { doubled: bool },
    /// The engine refuses commands from now on.
    Refusing(bool),
    /// The engine is unreachable: commands are lost from now on.
    Away(bool),
    /// The number of replicas changes.
    Scale(usize),
    /// The settings change: all running replicas are outdated.
    Change,
    /// Time in milliseconds until the adapter sees a started replica run, from now on.
    SlowStart(u64),
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        4 => (0_u64..5000).prop_map(Happening::Pause),
        1 => (5000_u64..120_000).prop_map(Happening::Pause),
        3 => (0_usize..3).prop_map(Happening::Death),
        1 => (0_usize..3).prop_map(Happening::Hang),
        1 => Just(Happening::Blindness),
        1 => any::<bool>().prop_map(Happening::Deaf),
        2 => any::<bool>().prop_map(|doubled| Happening::Sight { doubled }),
        1 => any::<bool>().prop_map(Happening::Refusing),
        1 => any::<bool>().prop_map(Happening::Away),
        1 => (0_u64..3000).prop_map(Happening::SlowStart),
        1 => (1_usize..=3).prop_map(Happening::Scale),
        1 => Just(Happening::Change),
    ]
}

/// A world with replicas, and an adapter that sees it like the adapters for processes and containers.
#[expect(clippy::struct_excessive_bools, reason = "each is an independent fault, and any combination may occur")]
struct World {
    now: Instant,
    slots: Vec<Slot>,
    /// By slot: the replica's number, when it was started, and whether it hangs. One replica per slot, because
    /// container names are unique.
    replicas: [Option<(u32, Instant, bool)>; 3],
    /// By slot: the replica that the adapter knows.
    known: [Option<u32>; 3],
    blind: bool,
    deaf: bool,
    /// Something has changed since the adapter last looked.
    changed: bool,
    refusing: bool,
    away: bool,
    start_takes: Duration,
    wanted: usize,
    /// By slot: when its drain is over.
    drains: [Option<Instant>; 3],
    /// Replicas with a lower number are outdated.
    current: u32,
    changes: u32,
    started: u32,
    stopped_healthy: u32,
}

impl World {
    fn new() -> Self {
        let now = Instant::now();
        Self {
            now,
            slots: slots(3, now),
            replicas: [None; 3],
            known: [None; 3],
            blind: false,
            deaf: false,
            changed: false,
            refusing: false,
            away: false,
            start_takes: Duration::ZERO,
            wanted: 3,
            drains: [None; 3],
            current: 0,
            changes: 0,
            started: 0,
            stopped_healthy: 0,
        }
    }

    fn happens(&mut self, what: &Happening) {
        match *what {
            Happening::Pause(millis) => {
                // The adapter looks after an event, when the plan asks for it, and every 30 s.
                let end = self.now + Duration::from_millis(millis);
                while self.now < end {
                    let wake = plan(self.wanted, &self.slots, &POLICY, self.now).wake;
                    let drain = self.drains.iter().flatten().min().copied();
                    let wake = wake.into_iter().chain(drain).min();
                    let next = wake.map_or(end, |wake| wake.min(end)).min(self.now + Duration::from_secs(30));
                    let hears = std::mem::take(&mut self.changed) && !self.deaf;
                    let soon = self.now + Duration::from_millis(10);
                    self.now = if hears { next.min(soon) } else { next }.max(self.now + Duration::from_millis(1));
                    self.look();
                }
            }
            Happening::Death(slot) => {
                self.replicas[slot] = None;
                self.changed = true;
            }
            Happening::Hang(slot) => {
                self.changed = true;
                if let Some(replica) = &mut self.replicas[slot] {
                    replica.2 = true;
                }
            }
            Happening::Blindness => self.blind = true,
            Happening::Deaf(deaf) => self.deaf = deaf,
            Happening::Sight { doubled } => {
                self.blind = false;
                for _ in 0..=u32::from(doubled) {
                    self.look();
                }
            }
            Happening::Refusing(refusing) => self.refusing = refusing,
            Happening::Away(away) => self.away = away,
            Happening::Scale(wanted) => {
                (self.wanted, self.changed) = (wanted, true);
                self.changes += 1;
            }
            Happening::Change => {
                (self.current, self.changed) = (self.started + 1, true);
                self.changes += 1;
                for slot in &mut self.slots {
                    slot.outdated(true);
                }
            }
            Happening::SlowStart(millis) => self.start_takes = Duration::from_millis(millis),
        }
    }

    /// Observes the current state and carries out the plan.
    fn look(&mut self) {
        if self.blind || self.away {
            return;
        }
        for n in 0..3 {
            match self.replicas[n] {
                Some((id, since, hangs)) if since + self.start_takes <= self.now || self.known[n] == Some(id) => {
                    if self.known[n] != Some(id) {
                        self.slots[n].running(id < self.current, self.now);
                        self.known[n] = Some(id);
                    }
                    self.slots[n].judged(Some(!hangs), self.now);
                }
                None if self.known[n].take().is_some() || self.slots[n].is_starting() => {
                    self.slots[n].ended(&POLICY, self.now);
                }
                // No replica, or not seen yet.
                _ => {}
            }
        }
        for n in 0..3 {
            let ends = self.slots[n].drains_for().and(self.drains[n]);
            if ends.is_some_and(|ends| ends <= self.now) {
                self.slots[n].drained();
            }
            self.drains[n] = ends.filter(|&ends| ends > self.now);
        }
        for action in plan(self.wanted, &self.slots, &POLICY, self.now).actions {
            self.changed = true;
            match action {
                Action::Drain(n, why) => {
                    self.slots[n].draining(why);
                    self.drains[n] = Some(self.now + Duration::from_millis(500));
                }
                Action::Keep(n) => {
                    assert!(n < self.wanted);
                    let is_outdated = self.replicas[n].is_some_and(|(id, ..)| id < self.current);
                    self.slots[n].kept(is_outdated);
                }
                Action::Start(n) if self.refusing => {
                    self.slots[n].starting();
                    self.slots[n].ended(&POLICY, self.now);
                }
                Action::Start(n) => {
                    assert!(self.replicas[n].is_none(), "a second replica in slot {n}");
                    self.slots[n].starting();
                    self.started += 1;
                    self.replicas[n] = Some((self.started, self.now, false));
                }
                Action::Stop(n, why) => {
                    let may = match why {
                        Why::Surplus => n >= self.wanted,
                        Why::Outdated => self.replicas[n].is_none_or(|(id, ..)| id < self.current),
                        Why::Unhealthy => self.replicas[n].is_none_or(|(_, _, hangs)| hangs),
                    };
                    self.stopped_healthy += u32::from(!may);
                    self.slots[n].stopping(why);
                    self.replicas[n] = None;
                }
            }
        }
        assert!(self.replicas.iter().flatten().count() <= 3);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 2000, ..ProptestConfig::default() })]

    /// In any history the supervisor never starts a second replica in a slot, never stops a healthy replica without
    /// reason, and never starts too many. Every slot is healthy soon after the last step.
    #[test]
    fn every_history_converges_without_too_many_starts(history in proptest::collection::vec(happening(), 1..120)) {
        let mut world = World::new();
        let began = world.now;
        for what in &history {
            world.happens(what);
        }
        prop_assert_eq!(world.stopped_healthy, 0);
        // Each slot starts twice at once, then backs off until the waits reach 24 s, and starts over after each replica
        // that lasted a minute.
        let most = 3 * (10 + u64::from(world.changes) + (world.now - began).as_secs() / 20 + history.len() as u64 / 4);
        prop_assert!(u64::from(world.started) <= most, "{} starts in {:?}", world.started, world.now - began);

        (world.blind, world.deaf, world.refusing, world.away) = (false, false, false, false);
        world.start_takes = Duration::ZERO;
        // Time for the next list, for `replace_after`, and for the longest wait of each slot in turn.
        world.happens(&Happening::Pause(30_000 + 30_000 + 3 * 30_000 + 5000));
        for n in 0..world.wanted {
            let is_well = matches!(world.replicas[n], Some((id, _, false)) if id >= world.current);
            prop_assert!(is_well, "slot {}: {:?} of {}", n, world.replicas[n], world.current);
        }
        prop_assert_eq!(world.replicas.iter().flatten().count(), world.wanted);
    }
}
