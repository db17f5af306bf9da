//! The only writer of a pool's table: applies events and the passing of time, and publishes snapshots.
//!
//! - this file: the queue, the ring and the table
//! - [`mod@backend_state`]: the state of one backend and the facts it follows from
//! - [`mod@settings`]: the settings of a table
//! - [`mod@drains`]: why it drains
//! - [`mod@warmth`]: its slow start
//! - [`mod@incarnations`]: the incarnation beside a slot, and how it takes the place of the other one
//! - [`mod@holder`]: the one backend of an exclusive pool that gets connections

mod backend_state;
mod drains;
mod holder;
mod incarnations;
mod settings;
mod warmth;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use self::backend_state::{BackendState, Change};
use self::holder::Holder;
pub use self::settings::{OnDown, Settings};
use super::Event;
use crate::backend::{Eviction, State};
use crate::labels::Label as _;
use crate::ring::Ring;
use crate::table::{Members, Table, TableCell};

/// Capacity of the event queue. A sender waits while the queue is full.
const QUEUE: usize = 256;

/// Time from one publication to the next. Events that arrive meanwhile share the next one: thousands of backends can
/// change at once.
const BETWEEN: Duration = Duration::from_millis(2);

/// The writer of one pool's table.
#[derive(Debug)]
pub struct Publisher {
    pool: Arc<str>,
    settings: Settings,
    /// Sorted by id: owner numbers do not depend on the order of events.
    backends: BTreeMap<Arc<str>, BackendState>,
    /// Number of healthy backends.
    healthy: usize,
    /// Who gets the connections, if the pool is exclusive.
    holder: Holder,
    /// Number of the latest claim to an exclusive pool.
    claims: u64,
    /// Backends that an event has changed since the last publication.
    changed: BTreeSet<Arc<str>>,
    /// When something is due at a backend that drains, leaves or starts slowly.
    due: BTreeSet<(Instant, Arc<str>)>,
    /// Absent backends that a command has drained. Kept because a container may be recreated meanwhile.
    drained: HashSet<Arc<str>>,
    /// Tokens to cancel at the next publication.
    awaited: Vec<CancellationToken>,
    members: Members,
    ring: Arc<Ring>,
    /// Number of the latest replica or address of any backend. Shared by all backends: a backend that leaves and joins
    /// again must get a new number.
    incarnation: u64,
    generation: u64,
    /// The pool has been in panic mode before.
    has_panicked: bool,
    cell: TableCell,
}

impl Publisher {
    /// A publisher whose first table reflects the events in `known`.
    pub fn new(pool: Arc<str>, settings: Settings, known: impl IntoIterator<Item = Event>, now: Instant) -> Self {
        let ring = Arc::new(Ring::build(settings.parameters, &[]));
        let cell = TableCell::new(Table::new(0, Arc::clone(&ring), Members::default(), settings.rules));
        let mut publisher = Self {
            pool,
            settings,
            backends: BTreeMap::new(),
            healthy: 0,
            holder: Holder::default(),
            claims: 0,
            changed: BTreeSet::new(),
            due: BTreeSet::new(),
            drained: HashSet::new(),
            awaited: Vec::new(),
            members: Members::default(),
            ring,
            incarnation: 0,
            generation: 0,
            has_panicked: false,
            cell,
        };
        publisher.take(known, now);
        publisher
    }

    /// The cell that this publisher writes its tables to.
    pub fn table(&self) -> TableCell {
        self.cell.clone()
    }

    /// A queue of events for [`Publisher::run`].
    pub fn queue() -> (mpsc::Sender<Event>, mpsc::Receiver<Event>) {
        mpsc::channel(QUEUE)
    }

    /// Applies events and publishes tables until every sender is gone.
    pub async fn run(mut self, mut events: mpsc::Receiver<Event>) {
        let mut batch = Vec::new();
        let mut wake = self.wake();
        let mut published = Instant::now();
        loop {
            let due = tokio::time::sleep_until(wake.unwrap_or_else(Instant::now).into());
            tokio::select! {
                received = events.recv_many(&mut batch, QUEUE) => if received == 0 {
                    return;
                },
                () = due, if wake.is_some() => {}
            }
            if published.elapsed() < BETWEEN {
                tokio::time::sleep_until((published + BETWEEN).into()).await;
            }
            // Senders that waited for room in the queue have more.
            while let Ok(event) = events.try_recv() {
                batch.push(event);
            }
            wake = self.take(batch.drain(..), Instant::now());
            published = Instant::now();
        }
    }

