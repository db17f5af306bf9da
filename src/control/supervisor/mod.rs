//! The supervisor: keeps the configured number of replicas running.
//!
//! # Layout
//!
//! - this file: the loop, and the [`Adapter`] that starts, stops and observes replicas
//! - [`plan`]: decides what to do next; pure
//! - [`rollout`]: how far the replacement of outdated replicas is; pure
//! - [`scaling`]: how many replicas a pool has that scales by itself; pure. [`load`]: where the supervisor follows it
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
pub mod rollout;
pub mod scaling;
pub mod shim;

mod ends;
mod load;
mod output;
mod slots;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use self::handover::{Handed, Signals};
use self::plan::{Action, Failure, Place, Role, Why};
use self::rollout::{Rollout, RolloutOrder, Stage, Target};
use self::scaling::{Scaler, ScalingStatus};
pub use self::slots::SlotSettings;
use self::slots::{LOOK, Running, Slots};
use super::Event;
use crate::backend::Replica;
use crate::table::TableCell;

/// Number of lines of a replica's output kept for its [`Exit`](crate::backend::Exit).
const LAST_LINES: usize = 10;

/// Starts, stops and observes the replicas of one pool: the supervisor decides, its adapter acts.
trait Adapter {
    /// Settings of this kind of replica; they include the [`SlotSettings`].
    type Settings: Clone;
    /// What a replica is started from. One with another spec is outdated.
    type Spec: Target;
    /// Something that the adapter has observed.
    type Observation;

    /// The settings that all kinds share.
    fn slot_settings(settings: &Self::Settings) -> &SlotSettings;

    /// What the settings want replicas to be started from.
    fn spec(&self, settings: &Self::Settings) -> Self::Spec;

    /// Applies the first settings, or changed ones. Starts replicas from `spec`, which may be an earlier one.
    fn configure(&mut self, settings: Self::Settings, spec: Self::Spec);

    /// Looks again at what the spec of these settings stands for outside of Ringway, like the image behind a name.
    async fn look_up(&mut self, _settings: &Self::Settings) {}

    /// The running replicas.
    fn running(&self) -> impl Iterator<Item = Running<'_>>;

    /// Whether a replica was started from different settings than the current ones.
    fn is_outdated(&self, place: Place) -> bool;

    /// Whether the adapter knows enough to act.
    fn may_act(&self) -> bool;

    /// Whether no work is in progress.
    fn is_idle(&self) -> bool;

    /// Starts a replica.
    async fn start(&mut self, slots: &mut Slots, place: Place, now: Instant) -> Progress;

    /// Makes room for a second replica beside the one that fills the slot.
    ///
    /// # Errors
    /// Why there is no room.
    fn has_room_beside(&mut self, slot: usize) -> Result<(), &'static str>;

    /// Exchanges the replica that fills a slot and the one beside it. Returns the one that fills it now, and the other one; `None`:
    /// work on one of them is in progress.
    fn flip(&mut self, slots: &Slots, slot: usize) -> Option<(Replica, Option<Replica>)>;

    /// Drains a replica that will be stopped.
    async fn drain(&mut self, slots: &mut Slots, place: Place, why: Why, now: Instant) -> Progress;

    /// Stops a replica.
    async fn stop(&mut self, slots: &mut Slots, place: Place, why: Why, now: Instant) -> Progress;

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
struct Supervisor<A: Adapter> {
    adapter: A,
    slots: Slots,
    /// The settings as they are configured. A rollout that has failed may have gone back to another spec.
    settings: A::Settings,
    rollout: Rollout<A::Spec>,
    scaler: Scaler,
    scaling: Arc<ScalingStatus>,
    /// Connections that had been made to the pool's backends at the last look.
    made: u64,
    table_changes: watch::Receiver<u64>,
}

impl<A: Adapter> Supervisor<A> {
    /// A supervisor with its first settings. Reports the slots to the publisher. `previous`: what the replicas of a predecessor are from.
    /// `running`: the number of its slots, if that is known already.
    async fn new(
        adapter: A,
        settings: A::Settings,
        table: TableCell,
        events: mpsc::Sender<Event>,
        signals: &mut Signals,
        previous: Option<A::Spec>,
        running: Option<u32>,
    ) -> Self {
        let is_settled = *signals.settled.borrow_and_update();
        let mut slots = Slots::new(A::slot_settings(&settings).clone(), table, events, is_settled);
        slots.scaled = running;
        let mut adapter = adapter;
        adapter.look_up(&settings).await;
        let mut rollout = Rollout::new(Arc::clone(slots.pool()), adapter.spec(&settings), Arc::clone(&signals.rollout));
        rollout.go_on(previous, signals.refused.take(), Instant::now());
        let table_changes = slots.watch_table();
        let scaling = Arc::clone(&signals.scaling);
        let mut supervisor =
            Self { adapter, slots, settings, rollout, scaler: Scaler::default(), scaling, made: 0, table_changes };
        supervisor.apply().await;
        supervisor
    }

