use std::time::Instant;

use super::*;
use crate::backend::{Admission, Drain, Membership};
use crate::labels::Label as _;
use crate::ring::{Member, Parameters};

fn table(states: &[(State, bool)]) -> Table {
    floored(states, 50)
}

fn floored(states: &[(State, bool)], panic_below: u8) -> Table {
    let backends: Vec<_> =
        states.iter().map(|&(state, has_address)| (state, has_address, Membership::weighing(1))).collect();
    pool(&backends, Rules { panic_below, spill_below: 50, is_exclusive: false })
}

/// A table of backends `b0`, `b1` and so on, each with its state, whether it has an address, and its membership.
fn pool(backends: &[(State, bool, Membership)], rules: Rules) -> Table {
    let names: Vec<String> = (0..backends.len()).map(|n| format!("b{n}")).collect();
    let members =
        std::iter::zip(&names, backends).map(|(id, (.., membership))| Member { id, weight: membership.weight });
    let ring = Ring::build(Parameters { virtual_nodes: 40, probes: 3, seed: 0 }, &members.collect::<Vec<_>>());
    let backends = std::iter::zip(&names, backends).map(|(id, &(state, has_address, membership))| Backend {
        address: has_address.then(|| Address::Ip(([127, 0, 0, 1], 1).into())),
        state,
        ..Backend::new(id.as_str().into(), membership, Instant::now())
    });
    Table::new(0, Arc::new(ring), Members::new(backends, 0), rules)
}

/// Backends with addresses, each with its tier and state.
fn tiers(backends: &[(u16, State)], rules: Rules) -> Table {
    let of = |&(tier, state): &(u16, State)| (state, true, Membership { tier, ..Membership::weighing(1) });
    pool(&backends.iter().map(of).collect::<Vec<_>>(), rules)
}

const USUAL: Rules = Rules { panic_below: 50, spill_below: 50, is_exclusive: false };

fn ids(table: &Table, key: &[u8]) -> Vec<String> {
    table.candidates(key).map(|(backend, _)| backend.id.to_string()).collect()
}

#[test]
fn only_healthy_backends_are_candidates_and_they_keep_the_ring_order() {
    let all = table(&[(State::Healthy, true); 5]);
    let some = table(&[
        (State::Healthy, true),
        (State::Unhealthy, true),
        (State::Draining, true),
        (State::Healthy, true),
        (State::Starting, true),
    ]);
    for key in 0_u32..200 {
        let mut expected = ids(&all, &key.to_le_bytes());
        expected.retain(|id| id == "b0" || id == "b3");
        assert_eq!(ids(&some, &key.to_le_bytes()), expected);
    }
}

#[test]
fn if_no_backend_is_healthy_all_with_an_address_are_tried_except_draining_ones() {
    let table =
        table(&[(State::Unhealthy, true), (State::Starting, false), (State::CrashLoop, true), (State::Draining, true)]);
    let mut found = ids(&table, b"key");
    found.sort();
    assert_eq!(found, ["b0", "b2"]);
}

#[test]
fn panic_mode_tries_all_backends_and_a_floor_of_zero_turns_it_off() {
    let states = |healthy: usize| -> Vec<_> {
        (0..10).map(|n| (if n < healthy { State::Healthy } else { State::Unhealthy }, true)).collect()
    };
    let tried = |healthy, floor| {
        let table = floored(&states(healthy), floor);
        (table.is_panic(), ids(&table, b"key").len())
    };
    assert_eq!(tried(5, 50), (false, 5));
    assert_eq!(tried(4, 50), (true, 10));
    assert_eq!(tried(0, 50), (true, 10));
    assert_eq!(tried(1, 10), (false, 1));
    assert_eq!(tried(1, 0), (false, 1));
    assert_eq!(tried(0, 0), (false, 0));
    assert_eq!(tried(10, 100), (false, 10));
    assert_eq!(tried(9, 100), (true, 10));
    // Starting backends are still unknown, and draining backends were taken out on purpose, so neither is rated.
    let others = [(State::Healthy, true), (State::Starting, true), (State::Draining, true)];
    let table = floored(&others, 100);
    assert_eq!((table.is_panic(), ids(&table, b"key").len()), (false, 1));
    let starting = floored(&[(State::Starting, true)], 50);
    assert_eq!((starting.is_panic(), ids(&starting, b"key").len()), (false, 1));
}

