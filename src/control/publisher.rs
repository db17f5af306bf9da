//! The only writer of a pool's table: takes events, publishes snapshots.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;

use super::Event;
use crate::backend::{Backend, Health, Live, Replica, State};
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
    /// Also when it has ended since.
    last_replica: Option<Replica>,
    /// It has had a replica.
    has_run: bool,
    /// We were told of the last one before it ended.
    is_seen: bool,
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
            let is_membership = matches!(event, Event::Joined { .. } | Event::Left { .. });
            let news = self.apply(event, now);
            members_changed |= is_membership && news;
            changed |= news;
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
                if self.backends.get(&id).is_some_and(|tracked| tracked.backend.weight == weight) {
                    return false;
                }
                let tracked =
                    self.backends.entry(Arc::clone(&id)).or_insert_with(|| Tracked::new(Arc::clone(&id), weight, now));
                tracked.backend.weight = weight;
                id
            }
            Event::Started { id, address, replica } => {
                let Some(tracked) = self.backends.get_mut(&id) else { return false };
                let backend = &mut tracked.backend;
                backend.incarnation += 1;
                // The same container with a new address has not been started again.
                if replica.is_some() && tracked.last_replica != replica {
                    backend.restarts += u64::from(tracked.has_run);
                    tracked.last_replica.clone_from(&replica);
                    (tracked.has_run, tracked.is_seen) = (true, true);
                }
                backend.address = Some(address);
                backend.replica = replica;
                tracked.forget(now);
                tracked.crash_loop = false;
                id
            }
            Event::Stopped { id, crash_loop, exit } => {
                let Some(tracked) = self.backends.get_mut(&id) else { return false };
                (tracked.backend.address, tracked.backend.replica) = (None, None);
                if let Some(exit) = exit {
                    // It ran, even if it was gone before anybody could see it.
                    if exit.code.is_some() && !std::mem::take(&mut tracked.is_seen) {
                        tracked.backend.restarts += u64::from(tracked.has_run);
                        tracked.has_run = true;
                    }
                    tracked.backend.last_exit = Some(exit);
                }
                tracked.forget(now);
                tracked.crash_loop = crash_loop;
                id
            }
            Event::Left { id } => {
                let Some(tracked) = self.backends.remove(&id) else { return false };
                tracing::info!(pool = %self.pool, %id, was = tracked.backend.state.as_str(), "backend has left");
                return true;
            }
            Event::Reported { id, healthy } => {
                let Some(tracked) = self.backends.get_mut(&id) else { return false };
                if tracked.backend.reported_bad != healthy {
                    return false;
                }
                tracked.backend.reported_bad = !healthy;
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
    fn new(id: Arc<str>, weight: u32, now: Instant) -> Self {
        let backend = Backend {
            id,
            address: None,
            weight,
            state: State::Starting,
            replica: None,
            incarnation: 0,
            restarts: 0,
            last_exit: None,
            reported_bad: false,
            health: Health { last: None, since: now },
            live: Arc::new(Live::default()),
        };
        Self { backend, last_replica: None, has_run: false, is_seen: false, healthy: None, crash_loop: false }
    }

    /// What was known of the replica before says nothing about the next one.
    fn forget(&mut self, now: Instant) {
        self.backend.health = Health { last: None, since: now };
        (self.healthy, self.backend.reported_bad) = (None, false);
    }

    fn state(&self, is_checked: bool) -> State {
        match (self.backend.address, self.healthy) {
            (None, _) if self.crash_loop => State::CrashLoop,
            (None, _) => State::Starting,
            (Some(_), _) if self.backend.reported_bad => State::Unhealthy,
            (Some(_), None) if is_checked => State::Starting,
            (Some(_), None | Some(true)) => State::Healthy,
            (Some(_), Some(false)) => State::Unhealthy,
        }
    }
}

