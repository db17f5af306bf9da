//! The supervisor's adapter for child processes, each behind a [shim](super::shim).
//!
//! # Layout
//!
//! - this file: the adapter
//! - [`lifeline`]: holds, awaits and ends a replica
//! - [`start`]: starts a replica through its shim
//! - [`ports`]: reserves the ports of replicas; [`sockets`]: the directories of their Unix sockets

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::handover::{Handed, Part, Signals, Spec};
use super::plan::{Place, Role, Why};
use super::rollout::Target;
use super::{Adapter, Ending, Progress, Running, SlotSettings, Slots, Supervisor};
use crate::address::Address;
use crate::backend::{Exit, Replica};
use crate::control::Event;
use crate::control::provider::slot_number;
use crate::table::TableCell;

mod lifeline;
mod ports;
mod sockets;
mod start;

pub use self::lifeline::let_go;
use self::lifeline::{Held, wait_for_exit};
pub use self::ports::Ports;
pub use self::start::{THIS_BINARY, is_runnable};

/// How Ringway runs a pool's replicas. Everything except the pool's name may change at run time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Number of replicas, weights, drain and restart policy.
    pub slots: SlotSettings,
    /// What Ringway starts each replica from.
    pub spec: Arc<Spec>,
    /// Time between SIGTERM and SIGKILL when Ringway stops a replica.
    pub stop_grace: Duration,
    /// Path of the Ringway binary.
    pub launcher: PathBuf,
    /// Soft limit on open files of replicas; `None`: Ringway's own.
    pub open_files: Option<u64>,
}

/// Keeps a replica in every slot until `stop`, then stops all of them. The settings may change at run time.
pub async fn supervise(
    mut settings: watch::Receiver<Settings>,
    ports: Ports,
    taken_over: Vec<Handed>,
    mut signals: Signals,
    table: TableCell,
    events: mpsc::Sender<Event>,
    stop: CancellationToken,
) {
    let first = settings.borrow_and_update().clone();
    let processes = Processes { settings: first.clone(), ports, waiting: JoinSet::new(), children: HashMap::new() };
    // All of an old process had the same one, unless a rollout was under way.
    let current = taken_over.iter().filter(|one| one.part == Part::Current).map(|one| &one.spec);
    let previous = current.clone().find(|spec| **spec != first.spec).cloned();
    let numbers = taken_over.iter().filter_map(|one| slot_number(&first.slots.pool, &one.slot));
    let last = numbers.max().unwrap_or_default();
    let mut supervisor = Supervisor::new(processes, first, table, events, &mut signals, previous, Some(last)).await;
    supervisor.adapter.take_over(&mut supervisor.slots, taken_over).await;
    supervisor.run(settings, signals, stop).await;
}

/// The adapter: the child processes of one pool.
struct Processes {
    settings: Settings,
    ports: Ports,
    /// Waits for each child. Yields its process id, and how it ended.
    waiting: JoinSet<(u32, Exit)>,
    /// The running replicas.
    children: HashMap<Place, ChildProcess>,
}

/// A running replica.
struct ChildProcess {
    pid: u32,
    address: Address,
    replica: Replica,
    /// The spec that Ringway started it from.
    spec: Arc<Spec>,
    /// The handles that supervision needs. The shim kills the replica when the last copy of this lifeline closes.
    held: Held,
    /// Sends SIGTERM, and SIGKILL after the grace.
    stop: CancellationToken,
}

impl Target for Arc<Spec> {
    fn image(&self) -> Option<&str> {
        None
    }
}

impl Adapter for Processes {
    type Settings = Settings;
    type Spec = Arc<Spec>;
    /// A child process ended.
    type Observation = (u32, Exit);

    fn slot_settings(settings: &Settings) -> &SlotSettings {
        &settings.slots
    }

    fn spec(&self, settings: &Settings) -> Arc<Spec> {
        Arc::clone(&settings.spec)
    }

    fn configure(&mut self, settings: Settings, spec: Arc<Spec>) {
        let settings = Settings { spec, ..settings };
        let ports = if settings.spec.uses_sockets() { 0 } else { settings.slots.replicas as usize };
        if let Err(error) = self.ports.extend(ports) {
            tracing::error!(pool = %settings.slots.pool, %error, "not enough free ports for all replicas");
        }
        self.settings = settings;
    }

