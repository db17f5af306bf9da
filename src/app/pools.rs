//! The pools of the app: made ready, started, changed while they run, and retired.
//!
//! What can fail is done first and changes nothing; what follows cannot fail.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::changes::OfPool;
use super::settings::{checking, containers, processes, publishing, route, wanted};
use super::{Environment, StartError};
use crate::api::ProviderView;
use crate::backend::Failing;
use crate::config::{self, Config, Provider, StaticBackend};
use crate::control::docker::engine::Engine;
use crate::control::docker::watch::Freshness;
use crate::control::provider::{self, Listed, discover};
use crate::control::publisher::Publisher;
use crate::control::supervisor::process::{self, Handed, Ports};
use crate::control::supervisor::{self, Handover, Resting, docker};
use crate::control::{Event, ejection, health};
use crate::metrics::{self, Exporter};
use crate::proxy::Route;

/// Reports of failing backends that may wait; with more, the next is lost, and the one after its next failures comes.
const REPORTS: usize = 64;

/// What all pools are made with.
pub(super) struct Means<'a> {
    pub(super) config: &'a Config,
    pub(super) engine: Option<&'a Engine>,
    pub(super) environment: &'a Environment,
    pub(super) exporter: &'a Exporter,
    /// Cancelled when all replicas are to stop.
    pub(super) stop_replicas: &'a CancellationToken,
    /// Whether an older Ringway has no connections any more.
    pub(super) settled: watch::Receiver<bool>,
}

/// Where the tasks of pools run.
pub(super) struct Tasks {
    /// Cancelled when all replicas are to stop.
    pub(super) stop_replicas: CancellationToken,
    /// Those that have something to finish.
    pub(super) supervisors: JoinSet<()>,
    /// Those that run as long as what they are for, and have nothing to finish.
    pub(super) others: JoinSet<()>,
}

/// A pool that is ready to be started: everything that can fail has been done.
pub(super) struct Prepared {
    pool: Pool,
    publisher: Publisher,
    reports: mpsc::Receiver<Failing>,
    starter: Starter,
}

/// What fills the pool, once it runs.
enum Starter {
    /// Known before.
    Fixed,
    Processes(watch::Receiver<process::Settings>, Ports, Vec<Handed>, Resting),
    Containers(watch::Receiver<docker::Settings>, Engine, Arc<Freshness>, Resting),
    Discovered(discover::Settings, Engine, Arc<Freshness>),
}

/// A pool that runs, or is about to.
#[derive(Debug)]
pub(super) struct Pool {
    /// How listeners and side port get to it.
    pub(super) route: Route,
    /// How the side port shows where its backends come from.
    pub(super) provider: ProviderView,
    /// As it is now.
    config: config::Pool,
    events: mpsc::Sender<Event>,
    queue: Option<mpsc::Receiver<Event>>,
    health: watch::Sender<Option<health::Settings>>,
    ejection: watch::Sender<Option<ejection::Settings>>,
    reports: mpsc::Sender<Failing>,
    source: Source,
    /// Cancelled when its supervisor is to stop.
    stop: CancellationToken,
    /// Cancelled when nothing of it is needed any more.
    over: CancellationToken,
}

/// Where its backends come from.
#[derive(Debug)]
enum Source {
    /// By id, where each was found.
    Static(BTreeMap<Arc<str>, SocketAddr>),
    Processes(watch::Sender<process::Settings>, mpsc::Sender<Handover>),
    Containers(watch::Sender<docker::Settings>, mpsc::Sender<Handover>),
    Discovered,
}

/// Changed settings for a pool that runs; everything that can fail has been done.
pub(super) struct Update {
    config: config::Pool,
    changes: OfPool,
    /// Where the backends of a static pool were found.
    found: BTreeMap<Arc<str>, SocketAddr>,
}

