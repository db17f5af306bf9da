//! The supervisor's adapter for containers.
//!
//! What is there is known from full lists only, see [`Watch`]. Every container bears labels for owner, pool and
//! slot and a name made of owner and slot: two Ringways that both fill a slot ask for the same name, and the
//! engine gives it to one. Containers without the owner's label are never touched.
//!
//! # Layout
//!
//! - this file: the loop, and what the plan orders
//! - [`observe`]: what a full list says of the slots
//! - [`create`]: how a container is made
//! - [`hold`]: waits after what the engine did not do

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::plan::{Action, Policy, Slot, Why, plan};
use super::{Ends, LOOK, Resting, drain, drained, joined, tell_of_stop, verdict};
use crate::backend::{Exit, Replica};
use crate::control::Event;
use crate::control::docker::container::Container;
use crate::control::docker::engine::{Engine, EngineError};
use crate::control::docker::label;
use crate::control::docker::place::{self, Place, Wanted};
use crate::control::docker::watch::{Freshness, Watch};
use crate::control::provider::slots;
use crate::labels::Label as _;
use crate::table::{Table, TableCell};

mod create;
mod hold;
mod observe;

use self::create::{Failure, Maker};
pub use self::create::{Pull, Spec};
use self::hold::Holds;

/// Containers that are made at a time, and those that are stopped.
const MOST_AT_ONCE: usize = 8;

/// Conflicts in a row after which a slot's name is not just being made by somebody else.
const MANY_CONFLICTS: u32 = 8;

/// How long a start or stop that is under way may go on when Ringway stops.
const FINISH: Duration = Duration::from_secs(5);

/// How a pool's replicas are run. All but the pool's name and the place may change while they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The pool's name.
    pub pool: Arc<str>,
    /// How many; with none wanted the supervisor ends once the last has.
    pub replicas: u32,
    /// Weights of slots where they are not 1.
    pub weights: BTreeMap<Arc<str>, u32>,
    /// How long a replica's connections may go on before it is stopped because it is not wanted, or outdated.
    pub drain: Duration,
    /// What each container is made from.
    pub spec: Spec,
    /// Whose containers, and where they are reached.
    pub wanted: Wanted,
    /// When a dead one is replaced.
    pub policy: Policy,
    /// From SIGTERM to SIGKILL where one is stopped.
    pub stop_grace: Duration,
    /// The longest time between two full lists.
    pub resync: Duration,
}

/// Keeps a container in every slot until `stop`. The containers go on: the next Ringway adopts them. The settings may
/// change meanwhile.
pub async fn supervise(
    mut settings: watch::Receiver<Settings>,
    engine: Engine,
    table: TableCell,
    events: mpsc::Sender<Event>,
    freshness: Arc<Freshness>,
    resting: Resting,
    stop: CancellationToken,
) {
    let Resting { mut settled, mut handovers } = resting;
    let first = settings.borrow_and_update().clone();
    let place = {
        let mut found = std::pin::pin!(place::wait_for(&engine, &first.wanted, &first.pool, &freshness));
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                place = &mut found => break place,
                Some(handover) = handovers.recv() => if handover.decide(Ok(Vec::new()), &stop).await {
                    return;
                },
            }
        }
    };
    let poke = Arc::new(Notify::new());
    let watch = Watch {
        engine: engine.clone(),
        pool: Arc::clone(&first.pool),
        labels: vec![
            format!("{}={}", label::OWNER, place.owner),
            format!("{}={}", label::POOL, first.pool),
            label::SLOT.to_owned(),
        ],
        resync: first.resync,
        freshness: Arc::clone(&freshness),
        poke: Arc::clone(&poke),
    };
    let (sender, mut seen) = watch::channel(None);
    let mut watching = std::pin::pin!(watch.run(sender));
    let mut changes = table.watch();
    let mut supervisor = Supervisor::new(first.clone(), engine, place, table.clone(), events, freshness, poke);
    supervisor.is_settled = *settled.borrow_and_update();
    supervisor.configure(first).await;
    while !stop.is_cancelled() && !supervisor.is_done() {
        let wake = supervisor.carry_out().await;
        let due = tokio::time::sleep_until(wake.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600)).into());
        tokio::select! {
            () = stop.cancelled() => {}
            () = due => {}
            Ok(()) = seen.changed() => {
                let seen = seen.borrow_and_update().clone();
                if let Some(seen) = seen {
                    supervisor.observe(seen).await;
                    supervisor.judge(&table.load());
                }
            }
            Ok(()) = changes.changed() => supervisor.judge(&table.load()),
            Ok(()) = settings.changed() => {
                let changed = settings.borrow_and_update().clone();
                supervisor.configure(changed).await;
            }
            Ok(()) = settled.changed(), if !supervisor.is_settled => {
                supervisor.is_settled = true;
                let same = supervisor.settings.clone();
                supervisor.configure(same).await;
            }
            // The other process adopts the containers by their labels.
            Some(handover) = handovers.recv() => if handover.decide(Ok(Vec::new()), &stop).await {
                return supervisor.finish().await;
            },
            // Goes on as long as `seen` is there.
            () = &mut watching => {}
            Some(ended) = supervisor.work.join_next() => match ended {
                Ok((slot, done)) => supervisor.done(slot, done).await,
                // Ours to be told of, and nothing that could be waited out.
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            },
        }
    }
    supervisor.finish().await;
}

