//! Prepares, starts, updates and retires the pools of the app.
//!
//! The fallible steps run first and change nothing. The steps after them cannot fail.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::changes::OfPool;
use super::settings::{checking, containers, processes, publishing, route, scope};
use super::{Environment, StartError};
use crate::api::ProviderView;
use crate::backend::Failing;
use crate::config::{self, Config, Provider, StaticBackend};
use crate::control::docker::engine::Engine;
use crate::control::docker::watch::EngineStatus;
use crate::control::provider::{self, Listed, discover};
use crate::control::publisher::Publisher;
use crate::control::supervisor::process::{self, Handed, Ports};
use crate::control::supervisor::{self, Handover, Resting, docker};
use crate::control::{Event, ejection, health};
use crate::metrics::{self, Exporter};
use crate::proxy::Route;

/// Capacity of the queue of reports about failing backends. A full queue drops the report, and the backend's next
/// failures produce another one.
const REPORTS: usize = 64;

/// What every pool needs for its preparation.
pub(super) struct PoolContext<'a> {
    pub(super) config: &'a Config,
    pub(super) engine: Option<&'a Engine>,
    pub(super) environment: &'a Environment,
    pub(super) exporter: &'a Exporter,
    /// Cancelled when all replicas must stop.
    pub(super) stop_replicas: &'a CancellationToken,
    /// True if there is no old Ringway process, or once it has exited.
    pub(super) settled: watch::Receiver<bool>,
}

/// The tasks of all pools.
pub(super) struct Tasks {
    /// Cancelled when all replicas must stop.
    pub(super) stop_replicas: CancellationToken,
    /// Tasks that must finish their work before the process exits.
    pub(super) supervisors: JoinSet<()>,
    /// Tasks that have nothing to finish and can be dropped at any time.
    pub(super) others: JoinSet<()>,
}

/// A pool that is ready to start. All fallible steps are done.
pub(super) struct Prepared {
    pool: Pool,
    publisher: Publisher,
    reports: mpsc::Receiver<Failing>,
    starter: Starter,
}

/// The task that adds backends to the pool once it runs.
enum Starter {
    /// No task: the config lists the backends.
    Fixed,
    Processes(watch::Receiver<process::Settings>, Ports, Vec<Handed>, Resting),
    Containers(watch::Receiver<docker::Settings>, Engine, Arc<EngineStatus>, Resting),
    Discovered(discover::Settings, Engine, Arc<EngineStatus>),
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
    ejection: watch::Sender<Option<ejection::Settings>>,
    reports: mpsc::Sender<Failing>,
    source: Source,
    /// Cancelled when the supervisor of the pool must stop.
    stop: CancellationToken,
    /// Cancelled when all tasks of the pool must stop.
    over: CancellationToken,
}

/// The source of the pool's backends, with the channels to its supervisor.
#[derive(Debug)]
enum Source {
    /// The resolved address of each backend, by id.
    Static(BTreeMap<Arc<str>, SocketAddr>),
    Processes(watch::Sender<process::Settings>, mpsc::Sender<Handover>),
    Containers(watch::Sender<docker::Settings>, mpsc::Sender<Handover>),
    Discovered,
}

/// New settings for a running pool. All fallible steps are done.
pub(super) struct Update {
    config: config::Pool,
    changes: OfPool,
    /// The resolved addresses of the backends of a static pool, by id.
    found: BTreeMap<Arc<str>, SocketAddr>,
}

