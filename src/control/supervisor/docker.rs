//! The supervisor's adapter for containers.
//!
//! What is there is known from full lists only, see [`Watch`]. Every container bears labels for owner, pool and
//! slot and a name made of owner and slot: two Ringways that both fill a slot ask for the same name, and the
//! engine gives it to one. Containers without the owner's label are never touched.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::plan::{Action, Policy, Slot, Why, plan};
use super::{Ends, LAST_LINES, verdict};
use crate::backend::{Exit, Replica};
use crate::control::Event;
use crate::control::docker::container::{Container, State};
use crate::control::docker::engine::{Engine, EngineError};
use crate::control::docker::label;
use crate::control::docker::place::{self, Place, Wanted};
use crate::control::docker::watch::{Seen, Sync, Watch};
use crate::table::{Table, TableCell};

mod create;

use self::create::{Failure, Maker};
pub use self::create::{Pull, Spec};

/// Containers that are made, ended or looked at at a time.
const MOST_AT_ONCE: usize = 8;

/// Before a start that somebody else may have done is tried again.
const AFTER_CONFLICT: Duration = Duration::from_millis(250);

/// How long a start or stop that is under way may go on when Ringway stops.
const FINISH: Duration = Duration::from_secs(5);

/// How a pool's replicas are run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The pool's name.
    pub pool: Arc<str>,
    /// One replica for each.
    pub slots: Vec<Arc<str>>,
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

/// Keeps a container in every slot until `stop`. The containers go on: the next Ringway adopts them.
pub async fn supervise(
    settings: Settings,
    engine: Engine,
    table: TableCell,
    events: mpsc::Sender<Event>,
    sync: Arc<Sync>,
    stop: CancellationToken,
) {
    let found = place::wait_for(&engine, &settings.wanted, &settings.pool, &sync);
    let Some(place) = stop.run_until_cancelled(found).await else { return };
    let poke = Arc::new(Notify::new());
    let watch = Watch {
        engine: engine.clone(),
        pool: Arc::clone(&settings.pool),
        labels: vec![
            format!("{}={}", label::OWNER, place.owner),
            format!("{}={}", label::POOL, settings.pool),
            label::SLOT.to_owned(),
        ],
        resync: settings.resync,
        sync: Arc::clone(&sync),
        poke: Arc::clone(&poke),
    };
    let (sender, mut seen) = watch::channel(None);
    let _watching = AbortOnDropHandle::new(tokio::spawn(watch.run(sender)));
    let mut changes = table.watch();
    let mut supervisor = Supervisor::new(settings, engine, place, events, sync, poke);
    while !stop.is_cancelled() {
        let wake = supervisor.carry_out().await;
        let due = tokio::time::sleep_until(wake.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600)).into());
        tokio::select! {
            () = stop.cancelled() => {}
            () = due => {}
            Ok(()) = seen.changed() => {
                let seen = seen.borrow_and_update().clone();
                if let Some(seen) = seen {
                    supervisor.observe(seen).await;
                }
            }
            Ok(()) = changes.changed() => supervisor.judge(&table.load()),
            Some(Ok((slot, done))) = supervisor.work.join_next() => supervisor.done(slot, done).await,
        }
    }
    supervisor.finish().await;
}

struct Supervisor {
    settings: Settings,
    engine: Engine,
    place: Place,
    maker: Arc<Maker>,
    events: mpsc::Sender<Event>,
    sync: Arc<Sync>,
    poke: Arc<Notify>,
    ends: Ends,
    /// Those of the settings, and after them those of which only containers are left.
    slots: Vec<Slot>,
    /// What fills a slot.
    known: HashMap<usize, Known>,
    /// A container that does not run and is in the way of the slot's next one.
    leftovers: HashMap<usize, Container>,
    /// Slots of which a list says nothing yet: when something was done last.
    changed: HashMap<usize, Instant>,
    /// Slots with work under way.
    busy: HashSet<usize>,
    work: JoinSet<(usize, Done)>,
    /// Containers that are being removed because another one fills their slot.
    doubles: HashSet<Arc<str>>,
    has_seen: bool,
}