struct Supervisor {
    settings: Settings,
    engine: Engine,
    place: Place,
    maker: Arc<Maker>,
    table: TableCell,
    events: mpsc::Sender<Event>,
    freshness: Arc<Freshness>,
    poke: Arc<Notify>,
    ends: Ends,
    /// By number, from 1: those wanted, and after them those of which only containers are left.
    slots: Vec<Slot>,
    /// What fills a slot.
    known: HashMap<usize, Known>,
    /// A container that does not run and is in the way of the slot's next one.
    leftovers: HashMap<usize, Container>,
    /// Slots of which a list says nothing yet: when something was done last.
    changed: HashMap<usize, Instant>,
    /// Slots with work under way.
    busy: HashMap<usize, Work>,
    work: JoinSet<(usize, Done)>,
    /// Slots for which the engine did not do what it was told.
    holds: Holds<usize>,
    /// Containers that are being removed because another one fills their slot, and for which it did not.
    doubles: HashSet<Arc<str>>,
    double_holds: Holds<Arc<str>>,
    has_seen: bool,
    /// No older Ringway has connections to what it has adopted.
    is_settled: bool,
}

/// A running container.
struct Known {
    id: Arc<str>,
    replica: Replica,
    /// The digest of what it was made from.
    spec: String,
    /// As the publisher was told.
    address: Option<SocketAddr>,
    /// As the publisher was told.
    is_bad: bool,
}

/// Work on a slot that is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    Start,
    Stop,
    Examination,
}

/// Work on a slot that has come to an end.
enum Done {
    /// Whether a container could be made from the settings of now.
    Checked(Action, Result<(), Failure>),
    Started(Result<(), Failure>),
    Stopped(Why, Result<(), EngineError>),
    /// How a container has ended.
    Examined(Exit),
    /// A second container for a slot is gone, or not.
    Removed(Arc<str>, Result<(), EngineError>),
}

impl Supervisor {
    fn new(
        settings: Settings,
        engine: Engine,
        place: Place,
        table: TableCell,
        events: mpsc::Sender<Event>,
        freshness: Arc<Freshness>,
        poke: Arc<Notify>,
    ) -> Self {
        let ends = Ends::new(Arc::clone(&settings.pool), settings.policy);
        let maker = Arc::new(Maker::new(engine.clone(), &settings.pool, &place, settings.spec.clone()));
        Self {
            settings,
            engine,
            place,
            maker,
            table,
            events,
            freshness,
            poke,
            ends,
            slots: Vec::new(),
            known: HashMap::new(),
            leftovers: HashMap::new(),
            changed: HashMap::new(),
            busy: HashMap::new(),
            work: JoinSet::new(),
            holds: Holds::default(),
            doubles: HashSet::new(),
            double_holds: Holds::default(),
            has_seen: false,
            is_settled: true,
        }
    }

    /// Takes settings, the first or changed ones.
    async fn configure(&mut self, settings: Settings) {
        self.settings = settings;
        self.ends.policy = self.settings.policy;
        self.know_slots(self.settings.replicas);
        let (pool, spec) = (&self.settings.pool, self.settings.spec.clone());
        self.maker = Arc::new(Maker::new(self.engine.clone(), pool, &self.place, spec));
        for (&slot, known) in &self.known {
            let is_outdated = self.is_outdated(&known.spec);
            self.slots[slot].outdated(is_outdated);
        }
        for event in joined(&self.settings.pool, self.settings.replicas, &self.settings.weights) {
            self.send(event).await;
        }
        // One that was about to leave may have left before it joined again.
        for (&slot, known) in self.known.iter().filter(|(slot, _)| **slot < self.settings.replicas as usize) {
            let (Some(address), id) = (known.address, Arc::clone(&self.slots[slot].name)) else { continue };
            self.send(Event::Started { id, address, replica: Some(known.replica.clone()) }).await;
        }
        // What runs is drained first.
        for slot in self.slots.iter().skip(self.wanted()).filter(|slot| !slot.is_running()) {
            self.send(Event::Left { id: Arc::clone(&slot.name) }).await;
        }
    }

    /// How many slots are wanted at the moment. While an older Ringway may have connections, nothing is surplus.
    fn wanted(&self) -> usize {
        let wanted = self.settings.replicas as usize;
        if self.is_settled { wanted } else { wanted.max(self.slots.len()) }
    }

