//! Exclusive pools: at most one backend has connections.

use super::*;

fn exclusive() -> Settings {
    Settings { rules: Rules { is_exclusive: true, panic_below: 0, spill_below: 50 }, ..settings(true) }
}

/// An exclusive pool of three checked backends at ports 1 to 3, whose incarnations are the same numbers.
struct Exclusive {
    publisher: Publisher,
    now: Instant,
}

impl Exclusive {
    fn new() -> Self {
        let known = [joined("a"), joined("b"), joined("c"), started("a", 1), started("b", 2), started("c", 3)];
        let now = Instant::now();
        Self { publisher: Publisher::new("db".into(), exclusive(), known, now), now }
    }

    /// A check of a backend passes (`true`), or its answer says no.
    fn check(&mut self, id: &str, passes: bool) {
        let incarnation = 1 + u64::from(id.as_bytes()[0] - b'a');
        let (healthy, result) = (Some(passes), if passes { "ok" } else { "status 503" }.into());
        let event = Event::Checked { id: id.into(), incarnation, healthy, has_declined: !passes, result };
        self.publisher.take([event], self.now);
    }

    /// Lets time pass, step by step, as the publisher asks for.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(at) = self.publisher.wake().filter(|at| *at <= end) {
            self.now = at;
            self.publisher.take([], at);
        }
        self.now = end;
    }

    fn states(&self) -> Vec<State> {
        states(&self.publisher)
    }

    fn connect(&self, n: usize) -> BackendPermit {
        BackendPermit::take(&self.publisher.table().load().backends()[n].live, 9).unwrap()
    }
}

#[test]
fn one_backend_of_an_exclusive_pool_is_healthy_and_the_others_stand_by() {
    use State::{Healthy, Standby, Starting, Unhealthy};

    let mut pool = Exclusive::new();
    assert_eq!(pool.states(), [Starting; 3]);
    pool.check("b", true);
    pool.check("a", false);
    assert_eq!(pool.states(), [Standby, Healthy, Starting]);
    // A second claim changes nothing while the first one lasts.
    pool.check("c", true);
    pool.check("a", true);
    pool.pass(10 * SECOND);
    assert_eq!(pool.states(), [Standby, Healthy, Standby]);
    assert_eq!(pool.publisher.table().load().healthy(), 1);
    // A server that does not answer is no standby.
    pool.publisher.take([checked("c", 3, false)], pool.now);
    assert_eq!(pool.states(), [Standby, Healthy, Unhealthy]);
    pool.check("c", true);
    // The newest claim wins.
    pool.check("b", false);
    assert_eq!(pool.states(), [Standby; 3], "a worker may connect to the last holder by an earlier table");
    pool.pass(SECOND);
    assert_eq!(pool.states(), [Standby, Standby, Healthy]);
    // So does the lowest tier, whatever the age of its claim.
    let spare = Event::Joined { id: "b".into(), membership: Membership { tier: 1, ..Membership::weighing(1) } };
    pool.publisher.take([spare], pool.now);
    pool.check("b", true);
    pool.check("c", false);
    pool.pass(SECOND);
    assert_eq!(pool.states(), [Healthy, Standby, Standby]);
}

#[test]
fn the_next_holder_waits_until_the_last_connection_of_the_loser_has_ended() {
    use State::{Healthy, Standby};

    let mut pool = Exclusive::new();
    pool.check("a", true);
    pool.check("b", true);
    pool.check("c", false);
    let early = pool.connect(0);
    pool.check("a", false);
    assert_eq!(early.eviction(), Some(Eviction::Down));
    // A worker that has picked by an earlier table.
    let late = pool.connect(0);
    assert_eq!(late.eviction(), None);
    pool.pass(SECOND);
    assert_eq!((late.eviction(), pool.states()), (Some(Eviction::Down), vec![Standby; 3]));
    drop((early, late));
    pool.pass(SECOND);
    assert_eq!(pool.states(), [Standby, Healthy, Standby]);
    // Also if the loser has left the pool.
    let last = pool.connect(1);
    pool.check("c", true);
    pool.publisher.take([Event::Left { id: "b".into() }], pool.now);
    pool.pass(SECOND);
    assert_eq!((last.eviction(), pool.states()), (Some(Eviction::Down), vec![Standby; 2]));
    drop(last);
    pool.pass(SECOND);
    assert_eq!(pool.states(), [Standby, Healthy]);
}

