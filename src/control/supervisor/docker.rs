//! The supervisor's adapter for containers.
//!
//! Ringway learns the state of containers only from full lists, see [`Watch`]. Every container has labels for owner,
//! pool and slot, and a name made of owner and slot. One that comes next in a rollout, and one that has filled the slot before, have a
//! suffix. If two Ringways fill the same slot, both ask for the same name,
//! and the engine gives it to one of them. Ringway never touches a container without its owner's label.
//!
//! # Layout
//!
//! - this file: the adapter, and the handling of finished work
//! - [`observe`]: derives the state of the slots from a full list
//! - [`work`]: starts and stops under way, and what follows from them
//! - [`create`]: creates containers
//! - [`backoff`]: waits between retries

use std::collections::{HashMap, HashSet};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::handover::{Handed, Signals};
use super::plan::{Action, Place, Role, Why};
use super::{Adapter, Ending, Progress, Running, SlotSettings, Slots, Supervisor};
use crate::backend::Replica;
use crate::control::Event;
use crate::control::docker::container::Container;
use crate::control::docker::engine::Engine;
use crate::control::docker::scope::{self, Scope, ScopeSettings};
use crate::control::docker::watch::{EngineStatus, Seen, Watch};
use crate::table::TableCell;

mod backoff;
mod create;
mod observe;
mod work;

use self::backoff::Backoff;
use self::create::{Maker, Pinned};
pub use self::create::{Pull, Spec};
use self::observe::Known;
use self::work::{Done, Work};

/// How long Ringway waits for starts and stops in progress when it stops.
const FINISH: Duration = Duration::from_secs(5);

/// Longest time to look up the image behind a name.
const LOOK_UP: Duration = Duration::from_secs(5);

/// How Ringway runs a pool's replicas. Everything except the pool's name and the scope may change at run time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Number of replicas, weights, drain and restart policy.
    pub slots: SlotSettings,
    /// What Ringway creates each container from.
    pub spec: Spec,
    /// Owner of the containers, and the network on which Ringway reaches them.
    pub scope: ScopeSettings,
    /// Time between SIGTERM and SIGKILL when Ringway stops a replica.
    pub stop_grace: Duration,
    /// Longest time between two full lists.
    pub resync: Duration,
}

/// Keeps a container in every slot until `stop`. The containers keep running after that: the next Ringway adopts them.
/// The settings may change at run time.
pub async fn supervise(
    mut settings: watch::Receiver<Settings>,
    engine: Engine,
    table: TableCell,
    events: mpsc::Sender<Event>,
    engine_status: Arc<EngineStatus>,
    mut signals: Signals,
    stop: CancellationToken,
) {
    let first = settings.borrow_and_update().clone();
    let pool = Arc::clone(&first.slots.pool);
    let scope = {
        let mut found = std::pin::pin!(scope::wait_for(&engine, &first.scope, &pool, &engine_status));
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                scope = &mut found => break scope,
                // The sender hears that nobody has taken the order.
                Some(_order) = signals.orders.recv() => {}
                Some(handover) = signals.handovers.recv() => if handover.decide(Ok(Vec::new()), &stop).await {
                    return;
                },
            }
        }
    };
    let poke = Arc::new(Notify::new());
    let watch = Watch {
        notices_stops: false,
        engine: engine.clone(),
        pool: Arc::clone(&pool),
        labels: scope.labels(&pool),
        resync: first.resync,
        engine_status: Arc::clone(&engine_status),
        poke: Arc::clone(&poke),
    };
    let (sender, seen) = watch::channel(None);
    let containers = Containers {
        maker: {
            let spec = Pinned { spec: first.spec.clone(), image: None };
            Arc::new(Maker::new(engine.clone(), &pool, &scope, spec.clone(), &spec))
        },
        image: None,
        settings: first.clone(),
        engine,
        scope,
        engine_status,
        watching: Box::pin(watch.run(sender)),
        seen,
        poke,
        known: HashMap::new(),
        leftovers: HashMap::new(),
        changed: HashMap::new(),
        busy: HashMap::new(),
        work: JoinSet::new(),
        backoff: Backoff::default(),
        doubles: HashSet::new(),
        double_backoff: Backoff::default(),
        has_seen: false,
    };
    let supervisor = Supervisor::new(containers, first, table, events, &mut signals, None, None).await;
    supervisor.run(settings, signals, stop).await;
}

