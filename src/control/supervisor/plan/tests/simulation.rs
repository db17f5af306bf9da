//! Random histories of replicas, of an adapter that sees them late or not at all, and of an operator.

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::*;
use crate::control::supervisor::rollout::{Rollout, RolloutStatus};

/// A step of a simulated history.
#[derive(Debug, Clone)]
enum Happening {
    /// Time passes, in milliseconds.
    Pause(u64),
    /// The replica in a seat dies.
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
    /// The settings change: all running replicas are outdated. Replicas from bad settings hang.
    Change { is_bad: bool },
    /// An operator asks to replace all replicas.
    Restart,
    /// Time in milliseconds until the adapter sees a started replica run, from now on.
    SlowStart(u64),
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        4 => (0_u64..5000).prop_map(Happening::Pause),
        1 => (5000_u64..120_000).prop_map(Happening::Pause),
        3 => (0_usize..6).prop_map(Happening::Death),
        1 => (0_usize..3).prop_map(Happening::Hang),
        1 => Just(Happening::Blindness),
        1 => any::<bool>().prop_map(Happening::Deaf),
        2 => any::<bool>().prop_map(|doubled| Happening::Sight { doubled }),
        1 => any::<bool>().prop_map(Happening::Refusing),
        1 => any::<bool>().prop_map(Happening::Away),
        1 => (0_u64..3000).prop_map(Happening::SlowStart),
        1 => (1_usize..=3).prop_map(Happening::Scale),
        1 => any::<bool>().prop_map(|is_bad| Happening::Change { is_bad }),
        1 => Just(Happening::Restart),
    ]
}

/// A replica: its number, when it was started, what it was started from, and whether it hangs.
type Replica = (u32, Instant, u32, bool);

/// A world with replicas, and an adapter that sees it like the adapters for processes and containers.
#[expect(clippy::struct_excessive_bools, reason = "each is an independent fault, and any combination may occur")]
struct World {
    now: Instant,
    pace: Pace,
    slots: Vec<Slot>,
    rollout: Rollout<u32>,
    /// One replica per seat, because container names are unique.
    replicas: HashMap<Place, Replica>,
    /// The replicas that the adapter knows.
    known: HashMap<Place, u32>,
    blind: bool,
    deaf: bool,
    /// Something has changed since the adapter last looked.
    changed: bool,
    refusing: bool,
    away: bool,
    start_takes: Duration,
    wanted: usize,
    /// When drains are over.
    drains: HashMap<Place, Instant>,
    /// The number of the last settings, and those from which replicas hang.
    settings: u32,
    bad: HashSet<u32>,
    changes: u32,
    started: u32,
    stopped_healthy: Vec<Action>,
}

impl World {
    fn new(pace: Pace) -> Self {
        let now = Instant::now();
        Self {
            now,
            pace,
            slots: slots(3, now),
            rollout: Rollout::new("echo".into(), 0, Arc::new(RolloutStatus::new(now))),
            replicas: HashMap::new(),
            known: HashMap::new(),
            blind: false,
            deaf: false,
            changed: false,
            refusing: false,
            away: false,
            start_takes: Duration::ZERO,
            wanted: 3,
            drains: HashMap::new(),
            settings: 0,
            bad: HashSet::new(),
            changes: 0,
            started: 0,
            stopped_healthy: Vec::new(),
        }
    }

    fn places(&self) -> Vec<Place> {
        (0..self.slots.len()).flat_map(|n| [Place::front(n), Place::beside(n)]).collect()
    }

    fn seat(&mut self, place: Place) -> &mut Seat {
        &mut self.slots[place.slot][place.role]
    }

    fn plan(&self) -> Plan {
        let (stage, last_step) = (self.rollout.stage(), self.rollout.last_step);
        plan(self.wanted, &self.slots, &POLICY, Going { stage, last_step, ..going(&self.pace) }, self.now)
    }

    /// New replicas are started from something else: marks the others.
    fn apply(&mut self, forgives: bool) {
        for slot in self.slots.iter_mut().filter(|_| forgives) {
            slot.front.forgive(self.now);
            slot.beside.forgive(self.now);
        }
        for place in self.places() {
            let spec = *self.rollout.spec();
            if let Some(is_outdated) = self.replicas.get(&place).map(|(_, _, from, _)| *from != spec) {
                self.seat(place).outdated(is_outdated);
            }
        }
    }