#[test]
fn the_connections_of_a_drained_holder_may_end_by_themselves() {
    use State::{Draining, Healthy, Standby};

    let mut pool = Exclusive::new();
    for id in ["a", "b", "c"] {
        pool.check(id, true);
    }
    let permit = pool.connect(0);
    let drain = |within| Event::DrainRequested { id: "a".into(), within: Some(within) };
    pool.publisher.take([drain(60 * SECOND)], pool.now);
    pool.pass(30 * SECOND);
    assert_eq!((permit.eviction(), pool.states()), (None, vec![Draining, Standby, Standby]));
    // Nobody has taken its place.
    pool.publisher.take([Event::DrainCancelled { id: "a".into() }], pool.now);
    pool.pass(SECOND);
    assert_eq!((permit.eviction(), pool.states()), (None, vec![Healthy, Standby, Standby]));
    pool.publisher.take([drain(SECOND)], pool.now);
    pool.pass(2 * SECOND);
    assert_eq!(permit.eviction(), Some(Eviction::Drained));
    drop(permit);
    pool.pass(SECOND);
    assert_eq!(pool.states(), [Draining, Standby, Healthy]);
    // A server that dies during its drain holds up nobody.
    let last = pool.connect(2);
    pool.publisher.take([Event::DrainRequested { id: "c".into(), within: None }], pool.now);
    pool.pass(SECOND);
    assert_eq!(last.eviction(), None);
    pool.publisher.take([checked("c", 3, false)], pool.now);
    assert_eq!(last.eviction(), Some(Eviction::Down));
}

#[test]
fn a_pool_that_becomes_exclusive_asks_for_the_primary_first() {
    use State::{Healthy, Standby, Starting};

    let events = [checked("a", 1, true), checked("b", 2, true)];
    let known = [joined("a"), joined("b"), started("a", 1), started("b", 2)].into_iter().chain(events);
    let now = Instant::now();
    let mut pool = Exclusive { publisher: Publisher::new("db".into(), settings(true), known, now), now };
    let (one, other) = (pool.connect(0), pool.connect(1));
    pool.publisher.take([Event::Configured(exclusive())], now);
    assert_eq!(pool.states(), [Starting; 2], "earlier checks did not ask for the primary");
    pool.check("a", true);
    pool.check("b", false);
    assert!(other.eviction().is_some());
    assert_eq!(pool.states(), [Standby; 2]);
    drop((one, other));
    pool.pass(SECOND);
    assert_eq!(pool.states(), [Healthy, Standby]);
    // A worker that has picked by an earlier table.
    let late = pool.connect(1);
    pool.pass(SECOND);
    assert!(late.eviction().is_some());
    drop(late);
    pool.publisher.take([Event::Configured(settings(true))], pool.now);
    assert_eq!(pool.states(), [Healthy, State::Unhealthy]);
}

#[test]
fn a_holder_that_moves_is_another_server() {
    use State::{Healthy, Standby};

    let mut pool = Exclusive::new();
    pool.check("a", true);
    pool.check("b", false);
    pool.check("c", false);
    let old = pool.connect(0);
    pool.publisher.take([started("a", 9)], pool.now);
    let event = checked("a", 4, true);
    pool.publisher.take([event], pool.now);
    assert_eq!((old.eviction(), pool.states()), (Some(Eviction::Down), vec![Standby; 3]));
    pool.pass(SECOND);
    assert_eq!(pool.states(), [Standby; 3], "the old server still has a connection");
    drop(old);
    pool.pass(SECOND);
    assert_eq!(pool.states(), [Healthy, Standby, Standby]);
}

#[test]
fn a_backend_without_weight_holds_no_exclusive_pool() {
    use State::{Healthy, Standby};

    let mut pool = Exclusive::new();
    let idle = |id: &str| Event::Joined { id: id.into(), membership: Membership::weighing(0) };
    pool.publisher.take([idle("a")], pool.now);
    pool.check("a", true);
    pool.check("b", true);
    pool.check("c", true);
    assert_eq!(pool.states(), [Standby, Healthy, Standby]);
    pool.publisher.take([idle("b")], pool.now);
    pool.pass(SECOND);
    assert_eq!(pool.states(), [Standby, Standby, Healthy]);
}

#[test]
fn a_standby_is_well() {
    let mut pool = Exclusive::new();
    pool.check("a", true);
    pool.check("b", false);
    pool.publisher.take([checked("c", 3, false)], pool.now);
    let well: Vec<_> = pool.publisher.table().load().backends().iter().map(|backend| backend.well).collect();
    assert_eq!(well, [Some(true), Some(true), Some(false)]);
}