#[test]
fn a_slow_starting_backend_gets_a_fraction_of_its_keys_and_other_keys_stay() {
    let all = table(&[(State::Healthy, true); 3]);
    let with = |table: &Table, admissions: &[(usize, f64)]| {
        let mut backends = table.backends.clone();
        for &(n, part) in admissions {
            backends.set(n, Backend { admission: Admission::part(part), ..backends[n].clone() });
        }
        table.what_if(Arc::clone(table.ring()), backends)
    };
    let slow = with(&all, &[(1, 0.25)]);
    let (mut own, mut kept) = (0, 0);
    for key in 0_u32..8000 {
        let (before, now) = (ids(&all, &key.to_le_bytes()), ids(&slow, &key.to_le_bytes()));
        assert_eq!(now.len(), 3, "the slow-starting backend stays the last resort");
        if before[0] == "b1" {
            own += 1;
            kept += u32::from(now[0] == "b1");
        } else {
            assert_eq!(before[0], now[0]);
        }
    }
    assert!((f64::from(kept) / f64::from(own) - 0.25).abs() < 0.05, "{kept} of {own}");
    // If all backends start slowly, no other backend can take their keys.
    let alone = with(&slow, &[(0, 0.0), (1, 0.0), (2, 0.0)]);
    assert_eq!(ids(&alone, b"key").len(), 3);
}

#[test]
fn changed_members_equal_members_built_from_scratch() {
    let states = [State::Healthy, State::Unhealthy, State::Draining, State::Starting, State::Ejected];
    let all: Vec<_> = (0..200).map(|n| (states[n % 5], n % 3 > 0)).collect();
    let built = table(&all).backends;
    let mut changed = table(&[(State::Starting, false); 200]).backends;
    let first = changed.clone();
    for n in [7, 199, 0, 7] {
        changed.set(n, built[n].clone());
    }
    assert_eq!(first.count(State::Starting), 200, "a change reached a copy");
    for n in 0..200 {
        changed.set(n, built[n].clone());
    }
    for state in State::ALL {
        assert_eq!(changed.count(*state), built.count(*state));
    }
    assert_eq!(changed.taking(), built.taking());
    for n in 0..200 {
        assert_eq!(changed.healthy.has(n), built.healthy.has(n));
        assert_eq!(changed.reachable.has(n), built.reachable.has(n));
    }
    assert_eq!(changed.tiers(), built.tiers());
}

#[test]
fn the_roster_changes_only_with_addresses_and_incarnations() {
    let mut members = table(&[(State::Healthy, true); 3]).backends;
    let roster = members.roster();
    members.set(1, Backend { state: State::Unhealthy, ..members[1].clone() });
    assert_eq!(members.roster(), roster);
    members.set(1, Backend { incarnation: 9, ..members[1].clone() });
    assert_ne!(members.roster(), roster);
    assert_eq!(members.find("b1").map(|backend| backend.incarnation), Some(9));
    assert!(members.find("b").is_none() && members.find("b3").is_none() && members.find("c").is_none());
}

#[test]
fn readers_see_the_new_table_after_a_swap() {
    let cell = TableCell::new(table(&[]));
    let mut reader = cell.reader();
    assert_eq!(reader.load().as_ref().generation(), 0);
    let next = table(&[]);
    cell.publish(Table { generation: 7, ..next });
    assert_eq!((reader.load().as_ref().generation(), cell.load().generation(), *cell.watch().borrow()), (7, 7, 7));
}

use State::{Healthy, Starting, Unhealthy};

