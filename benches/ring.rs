//! Prints the shares and the moved keys of the ring, and times its build and its lookup.
//!
//! `cargo bench --bench ring`

use std::hint::black_box;

use divan::Bencher;
use divan::counter::ItemsCount;
use ringway::ring::{Member, Parameters, Ring};

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
