//! The only wiring place: turns a config into listeners, workers, replicas and a side port, and shuts them
//! down in order. Each part gets a small settings struct; none of them knows the config.

use std::future::IntoFuture as _;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use metrics_exporter_prometheus::BuildError;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::{AbortOnDropHandle, TaskTracker};
use tracing_appender::non_blocking::WorkerGuard;

use crate::api::{self, ListenerView, PoolView, State};
use crate::config::{self, Config, Pool, Provider};
use crate::control::health::{self, Probe};
use crate::control::provider::{self, Listed};
use crate::control::publisher::Publisher;
use crate::control::supervisor::plan::Policy;
use crate::control::supervisor::process::{self, Ports};
use crate::control::{Event, supervisor};
use crate::limits;
use crate::metrics::{self, Exporter};
use crate::proxy::access_log::AccessLog;
use crate::proxy::account::ListenerStats;
use crate::proxy::{self, Intercept, Proxy, Route, socket};
use crate::table::TableCell;

/// How long a new replica may fail its checks and still count as starting.
const STARTING_GRACE: Duration = Duration::from_secs(10);

/// Between foldings of recorded durations.
const UPKEEP: Duration = Duration::from_secs(5);

/// Why the app could not start. The message names the place in the config and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address cannot be listened on.
    #[error("{place}: cannot listen on {address}: {error}{}", remedy(error))]
    Listen {
        /// Key path.
        place: String,
        /// The address.
        address: SocketAddr,
        /// What the system says.
        error: io::Error,
    },
    /// A host name is unknown.
    #[error("{place}: cannot resolve {host:?}: {error}; check the name, or give an address")]
    Resolve {
        /// Key path.
        place: String,
        /// The name.
        host: String,
        /// What the system says.
        error: io::Error,
    },
    /// A program is not there.
    #[error("{place}: there is no program {program:?} to run; install it, or give its full path")]
    NoProgram {
        /// Key path.
        place: String,
        /// The command's first word.
        program: String,
    },
    /// There are not enough free ports.
    #[error("{place}: cannot reserve ports for the replicas: {error}; choose another range, or auto")]
    NoPorts {
        /// Key path.
        place: String,
        /// What the system says.
        error: io::Error,
    },
    /// The access log cannot be opened.
    #[error("access_log.path: cannot write {}: {error}", path.display())]
    AccessLog {
        /// The file.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// Threads cannot be started.
    #[error("cannot start the workers: {0}")]
    Workers(io::Error),
    /// The metrics exporter cannot be built.
    #[error("cannot set up metrics: {0}")]
    Metrics(#[from] BuildError),
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            "; another program listens there, perhaps another Ringway: stop it, or choose another port"
        }
        io::ErrorKind::PermissionDenied => "; ports below 1024 need root or CAP_NET_BIND_SERVICE: choose a higher one",
        io::ErrorKind::AddrNotAvailable => "; this machine does not have that address: see `ip address`",
        _ => "",
    }
}

/// Why the app ended before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A worker's thread ended.
    #[error("worker {0} ended unexpectedly")]
    WorkerEnded(usize),
    /// The side port's server ended.
    #[error("the side port ended: {0}")]
    Api(io::Error),
}

/// What the app needs beside the config.
#[derive(Debug, Clone)]
pub struct Environment {
    /// The Ringway binary, with which children are launched.
    pub executable: PathBuf,
    /// Soft limit on open files that replicas get; `None`: Ringway's own.
    pub replica_open_files: Option<u64>,
}

/// A started app. Dropping it ends everything at once.
#[derive(Debug)]
pub struct App {
    state: Arc<State>,
    proxy: Proxy,
    api_address: SocketAddr,
    api: tokio::net::TcpListener,
    /// Stops the supervisors, also when it is dropped.
    stop_replicas: DropGuard,
    /// Ends before `ready` is taken back, or it might say so afterwards.
    becoming_ready: AbortOnDropHandle<()>,
    supervisors: TaskTracker,
    /// Tasks that have nothing to finish.
    tasks: Vec<AbortOnDropHandle<()>>,
    /// Writes what the access log has queued when the app ends.
    _access_log: Option<WorkerGuard>,
}

