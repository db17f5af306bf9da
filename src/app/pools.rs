//! Makes a pool of the config ready to be started, and starts it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{Environment, StartError};
use crate::api::ProviderView;
use crate::config::{self, Config, Pool, Provider};
use crate::control::docker::engine::Engine;
use crate::control::docker::place::Wanted;
use crate::control::docker::watch::Freshness;
use crate::control::health::{self, Probe};
use crate::control::provider::{self, Listed, discover};
use crate::control::publisher::Publisher;
use crate::control::supervisor::docker;
use crate::control::supervisor::plan::Policy;
use crate::control::supervisor::process::{self, Ports};
use crate::control::{Event, supervisor};
use crate::metrics::{self, Exporter};
use crate::proxy::Route;

/// How long a container that somebody else has started may fail its checks and still count as starting.
const DISCOVERED_GRACE: Duration = Duration::from_secs(10);

/// A pool that is ready to be started: everything that can fail has been done.
pub(super) struct Prepared {
    /// How listeners and side port get to it.
    pub(super) route: Route,
    /// How the side port shows where its backends come from.
    pub(super) provider: ProviderView,
    publisher: Publisher,
    source: Source,
    health: Option<health::Settings>,
}

/// Where its backends come from, once it runs.
enum Source {
    /// Known before.
    Fixed,
    Processes(process::Settings, Ports),
    Containers(docker::Settings, Engine, Arc<Freshness>),
    Discovered(discover::Settings, Engine, Arc<Freshness>),
}

impl Source {
    fn view(&self) -> ProviderView {
        let (kind, freshness) = match self {
            Self::Fixed => ("static", None),
            Self::Processes(..) => ("process", None),
            Self::Containers(_, _, freshness) | Self::Discovered(_, _, freshness) => {
                ("docker", Some(Arc::clone(freshness)))
            }
        };
        ProviderView { kind, freshness }
    }
}

/// The engine, if any pool needs one.
pub(super) fn engine(config: &Config, host: Option<&str>) -> Result<Option<Engine>, StartError> {
    let needs_one = |pool: &Pool| matches!(pool.provider, Provider::Containers(_) | Provider::Discover(_));
    let engine = config.pools.iter().any(needs_one).then(|| Engine::new(host, config.docker.timeout));
    engine.transpose().map_err(StartError::Docker)
}

pub(super) async fn prepare(
    place: &str,
    pool: &Pool,
    config: &Config,
    engine: Option<&Engine>,
    environment: &Environment,
    exporter: &Exporter,
) -> Result<Prepared, StartError> {
    let name: Arc<str> = pool.name.as_str().into();
    let mut known = Vec::new();
    let mut source = Source::Fixed;
    // Replicas have just been started; for how long others have been there nobody knows.
    let mut grace = Duration::ZERO;
    match &pool.provider {
        Provider::Static(backends) => {
            for (n, backend) in backends.iter().enumerate() {
                let listed = Listed {
                    id: backend.id.as_str().into(),
                    host: backend.host.clone(),
                    port: backend.port,
                    weight: backend.weight,
                };
                known.extend(provider::resolve(&listed).await.map_err(|error| StartError::Resolve {
                    place: format!("{place}.provider.static[{n}].address"),
                    host: listed.host,
                    error,
                })?);
            }
        }
        Provider::Process(process) => {
            let place = format!("{place}.provider.process");
            let slots = provider::slots(&pool.name, process.replicas);
            known.extend(slots.iter().map(|id| Event::Joined { id: Arc::clone(id), weight: 1 }));
            let (settings, ports) = prepare_process(&place, &name, process, slots, environment)?;
            source = Source::Processes(settings, ports);
            grace = process.restart.start_grace;
        }
        Provider::Containers(containers) => {
            let slots = provider::slots(&pool.name, containers.replicas);
            known.extend(slots.iter().map(|id| Event::Joined { id: Arc::clone(id), weight: 1 }));
            if let Some((engine, freshness)) = watched(engine) {
                let settings = docker::Settings {
                    pool: Arc::clone(&name),
                    slots,
                    spec: containers.spec.clone(),
                    wanted: wanted(config, containers.network.as_ref()),
                    policy: policy(containers.restart),
                    stop_grace: containers.stop_grace,
                    resync: config.docker.resync,
                };
                source = Source::Containers(settings, engine, freshness);
            }
            grace = containers.restart.start_grace;
        }
        Provider::Discover(discover) => {
            if let Some((engine, freshness)) = watched(engine) {
                let settings = discover::Settings {
                    pool: Arc::clone(&name),
                    label: discover.label.clone(),
                    port: discover.port,
                    wanted: wanted(config, discover.network.as_ref()),
                    resync: config.docker.resync,
                };
                source = Source::Discovered(settings, engine, freshness);
            }
            grace = DISCOVERED_GRACE;
        }
    }
    let publisher = Publisher::new(Arc::clone(&name), pool.ring, pool.health_check.is_some(), known, Instant::now());
    let health = pool.health_check.as_ref().map(|check| health::Settings {
        probe: match &check.http_path {
            None => Probe::Tcp,
            Some(path) => Probe::Http(path.parse().unwrap_or_default()),
        },
        interval: check.interval,
        timeout: check.timeout,
        rise: check.rise,
        fall: check.fall,
        grace,
    });
    let route = Route {
        key: pool.key,
        table: publisher.table(),
        connect_timeout: pool.connect.timeout,
        connect_attempts: pool.connect.attempts.into(),
        idle: pool.timeouts.idle,
        half_closed: pool.timeouts.half_closed,
        drain: pool.drain,
        connect_seconds: exporter.histogram(&metrics::CONNECT_SECONDS, &[&name]),
        pool: name,
    };
    Ok(Prepared { route, provider: source.view(), publisher, source, health })
}

