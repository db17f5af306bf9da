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

use super::handover::{Handed, Resting, Spec};
use super::plan::Why;
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
    mut resting: Resting,
    table: TableCell,
    events: mpsc::Sender<Event>,
    stop: CancellationToken,
) {
    let first = settings.borrow_and_update().clone();
    let is_settled = *resting.settled.borrow_and_update();
    let processes = Processes { settings: first.clone(), ports, waiting: JoinSet::new(), children: HashMap::new() };
    let mut supervisor = Supervisor::new(processes, first, table, events, is_settled).await;
    supervisor.adapter.take_over(&mut supervisor.slots, taken_over).await;
    supervisor.run(settings, resting, stop).await;
}

/// The adapter: the child processes of one pool.
struct Processes {
    settings: Settings,
    ports: Ports,
    /// Waits for each child. Yields the slot, and how the child ended.
    waiting: JoinSet<(usize, Exit)>,
    /// The running replicas by slot.
    children: HashMap<usize, ChildProcess>,
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

impl Adapter for Processes {
    type Settings = Settings;
    /// A child process ended.
    type Observation = (usize, Exit);

    fn slot_settings(settings: &Settings) -> &SlotSettings {
        &settings.slots
    }

    fn configure(&mut self, settings: Settings) {
        let ports = if settings.spec.uses_sockets() { 0 } else { settings.slots.replicas as usize };
        if let Err(error) = self.ports.extend(ports) {
            tracing::error!(pool = %settings.slots.pool, %error, "not enough free ports for all replicas");
        }
        self.settings = settings;
    }

    fn running(&self) -> impl Iterator<Item = Running<'_>> {
        let running = |(&slot, child)| {
            let child: &ChildProcess = child;
            Running { slot, address: Some(&child.address), replica: &child.replica }
        };
        self.children.iter().map(running)
    }

    fn is_outdated(&self, slot: usize) -> bool {
        self.children.get(&slot).is_some_and(|child| child.spec != self.settings.spec)
    }

    fn may_act(&self) -> bool {
        true
    }

    fn is_idle(&self) -> bool {
        self.waiting.is_empty()
    }

    async fn start(&mut self, slots: &mut Slots, slot: usize, now: Instant) -> Progress {
        let name = Arc::clone(&slots[slot].name);
        slots[slot].starting();
        match self.spawn(&name, slot).await {
            Ok((pid, held, address)) => {
                slots.note_start();
                tracing::debug!(pool = %slots.pool(), slot = %name, pid, %address, "replica started");
                let spec = Arc::clone(&self.settings.spec);
                self.runs(slots, slot, pid, address, spec, held, now).await;
            }
            Err(error) => slots.refused(slot, &error.to_string()).await,
        }
        Progress::Done
    }

    async fn drain(&mut self, slots: &mut Slots, slot: usize, why: Why, _now: Instant) -> Progress {
        slots.drain(slot, why).await;
        Progress::Done
    }

    async fn stop(&mut self, slots: &mut Slots, slot: usize, why: Why, _now: Instant) -> Progress {
        if let Some(child) = self.children.get(&slot) {
            slots.log_stop(slot, why);
            child.stop.cancel();
        }
        slots[slot].stopping(why);
        Progress::Done
    }

    async fn next(&mut self) -> (usize, Exit) {
        match self.waiting.join_next().await {
            Some(Ok(ended)) => ended,
            // A panic is a bug in Ringway, which a retry cannot fix.
            Some(Err(error)) => std::panic::resume_unwind(error.into_panic()),
            None => std::future::pending().await,
        }
    }

    async fn observe(&mut self, slots: &mut Slots, (slot, exit): (usize, Exit)) {
        if let Some(child) = self.children.remove(&slot) {
            sockets::remove(&child.address);
        }
        slots.ended(slot, exit).await;
    }

    fn hand_over(&self, slots: &Slots) -> io::Result<Vec<Handed>> {
        let handed = self.children.iter().map(|(&slot, child)| {
            let port = match &child.address {
                Address::Ip(_) => Some(self.ports.socket(slot).ok_or(io::ErrorKind::NotFound)?.try_clone()?),
                Address::Unix(_) => None,
            };
            let Held { lifeline, output } = child.held.try_clone()?;
            Ok(Handed {
                pool: slots.pool().to_string(),
                slot: Arc::clone(&slots[slot].name),
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
            let held = Held { lifeline: replica.lifeline, output: replica.output };
            let slot = number as usize - 1;
            self.runs(slots, slot, replica.pid, replica.address, replica.spec, held, now).await;
        }
    }

    /// A replica runs in the slot: waits for its end in the background, and reports it to the publisher.
    #[expect(clippy::too_many_arguments, reason = "each argument is a part of one replica")]
    async fn runs(
        &mut self,
        slots: &mut Slots,
        slot: usize,
        pid: u32,
        address: Address,
        spec: Arc<Spec>,
        held: Held,
        now: Instant,
    ) {
        let name = Arc::clone(&slots[slot].name);
        let waiter = match held.try_clone() {
            Ok(waiter) => waiter,
            Err(error) => return slots.refused(slot, &error.to_string()).await,
        };
        slots[slot].running(false, now);
        let (replica, stop) = (Replica::Process { pid }, CancellationToken::new());
        let grace = self.settings.stop_grace;
        let table = slots.table().clone();
        self.waiting.spawn(wait_for_exit(slot, Arc::clone(&name), waiter, table, stop.clone(), grace));
        let child = ChildProcess { pid, address: address.clone(), replica: replica.clone(), spec, held, stop };
        self.children.insert(slot, child);
        slots.send(Event::Started { id: name, address, replica: Some(replica) }).await;
    }
}