/// The adapter: the containers of one pool.
struct Containers {
    settings: Settings,
    engine: Engine,
    scope: Scope,
    maker: Arc<Maker>,
    /// The name of an image, and the id of the one that it stood for when Ringway looked last.
    image: Option<(String, Arc<str>)>,
    engine_status: Arc<EngineStatus>,
    /// Fetches the lists that arrive in `seen`. Does not end while `seen` exists.
    watching: Pin<Box<dyn Future<Output = ()> + Send>>,
    seen: watch::Receiver<Option<Seen>>,
    /// Requests a list.
    poke: Arc<Notify>,
    /// The running containers.
    known: HashMap<Place, Known>,
    /// Containers that do not run and block the next container of their seat.
    leftovers: HashMap<Place, Container>,
    /// When work on a seat last finished. An older list says nothing about it.
    changed: HashMap<Place, Instant>,
    /// Seats with work in progress.
    busy: HashMap<Place, Work>,
    work: JoinSet<(Place, Done)>,
    /// Waits of seats after failed commands to the engine.
    backoff: Backoff<Place>,
    /// Containers being removed because they fill no slot or another one fills theirs.
    doubles: HashSet<Arc<str>>,
    double_backoff: Backoff<Arc<str>>,
    has_seen: bool,
}

/// Exchanges the entries of two seats.
fn exchange<T>(map: &mut HashMap<Place, T>, [one, other]: [Place; 2]) {
    let (of_one, of_other) = (map.remove(&one), map.remove(&other));
    map.extend(of_one.map(|value| (other, value)));
    map.extend(of_other.map(|value| (one, value)));
}

/// An observation of the adapter.
enum Observation {
    List(Option<Seen>),
    Finished(Place, Done),
}

impl Adapter for Containers {
    type Settings = Settings;
    type Spec = Pinned;
    type Observation = Observation;

    fn slot_settings(settings: &Settings) -> &SlotSettings {
        &settings.slots
    }

    fn spec(&self, settings: &Settings) -> Pinned {
        let image = self.image.as_ref().filter(|(name, _)| *name == settings.spec.image);
        Pinned { spec: settings.spec.clone(), image: image.map(|(_, id)| Arc::clone(id)) }
    }

    async fn look_up(&mut self, settings: &Settings) {
        let image = &settings.spec.image;
        match tokio::time::timeout(LOOK_UP, self.engine.image_id(image)).await {
            Ok(Ok(Some(id))) => self.image = Some((image.clone(), id.into())),
            // What was known last still holds. Its containers may still run.
            Ok(Ok(None)) => tracing::debug!(image, "the engine has no such image"),
            Ok(Err(error)) => tracing::debug!(image, %error, "cannot look up the image"),
            Err(_elapsed) => tracing::debug!(image, "the engine does not answer a look-up of the image"),
        }
    }

    fn configure(&mut self, settings: Settings, spec: Pinned) {
        let wanted = self.spec(&settings);
        self.maker = Arc::new(Maker::new(self.engine.clone(), &settings.slots.pool, &self.scope, spec, &wanted));
        self.settings = settings;
    }

