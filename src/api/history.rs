//! `GET /api/history`: what pools and backends did in the last minutes and in the last day, from memory.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State as Extract};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};

use super::State;
use super::error::Error;
use crate::backend::{self, Backend};
use crate::events::unix_seconds;
use crate::table::Table;

/// Time between two samples.
const STEP: Duration = Duration::from_secs(1);

/// Samples of the last minutes.
const FINE: usize = 300;

/// Samples of the last day, each the average of this number of fine ones.
const COARSE: usize = 288;
const FINE_PER_COARSE: usize = 300;

/// Most backends with a history. Each takes up to 12 KB. Those that come first in the config have one.
const MOST_BACKENDS: usize = 1000;

/// One sample.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Sample {
    /// New connections per second.
    connections: f32,
    /// Open connections.
    active: f32,
    /// Failed connects per second.
    failed: f32,
    /// Bytes per second from clients.
    from_client: f32,
    /// Bytes per second to clients.
    to_client: f32,
}

/// Counters at a moment.
#[derive(Debug, Clone, Copy, Default)]
struct Counters {
    total: u64,
    active: u64,
    failed: u64,
    from_client: u64,
    to_client: u64,
}

/// The samples of a pool or a backend, the oldest first.
#[derive(Debug, Default)]
struct Series {
    fine: VecDeque<Sample>,
    coarse: VecDeque<Sample>,
    /// Fine samples since the last coarse one.
    since: usize,
}

#[derive(Debug, Default)]
struct OfPool {
    all: Series,
    /// The counters of each backend at the last sample.
    counters: HashMap<Arc<str>, Counters>,
    backends: HashMap<Arc<str>, Series>,
}

/// The history of all pools.
#[derive(Debug, Default)]
pub struct History(Mutex<Recorded>);

#[derive(Debug, Default)]
struct Recorded {
    pools: HashMap<Arc<str>, OfPool>,
    /// When the last sample was taken.
    last: Option<(Instant, f64)>,
}

/// What the call asks for.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Parameters {
    pool: String,
    backend: Option<String>,
    /// 1 or 300 seconds.
    step: Option<u64>,
}

/// The answer: one value for each sample in each list, the oldest first. Later versions can add fields but never rename one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/api.md explains each field")]
pub struct Samples {
    pub step_seconds: u64,
    pub until: f64,
    pub connections: Vec<f32>,
    pub active: Vec<f32>,
    pub failed: Vec<f32>,
    pub from_client: Vec<f32>,
    pub to_client: Vec<f32>,
}

/// Samples the pools of the app until it ends.
pub async fn record(state: Arc<State>) {
    let Some(history) = state.history.clone() else { return };
    let mut ticks = tokio::time::interval(STEP);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let view = state.view();
        let pools = view.pools.iter().map(|pool| (Arc::clone(&pool.pool), pool.table.load()));
        history.sample(pools, Instant::now());
    }
}

pub(super) async fn get(
    Extract(state): Extract<Arc<State>>,
    parameters: Result<Query<Parameters>, QueryRejection>,
) -> Result<Json<Samples>, Error> {
    let bad = |message: String| Error::new(StatusCode::BAD_REQUEST, "bad_query", message);
    let Query(parameters) = parameters.map_err(|rejection| {
        bad(format!("{}: give pool, and if you like backend and step (1 or 300)", rejection.body_text()))
    })?;
    let is_coarse = match parameters.step {
        None | Some(1) => false,
        Some(300) => true,
        Some(step) => return Err(bad(format!("step: {step} is neither 1 nor 300"))),
    };
    let history = state.history.as_ref().ok_or_else(|| {
        Error::new(StatusCode::NOT_FOUND, "no_history", "Ringway keeps no history: api.history is false")
    })?;
    history.samples(&parameters.pool, parameters.backend.as_deref(), is_coarse).map(Json).ok_or_else(|| {
        let what = parameters.backend.map_or(String::new(), |backend| format!(" or no backend {backend:?}"));
        let message = format!("there is no pool {:?}{what}, or it has no history yet", parameters.pool);
        Error::new(StatusCode::NOT_FOUND, "no_history", message)
    })
}

impl History {
    fn sample(&self, pools: impl Iterator<Item = (Arc<str>, Arc<Table>)>, now: Instant) {
        let mut recorded = self.lock();
        // A busy thread samples late.
        let passed = recorded.last.map_or(STEP, |(last, _)| now.saturating_duration_since(last)).as_secs_f32();
        let mut left = MOST_BACKENDS;
        let mut before = std::mem::take(&mut recorded.pools);
        for (name, table) in pools {
            let mut of_pool = before.remove(&name).unwrap_or_default();
            let (mut counters, mut backends) = (HashMap::new(), HashMap::new());
            let mut sum = Sample::default();
            for backend in table.backends() {
                let (id, now) = (&backend.id, Counters::of(backend));
                // A backend's first sample has no rate: it may have counted before, as a member of the same id.
                let sample = of_pool.counters.get(id).map_or_else(Sample::default, |before| now.since(before, passed));
                sum.add(Sample { active: now.active as f32, ..sample });
                counters.insert(Arc::clone(id), now);
                if left > 0 {
                    left -= 1;
                    let mut series = of_pool.backends.remove(id).unwrap_or_default();
                    series.push(Sample { active: now.active as f32, ..sample });
                    backends.insert(Arc::clone(id), series);
                }
            }
            of_pool.all.push(sum);
            (of_pool.counters, of_pool.backends) = (counters, backends);
            recorded.pools.insert(name, of_pool);
        }
        recorded.last = Some((now, unix_seconds()));
    }

