//! The slots of one pool: operations that all adapters share, and the events that report the slots to the publisher.

use std::collections::BTreeMap;
use std::ops::{Index, IndexMut};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};

use super::ends::Ends;
use super::plan::{Going, Pace, Place, Plan, Policy, Role, Seat, Slot, Why, plan};
use super::rollout::Stage;
use super::scaling::Scaling;
use crate::address::Address;
use crate::backend::{Backend, Exit, Membership, Replica};
use crate::control::Event;
use crate::control::provider::slots;
use crate::labels::Label as _;
use crate::table::{Table, TableCell};

/// Interval between checks of whether a replica's drain is over. Also the shortest drain: a worker that picked the
/// replica earlier has begun its connect by then.
pub(super) const LOOK: Duration = Duration::from_millis(100);

/// How many replicas a pool has, and when they start and end. Everything except the pool's name may change at run time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotSettings {
    /// The pool's name.
    pub pool: Arc<str>,
    /// Number of replicas, or the maximum if the pool scales by itself. With 0 the supervisor ends once the last replica has ended.
    pub replicas: u32,
    /// How the pool scales by itself; `None`: it does not.
    pub scaling: Option<Scaling>,
    /// Weights of slots; the default is 1.
    pub weights: BTreeMap<Arc<str>, u32>,
    /// How long a surplus replica's connections may stay open before Ringway stops it.
    pub drain: Duration,
    /// How a rollout replaces outdated replicas.
    pub pace: Pace,
    /// When Ringway restarts or replaces a replica.
    pub policy: Policy,
}

/// The slots of one pool by index: the configured ones, then surplus slots that still have a replica.
#[derive(Debug)]
pub(super) struct Slots {
    pub(super) settings: SlotSettings,
    list: Vec<Slot>,
    /// The number of slots to fill, if the pool scales by itself; `None`: not known yet.
    pub(super) scaled: Option<u32>,
    ends: Ends,
    table: TableCell,
    events: mpsc::Sender<Event>,
    /// False while a predecessor may have connections to adopted replicas, which are then neither outdated nor surplus.
    pub(super) is_settled: bool,
    /// Whether the table shows an outdated replica.
    shows_outdated: bool,
    /// What the rollout does.
    pub(super) stage: Stage,
    /// How the last replica that was not stopped on purpose ended.
    pub(super) last_end: Option<Arc<str>>,
    /// Why no new replica can be started, before an old one was given up for it.
    pub(super) failure: Option<String>,
}

impl Slots {
    pub(super) fn new(settings: SlotSettings, table: TableCell, events: mpsc::Sender<Event>, is_settled: bool) -> Self {
        let ends = Ends::new(Arc::clone(&settings.pool), settings.policy);
        Self {
            settings,
            list: Vec::new(),
            scaled: None,
            ends,
            table,
            events,
            is_settled,
            shows_outdated: false,
            stage: Stage::Idle,
            last_end: None,
            failure: None,
        }
    }

    pub(super) fn pool(&self) -> &Arc<str> {
        &self.settings.pool
    }

