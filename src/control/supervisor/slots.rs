//! The slots of one pool: operations that all adapters share, and the events that report the slots to the publisher.

use std::collections::BTreeMap;
use std::ops::{Index, IndexMut};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};

use super::ends::Ends;
use super::plan::{Plan, Policy, Slot, Why, plan};
use crate::address::Address;
use crate::backend::{Exit, Membership, Replica};
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
    /// Number of replicas. With 0 the supervisor ends once the last replica has ended.
    pub replicas: u32,
    /// Weights of slots; the default is 1.
    pub weights: BTreeMap<Arc<str>, u32>,
    /// How long a surplus or outdated replica's connections may stay open before Ringway stops it.
    pub drain: Duration,
    /// When Ringway restarts or replaces a replica.
    pub policy: Policy,
}

/// The slots of one pool by index: the configured ones, then surplus slots that still have a replica.
#[derive(Debug)]
pub(super) struct Slots {
    pub(super) settings: SlotSettings,
    list: Vec<Slot>,
    ends: Ends,
    table: TableCell,
    events: mpsc::Sender<Event>,
    /// False while a predecessor may have connections to adopted replicas, which are then neither outdated nor surplus.
    pub(super) is_settled: bool,
    /// Whether the table shows an outdated replica.
    shows_outdated: bool,
}

