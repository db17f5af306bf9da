//! The only writer of a pool's table: takes events and the passing of time, publishes snapshots.
//!
//! - this file: the queue, the ring and the table
//! - [`tracked`]: what one backend's state follows from

mod tracked;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use self::tracked::{Change, Tracked};
use super::Event;
use crate::backend::{Eviction, State};
use crate::label_enum;
use crate::labels::Label as _;
use crate::ring::{Parameters, Ring};
use crate::table::{Table, TableCell};

/// Events that may wait; a sender waits when there are more.
const QUEUE: usize = 256;

label_enum! {
    /// What happens to the connections of a backend that goes down.
    pub enum OnDown {
        /// They go on as long as both sides do.
        Keep => "keep",
        /// They are reset, so that clients come back and get another backend.
        Reset => "reset",
    }
}

/// How a pool's table is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// The shape of the ring.
    pub parameters: Parameters,
    /// Whether backends must pass a check before they count as healthy.
    pub is_checked: bool,
    /// Percentage of healthy backends under which all are tried; 0: never.
    pub panic_below: u8,
    /// What happens to the connections of a backend that goes down.
    pub on_down: OnDown,
    /// Time in which a backend that comes back gets all of its keys again; zero: at once.
    pub slow_start: Duration,
}

/// The writer of one pool's table.
#[derive(Debug)]
pub struct Publisher {
    pool: Arc<str>,
    settings: Settings,
    /// By id, so that owner numbers do not depend on the order of events.
    backends: BTreeMap<Arc<str>, Tracked>,
    /// Backends that are to be drained when they come, or come back: a container may be made anew meanwhile.
    drained: HashSet<Arc<str>>,
    ring: Arc<Ring>,
    /// Of the last replica or address that any backend has had. One for all: a backend that leaves and comes back must
    /// not be taken for the one before.
    incarnation: u64,
    generation: u64,
    cell: TableCell,
}

impl Publisher {
    /// A publisher whose first table holds what `known` says.
    pub fn new(pool: Arc<str>, settings: Settings, known: impl IntoIterator<Item = Event>, now: Instant) -> Self {
        let ring = Arc::new(Ring::build(settings.parameters, &[]));
        let cell = TableCell::new(Table::new(0, Arc::clone(&ring), Box::default(), settings.panic_below));
        let mut publisher = Self {
            pool,
            settings,
            backends: BTreeMap::new(),
            drained: HashSet::new(),
            ring,
            incarnation: 0,
            generation: 0,
            cell,
        };
        publisher.take(known, now);
        publisher
    }

    /// Where the tables are published.
    pub fn table(&self) -> TableCell {
        self.cell.clone()
    }

    /// A queue of events for [`Publisher::run`].
    pub fn queue() -> (mpsc::Sender<Event>, mpsc::Receiver<Event>) {
        mpsc::channel(QUEUE)
    }

    /// Publishes until every sender is gone.
    pub async fn run(mut self, mut events: mpsc::Receiver<Event>) {
        let mut batch = Vec::new();
        let mut wake = None;
        loop {
            let due = tokio::time::sleep_until(wake.unwrap_or_else(Instant::now).into());
            tokio::select! {
                received = events.recv_many(&mut batch, QUEUE) => if received == 0 {
                    return;
                },
                () = due, if wake.is_some() => {}
            }
            wake = self.take(batch.drain(..), Instant::now());
        }
    }

    /// Applies events that came together, and what is due by now, and publishes once if anything changed. Returns
    /// when something is due next.
    fn take(&mut self, events: impl IntoIterator<Item = Event>, now: Instant) -> Option<Instant> {
        let mut change = Change::Nothing;
        for event in events {
            change = change.max(self.apply(event, now));
        }
        let mut wake: Option<Instant> = None;
        let mut gone = Vec::new();
        for (id, tracked) in &mut self.backends {
            change = change.max(tracked.pass(&self.settings, now));
            match tracked.due(&self.settings, now) {
                _ if tracked.is_gone(now) => gone.push(Arc::clone(id)),
                Some(due) => wake = Some(wake.map_or(due, |wake| wake.min(due))),
                None => {}
            }
        }
        for id in gone {
            change = change.max(self.remove(&id));
        }
        if change == Change::Ring {
            self.rebuild();
        }
        if change > Change::Nothing {
            self.publish();
        }
        wake
    }