    fn running(&self) -> impl Iterator<Item = Running<'_>> {
        let running = |(&place, child)| {
            let child: &ChildProcess = child;
            Running { place, address: Some(&child.address), replica: &child.replica }
        };
        self.children.iter().map(running)
    }

    fn is_outdated(&self, place: Place) -> bool {
        self.children.get(&place).is_some_and(|child| child.spec != self.settings.spec)
    }

    fn may_act(&self) -> bool {
        true
    }

    fn is_idle(&self) -> bool {
        self.waiting.is_empty()
    }

    async fn start(&mut self, slots: &mut Slots, place: Place, now: Instant) -> Progress {
        let name = Arc::clone(slots.name(place.slot));
        slots[place].starting();
        match self.spawn(&name, place).await {
            Ok((pid, held, address)) => {
                slots.note_start();
                tracing::debug!(pool = %slots.pool(), slot = %name, pid, %address, "replica started");
                let spec = Arc::clone(&self.settings.spec);
                self.runs(slots, place, pid, address, spec, held, now).await;
            }
            Err(error) => slots.refused(place, &error.to_string()).await,
        }
        Progress::Done
    }

    fn has_room_beside(&mut self, slot: usize) -> Result<(), &'static str> {
        if self.settings.spec.uses_sockets() {
            return Ok(());
        }
        let reserved = self.ports.reserve_beside(slot);
        reserved.map_err(|_| "`ports` has no free one for a second replica; add ports, so that no key moves")
    }

    fn flip(&mut self, _slots: &Slots, slot: usize) -> Option<(Replica, Option<Replica>)> {
        let (front, beside) = (Place::front(slot), Place::beside(slot));
        let next = self.children.remove(&beside)?;
        let former = self.children.remove(&front);
        self.ports.flip(slot);
        let replicas = (next.replica.clone(), former.as_ref().map(|former| former.replica.clone()));
        self.children.insert(front, next);
        self.children.extend(former.map(|former| (beside, former)));
        Some(replicas)
    }

    async fn drain(&mut self, slots: &mut Slots, place: Place, why: Why, _now: Instant) -> Progress {
        slots.drain(place, why).await;
        Progress::Done
    }

    async fn stop(&mut self, slots: &mut Slots, place: Place, why: Why, _now: Instant) -> Progress {
        if let Some(child) = self.children.get(&place) {
            slots.log_stop(place, why);
            child.stop.cancel();
        }
        slots[place].stopping(why);
        Progress::Done
    }

    async fn next(&mut self) -> (u32, Exit) {
        match self.waiting.join_next().await {
            Some(Ok(ended)) => ended,
            // A panic is a bug in Ringway, which a retry cannot fix.
            Some(Err(error)) => std::panic::resume_unwind(error.into_panic()),
            None => std::future::pending().await,
        }
    }

    async fn observe(&mut self, slots: &mut Slots, (pid, exit): (u32, Exit)) {
        let found = self.children.iter().find(|(_, child)| child.pid == pid).map(|(&place, _)| place);
        let Some(place) = found else { return };
        if let Some(child) = self.children.remove(&place) {
            sockets::remove(&child.address);
        }
        if place.role == Role::Beside {
            self.ports.release_beside(place.slot);
        }
        slots.ended(place, exit).await;
    }

    fn hand_over(&self, slots: &Slots) -> io::Result<Vec<Handed>> {
        let handed = self.children.iter().map(|(&place, child)| {
            let port = match &child.address {
                Address::Ip(_) => Some(self.ports.socket(place).ok_or(io::ErrorKind::NotFound)?.try_clone()?),
                Address::Unix(_) => None,
            };
            let Held { lifeline, output } = child.held.try_clone()?;
            Ok(Handed {
                pool: slots.pool().to_string(),
                slot: Arc::clone(slots.name(place.slot)),
                part: match place.role {
                    Role::Front => Part::Current,
                    Role::Beside if slots[place].is_former => Part::Former,
                    Role::Beside => Part::Next,
                },
                pid: child.pid,
                address: child.address.clone(),
                spec: Arc::clone(&child.spec),
                lifeline,
                output,
                port,
            })
        });
        handed.collect()
    }

    async fn finish(mut self, _slots: Slots, ending: Ending) {
        // Dropping our ends of the lifelines leaves the replicas to the successor, which has its own ends.
        if ending == Ending::HandedOver {
            return;
        }
        for child in self.children.values() {
            child.stop.cancel();
        }
        while self.waiting.join_next().await.is_some() {}
        self.children.drain().for_each(|(_, child)| sockets::remove(&child.address));
    }
}

impl Processes {
    /// Takes over running replicas.
    async fn take_over(&mut self, slots: &mut Slots, taken_over: Vec<Handed>) {
        let now = Instant::now();
        for replica in taken_over {
            let number = slot_number(slots.pool(), &replica.slot);
            let Some(number @ 1..) = number else { continue };
            slots.extend(number);
            tracing::info!(pool = %slots.pool(), slot = %replica.slot, pid = replica.pid, "replica taken over");
            let place = replica.place(number);
            let held = Held { lifeline: replica.lifeline, output: replica.output };
            self.runs(slots, place, replica.pid, replica.address, replica.spec, held, now).await;
            slots[place].is_former = replica.part == Part::Former;
        }
    }

    /// A replica runs in the slot: waits for its end in the background, and reports it to the publisher.
    #[expect(clippy::too_many_arguments, reason = "each argument is a part of one replica")]
    async fn runs(
        &mut self,
        slots: &mut Slots,
        place: Place,
        pid: u32,
        address: Address,
        spec: Arc<Spec>,
        held: Held,
        now: Instant,
    ) {
        let name = Arc::clone(slots.name(place.slot));
        let waiter = match held.try_clone() {
            Ok(waiter) => waiter,
            Err(error) => return slots.refused(place, &error.to_string()).await,
        };
        slots[place].running(false, now);
        let (replica, stop) = (Replica::Process { pid }, CancellationToken::new());
        let grace = self.settings.stop_grace;
        let table = slots.table().clone();
        self.waiting.spawn(wait_for_exit(pid, name, waiter, table, stop.clone(), grace));
        let child = ChildProcess { pid, address: address.clone(), replica: replica.clone(), spec, held, stop };
        self.children.insert(place, child);
        slots.report(place, address, replica).await;
    }
}