#[test]
fn a_higher_tier_gets_only_the_keys_of_backends_that_are_not_healthy() {
    let all = tiers(&[(0, Healthy), (0, Healthy), (0, Healthy), (1, Healthy), (1, Healthy)], USUAL);
    let few = tiers(&[(0, Healthy), (0, Unhealthy), (0, Unhealthy), (1, Healthy), (1, Healthy)], USUAL);
    assert_eq!((all.joined_tiers().collect::<Vec<_>>(), all.has_spilled()), (vec![0], false));
    assert_eq!((few.joined_tiers().collect::<Vec<_>>(), few.has_spilled()), (vec![0, 1], true));
    let mut moved = 0;
    for key in 0_u32..500 {
        let key = key.to_le_bytes();
        let (before, now) = (ids(&all, &key), ids(&few, &key));
        // The backends of tier 1 are the last resort, and each backend comes once.
        assert_eq!(before.len(), 5);
        assert!(before[..3].iter().all(|id| ["b0", "b1", "b2"].contains(&id.as_str())), "{before:?}");
        if before[0] == "b0" {
            assert_eq!(now, ["b0".to_owned(), before[3].clone(), before[4].clone()]);
        } else {
            assert_eq!(now, [before[3].clone(), before[4].clone(), "b0".to_owned()]);
            moved += 1;
        }
    }
    assert!((200..450).contains(&moved), "{moved}");
}

#[test]
fn a_tier_joins_if_too_little_weight_of_the_one_before_is_healthy() {
    let joined = |healthy: usize, spill_below| {
        let tier_0 = (0..4).map(|n| (0, if n < healthy { Healthy } else { Unhealthy }));
        let others = [(1, Unhealthy), (2, Healthy), (9, Healthy)];
        let backends: Vec<_> = tier_0.chain(others).collect();
        tiers(&backends, Rules { panic_below: 50, spill_below, is_exclusive: false }).joined_tiers().collect::<Vec<_>>()
    };
    assert_eq!(joined(4, 50), [0]);
    assert_eq!(joined(2, 50), [0]);
    assert_eq!(joined(1, 50), [0, 2], "tier 1 has no healthy backend");
    assert_eq!(joined(1, 0), [0]);
    assert_eq!(joined(0, 0), [2]);
    assert_eq!(joined(3, 100), [0, 2]);
    let heavy = |weight| (Healthy, true, Membership::weighing(weight));
    let light = (Unhealthy, true, Membership::weighing(1));
    let standby = (Healthy, true, Membership { tier: 1, ..Membership::weighing(1) });
    assert!(!pool(&[heavy(3), light, light, light, standby], USUAL).has_spilled());
    assert!(pool(&[heavy(2), light, light, light, standby], USUAL).has_spilled());
}

#[test]
fn a_pool_panics_only_if_every_tier_has_too_few_healthy_backends() {
    let of = |tier_0: [State; 2], tier_1: [State; 2]| {
        let all = [(0, tier_0[0]), (0, tier_0[1]), (1, tier_1[0]), (1, tier_1[1])];
        let table = tiers(&all, USUAL);
        (table.is_panic(), ids(&table, b"key"))
    };
    assert_eq!(of([Unhealthy; 2], [Healthy, Unhealthy]), (false, vec!["b2".to_owned()]));
    let (is_panic, all) = of([Unhealthy; 2], [Unhealthy; 2]);
    assert!(is_panic && all.len() == 4 && *all[0] < *"b2", "the lowest tier comes first: {all:?}");
}

