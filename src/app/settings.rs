//! Translates the config of a pool into the settings of each component of the pool.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::Environment;
use super::changes::OfPool;
use crate::backend::Failing;
use crate::config::{self, Config, Provider};
use crate::control::docker::scope::ScopeSettings;
use crate::control::supervisor::plan::Policy;
use crate::control::supervisor::{SlotSettings, docker, process};
use crate::control::{health, publisher};
use crate::proxy::{Reports, Route};

/// How long a discovered container may fail its health checks and still count as starting.
const DISCOVERED_GRACE: Duration = Duration::from_secs(10);

/// Builds the route of a pool. The table, the counters and the histogram carry over from `base`.
pub(super) fn route(base: &Route, pool: &config::Pool, reports: &mpsc::Sender<Failing>) -> Route {
    Route {
        pool: Arc::clone(&base.pool),
        key: pool.key,
        table: base.table.clone(),
        most_per_backend: pool.max_connections_per_backend.map_or(u64::MAX, Into::into),
        connect_timeout: pool.connect.timeout,
        connect_attempts: pool.connect.attempts.into(),
        idle: pool.timeouts.idle,
        half_closed: pool.timeouts.half_closed,
        max_age: pool.timeouts.max_connection_age,
        drain: pool.drain,
        connect_seconds: base.connect_seconds.clone(),
        failing: pool.ejection.map(|ejection| Reports { after: ejection.after, to: reports.clone() }),
        stats: Arc::clone(&base.stats),
    }
}

/// Returns the settings of the publisher, which builds the pool's routing table.
pub(super) fn publishing(pool: &config::Pool) -> publisher::Settings {
    publisher::Settings {
        parameters: pool.ring,
        is_checked: pool.health_check.is_some(),
        panic_below: pool.panic_threshold,
        on_down: pool.on_down,
        slow_start: pool.slow_start,
    }
}

/// Returns the health check settings, or `None` if the pool has no health check.
pub(super) fn checking(pool: &config::Pool) -> Option<health::Settings> {
    let check = pool.health_check.as_ref()?;
    // Ringway has just started its own replicas. It does not know how long other backends have been running.
    let grace = match &pool.provider {
        Provider::Static(_) => Duration::ZERO,
        Provider::Process(process) => process.restart.start_grace,
        Provider::Containers(containers) => containers.restart.start_grace,
        Provider::Discover(_) => DISCOVERED_GRACE,
    };
    Some(health::Settings {
        check: check.check.clone(),
        interval: check.interval,
        fast_interval: check.fast_interval,
        jitter: check.jitter,
        timeout: check.timeout,
        rise: check.rise,
        fall: check.fall,
        grace,
    })
}

pub(super) fn scope(config: &Config, network: Option<&String>) -> ScopeSettings {
    ScopeSettings { owner: config.docker.owner.clone(), network: network.cloned() }
}

fn policy(restart: config::Restart) -> Policy {
    Policy {
        backoff: restart.backoff,
        max_backoff: restart.max_backoff,
        stable_after: restart.stable_after,
        crash_loop_after: restart.crash_loop_after,
        replace_after: restart.replace_after,
    }
}

fn slots(pool: &config::Pool, replicas: u32, restart: config::Restart, changes: &OfPool) -> SlotSettings {
    SlotSettings {
        pool: pool.name.as_str().into(),
        replicas,
        weights: changes.weights.iter().map(|(id, &weight)| (id.as_str().into(), weight)).collect(),
        drain: pool.drain,
        policy: policy(restart),
    }
}

pub(super) fn processes(
    pool: &config::Pool,
    process: &config::Process,
    changes: &OfPool,
    environment: &Environment,
) -> process::Settings {
    process::Settings {
        slots: slots(pool, process.replicas, process.restart, changes),
        spec: Arc::new(process::Spec { command: process.command.clone(), env: process.env.clone() }),
        stop_grace: process.stop_grace,
        launcher: environment.executable.clone(),
        open_files: environment.replica_open_files,
    }
}

pub(super) fn containers(
    pool: &config::Pool,
    containers: &config::Containers,
    changes: &OfPool,
    config: &Config,
) -> docker::Settings {
    docker::Settings {
        slots: slots(pool, containers.replicas, containers.restart, changes),
        spec: containers.spec.clone(),
        scope: scope(config, containers.network.as_ref()),
        stop_grace: containers.stop_grace,
        resync: config.docker.resync,
    }
}
