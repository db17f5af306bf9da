//! `GET /metrics`: copies all counters of the data plane and the control plane into the exporter and renders them, away
//! from the threads that others wait for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::extract::State as Extract;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use bytes::Bytes;
use tokio::sync::Mutex;
use tokio::task::JoinError;

use super::error::Error;
use super::{ListenerView, State};
use crate::backend::{Backend, ConnectFailure, Moved, State as BackendState};
use crate::control::docker::watch::EngineStatus;
use crate::labels::{Label, Tally};
use crate::limits;
use crate::lossy_writer::LostLines;
use crate::metrics::{self, Exporter, Metric};
use crate::proxy::Route;
use crate::table::Table;

/// The last rendered metrics, which scrapes at about the same time share.
#[derive(Debug, Default)]
pub(super) struct Shared(Arc<Mutex<Option<Rendered>>>);

#[derive(Debug, Clone)]
struct Rendered {
    text: Bytes,
    fresh_until: Instant,
}

/// A text that took at least this long is shared. Quicker ones are always new.
const COSTLY: Duration = Duration::from_millis(5);

/// A costly text is shared for this many times the time that it took, so that scrapers take a tenth of one processor,
/// whatever their number.
const SHARED_FOR: u32 = 9;

/// Longest time for which a text is shared.
const LONGEST: Duration = Duration::from_secs(1);

impl Shared {
    /// The last text if it is fresh; else a new one. Only one is rendered at a time, on a thread for blocking work.
    async fn text(&self, render: impl FnOnce() -> String + Send + 'static) -> Result<Bytes, JoinError> {
        let mut last = Arc::clone(&self.0).lock_owned().await;
        if let Some(last) = last.as_ref().filter(|last| Instant::now() < last.fresh_until) {
            return Ok(last.text.clone());
        }
        let rendered = tokio::task::spawn_blocking(move || {
            let began = Instant::now();
            let text = Bytes::from(render());
            let took = began.elapsed();
            let fresh_for = if took < COSTLY { Duration::ZERO } else { (took * SHARED_FOR).min(LONGEST) };
            // The lock ends here, even if the scraper has gone: no second text is rendered at the same time.
            *last = Some(Rendered { text: text.clone(), fresh_until: Instant::now() + fresh_for });
            text
        });
        rendered.await
    }
}

pub(super) async fn metrics(Extract(state): Extract<Arc<State>>) -> Result<impl IntoResponse, Error> {
    let rendered = Arc::clone(&state);
    let text = state.scrape.text(move || text(&rendered)).await.map_err(|_panicked| {
        Error::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "cannot render the metrics; see the log")
    })?;
    Ok(([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text))
}

fn text(state: &State) -> String {
    let (exporter, view) = (&state.exporter, state.view());
    for listener in &view.listeners {
        of_listener(exporter, listener);
    }
    for pool in &view.pools {
        of_pool(exporter, pool, &pool.table.load());
    }
    for (pool, differs) in std::iter::zip(&view.pools, &view.differs) {
        exporter.set(&metrics::CHANGED, &[&pool.pool], differs.len() as u64);
    }
    for (pool, provider) in std::iter::zip(&view.pools, &view.providers) {
        if let Some(engine_status) = &provider.engine_status {
            of_engine(exporter, &pool.pool, engine_status);
        }
    }
    for (index, stats) in state.workers.iter().enumerate() {
        let worker = [index.to_string()];
        let worker = [worker[0].as_str()];
        exporter.set(&metrics::WORKER_CONNECTIONS, &worker, load(&stats.connections));
        exporter.set(&metrics::TASKS, &worker, load(&stats.tasks));
        exporter.set(&metrics::PIPES, &worker, load(&stats.pipes));
        exporter.set(&metrics::PIPE_SHORTAGES, &worker, load(&stats.pipe_shortages));
    }
    for (name, runtime) in &state.runtimes {
        exporter.set(&metrics::TASKS, &[name], runtime.metrics().num_alive_tasks() as u64);
    }
    let lost = view.access_log_lost.as_ref().map_or(0, LostLines::count);
    exporter.set(&metrics::ACCESS_LOG_LOST, &[], lost);
    exporter.set(&metrics::LOG_LOST, &[], view.log_lost.as_ref().map_or(0, LostLines::count));
    exporter.set(&metrics::OPEN_FILES, &[], limits::open_files_now());
    exporter.set(&metrics::OPEN_FILES_LIMIT, &[], limits::open_files());
    exporter.set(&metrics::MAX_CONNECTIONS, &[], state.limit.size() as u64);
    tally(exporter, &metrics::RELOADS, &[], &state.reloads);
    tally(exporter, &metrics::UPGRADES, &[], &state.upgrades);
    tally(exporter, &metrics::API_REJECTED, &[], state.guard.rejections());
    exporter.set(&metrics::READY, &[], state.ready.load(Ordering::Relaxed).into());
    exporter.set_fraction(&metrics::UPTIME, &[], state.started.elapsed().as_secs_f64());
    exporter.set(&metrics::BUILD_INFO, &[crate::VERSION], 1);
    exporter.render()
}

