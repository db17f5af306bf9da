//! What each part of a pool is told: the config's words in the parts' own.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::Environment;
use super::changes::OfPool;
use crate::backend::Failing;
use crate::config::{self, Config, Provider};
use crate::control::docker::place::Wanted;
use crate::control::supervisor::plan::Policy;
use crate::control::supervisor::{docker, process};
use crate::control::{health, publisher};
use crate::proxy::{Reports, Route};

/// How long a container that somebody else has started may fail its checks and still count as starting.
const DISCOVERED_GRACE: Duration = Duration::from_secs(10);

/// How connections are balanced over the pool; what belongs to the pool for good is that of `base`.
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

/// How the pool's table is made.
pub(super) fn publishing(pool: &config::Pool) -> publisher::Settings {
    publisher::Settings {
        parameters: pool.ring,
        is_checked: pool.health_check.is_some(),
        panic_below: pool.panic_threshold,
        on_down: pool.on_down,
        slow_start: pool.slow_start,
    }
}

/// How its backends are checked, if they are.
pub(super) fn checking(pool: &config::Pool) -> Option<health::Settings> {
    let check = pool.health_check.as_ref()?;
    // Replicas have just been started; for how long others have been there nobody knows.
    let grace = match &pool.provider {
        Provider::Static(_) => Duration::ZERO,
        Provider::Process(process) => process.restart.start_grace,
        Provider::Containers(containers) => containers.restart.start_grace,
        Provider::Discover(_) => DISCOVERED_GRACE,
    };
    Some(health::Settings {
        probe: check.probe.clone(),
        interval: check.interval,
        fast_interval: check.fast_interval,
        jitter: check.jitter,
        timeout: check.timeout,
        rise: check.rise,
        fall: check.fall,
        grace,
    })
}

pub(super) fn wanted(config: &Config, network: Option<&String>) -> Wanted {
    Wanted { owner: config.docker.owner.clone(), network: network.cloned() }
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

fn weights(changes: &OfPool) -> BTreeMap<Arc<str>, u32> {
    changes.weights.iter().map(|(id, &weight)| (id.as_str().into(), weight)).collect()
}

pub(super) fn processes(
    pool: &config::Pool,
    process: &config::Process,
    changes: &OfPool,
    environment: &Environment,
) -> process::Settings {
    process::Settings {
        pool: pool.name.as_str().into(),
        replicas: process.replicas,
        weights: weights(changes),
        spec: Arc::new(process::Spec { command: process.command.clone(), env: process.env.clone() }),
        drain: pool.drain,
        policy: policy(process.restart),
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
        pool: pool.name.as_str().into(),
        replicas: containers.replicas,
        weights: weights(changes),
        spec: containers.spec.clone(),
        drain: pool.drain,
        wanted: wanted(config, containers.network.as_ref()),
        policy: policy(containers.restart),
        stop_grace: containers.stop_grace,
        resync: config.docker.resync,
    }
}