    /// Whether a container was made from other settings than those of now, and that matters already.
    fn is_outdated(&self, spec: &str) -> bool {
        self.is_settled && spec != self.maker.digest()
    }

    /// Slots of which only containers are left are kept too; all are kept in the order of their numbers.
    fn know_slots(&mut self, count: u32) {
        let now = Instant::now();
        for name in slots(&self.settings.pool, count).into_iter().skip(self.slots.len()) {
            self.slots.push(Slot::new(name, now));
        }
    }

    /// No replica is wanted any more, and none is left.
    fn is_done(&self) -> bool {
        let is_left = self.slots.iter().any(|slot| slot.is_running() || slot.is_starting());
        self.settings.replicas == 0 && self.has_seen && !is_left && self.busy.is_empty()
    }

    /// Begins what the plan says. Returns when to ask it again.
    async fn carry_out(&mut self) -> Option<Instant> {
        // What is not known, or not any more, is not acted upon.
        if !self.has_seen || !self.freshness.is_fresh() {
            return None;
        }
        let now = Instant::now();
        let looks_again = self.look_at_drains().await.then(|| now + LOOK);
        let plan = plan(self.wanted(), &self.slots, &self.settings.policy, now);
        let mut wake = plan.wake.into_iter().chain(looks_again).min();
        for action in plan.actions {
            let (slot, kind) = match action {
                Action::Start(slot) => (slot, Work::Start),
                Action::Drain(slot, Why::Outdated) | Action::Stop(slot, _) => (slot, Work::Stop),
                Action::Drain(slot, why) => {
                    self.drain(slot, why).await;
                    wake = Some(now);
                    continue;
                }
                // `configure` has told the publisher.
                Action::Keep(slot) => {
                    let is_outdated = self.known.get(&slot).is_some_and(|known| self.is_outdated(&known.spec));
                    self.slots[slot].kept(is_outdated);
                    wake = Some(now);
                    continue;
                }
            };
            // The end of some work asks for the plan again.
            let is_full = self.busy.values().filter(|&&other| other == kind).count() >= MOST_AT_ONCE;
            if is_full || self.busy.contains_key(&slot) {
                continue;
            }
            if let Some(until) = self.holds.until(&slot, now) {
                wake = Some(wake.map_or(until, |wake| wake.min(until)));
                continue;
            }
            match action {
                Action::Start(slot) => self.start(slot),
                Action::Drain(slot, why) => self.check(slot, why, Action::Drain),
                // One that is drained was checked before.
                Action::Stop(slot, Why::Outdated) if self.slots[slot].is_drained() => {
                    self.stop(slot, Why::Outdated).await;
                }
                Action::Stop(slot, Why::Outdated) => self.check(slot, Why::Outdated, Action::Stop),
                Action::Stop(slot, why) => self.stop(slot, why).await,
                Action::Keep(_) => {}
            }
        }
        wake
    }

    async fn drain(&mut self, slot: usize, why: Why) {
        self.slots[slot].draining(why);
        self.send(drain(&self.slots[slot].name, why, self.settings.drain)).await;
    }

    /// Whether there are any that go on.
    async fn look_at_drains(&mut self) -> bool {
        let (mut any, mut again) = (false, Vec::new());
        for (n, slot) in self.slots.iter_mut().enumerate() {
            let Some(why) = slot.drains_for() else { continue };
            match drained(&self.table.load(), &slot.name, why) {
                Some(true) => slot.drained(),
                Some(false) => any = true,
                None => {
                    any = true;
                    again.push((n, why));
                }
            }
        }
        for (slot, why) in again {
            self.send(drain(&self.slots[slot].name, why, self.settings.drain)).await;
        }
        any
    }

    fn start(&mut self, slot: usize) {
        let (maker, name) = (Arc::clone(&self.maker), Arc::clone(&self.slots[slot].name));
        let leftover = self.leftovers.remove(&slot);
        self.slots[slot].starting();
        self.begin(slot, Work::Start, async move { Done::Started(maker.make(&name, leftover).await) });
    }

    /// What runs is not given up for what cannot be made.
    fn check(&mut self, slot: usize, why: Why, then: fn(usize, Why) -> Action) {
        let maker = Arc::clone(&self.maker);
        self.begin(slot, Work::Stop, async move { Done::Checked(then(slot, why), maker.check().await) });
    }