    fn rebuild(&mut self) {
        let members: Vec<_> = self.backends.values().map(Tracked::member).collect();
        self.ring = Arc::new(Ring::build(self.settings.parameters, &members));
    }

    fn publish(&mut self) {
        let before = self.cell.load();
        self.generation += 1;
        let backends = self.backends.values().map(|tracked| tracked.backend.clone()).collect();
        let table = Table::new(self.generation, Arc::clone(&self.ring), backends, self.settings.panic_below);
        let (pool, healthy) = (&self.pool, table.healthy());
        match (before.is_panic(), table.is_panic()) {
            (false, true) => tracing::error!(%pool, healthy, "too few backends are healthy: all are tried (panic)"),
            (true, false) => tracing::info!(%pool, healthy, "enough backends are healthy again"),
            _ if before.any_healthy() && healthy == 0 => tracing::error!(%pool, "no backend is healthy"),
            _ => {}
        }
        self.cell.publish(table);
    }

    /// What of the published table the event changes.
    fn apply(&mut self, event: Event, now: Instant) -> Change {
        let (id, change) = match event {
            Event::Configured(settings) => return self.configure(settings),
            Event::Left { id } => return self.remove(&id),
            Event::Joined { id, weight } => {
                let is_first = !self.any_healthy();
                let tracked = self.backends.entry(Arc::clone(&id));
                let tracked = tracked.or_insert_with(|| Tracked::new(Arc::clone(&id), is_first, now));
                let change = tracked.joined(weight);
                if self.drained.remove(&id) {
                    tracked.apply(Event::Drained { id: Arc::clone(&id), within: None }, 0, now);
                }
                (id, change)
            }
            Event::Drained { id, .. } if !self.backends.contains_key(&id) => {
                self.drained.insert(id);
                return Change::Nothing;
            }
            Event::Undrained { id } if self.drained.remove(&id) => return Change::Nothing,
            event => {
                let Some(id) = event.id().cloned() else { return Change::Nothing };
                let next = self.incarnation + 1;
                let change = self.backends.get_mut(&id).map(|tracked| {
                    let change = tracked.apply(event, next, now);
                    self.incarnation = self.incarnation.max(tracked.backend.incarnation);
                    change
                });
                (id, change.unwrap_or(Change::Nothing))
            }
        };
        if change > Change::Nothing {
            self.judge(&id, now);
        }
        change
    }

    fn configure(&mut self, settings: Settings) -> Change {
        let before = std::mem::replace(&mut self.settings, settings);
        for tracked in self.backends.values_mut() {
            // What serves goes on to serve until the new checks say otherwise.
            if settings.is_checked && !before.is_checked && tracked.backend.state == State::Healthy {
                tracked.trust();
            }
            tracked.settle(&self.settings);
        }
        match before {
            _ if before == settings => Change::Nothing,
            _ if before.parameters == settings.parameters => Change::Backend,
            _ => Change::Ring,
        }
    }

    fn remove(&mut self, id: &str) -> Change {
        let Some(tracked) = self.backends.remove(id) else { return Change::Nothing };
        if tracked.is_drain_ordered() {
            self.drained.insert(Arc::clone(&tracked.backend.id));
        }
        tracing::info!(pool = %self.pool, %id, was = tracked.backend.state.as_str(), "backend has left");
        Change::Ring
    }

    /// Brings the backend's state up to date with what is known of it.
    fn judge(&mut self, id: &str, now: Instant) {
        let others_serve =
            self.backends.iter().any(|(other, tracked)| **other != *id && tracked.backend.state == State::Healthy);
        let Some(tracked) = self.backends.get_mut(id) else { return };
        let (was, is) = (tracked.backend.state, tracked.state(&self.settings));
        tracked.backend.well = tracked.well(&self.settings);
        if was == is {
            return;
        }
        tracked.tell(&self.pool, is);
        tracked.backend.state = is;
        if is == State::Healthy {
            tracked.begin(others_serve, &self.settings, now);
        }
        let is_down = matches!(is, State::Unhealthy | State::Ejected);
        if is_down && was == State::Healthy && self.settings.on_down == OnDown::Reset {
            tracked.backend.live.evictions.order(Eviction::Down);
        }
    }

    fn any_healthy(&self) -> bool {
        self.backends.values().any(|tracked| tracked.backend.state == State::Healthy)
    }
}