/// Prepares a pool for its start. Key paths in errors start with `key_path`.
pub(super) async fn prepare(
    key_path: &str,
    pool: &config::Pool,
    changes: &OfPool,
    taken_over: Vec<Handed>,
    context: &PoolContext<'_>,
) -> Result<Prepared, StartError> {
    let name: Arc<str> = pool.name.as_str().into();
    let mut known = Vec::new();
    let (source, starter, kind, engine_status) = match &pool.provider {
        Provider::Static(backends) => {
            let found = resolve(key_path, backends).await?;
            for backend in backends {
                let id: Arc<str> = backend.id.as_str().into();
                known.push(Event::Joined { id: Arc::clone(&id), weight: backend.weight });
                known.extend(found.get(&id).map(|&address| Event::Started { id, address, replica: None }));
            }
            (Source::Static(found), Starter::Fixed, "static", None)
        }
        Provider::Process(process) => {
            let key_path = format!("{key_path}.provider.process");
            check_program(&key_path, process)?;
            let ports = Ports::reserve(&name, process.ports, process.replicas as usize, &taken_over)
                .map_err(|error| StartError::NoPorts { key_path: format!("{key_path}.ports"), error })?;
            let (sender, settings) = watch::channel(processes(pool, process, changes, context.environment));
            let (handover, handovers) = mpsc::channel(1);
            let resting = Resting { settled: context.settled.clone(), handovers };
            let starter = Starter::Processes(settings, ports, taken_over, resting);
            (Source::Processes(sender, handover), starter, "process", None)
        }
        Provider::Containers(of_pool) => {
            let (engine, engine_status) = watched(context.engine)?;
            let (sender, settings) = watch::channel(containers(pool, of_pool, changes, context.config));
            let (handover, handovers) = mpsc::channel(1);
            let resting = Resting { settled: context.settled.clone(), handovers };
            let starter = Starter::Containers(settings, engine, Arc::clone(&engine_status), resting);
            (Source::Containers(sender, handover), starter, "docker", Some(engine_status))
        }
        Provider::Discover(discover) => {
            let (engine, engine_status) = watched(context.engine)?;
            let settings = discover::Settings {
                pool: Arc::clone(&name),
                label: discover.label.clone(),
                port: discover.port,
                scope: scope(context.config, discover.network.as_ref()),
                resync: context.config.docker.resync,
            };
            let starter = Starter::Discovered(settings, engine, Arc::clone(&engine_status));
            (Source::Discovered, starter, "docker", Some(engine_status))
        }
    };
    if let Some(replicas) = pool.provider.replicas() {
        let weight = |id: &Arc<str>| changes.weights.get(&**id).copied().unwrap_or(1);
        known.extend(provider::slots(&name, replicas).into_iter().map(|id| Event::Joined { weight: weight(&id), id }));
    }
    known.extend(changes.drained.iter().map(|id| Event::Drained { id: id.as_str().into(), within: None }));
    let publisher = Publisher::new(Arc::clone(&name), publishing(pool), known, Instant::now());
    let (reports, reported) = mpsc::channel(REPORTS);
    let connect_seconds = context.exporter.histogram(&metrics::CONNECT_SECONDS, &[&name]);
    let base = Route {
        pool: name,
        key: pool.key,
        table: publisher.table(),
        most_per_backend: u64::MAX,
        connect_timeout: Duration::ZERO,
        connect_attempts: 1,
        idle: Duration::ZERO,
        half_closed: Duration::ZERO,
        max_age: None,
        drain: Duration::ZERO,
        connect_seconds,
        failing: None,
        stats: Arc::default(),
    };
    let (events, queue) = Publisher::queue();
    let pool = Pool {
        route: route(&base, pool, &reports),
        provider: ProviderView { kind, engine_status },
        config: pool.clone(),
        events,
        queue: Some(queue),
        health: watch::Sender::new(checking(pool)),
        ejection: watch::Sender::new(pool.ejection.map(|ejection| ejection.settings)),
        reports,
        source,
        stop: context.stop_replicas.child_token(),
        over: CancellationToken::new(),
    };
    Ok(Prepared { pool, publisher, reports: reported, starter })
}