    /// When something is due next.
    fn wake(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at).into_iter().chain(self.holder.next).min()
    }

    /// Applies a batch of events and everything that is due by now. Publishes once if anything changed. Returns when
    /// something is due next.
    fn take(&mut self, events: impl IntoIterator<Item = Event>, now: Instant) -> Option<Instant> {
        let mut change = Change::Nothing;
        for event in events {
            change = change.max(self.apply(event, now));
        }
        while self.due.first().is_some_and(|(at, _)| *at <= now) {
            self.changed.extend(self.due.pop_first().map(|(_, id)| id));
        }
        if self.settings.rules.is_exclusive {
            change = change.max(self.hold(now));
        }
        let mut gone = Vec::new();
        for id in &self.changed {
            let Some(backend_state) = self.backends.get_mut(id) else { continue };
            change = change.max(backend_state.pass(&self.settings, now));
            if backend_state.is_gone(now) {
                gone.push(Arc::clone(id));
            }
            let due = backend_state.due(&self.settings, now);
            let before = std::mem::replace(&mut backend_state.next, due);
            if before != due {
                before.map(|at| self.due.remove(&(at, Arc::clone(id))));
            }
            self.due.extend(due.map(|at| (at, Arc::clone(id))));
        }
        for id in gone {
            change = change.max(self.remove(&id));
        }
        match change {
            Change::Nothing => {}
            Change::Backend => {
                for id in &self.changed {
                    if let Some(backend_state) = self.backends.get(id) {
                        self.members.set(backend_state.position, backend_state.backend.clone());
                    }
                }
                self.publish();
            }
            Change::Ring => {
                self.rebuild();
                self.publish();
            }
        }
        self.changed.clear();
        self.awaited.drain(..).for_each(|token| token.cancel());
        self.wake()
    }

    fn rebuild(&mut self) {
        let members: Vec<_> = self.backends.values().map(BackendState::member).collect();
        self.ring = Arc::new(Ring::build(self.settings.parameters, &members));
        for (position, backend_state) in self.backends.values_mut().enumerate() {
            backend_state.position = position;
        }
        let backends = self.backends.values().map(|backend_state| backend_state.backend.clone());
        self.members = Members::new(backends, self.members.roster() + 1);
    }

    fn publish(&mut self) {
        let before = self.cell.load();
        self.generation += 1;
        let table = Table::new(self.generation, Arc::clone(&self.ring), self.members.clone(), self.settings.rules);
        let (pool, healthy, is_served) = (Arc::clone(&self.pool), table.healthy(), table.any_healthy());
        match (before.is_panic(), table.is_panic()) {
            (false, true) => self.tell_panic(healthy),
            (true, false) => tracing::info!(%pool, healthy, "enough backends are healthy again"),
            _ if before.any_healthy() && !is_served => {
                // A pool that falls asleep is no fault.
                if table.backends().iter().all(|backend| backend.drain.is_some_and(|drain| drain.leaves)) {
                    tracing::info!(%pool, "all backends leave");
                } else {
                    tracing::error!(%pool, "no backend is healthy");
                }
            }
            _ => {}
        }
        self.cell.publish(table);
    }

    /// Logs that the pool is in panic mode, which surprises users of other balancers: the first time with an explanation.
    fn tell_panic(&mut self, healthy: usize) {
        let backends = self.backends.values().filter(|one| one.backend.beside.is_none()).count();
        let (pool, threshold) = (&self.pool, self.settings.rules.panic_below);
        let what = "too few backends are healthy; trying all (panic)";
        if std::mem::replace(&mut self.has_panicked, true) {
            tracing::error!(%pool, healthy, backends, threshold, "{what}");
        } else {
            tracing::error!(%pool, healthy, backends, threshold,
                "{what}: fewer than panic_threshold percent are healthy, so the checks may be wrong, and the healthy backends may be \
                 overloaded. Ringway ignores the checks until enough backends pass. panic_threshold: 0 turns this off");
        }
    }

    /// Applies one event. Returns which part of the published table it changes.
    fn apply(&mut self, event: Event, now: Instant) -> Change {
        let (id, change) = match event {
            Event::Configured(settings) => return self.configure(settings, now),
            Event::Awaited(token) => {
                self.awaited.push(token);
                return Change::Nothing;
            }
            Event::Left { id } => return self.remove(&id),
            Event::Joined { id, membership } => {
                let (is_first, is_new) = (self.healthy == 0, !self.backends.contains_key(&id));
                let backend_state = self.backends.entry(Arc::clone(&id));
                let backend_state = backend_state.or_insert_with(|| BackendState::new(Arc::clone(&id), is_first, now));
                let change = backend_state.joined(membership, self.settings.drain, now);
                // Without weight it has no points, but its place in the list.
                let change = if is_new { Change::Ring } else { change };
                if self.drained.remove(&id) {
                    backend_state.apply(
                        Event::DrainRequested { id: Arc::clone(&id), within: None },
                        0,
                        &self.settings,
                        now,
                    );
                }
                (id, change)
            }
            Event::Beside { id, slot } => return self.stand_beside(id, &slot, now),
            Event::Flipped { id, beside, next, former, within } => {
                return self.flip((id, beside), next, former, within, now);
            }
            Event::DrainRequested { id, .. } if !self.backends.contains_key(&id) => {
                self.drained.insert(id);
                return Change::Nothing;
            }
            Event::DrainCancelled { id } if self.drained.remove(&id) => return Change::Nothing,
            event => {
                let Some(id) = event.id().cloned() else { return Change::Nothing };
                let next = self.incarnation + 1;
                let change = self.backends.get_mut(&id).map(|backend_state| {
                    let change = backend_state.apply(event, next, &self.settings, now);
                    self.incarnation = self.incarnation.max(backend_state.backend.incarnation);
                    change
                });
                (id, change.unwrap_or(Change::Nothing))
            }
        };
        if change > Change::Nothing {
            self.judge(&id, now);
            self.changed.insert(id);
        }
        change
    }

    fn configure(&mut self, settings: Settings, now: Instant) -> Change {
        let before = std::mem::replace(&mut self.settings, settings);
        if before == settings {
            return Change::Nothing;
        }
        for backend_state in self.backends.values_mut() {
            if settings.rules.is_exclusive && !before.rules.is_exclusive {
                // The checks so far did not ask for the primary.
                backend_state.forget_verdict(now);
            } else if settings.is_checked && !before.is_checked && backend_state.backend.state == State::Healthy {
                // A backend that serves keeps serving until the new checks say otherwise.
                backend_state.trust();
            }
            backend_state.settle_claim(&self.settings, self.claims + 1);
            self.claims = self.claims.max(backend_state.claim.map_or(0, |claim| claim.number));
            backend_state.settle(&self.settings);
        }
        if before.rules.is_exclusive != settings.rules.is_exclusive {
            self.holder = Holder::after_change(now);
        }
        self.changed.extend(self.backends.keys().cloned());
        self.healthy = self.backends.values().filter(|backend_state| backend_state.counts()).count();
        if before.parameters == settings.parameters { Change::Backend } else { Change::Ring }
    }

    fn remove(&mut self, id: &str) -> Change {
        let Some(backend_state) = self.backends.remove(id) else { return Change::Nothing };
        if let Some(at) = backend_state.next {
            self.due.remove(&(at, Arc::clone(&backend_state.backend.id)));
        }
        self.healthy -= usize::from(backend_state.counts());
        if let Some(slot) = &backend_state.backend.beside
            && let Some(of_slot) = self.backends.get_mut(slot)
        {
            of_slot.backend.other = None;
            self.changed.insert(Arc::clone(slot));
        }
        if backend_state.is_drain_ordered() {
            self.drained.insert(Arc::clone(&backend_state.backend.id));
        }
        tracing::info!(pool = %self.pool, %id, was = backend_state.backend.state.as_str(), "backend left");
        Change::Ring
    }

    /// Decides which backend of an exclusive pool gets the connections.
    fn hold(&mut self, now: Instant) -> Change {
        let before = self.holder.id().cloned();
        self.holder.follow(&self.backends, now);
        let after = self.holder.id().cloned();
        if before != after {
            if let Some(id) = &after {
                tracing::info!(pool = %self.pool, %id, "backend holds the exclusive pool");
            } else {
                tracing::warn!(pool = %self.pool, was = before.as_deref(), "no backend holds the exclusive pool");
            }
        }
        let Some(id) = after else { return Change::Nothing };
        let Some(claim) = self.backends.get_mut(&id).and_then(|backend_state| backend_state.claim.as_mut()) else {
            return Change::Nothing;
        };
        if std::mem::replace(&mut claim.holds, true) {
            return Change::Nothing;
        }
        self.judge(&id, now);
        self.changed.insert(id);
        Change::Backend
    }

    /// Updates the backend's state from the known facts.
    fn judge(&mut self, id: &str, now: Instant) {
        let Some(backend_state) = self.backends.get_mut(id) else { return };
        backend_state.settle_claim(&self.settings, self.claims + 1);
        self.claims = self.claims.max(backend_state.claim.map_or(0, |claim| claim.number));
        let (was, is) = (backend_state.backend.state, backend_state.state(&self.settings));
        backend_state.backend.well = backend_state.well(&self.settings);
        if was == is {
            return;
        }
        backend_state.tell(&self.pool, is);
        self.healthy -= usize::from(backend_state.counts());
        backend_state.backend.state = is;
        if backend_state.counts() {
            backend_state.begin(self.healthy > 0, &self.settings, now);
        }
        self.healthy += usize::from(backend_state.counts());
        // One that is judged for the first time may have connections that an old process has handed over.
        let has_gone_down =
            matches!(was, State::Starting | State::Healthy) && matches!(is, State::Unhealthy | State::Ejected);
        if has_gone_down && self.settings.on_down == OnDown::Reset {
            backend_state.backend.live.evictions.request(Eviction::Down);
        }
    }
}