    fn samples(&self, pool: &str, backend: Option<&str>, is_coarse: bool) -> Option<Samples> {
        let recorded = self.lock();
        let of_pool = recorded.pools.get(pool)?;
        let series = backend.map_or(Some(&of_pool.all), |backend| of_pool.backends.get(backend))?;
        Some(series.samples(is_coarse, recorded.last?.1))
    }

    fn lock(&self) -> MutexGuard<'_, Recorded> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counters {
    fn of(backend: &Backend) -> Self {
        let (live, none) = (&backend.live, backend::Counters::default());
        let counters = backend.counters().unwrap_or(&none);
        Self {
            total: counters.total.load(Ordering::Relaxed),
            active: live.active.load(Ordering::Relaxed),
            failed: counters.failures.total(),
            from_client: counters.from_client.total(),
            to_client: counters.to_client.total(),
        }
    }

    /// The rates since the counters were `before`.
    fn since(self, before: &Self, seconds: f32) -> Sample {
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f32 / seconds.max(0.001);
        Sample {
            connections: rate(self.total, before.total),
            active: 0.0,
            failed: rate(self.failed, before.failed),
            from_client: rate(self.from_client, before.from_client),
            to_client: rate(self.to_client, before.to_client),
        }
    }
}

impl Sample {
    fn add(&mut self, other: Self) {
        self.connections += other.connections;
        self.active += other.active;
        self.failed += other.failed;
        self.from_client += other.from_client;
        self.to_client += other.to_client;
    }
}

impl Series {
    fn push(&mut self, sample: Sample) {
        push(&mut self.fine, sample, FINE);
        self.since += 1;
        if self.since == FINE_PER_COARSE {
            self.since = 0;
            push(&mut self.coarse, average(&self.fine), COARSE);
        }
    }

    fn samples(&self, is_coarse: bool, until: f64) -> Samples {
        let list = if is_coarse { &self.coarse } else { &self.fine };
        // One event in five minutes is 0.003 each second.
        let values = |of: fn(&Sample) -> f32| list.iter().map(|sample| (of(sample) * 1e4).round() / 1e4).collect();
        Samples {
            step_seconds: if is_coarse { (FINE_PER_COARSE as u64) * STEP.as_secs() } else { STEP.as_secs() },
            until,
            connections: values(|sample| sample.connections),
            active: values(|sample| sample.active),
            failed: values(|sample| sample.failed),
            from_client: values(|sample| sample.from_client),
            to_client: values(|sample| sample.to_client),
        }
    }
}

fn push(list: &mut VecDeque<Sample>, sample: Sample, most: usize) {
    if list.len() == most {
        list.pop_front();
    }
    list.push_back(sample);
}

fn average(samples: &VecDeque<Sample>) -> Sample {
    let count = samples.len().max(1) as f32;
    let mean = |of: fn(&Sample) -> f32| samples.iter().map(of).sum::<f32>() / count;
    Sample {
        connections: mean(|sample| sample.connections),
        active: mean(|sample| sample.active),
        failed: mean(|sample| sample.failed),
        from_client: mean(|sample| sample.from_client),
        to_client: mean(|sample| sample.to_client),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Membership;

    fn sample(n: f32) -> Sample {
        Sample { connections: n, active: 3.0, ..Sample::default() }
    }

    #[test]
    fn a_series_has_a_bounded_number_of_samples_and_averages() {
        let mut series = Series::default();
        for n in 0..FINE_PER_COARSE * (COARSE + 2) {
            series.push(sample(if n % FINE_PER_COARSE == 0 { 3.0 } else { 0.0 }));
        }
        let fine = series.samples(false, 1.0);
        assert_eq!((fine.connections.len(), fine.step_seconds, fine.until), (FINE, 1, 1.0));
        let coarse = series.samples(true, 1.0);
        assert_eq!((coarse.connections.len(), coarse.step_seconds), (COARSE, 300));
        assert!(coarse.connections.iter().all(|&rate| rate == 0.01), "a rare event is not rounded away");
        assert!(coarse.active.iter().all(|&active| active == 3.0));
    }

    #[test]
    fn rates_use_the_time_that_has_passed_and_no_backend_hides_others() {
        use crate::backend::State as BackendState;
        use crate::control::Event;
        use crate::control::publisher::{Publisher, Settings};

        let joined = |ids: &[&str]| {
            let known = ids.iter().map(|&id| Event::Joined { id: id.into(), membership: Membership::weighing(1) });
            Publisher::new("p".into(), Settings::plain(), known, Instant::now()).table().load()
        };
        let (history, begin) = (History::default(), Instant::now());
        let at = |seconds: u64| begin + Duration::from_secs(seconds);
        let two = joined(&["a", "b"]);
        let total = |n: usize, count: u64| two.backends()[n].live.counters.total.store(count, Ordering::Relaxed);
        total(0, 1_000_000);
        total(1, 10);
        history.sample([("p".into(), Arc::clone(&two))].into_iter(), at(0));
        total(0, 1_000_020);
        total(1, 30);
        history.sample([("p".into(), Arc::clone(&two))].into_iter(), at(2));
        let connections = |backend: Option<&str>| history.samples("p", backend, false).unwrap().connections;
        assert_eq!((connections(None), connections(Some("b"))), (vec![0.0, 20.0], vec![0.0, 10.0]));
        assert_eq!(two.backends()[0].state, BackendState::Starting);
        let one = joined(&["c"]);
        history.sample([("p".into(), one)].into_iter(), at(3));
        assert_eq!(connections(None), [0.0, 20.0, 0.0]);
        assert!(history.samples("p", Some("a"), false).is_none());
    }
}
