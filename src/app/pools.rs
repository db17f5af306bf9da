//! Makes a pool of the config ready to be started, and starts it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{Environment, StartError};
use crate::config::{self, Pool, Provider};
use crate::control::health::{self, Probe};
use crate::control::provider::{self, Listed};
use crate::control::publisher::Publisher;
use crate::control::supervisor::plan::Policy;
use crate::control::supervisor::process::{self, Ports};
use crate::control::{Event, supervisor};
use crate::metrics::{self, Exporter};
use crate::proxy::Route;

/// How long a new replica may fail its checks and still count as starting.
const STARTING_GRACE: Duration = Duration::from_secs(10);

/// A pool that is ready to be started: everything that can fail has been done.
pub(super) struct Prepared {
    /// How listeners and side port get to it.
    pub(super) route: Route,
    publisher: Publisher,
    supervisor: Option<(process::Settings, Ports)>,
    health: Option<health::Settings>,
}

pub(super) async fn prepare(
    place: &str,
    pool: &Pool,
    environment: &Environment,
    exporter: &Exporter,
) -> Result<Prepared, StartError> {
    let name: Arc<str> = pool.name.as_str().into();
    let mut known = Vec::new();
    let mut supervisor = None;
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
            supervisor = Some(prepare_process(&place, &name, process, slots, environment)?);
            grace = STARTING_GRACE;
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
    Ok(Prepared { route, publisher, supervisor, health })
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
        policy: Policy {
            backoff: process.restart.backoff,
            max_backoff: process.restart.max_backoff,
            stable_after: process.restart.stable_after,
            crash_loop_after: process.restart.crash_loop_after,
        },
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
        tasks.spawn(self.publisher.run(queue));
        if let Some(settings) = self.health {
            tasks.spawn(health::check_all(self.route.table, settings, events.clone()));
        }
        if let Some((settings, ports)) = self.supervisor {
            supervisors.spawn(process::supervise(settings, ports, events, stop.clone()));
        }
    }
}