    async fn stop(&mut self, slot: usize, why: Why) {
        let known = self.known.get_mut(&slot).map(|known| {
            // As the publisher is told below. If it is not stopped, it will be told anew.
            (known.address, known.is_bad) = (None, false);
            Arc::clone(&known.id)
        });
        let Some(id) = known.or_else(|| self.leftovers.remove(&slot).map(|container| container.id)) else { return };
        let name = &self.slots[slot].name;
        tell_of_stop(&self.settings.pool, name, why);
        let event = Event::Stopped { id: Arc::clone(name), crash_loop: false, exit: None };
        self.slots[slot].stopping(why);
        self.send(event).await;
        let (engine, grace) = (self.engine.clone(), self.settings.stop_grace);
        self.begin(slot, Work::Stop, async move { Done::Stopped(why, engine.end(&id, grace).await) });
    }

    fn begin(&mut self, slot: usize, kind: Work, work: impl Future<Output = Done> + Send + 'static) {
        self.busy.insert(slot, kind);
        self.work.spawn(async move { (slot, work.await) });
    }

    async fn done(&mut self, slot: usize, done: Done) {
        let now = Instant::now();
        self.poke.notify_one();
        if let Done::Removed(id, result) = done {
            self.doubles.remove(&id);
            if let Err(error) = result {
                let count = self.double_holds.fail(id, now);
                self.tell(slot, count, "a second container is not removed", &error);
            }
            return;
        }
        self.busy.remove(&slot);
        self.changed.insert(slot, now);
        match done {
            // A list will show the replica. The other was taken care of above.
            Done::Started(Ok(())) | Done::Removed(..) => {}
            Done::Started(Err(Failure::Conflict)) => {
                self.slots[slot].postponed(now);
                if self.holds.fail(slot, now) == MANY_CONFLICTS {
                    let reason = "the engine says that it exists already, and does not show it";
                    let event = self.ends.refused(&mut self.slots[slot], reason, now);
                    self.send(event).await;
                }
            }
            // Only a list that fails means that the engine is away.
            Done::Started(Err(Failure::Engine(error))) => {
                self.slots[slot].postponed(now);
                let count = self.holds.fail(slot, now);
                self.tell(slot, count, "no answer to a start", &error);
            }
            Done::Started(Err(Failure::Refused(reason))) => {
                self.holds.clear(&slot);
                let event = self.ends.refused(&mut self.slots[slot], &reason, now);
                self.send(event).await;
            }
            // Told of when it was ordered; nothing follows.
            Done::Stopped(Why::Surplus, Ok(())) => {
                self.known.remove(&slot);
                self.slots[slot].ended(&self.settings.policy, now);
            }
            Done::Stopped(why, Ok(())) => {
                self.known.remove(&slot);
                self.holds.clear(&slot);
                let reason = format!("stopped: {}", why.as_str());
                self.ended(slot, Exit { reason, code: None, output: Vec::new(), at: now }).await;
            }
            Done::Stopped(_, Err(error)) => {
                self.slots[slot].not_stopped();
                let count = self.holds.fail(slot, now);
                self.tell(slot, count, "a container is not stopped", &error);
            }
            Done::Examined(exit) => self.ended(slot, exit).await,
            Done::Checked(Action::Drain(_, why), Ok(())) => self.drain(slot, why).await,
            Done::Checked(_, Ok(())) => self.stop(slot, Why::Outdated).await,
            Done::Checked(_, Err(failure)) => {
                let count = self.holds.fail(slot, now);
                self.tell(slot, count, "the new settings cannot be rolled out", &failure);
            }
        }
    }

    /// Of the first of several failures in a row.
    fn tell(&self, slot: usize, count: u32, what: &str, error: &dyn std::fmt::Display) {
        let (pool, slot) = (&self.settings.pool, &self.slots[slot].name);
        if count == 1 {
            tracing::warn!(%pool, %slot, "{what}, trying again: {error}");
        } else {
            tracing::debug!(%pool, %slot, count, "{what}: {error}");
        }
    }

    async fn ended(&mut self, slot: usize, exit: Exit) {
        let event = self.ends.ended(&mut self.slots[slot], exit);
        self.send(event).await;
        if slot >= self.wanted() {
            self.send(Event::Left { id: Arc::clone(&self.slots[slot].name) }).await;
        }
    }

    fn judge(&mut self, table: &Table) {
        let now = Instant::now();
        for (&slot, known) in &self.known {
            let slot = &mut self.slots[slot];
            // One that cannot be reached will never be checked.
            let verdict =
                if known.address.is_none() { Some(false) } else { verdict(table, &slot.name, &known.replica) };
            slot.judged(verdict, now);
        }
    }

    /// The publisher takes no notice of slots that it does not know.
    async fn send(&self, event: Event) {
        // No publisher: the app is going down.
        let _ = self.events.send(event).await;
    }

    async fn finish(mut self) {
        let _ = tokio::time::timeout(FINISH, async { while self.work.join_next().await.is_some() {} }).await;
        tracing::info!(pool = %self.settings.pool, owner = self.place.owner, replicas = self.known.len(),
            "containers go on running; the next Ringway of this owner adopts them, `ringway reap --owner` removes them");
    }
}

fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}
