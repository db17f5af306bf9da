//! The interface of providers, and what several kinds of them share.

use std::fmt::Debug;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::app::changes::OfPool;
use crate::app::context::PoolContext;
use crate::app::tasks::Tasks;
use crate::app::{Environment, StartError};
use crate::backend::Membership;
use crate::config::{self, Config};
use crate::control::docker::engine::Engine;
use crate::control::docker::scope::ScopeSettings;
use crate::control::docker::watch::EngineStatus;
pub(super) use crate::control::provider::ProviderStatus;
use crate::control::provider::names::Addresses;
use crate::control::supervisor::SlotSettings;
use crate::control::supervisor::handover::{Handover, Signals};
use crate::control::supervisor::plan::{Order, Pace};
use crate::control::supervisor::rollout::{PendingOrder, RolloutStatus};
use crate::control::supervisor::scaling::ScalingStatus;
use crate::control::{self, Event};
use crate::table::TableCell;

/// A boxed future, for methods of a trait object.
pub(super) type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// The provider of a running pool.
pub(in crate::app) trait Source: Debug + Send + Sync {
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

    /// The line to the supervisor; `None` without one.
    fn supervisor(&self) -> Option<&Line> {
        None
    }

    /// Whether Ringway manages containers for the pool. Two pools of the same name would compete for them.
    fn has_containers(&self) -> bool {
        false
    }
}

/// An update whose fallible steps are done.
pub(in crate::app) struct Update<'a> {
    pub(in crate::app) pool: &'a config::Pool,
    pub(in crate::app) changes: &'a OfPool,
    pub(in crate::app) config: &'a Config,
    pub(in crate::app) environment: &'a Environment,
    /// What [`Source::prepare_update`] found.
    pub(in crate::app) addresses: Addresses,
}

/// A provider whose fallible steps are done.
pub(in crate::app) struct Prepared {
    pub(in crate::app) source: Box<dyn Source>,
    /// What the publisher knows from the start.
    pub(in crate::app) known: Vec<Event>,
    /// The state of what the provider depends on.
    pub(in crate::app) status: ProviderStatus,
    /// Starts the tasks of the provider.
    pub(in crate::app) start: Box<dyn FnOnce(Start<'_>) + Send>,
}

/// What the tasks of a provider start with.
pub(in crate::app) struct Start<'a> {
    pub(in crate::app) table: TableCell,
    pub(in crate::app) events: mpsc::Sender<Event>,
    /// Cancelled when the supervisor must stop.
    pub(in crate::app) stop: CancellationToken,
    /// Cancelled when all tasks of the pool must stop.
    pub(in crate::app) over: CancellationToken,
    pub(in crate::app) tasks: &'a Tasks,
}

/// Sends settings if they differ from the current ones.
pub(in crate::app) fn change<T: PartialEq>(settings: &watch::Sender<T>, new: T) {
    settings.send_if_modified(|old| {
        let differs = *old != new;
        if differs {
            *old = new;
        }
        differs
    });
}

/// The events that announce the slots of a supervised pool.
pub(super) fn slots_joined(pool: &config::Pool, changes: &OfPool) -> Vec<Event> {
    let weight = |id: &Arc<str>| changes.weights.get(&**id).copied().unwrap_or(1);
    let min = pool.provider.scaled().map(|scaled| scaled.scaling.min);
    let slots = control::provider::slots(&pool.name, min.or(pool.provider.replicas()).unwrap_or_default());
    slots.into_iter().map(|id| Event::Joined { membership: Membership::weighing(weight(&id)), id }).collect()
}

/// The settings that all supervisors share.
pub(super) fn slot_settings(
    pool: &config::Pool,
    (replicas, scaled): (u32, Option<config::Scaled>),
    restart: config::Restart,
    rollout: config::Rollout,
    changes: &OfPool,
) -> SlotSettings {
    let config::Rollout { order, parallel, pause, healthy_for, on_failure, drain } = rollout;
    // Never may two replicas of an exclusive pool have connections at once.
    let order = if pool.is_exclusive { Order::StopFirst } else { order };
    let drain = drain.unwrap_or(pool.drain);
    SlotSettings {
        pace: Pace { order, parallel, pause, healthy_for, on_failure, drain },
        pool: pool.name.as_str().into(),
        replicas,
        scaling: scaled.map(|scaled| scaled.scaling),
        weights: changes.weights.iter().map(|(id, &weight)| (id.as_str().into(), weight)).collect(),
        drain: pool.drain,
        policy: restart.policy,
    }
}

/// The line to a supervisor, beside its settings.
#[derive(Debug)]
pub(in crate::app) struct Line {
    /// Takes requests to hand replicas over.
    pub(in crate::app) handovers: mpsc::Sender<Handover>,
    /// Takes orders about the rollout.
    pub(in crate::app) orders: mpsc::Sender<PendingOrder>,
    /// Shows the rollouts.
    pub(in crate::app) rollout: Arc<RolloutStatus>,
    /// Shows how the pool scales by itself, and has the connections that wait.
    pub(in crate::app) scaling: Arc<ScalingStatus>,
}

/// The line to a supervisor, and its end of it.
pub(super) fn line(pool: &str, context: &PoolContext<'_>) -> (Line, Signals) {
    let ((handover, handovers), (order, orders)) = (mpsc::channel(1), mpsc::channel(1));
    let rollout = Arc::new(RolloutStatus::new(Instant::now()));
    let scaling = Arc::new(ScalingStatus::default());
    let line =
        Line { handovers: handover, orders: order, rollout: Arc::clone(&rollout), scaling: Arc::clone(&scaling) };
    let refused = context.refused.get(pool).cloned();
    (line, Signals { settled: context.settled.clone(), handovers, orders, refused, rollout, scaling })
}

/// The Docker engine, and a new record of its state.
pub(super) fn watched(engine: Option<&Engine>) -> Result<(Engine, Arc<EngineStatus>), StartError> {
    let Some(engine) = engine else { return Err(StartError::Docker("the Docker engine is not set up".to_owned())) };
    Ok((engine.clone(), Arc::new(EngineStatus::new(engine, Instant::now()))))
}

/// The owner and the network of a pool's containers.
pub(super) fn scope(config: &Config, network: Option<&String>) -> ScopeSettings {
    ScopeSettings { owner: config.docker.owner.clone(), network: network.cloned() }
}