impl Prepared {
    /// Starts the tasks of the pool.
    pub(super) fn start(mut self, tasks: &mut Tasks) -> Pool {
        let (table, events) = (self.pool.route.table.clone(), &self.pool.events);
        let mut spawn = |task: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>| {
            let over = self.pool.over.clone();
            tasks.others.spawn(async move {
                let _ = over.run_until_cancelled(task).await;
            });
        };
        if let Some(queue) = self.pool.queue.take() {
            spawn(Box::pin(self.publisher.run(queue)));
        }
        spawn(Box::pin(health::check_all(table.clone(), self.pool.health.subscribe(), events.clone())));
        let settings = self.pool.ejection.subscribe();
        spawn(Box::pin(ejection::eject(table.clone(), settings, self.reports, events.clone())));
        let (stop, events) = (self.pool.stop.clone(), events.clone());
        match self.starter {
            Starter::Fixed => {}
            Starter::Processes(settings, ports, taken_over, resting) => {
                let supervise = process::supervise(settings, ports, taken_over, resting, table, events, stop);
                tasks.supervisors.spawn(supervise);
            }
            Starter::Containers(settings, engine, engine_status, resting) => {
                let supervise = docker::supervise(settings, engine, table, events, engine_status, resting, stop);
                tasks.supervisors.spawn(supervise);
            }
            Starter::Discovered(settings, engine, engine_status) => {
                spawn(Box::pin(discover::follow(settings, engine, events, engine_status)));
            }
        }
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
        match (&self.config.provider, &new.provider) {
            (Provider::Discover(old), Provider::Discover(new)) => old == new,
            (old, new) => std::mem::discriminant(old) == std::mem::discriminant(new),
        }
    }

    /// Runs the fallible steps of an update. Changes nothing.
    pub(super) async fn prepare_update(
        &self,
        key_path: &str,
        new: &config::Pool,
        changes: OfPool,
    ) -> Result<Update, StartError> {
        let mut found = BTreeMap::new();
        match (&self.config.provider, &new.provider) {
            (_, Provider::Static(backends)) => found = resolve(key_path, backends).await?,
            (Provider::Process(old), Provider::Process(new)) if old.command != new.command || old.env != new.env => {
                check_program(&format!("{key_path}.provider.process"), new)?;
            }
            _ => {}
        }
        Ok(Update { config: new.clone(), changes, found })
    }

    /// Applies an update. Cannot fail.
    pub(super) async fn update(&mut self, update: Update, config: &Config, environment: &Environment) {
        let Update { config: new, changes, found } = update;
        self.route = route(&self.route, &new, &self.reports);
        let mut events = vec![Event::Configured(publishing(&new))];
        match (&mut self.source, &new.provider) {
            (Source::Static(known), Provider::Static(backends)) => {
                events.extend(changed_backends(known, &found, backends, new.drain));
                *known = found;
            }
            (Source::Processes(settings, _), Provider::Process(process)) => {
                change(settings, processes(&new, process, &changes, environment));
            }
            (Source::Containers(settings, _), Provider::Containers(of_pool)) => {
                change(settings, containers(&new, of_pool, &changes, config));
            }
            // `can_become` rules out a change of the kind of provider.
            _ => {}
        }
        for event in events {
            self.tell(event).await;
        }
        change(&self.health, checking(&new));
        change(&self.ejection, new.ejection.map(|ejection| ejection.settings));
        self.config = new;
    }

    /// Sends an event to the publisher.
    pub(super) async fn tell(&self, event: Event) {
        // The publisher lives as long as the pool, so the send cannot fail.
        let _ = self.events.send(event).await;
    }

    /// Pauses the supervisor and returns its replicas for a handover. If the decision is true, the supervisor leaves
    /// the replicas to the successor; otherwise it resumes.
    pub(super) async fn hand_over(&self, decision: oneshot::Receiver<bool>) -> io::Result<Vec<Handed>> {
        let (Source::Processes(_, handovers) | Source::Containers(_, handovers)) = &self.source else {
            return Ok(Vec::new());
        };
        let (sender, handed) = oneshot::channel();
        // A supervisor that has ended has no replicas.
        let _ = handovers.send(Handover { handed: sender, decision }).await;
        handed.await.unwrap_or_else(|_| Ok(Vec::new()))
    }

