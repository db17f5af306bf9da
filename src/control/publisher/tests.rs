use super::*;
use crate::address::Address;
use crate::backend::{Admission, Advice, BackendPermit, Exit, Membership, Replica};
use crate::ring::Parameters;
use crate::table::Rules;

mod exclusive;
mod incarnations;

fn joined(id: &str) -> Event {
    Event::Joined { id: id.into(), membership: Membership::weighing(1) }
}

fn started(id: &str, port: u16) -> Event {
    let address = Address::Ip(([127, 0, 0, 1], port).into());
    Event::Started { id: id.into(), address, replica: Some(Replica::Process { pid: port.into() }) }
}

fn stopped(id: &str, crash_loop: bool) -> Event {
    Event::Stopped { id: id.into(), crash_loop, exit: None }
}

fn checked(id: &str, incarnation: u64, healthy: bool) -> Event {
    let result = if healthy { "ok" } else { "refused" };
    Event::Checked { id: id.into(), incarnation, healthy: Some(healthy), has_declined: false, result: result.into() }
}

fn settings(is_checked: bool) -> Settings {
    Settings { is_checked, ..Settings::plain() }
}

fn publisher(is_checked: bool, known: Vec<Event>) -> Publisher {
    Publisher::new("echo".into(), settings(is_checked), known, Instant::now())
}

fn states(publisher: &Publisher) -> Vec<State> {
    publisher.table().load().backends().iter().map(|backend| backend.state).collect()
}

