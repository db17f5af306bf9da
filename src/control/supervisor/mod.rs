//! The supervisor: keeps the configured number of replicas running.
//!
//! # Layout
//!
//! - this file: the loop, and the [`Adapter`] that starts, stops and observes replicas
//! - [`plan`]: decides what to do next; pure
//! - [`slots`]: the slots of a pool, and their events for the publisher
//! - [`handover`]: what one Ringway hands over to the next during an upgrade
//! - [`ends`]: records and logs ends of replicas and failed starts
//! - [`process`]: the adapter for child processes
//! - [`docker`]: the adapter for containers
//! - [`shim`]: the process between Ringway and a child process
//! - [`launch`]: the step in a child process before it becomes the replica
//! - [`output`]: writes the output of child processes to the log

pub mod docker;
pub mod handover;
pub mod launch;
pub mod plan;
pub mod process;
pub mod shim;

mod ends;
mod output;
mod slots;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use self::handover::{Handed, Resting};
use self::plan::{Action, Why};
pub use self::slots::SlotSettings;
use self::slots::{LOOK, Running, Slots};
use super::Event;
use crate::table::TableCell;

/// Number of lines of a replica's output kept for its [`Exit`](crate::backend::Exit).
const LAST_LINES: usize = 10;

/// Starts, stops and observes the replicas of one pool: the supervisor decides, its adapter acts.
trait Adapter {
    /// Settings of this kind of replica; they include the [`SlotSettings`].
    type Settings: Clone;
    /// Something that the adapter has observed.
    type Observation;

    /// The settings that all kinds share.
    fn slot_settings(settings: &Self::Settings) -> &SlotSettings;

    /// Applies the first settings, or changed ones.
    fn configure(&mut self, settings: Self::Settings);

    /// The running replicas.
    fn running(&self) -> impl Iterator<Item = Running<'_>>;

    /// Whether the replica in a slot was started from different settings than the current ones.
    fn is_outdated(&self, slot: usize) -> bool;

    /// Whether the adapter knows enough to act.
    fn may_act(&self) -> bool;

    /// Whether no work is in progress.
    fn is_idle(&self) -> bool;

    /// Starts a replica.
    async fn start(&mut self, slots: &mut Slots, slot: usize, now: Instant) -> Progress;

    /// Drains a replica that will be stopped.
    async fn drain(&mut self, slots: &mut Slots, slot: usize, why: Why, now: Instant) -> Progress;

    /// Stops a replica.
    async fn stop(&mut self, slots: &mut Slots, slot: usize, why: Why, now: Instant) -> Progress;

    /// Waits for the next observation. Dropping the future loses no observation.
    async fn next(&mut self) -> Self::Observation;

    /// Applies an observation.
    async fn observe(&mut self, slots: &mut Slots, observation: Self::Observation);

    /// Copies of the handles that a successor needs to supervise the replicas.
    fn hand_over(&self, slots: &Slots) -> io::Result<Vec<Handed>>;

    /// Ends the supervision.
    async fn finish(self, slots: Slots, ending: Ending);
}

/// The progress of an action of the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    /// Done. The plan may have more to do.
    Done,
    /// An observation will follow.
    UnderWay,
    /// The action must wait until this time.
    Later(Instant),
}

/// Why a supervisor ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// Ringway stops, or the pool has no replicas left.
    Stopped,
    /// A successor supervises the replicas now.
    HandedOver,
}

/// The loop that keeps a replica in every configured slot.
struct Supervisor<A> {
    adapter: A,
    slots: Slots,
    table_changes: watch::Receiver<u64>,
}

impl<A: Adapter> Supervisor<A> {
    /// A supervisor with its first settings. Reports the slots to the publisher.
    async fn new(
        adapter: A,
        settings: A::Settings,
        table: TableCell,
        events: mpsc::Sender<Event>,
        is_settled: bool,
    ) -> Self {
        let slots = Slots::new(A::slot_settings(&settings).clone(), table, events, is_settled);
        let table_changes = slots.watch_table();
        let mut supervisor = Self { adapter, slots, table_changes };
        supervisor.configure(settings).await;
        supervisor
    }