/// [`engine`] has made one where a pool needs it.
fn watched(engine: Option<&Engine>) -> Option<(Engine, Arc<Freshness>)> {
    let engine = engine?.clone();
    let freshness = Arc::new(Freshness::new(&engine, Instant::now()));
    Some((engine, freshness))
}

fn wanted(config: &Config, network: Option<&String>) -> Wanted {
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

fn prepare_process(
    place: &str,
    pool: &Arc<str>,
    process: &config::Process,
    slots: Vec<Arc<str>>,
    environment: &Environment,
) -> Result<(process::Settings, Ports), StartError> {
    let program = process.command.first().map_or("", String::as_str);
    // With a placeholder in it, or another PATH, only the start will tell.
    let is_known = !program.contains('{') && !process.env.iter().any(|(name, _)| name == "PATH");
    if is_known && !supervisor::process::is_runnable(program) {
        return Err(StartError::NoProgram { place: format!("{place}.command"), program: program.to_owned() });
    }
    let ports = Ports::reserve(process.ports, slots.len())
        .map_err(|error| StartError::NoPorts { place: format!("{place}.ports"), error })?;
    let settings = process::Settings {
        pool: Arc::clone(pool),
        slots,
        command: process.command.clone(),
        env: process.env.clone(),
        policy: policy(process.restart),
        stop_grace: process.stop_grace,
        launcher: environment.executable.clone(),
        open_files: environment.replica_open_files,
    };
    Ok((settings, ports))
}

impl Prepared {
    /// Starts its tasks: those that have something to finish with `supervisors`.
    pub(super) fn start(self, stop: &CancellationToken, supervisors: &mut JoinSet<()>, tasks: &mut JoinSet<()>) {
        let (events, queue): (mpsc::Sender<Event>, _) = Publisher::queue();
        let table = self.publisher.table();
        tasks.spawn(self.publisher.run(queue));
        if let Some(settings) = self.health {
            tasks.spawn(health::check_all(table.clone(), settings, events.clone()));
        }
        match self.source {
            Source::Fixed => {}
            Source::Processes(settings, ports) => {
                supervisors.spawn(process::supervise(settings, ports, table, events, stop.clone()));
            }
            Source::Containers(settings, engine, freshness) => {
                supervisors.spawn(docker::supervise(settings, engine, table, events, freshness, stop.clone()));
            }
            Source::Discovered(settings, engine, freshness) => {
                tasks.spawn(discover::follow(settings, engine, events, freshness));
            }
        }
    }
}
