//! Prints the shares and the moved keys of the ring, and times its build and its lookup, the pick of a backend, and a change
//! of the table.
//!
//! `cargo bench --bench ring`

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use divan::Bencher;
use divan::counter::ItemsCount;
use ringway::address::Address;
use ringway::backend::{Backend, Membership, State};
use ringway::ring::{Member, Parameters, Ring};
use ringway::table::{Bound, Members, Rules, Table};

/// Points per member, and probes.
const SHAPES: [(u32, u32); 4] = [(160, 1), (160, 3), (512, 3), (1000, 1)];

fn main() {
    println!("max/average share of the circle and of 1,000,000 keys; keys that move when 1 % (at least one) fail");
    println!(
        "{:>8} {:>7} {:>7} {:>10} {:>10} {:>24}",
        "members", "points", "probes", "of circle", "of keys", "failed -> moved"
    );
    for members in [3, 10, 100, 1000] {
        for (virtual_nodes, probes) in SHAPES {
            let quality = quality(members, virtual_nodes, probes);
            println!("{members:>8} {virtual_nodes:>7} {probes:>7} {quality}");
        }
    }
    println!();
    divan::main();
}

fn ids(count: usize) -> Vec<String> {
    (1..=count).map(|n| format!("echo-{n}")).collect()
}

fn ring(ids: &[String], virtual_nodes: u32, probes: u32) -> Ring {
    let members: Vec<_> = ids.iter().map(|id| Member { id, weight: 1 }).collect();
    Ring::build(Parameters { virtual_nodes, probes, seed: 0 }, &members)
}

fn key(n: u64) -> [u8; 6] {
    let mut key = [0; 6];
    key.copy_from_slice(&n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()[..6]);
    key
}

fn quality(members: usize, virtual_nodes: u32, probes: u32) -> String {
    const KEYS: u64 = 1_000_000;
    let ring = ring(&ids(members), virtual_nodes, probes);
    let mut owned = vec![0_u64; members];
    let failed = (members / 100).max(1);
    let (mut lost, mut moved) = (0_u64, 0_u64);
    for n in 0..KEYS {
        let key = key(n);
        let owner = ring.lookup(&key).expect("the ring has members");
        owned[owner] += 1;
        lost += u64::from(owner < failed);
        let serving = ring.walk(&key).find(|&member| member >= failed).expect("most members live");
        moved += u64::from(serving != owner);
    }
    let most = owned.iter().max().copied().unwrap_or(0) as f64 / (KEYS as f64 / members as f64);
    let share = ring.shares().iter().fold(0.0_f64, |most, &share| most.max(share)) * members as f64;
    let percent = |keys: u64| keys as f64 * 100.0 / KEYS as f64;
    format!("{share:>10.3} {most:>10.3} {:>12.3} % -> {:>6.3} %", percent(lost), percent(moved))
}

#[divan::bench(args = [10, 100, 1000], sample_count = 20)]
fn build_160_points(bencher: Bencher<'_, '_>, members: usize) {
    let ids = ids(members);
    bencher.bench(|| ring(&ids, 160, 3));
}

/// Lookups in a timed iteration. The time of one lookup is a thousandth of the printed time.
const LOOKUPS: usize = 1000;

#[divan::bench(args = [(100, 160, 1), (100, 160, 3), (1000, 160, 1), (1000, 160, 3), (1000, 512, 3)])]
fn lookup(bencher: Bencher<'_, '_>, (members, virtual_nodes, probes): (usize, u32, u32)) {
    let ring = ring(&ids(members), virtual_nodes, probes);
    let keys: Vec<_> = (0..100_000).map(key).collect();
    let mut next = keys.iter().cycle();
    bencher.counter(ItemsCount::new(LOOKUPS)).bench_local(|| {
        for key in next.by_ref().take(LOOKUPS) {
            black_box(ring.lookup(black_box(key)));
        }
    });
}

/// A table in which `down` of a thousand backends fail their checks.
fn table(members: usize, down: usize) -> Table {
    let ids = ids(members);
    let mut sorted = ids.clone();
    sorted.sort();
    let backends = sorted.iter().enumerate().map(|(n, id)| Backend {
        address: Some(Address::Ip(([127, 0, 0, 1], 1).into())),
        // Spread evenly: 7919 is prime.
        state: if n * 7919 % 1000 < down { State::Unhealthy } else { State::Healthy },
        incarnation: 1,
        ..Backend::new(id.as_str().into(), Membership::weighing(1), Instant::now())
    });
    Table::new(
        1,
        Arc::new(ring(&sorted, 160, 3)),
        Members::new(backends, 1),
        Rules { panic_below: 0, spill_below: 50, is_exclusive: false },
    )
}

/// The first candidate of a key, as a connection takes it.
#[divan::bench(args = [(3, 0), (10, 0), (64, 0), (1000, 0), (1000, 500), (10_000, 0), (10_000, 500), (10_000, 990)])]
fn pick(bencher: Bencher<'_, '_>, (members, down): (usize, usize)) {
    let table = table(members, down);
    let keys: Vec<_> = (0..100_000).map(key).collect();
    let mut next = keys.iter().cycle();
    bencher.counter(ItemsCount::new(LOOKUPS)).bench_local(|| {
        for key in next.by_ref().take(LOOKUPS) {
            black_box(table.candidates(black_box(key)).next());
        }
    });
}

/// The same with a bound: adds up the connections, and compares those of the owner with its limit.
#[divan::bench(args = [3, 10, 64, 1000])]
fn pick_with_a_bound(bencher: Bencher<'_, '_>, members: usize) {
    let (table, bound) = (table(members, 0), Bound::new(125));
    let keys: Vec<_> = (0..100_000).map(key).collect();
    let mut next = keys.iter().cycle();
    bencher.counter(ItemsCount::new(LOOKUPS)).bench_local(|| {
        for key in next.by_ref().take(LOOKUPS) {
            let load = bound.at_pick(&table);
            let first = table.candidates(black_box(key)).next();
            black_box(first.map(|(backend, _)| table.limit(backend, load)));
        }
    });
}

/// The backend with the fewest connections.
#[divan::bench(args = [3, 10, 64, 1000])]
fn least_connections(bencher: Bencher<'_, '_>, members: usize) {
    let table = table(members, 0);
    bencher.counter(ItemsCount::new(LOOKUPS)).bench_local(|| {
        for _ in 0..LOOKUPS {
            black_box(table.least_loaded(|_| true));
        }
    });
}

/// One more publication after the change of one backend.
#[divan::bench(args = [100, 10_000])]
fn change_one_backend(bencher: Bencher<'_, '_>, members: usize) {
    let first = table(members, 0);
    let mut backends = first.backends().clone();
    bencher.bench_local(|| {
        let changed = Backend { restarts: backends[7].restarts + 1, ..backends[7].clone() };
        backends.set(7, changed);
        black_box(first.what_if(Arc::clone(first.ring()), backends.clone()))
    });
}