/// A running container.
struct Known {
    id: Arc<str>,
    replica: Replica,
    /// As the publisher was told.
    address: Option<SocketAddr>,
    /// As the publisher was told.
    is_bad: bool,
}

/// Work on a slot that has come to an end.
enum Done {
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
        events: mpsc::Sender<Event>,
        sync: Arc<Sync>,
        poke: Arc<Notify>,
    ) -> Self {
        let now = Instant::now();
        let slots = settings.slots.iter().map(|name| Slot::new(Arc::clone(name), now)).collect();
        let ends = Ends::new(Arc::clone(&settings.pool), settings.policy);
        let maker = Arc::new(Maker::new(engine.clone(), &settings.pool, &place, settings.spec.clone()));
        Self {
            settings,
            engine,
            place,
            maker,
            events,
            sync,
            poke,
            ends,
            slots,
            known: HashMap::new(),
            leftovers: HashMap::new(),
            changed: HashMap::new(),
            busy: HashSet::new(),
            work: JoinSet::new(),
            doubles: HashSet::new(),
            has_seen: false,
        }
    }

    /// Begins what the plan says. Returns when to ask it again.
    async fn carry_out(&mut self) -> Option<Instant> {
        // What is not known, or not any more, is not acted upon.
        if !self.has_seen || !self.sync.is_fresh() {
            return None;
        }
        let plan = plan(self.settings.slots.len(), &self.slots, &self.settings.policy, Instant::now());
        for action in plan.actions {
            let (Action::Start(slot) | Action::Stop(slot, _)) = action;
            // The end of some work asks for the plan again.
            if self.busy.contains(&slot) || self.work.len() >= MOST_AT_ONCE {
                continue;
            }
            match action {
                Action::Start(slot) => self.start(slot),
                Action::Stop(slot, why) => self.stop(slot, why).await,
            }
        }
        plan.wake
    }

    fn start(&mut self, slot: usize) {
        let (maker, name) = (Arc::clone(&self.maker), Arc::clone(&self.slots[slot].name));
        let leftover = self.leftovers.remove(&slot);
        self.slots[slot].starting();
        self.begin(slot, async move { Done::Started(maker.make(&name, leftover).await) });
    }

    async fn stop(&mut self, slot: usize, why: Why) {
        let known = self.known.remove(&slot).map(|known| known.id);
        let Some(id) = known.or_else(|| self.leftovers.remove(&slot).map(|container| container.id)) else { return };
        let name = &self.slots[slot].name;
        tracing::warn!(pool = %self.settings.pool, slot = %name, container = short(&id), ?why, "replica is stopped");
        let event = Event::Stopped { id: Arc::clone(name), crash_loop: false, exit: None };
        self.slots[slot].stopping(why);
        self.send(slot, event).await;
        let (engine, grace) = (self.engine.clone(), self.settings.stop_grace);
        self.begin(slot, async move { Done::Stopped(why, engine.end(&id, grace).await) });
    }

    fn begin(&mut self, slot: usize, work: impl Future<Output = Done> + Send + 'static) {
        self.busy.insert(slot);
        self.work.spawn(async move { (slot, work.await) });
    }

    async fn done(&mut self, slot: usize, done: Done) {
        let now = Instant::now();
        if let Done::Removed(id, result) = done {
            self.doubles.remove(&id);
            self.note(result.as_ref().err());
            return;
        }
        self.busy.remove(&slot);
        self.changed.insert(slot, now);
        match done {
            // A list will show the replica. The other was taken care of above.
            Done::Started(Ok(())) | Done::Removed(..) => {}
            Done::Started(Err(Failure::Conflict)) => self.slots[slot].postponed(now + AFTER_CONFLICT),
            Done::Started(Err(Failure::Engine(error))) => {
                self.slots[slot].postponed(now);
                self.note(Some(&error));
            }
            Done::Started(Err(Failure::Refused(reason))) => {
                let event = self.ends.refused(&mut self.slots[slot], &reason, now);
                self.send(slot, event).await;
            }
            Done::Stopped(why, Ok(())) => {
                let reason = format!("stopped: {}", format!("{why:?}").to_lowercase());
                self.ended(slot, Exit { reason, code: None, output: Vec::new(), at: now }).await;
            }
            Done::Stopped(_, Err(error)) => {
                self.slots[slot].not_stopped();
                self.note(Some(&error));
            }
            Done::Examined(exit) => self.ended(slot, exit).await,
        }
        self.poke.notify_one();
    }

    /// Nothing is done until a list shows that the engine is there.
    fn note(&self, error: Option<&EngineError>) {
        match error {
            Some(error) if error.is_away() => self.sync.failed(&self.settings.pool, error),
            Some(error) => tracing::warn!(pool = %self.settings.pool, "{error}"),
            None => {}
        }
        self.poke.notify_one();
    }

    async fn ended(&mut self, slot: usize, exit: Exit) {
        let event = self.ends.ended(&mut self.slots[slot], exit);
        self.send(slot, event).await;
    }

    /// Takes a full list.
    async fn observe(&mut self, seen: Seen) {
        self.has_seen = true;
        let mut by_slot: HashMap<String, Vec<Container>> = HashMap::new();
        for container in seen.containers {
            by_slot.entry(container.label(label::SLOT).to_owned()).or_default().push(container);
        }
        for name in by_slot.keys() {
            if !self.slots.iter().any(|slot| *slot.name == **name) {
                self.slots.push(Slot::new(name.as_str().into(), seen.as_of));
            }
        }
        for slot in 0..self.slots.len() {
            let containers = by_slot.remove(&*self.slots[slot].name).unwrap_or_default();
            let is_older = self.changed.get(&slot).is_some_and(|&changed| seen.as_of < changed);
            if !self.busy.contains(&slot) && !is_older {
                let incumbent = self.choose(slot, containers);
                self.observe_slot(slot, incumbent).await;
            }
        }
    }

    /// The container that fills the slot; others that claim it are removed. Every Ringway chooses alike.
    fn choose(&mut self, slot: usize, mut containers: Vec<Container>) -> Option<Container> {
        containers.retain(|container| container.state != State::Removing);
        let name = self.maker.name(&self.slots[slot].name);
        containers.sort_by_key(|container| {
            (container.state == State::Running, *container.name == *name, Arc::clone(&container.id))
        });
        let incumbent = containers.pop();
        for double in containers {
            if self.doubles.insert(Arc::clone(&double.id)) {
                tracing::warn!(pool = %self.settings.pool, slot = %self.slots[slot].name, container = %double.name,
                    "a second container for this slot is removed");
                let (engine, grace) = (self.engine.clone(), self.settings.stop_grace);
                self.work.spawn(async move {
                    let removed = engine.end(&double.id, grace).await;
                    (slot, Done::Removed(double.id, removed))
                });
            }
        }
        incumbent
    }

    async fn observe_slot(&mut self, slot: usize, incumbent: Option<Container>) {
        let now = Instant::now();
        self.leftovers.remove(&slot);
        if slot >= self.settings.slots.len() {
            // Whatever its state, the plan has it stopped and removed.
            if let Some(container) = incumbent {
                self.slots[slot].running(false, now);
                self.leftovers.insert(slot, container);
            }
            return;
        }
        match incumbent {
            Some(container) if container.state == State::Running => self.runs(slot, &container, now).await,
            other => {
                let was_there = self.slots[slot].is_running() || self.slots[slot].is_starting();
                self.known.remove(&slot);
                if was_there {
                    self.died(slot, other.as_ref()).await;
                }
                if let Some(container) = other {
                    self.leftovers.insert(slot, container);
                }
            }
        }
    }

    async fn runs(&mut self, slot: usize, container: &Container, now: Instant) {
        let name = Arc::clone(&self.slots[slot].name);
        if self.known.get(&slot).is_none_or(|known| known.id != container.id) {
            let is_outdated = container.label(label::SPEC) != self.maker.digest();
            tracing::debug!(pool = %self.settings.pool, slot = %name, container = short(&container.id), is_outdated,
                "replica is there");
            self.slots[slot].running(is_outdated, now);
            self.ends.over();
            let replica = Replica::Container { id: Arc::clone(&container.id), name: Arc::clone(&container.name) };
            let known = Known { id: Arc::clone(&container.id), replica, address: None, is_bad: false };
            self.known.insert(slot, known);
        }
        let address = container.addresses.get(&self.place.network);
        let address = address.map(|&ip| SocketAddr::new(ip, self.settings.spec.port));
        let is_bad = container.healthy == Some(false);
        let Some(known) = self.known.get_mut(&slot) else { return };
        let mut news = Vec::new();
        if known.address != address {
            news.push(match address {
                Some(address) => {
                    let replica = Some(known.replica.clone());
                    Event::Started { id: Arc::clone(&name), address, replica }
                }
                None => Event::Stopped { id: Arc::clone(&name), crash_loop: false, exit: None },
            });
            // Word of a new address takes back what was reported.
            (known.address, known.is_bad) = (address, false);
        }
        if known.is_bad != is_bad {
            news.push(Event::Reported { id: name, healthy: !is_bad });
            known.is_bad = is_bad;
        }
        for event in news {
            self.send(slot, event).await;
        }
    }

    /// The slot's replica has ended. Why is asked at once, before the container makes room for the next.
    async fn died(&mut self, slot: usize, container: Option<&Container>) {
        let event = Event::Stopped { id: Arc::clone(&self.slots[slot].name), crash_loop: false, exit: None };
        self.send(slot, event).await;
        match container {
            Some(container) if container.state == State::Dead => {
                let (engine, id) = (self.engine.clone(), Arc::clone(&container.id));
                self.begin(slot, async move { Done::Examined(examine(&engine, &id).await) });
            }
            _ => self.ended(slot, gone()).await,
        }
    }

    fn judge(&mut self, table: &Table) {
        let now = Instant::now();
        for (&slot, known) in &self.known {
            let slot = &mut self.slots[slot];
            slot.judged(verdict(table, &slot.name, &known.replica), now);
        }
    }

    /// Of a slot that is not wanted nobody is told.
    async fn send(&self, slot: usize, event: Event) {
        if slot < self.settings.slots.len() {
            // No publisher: the app is going down.
            let _ = self.events.send(event).await;
        }
    }

    async fn finish(mut self) {
        let _ = tokio::time::timeout(FINISH, async { while self.work.join_next().await.is_some() {} }).await;
        tracing::info!(pool = %self.settings.pool, owner = self.place.owner, replicas = self.known.len(),
            "containers go on running; the next Ringway of this owner adopts them, `ringway reap` removes them");
    }
}

fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

/// How a container has ended.
async fn examine(engine: &Engine, id: &str) -> Exit {
    let Ok(found) = engine.inspect(id).await else { return gone() };
    let state = found.state.unwrap_or_default();
    let code = state.exit_code.unwrap_or_default();
    let mut reason = format!("exit code {code}");
    if state.oom_killed == Some(true) {
        reason += ", out of memory";
    }
    if let Some(error) = state.error.filter(|error| !error.is_empty()) {
        reason = format!("{reason}: {error}");
    }
    Exit { reason, code: Some(code), output: engine.last_lines(id, LAST_LINES).await, at: Instant::now() }
}

fn gone() -> Exit {
    Exit { reason: "its container is gone".to_owned(), code: None, output: Vec::new(), at: Instant::now() }
}