fn of_listener(exporter: &Exporter, listener: &ListenerView) {
    let (name, stats) = (&*listener.name, &listener.stats);
    let untracked = listener.sources.as_ref().map_or(0, |sources| sources.untracked());
    exporter.set(&metrics::SOURCES_UNTRACKED, &[name], untracked);
    exporter.set(&metrics::ACCEPTED, &[name], load(&stats.accepted));
    exporter.set(&metrics::ACTIVE, &[name], load(&stats.active));
    tally(exporter, &metrics::ENDED, &[name], &stats.ended);
    tally(exporter, &metrics::REFUSED, &[name], &stats.refused);
    tally(exporter, &metrics::ACCEPT_ERRORS, &[name], &stats.accept_errors);
}

fn of_pool(exporter: &Exporter, route: &Route, table: &Table) {
    let pool = &*route.pool;
    exporter.set(&metrics::PANIC, &[pool], table.is_panic().into());
    exporter.set(&metrics::PANIC_PICKS, &[pool], load(&route.stats.picked_in_panic));
    exporter.set(&metrics::WALKED_PAST_FULL, &[pool], load(&route.stats.walked_past_full));
    exporter.set(&metrics::RING_POINTS, &[pool], table.ring().points() as u64);
    // A gauge is a double with 53 bits of precision, which holds the upper 52 bits of the digest exactly.
    exporter.set(&metrics::RING_DIGEST, &[pool], table.ring().digest() >> 12);
    exporter.set(&metrics::TABLE_GENERATION, &[pool], table.generation());
    exporter.set(&metrics::POOL_HEALTHY, &[pool], table.healthy() as u64);
    for backend in table.backends() {
        of_backend(exporter, pool, backend);
    }
}

fn of_engine(exporter: &Exporter, pool: &str, engine_status: &EngineStatus) {
    exporter.set(&metrics::ENGINE_UP, &[pool], engine_status.is_fresh().into());
    exporter.set_fraction(&metrics::ENGINE_STALE, &[pool], engine_status.age().as_secs_f64());
    exporter.set(&metrics::ENGINE_FAILURES, &[pool], engine_status.failures());
}

fn of_backend(exporter: &Exporter, pool: &str, backend: &Backend) {
    let labels = [pool, &*backend.id];
    let live = &backend.live;
    let is = |state| u64::from(backend.state == state);
    exporter.set(&metrics::BACKEND_UP, &labels, is(BackendState::Healthy));
    exporter.set(&metrics::BACKEND_DRAINING, &labels, is(BackendState::Draining));
    exporter.set(&metrics::BACKEND_EJECTED, &labels, is(BackendState::Ejected));
    exporter.set(&metrics::EJECTIONS, &labels, load(&live.ejections));
    exporter.set_fraction(&metrics::ADMISSION, &labels, backend.admission.as_part());
    exporter.set(&metrics::CRASH_LOOP, &labels, is(BackendState::CrashLoop));
    exporter.set(&metrics::REPLICA_RESTARTS, &labels, backend.restarts);
    exporter.set(&metrics::OUTPUT_LOST, &labels, load(&live.output_lost));
    exporter.set(&metrics::BACKEND_CONNECTIONS, &labels, load(&live.active));
    exporter.set(&metrics::BACKEND_CONNECTIONS_TOTAL, &labels, load(&live.total));
    exporter.set(&metrics::CONNECT_ATTEMPTS, &labels, load(&live.attempts));
    tally::<ConnectFailure>(exporter, &metrics::CONNECT_FAILURES, &labels, &live.failures);
    for (result, count) in [("ok", &live.checks_passed), ("failed", &live.checks_failed)] {
        exporter.set(&metrics::HEALTH_CHECKS, &[labels[0], labels[1], result], load(count));
    }
    for (direction, moved) in [("from_client", &live.from_client), ("to_client", &live.to_client)] {
        let Moved { copied, spliced } = moved;
        for (path, bytes) in [("copied", copied), ("spliced", spliced)] {
            exporter.set(&metrics::BYTES, &[labels[0], labels[1], direction, path], load(bytes));
        }
    }
}

fn tally<L: Label>(exporter: &Exporter, metric: &Metric, labels: &[&str], tally: &Tally<L>) {
    for &label in L::ALL {
        let mut values = labels.to_vec();
        values.push(label.as_str());
        exporter.set(metric, &values, tally.of(label));
    }
}

fn load(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[tokio::test]
    async fn scrapes_at_the_same_time_share_one_text() {
        static RENDERED: AtomicUsize = AtomicUsize::new(0);
        let shared = Arc::new(Shared::default());
        let mut scrapers = tokio::task::JoinSet::new();
        for _ in 0..16 {
            let shared = Arc::clone(&shared);
            scrapers.spawn(async move {
                shared
                    .text(|| {
                        // As with thousands of backends.
                        std::thread::sleep(Duration::from_millis(200));
                        RENDERED.fetch_add(1, Ordering::Relaxed).to_string()
                    })
                    .await
                    .unwrap()
            });
        }
        let texts = scrapers.join_all().await;
        assert!(texts.iter().all(|text| text == "0"), "{texts:?}");
        let again = |last: &Option<Rendered>| last.as_ref().is_some_and(|last| Instant::now() >= last.fresh_until);
        while !again(&*shared.0.lock().await) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(shared.text(|| "new".to_owned()).await.unwrap(), "new");
    }
}