#[test]
fn backends_that_have_not_been_judged_are_tried_before_a_higher_tier() {
    let table = tiers(&[(0, Starting), (0, Starting), (1, Healthy)], USUAL);
    assert!(!table.has_spilled());
    assert_eq!(ids(&table, b"key")[2], "b2");
    // Only those: the failing ones of the tier get nothing while a higher tier is healthy.
    let mixed = tiers(&[(0, Unhealthy), (0, Unhealthy), (0, Starting), (1, Healthy)], USUAL);
    assert_eq!(mixed.joined_tiers().collect::<Vec<_>>(), [0, 1]);
    let first = (0_u32..300).map(|key| ids(&mixed, &key.to_le_bytes())[0].clone());
    assert_eq!(first.collect::<std::collections::BTreeSet<_>>(), ["b2", "b3"].map(str::to_owned).into());
    // They may all be healthy, so this is no panic.
    assert!(!tiers(&[(0, Unhealthy), (1, Starting)], USUAL).is_panic());
    // Without panic mode, only checks decide.
    let strict = tiers(&[(0, Starting), (1, Healthy)], Rules { panic_below: 0, spill_below: 50, is_exclusive: false });
    assert_eq!(ids(&strict, b"key"), ["b1"]);
    // One of four has passed its check. The others may be healthy too.
    assert!(!tiers(&[(0, Healthy), (0, Starting), (0, Starting), (0, Starting), (1, Healthy)], USUAL).has_spilled());
}

#[test]
fn a_backend_without_weight_gets_no_connection_and_does_not_count() {
    let (one, none) = (Membership::weighing(1), Membership::weighing(0));
    let table = pool(&[(Healthy, true, one), (Healthy, true, none), (Unhealthy, true, none)], USUAL);
    assert_eq!(ids(&table, b"key"), ["b0"]);
    assert_eq!(table.shares_now().iter().map(|share| share.round()).collect::<Vec<_>>(), [1.0, 0.0, 0.0]);
    assert!(table.any_healthy() && !table.is_panic());
    assert_eq!(table.backends().taking(), 1);
    let alone = pool(&[(Healthy, true, none)], USUAL);
    assert!(!alone.any_healthy() && ids(&alone, b"key").is_empty() && !alone.is_panic());
}

#[test]
fn keys_of_a_slow_starting_backend_stay_in_the_higher_tier_until_it_takes_them() {
    let all = tiers(&[(0, Healthy), (1, Healthy)], USUAL);
    let with = |part: f64| {
        let mut backends = all.backends().clone();
        backends.set(0, Backend { admission: Admission::part(part), ..backends[0].clone() });
        all.what_if(Arc::clone(all.ring()), backends)
    };
    let at_main = |table: &Table| (0_u32..2000).filter(|key| ids(table, &key.to_le_bytes())[0] == "b0").count();
    assert!((0.2..0.3).contains(&(at_main(&with(0.25)) as f64 / 2000.0)));
    assert_eq!(at_main(&with(0.5)), 2000, "tier 1 has left, and another backend cannot take the keys");
    assert_eq!(at_main(&all), 2000);
}

/// Seed of the random tables below.
const SEED: u64 = 7;

#[test]
fn the_shares_are_those_of_the_first_candidates() {
    let mut number = 0;
    let mut random = |below: u64| {
        number += 1;
        seahash::hash_seeded(&u64::to_le_bytes(number), SEED, 0, 0, 0) % below
    };
    for round in 0..40 {
        let states = [Healthy, Healthy, Healthy, Unhealthy, State::Draining, Starting];
        let backends: Vec<_> = (0..=random(8))
            .map(|_| {
                let (tier, weight) = (random(3) as u16, random(4) as u32);
                (states[random(6) as usize], random(10) > 0, Membership { tier, ..Membership::weighing(weight) })
            })
            .collect();
        let table = pool(&backends, Rules { panic_below: 50, spill_below: [0, 50, 100][random(3) as usize], ..USUAL });
        // Some take only a part of their keys.
        let mut advised = table.backends().clone();
        for n in 0..backends.len() {
            let admission = [Admission::ALL, Admission::part(0.2), Admission::part(0.6)][random(3) as usize];
            advised.set(n, Backend { admission, ..advised[n].clone() });
        }
        let table = if round % 2 == 0 { table } else { table.what_if(Arc::clone(table.ring()), advised) };
        let mut counts = vec![0; backends.len()];
        for key in 0_u32..4000 {
            let key = key.to_le_bytes();
            let mut candidates = ids(&table, &key);
            if let Some(first) = candidates.first() {
                counts[table.backends().iter().position(|one| *one.id == **first).unwrap()] += 1;
            }
            let count = candidates.len();
            candidates.sort();
            candidates.dedup();
            assert_eq!(candidates.len(), count, "round {round}: a candidate comes twice");
        }
        for (count, share) in std::iter::zip(&counts, table.shares_now()) {
            let part = f64::from(*count) / 4000.0;
            assert!(
                (part - share).abs() < 0.04,
                "seed {SEED}, round {round}: {counts:?} {:?} {backends:?}",
                table.shares_now()
            );
        }
        let healthy = |&owner: &usize| table.backends()[owner].state == Healthy && !table.is_panic();
        for owner in (0..backends.len()).filter(healthy).filter(|_| round % 2 == 0).filter(|&owner| backends[owner].1) {
            assert!((table.share_if_it_took(owner) - table.shares_now()[owner]).abs() < 1e-9, "round {round}");
        }
    }
}