/// Makes a pool ready to be started. Key paths in errors begin with `place`.
pub(super) async fn prepare(
    place: &str,
    pool: &config::Pool,
    changes: &OfPool,
    taken_over: Vec<Handed>,
    means: &Means<'_>,
) -> Result<Prepared, StartError> {
    let name: Arc<str> = pool.name.as_str().into();
    let mut known = Vec::new();
    let (source, starter, kind, freshness) = match &pool.provider {
        Provider::Static(backends) => {
            let found = resolve(place, backends).await?;
            for backend in backends {
                let id: Arc<str> = backend.id.as_str().into();
                known.push(Event::Joined { id: Arc::clone(&id), weight: backend.weight });
                known.extend(found.get(&id).map(|&address| Event::Started { id, address, replica: None }));
            }
            (Source::Static(found), Starter::Fixed, "static", None)
        }
        Provider::Process(process) => {
            let place = format!("{place}.provider.process");
            check_program(&place, process)?;
            let ports = Ports::reserve(&name, process.ports, process.replicas as usize, &taken_over)
                .map_err(|error| StartError::NoPorts { place: format!("{place}.ports"), error })?;
            let (sender, settings) = watch::channel(processes(pool, process, changes, means.environment));
            let (handover, handovers) = mpsc::channel(1);
            let resting = Resting { settled: means.settled.clone(), handovers };
            let starter = Starter::Processes(settings, ports, taken_over, resting);
            (Source::Processes(sender, handover), starter, "process", None)
        }
        Provider::Containers(of_pool) => {
            let (engine, freshness) = watched(means.engine)?;
            let (sender, settings) = watch::channel(containers(pool, of_pool, changes, means.config));
            let (handover, handovers) = mpsc::channel(1);
            let resting = Resting { settled: means.settled.clone(), handovers };
            let starter = Starter::Containers(settings, engine, Arc::clone(&freshness), resting);
            (Source::Containers(sender, handover), starter, "docker", Some(freshness))
        }
        Provider::Discover(discover) => {
            let (engine, freshness) = watched(means.engine)?;
            let settings = discover::Settings {
                pool: Arc::clone(&name),
                label: discover.label.clone(),
                port: discover.port,
                wanted: wanted(means.config, discover.network.as_ref()),
                resync: means.config.docker.resync,
            };
            let starter = Starter::Discovered(settings, engine, Arc::clone(&freshness));
            (Source::Discovered, starter, "docker", Some(freshness))
        }
    };
    if let Some(replicas) = pool.provider.replicas() {
        let weight = |id: &Arc<str>| changes.weights.get(&**id).copied().unwrap_or(1);
        known.extend(provider::slots(&name, replicas).into_iter().map(|id| Event::Joined { weight: weight(&id), id }));
    }
    known.extend(changes.drained.iter().map(|id| Event::Drained { id: id.as_str().into(), within: None }));
    let publisher = Publisher::new(Arc::clone(&name), publishing(pool), known, Instant::now());
    let (reports, reported) = mpsc::channel(REPORTS);
    let connect_seconds = means.exporter.histogram(&metrics::CONNECT_SECONDS, &[&name]);
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
        provider: ProviderView { kind, freshness },
        config: pool.clone(),
        events,
        queue: Some(queue),
        health: watch::Sender::new(checking(pool)),
        ejection: watch::Sender::new(pool.ejection.map(|ejection| ejection.settings)),
        reports,
        source,
        stop: means.stop_replicas.child_token(),
        over: CancellationToken::new(),
    };
    Ok(Prepared { pool, publisher, reports: reported, starter })
}

impl Prepared {
    /// Starts its tasks.
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
            Starter::Containers(settings, engine, freshness, resting) => {
                let supervise = docker::supervise(settings, engine, table, events, freshness, resting, stop);
                tasks.supervisors.spawn(supervise);
            }
            Starter::Discovered(settings, engine, freshness) => {
                spawn(Box::pin(discover::follow(settings, engine, events, freshness)));
            }
        }
        self.pool
    }
}

impl Pool {
    /// As it is now.
    pub(super) fn config(&self) -> &config::Pool {
        &self.config
    }

    /// Whether a change of settings is enough to make it what `new` says; otherwise it takes another pool.
    pub(super) fn can_become(&self, new: &config::Pool) -> bool {
        match (&self.config.provider, &new.provider) {
            (Provider::Discover(old), Provider::Discover(new)) => old == new,
            (old, new) => std::mem::discriminant(old) == std::mem::discriminant(new),
        }
    }

