//! Where the backends of a pool come from, one file for each kind of provider. The rest of the app does not know which
//! kind a pool has.
//!
//! To add a kind, add its settings in `config/provider.rs`, a file here with a [`Source`], and one line in [`prepare`].

mod discover;
mod docker;
mod fixed;
mod process;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

pub(super) use self::fixed::listed;
use super::changes::OfPool;
use super::pools::{PoolContext, Tasks};
use super::{Environment, StartError};
use crate::config::{self, Config, Provider};
use crate::control::docker::engine::Engine;
use crate::control::docker::scope::ScopeSettings;
use crate::control::docker::watch::EngineStatus;
use crate::control::supervisor::plan::Policy;
use crate::control::supervisor::process::Handed;
use crate::control::supervisor::{Handover, Resting, SlotSettings};
use crate::control::{self, Event};
use crate::table::TableCell;

/// A boxed future, for methods of a trait object.
type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// The resolved addresses of listed backends, by id.
pub(super) type Addresses = BTreeMap<Arc<str>, SocketAddr>;

/// The provider of a running pool.
pub(super) trait Source: Debug + Send + Sync {
    /// Runs the fallible steps of an update and returns the addresses that it needs. Changes nothing.
    fn prepare_update<'a>(
        &'a self,
        _key_path: &'a str,
        _old: &'a config::Pool,
        _new: &'a config::Pool,
    ) -> Boxed<'a, Result<Addresses, StartError>> {
        Box::pin(async { Ok(Addresses::new()) })
    }

    /// Applies an update. Returns what the publisher must hear of it.
    fn update(&mut self, update: &Update<'_>) -> Vec<Event>;

    /// Stops the replicas, each after its drain.
    fn retire(&self) {}

    /// Takes requests to hand replicas over; `None` without a supervisor.
    fn handovers(&self) -> Option<&mpsc::Sender<Handover>> {
        None
    }

    /// Whether Ringway manages containers for the pool. Two pools of the same name would compete for them.
    fn has_containers(&self) -> bool {
        false
    }
}

/// An update whose fallible steps are done.
pub(super) struct Update<'a> {
    pub(super) pool: &'a config::Pool,
    pub(super) changes: &'a OfPool,
    pub(super) config: &'a Config,
    pub(super) environment: &'a Environment,
    /// What [`Source::prepare_update`] found.
    pub(super) addresses: Addresses,
}

/// A provider whose fallible steps are done.
pub(super) struct Prepared {
    pub(super) source: Box<dyn Source>,
    /// What the publisher knows from the start.
    pub(super) known: Vec<Event>,
    /// The state of the Docker engine, for kinds that use one.
    pub(super) engine_status: Option<Arc<EngineStatus>>,
    /// Starts the tasks of the provider.
    pub(super) start: Box<dyn FnOnce(Start<'_>) + Send>,
}

/// What the tasks of a provider start with.
pub(super) struct Start<'a> {
    pub(super) table: TableCell,
    pub(super) events: mpsc::Sender<Event>,
    /// Cancelled when the supervisor must stop.
    pub(super) stop: CancellationToken,
    /// Cancelled when all tasks of the pool must stop.
    pub(super) over: CancellationToken,
    pub(super) tasks: &'a mut Tasks,
}

/// Prepares the provider of a pool. Key paths in errors start with `key_path`.
pub(super) async fn prepare(
    key_path: &str,
    pool: &config::Pool,
    changes: &OfPool,
    taken_over: Vec<Handed>,
    context: &PoolContext<'_>,
) -> Result<Prepared, StartError> {
    match &pool.provider {
        Provider::Static(backends) => fixed::prepare(key_path, backends).await,
        Provider::Process(process) => process::prepare(key_path, pool, process, changes, taken_over, context),
        Provider::Containers(containers) => docker::prepare(pool, containers, changes, context),
        Provider::Discover(settings) => discover::prepare(pool, settings, context),
    }
}

/// Whether a provider takes over the replicas of a predecessor.
pub(super) fn takes_over(provider: &Provider) -> bool {
    matches!(provider, Provider::Process(_))
}

/// Whether new settings are enough to turn a running provider into a new one. Otherwise a new pool must replace it.
pub(super) fn can_become(running: &Provider, new: &Provider) -> bool {
    match (running, new) {
        (Provider::Discover(running), Provider::Discover(new)) => running == new,
        (running, new) => running.is_same_kind(new),
    }
}

/// Pauses the supervisor and returns its replicas for a handover. If the decision is true, the supervisor leaves the
/// replicas to the successor; otherwise it resumes.
pub(super) async fn hand_over(source: &dyn Source, decision: oneshot::Receiver<bool>) -> io::Result<Vec<Handed>> {
    let Some(handovers) = source.handovers() else { return Ok(Vec::new()) };
    let (sender, handed) = oneshot::channel();
    // A supervisor that has ended has no replicas.
    let _ = handovers.send(Handover { handed: sender, decision }).await;
    handed.await.unwrap_or_else(|_| Ok(Vec::new()))
}

/// Sends settings if they differ from the current ones.
pub(super) fn change<T: PartialEq>(settings: &watch::Sender<T>, new: T) {
    settings.send_if_modified(|old| {
        let differs = *old != new;
        if differs {
            *old = new;
        }
        differs
    });
}

/// The events that announce the slots of a supervised pool.
fn slots_joined(pool: &config::Pool, replicas: u32, changes: &OfPool) -> Vec<Event> {
    let weight = |id: &Arc<str>| changes.weights.get(&**id).copied().unwrap_or(1);
    let slots = control::provider::slots(&pool.name, replicas);
    slots.into_iter().map(|id| Event::Joined { weight: weight(&id), id }).collect()
}

/// The settings that all supervisors share.
fn slot_settings(pool: &config::Pool, replicas: u32, restart: config::Restart, changes: &OfPool) -> SlotSettings {
    SlotSettings {
        pool: pool.name.as_str().into(),
        replicas,
        weights: changes.weights.iter().map(|(id, &weight)| (id.as_str().into(), weight)).collect(),
        drain: pool.drain,
        policy: Policy {
            backoff: restart.backoff,
            max_backoff: restart.max_backoff,
            stable_after: restart.stable_after,
            crash_loop_after: restart.crash_loop_after,
            replace_after: restart.replace_after,
        },
    }
}

/// The channel of handovers, and the supervisor's end of it.
fn resting(context: &PoolContext<'_>) -> (mpsc::Sender<Handover>, Resting) {
    let (handover, handovers) = mpsc::channel(1);
    (handover, Resting { settled: context.settled.clone(), handovers })
}

/// The Docker engine, and a new record of its state.
fn watched(engine: Option<&Engine>) -> Result<(Engine, Arc<EngineStatus>), StartError> {
    let Some(engine) = engine else { return Err(StartError::Docker("the Docker engine is not set up".to_owned())) };
    Ok((engine.clone(), Arc::new(EngineStatus::new(engine, Instant::now()))))
}

/// The owner and the network of a pool's containers.
fn scope(config: &Config, network: Option<&String>) -> ScopeSettings {
    ScopeSettings { owner: config.docker.owner.clone(), network: network.cloned() }
}