impl App {
    /// Binds everything, then starts workers, replicas and checks. The control plane runs on the current
    /// runtime, which must live on one thread: replicas die with the thread that started them.
    ///
    /// # Errors
    /// When anything the config asks for is not to be had; then nothing is left running.
    pub async fn start(config: Config, environment: Environment) -> Result<Self, StartError> {
        let workers = config.workers.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
        let (max_pipes, max_connections) = capacity(&config);
        let exporter = Exporter::new()?;

        let mut pools = Vec::new();
        for (n, pool) in config.pools.iter().enumerate() {
            pools.push(prepare(&format!("pools[{n}]"), pool, &environment).await?);
        }
        let api_place = || "api.listen".to_owned();
        let api = tokio::net::TcpListener::bind(config.api.listen).await;
        let api = api.map_err(|error| StartError::Listen { place: api_place(), address: config.api.listen, error })?;
        let api_address = api.local_addr().unwrap_or(config.api.listen);
        let (intercept, intercepted) = api::status::intercept();
        let mut listeners = Vec::new();
        for (n, listener) in config.listeners.iter().enumerate() {
            listeners.push(bind(n, listener, &config, workers, &pools, &exporter, &intercept)?);
        }
        drop(intercept);
        let opened = config.access_log.as_ref().map(|log| {
            AccessLog::open(&log.path, log.format)
                .map_err(|error| StartError::AccessLog { path: log.path.clone(), error })
        });
        let (access_log, log_guard) = opened.transpose()?.unzip();

        let listener_views = listeners.iter().map(|(view, _)| view.clone()).collect();
        let access_log_dropped = access_log.as_ref().map(AccessLog::dropped);
        let proxy = Proxy::start(proxy::Settings {
            workers,
            max_connections,
            max_pipes,
            tcp: config.tcp,
            access_log,
            listeners: listeners.into_iter().map(|(_, listener)| listener).collect(),
        })
        .map_err(StartError::Workers)?;
        let state = Arc::new(State {
            started: Instant::now(),
            ready: AtomicBool::new(false),
            listeners: listener_views,
            pools: std::iter::zip(&config.pools, &pools).map(|(pool, prepared)| pool_view(pool, prepared)).collect(),
            workers: proxy.workers().to_vec(),
            exporter,
            access_log_dropped,
            max_connections,
        });

        let (stop_replicas, supervisors) = (CancellationToken::new(), TaskTracker::new());
        let mut tasks = Vec::new();
        let mut background = |task: tokio::task::JoinHandle<()>| tasks.push(AbortOnDropHandle::new(task));
        for prepared in pools {
            prepared.start(&stop_replicas, &supervisors, &mut background);
        }
        background(tokio::spawn(api::status::answer(Arc::clone(&state), intercepted)));
        background(tokio::spawn(upkeep(Arc::clone(&state))));
        supervisors.close();
        let becoming_ready = AbortOnDropHandle::new(tokio::spawn(become_ready(Arc::clone(&state))));
        let stop_replicas = stop_replicas.drop_guard();
        Ok(Self {
            state,
            proxy,
            api_address,
            api,
            stop_replicas,
            becoming_ready,
            supervisors,
            tasks,
            _access_log: log_guard,
        })
    }

    /// What the side port shows; also the addresses that listeners really have.
    pub fn state(&self) -> &Arc<State> {
        &self.state
    }

    /// Where the side port listens.
    pub fn api_address(&self) -> SocketAddr {
        self.api_address
    }

    /// Serves until `shutdown`, then stops in order: no new connections, open ones until their `drain`, then
    /// the replicas.
    ///
    /// # Errors
    /// When a part ends that should not have.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) -> Result<(), RunError> {
        let routes = api::router(Arc::clone(&self.state)).into_make_service_with_connect_info::<SocketAddr>();
        let mut api = std::pin::pin!(axum::serve(self.api, routes).into_future());
        let outcome = tokio::select! {
            () = shutdown => Ok(()),
            ended = &mut api => Err(RunError::Api(ended.err().unwrap_or_else(|| io::ErrorKind::Other.into()))),
            ended = self.proxy.worker_ended() => Err(RunError::WorkerEnded(ended.unwrap_or_default())),
        };
        drop(self.becoming_ready);
        self.state.ready.store(false, Ordering::Relaxed);
        self.proxy.stop();
        let drained = async {
            while self.proxy.worker_ended().await.is_some() {}
            drop(self.stop_replicas);
            self.supervisors.wait().await;
        };
        // The side port goes on to show how the connections drain.
        tokio::select! {
            () = drained => {}
            _ = &mut api, if outcome.is_ok() => {}
        }
        drop(self.tasks);
        outcome
    }
}

