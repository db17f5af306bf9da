//! A slot whose replica is replaced by one that stood beside it.

use std::sync::atomic::Ordering;

use super::*;
use crate::backend::Live;
use crate::control::publisher::backend_state::LOOK;

const WITHIN: Duration = Duration::from_secs(30);

fn replica(pid: u32) -> Replica {
    Replica::Process { pid }
}

fn beside(id: &str, slot: &str) -> Event {
    Event::Beside { id: id.into(), slot: slot.into() }
}

fn port(port: u16) -> Address {
    Address::Ip(([127, 0, 0, 1], port).into())
}

fn flipped(slot: &str, beside: &str, next: u32, former: u32) -> Event {
    let (id, beside) = (slot.into(), beside.into());
    Event::Flipped { id, beside, next: replica(next), former: Some(replica(former)), within: WITHIN }
}

/// Three healthy slots, and a healthy incarnation beside the second.
fn with_successor() -> Publisher {
    let slots = ["a", "b", "c"];
    let known = slots.iter().map(|id| joined(id)).chain(slots.iter().zip(1..).map(|(id, port)| started(id, port)));
    let mut publisher = publisher(true, known.collect());
    publisher.take(slots.iter().zip(1..).map(|(id, n)| checked(id, n, true)), Instant::now());
    publisher.take([beside("b+", "b"), started("b+", 9)], Instant::now());
    publisher.take([checked("b+", 4, true)], Instant::now());
    publisher
}

/// The address of each key's backend.
fn addresses(table: &Table) -> Vec<Address> {
    let first = |key: u32| table.candidates(&key.to_le_bytes()).next().map(|(_, address)| address.clone()).unwrap();
    (0..1000).map(first).collect()
}

fn live(table: &Table, id: &str) -> Arc<Live> {
    Arc::clone(&table.backends().find(id).unwrap().live)
}

#[test]
fn a_flip_changes_the_address_of_one_slot_and_neither_the_ring_nor_the_backend_of_any_key() {
    let mut publisher = with_successor();
    let before = publisher.table().load();
    assert_eq!(before.backends().find("b+").map(|one| one.state), Some(State::Healthy));
    let old: Vec<_> = addresses(&before);
    let permit = BackendPermit::take(&live(&before, "b"), u64::MAX).unwrap();
    let alone = {
        let known: Vec<_> = ["a", "b", "c"].iter().map(|id| joined(id)).collect();
        Publisher::new("echo".into(), settings(true), known, Instant::now()).table().load().ring().digest()
    };
    publisher.take([flipped("b", "b+", 9, 2)], Instant::now());
    let after = publisher.table().load();
    assert_eq!(after.generation(), before.generation() + 1, "one publication");
    assert_eq!((before.ring().digest(), after.ring().digest()), (alone, alone));
    assert!(Arc::ptr_eq(before.ring(), after.ring()), "the ring was not built again");
    let swap = |address: Address| if address == port(2) { port(9) } else { address };
    assert_eq!(addresses(&after), old.into_iter().map(swap).collect::<Vec<_>>());
    let [b, other] = ["b", "b+"].map(|id| after.backends().find(id).unwrap().clone());
    assert_eq!((b.state, b.restarts, b.incarnation), (State::Healthy, 1, 4));
    assert_eq!((b.replica, other.replica), (Some(replica(9)), Some(replica(2))));
    assert_eq!((other.state, other.incarnation), (State::Draining, 2));
    assert_eq!((b.live.active.load(Ordering::Relaxed), other.live.active.load(Ordering::Relaxed)), (0, 1));
    assert!(Arc::ptr_eq(&b.live.counters, &other.live.counters), "the slot continues its counters");

    // A check of the old one says nothing about the new one.
    publisher.take([checked("b", 2, false)], Instant::now());
    assert_eq!(publisher.table().load().backends().find("b").unwrap().state, State::Healthy);
    publisher.take([], Instant::now() + 2 * LOOK);
    assert!(publisher.table().load().backends().find("b+").is_some(), "it has a connection");
    drop(permit);
    publisher.take([], Instant::now() + 4 * LOOK);
    let last = publisher.table().load();
    assert!(last.backends().find("b+").is_none());
    assert!(last.backends().find("b").unwrap().other.is_none());
}

#[test]
fn both_incarnations_count_towards_the_limit_of_the_slot() {
    let mut publisher = with_successor();
    let old = live(&publisher.table().load(), "b");
    let permits: Vec<_> = (0..3).map(|_| BackendPermit::take(&old, u64::MAX).unwrap()).collect();
    publisher.take([flipped("b", "b+", 9, 2)], Instant::now());
    let table = publisher.table().load();
    let b = table.backends().find("b").unwrap();
    assert_eq!((b.most_connections(5), b.most_connections(2), b.most_connections(u64::MAX)), (2, 0, u64::MAX));
    drop(permits);
    assert_eq!(b.most_connections(5), 5);
}

#[test]
fn connections_of_the_one_that_left_are_reset_at_the_deadline_and_those_of_its_successor_stay() {
    let mut publisher = with_successor();
    let old = live(&publisher.table().load(), "b");
    let before = BackendPermit::take(&old, u64::MAX).unwrap();
    publisher.take([flipped("b", "b+", 9, 2)], Instant::now());
    let after = BackendPermit::take(&live(&publisher.table().load(), "b"), u64::MAX).unwrap();
    publisher.take([], Instant::now() + WITHIN + LOOK);
    assert_eq!((before.eviction(), after.eviction()), (Some(Eviction::Drained), None));
}

#[test]
fn the_orders_of_an_operator_stay_with_the_slot() {
    let mut publisher = with_successor();
    publisher.take([Event::DrainRequested { id: "b".into(), within: None }], Instant::now());
    publisher.take([flipped("b", "b+", 9, 2)], Instant::now());
    assert_eq!(publisher.table().load().backends().find("b").unwrap().state, State::Draining);
    publisher.take([Event::DrainCancelled { id: "b".into() }], Instant::now());
    assert_eq!(publisher.table().load().backends().find("b").unwrap().state, State::Healthy);
}

#[test]
fn a_replica_with_another_name_is_the_same_one() {
    let mut publisher = with_successor();
    let container = |name: &str| Replica::Container { id: "x".into(), name: name.into(), check: None };
    let address = || Event::Started { id: "b".into(), address: port(7), replica: Some(container("b-next")) };
    publisher.take([address(), checked("b", 5, true)], Instant::now());
    let restarts = publisher.table().load().backends().find("b").unwrap().restarts;
    publisher.take([Event::Renamed { id: "b".into(), replica: container("b") }], Instant::now());
    let b = publisher.table().load().backends().find("b").unwrap().clone();
    assert_eq!((b.replica, b.state, b.restarts), (Some(container("b")), State::Healthy, restarts));
    publisher.take([stopped("b", false), Event::Renamed { id: "b".into(), replica: container("b") }], Instant::now());
    assert_eq!(publisher.table().load().backends().find("b").unwrap().replica, None, "it has gone");
}

#[test]
fn an_event_about_an_incarnation_that_is_not_there_changes_nothing() {
    let mut publisher = with_successor();
    let before = publisher.table().load().generation();
    let unknown = [beside("x+", "x"), beside("b+", "b"), flipped("b", "x", 9, 2), flipped("x", "b+", 9, 2)];
    publisher.take(unknown, Instant::now());
    let table = publisher.table().load();
    assert_eq!((table.generation(), table.backends().len()), (before, 4));
    publisher.take([Event::Left { id: "b+".into() }], Instant::now());
    assert!(publisher.table().load().backends().find("b").unwrap().other.is_none());
}
