//! The only wiring place: turns a config into listeners, workers, replicas and a side port, and shuts them
//! down in order. Each part gets a small settings struct; none of them knows the config.
//!
//! - this file: the app's life, and its listeners
//! - [`pools`]: its pools
//! - [`error`]: why it could not start

mod error;
mod pools;

use std::future::IntoFuture as _;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::AbortOnDropHandle;
use tracing_appender::non_blocking::WorkerGuard;

pub use self::error::{RunError, StartError};
use self::pools::{Prepared, engine, prepare};
use crate::api::{self, ListenerView, State};
use crate::config::{self, Config};
use crate::limits;
use crate::metrics::{self, Exporter};
use crate::proxy::access_log::AccessLog;
use crate::proxy::socket::{self, TcpOptions, Unserved};
use crate::proxy::stats::ListenerStats;
use crate::proxy::{self, Intercept, Proxy};

/// Connections to the side port that the kernel queues.
const API_BACKLOG: u16 = 1024;

/// Between foldings of recorded durations.
const UPKEEP: Duration = Duration::from_secs(5);

/// What the app needs beside the config.
#[derive(Debug, Clone)]
pub struct Environment {
    /// The Ringway binary, with which children are launched.
    pub executable: PathBuf,
    /// Soft limit on open files that replicas get; `None`: Ringway's own.
    pub replica_open_files: Option<u64>,
    /// The value of `DOCKER_HOST`: where the Docker engine is, if a pool needs one.
    pub docker_host: Option<String>,
}

/// A started app. Dropping it ends replicas and side port at once; the workers still drain, as long as the process
/// lives.
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
    supervisors: JoinSet<()>,
    /// Tasks that run as long as the app, and have nothing to finish.
    tasks: JoinSet<()>,
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
        let (max_pipes, max_connections) = capacity(&config, workers);
        let exporter = Exporter::new()?;

        let engine = engine(&config, environment.docker_host.as_deref())?;
        let mut pools = Vec::new();
        for (n, pool) in config.pools.iter().enumerate() {
            let place = format!("pools[{n}]");
            pools.push(prepare(&place, pool, &config, engine.as_ref(), &environment, &exporter).await?);
        }
        let api = listen("api.listen", config.api.listen, 1, API_BACKLOG, &config.tcp, Unserved::End)?.remove(0);
        let api = tokio::net::TcpListener::from_std(api).map_err(StartError::Runtime)?;
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
        let access_log_lost = access_log.as_ref().map(AccessLog::lost);
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
            pools: pools.iter().map(|pool| pool.route.clone()).collect(),
            providers: pools.iter().map(|pool| pool.provider.clone()).collect(),
            tcp: config.tcp,
            workers: proxy.workers().to_vec(),
            exporter,
            access_log_lost,
            max_connections,
        });

        let (stop_replicas, mut supervisors, mut tasks) = (CancellationToken::new(), JoinSet::new(), JoinSet::new());
        for pool in pools {
            pool.start(&stop_replicas, &mut supervisors, &mut tasks);
        }
        tasks.spawn(api::status::answer(Arc::clone(&state), intercepted));
        tasks.spawn(upkeep(Arc::clone(&state)));
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
            // Better to be started anew than to balance over what is no more.
            () = panicked(&mut self.tasks) => Err(RunError::TaskPanicked),
            () = panicked(&mut self.supervisors) => Err(RunError::TaskPanicked),
        };
        drop(self.becoming_ready);
        self.state.ready.store(false, Ordering::Relaxed);
        self.proxy.stop();
        let drained = async {
            while self.proxy.worker_ended().await.is_some() {}
            drop(self.stop_replicas);
            while self.supervisors.join_next().await.is_some() {}
        };
        // The side port goes on to show how the connections drain.
        tokio::select! {
            () = drained => {}
            _ = &mut api, if !matches!(outcome, Err(RunError::Api(_))) => {}
        }
        drop(self.tasks);
        outcome
    }
}

/// Pipes and connections that fit under the limit on open files, or less where the config says so.
fn capacity(config: &Config, workers: usize) -> (usize, usize) {
    let open_files = limits::open_files();
    let fitting = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
    let share = fitting(limits::pipes(open_files));
    let pipes = match (config.relay.splice, config.relay.max_pipes) {
        (false, _) => 0,
        (true, None) => share,
        (true, Some(wanted)) => at_most("relay.max_pipes", wanted, share, open_files),
    };
    // A listening socket for each worker and what its runtime needs; a check for each backend, and for a
    // replica its port and its output too.
    let sockets = workers * (config.listeners.len() + 3);
    let backends: usize = config.pools.iter().map(|pool| 4 * pool.provider.backends()).sum();
    let most = fitting(limits::connections(open_files, pipes as u64, (sockets + backends) as u64));
    let connections =
        config.max_connections.map_or(most, |wanted| at_most("max_connections", wanted, most, open_files));
    (pipes, connections)
}

fn at_most(key: &str, wanted: usize, most: usize, open_files: u64) -> usize {
    if wanted > most {
        tracing::warn!(
            wanted,
            open_files,
            using = most,
            "{key} is more than the limit on open files allows: raise it (ulimit -n), or lower {key}"
        );
    }
    wanted.min(most)
}

fn listen(
    place: &str,
    address: SocketAddr,
    count: usize,
    backlog: u16,
    tcp: &TcpOptions,
    unserved: Unserved,
) -> Result<Vec<TcpListener>, StartError> {
    let sockets = socket::listen(address, count, backlog.into(), tcp, unserved);
    sockets.map_err(|error| StartError::Listen { place: place.to_owned(), address, error })
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
    let place = format!("listeners[{n}].listen");
    let sockets = listen(&place, listener.listen, workers, listener.backlog, &config.tcp, Unserved::Reset)?;
    let view = ListenerView {
        name: listener.name.as_str().into(),
        address: sockets[0].local_addr().unwrap_or(listener.listen),
        pool: pool.name.as_str().into(),
        stats: Arc::new(ListenerStats::default()),
    };
    let bound = proxy::Listener {
        name: Arc::clone(&view.name),
        sockets,
        route: prepared.route.clone(),
        stats: Arc::clone(&view.stats),
        intercept: listener.answer_status.then(|| intercept.clone()),
        connection_seconds: exporter.histogram(&metrics::CONNECTION_SECONDS, &[&listener.name]),
    };
    Ok((view, bound))
}

/// Waits until one of the tasks panics.
async fn panicked(tasks: &mut JoinSet<()>) {
    while let Some(ended) = tasks.join_next().await {
        if ended.is_err() {
            return;
        }
    }
    std::future::pending::<()>().await;
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