    /// The pool's table.
    pub(super) fn table(&self) -> &TableCell {
        &self.table
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    /// Notifies of each new table.
    pub(super) fn watch_table(&self) -> watch::Receiver<u64> {
        self.table.watch()
    }

    /// Number of slots that the pool shall have now.
    pub(super) fn goal(&self) -> u32 {
        let SlotSettings { replicas, scaling, .. } = self.settings;
        scaling.and_then(|scaling| Some(self.scaled?.max(scaling.min).min(replicas))).unwrap_or(replicas)
    }

    /// Number of slots to fill now. While a predecessor may have connections, this is at least the number of those that it has filled.
    pub(super) fn wanted(&self) -> usize {
        let wanted = self.goal() as usize;
        if self.is_settled { wanted } else { wanted.max(self.in_use() as usize) }
    }

    /// Connections to all backends of the pool: those that are open now, and all that have been made.
    pub(super) fn connections(&self) -> (u64, u64) {
        let table = self.table.load();
        let of = |backend: &Backend| {
            let live = &backend.live;
            (live.active.load(Ordering::Relaxed), live.counters.total.load(Ordering::Relaxed))
        };
        table.backends().iter().map(of).fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    }

    /// The number of the last slot that has a replica.
    pub(super) fn in_use(&self) -> u32 {
        let is_used = |seat: &Seat| seat.is_running() || seat.is_starting();
        let last = self.list.iter().rposition(|slot| is_used(&slot.front) || is_used(&slot.beside));
        last.map_or(0, |last| last as u32 + 1)
    }

    /// The name of a slot.
    pub(super) fn name(&self, slot: usize) -> &Arc<str> {
        &self.list[slot].name
    }

    /// Whether any slot has a replica or a start in progress.
    pub(super) fn any_in_use(&self) -> bool {
        self.seats().any(|(_, seat)| seat.is_running() || seat.is_starting())
    }

    /// The seats of all slots.
    fn seats(&self) -> impl Iterator<Item = (Place, &Seat)> {
        let slots = self.list.iter().enumerate();
        slots.flat_map(|(n, slot)| [(Place::front(n), &slot.front), (Place::beside(n), &slot.beside)])
    }

    /// Adds slots until there are `count`. Never removes one.
    pub(super) fn extend(&mut self, count: u32) {
        let now = Instant::now();
        for name in slots(&self.settings.pool, count).into_iter().skip(self.list.len()) {
            self.list.push(Slot::new(name, now));
        }
    }

    /// Applies the first settings, or changed ones.
    pub(super) fn configure(&mut self, settings: SlotSettings) {
        self.ends.policy = settings.policy;
        self.settings = settings;
        self.extend(self.goal());
    }

    /// Forgets how the last replicas ended: empty slots start at once.
    pub(super) fn forgive(&mut self, now: Instant) {
        for slot in &mut self.list {
            slot.front.forgive(now);
            slot.beside.forgive(now);
        }
    }

    /// Reports the pool's slots to the publisher, each with its weight.
    pub(super) async fn announce(&self) {
        for id in slots(&self.settings.pool, self.goal()) {
            let weight = self.settings.weights.get(&id).copied().unwrap_or(1);
            self.send(Event::Joined { id, membership: Membership::weighing(weight) }).await;
        }
    }

    /// Reports to the publisher the slots that the pool no longer has. A slot with a running replica drains first.
    pub(super) async fn withdraw_surplus(&self) {
        for slot in self.list.iter().skip(self.wanted()).filter(|slot| !slot.front.is_running()) {
            self.send(Event::Left { id: Arc::clone(&slot.name) }).await;
        }
    }

    pub(super) fn plan(&mut self, last_step: Option<Instant>, now: Instant) -> Plan {
        self.show_outdated();
        let going = Going { pace: &self.settings.pace, stage: self.stage, is_settled: self.is_settled, last_step };
        plan(self.wanted(), &self.list, &self.settings.policy, going, now)
    }

    /// Records the new replicas that have been healthy for long enough. Returns whether there are any.
    pub(super) fn settle(&mut self, now: Instant) -> bool {
        let healthy_for = self.settings.pace.healthy_for;
        let mut any = false;
        for slot in &mut self.list {
            any |= slot.front.settle(healthy_for, now);
        }
        any
    }

    /// How many of the pool's slots have a replica from the current settings, how many slots there are, and whether no replica is being
    /// replaced. `outdated`: replicas that will be outdated once a predecessor has gone.
    pub(super) fn progress(&self, outdated: &[Place]) -> (usize, usize, bool) {
        let kept = || self.list.iter().take(self.wanted());
        let is_updated =
            |(n, slot): &(usize, &Slot)| !slot.front.is_outdated() && !outdated.contains(&Place::front(*n));
        let is_quiet = |slot: &Slot| !slot.front.is_new() && !slot.has_successor();
        (kept().enumerate().filter(is_updated).count(), kept().count(), kept().all(is_quiet))
    }

    /// Marks all replicas that run for replacement.
    pub(super) fn give_up_all(&mut self) {
        let wanted = self.wanted();
        for slot in self.list.iter_mut().take(wanted) {
            slot.front.give_up();
            // One that comes next is from before the order too.
            if slot.has_successor() {
                slot.beside.give_up();
            }
        }
    }

    /// Whether any slot has a second replica, or one that leaves before the next one starts.
    pub(super) fn is_any_in_change(&self) -> bool {
        let is_taken = |seat: &Seat| seat.is_running() || seat.is_starting();
        self.list.iter().any(|slot| slot.front.is_replaced() || is_taken(&slot.beside))
    }

    /// Takes back that replicas from the current settings shall be replaced.
    pub(super) fn give_up_none(&mut self) {
        for slot in &mut self.list {
            slot.front.forget_giving_up();
            slot.beside.forget_giving_up();
        }
    }

    /// What the last check of the new replica of a slot said: of the one beside it, if there is one.
    pub(super) fn last_check(&self, slot: usize) -> String {
        let (table, slot) = (self.table.load(), &self.list[slot]);
        let seat = if slot.has_successor() { &slot.beside } else { &slot.front };
        let said = table.backends().find(&seat.id).and_then(|backend| backend.last_check().map(str::to_owned));
        said.unwrap_or_else(|| "it has no address on Ringway's network".to_owned())
    }

    /// Lets the replica beside a slot fill it. The publisher exchanges both at once.
    pub(super) async fn flip(&mut self, slot: usize, next: Replica, former: Option<Replica>) {
        let (within, slot) = (self.settings.pace.drain, &mut self.list[slot]);
        slot.flip();
        let (id, beside) = (Arc::clone(&slot.front.id), Arc::clone(&slot.beside.id));
        self.send(Event::Flipped { id, beside, next, former, within }).await;
    }

    /// Reports where a replica listens.
    pub(super) async fn report(&self, place: Place, address: Address, replica: Replica) {
        let (slot, id) = (Arc::clone(&self.list[place.slot].name), Arc::clone(&self[place].id));
        if place.role == Role::Beside {
            self.send(Event::Beside { id: Arc::clone(&id), slot }).await;
        }
        self.send(Event::Started { id, address, replica: Some(replica) }).await;
    }

    /// Shows which replicas a rollout has not reached yet.
    fn show_outdated(&mut self) {
        let any = self.seats().any(|(_, seat)| seat.is_outdated());
        if !any && !self.shows_outdated {
            return;
        }
        self.shows_outdated = any;
        let table = self.table.load();
        for (_, seat) in self.seats() {
            if let Some(backend) = table.backends().find(&seat.id) {
                backend.live.outdated.store(seat.is_outdated(), Ordering::Relaxed);
            }
        }
    }

    /// Begins to drain a replica.
    pub(super) async fn drain(&mut self, place: Place, why: Why) {
        self[place].draining(why);
        self.send(self.drain_event(place, why)).await;
    }

    /// The event that drains a replica. One beside a slot leaves the table when its connections have ended.
    fn drain_event(&self, place: Place, why: Why) -> Event {
        let id = Arc::clone(&self[place].id);
        match (place.role, why) {
            (Role::Beside, _) => Event::Leaving { id, within: self.settings.pace.drain },
            (Role::Front, Why::Surplus) => Event::Leaving { id, within: self.settings.drain },
            (Role::Front, Why::Outdated | Why::Unhealthy) => {
                Event::Retiring { id, within: Some(self.settings.pace.drain) }
            }
        }
    }

    /// Records the drains that are over, and repeats the events of drains that the publisher does not know. Returns
    /// whether any drain is still in progress.
    pub(super) async fn look_at_drains(&mut self) -> bool {
        let (mut any, mut over, mut unknown) = (false, Vec::new(), Vec::new());
        let (table, wanted) = (self.table.load(), self.wanted());
        for (place, seat) in self.seats() {
            let Some(why) = seat.drains_for() else { continue };
            let leaves = why == Why::Surplus || place.role == Role::Beside;
            match is_drained(&table, &seat.id, leaves) {
                Some(true) => over.push(place),
                Some(false) => any = true,
                None => {
                    any = true;
                    // A slot that is wanted again has joined again, which ended its drain for the publisher. The plan
                    // keeps its replica next; a repeated drain would take it away for good.
                    if why != Why::Surplus || place.slot >= wanted {
                        unknown.push(self.drain_event(place, why));
                    }
                }
            }
        }
        for place in over {
            self[place].drained();
        }
        for event in unknown {
            self.send(event).await;
        }
        any
    }

    /// Records the verdict of the checks on each running replica. A replica without an address is unreachable and
    /// therefore unhealthy.
    pub(super) fn judge<'a>(&mut self, running: impl Iterator<Item = Running<'a>>) {
        let (table, now) = (self.table.load(), Instant::now());
        for Running { place, address, replica } in running {
            let seat = &mut self[place];
            let verdict = if address.is_some() { verdict(&table, &seat.id, replica) } else { Some(false) };
            seat.judged(verdict, now);
        }
    }