    /// Returns the token that stops the supervisor. The supervisor then leaves its containers untouched.
    pub(super) fn stop(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Whether the pool manages containers and would compete for them with another pool of the same name.
    pub(super) fn has_containers(&self) -> bool {
        matches!(self.source, Source::Containers(..))
    }

    /// Drains every backend, stops the replicas, and then ends the tasks of the pool.
    pub(super) fn retire(self, tasks: &mut Tasks) {
        tasks.others.spawn(async move {
            let drain = self.config.drain;
            match &self.source {
                Source::Processes(settings, _) => settings.send_modify(|settings| settings.slots.replicas = 0),
                Source::Containers(settings, _) => settings.send_modify(|settings| settings.slots.replicas = 0),
                Source::Static(_) | Source::Discovered => {}
            }
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

/// Sends settings if they differ from the current ones.
fn change<T: PartialEq>(settings: &watch::Sender<T>, new: T) {
    settings.send_if_modified(|old| {
        let differs = *old != new;
        if differs {
            *old = new;
        }
        differs
    });
}

/// Returns the events that bring the publisher from the old to the new backends of a static pool.
fn changed_backends(
    known: &BTreeMap<Arc<str>, SocketAddr>,
    found: &BTreeMap<Arc<str>, SocketAddr>,
    backends: &[StaticBackend],
    drain: Duration,
) -> Vec<Event> {
    let stays: HashSet<&str> = backends.iter().map(|backend| backend.id.as_str()).collect();
    let gone = known.keys().filter(|id| !stays.contains(&***id));
    let mut events: Vec<_> = gone.map(|id| Event::Leaving { id: Arc::clone(id), within: drain }).collect();
    for backend in backends {
        let id: Arc<str> = backend.id.as_str().into();
        events.push(Event::Joined { id: Arc::clone(&id), weight: backend.weight });
        let address = found.get(&id).copied();
        if let Some(address) = address.filter(|address| known.get(&id) != Some(address)) {
            events.push(Event::Started { id, address, replica: None });
        }
    }
    events
}

async fn resolve(key_path: &str, backends: &[StaticBackend]) -> Result<BTreeMap<Arc<str>, SocketAddr>, StartError> {
    let mut found = BTreeMap::new();
    for (n, backend) in backends.iter().enumerate() {
        let address = provider::resolve(&backend.host, backend.port).await.map_err(|error| StartError::Resolve {
            key_path: format!("{key_path}.provider.static[{n}].address"),
            host: backend.host.clone(),
            error,
        })?;
        found.insert(backend.id.as_str().into(), address);
    }
    Ok(found)
}

fn check_program(key_path: &str, process: &config::Process) -> Result<(), StartError> {
    let program = process.command.first().map_or("", String::as_str);
    // With a placeholder in the program or another PATH, only the start can show whether the program exists.
    let is_known = !program.contains('{') && !process.env.iter().any(|(name, _)| name == "PATH");
    if is_known && !supervisor::process::is_runnable(program) {
        return Err(StartError::NoProgram { key_path: format!("{key_path}.command"), program: program.to_owned() });
    }
    Ok(())
}

fn watched(engine: Option<&Engine>) -> Result<(Engine, Arc<EngineStatus>), StartError> {
    let Some(engine) = engine else { return Err(StartError::Docker("the Docker engine is not set up".to_owned())) };
    Ok((engine.clone(), Arc::new(EngineStatus::new(engine, Instant::now()))))
}

/// Converts a backend that a command adds into the form of the config.
pub(super) fn listed(backend: Listed) -> StaticBackend {
    StaticBackend { id: backend.id.to_string(), host: backend.host, port: backend.port, weight: backend.weight }
}