    /// Runs until `stop`, until the pool is configured to have no replicas and none is left, or until a successor has
    /// taken over.
    async fn run(mut self, mut settings: watch::Receiver<A::Settings>, signals: Signals, stop: CancellationToken) {
        /// The timeout when nothing is due.
        const LONG: Duration = Duration::from_secs(3600);
        let Signals { mut settled, mut handovers, mut orders, rollout, .. } = signals;
        let mut ending = Ending::Stopped;
        while !stop.is_cancelled() && !self.is_done() {
            let wake = self.act().await.unwrap_or_else(|| Instant::now() + LONG);
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep_until(wake.into()) => {}
                observation = self.adapter.next() => {
                    self.adapter.observe(&mut self.slots, observation).await;
                    self.follow_spec().await;
                    if let Some(reason) = self.slots.failure.take() {
                        self.fail(&reason).await;
                    }
                }
                Ok(()) = self.table_changes.changed() => self.slots.judge(self.adapter.running()),
                // The next turn of the loop counts it.
                () = self.scaling.waiting.called() => {}
                Ok(()) = settings.changed() => {
                    let changed = settings.borrow_and_update().clone();
                    self.reconfigure(changed).await;
                }
                // The predecessor is gone, and its connections with it: adopted replicas may be outdated or surplus.
                Ok(()) = settled.changed(), if !self.slots.is_settled => {
                    self.slots.is_settled = true;
                    self.apply().await;
                }
                Some((order, obeyed)) = orders.recv() => {
                    // Whoever has lost patience does not expect it any more.
                    if obeyed.is_closed() {
                        continue;
                    }
                    // An order is about the settings that were sent before it.
                    if settings.has_changed().unwrap_or(false) {
                        let changed = settings.borrow_and_update().clone();
                        self.reconfigure(changed).await;
                    }
                    self.obey(order).await;
                    self.follow_rollout(Instant::now());
                    // The sender may have gone.
                    let _ = obeyed.send(rollout.view());
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

    /// The settings have changed.
    async fn reconfigure(&mut self, settings: A::Settings) {
        self.settings = settings;
        self.adapter.look_up(&self.settings).await;
        self.rollout.configure(self.adapter.spec(&self.settings), Instant::now());
        // They may be the remedy.
        self.slots.forgive(Instant::now());
        self.apply().await;
    }

    /// Applies the settings, with the spec that the rollout goes to.
    async fn apply(&mut self) {
        self.slots.configure(A::slot_settings(&self.settings).clone());
        self.adapter.configure(self.settings.clone(), self.rollout.spec().clone());
        self.mark_outdated();
        self.slots.announce().await;
        // A leaving slot may have left before it joined again: report its replica to the publisher.
        let wanted = self.slots.goal() as usize;
        // A slot before what stands beside it.
        let mut running: Vec<_> = self.adapter.running().filter(|running| running.place.slot < wanted).collect();
        running.sort_by_key(|running| running.place);
        for Running { place, address, replica } in running {
            // One that is being stopped serves no more, even if its slot is wanted again.
            let serves = !self.slots[place].is_former && self.slots[place].stops_for().is_none();
            if let (Some(address), true) = (address.cloned(), serves) {
                self.slots.report(place, address, replica.clone()).await;
            }
        }
        self.slots.withdraw_surplus().await;
    }

    /// An observation may have shown that the spec stands for something else now.
    async fn follow_spec(&mut self) {
        let wanted = self.adapter.spec(&self.settings);
        if self.rollout.configure(wanted, Instant::now()) {
            self.slots.forgive(Instant::now());
            self.apply().await;
        }
    }

    fn mark_outdated(&mut self) {
        for Running { place, .. } in self.adapter.running() {
            let is_outdated = self.is_outdated(place);
            self.slots[place].outdated(is_outdated);
        }
    }

    fn is_outdated(&self, place: Place) -> bool {
        self.slots.is_settled && self.adapter.is_outdated(place)
    }

    /// Carries out an order about the rollout.
    async fn obey(&mut self, order: RolloutOrder) {
        match order {
            RolloutOrder::Begin { is_forced } => {
                self.adapter.look_up(&self.settings).await;
                self.rollout.begin(self.adapter.spec(&self.settings), Instant::now());
                self.slots.forgive(Instant::now());
                self.apply().await;
                if is_forced {
                    self.slots.give_up_all();
                }
            }
            RolloutOrder::Abort => self.fail("a command has aborted it").await,
        }
    }

    /// The rollout fails. It may go back to what the replicas were started from before.
    async fn fail(&mut self, reason: &str) {
        let (on_failure, now) = (self.slots.settings.pace.on_failure, Instant::now());
        let goes_back = self.rollout.fail(reason, on_failure, now);
        self.slots.give_up_none();
        if goes_back {
            self.slots.forgive(now);
        }
        self.apply().await;
    }

    /// Why a new replica has failed, in words.
    fn reason(&self, slot: usize, failure: Failure) -> String {
        let name = self.slots.name(slot);
        match (failure, &self.slots.last_end) {
            (Failure::CrashLoop, Some(end)) => format!("the new replica of {name} does not stay: {end}"),
            (Failure::CrashLoop, None) => format!("the new replica of {name} does not stay"),
            (Failure::Unhealthy, _) => {
                format!("the new replica of {name} is unhealthy: {}", self.slots.last_check(slot))
            }
        }
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
        let next_load = self.follow_load(now).await;
        let next_look = self.slots.look_at_drains().await.then(|| now + LOOK);
        self.follow_rollout(now);
        let plan = self.slots.plan(self.rollout.last_step, now);
        let mut wake = plan.wake.into_iter().chain(next_look).chain(next_load).min();
        for action in plan.actions {
            let again = match self.carry_out(action, now).await {
                Progress::Done => Some(now),
                Progress::UnderWay => None,
                Progress::Later(until) => Some(until),
            };
            wake = wake.into_iter().chain(again).min();
            if matches!(action, Action::Fail(..)) {
                // What was planned beside it may no longer be wanted.
                break;
            }
        }
        wake
    }

    /// Notes how far the rollout is.
    fn follow_rollout(&mut self, now: Instant) {
        if self.slots.settle(now) {
            self.rollout.last_step = Some(now);
        }
        let is_settled = self.slots.is_settled;
        // Before that, the slots do not say which replicas are outdated.
        let unsettled = self.adapter.running().filter(|_| !is_settled).map(|one| one.place);
        let outdated: Vec<_> = unsettled.filter(|&place| self.adapter.is_outdated(place)).collect();
        let (updated, total, is_quiet) = self.slots.progress(&outdated);
        self.rollout.follow(updated, total, is_quiet && is_settled, now);
        self.rollout.hold(!is_settled);
        self.slots.stage = self.rollout.stage();
    }

    async fn carry_out(&mut self, action: Action, now: Instant) -> Progress {
        match action {
            Action::Start(place) if place.role == Role::Beside => {
                let Err(why) = self.adapter.has_room_beside(place.slot) else {
                    return self.adapter.start(&mut self.slots, place, now).await;
                };
                // Another slot may give its room back. And only one old replica leaves at a time: with each, the pool has one less.
                if self.slots.is_any_in_change() {
                    return Progress::UnderWay;
                }
                let (pool, slot) = (self.slots.pool(), self.slots.name(place.slot));
                tracing::warn!(%pool, %slot, why, "the old replica leaves before the new one starts");
                self.adapter.drain(&mut self.slots, Place::front(place.slot), Why::Outdated, now).await
            }
            Action::Start(place) => {
                // One that starts in the place of an old one shows whether the new settings work.
                if place.role == Role::Front && matches!(self.slots.stage, Stage::Running | Stage::RollingBack) {
                    self.slots[place].begins_anew();
                }
                self.adapter.start(&mut self.slots, place, now).await
            }
            Action::Drain(place, why) => self.adapter.drain(&mut self.slots, place, why, now).await,
            Action::Stop(place, why) => self.adapter.stop(&mut self.slots, place, why, now).await,
            // `apply` has reported this to the publisher.
            Action::Keep(slot) => {
                let place = Place::front(slot);
                let is_outdated = self.is_outdated(place);
                self.slots[place].kept(is_outdated);
                Progress::Done
            }
            Action::Flip(slot) => {
                let Some((next, former)) = self.adapter.flip(&self.slots, slot) else { return Progress::UnderWay };
                self.slots.flip(slot, next, former).await;
                self.rollout.last_step = Some(now);
                Progress::Done
            }
            Action::Fail(slot, failure) => {
                self.fail(&self.reason(slot, failure)).await;
                Progress::Done
            }
        }
    }
}