    /// Records that a replica runs: Ringway then logs the next failed start as an error again.
    pub(super) fn note_start(&mut self) {
        self.ends.started();
    }

    /// Records and reports that a replica ended.
    pub(super) async fn ended(&mut self, place: Place, exit: Exit) {
        if self[place].stops_for().is_none() {
            let said = exit.output.last().map(|line| format!(", its last line is {line:?}"));
            self.last_end = Some((exit.reason.clone() + &said.unwrap_or_default()).into());
        }
        let event = self.ends.ended(&mut self.list[place.slot][place.role], exit);
        self.send(event).await;
        if place.slot >= self.wanted() || place.role == Role::Beside {
            self.send(Event::Left { id: Arc::clone(&self[place].id) }).await;
        }
    }

    /// Records that a replica that is not needed ended. The publisher has known this since the stop began.
    pub(super) async fn emptied(&mut self, place: Place, now: Instant) {
        let policy = self.settings.policy;
        self[place].ended(&policy, now);
        if place.role == Role::Beside {
            self.send(Event::Left { id: Arc::clone(&self[place].id) }).await;
        }
    }

    /// Records and reports that a replica could not be started.
    pub(super) async fn refused(&mut self, place: Place, reason: &str) {
        self.last_end = Some(format!("it cannot be started: {reason}").into());
        let event = self.ends.refused(&mut self.list[place.slot][place.role], reason, Instant::now());
        self.send(event).await;
    }

