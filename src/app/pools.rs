//! Prepares, starts, updates and retires the pools of the app.
//!
//! The fallible steps run first and change nothing. The steps after them cannot fail.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::changes::OfPool;
use super::context::PoolContext;
use super::inheritance::Named;
use super::provider::{self, Addresses, Names, Source, Start, change};
use super::settings::{base_route, publishing, route};
use super::tasks::{Tasks, until};
use super::{Environment, StartError};
use crate::api::ProviderView;
use crate::backend::Failing;
use crate::config::{self, Config, Provider};
use crate::control::publisher::Publisher;
use crate::control::supervisor::handover::Handed;
use crate::control::supervisor::rollout::{RolloutOrder, RolloutView};
use crate::control::{Event, agent, ejection, health};
use crate::outgoing::Refused;
use crate::proxy::Route;

/// Capacity of the queue of reports about failing backends. A full queue drops the report, and the backend's next
/// failures produce another one.
const REPORTS: usize = 64;

/// Longest wait until a supervisor has taken an order. The engine of its containers may not answer.
const ANSWER: Duration = Duration::from_secs(10);

/// A pool that is ready to start. All fallible steps are done.
pub(super) struct Prepared {
    pool: Pool,
    publisher: Publisher,
    reports: mpsc::Receiver<Failing>,
    start: Box<dyn FnOnce(Start<'_>) + Send>,
}

/// A pool that runs or is about to start.
#[derive(Debug)]
pub(super) struct Pool {
    /// The route that listeners and the side port use to reach the pool.
    pub(super) route: Route,
    /// The view of the provider for the side port.
    pub(super) provider: ProviderView,
    /// The current config of the pool, including run-time changes.
    config: config::Pool,
    events: mpsc::Sender<Event>,
    queue: Option<mpsc::Receiver<Event>>,
    health: watch::Sender<Option<health::Settings>>,
    agent: watch::Sender<Option<agent::Settings>>,
    ejection: watch::Sender<Option<ejection::Settings>>,
    reports: mpsc::Sender<Failing>,
    source: Box<dyn Source>,
    /// Cancelled when the supervisor of the pool must stop.
    stop: CancellationToken,
    /// Cancelled when all tasks of the pool must stop.
    over: CancellationToken,
}

/// New settings for a running pool. All fallible steps are done.
pub(super) struct Update {
    config: config::Pool,
    changes: OfPool,
    addresses: Addresses,
}

/// Prepares a pool for its start. Key paths in errors start with `key_path`.
pub(super) async fn prepare(
    key_path: &str,
    pool: &config::Pool,
    changes: &OfPool,
    taken_over: Vec<Handed>,
    context: &PoolContext<'_>,
) -> Result<Prepared, StartError> {
    probe_outgoing(key_path, pool)?;
    let provider::Prepared { source, mut known, status, start } =
        provider::prepare(key_path, pool, changes, taken_over, context).await?;
    known.extend(changes.drained.iter().map(|id| Event::DrainRequested { id: id.as_str().into(), within: None }));
    let publisher = Publisher::new(pool.name.as_str().into(), publishing(pool), known, Instant::now());
    let (reports, reported) = mpsc::channel(REPORTS);
    let base = base_route(pool, publisher.table(), context.exporter);
    let (events, queue) = Publisher::queue();
    let pool = Pool {
        route: route(&base, pool, &reports, source.supervisor().map(|line| &line.scaling.waiting)),
        provider: ProviderView {
            kind: pool.provider.kind(),
            status,
            rollout: source.supervisor().map(|line| Arc::clone(&line.rollout)),
            scaling: source.supervisor().map(|line| Arc::clone(&line.scaling)),
        },
        config: pool.clone(),
        events,
        queue: Some(queue),
        health: watch::Sender::new(pool.health_check.clone()),
        agent: watch::Sender::new(pool.agent.clone()),
        ejection: watch::Sender::new(pool.ejection.map(|ejection| ejection.settings)),
        reports,
        source,
        stop: context.stop_replicas.child_token(),
        over: CancellationToken::new(),
    };
    Ok(Prepared { pool, publisher, reports: reported, start })
}

/// Tries out the settings of the sockets with which Ringway would connect to the backends.
pub(super) fn probe_outgoing(key_path: &str, pool: &config::Pool) -> Result<(), StartError> {
    let probed = pool.connect.outgoing.as_ref().map_or(Ok(()), |outgoing| outgoing.probe());
    probed.map_err(|error| {
        let key = Refused::of(&error).map_or(String::new(), |refused| format!(".{}", refused.key));
        StartError::Unfit { key_path: format!("{key_path}.connect{key}"), problem: error.to_string() }
    })
}

/// The routes of all pools, by name.
pub(super) fn routes(pools: &[Pool]) -> HashMap<&str, &Route> {
    pools.iter().map(|pool| (pool.config.name.as_str(), &pool.route)).collect()
}

impl Prepared {
    /// Starts the tasks of the pool.
    pub(super) fn start(mut self, tasks: &Tasks) -> Pool {
        let (table, events) = (self.pool.route.table.clone(), &self.pool.events);
        let over = self.pool.over.clone();
        if let Some(queue) = self.pool.queue.take() {
            tasks.spawn(until(over.clone(), self.publisher.run(queue)));
        }
        let checks =
            health::check_all(table.clone(), self.pool.health.subscribe(), events.clone(), tasks.not_done.clone());
        tasks.spawn_check(until(over.clone(), checks));
        let asking = agent::ask_all(
            Arc::clone(&self.pool.route.pool),
            table.clone(),
            self.pool.agent.subscribe(),
            events.clone(),
        );
        tasks.spawn_check(until(over.clone(), asking));
        let settings = self.pool.ejection.subscribe();
        let ejection = ejection::eject(table.clone(), settings, self.reports, events.clone());
        tasks.spawn(until(over.clone(), ejection));
        let (events, stop) = (events.clone(), self.pool.stop.clone());
        (self.start)(Start { table, events, stop, over, tasks });
        self.pool
    }
}

impl Pool {
    /// Returns the current config of the pool, including run-time changes.
    pub(super) fn config(&self) -> &config::Pool {
        &self.config
    }