/// One line for a change of state, as loud as it is bad.
fn tell(pool: &str, backend: &Backend, state: State) {
    let (id, was, is) = (&backend.id, backend.state.as_str(), state.as_str());
    let check = backend.last_check().unwrap_or("-");
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
    use crate::backend::Exit;

    fn joined(id: &str) -> Event {
        Event::Joined { id: id.into(), weight: 1 }
    }

    fn started(id: &str, port: u16) -> Event {
        let address = ([127, 0, 0, 1], port).into();
        Event::Started { id: id.into(), address, replica: Some(Replica::Process { pid: port.into() }) }
    }

    fn stopped(id: &str, crash_loop: bool) -> Event {
        Event::Stopped { id: id.into(), crash_loop, exit: None }
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
        assert_eq!(step(stopped("a", false)), State::Starting);
        assert_eq!(step(checked("a", 1, true)), State::Starting, "news of a replica that is gone");
        assert_eq!(step(started("a", 2)), State::Starting);
        assert_eq!(step(checked("a", 1, true)), State::Starting, "news of the replica before");
        assert_eq!(step(checked("a", 2, true)), State::Healthy);
        assert_eq!(step(stopped("a", true)), State::CrashLoop);
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
    fn a_backend_that_leaves_takes_its_points_and_its_return_brings_the_same() {
        let mut publisher = publisher(false, vec![joined("a"), joined("b"), started("a", 1), started("b", 2)]);
        let before = publisher.table().load().ring().digest();
        publisher.take([Event::Left { id: "a".into() }], Instant::now());
        assert_eq!(publisher.table().load().ring().points(), 10);
        publisher.take([joined("a"), joined("a")], Instant::now());
        assert_eq!(publisher.table().load().ring().digest(), before);
    }

    #[test]
    fn a_bad_report_overrules_the_checks_until_it_is_taken_back_or_the_replica_replaced() {
        let mut publisher = publisher(true, vec![joined("a"), started("a", 1), checked("a", 1, true)]);
        let report = |healthy| Event::Reported { id: "a".into(), healthy };
        let mut step = |event: Event| {
            publisher.take([event], Instant::now());
            states(&publisher)[0]
        };
        assert_eq!(step(report(false)), State::Unhealthy);
        assert_eq!(step(checked("a", 1, true)), State::Unhealthy);
        assert_eq!(step(report(true)), State::Healthy);
        assert_eq!(step(report(false)), State::Unhealthy);
        assert_eq!(step(started("a", 2)), State::Starting);
        assert_eq!(step(checked("a", 2, true)), State::Healthy);
    }

    #[test]
    fn a_new_address_of_the_same_replica_is_no_restart() {
        let mut publisher = publisher(false, vec![joined("a"), started("a", 1)]);
        let restarts = |publisher: &Publisher| publisher.table().load().backends()[0].restarts;
        let moved = Event::Started {
            id: "a".into(),
            address: ([127, 0, 0, 9], 1).into(),
            replica: Some(Replica::Process { pid: 1 }),
        };
        publisher.take([stopped("a", false), moved], Instant::now());
        assert_eq!(restarts(&publisher), 0);
        publisher.take([stopped("a", false), started("a", 2)], Instant::now());
        assert_eq!(restarts(&publisher), 1);
        let exit = |code| {
            let exit = Exit { reason: String::new(), code, output: Vec::new(), at: Instant::now() };
            Event::Stopped { id: "a".into(), crash_loop: false, exit: Some(Arc::new(exit)) }
        };
        publisher.take([exit(Some(3))], Instant::now());
        assert_eq!(restarts(&publisher), 1, "the end of one that was told of");
        publisher.take([exit(Some(3)), exit(Some(3))], Instant::now());
        assert_eq!(restarts(&publisher), 3, "two that nobody saw running");
        publisher.take([exit(None)], Instant::now());
        assert_eq!(restarts(&publisher), 3, "one that could not be started");
    }

    #[test]
    fn news_of_strangers_publishes_nothing() {
        let mut publisher = publisher(true, vec![joined("a")]);
        let before = publisher.table().load().generation();
        publisher.take([started("x", 1), checked("x", 0, true)], Instant::now());
        assert_eq!(publisher.table().load().generation(), before);
    }
}