#[test]
fn a_backend_moves_through_its_states_from_start_to_crash_loop() {
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
    assert_eq!(step(checked("a", 1, true)), State::Starting, "the event is about a replica that is gone");
    assert_eq!(step(started("a", 2)), State::Starting);
    assert_eq!(step(checked("a", 1, true)), State::Starting, "the event is about the previous replica");
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
fn only_a_change_of_members_rebuilds_the_ring_and_counters_outlive_replicas() {
    let mut publisher = publisher(false, vec![joined("a"), joined("b")]);
    let before = publisher.table().load();
    publisher.take([started("a", 1), started("b", 2)], Instant::now());
    let after = publisher.table().load();
    assert!(Arc::ptr_eq(before.ring(), after.ring()));
    assert!(Arc::ptr_eq(&before.backends()[0].live, &after.backends()[0].live));
    assert_eq!(after.generation(), before.generation() + 1, "a batch of events publishes one table");
    publisher.take([joined("c")], Instant::now());
    assert_eq!(publisher.table().load().ring().points(), 30);
}

#[test]
fn a_backend_that_leaves_and_joins_again_gets_the_same_points() {
    let mut publisher = publisher(false, vec![joined("a"), joined("b"), started("a", 1), started("b", 2)]);
    let before = publisher.table().load().ring().digest();
    publisher.take([Event::Left { id: "a".into() }], Instant::now());
    assert_eq!(publisher.table().load().ring().points(), 10);
    publisher.take([joined("a"), joined("a")], Instant::now());
    assert_eq!(publisher.table().load().ring().digest(), before);
}

#[test]
fn a_bad_report_overrides_the_checks_until_it_is_withdrawn_or_the_replica_is_replaced() {
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
fn a_new_address_of_the_same_replica_is_not_a_restart() {
    let mut publisher = publisher(false, vec![joined("a"), started("a", 1)]);
    let restarts = |publisher: &Publisher| publisher.table().load().backends()[0].restarts;
    let moved = Event::Started {
        id: "a".into(),
        address: Address::Ip(([127, 0, 0, 9], 1).into()),
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
    assert_eq!(restarts(&publisher), 1, "the end of a replica that was reported as started");
    publisher.take([exit(Some(3)), exit(Some(3))], Instant::now());
    assert_eq!(restarts(&publisher), 3, "two replicas ended that were never reported as started");
    publisher.take([exit(None)], Instant::now());
    assert_eq!(restarts(&publisher), 3, "a replica that could not be started");
}

#[test]
fn events_about_unknown_backends_publish_nothing() {
    let mut publisher = publisher(true, vec![joined("a")]);
    let before = publisher.table().load().generation();
    publisher.take([started("x", 1), checked("x", 0, true)], Instant::now());
    assert_eq!(publisher.table().load().generation(), before);
}

fn drained(id: &str, within: Option<Duration>) -> Event {
    Event::DrainRequested { id: id.into(), within }
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_drained_backend_keeps_its_points_and_serves_the_same_keys_after_undrain() {
    let mut publisher = publisher(false, vec![joined("a"), joined("b"), started("a", 1), started("b", 2)]);
    let before = publisher.table().load().ring().digest();
    publisher.take([drained("a", None)], Instant::now());
    assert_eq!(states(&publisher), [State::Draining, State::Healthy]);
    publisher.take([stopped("a", false), started("a", 3)], Instant::now());
    assert_eq!(states(&publisher), [State::Draining, State::Healthy], "its next replica is drained too");
    publisher.take([Event::DrainCancelled { id: "a".into() }], Instant::now());
    assert_eq!(states(&publisher), [State::Healthy; 2]);
    assert_eq!(publisher.table().load().ring().digest(), before);
}

#[test]
fn retiring_ends_with_the_next_replica_and_a_drain_command_does_not() {
    let mut publisher = publisher(false, vec![joined("a"), started("a", 1)]);
    let retiring = || Event::Retiring { id: "a".into(), within: Some(SECOND) };
    publisher.take([retiring()], Instant::now());
    assert_eq!(states(&publisher), [State::Draining]);
    publisher.take([Event::DrainCancelled { id: "a".into() }], Instant::now());
    assert_eq!(states(&publisher), [State::Draining], "no command caused this drain");
    publisher.take([stopped("a", false), started("a", 2)], Instant::now());
    assert_eq!(states(&publisher), [State::Healthy]);
    publisher.take([drained("a", None), retiring(), started("a", 3)], Instant::now());
    assert_eq!(states(&publisher), [State::Draining]);
}

#[test]
fn connections_are_reset_at_the_deadline_of_a_drain_until_none_is_left() {
    let now = Instant::now();
    let mut publisher = publisher(false, vec![joined("a"), started("a", 1)]);
    let live = Arc::clone(&publisher.table().load().backends()[0].live);
    let (era, permit) = (live.evictions.era(), BackendPermit::take(&live, 10));
    assert_eq!(publisher.take([drained("a", Some(10 * SECOND))], now), Some(now + 10 * SECOND));
    publisher.take([], now + 9 * SECOND);
    assert_eq!(live.evictions.since(era), None);
    let again = publisher.take([], now + 10 * SECOND).unwrap();
    assert_eq!(live.evictions.since(era), Some(Eviction::Drained));
    let era = live.evictions.era();
    publisher.take([], again);
    assert_eq!(live.evictions.since(era), Some(Eviction::Drained), "a connection that was made late");
    drop(permit);
    assert!(publisher.take([], again + SECOND).is_some(), "a connect that began before the deadline may complete late");
    assert_eq!(publisher.take([], again + 70 * SECOND), None);
}

#[test]
fn a_leaving_backend_has_no_points_and_is_removed_after_its_last_connection() {
    let now = Instant::now();
    let mut publisher = publisher(false, vec![joined("a"), joined("b"), started("a", 1), started("b", 2)]);
    let permit = BackendPermit::take(&publisher.table().load().backends()[0].live, 10);
    let leaving = Event::Leaving { id: "a".into(), within: 60 * SECOND };
    let mut wake = publisher.take([leaving.clone()], now).unwrap();
    assert_eq!(publisher.table().load().ring().points(), 10);
    assert_eq!(states(&publisher), [State::Draining, State::Healthy]);
    for _ in 0..5 {
        wake = publisher.take([], wake).unwrap();
    }
    assert_eq!(publisher.table().load().backends().len(), 2);
    drop(permit);
    assert_eq!(publisher.take([], wake), None);
    assert_eq!(publisher.table().load().backends().len(), 1);
    // A backend without connections is removed too, but not before workers have seen that it leaves.
    publisher.take([joined("a"), started("a", 1)], now);
    let wake = publisher.take([leaving.clone()], now).unwrap();
    assert_eq!(publisher.table().load().backends().len(), 2);
    publisher.take([], wake);
    assert_eq!(publisher.table().load().backends().len(), 1);
    // A backend that joins again in time stays.
    publisher.take([joined("a"), started("a", 1), leaving], now);
    publisher.take([joined("a")], now);
    publisher.take([], now + 90 * SECOND);
    assert_eq!(states(&publisher), [State::Healthy; 2]);
    assert_eq!(publisher.table().load().ring().points(), 20);
}

#[test]
fn an_ejected_replica_gets_no_connections_until_it_is_readmitted_or_replaced() {
    let mut publisher = publisher(true, vec![joined("a"), started("a", 1), checked("a", 1, true)]);
    let ejected = |incarnation| Event::Ejected { id: "a".into(), incarnation };
    let mut step = |event: Event| {
        publisher.take([event], Instant::now());
        states(&publisher)[0]
    };
    assert_eq!(step(ejected(0)), State::Healthy, "the event is about another replica");
    assert_eq!(step(ejected(1)), State::Ejected);
    assert_eq!(step(checked("a", 1, true)), State::Ejected);
    assert_eq!(step(checked("a", 1, false)), State::Unhealthy);
    assert_eq!(step(checked("a", 1, true)), State::Ejected);
    assert_eq!(step(Event::Readmitted { id: "a".into(), incarnation: 1 }), State::Healthy);
    assert_eq!(step(ejected(1)), State::Ejected);
    assert_eq!(step(started("a", 2)), State::Starting);
    assert_eq!(step(checked("a", 2, true)), State::Healthy);
}

#[test]
fn connections_of_a_backend_that_goes_down_are_reset_only_if_on_down_is_reset() {
    for (on_down, expected) in [(OnDown::Keep, None), (OnDown::Reset, Some(Eviction::Down))] {
        let known = vec![joined("a"), started("a", 1), checked("a", 1, true)];
        let settings = Settings { on_down, ..settings(true) };
        let mut publisher = Publisher::new("echo".into(), settings, known, Instant::now());
        let live = Arc::clone(&publisher.table().load().backends()[0].live);
        let era = live.evictions.era();
        publisher.take([checked("a", 1, false)], Instant::now());
        assert_eq!(live.evictions.since(era), expected);
        let era = live.evictions.era();
        publisher.take([checked("a", 1, false)], Instant::now());
        assert_eq!(live.evictions.since(era), None, "connections are reset only once");
    }
}

#[test]
fn a_recovered_backend_starts_slowly_and_the_first_backends_do_not() {
    let now = Instant::now();
    let known = vec![joined("a"), joined("b"), started("a", 1), started("b", 2)];
    let settings = Settings { slow_start: 10 * SECOND, ..settings(true) };
    let mut publisher = Publisher::new("echo".into(), settings, known, now);
    let admission = |publisher: &Publisher, n: usize| publisher.table().load().backends()[n].admission;
    publisher.take([checked("a", 1, true)], now);
    publisher.take([checked("b", 2, true)], now);
    assert_eq!((admission(&publisher, 0), admission(&publisher, 1)), (Admission::ALL, Admission::ALL));
    publisher.take([checked("b", 2, false)], now);
    let mut wake = publisher.take([checked("b", 2, true)], now);
    let (mut before, mut steps) = (0.0, 0);
    assert!(admission(&publisher, 1).as_part() <= 0.1);
    while let Some(at) = wake {
        wake = publisher.take([], at);
        let part = admission(&publisher, 1).as_part();
        assert!(part > before, "{part}");
        (before, steps) = (part, steps + 1);
        assert!(at <= now + 10 * SECOND);
    }
    assert_eq!((admission(&publisher, 1), admission(&publisher, 0)), (Admission::ALL, Admission::ALL));
    assert!(steps >= 15, "{steps}");
    // The only healthy backend takes all keys at once.
    publisher.take([checked("a", 1, false), checked("b", 2, false)], now);
    publisher.take([checked("a", 1, true)], now);
    assert_eq!(admission(&publisher, 0), Admission::ALL);
}

#[test]
fn new_settings_rebuild_the_ring_only_if_its_parameters_change() {
    let mut publisher = publisher(false, vec![joined("a"), started("a", 1)]);
    let before = publisher.table().load();
    publisher.take([Event::Configured(Settings { on_down: OnDown::Reset, ..settings(false) })], Instant::now());
    assert!(Arc::ptr_eq(before.ring(), publisher.table().load().ring()));
    publisher.take([Event::Configured(Settings { is_checked: true, ..settings(false) })], Instant::now());
    assert_eq!(states(&publisher), [State::Healthy], "a healthy backend keeps serving when checks are switched on");
    publisher.take([checked("a", 1, false)], Instant::now());
    assert_eq!(states(&publisher), [State::Unhealthy]);
    let parameters = Parameters { virtual_nodes: 20, probes: 3, seed: 0 };
    publisher.take([Event::Configured(Settings { parameters, ..settings(false) })], Instant::now());
    assert_eq!(publisher.table().load().ring().points(), 20);
    assert_eq!(states(&publisher), [State::Healthy]);
}

#[test]
fn a_drain_applies_to_a_backend_that_joins_later_or_again() {
    let mut publisher = publisher(false, vec![drained("a", None), joined("a"), started("a", 1), joined("b")]);
    assert_eq!(states(&publisher)[0], State::Draining);
    publisher.take([Event::Left { id: "a".into() }], Instant::now());
    publisher.take([joined("a"), started("a", 2)], Instant::now());
    assert_eq!(states(&publisher)[0], State::Draining);
    publisher.take([Event::Left { id: "a".into() }], Instant::now());
    publisher.take([Event::DrainCancelled { id: "a".into() }], Instant::now());
    publisher.take([joined("a"), started("a", 3)], Instant::now());
    assert_eq!(states(&publisher)[0], State::Healthy);
}

#[test]
fn the_list_of_backends_can_drain_one_and_limit_its_connections() {
    let now = Instant::now();
    let listed = |is_drained| Event::Joined {
        id: "a".into(),
        membership: Membership { is_drained, max_connections: Some(5), ..Membership::weighing(1) },
    };
    let settings = Settings { drain: 3 * SECOND, ..settings(false) };
    let mut publisher = Publisher::new("echo".into(), settings, [listed(true), started("a", 1), joined("b")], now);
    assert_eq!(states(&publisher)[0], State::Draining);
    assert_eq!(publisher.table().load().backends()[0].most_connections(9), 5);
    assert_eq!(publisher.table().load().backends()[1].most_connections(9), 9);
    publisher.take([Event::DrainCancelled { id: "a".into() }], now);
    assert_eq!(states(&publisher)[0], State::Draining, "only the list ends it");
    let ring = Arc::clone(publisher.table().load().ring());
    publisher.take([listed(false)], now);
    assert_eq!(states(&publisher)[0], State::Healthy);
    let live = Arc::clone(&publisher.table().load().backends()[0].live);
    let permit = BackendPermit::take(&live, 9).unwrap();
    publisher.take([listed(true)], now);
    publisher.take([], now + 2 * SECOND);
    assert_eq!(permit.eviction(), None);
    publisher.take([], now + 3 * SECOND);
    assert_eq!(permit.eviction(), Some(Eviction::Drained));
    assert!(Arc::ptr_eq(&ring, publisher.table().load().ring()), "no key has moved on the ring");
}

#[test]
fn a_backend_without_weight_has_its_own_place_in_the_list() {
    let idle =
        |id: &str, tier| Event::Joined { id: id.into(), membership: Membership { tier, ..Membership::weighing(0) } };
    let mut publisher = publisher(false, vec![idle("b", 0)]);
    publisher.take([started("b", 2)], Instant::now());
    assert_eq!(states(&publisher), [State::Healthy]);
    publisher.take([joined("a"), started("a", 1)], Instant::now());
    publisher.take([idle("c", 3)], Instant::now());
    publisher.take([started("c", 3)], Instant::now());
    let table = publisher.table().load();
    let list: Vec<_> =
        table.backends().iter().map(|one| (&*one.id, one.address.clone().unwrap().to_string())).collect();
    let at = |port: u16| format!("127.0.0.1:{port}");
    assert_eq!(list, [("a", at(1)), ("b", at(2)), ("c", at(3))]);
    assert_eq!(table.healthy(), 1);
}

#[test]
fn an_agent_only_lowers_what_a_backend_gets() {
    let now = Instant::now();
    let settings = Settings { slow_start: 10 * SECOND, drain: SECOND, ..settings(true) };
    let known = [joined("a"), joined("b"), started("a", 1), started("b", 2), checked("b", 2, true)];
    let mut publisher = Publisher::new("echo".into(), settings, known, now);
    publisher.take([checked("a", 1, true)], now);
    let says = |part: f64, is_drained, is_down| {
        let advice = Advice { part: Admission::part(part), is_drained, is_down, ..Advice::default() };
        Event::Advised { id: "a".into(), incarnation: 1, advice: Some(advice.into()) }
    };
    let part = |publisher: &Publisher| publisher.table().load().backends()[0].admission.as_part();
    publisher.take([says(0.5, false, false)], now);
    assert!((part(&publisher) - 0.5).abs() < 0.001);
    publisher.take([says(0.5, true, false)], now);
    assert_eq!(states(&publisher)[0], State::Draining);
    publisher.take([says(0.5, false, true)], now);
    assert_eq!(states(&publisher)[0], State::Unhealthy);
    assert_eq!(publisher.table().load().backends()[0].well, Some(true), "the supervisor does not replace it");
    // A recovered backend starts slowly, with a part of the part.
    publisher.take([says(0.5, false, false)], now);
    assert!(part(&publisher) < 0.1);
    while let Some(at) = publisher.wake() {
        publisher.take([], at);
    }
    assert!((part(&publisher) - 0.5).abs() < 0.001);
    // Checks win, and another replica has said nothing.
    publisher.take([checked("a", 1, false)], now);
    publisher.take([says(1.0, false, false)], now);
    assert_eq!(states(&publisher)[0], State::Unhealthy);
    publisher.take([says(0.5, true, false), started("a", 3)], now);
    assert_eq!((states(&publisher)[0], part(&publisher)), (State::Starting, 1.0));
    publisher.take([says(0.5, true, false)], now);
    assert_eq!(states(&publisher)[0], State::Starting, "the answer is about an earlier replica");
    let late = Event::Advised {
        id: "a".into(),
        incarnation: 3,
        advice: Some(Advice { is_drained: true, ..Advice::default() }.into()),
    };
    publisher.take([stopped("a", false), late], now);
    assert_eq!(states(&publisher)[0], State::Starting, "the replica is gone");
}
