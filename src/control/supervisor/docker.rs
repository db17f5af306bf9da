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

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::plan::{Action, Policy, Slot, Why, plan};
use super::{Ends, verdict};
use crate::backend::{Exit, Replica};
use crate::control::Event;
use crate::control::docker::container::Container;
use crate::control::docker::engine::{Engine, EngineError};
use crate::control::docker::label;
use crate::control::docker::place::{self, Place, Wanted};
use crate::control::docker::watch::{Sync, Watch};
use crate::table::{Table, TableCell};

mod create;
mod observe;

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