    /// Runs until `stop`, until the pool is configured to have no replicas and none is left, or until a successor has
    /// taken over.
    async fn run(mut self, mut settings: watch::Receiver<A::Settings>, resting: Resting, stop: CancellationToken) {
        /// The timeout when nothing is due.
        const LONG: Duration = Duration::from_secs(3600);
        let Resting { mut settled, mut handovers } = resting;
        let mut ending = Ending::Stopped;
        while !stop.is_cancelled() && !self.is_done() {
            let wake = self.act().await.unwrap_or_else(|| Instant::now() + LONG);
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep_until(wake.into()) => {}
                observation = self.adapter.next() => self.adapter.observe(&mut self.slots, observation).await,
                Ok(()) = self.table_changes.changed() => self.slots.judge(self.adapter.running()),
                Ok(()) = settings.changed() => {
                    let changed = settings.borrow_and_update().clone();
                    // They may be the remedy.
                    self.slots.forgive(Instant::now());
                    self.configure(changed).await;
                }
                // The predecessor is gone, and its connections with it: adopted replicas may be outdated or surplus.
                Ok(()) = settled.changed(), if !self.slots.is_settled => {
                    self.slots.is_settled = true;
                    let current = settings.borrow().clone();
                    self.configure(current).await;
                }
                Some(handover) = handovers.recv() => {
                    let handed = self.adapter.hand_over(&self.slots);
                    if handover.decide(handed, &stop).await {
                        ending = Ending::HandedOver;
                        break;
                    }
                }
            }
        }
        self.adapter.finish(self.slots, ending).await;
    }

    async fn configure(&mut self, settings: A::Settings) {
        self.slots.configure(A::slot_settings(&settings).clone());
        self.adapter.configure(settings);
        for Running { slot, .. } in self.adapter.running() {
            let is_outdated = self.is_outdated(slot);
            self.slots[slot].outdated(is_outdated);
        }
        self.slots.announce().await;
        // A leaving slot may have left before it joined again: report its replica to the publisher.
        let wanted = self.slots.settings.replicas as usize;
        for Running { slot, address, replica } in self.adapter.running().filter(|running| running.slot < wanted) {
            let (Some(address), id) = (address.cloned(), Arc::clone(&self.slots[slot].name)) else { continue };
            self.slots.send(Event::Started { id, address, replica: Some(replica.clone()) }).await;
        }
        self.slots.withdraw_surplus().await;
    }

    fn is_outdated(&self, slot: usize) -> bool {
        self.slots.is_settled && self.adapter.is_outdated(slot)
    }

    /// The pool is configured to have no replicas, and none is left.
    fn is_done(&self) -> bool {
        self.slots.settings.replicas == 0 && self.adapter.is_idle() && !self.slots.any_in_use()
    }

    /// Carries out the plan. Returns when to plan again.
    async fn act(&mut self) -> Option<Instant> {
        if !self.adapter.may_act() {
            return None;
        }
        let now = Instant::now();
        let next_look = self.slots.look_at_drains().await.then(|| now + LOOK);
        let plan = self.slots.plan(now);
        let mut wake = plan.wake.into_iter().chain(next_look).min();
        for action in plan.actions {
            let progress = match action {
                Action::Start(slot) => self.adapter.start(&mut self.slots, slot, now).await,
                Action::Drain(slot, why) => self.adapter.drain(&mut self.slots, slot, why, now).await,
                Action::Stop(slot, why) => self.adapter.stop(&mut self.slots, slot, why, now).await,
                // `configure` has reported this to the publisher.
                Action::Keep(slot) => {
                    let is_outdated = self.is_outdated(slot);
                    self.slots[slot].kept(is_outdated);
                    Progress::Done
                }
            };
            let again = match progress {
                Progress::Done => Some(now),
                Progress::UnderWay => None,
                Progress::Later(until) => Some(until),
            };
            wake = wake.into_iter().chain(again).min();
        }
        wake
    }
}