    fn happens(&mut self, what: &Happening) {
        match *what {
            Happening::Pause(millis) => {
                // The adapter looks after an event, when the plan asks for it, and every 30 s.
                let end = self.now + Duration::from_millis(millis);
                while self.now < end {
                    let drain = self.drains.values().min().copied();
                    let wake = self.plan().wake.into_iter().chain(drain).min();
                    let next = wake.map_or(end, |wake| wake.min(end)).min(self.now + Duration::from_secs(30));
                    let hears = std::mem::take(&mut self.changed) && !self.deaf;
                    let soon = self.now + Duration::from_millis(10);
                    self.now = if hears { next.min(soon) } else { next }.max(self.now + Duration::from_millis(1));
                    self.look();
                }
            }
            Happening::Death(slot) => {
                let role = if slot % 2 == 0 { Role::Front } else { Role::Beside };
                self.replicas.remove(&Place { slot: slot / 2, role });
                self.changed = true;
            }
            Happening::Hang(slot) => {
                self.changed = true;
                if let Some(replica) = self.replicas.get_mut(&Place::front(slot)) {
                    replica.3 = true;
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
            Happening::Change { is_bad } => {
                self.settings += 1;
                self.bad.extend(is_bad.then_some(self.settings));
                self.changed = true;
                self.changes += 1;
                self.rollout.configure(self.settings, self.now);
                self.apply(true);
            }
            Happening::Restart => {
                self.changed = true;
                self.changes += 1;
                self.rollout.begin(self.settings, self.now);
                self.apply(true);
                let wanted = self.wanted;
                self.slots.iter_mut().take(wanted).for_each(|slot| slot.front.give_up());
            }
            Happening::SlowStart(millis) => self.start_takes = Duration::from_millis(millis),
        }
    }

    /// Observes the current state and carries out the plan.
    fn look(&mut self) {
        if self.blind || self.away {
            return;
        }
        let (now, spec) = (self.now, *self.rollout.spec());
        for place in self.places() {
            let is_known = |id: u32| self.known.get(&place) == Some(&id);
            match self.replicas.get(&place).copied() {
                Some((id, since, from, hangs)) if since + self.start_takes <= now || is_known(id) => {
                    if !is_known(id) {
                        self.seat(place).running(from != spec, now);
                        self.known.insert(place, id);
                    }
                    self.seat(place).judged(Some(!hangs), now);
                }
                None if self.known.remove(&place).is_some() || self.seat(place).is_starting() => {
                    self.seat(place).ended(&POLICY, now);
                }
                // No replica, or not seen yet.
                _ => {}
            }
            let ends = self.seat(place).drains_for().and_then(|_| self.drains.get(&place).copied());
            match ends {
                Some(ends) if ends <= now => {
                    self.seat(place).drained();
                    self.drains.remove(&place);
                }
                Some(_) => {}
                None => drop(self.drains.remove(&place)),
            }
        }
        self.follow();
        for action in self.plan().actions {
            self.changed = true;
            self.carry_out(action);
            if matches!(action, Action::Fail(..)) {
                break;
            }
        }
        let fronts = self.replicas.keys().filter(|place| place.role == Role::Front).count();
        assert!(fronts <= 3 && self.replicas.len() - fronts <= 3);
    }

    fn follow(&mut self) {
        let healthy_for = self.pace.healthy_for;
        for slot in &mut self.slots {
            if slot.front.settle(healthy_for, self.now) {
                self.rollout.last_step = Some(self.now);
            }
        }
        let kept = || self.slots.iter().take(self.wanted);
        let (old, total) = (kept().filter(|slot| slot.front.is_outdated()).count(), kept().count());
        let is_quiet = kept().all(|slot| !slot.front.is_new() && !slot.has_successor());
        self.rollout.follow(total - old, total, is_quiet, self.now);
    }

    fn carry_out(&mut self, action: Action) {
        let (now, spec) = (self.now, *self.rollout.spec());
        match action {
            Action::Drain(place, why) => {
                assert!(
                    why != Why::Outdated || place.role == Role::Beside || self.pace.order == Order::StopFirst,
                    "a drain before the successor is there"
                );
                self.seat(place).draining(why);
                self.drains.insert(place, now + Duration::from_millis(500));
            }
            Action::Keep(n) => {
                assert!(n < self.wanted);
                let is_outdated = self.replicas.get(&Place::front(n)).is_some_and(|(_, _, from, _)| *from != spec);
                self.slots[n].front.kept(is_outdated);
            }
            Action::Start(place) if self.refusing => {
                self.seat(place).starting();
                self.seat(place).ended(&POLICY, now);
            }
            Action::Start(place) => {
                if place.role == Role::Front && matches!(self.rollout.stage(), Stage::Running | Stage::RollingBack) {
                    self.seat(place).begins_anew();
                }
                assert!(!self.replicas.contains_key(&place), "a second replica at {place:?}");
                self.seat(place).starting();
                self.started += 1;
                let hangs = self.bad.contains(&spec);
                self.replicas.insert(place, (self.started, now, spec, hangs));
            }
            Action::Stop(place, why) => {
                let is_former = self.seat(place).is_former;
                let is_given_up = self.seat(place).is_outdated();
                let replica = self.replicas.get(&place);
                let may = match why {
                    Why::Surplus => place.slot >= self.wanted || place.role == Role::Beside,
                    Why::Outdated => is_former || is_given_up,
                    Why::Unhealthy => replica.is_none_or(|(.., hangs)| *hangs),
                };
                self.stopped_healthy.extend((!may).then_some(action));
                self.seat(place).stopping(why);
                self.replicas.remove(&place);
            }
            Action::Flip(n) => {
                let (front, beside) = (Place::front(n), Place::beside(n));
                let (old, new) = (self.replicas.remove(&front), self.replicas.remove(&beside));
                self.replicas.extend(new.map(|new| (front, new)));
                self.replicas.extend(old.map(|old| (beside, old)));
                let (old, new) = (self.known.remove(&front), self.known.remove(&beside));
                self.known.extend(new.map(|new| (front, new)));
                self.known.extend(old.map(|old| (beside, old)));
                self.slots[n].flip();
                self.drains.insert(beside, now + Duration::from_millis(500));
                self.rollout.last_step = Some(now);
            }
            Action::Fail(..) => {
                let stage = self.rollout.stage();
                let goes_back = self.rollout.fail("it hangs", self.pace.on_failure, now);
                self.slots.iter_mut().for_each(|slot| slot.front.forget_giving_up());
                self.apply(goes_back);
                assert_ne!(self.rollout.stage(), stage, "the plan would ask for ever");
            }
        }
    }
}

fn pace() -> impl Strategy<Value = Pace> {
    let order = prop_oneof![Just(Order::StartFirst), Just(Order::StopFirst)];
    let on_failure = prop_oneof![Just(OnFailure::Rollback), Just(OnFailure::Pause)];
    let rest = (1_u32..3, 0_u64..2000, 0_u64..6000);
    (order, on_failure, rest).prop_map(|(order, on_failure, (parallel, pause, healthy_for))| {
        let (pause, healthy_for) = (Duration::from_millis(pause), Duration::from_millis(healthy_for));
        Pace { order, parallel, pause, healthy_for, on_failure, drain: Duration::ZERO }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 2000, ..ProptestConfig::default() })]

    /// In any history the supervisor never starts a second replica in a seat, never stops a healthy replica without
    /// reason, and never starts too many. Every slot is healthy soon after the last step.
    #[test]
    fn every_history_converges_without_too_many_starts(
        pace in pace(),
        history in proptest::collection::vec(happening(), 1..120),
    ) {
        let mut world = World::new(pace);
        let began = world.now;
        for what in &history {
            world.happens(what);
        }
        prop_assert_eq!(&world.stopped_healthy, &[]);
        // Each slot starts twice at once, then backs off until the waits reach 24 s, and starts over after each replica
        // that lasted a minute. A failed rollout goes back, which starts each slot once more.
        let changes = 2 * u64::from(world.changes);
        let most = 6 * (10 + changes + (world.now - began).as_secs() / 20 + history.len() as u64 / 4);
        prop_assert!(u64::from(world.started) <= most, "{} starts in {:?}", world.started, world.now - began);

        (world.blind, world.deaf, world.refusing, world.away) = (false, false, false, false);
        world.start_takes = Duration::ZERO;
        // Who mends the settings ends all trouble.
        world.happens(&Happening::Change { is_bad: false });
        // Time for the next list, for `replace_after`, and for the longest wait of each slot in turn.
        world.happens(&Happening::Pause(30_000 + 30_000 + 3 * (30_000 + 8000) + 5000));
        for n in 0..world.wanted {
            let replica = world.replicas.get(&Place::front(n)).copied();
            let is_well = matches!(replica, Some((_, _, from, false)) if from == world.settings);
            prop_assert!(is_well, "slot {}: {:?} of {}", n, replica, world.settings);
        }
        prop_assert_eq!(world.replicas.len(), world.wanted);
        prop_assert_eq!(world.rollout.stage(), Stage::Idle);
    }
}
