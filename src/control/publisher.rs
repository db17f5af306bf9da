//! The only writer of a pool's table: takes events, publishes snapshots.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;

use super::Event;
use crate::backend::{Backend, Health, Live, State};
use crate::labels::Label as _;
use crate::ring::{Member, Parameters, Ring};
use crate::table::{Table, TableCell};

/// Events that may wait; a sender waits when there are more.
const QUEUE: usize = 256;

/// The writer of one pool's table.
#[derive(Debug)]
pub struct Publisher {
    pool: Arc<str>,
    parameters: Parameters,
    /// Whether backends must pass a check before they count as healthy.
    is_checked: bool,
    /// By id, so that owner numbers do not depend on the order of events.
    backends: BTreeMap<Arc<str>, Tracked>,
    ring: Arc<Ring>,
    generation: u64,
    cell: TableCell,
}

/// A backend as it will be published, and what its state follows from.
#[derive(Debug)]
struct Tracked {
    backend: Backend,
    healthy: Option<bool>,
    crash_loop: bool,
}

impl Publisher {
    /// A publisher whose first table holds what `known` says.
    pub fn new(
        pool: Arc<str>,
        parameters: Parameters,
        is_checked: bool,
        known: impl IntoIterator<Item = Event>,
        now: Instant,
    ) -> Self {
        let ring = Arc::new(Ring::build(parameters, &[]));
        let cell = TableCell::new(Table::new(0, Arc::clone(&ring), Box::default()));
        let mut publisher = Self { pool, parameters, is_checked, backends: BTreeMap::new(), ring, generation: 0, cell };
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
        while events.recv_many(&mut batch, QUEUE).await > 0 {
            self.take(batch.drain(..), Instant::now());
        }
    }

    /// Applies events that came together, and publishes once if they changed anything.
    fn take(&mut self, events: impl IntoIterator<Item = Event>, now: Instant) {
        let (mut changed, mut members_changed) = (false, false);
        for event in events {
            members_changed |= matches!(event, Event::Joined { .. });
            changed |= self.apply(event, now);
        }
        if members_changed {
            let members: Vec<_> = self
                .backends
                .values()
                .map(|tracked| Member { id: &tracked.backend.id, weight: tracked.backend.weight })
                .collect();
            self.ring = Arc::new(Ring::build(self.parameters, &members));
        }
        if changed {
            let had_one = self.cell.load().any_healthy();
            if had_one && !self.backends.values().any(|tracked| tracked.backend.state == State::Healthy) {
                tracing::error!(pool = %self.pool, "no backend is healthy: all that have an address are tried");
            }
            self.generation += 1;
            let backends = self.backends.values().map(|tracked| tracked.backend.clone()).collect();
            self.cell.publish(Table::new(self.generation, Arc::clone(&self.ring), backends));
        }
    }

    /// Whether the event changed anything that is published.
    fn apply(&mut self, event: Event, now: Instant) -> bool {
        let id = match event {
            Event::Joined { id, weight } => {
                let tracked =
                    self.backends.entry(Arc::clone(&id)).or_insert_with(|| Tracked::new(Arc::clone(&id), now));
                tracked.backend.weight = weight;
                id
            }
            Event::Started { id, address, replica } => {
                let Some(tracked) = self.backends.get_mut(&id) else { return false };
                let backend = &mut tracked.backend;
                backend.incarnation += 1;
                backend.restarts = if replica.is_some() { backend.incarnation - 1 } else { 0 };
                backend.address = Some(address);
                backend.replica = replica;
                backend.health = Health { last: None, since: now };
                (tracked.healthy, tracked.crash_loop) = (None, false);
                id
            }
            Event::Stopped { id, crash_loop } => {
                let Some(tracked) = self.backends.get_mut(&id) else { return false };
                (tracked.backend.address, tracked.backend.replica) = (None, None);
                tracked.backend.health = Health { last: None, since: now };
                (tracked.healthy, tracked.crash_loop) = (None, crash_loop);
                id
            }
            Event::Checked { id, incarnation, healthy, result } => {
                let tracked = self.backends.get_mut(&id);
                let Some(tracked) = tracked.filter(|tracked| tracked.backend.incarnation == incarnation) else {
                    return false;
                };
                // A check may have been under way when its replica died.
                if tracked.backend.address.is_none() {
                    return false;
                }
                tracked.healthy = healthy;
                if tracked.backend.health.last.as_ref() != Some(&result) {
                    tracked.backend.health = Health { last: Some(result), since: now };
                }
                id
            }
        };
        if let Some(tracked) = self.backends.get_mut(&id) {
            let state = tracked.state(self.is_checked);
            if state != tracked.backend.state {
                tell(&self.pool, &tracked.backend, state);
                tracked.backend.state = state;
            }
        }
        true
    }
}

