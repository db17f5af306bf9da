use super::*;

const SECOND: Duration = Duration::from_secs(1);

const MINUTE: Duration = Duration::from_secs(60);

fn scaling(min: u32, per_replica: Option<u32>) -> Scaling {
    let by_load = per_replica.map(|connections_per_replica| ByLoad { connections_per_replica, cool_down: 5 * MINUTE });
    Scaling { min, idle_stop: 15 * MINUTE, by_load }
}

/// A scaler with a clock of its own, which looks every second.
struct Simulation {
    scaling: Scaling,
    scaler: Scaler,
    most: u32,
    wanted: u32,
    now: Instant,
    /// How often the number rose and fell.
    changes: (u32, u32),
}

impl Simulation {
    fn new(scaling: Scaling, most: u32, wanted: u32) -> Self {
        Self { scaling, scaler: Scaler::default(), most, wanted, now: Instant::now(), changes: (0, 0) }
    }

    fn look(&mut self, open: u64) -> u32 {
        self.look_with(Load { open, ..Load::default() })
    }

    fn look_with(&mut self, load: Load) -> u32 {
        let wanted = self.scaler.wanted(&self.scaling, self.most, self.wanted, load, self.now);
        self.changes.0 += u32::from(wanted > self.wanted);
        self.changes.1 += u32::from(wanted < self.wanted);
        self.wanted = wanted;
        self.now += SECOND;
        wanted
    }

    /// The numbers for a constant load, after this time.
    fn after(&mut self, open: u64, time: Duration) -> u32 {
        (0..time.as_secs()).map(|_| self.look(open)).last().unwrap()
    }
}

#[test]
fn a_pool_sleeps_without_connections_and_the_first_one_wakes_it() {
    let mut pool = Simulation::new(scaling(0, None), 3, 0);
    assert_eq!(pool.after(0, MINUTE), 0);
    assert_eq!(pool.look_with(Load { waiting: 1, ..Load::default() }), 3);
    // The connection has ended: it stays awake for `idle_stop`.
    assert_eq!(pool.after(0, 15 * MINUTE), 3);
    assert_eq!(pool.look(0), 0);
    assert_eq!(pool.after(0, MINUTE), 0);
    // One connection begins the time again.
    pool.look_with(Load { waiting: 1, ..Load::default() });
    pool.after(0, 10 * MINUTE);
    pool.look(1);
    assert_eq!(pool.after(0, 14 * MINUTE), 3);
    assert_eq!(pool.after(0, 2 * MINUTE), 0);
}

#[test]
fn short_connections_between_the_looks_keep_a_pool_awake() {
    let mut pool = Simulation::new(scaling(0, Some(100)), 3, 1);
    for _ in 0..3600 {
        assert_eq!(pool.look_with(Load { any_began: true, ..Load::default() }), 1);
    }
    assert_eq!(pool.after(0, 14 * MINUTE), 1);
    assert_eq!(pool.after(0, 2 * MINUTE), 0);
}

#[test]
fn a_minimum_stays() {
    let mut pool = Simulation::new(scaling(2, None), 5, 2);
    assert_eq!(pool.look(0), 2);
    assert_eq!(pool.look(1), 5);
    assert_eq!(pool.after(0, 14 * MINUTE), 5);
    assert_eq!(pool.after(0, 2 * MINUTE), 2);
    let mut pool = Simulation::new(scaling(2, None), 5, 0);
    assert_eq!(pool.look(0), 2, "at the start, nothing runs");
    let mut pool = Simulation::new(scaling(2, Some(100)), 5, 2);
    assert_eq!((pool.look(0), pool.look(1), pool.look(201)), (2, 2, 3));
}

#[test]
fn the_number_rises_at_once_and_falls_after_the_cool_down() {
    let mut pool = Simulation::new(scaling(0, Some(100)), 10, 0);
    assert_eq!(pool.look_with(Load { waiting: 250, ..Load::default() }), 3);
    assert_eq!((pool.look(100), pool.look(901), pool.look(5000)), (3, 10, 10));
    assert_eq!(pool.after(150, 299 * SECOND), 10);
    assert_eq!(pool.look(150), 2);
    pool.look(1000);
    pool.most = 4;
    assert_eq!(pool.look(1000), 4);
    pool.most = 10;
    pool.after(150, 6 * MINUTE);
    // A short peak within the cool-down begins it again.
    pool.after(150, 10 * MINUTE);
    assert_eq!((pool.look(350), pool.after(90, 4 * MINUTE)), (4, 4));
    assert_eq!((pool.look(350), pool.after(90, 4 * MINUTE)), (4, 4));
    assert_eq!(pool.after(90, 2 * MINUTE), 1);
    // Without connections it stays awake, with one replica.
    assert_eq!(pool.after(0, 14 * MINUTE), 1);
    assert_eq!(pool.after(0, 2 * MINUTE), 0);
}

#[test]
fn a_successor_begins_with_the_replicas_that_it_has_taken_over() {
    let mut pool = Simulation::new(scaling(0, Some(100)), 10, 4);
    assert_eq!(pool.look(0), 4, "what was there before is needed until the cool-down is over");
    assert_eq!(pool.after(120, 6 * MINUTE), 2);
    let mut pool = Simulation::new(scaling(0, None), 3, 2);
    assert_eq!(pool.look(0), 2);
    let mut pool = Simulation::new(scaling(1, Some(100)), 3, 9);
    assert_eq!(pool.look(0), 3, "the maximum has become less");
}

/// An hour of connections that come by chance (a Poisson process) and last a minute on average.
fn poisson(per_second: f64, pool: &mut Simulation, random: &mut fastrand::Rng) {
    let exponential = |random: &mut fastrand::Rng, mean: f64| -mean * (1.0 - random.f64()).ln();
    let (mut ends, mut next) = (Vec::new(), 0.0);
    for second in 0..3600 {
        let now = f64::from(second);
        while next <= now {
            ends.push(next + exponential(random, 60.0));
            next += exponential(random, 1.0 / per_second);
        }
        ends.retain(|&end| end > now);
        pool.look(ends.len() as u64);
    }
}

#[test]
fn an_hour_of_random_load_does_not_make_the_number_flap() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    // 250 and 200 connections on average: in the middle between two numbers, and at the limit between them. Falls are at least a
    // cool-down apart, so 12 would be the most.
    for (per_second, most_on_average) in [(250.0 / 60.0, 1), (200.0 / 60.0, 5)] {
        let mut sum = 0;
        for _ in 0..20 {
            let mut pool = Simulation::new(scaling(0, Some(100)), 10, 0);
            poisson(per_second, &mut pool, &mut random);
            let (rises, falls) = pool.changes;
            // The first rises come while the load builds up.
            assert!(rises <= falls + 4, "{per_second}: {rises} rises, {falls} falls");
            sum += falls;
        }
        assert!(sum <= 20 * most_on_average, "{per_second}: {sum} falls in 20 hours");
    }
    // A connection every half an hour: each may wake the pool once.
    let mut pool = Simulation::new(scaling(0, Some(100)), 10, 0);
    for _ in 0..20 {
        poisson(1.0 / 1800.0, &mut pool, &mut random);
    }
    assert!(pool.changes.0 <= 60 && pool.changes.1 <= pool.changes.0, "{:?}", pool.changes);
}