/// Pipes and connections that fit under the limit on open files, or less where the config says so.
fn capacity(config: &Config) -> (usize, usize) {
    let open_files = limits::open_files();
    let fitting = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
    let pipes = match (config.relay.splice, config.relay.max_pipes) {
        (false, _) => 0,
        (true, Some(pipes)) => pipes,
        (true, None) => fitting(limits::pipes(open_files)),
    };
    let most = fitting(limits::connections(open_files, pipes as u64));
    let wanted = config.max_connections.unwrap_or(most);
    if wanted > most {
        tracing::warn!(
            max_connections = wanted,
            open_files,
            using = most,
            "max_connections is more than the limit on open files allows: raise it (ulimit -n), or lower max_connections"
        );
    }
    (pipes, wanted.min(most))
}

/// A pool that is ready to be started: everything that can fail has been done.
struct Prepared {
    publisher: Publisher,
    table: TableCell,
    supervisor: Option<(process::Settings, Ports)>,
    health: Option<health::Settings>,
}

async fn prepare(place: &str, pool: &Pool, environment: &Environment) -> Result<Prepared, StartError> {
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
    let publisher = Publisher::new(name, pool.ring, pool.health_check.is_some(), known, Instant::now());
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
    Ok(Prepared { table: publisher.table(), publisher, supervisor, health })
}

fn prepare_process(
    place: &str,
    pool: &Arc<str>,
    process: &config::Process,
    slots: Vec<Arc<str>>,
    environment: &Environment,
) -> Result<(process::Settings, Ports), StartError> {
    let program = process.command.first().map_or("", String::as_str);
    if !supervisor::process::is_runnable(program) {
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
    fn start(
        self,
        stop: &CancellationToken,
        supervisors: &TaskTracker,
        background: &mut impl FnMut(tokio::task::JoinHandle<()>),
    ) {
        let (events, queue): (mpsc::Sender<Event>, _) = Publisher::queue();
        background(tokio::spawn(self.publisher.run(queue)));
        if let Some(settings) = self.health {
            background(tokio::spawn(health::check_all(self.table, settings, events.clone())));
        }
        if let Some((settings, ports)) = self.supervisor {
            supervisors.spawn(process::supervise(settings, ports, events, stop.clone()));
        }
    }
}

fn bind(
    n: usize,
    listener: &config::Listener,
    config: &Config,
    workers: usize,
    pools: &[Prepared],
    exporter: &Exporter,
    intercept: &Intercept,
) -> Result<(ListenerView, proxy::Listener), StartError> {
    // The config has checked that the pool exists.
    let (pool, prepared) = std::iter::zip(&config.pools, pools)
        .find(|(pool, _)| pool.name == listener.pool)
        .unwrap_or((&config.pools[0], &pools[0]));
    let sockets = socket::listen(listener.listen, workers, listener.backlog.into(), &config.tcp).map_err(|error| {
        StartError::Listen { place: format!("listeners[{n}].listen"), address: listener.listen, error }
    })?;
    let view = ListenerView {
        name: listener.name.as_str().into(),
        address: sockets[0].local_addr().unwrap_or(listener.listen),
        pool: pool.name.as_str().into(),
        stats: Arc::new(ListenerStats::default()),
    };
    let route = Route {
        pool: Arc::clone(&view.pool),
        key: pool.key,
        table: prepared.table.clone(),
        connect_timeout: pool.connect.timeout,
        connect_attempts: pool.connect.attempts.into(),
        idle: pool.timeouts.idle,
        half_closed: pool.timeouts.half_closed,
        drain: pool.drain,
        connect_seconds: exporter.histogram(&metrics::CONNECT_SECONDS, &[&pool.name]),
    };
    let bound = proxy::Listener {
        name: Arc::clone(&view.name),
        sockets,
        route,
        stats: Arc::clone(&view.stats),
        intercept: listener.answer_status.then(|| intercept.clone()),
        connection_seconds: exporter.histogram(&metrics::CONNECTION_SECONDS, &[&listener.name]),
    };
    Ok((view, bound))
}

fn pool_view(pool: &Pool, prepared: &Prepared) -> PoolView {
    PoolView {
        name: pool.name.as_str().into(),
        key: pool.key,
        table: prepared.table.clone(),
        connect_timeout: pool.connect.timeout,
        connect_attempts: pool.connect.attempts.into(),
    }
}

/// Ready once every pool has had a healthy backend.
async fn become_ready(state: Arc<State>) {
    for pool in &state.pools {
        let mut changes = pool.table.watch();
        while !pool.table.load().any_healthy() {
            if changes.changed().await.is_err() {
                return;
            }
        }
    }
    state.ready.store(true, Ordering::Relaxed);
    tracing::info!(after = ?state.started.elapsed(), "ready");
}

async fn upkeep(state: Arc<State>) {
    let mut interval = tokio::time::interval(UPKEEP);
    loop {
        interval.tick().await;
        state.exporter.upkeep();
    }
}