impl Tracked {
    fn new(id: Arc<str>, now: Instant) -> Self {
        let backend = Backend {
            id,
            address: None,
            weight: 1,
            state: State::Starting,
            replica: None,
            incarnation: 0,
            restarts: 0,
            health: Health { last: None, since: now },
            live: Arc::new(Live::default()),
        };
        Self { backend, healthy: None, crash_loop: false }
    }

    fn state(&self, is_checked: bool) -> State {
        match (self.backend.address, self.healthy) {
            (None, _) if self.crash_loop => State::CrashLoop,
            (None, _) => State::Starting,
            (Some(_), None) if is_checked => State::Starting,
            (Some(_), None | Some(true)) => State::Healthy,
            (Some(_), Some(false)) => State::Unhealthy,
        }
    }
}

/// One line for a change of state, as loud as it is bad.
fn tell(pool: &str, backend: &Backend, state: State) {
    let (id, was, is) = (&backend.id, backend.state.as_str(), state.as_str());
    let check = backend.health.last.as_deref().unwrap_or("-");
    match (backend.state, state) {
        // The supervisor has told of the crash loop; each further try is no news.
        (State::CrashLoop, State::Starting) | (_, State::CrashLoop) => {
            tracing::debug!(%pool, %id, was, check, "backend is {is}");
        }
        (_, State::Unhealthy) => tracing::warn!(%pool, %id, was, check, "backend is {is}"),
        _ => tracing::info!(%pool, %id, was, check, "backend is {is}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Replica;

    fn joined(id: &str) -> Event {
        Event::Joined { id: id.into(), weight: 1 }
    }

    fn started(id: &str, port: u16) -> Event {
        let address = ([127, 0, 0, 1], port).into();
        Event::Started { id: id.into(), address, replica: Some(Replica::Process { pid: port.into() }) }
    }

    fn checked(id: &str, incarnation: u64, healthy: bool) -> Event {
        let result = if healthy { "ok" } else { "refused" };
        Event::Checked { id: id.into(), incarnation, healthy: Some(healthy), result: result.into() }
    }

    fn publisher(is_checked: bool, known: Vec<Event>) -> Publisher {
        let parameters = Parameters { virtual_nodes: 10, probes: 3, seed: 0 };
        Publisher::new("echo".into(), parameters, is_checked, known, Instant::now())
    }

    fn states(publisher: &Publisher) -> Vec<State> {
        publisher.table().load().backends().iter().map(|backend| backend.state).collect()
    }

    #[test]
    fn a_slot_s_life() {
        let mut publisher = publisher(true, vec![joined("a"), joined("b")]);
        assert_eq!(states(&publisher), [State::Starting, State::Starting]);
        let mut step = |event: Event| {
            publisher.take([event], Instant::now());
            states(&publisher)[0]
        };
        assert_eq!(step(started("a", 1)), State::Starting);
        assert_eq!(step(checked("a", 1, true)), State::Healthy);
        assert_eq!(step(checked("a", 1, false)), State::Unhealthy);
        assert_eq!(step(Event::Stopped { id: "a".into(), crash_loop: false }), State::Starting);
        assert_eq!(step(checked("a", 1, true)), State::Starting, "news of a replica that is gone");
        assert_eq!(step(started("a", 2)), State::Starting);
        assert_eq!(step(checked("a", 1, true)), State::Starting, "news of the replica before");
        assert_eq!(step(checked("a", 2, true)), State::Healthy);
        assert_eq!(step(Event::Stopped { id: "a".into(), crash_loop: true }), State::CrashLoop);
        assert_eq!(publisher.table().load().backends()[0].restarts, 1);
    }

    #[test]
    fn without_checks_a_started_backend_is_healthy() {
        let publisher = publisher(false, vec![joined("a"), started("a", 1)]);
        assert_eq!(states(&publisher), [State::Healthy]);
    }

    #[test]
    fn the_ring_is_rebuilt_only_for_members_and_counters_outlive_replicas() {
        let mut publisher = publisher(false, vec![joined("a"), joined("b")]);
        let before = publisher.table().load();
        publisher.take([started("a", 1), started("b", 2)], Instant::now());
        let after = publisher.table().load();
        assert!(Arc::ptr_eq(before.ring(), after.ring()));
        assert!(Arc::ptr_eq(&before.backends()[0].live, &after.backends()[0].live));
        assert_eq!(after.generation(), before.generation() + 1, "events that came together are one table");
        publisher.take([joined("c")], Instant::now());
        assert_eq!(publisher.table().load().ring().points(), 30);
    }

    #[test]
    fn news_of_strangers_publishes_nothing() {
        let mut publisher = publisher(true, vec![joined("a")]);
        let before = publisher.table().load().generation();
        publisher.take([started("x", 1), checked("x", 0, true)], Instant::now());
        assert_eq!(publisher.table().load().generation(), before);
    }
}