    /// Does what may fail of a change.
    pub(super) async fn prepare_update(
        &self,
        place: &str,
        new: &config::Pool,
        changes: OfPool,
    ) -> Result<Update, StartError> {
        let mut found = BTreeMap::new();
        match (&self.config.provider, &new.provider) {
            (_, Provider::Static(backends)) => found = resolve(place, backends).await?,
            (Provider::Process(old), Provider::Process(new)) if old.command != new.command || old.env != new.env => {
                check_program(&format!("{place}.provider.process"), new)?;
            }
            _ => {}
        }
        Ok(Update { config: new.clone(), changes, found })
    }

    /// Makes the change.
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
            // `can_become` has seen to that.
            _ => {}
        }
        for event in events {
            self.tell(event).await;
        }
        change(&self.health, checking(&new));
        change(&self.ejection, new.ejection.map(|ejection| ejection.settings));
        self.config = new;
    }

    /// Tells the publisher.
    pub(super) async fn tell(&self, event: Event) {
        // It lives as long as the pool.
        let _ = self.events.send(event).await;
    }

    /// Has its supervisor rest, and leave what it has to another process, if that is the decision.
    pub(super) async fn hand_over(&self, decision: oneshot::Receiver<bool>) -> io::Result<Vec<Handed>> {
        let (Source::Processes(_, handovers) | Source::Containers(_, handovers)) = &self.source else {
            return Ok(Vec::new());
        };
        let (sender, handed) = oneshot::channel();
        // One that has ended has nothing.
        let _ = handovers.send(Handover { handed: sender, decision }).await;
        handed.await.unwrap_or_else(|_| Ok(Vec::new()))
    }

    /// What ends its supervisor without another look at its containers.
    pub(super) fn stop(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Whether it would contend for containers with another one of its name.
    pub(super) fn has_containers(&self) -> bool {
        matches!(self.source, Source::Containers(..))
    }

    /// Lets its backends go: each drains, and then what fills its slot is stopped.
    pub(super) fn retire(self, tasks: &mut Tasks) {
        tasks.others.spawn(async move {
            let drain = self.config.drain;
            match &self.source {
                Source::Processes(settings, _) => settings.send_modify(|settings| settings.replicas = 0),
                Source::Containers(settings, _) => settings.send_modify(|settings| settings.replicas = 0),
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
            tracing::info!(pool = %self.config.name, "pool is gone");
            self.over.cancel();
        });
    }
}

/// Sends settings where they differ.
fn change<T: PartialEq>(settings: &watch::Sender<T>, new: T) {
    settings.send_if_modified(|old| {
        let differs = *old != new;
        if differs {
            *old = new;
        }
        differs
    });
}

/// What the publisher must hear of a static pool's backends.
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

async fn resolve(place: &str, backends: &[StaticBackend]) -> Result<BTreeMap<Arc<str>, SocketAddr>, StartError> {
    let mut found = BTreeMap::new();
    for (n, backend) in backends.iter().enumerate() {
        let address = provider::resolve(&backend.host, backend.port).await.map_err(|error| StartError::Resolve {
            place: format!("{place}.provider.static[{n}].address"),
            host: backend.host.clone(),
            error,
        })?;
        found.insert(backend.id.as_str().into(), address);
    }
    Ok(found)
}

fn check_program(place: &str, process: &config::Process) -> Result<(), StartError> {
    let program = process.command.first().map_or("", String::as_str);
    // With a placeholder in it, or another PATH, only the start will tell.
    let is_known = !program.contains('{') && !process.env.iter().any(|(name, _)| name == "PATH");
    if is_known && !supervisor::process::is_runnable(program) {
        return Err(StartError::NoProgram { place: format!("{place}.command"), program: program.to_owned() });
    }
    Ok(())
}

fn watched(engine: Option<&Engine>) -> Result<(Engine, Arc<Freshness>), StartError> {
    let Some(engine) = engine else { return Err(StartError::Docker("there is no engine".to_owned())) };
    Ok((engine.clone(), Arc::new(Freshness::new(engine, Instant::now()))))
}

/// Listed in a config or added at run time.
pub(super) fn listed(backend: Listed) -> StaticBackend {
    StaticBackend { id: backend.id.to_string(), host: backend.host, port: backend.port, weight: backend.weight }
}