    fn running(&self) -> impl Iterator<Item = Running<'_>> {
        self.known.iter().map(|(&place, known)| Running {
            place,
            address: known.address.as_ref(),
            replica: &known.replica,
        })
    }

    fn is_outdated(&self, place: Place) -> bool {
        self.known.get(&place).is_some_and(|known| self.maker.is_outdated(&known.spec, &known.image))
    }

    fn may_act(&self) -> bool {
        self.has_seen && self.engine_status.is_fresh()
    }

    fn is_idle(&self) -> bool {
        self.has_seen && self.busy.is_empty()
    }

    async fn start(&mut self, slots: &mut Slots, place: Place, now: Instant) -> Progress {
        if let Some(wait) = self.must_wait(place, Work::Start, now) {
            return wait;
        }
        let (maker, name) = (Arc::clone(&self.maker), Arc::clone(slots.name(place.slot)));
        let leftover = self.leftovers.remove(&place);
        slots[place].starting();
        self.begin(place, Work::Start, async move {
            // What is missing has a better text than the engine's.
            let check = if place.role == Role::Beside { maker.check().await } else { Ok(()) };
            Done::Started(match check {
                Ok(()) => maker.make(&name, place.role, leftover).await,
                Err(failure) => Err(failure),
            })
        })
    }

    fn has_room_beside(&mut self, _slot: usize) -> Result<(), &'static str> {
        Ok(())
    }

    fn flip(&mut self, slots: &Slots, slot: usize) -> Option<(Replica, Option<Replica>)> {
        let places = [Place::front(slot), Place::beside(slot)];
        if places.iter().any(|place| self.busy.contains_key(place)) {
            return None;
        }
        let names = self.maker.names(slots.name(slot));
        let next = self.known.remove(&places[1])?.named(&names.current());
        let former = self.known.remove(&places[0]).map(|former| former.named(&names.former()));
        let replicas = (next.replica.clone(), former.as_ref().map(|former| former.replica.clone()));
        self.known.insert(places[0], next);
        self.known.extend(former.map(|former| (places[1], former)));
        exchange(&mut self.leftovers, places);
        exchange(&mut self.changed, places);
        self.name(slots, slot);
        Some(replicas)
    }

    async fn drain(&mut self, slots: &mut Slots, place: Place, why: Why, now: Instant) -> Progress {
        if why == Why::Outdated && place.role == Role::Front {
            let wait = self.must_wait(place, Work::Stop, now);
            return wait.unwrap_or_else(|| self.check(place, Action::Drain(place, why)));
        }
        slots.drain(place, why).await;
        Progress::Done
    }

    async fn stop(&mut self, slots: &mut Slots, place: Place, why: Why, now: Instant) -> Progress {
        if let Some(wait) = self.must_wait(place, Work::Stop, now) {
            return wait;
        }
        // Ringway checked the settings before it drained the replica.
        if why == Why::Outdated && !slots[place].is_drained() {
            return self.check(place, Action::Stop(place, why));
        }
        self.end(slots, place, why).await
    }

    async fn next(&mut self) -> Observation {
        tokio::select! {
            Ok(()) = self.seen.changed() => Observation::List(self.seen.borrow_and_update().clone()),
            () = &mut self.watching => std::future::pending().await,
            Some(finished) = self.work.join_next() => match finished {
                Ok((place, done)) => Observation::Finished(place, done),
                // A panic is a bug in Ringway, which a retry cannot fix.
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            },
        }
    }

    async fn observe(&mut self, slots: &mut Slots, observation: Observation) {
        match observation {
            Observation::List(Some(seen)) => {
                self.take_list(slots, seen).await;
                slots.judge(self.running());
            }
            Observation::List(None) => {}
            Observation::Finished(place, done) => self.finished(slots, place, done).await,
        }
    }

    /// Returns none: a successor adopts containers by their labels.
    fn hand_over(&self, _slots: &Slots) -> io::Result<Vec<Handed>> {
        Ok(Vec::new())
    }

    async fn finish(mut self, slots: Slots, _ending: Ending) {
        let _ = tokio::time::timeout(FINISH, async { while self.work.join_next().await.is_some() {} }).await;
        tracing::info!(pool = %slots.pool(), owner = self.scope.owner, containers = self.known.len(),
            "containers keep running; the next Ringway of this owner adopts them, `ringway reap --owner` removes them");
    }
}