    /// Sends an event to the publisher, which ignores events about unknown slots.
    pub(super) async fn send(&self, event: Event) {
        // Without a publisher Ringway is shutting down.
        let _ = self.events.send(event).await;
    }

    /// Logs the stop of a replica. An unhealthy replica is a warning, a configured change is not.
    pub(super) fn log_stop(&self, place: Place, why: Why) {
        let (pool, slot, reason) = (&self.settings.pool, &self[place].id, why.as_str());
        match why {
            Why::Unhealthy => tracing::warn!(%pool, %slot, reason, "stopping the replica to replace it"),
            Why::Outdated => tracing::info!(%pool, %slot, reason, "stopping the replica to replace it"),
            Why::Surplus => tracing::info!(%pool, %slot, reason, "stopping the replica"),
        }
    }
}

/// A running replica, as its adapter knows it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Running<'a> {
    pub(super) place: Place,
    /// Its address; `None`: unreachable.
    pub(super) address: Option<&'a Address>,
    pub(super) replica: &'a Replica,
}

impl Index<Place> for Slots {
    type Output = Seat;

    fn index(&self, place: Place) -> &Seat {
        &self.list[place.slot][place.role]
    }
}

impl IndexMut<Place> for Slots {
    fn index_mut(&mut self, place: Place) -> &mut Seat {
        &mut self.list[place.slot][place.role]
    }
}

/// The verdict of the checks on the replica with this id; `None` if undecided or if the table still shows its predecessor.
fn verdict(table: &Table, id: &str, replica: &Replica) -> Option<bool> {
    let backend = table.backends().find(id)?;
    if backend.replica.as_ref() != Some(replica) {
        return None;
    }
    backend.well
}

/// Whether a draining replica has no connections left. `None`: the publisher does not know of the drain yet, or dropped
/// it because the replica got a new address.
fn is_drained(table: &Table, id: &str, leaves: bool) -> Option<bool> {
    let Some(backend) = table.backends().find(id) else { return Some(true) };
    let drain = backend.drain?;
    let is_unused = backend.address.is_none() || backend.live.active.load(Ordering::Relaxed) == 0;
    // The publisher removes a leaving backend from the table.
    Some(!leaves && drain.since.elapsed() >= LOOK && is_unused)
}

#[cfg(test)]
mod tests;