    /// Whether new settings are enough to turn this pool into `new`. Otherwise a new pool must replace it.
    pub(super) fn can_become(&self, new: &config::Pool) -> bool {
        // The one who looks for containers knows how many the ring has room for.
        let has_same_room =
            !matches!(new.provider, Provider::Discover(_)) || self.config.most_weight() == new.most_weight();
        has_same_room && provider::can_become(&self.config.provider, &new.provider)
    }

    /// Runs the fallible steps of an update. Changes nothing.
    pub(super) async fn prepare_update(
        &self,
        key_path: &str,
        new: &config::Pool,
        changes: OfPool,
    ) -> Result<Update, StartError> {
        // An address that has been there may have gone for a moment: only a change is tried.
        if self.config.connect.outgoing != new.connect.outgoing {
            probe_outgoing(key_path, new)?;
        }
        let addresses = self.source.prepare_update(key_path, &self.config, new).await?;
        Ok(Update { config: new.clone(), changes, addresses })
    }

    /// Applies an update. Cannot fail.
    pub(super) async fn update(&mut self, update: Update, config: &Config, environment: &Environment) {
        let Update { config: new, changes, addresses } = update;
        let waiting = self.source.supervisor().map(|line| &line.scaling.waiting);
        self.route = route(&self.route, &new, &self.reports, waiting);
        let mut events = vec![Event::Configured(publishing(&new))];
        let update = provider::Update { pool: &new, changes: &changes, config, environment, addresses };
        events.extend(self.source.update(&update));
        for event in events {
            self.tell(event).await;
        }
        change(&self.health, new.health_check.clone());
        change(&self.agent, new.agent.clone());
        change(&self.ejection, new.ejection.map(|ejection| ejection.settings));
        self.config = new;
    }

    /// Sends an event to the publisher.
    pub(super) async fn tell(&self, event: Event) {
        // The publisher lives as long as the pool, so the send cannot fail.
        let _ = self.events.send(event).await;
    }

    /// Waits until the table shows everything that the publisher was told before.
    pub(super) async fn settle(&self) {
        let shown = CancellationToken::new();
        self.tell(Event::Awaited(shown.clone())).await;
        tokio::select! {
            () = shown.cancelled() => {}
            // The publisher has ended.
            () = self.events.closed() => {}
        }
    }

    /// Pauses the supervisor and returns its replicas for a handover. If the decision is true, the supervisor leaves
    /// the replicas to the successor; otherwise it resumes.
    pub(super) async fn hand_over(&self, decision: oneshot::Receiver<bool>) -> io::Result<Vec<Handed>> {
        provider::hand_over(&*self.source, decision).await
    }

    /// Gives the supervisor an order about the rollout. Returns how far it is then; `None`: there is no supervisor, or it is busy.
    pub(super) async fn order(&self, order: RolloutOrder) -> Option<RolloutView> {
        let (obeyed, answer) = oneshot::channel();
        let line = self.source.supervisor()?;
        let answer = async {
            line.orders.send((order, obeyed)).await.ok()?;
            answer.await.ok()
        };
        tokio::time::timeout(ANSWER, answer).await.ok().flatten()
    }

    /// How far the rollout of the pool is; `None` without replicas.
    pub(super) fn rollout(&self) -> Option<RolloutView> {
        self.source.supervisor().map(|line| line.rollout.view())
    }

    /// The backends whose addresses came from a name server.
    pub(super) fn named(&self) -> Vec<Named> {
        let (table, names) = (self.route.table.load(), Names::of(&self.config.provider));
        let stays = table.backends().iter().filter(|backend| !backend.drain.is_some_and(|drain| drain.leaves));
        let named = stays.filter_map(|backend| {
            Some(Named {
                pool: self.config.name.clone(),
                id: Arc::clone(&backend.id),
                name: names.get(&backend.id)?,
                address: backend.address.as_ref()?.ip()?,
                membership: backend.membership,
            })
        });
        named.collect()
    }

    /// Returns the token that stops the supervisor. The supervisor then leaves its containers untouched.
    pub(super) fn stop(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Whether the pool manages containers and would compete for them with another pool of the same name.
    pub(super) fn has_containers(&self) -> bool {
        self.source.has_containers()
    }

    /// Drains every backend, stops the replicas, and then ends the tasks of the pool.
    pub(super) fn retire(self, tasks: &Tasks) {
        tasks.spawn(async move {
            let drain = self.config.drain;
            self.source.retire();
            let mut changes = self.route.table.watch();
            loop {
                let table = self.route.table.load();
                if table.backends().is_empty() {
                    break;
                }
                for backend in table.backends().iter().filter(|one| !one.drain.is_some_and(|drain| drain.leaves)) {
                    self.tell(Event::Leaving { id: Arc::clone(&backend.id), within: drain }).await;
                }
                drop(table);
                if changes.changed().await.is_err() {
                    break;
                }
            }
            tracing::info!(pool = %self.config.name, "pool removed");
            self.over.cancel();
        });
    }
}
