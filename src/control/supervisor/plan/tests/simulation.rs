//! Random histories of replicas, of an adapter that sees them late or not at all, and of an operator.

use proptest::prelude::*;

use super::*;

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