#[test]
fn a_backend_that_leaves_owns_no_key_and_does_not_keep_its_tier() {
    let table = tiers(&[(0, Healthy), (1, Healthy), (1, Healthy)], USUAL);
    let owner = |table: &Table, key: u32| table.owners().of(&key.to_le_bytes());
    assert!((0..50).all(|key| owner(&table, key) == Some(0)));
    let mut backends = table.backends().clone();
    let drain = Some(Drain { since: Instant::now(), deadline: None, leaves: true });
    backends.set(0, Backend { state: State::Draining, drain, ..backends[0].clone() });
    let members: Vec<_> =
        backends.iter().map(|one| Member { id: &one.id, weight: one.membership_on_ring().weight }).collect();
    let ring = Arc::new(Ring::build(table.ring().parameters(), &members));
    let after = table.what_if(ring, backends.clone());
    assert!((0..50).all(|key| matches!(owner(&after, key), Some(1 | 2))));
}

#[test]
fn only_the_holder_of_an_exclusive_pool_keeps_a_connection_that_was_made_by_an_earlier_table() {
    let states = [(0, Healthy), (0, Unhealthy), (0, State::Standby), (0, Starting)];
    let takes = |rules: Rules| {
        let table = tiers(&states, rules);
        ["b0", "b1", "b2", "b3"].map(|id| table.still_takes(id, 0))
    };
    assert_eq!(takes(Rules { is_exclusive: true, ..USUAL }), [true, false, false, false]);
    assert_eq!(takes(USUAL), [true; 4]);
}

#[test]
fn backends_that_all_take_a_part_share_by_their_parts() {
    let all = tiers(&[(0, Healthy), (0, Healthy), (0, Healthy)], USUAL);
    let with = |parts: [f64; 3]| {
        let mut backends = all.backends().clone();
        for (n, part) in parts.into_iter().enumerate() {
            backends.set(n, Backend { admission: Admission::part(part), ..backends[n].clone() });
        }
        all.what_if(Arc::clone(all.ring()), backends)
    };
    let first = |table: &Table, key: u32| ids(table, &key.to_le_bytes())[0].clone();
    let (equal, unequal) = (with([0.5; 3]), with([0.25, 0.5, 0.5]));
    for key in 0..2000 {
        assert_eq!(first(&equal, key), first(&all, key), "equal parts change nothing");
        assert!(first(&unequal, key) == first(&all, key) || first(&all, key) == "b0");
    }
    let part = |table: &Table| (0..2000).filter(|&key| first(table, key) == "b0").count() as f64 / 2000.0;
    // A quarter of its keys leaves: those whose hash is above its part, and below that of the others.
    assert!((part(&unequal) / part(&all) - 0.75).abs() < 0.05, "{} of {}", part(&unequal), part(&all));
}
