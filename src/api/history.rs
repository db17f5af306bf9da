//! `GET /api/history`: what pools and backends did in the last minutes and in the last day, from memory.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State as Extract};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};

use super::State;
use super::error::Error;
use crate::backend::Backend;
use crate::table::Table;

/// Time between two samples.
pub(super) const STEP: Duration = Duration::from_secs(1);

/// Samples of the last minutes.
const FINE: usize = 300;

/// Samples of the last day, each the average of this number of fine ones.
const COARSE: usize = 288;
const FINE_PER_COARSE: usize = 300;

/// Most backends with a history. Each takes up to 12 KB.
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
    last: Option<Counters>,
    fine: VecDeque<Sample>,
    coarse: VecDeque<Sample>,
    /// Fine samples since the last coarse one.
    since: usize,
}

#[derive(Debug, Default)]
struct OfPool {
    all: Series,
    backends: BTreeMap<Arc<str>, Series>,
}

/// The history of all pools.
#[derive(Debug, Default)]
pub struct History(Mutex<BTreeMap<Arc<str>, OfPool>>);

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
        history.sample(pools);
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
    fn sample(&self, pools: impl Iterator<Item = (Arc<str>, Arc<Table>)>) {
        let mut all = self.lock();
        let (mut known, mut left) = (Vec::new(), MOST_BACKENDS);
        for (name, table) in pools {
            let of_pool = all.entry(Arc::clone(&name)).or_default();
            let mut sum = Counters::default();
            for backend in table.backends() {
                let counters = Counters::of(backend);
                sum.add(counters);
                if left > 0 {
                    left -= 1;
                    of_pool.backends.entry(Arc::clone(&backend.id)).or_default().push(counters);
                }
            }
            of_pool.all.push(sum);
            of_pool.backends.retain(|id, _| table.backends().find(id).is_some());
            known.push(name);
        }
        all.retain(|name, _| known.contains(name));
    }

    fn samples(&self, pool: &str, backend: Option<&str>, is_coarse: bool) -> Option<Samples> {
        let all = self.lock();
        let of_pool = all.get(pool)?;
        let series = backend.map_or(Some(&of_pool.all), |backend| of_pool.backends.get(backend))?;
        Some(series.samples(is_coarse))
    }

    /// The last values of a backend, or of the whole pool: new connections per second.
    pub(super) fn last(&self, pool: &str, backend: Option<&str>) -> Option<f32> {
        let all = self.lock();
        let of_pool = all.get(pool)?;
        let series = backend.map_or(Some(&of_pool.all), |backend| of_pool.backends.get(backend))?;
        series.fine.back().map(|sample| sample.connections)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Arc<str>, OfPool>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counters {
    fn of(backend: &Backend) -> Self {
        let live = &backend.live;
        Self {
            total: live.total.load(Ordering::Relaxed),
            active: live.active.load(Ordering::Relaxed),
            failed: live.failures.total(),
            from_client: live.from_client.total(),
            to_client: live.to_client.total(),
        }
    }

    fn add(&mut self, other: Self) {
        self.total += other.total;
        self.active += other.active;
        self.failed += other.failed;
        self.from_client += other.from_client;
        self.to_client += other.to_client;
    }
}

impl Series {
    fn push(&mut self, now: Counters) {
        let before = self.last.replace(now);
        // A pool's counters fall when a backend leaves.
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f32 / STEP.as_secs_f32();
        let sample = before.map(|before| Sample {
            connections: rate(now.total, before.total),
            active: now.active as f32,
            failed: rate(now.failed, before.failed),
            from_client: rate(now.from_client, before.from_client),
            to_client: rate(now.to_client, before.to_client),
        });
        let Some(sample) = sample else { return };
        push(&mut self.fine, sample, FINE);
        self.since += 1;
        if self.since == FINE_PER_COARSE {
            self.since = 0;
            push(&mut self.coarse, average(&self.fine), COARSE);
        }
    }

    fn samples(&self, is_coarse: bool) -> Samples {
        let list = if is_coarse { &self.coarse } else { &self.fine };
        let values = |of: fn(&Sample) -> f32| list.iter().map(|sample| (of(sample) * 10.0).round() / 10.0).collect();
        Samples {
            step_seconds: if is_coarse { (FINE_PER_COARSE as u64) * STEP.as_secs() } else { STEP.as_secs() },
            until: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64()),
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

    #[test]
    fn a_series_has_rates_and_a_bounded_number_of_samples() {
        let mut series = Series::default();
        for n in 0..(FINE_PER_COARSE * (COARSE + 2)) as u64 {
            series.push(Counters { total: n * 7, active: 3, from_client: n * 100, ..Counters::default() });
        }
        let fine = series.samples(false);
        assert_eq!((fine.connections.len(), fine.step_seconds), (FINE, 1));
        assert!(fine.connections.iter().all(|&rate| rate == 7.0) && fine.active.iter().all(|&active| active == 3.0));
        let coarse = series.samples(true);
        assert_eq!((coarse.from_client.len(), coarse.step_seconds, coarse.from_client[0]), (COARSE, 300, 100.0));
        // A backend that left takes its counters along.
        series.push(Counters::default());
        assert_eq!(series.samples(false).connections.last(), Some(&0.0));
    }
}