impl Slots {
    pub(super) fn new(settings: SlotSettings, table: TableCell, events: mpsc::Sender<Event>, is_settled: bool) -> Self {
        let ends = Ends::new(Arc::clone(&settings.pool), settings.policy);
        Self { settings, list: Vec::new(), ends, table, events, is_settled, shows_outdated: false }
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

    /// Number of slots to fill now.
    pub(super) fn wanted(&self) -> usize {
        let wanted = self.settings.replicas as usize;
        if self.is_settled { wanted } else { wanted.max(self.list.len()) }
    }

    /// Whether any slot has a replica or a start in progress.
    pub(super) fn any_in_use(&self) -> bool {
        self.list.iter().any(|slot| slot.is_running() || slot.is_starting())
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
        self.extend(settings.replicas);
        self.settings = settings;
    }

    /// Forgets how the last replicas ended: empty slots start at once.
    pub(super) fn forgive(&mut self, now: Instant) {
        self.list.iter_mut().for_each(|slot| slot.forgive(now));
    }

    /// Reports the pool's slots to the publisher, each with its weight.
    pub(super) async fn announce(&self) {
        for id in slots(&self.settings.pool, self.settings.replicas) {
            let weight = self.settings.weights.get(&id).copied().unwrap_or(1);
            self.send(Event::Joined { id, membership: Membership::weighing(weight) }).await;
        }
    }

    /// Reports to the publisher the slots that the pool no longer has. A slot with a running replica drains first.
    pub(super) async fn withdraw_surplus(&self) {
        for slot in self.list.iter().skip(self.wanted()).filter(|slot| !slot.is_running()) {
            self.send(Event::Left { id: Arc::clone(&slot.name) }).await;
        }
    }

    pub(super) fn plan(&mut self, now: Instant) -> Plan {
        self.show_outdated();
        plan(self.wanted(), &self.list, &self.settings.policy, now)
    }

    /// Shows which replicas a rollout has not reached yet.
    fn show_outdated(&mut self) {
        let any = self.list.iter().any(Slot::is_outdated);
        if !any && !self.shows_outdated {
            return;
        }
        self.shows_outdated = any;
        let table = self.table.load();
        for slot in &self.list {
            if let Some(backend) = table.backends().find(&slot.name) {
                backend.live.outdated.store(slot.is_outdated(), Ordering::Relaxed);
            }
        }
    }

    /// Begins to drain the replica of a slot.
    pub(super) async fn drain(&mut self, slot: usize, why: Why) {
        self.list[slot].draining(why);
        self.send(drain_event(&self.list[slot].name, why, self.settings.drain)).await;
    }

    /// Records the drains that are over, and repeats the events of drains that the publisher does not know. Returns
    /// whether any drain is still in progress.
    pub(super) async fn look_at_drains(&mut self) -> bool {
        let (mut any, mut unknown) = (false, Vec::new());
        let (table, wanted) = (self.table.load(), self.wanted());
        for (index, slot) in self.list.iter_mut().enumerate() {
            let Some(why) = slot.drains_for() else { continue };
            match is_drained(&table, &slot.name, why) {
                Some(true) => slot.drained(),
                Some(false) => any = true,
                None => {
                    any = true;
                    // A slot that is wanted again has joined again, which ended its drain for the publisher. The plan
                    // keeps its replica next; a repeated drain would take it away for good.
                    if why != Why::Surplus || index >= wanted {
                        unknown.push(drain_event(&slot.name, why, self.settings.drain));
                    }
                }
            }
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
        for Running { slot, address, replica } in running {
            let slot = &mut self.list[slot];
            let verdict = if address.is_some() { verdict(&table, &slot.name, replica) } else { Some(false) };
            slot.judged(verdict, now);
        }
    }

    /// Records that a replica runs: Ringway then logs the next failed start as an error again.
    pub(super) fn note_start(&mut self) {
        self.ends.started();
    }

    /// Records and reports that the replica of a slot ended.
    pub(super) async fn ended(&mut self, slot: usize, exit: Exit) {
        let event = self.ends.ended(&mut self.list[slot], exit);
        self.send(event).await;
        if slot >= self.wanted() {
            self.send(Event::Left { id: Arc::clone(&self.list[slot].name) }).await;
        }
    }

    /// Records that the replica of a surplus slot ended. The publisher has known this since the stop began.
    pub(super) fn emptied(&mut self, slot: usize, now: Instant) {
        self.list[slot].ended(&self.settings.policy, now);
    }

    /// Records and reports that a replica could not be started.
    pub(super) async fn refused(&mut self, slot: usize, reason: &str) {
        let event = self.ends.refused(&mut self.list[slot], reason, Instant::now());
        self.send(event).await;
    }

    /// Sends an event to the publisher, which ignores events about unknown slots.
    pub(super) async fn send(&self, event: Event) {
        // Without a publisher Ringway is shutting down.
        let _ = self.events.send(event).await;
    }

    /// Logs the stop of a replica. An unhealthy replica is a warning, a configured change is not.
    pub(super) fn log_stop(&self, slot: usize, why: Why) {
        let (pool, slot, reason) = (&self.settings.pool, &self.list[slot].name, why.as_str());
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
    pub(super) slot: usize,
    /// Its address; `None`: unreachable.
    pub(super) address: Option<&'a Address>,
    pub(super) replica: &'a Replica,
}

impl Index<usize> for Slots {
    type Output = Slot;

    fn index(&self, slot: usize) -> &Slot {
        &self.list[slot]
    }
}

impl IndexMut<usize> for Slots {
    fn index_mut(&mut self, slot: usize) -> &mut Slot {
        &mut self.list[slot]
    }
}

/// The verdict of the checks on the replica in a slot; `None` if undecided or if the table still shows its predecessor.
fn verdict(table: &Table, slot: &str, replica: &Replica) -> Option<bool> {
    let backend = table.backends().find(slot)?;
    if backend.replica.as_ref() != Some(replica) {
        return None;
    }
    backend.well
}

/// The event that drains a replica.
fn drain_event(slot: &Arc<str>, why: Why, within: Duration) -> Event {
    let id = Arc::clone(slot);
    match why {
        Why::Surplus => Event::Leaving { id, within },
        Why::Outdated | Why::Unhealthy => Event::Retiring { id, within: Some(within) },
    }
}

/// Whether a draining replica has no connections left. `None`: the publisher does not know of the drain yet, or dropped
/// it because the replica got a new address.
fn is_drained(table: &Table, slot: &str, why: Why) -> Option<bool> {
    let Some(backend) = table.backends().find(slot) else { return Some(true) };
    let drain = backend.drain?;
    let is_unused = backend.address.is_none() || backend.live.active.load(Ordering::Relaxed) == 0;
    // The publisher removes a leaving backend from the table.
    Some(why != Why::Surplus && drain.since.elapsed() >= LOOK && is_unused)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::publisher::{self, Publisher};

    fn settings(replicas: u32) -> SlotSettings {
        SlotSettings {
            pool: "echo".into(),
            replicas,
            weights: BTreeMap::new(),
            drain: Duration::from_secs(30),
            policy: Policy {
                backoff: Duration::from_millis(200),
                max_backoff: Duration::from_secs(30),
                stable_after: Duration::from_secs(60),
                crash_loop_after: 5,
                replace_after: None,
            },
        }
    }

    /// Slots whose second one drains as surplus, while the publisher shows no drain.
    async fn draining() -> (Slots, mpsc::Receiver<Event>) {
        let joined = |id: &str| Event::Joined { id: id.into(), membership: Membership::weighing(1) };
        let known = vec![joined("echo-1"), joined("echo-2")];
        let publisher = Publisher::new("echo".into(), publisher::Settings::plain(), known, Instant::now());
        let (events, mut queue) = mpsc::channel(16);
        let mut slots = Slots::new(settings(1), publisher.table(), events, true);
        slots.extend(2);
        slots[1].running(false, Instant::now());
        slots.drain(1, Why::Surplus).await;
        assert!(matches!(queue.try_recv(), Ok(Event::Leaving { .. })));
        (slots, queue)
    }

    #[tokio::test]
    async fn a_drain_that_the_publisher_does_not_know_is_repeated() {
        let (mut slots, mut queue) = draining().await;
        assert!(slots.look_at_drains().await);
        assert!(matches!(queue.try_recv(), Ok(Event::Leaving { .. })));
    }

    #[tokio::test]
    async fn the_drain_of_a_slot_that_is_wanted_again_is_not_repeated() {
        let (mut slots, mut queue) = draining().await;
        slots.configure(settings(2));
        assert!(slots.look_at_drains().await);
        assert!(queue.try_recv().is_err(), "the slot would leave although it is wanted");
    }
}
