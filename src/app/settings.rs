//! Translates the config into the settings of each part.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::Environment;
use super::capacity::Capacity;
use super::tasks::Tasks;
use crate::api;
use crate::backend::{Failing, Waiting};
use crate::config::{self, Config};
use crate::control::publisher;
use crate::metrics::{self, Exporter};
use crate::proxy::{self, Reports, Route, Wake};
use crate::table::{Bound, Rules, TableCell};

/// The route of a new pool. [`route`] adds the settings.
pub(super) fn base_route(pool: &config::Pool, table: TableCell, exporter: &Exporter) -> Route {
    Route::new(pool.name.as_str().into(), table, exporter.histogram(&metrics::CONNECT_SECONDS, &[&pool.name]))
}

/// Returns the settings of the data plane.
pub(super) fn proxy(config: &Config, workers: usize, capacity: &Capacity) -> proxy::Settings {
    proxy::Settings {
        workers,
        max_connections: capacity.connections,
        max_pipes: capacity.pipes,
        buffer: config.relay.buffer_kib * 1024,
        splice_from: config.relay.splice_from_kib * 1024,
    }
}

/// Returns the settings of the side port.
pub(super) fn side_port(
    config: &config::Api,
    environment: &Environment,
    guard: api::Guard,
    tasks: &Tasks,
) -> api::Settings {
    api::Settings {
        guard,
        runtimes: tasks.runtimes(),
        events: Arc::clone(&environment.events),
        has_history: config.history,
        has_page: config.page,
    }
}

/// Builds the route of a pool. What lasts as long as the pool carries over from `base`: the table, the counters and the
/// histogram.
pub(super) fn route(
    base: &Route,
    pool: &config::Pool,
    reports: &mpsc::Sender<Failing>,
    waiting: Option<&Arc<Waiting>>,
) -> Route {
    let wake = |scaled: config::Scaled| Wake {
        waiting: waiting.map(Arc::clone).unwrap_or_default(),
        timeout: scaled.wake_timeout,
        most: scaled.max_waiting as usize,
    };
    Route {
        pool: Arc::clone(&base.pool),
        key: pool.key,
        balance: pool.balance,
        bound: pool.bound.map(|percent| Arc::new(Bound::new(percent))),
        table: base.table.clone(),
        most_per_backend: pool.max_connections_per_backend.map_or(u64::MAX, Into::into),
        wake: pool.provider.scaled().map(wake),
        send_proxy: pool.send_proxy.clone().map(Arc::new),
        own_header: pool.own_header(),
        outgoing: pool.connect.outgoing.clone(),
        connect_timeout: pool.connect.timeout,
        connect_attempts: pool.connect.attempts.into(),
        idle: pool.timeouts.idle.unwrap_or(Duration::MAX),
        half_closed: pool.timeouts.half_closed,
        max_age: pool.timeouts.max_connection_age,
        on_move: pool.on_move,
        drain: pool.drain,
        connect_seconds: base.connect_seconds.clone(),
        failing: pool.ejection.map(|ejection| Reports { after: ejection.after, to: reports.clone() }),
        stats: Arc::clone(&base.stats),
    }
}

/// Returns the settings of the publisher, which builds the pool's table.
pub(super) fn publishing(pool: &config::Pool) -> publisher::Settings {
    publisher::Settings {
        parameters: pool.parameters(),
        is_checked: pool.health_check.is_some(),
        rules: Rules {
            panic_below: pool.panic_threshold,
            spill_below: pool.spill_below,
            is_exclusive: pool.is_exclusive,
        },
        on_down: pool.on_down,
        drain: pool.drain,
        slow_start: pool.slow_start,
    }
}
