//! The only wiring place: turns a config into listeners, workers, replicas and a side port, changes them while they run,
//! and shuts them down in order. Each part gets a small settings struct; none of them knows the config.
//!
//! - this file: the app's life
//! - [`pools`], [`listeners`]: its parts, made, changed and let go; [`settings`]: what they are told; [`capacity`]: how
//!   much there is room for
//! - [`reload`]: from one config to another
//! - [`changes`]: what was changed at run time, beside the config
//! - [`orders`]: what an operator may ask for
//! - [`upgrade`]: from one process to another
//! - [`error`]: why it could not start

mod capacity;
mod changes;
mod error;
mod listeners;
mod orders;
mod pools;
mod reload;
mod settings;
mod upgrade;

use std::collections::HashSet;
use std::ffi::OsString;
use std::future::IntoFuture as _;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::AbortOnDropHandle;
use tracing_appender::non_blocking::WorkerGuard;

use self::capacity::capacity;
use self::changes::Changes;
pub use self::error::{RunError, StartError};
use self::listeners::{Bound, Listener};
use self::pools::{Pool, Tasks};
use self::upgrade::notify;
pub use self::upgrade::{Inheritance, TAKE_OVER};
use crate::api::{self, State, View};
use crate::config::{self, Config, Provider};
use crate::control::docker::engine::Engine;
use crate::control::operator::{Operator, Order, Ordered, Refusal, Report};
use crate::control::supervisor::process::let_go;
use crate::handover::Line;
use crate::metrics::Exporter;
use crate::proxy::access_log::AccessLog;
use crate::proxy::{self, Intercept, Proxy};

/// From SIGTERM to SIGKILL for a replica that was taken over and is of no pool.
const UNWANTED_GRACE: Duration = Duration::from_secs(5);

/// How late a pool that a reload has made may be seen by who waits for all to be ready.
const NEW_VIEW: Duration = Duration::from_millis(500);

/// How long calls to the side port may go on that are under way when a successor has taken over.
const LAST_ANSWERS: Duration = Duration::from_secs(5);

/// Between foldings of recorded durations.
const UPKEEP: Duration = Duration::from_secs(5);

/// What the app needs beside the config.
#[derive(Debug, Clone)]
pub struct Environment {
    /// Where the config came from, and is read again for a reload.
    pub source: config::Source,
    /// The Ringway binary, with which children and a successor are launched.
    pub executable: PathBuf,
    /// The arguments of a successor, [`TAKE_OVER`] among them.
    pub arguments: Vec<OsString>,
    /// Soft limit on open files that replicas get; `None`: Ringway's own.
    pub replica_open_files: Option<u64>,
    /// The value of `DOCKER_HOST`: where the Docker engine is, if a pool needs one.
    pub docker_host: Option<String>,
    /// The token that calls to the side port need which change something, where the config names no file with it.
    pub token: Option<String>,
}

/// A started app. Dropping it ends replicas and side port at once; the workers still drain, as long as the process
/// lives.
pub struct App {
    environment: Environment,
    /// The config as its file has it.
    file: Config,
    changes: Changes,
    /// The config as it runs: with the changes over it.
    config: Config,
    engine: Option<Engine>,
    state: Arc<State>,
    proxy: Proxy,
    pools: Vec<Pool>,
    listeners: Vec<Listener>,
    intercept: Intercept,
    access_log: Option<Log>,
    api_address: SocketAddr,
    api: Option<tokio::net::TcpListener>,
    /// A copy, to be handed over to a successor.
    api_socket: Option<std::net::TcpListener>,
    /// Listeners that are not open yet: an older Ringway still serves.
    bound: Vec<Bound>,
    inheritance: Inheritance,
    /// Tells that an older Ringway has gone.
    settled: Option<watch::Sender<bool>>,
    is_settled: watch::Receiver<bool>,
    /// Kept until this process ends, which it tells the successor.
    successor: Option<Line>,
    /// Docker pools that are on their way out, by name, and what stops their supervisors.
    retiring: Vec<(String, CancellationToken)>,
    orders: mpsc::Receiver<Ordered>,
    /// Ends before `ready` is taken back, or it might say so afterwards.
    becoming_ready: Option<AbortOnDropHandle<()>>,
    tasks: Tasks,
    /// Stops the supervisors when the app is dropped.
    _stop_replicas: DropGuard,
}

impl std::fmt::Debug for App {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("App").field("api_address", &self.api_address).finish_non_exhaustive()
    }
}

/// How serving came to its end.
enum End {
    /// It was told to.
    Stopped,
    /// Another process does it.
    Succeeded,
}

/// The access log, and what writes the lines that it has queued when the app ends.
type Log = (AccessLog, WorkerGuard);

impl App {
    /// Binds everything, then starts workers, replicas and checks. The control plane runs on the current
    /// runtime, which must live on one thread: replicas die with the thread that started them.
    ///
    /// # Errors
    /// When anything the config asks for is not to be had; then nothing is left running.
    pub async fn start(
        file: Config,
        environment: Environment,
        mut inheritance: Inheritance,
    ) -> Result<Self, StartError> {
        let mut environment = environment;
        environment.replica_open_files = inheritance.open_files.or(environment.replica_open_files);
        let (settled, is_settled) = watch::channel(!inheritance.takes_over());
        let changes = inheritance.changes(&file);
        let changes = changes.pruned(&changes.over(&file));
        let config = changes.over(&file);
        let workers = config.workers.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
        let (max_pipes, max_connections) = capacity(&config, workers);
        let exporter = Exporter::new()?;
        let guard = guard(&config.api, environment.token.as_deref())?;

        let engine = engine(&config, environment.docker_host.as_deref())?;
        reload::check_sizes(&config)?;
        let stop_replicas = CancellationToken::new();
        let means = pools::Means {
            config: &config,
            engine: engine.as_ref(),
            environment: &environment,
            exporter: &exporter,
            stop_replicas: &stop_replicas,
            settled: is_settled.clone(),
        };
        let mut prepared = Vec::new();
        for (n, pool) in config.pools.iter().enumerate() {
            // What belongs to a pool that is of another kind now is let go below.
            let is_supervised = matches!(pool.provider, Provider::Process(_));
            let replicas = if is_supervised { inheritance.replicas(&pool.name) } else { Vec::new() };
            let (place, changes) = (format!("pools[{n}]"), changes.get(&pool.name));
            prepared.push(pools::prepare(&place, pool, &changes, replicas, &means).await?);
        }
        let inherited = inheritance.sockets(upgrade::SIDE_PORT, config.api.listen);
        let api_socket = listeners::side_port(&config, inherited)?;
        let api = api_socket.try_clone().and_then(tokio::net::TcpListener::from_std).map_err(StartError::Runtime)?;
        let api_address = api.local_addr().unwrap_or(config.api.listen);
        let mut bound = Vec::new();
        for (n, listener) in config.listeners.iter().enumerate() {
            let inherited = inheritance.sockets(&listener.name, listener.listen);
            bound.push(listeners::bind(&format!("listeners[{n}].listen"), listener, &config, workers, inherited)?);
        }
        inheritance.close_leftovers();
        let access_log = config.access_log.as_ref().map(open_log).transpose()?;

        let (buffer, splice_from) = (config.relay.buffer_kib * 1024, config.relay.splice_from_kib * 1024);
        let proxy = proxy::Settings { workers, max_connections, max_pipes, buffer, splice_from };
        let proxy = Proxy::start(proxy).map_err(StartError::Workers)?;
        let (intercept, intercepted) = api::status::intercept();
        let (operator, orders) = Operator::new();
        let state = Arc::new(State::new(exporter, guard, operator, &proxy));
        let mut tasks = Tasks { stop_replicas, supervisors: JoinSet::new(), others: JoinSet::new() };
        let pools: Vec<_> = prepared.into_iter().map(|pool| pool.start(&mut tasks)).collect();
        for replica in std::mem::take(&mut inheritance.replicas) {
            tasks.others.spawn(let_go(replica, is_settled.clone(), UNWANTED_GRACE));
        }
        tasks.others.spawn(api::status::answer(Arc::clone(&state), intercepted));
        tasks.others.spawn(upkeep(Arc::clone(&state)));
        let guard = tasks.stop_replicas.clone().drop_guard();
        let mut app = Self {
            environment,
            file,
            changes,
            config,
            engine,
            becoming_ready: None,
            state,
            proxy,
            pools,
            listeners: Vec::new(),
            intercept,
            access_log,
            api_address,
            api: Some(api),
            api_socket: Some(api_socket),
            bound,
            inheritance,
            orders,
            tasks,
            retiring: Vec::new(),
            settled: Some(settled),
            is_settled,
            successor: None,
            _stop_replicas: guard,
        };
        if !app.inheritance.takes_over() {
            app.open();
        }
        app.show();
        app.becoming_ready = Some(AbortOnDropHandle::new(tokio::spawn(become_ready(Arc::clone(&app.state)))));
        Ok(app)
    }

    /// Begins to accept.
    fn open(&mut self) {
        let means = listeners::Means {
            config: &self.config,
            exporter: &self.state.exporter,
            intercept: &self.intercept,
            access_log: self.access_log.as_ref().map(|(log, _)| log),
        };
        for (listener, bound) in std::iter::zip(&self.config.listeners, self.bound.drain(..)) {
            // The config has checked that the pool exists.
            let pool = self.pools.iter().find(|pool| pool.config().name == listener.pool).unwrap_or(&self.pools[0]);
            self.listeners.push(bound.open(listener, &pool.route, &means, &mut self.proxy));
        }
    }

    /// What the side port shows; also the addresses that listeners really have.
    pub fn state(&self) -> &Arc<State> {
        &self.state
    }

    /// Where the side port listens.
    pub fn api_address(&self) -> SocketAddr {
        self.api_address
    }

    /// Serves until `shutdown`, then stops in order: not ready, and after `shutdown.delay` no new connections, open ones
    /// until their `drain`, then the replicas.
    ///
    /// # Errors
    /// When a part ends that should not have.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) -> Result<(), RunError> {
        let routes = api::router(Arc::clone(&self.state)).into_make_service_with_connect_info::<SocketAddr>();
        let mut shutdown = std::pin::pin!(shutdown);
        if self.inheritance.takes_over() {
            tokio::select! {
                () = &mut shutdown => return Ok(()),
                () = self.inheritance.wait_for_backends(&self.pools) => {}
            }
            self.open();
            self.show();
            if let Some(settled) = self.settled.take() {
                self.inheritance.tell_ready(settled);
            }
            if self.inheritance.is_ready {
                self.state.ready.store(true, Ordering::Relaxed);
            }
            tracing::info!("taken over");
        }
        notify("READY=1");
        let Some(api) = self.api.take() else { return Ok(()) };
        // A task of its own: it answers while an order is carried out.
        let api_over = CancellationToken::new();
        let api = axum::serve(api, routes).with_graceful_shutdown(api_over.clone().cancelled_owned());
        let mut api = AbortOnDropHandle::new(tokio::spawn(api.into_future()));
        let outcome = self.serve(shutdown, &mut api, &api_over).await;
        self.becoming_ready = None;
        self.state.ready.store(false, Ordering::Relaxed);
        match outcome {
            Ok(End::Stopped) => {
                notify("STOPPING=1");
                tokio::time::sleep(self.config.shutdown.delay).await;
            }
            // The successor answers from now on.
            Ok(End::Succeeded) => self.api_socket = None,
            Err(_) => {}
        }
        // Who still orders something hears that it is too late.
        self.orders.close();
        while self.orders.try_recv().is_ok() {}
        // Their copies too: else the kernel would go on to take connections.
        self.listeners.clear();
        self.proxy.stop();
        // The side port goes on to show how the connections drain.
        while self.proxy.worker_ended().await.is_some() {}
        // An older Ringway may have connections to the replicas still, for as long as its drain.
        let _ = self.is_settled.wait_for(|&settled| settled).await;
        self.tasks.stop_replicas.cancel();
        while self.tasks.supervisors.join_next().await.is_some() {}
        if api_over.is_cancelled() {
            // The answer to who has ordered the upgrade may be on its way.
            let _ = tokio::time::timeout(LAST_ANSWERS, &mut api).await;
        }
        outcome.map(drop)
    }

    /// Carries orders out until `shutdown`, or until a part ends.
    async fn serve(
        &mut self,
        mut shutdown: std::pin::Pin<&mut impl Future<Output = ()>>,
        api: &mut AbortOnDropHandle<io::Result<()>>,
        api_over: &CancellationToken,
    ) -> Result<End, RunError> {
        loop {
            let (order, outcome) = tokio::select! {
                () = &mut shutdown => return Ok(End::Stopped),
                ended = &mut *api => {
                    let error = ended.unwrap_or_else(|_panicked| Err(io::ErrorKind::Other.into()));
                    return Err(RunError::Api(error.err().unwrap_or_else(|| io::ErrorKind::Other.into())));
                }
                ended = self.proxy.worker_ended() => return Err(RunError::WorkerEnded(ended.unwrap_or_default())),
                // Better to be started anew than to balance over what is no more.
                () = panicked(&mut self.tasks.others) => return Err(RunError::TaskPanicked),
                () = panicked(&mut self.tasks.supervisors) => return Err(RunError::TaskPanicked),
                Some(ordered) = self.orders.recv() => ordered,
            };
            if let Order::Upgrade = order {
                let successor = tokio::select! {
                    () = &mut shutdown => return Ok(End::Stopped),
                    successor = self.hand_over() => successor,
                };
                let has_one = successor.is_ok();
                if has_one {
                    // Before the answer: who has got it, and asks on, asks the successor.
                    api_over.cancel();
                    tokio::task::yield_now().await;
                }
                let report = successor
                    .map(|pid| Report { changes: vec![format!("process {pid} has taken over")], ..Report::default() });
                self.tell(&order, report, outcome);
                if has_one {
                    return Ok(End::Succeeded);
                }
                continue;
            }
            // To find out what it takes may take long (names are looked up) and has no effect; to do it does not.
            let planned = tokio::select! {
                () = &mut shutdown => return Ok(End::Stopped),
                planned = self.plan(order.clone()) => planned,
            };
            let report = match planned {
                Ok(step) => Ok(self.carry_out(step).await),
                Err(refusal) => Err(refusal),
            };
            self.tell(&order, report, outcome);
        }
    }

    /// Tells who gave the order what came of it, and counts and logs it.
    fn tell(&self, order: &Order, report: Result<Report, Refusal>, outcome: oneshot::Sender<Result<Report, Refusal>>) {
        match &report {
            Ok(_) => tracing::info!("order carried out: {order}"),
            Err(refusal) => tracing::warn!("order refused: {order}: {refusal}"),
        }
        let result = if report.is_ok() { api::Outcome::Ok } else { api::Outcome::Failed };
        match order {
            Order::Reload { is_dry_run: false, .. } => self.state.reloads.count(result),
            Order::Upgrade => self.state.upgrades.count(result),
            _ => {}
        }
        // Who asked may have gone.
        let _ = outcome.send(report);
    }

    /// Brings what the side port shows up to date.
    fn show(&self) {
        let configured = |pool: &Pool| self.file.pools.iter().find(|known| known.name == pool.config().name);
        let differs =
            |pool: &Pool| configured(pool).map_or(Vec::new(), |known| self.changes.get(&known.name).differs(known));
        self.state.show(View {
            listeners: self.listeners.iter().map(Listener::view).collect(),
            pools: self.pools.iter().map(|pool| pool.route.clone()).collect(),
            providers: self.pools.iter().map(|pool| pool.provider.clone()).collect(),
            differs: self.pools.iter().map(differs).collect(),
            tcp: self.config.tcp,
            access_log_lost: self.access_log.as_ref().map(|(log, _)| log.lost()),
        });
    }
}

/// Who may change something by the side port.
fn guard(api: &config::Api, token: Option<&str>) -> Result<api::Guard, StartError> {
    let from_file = api.token_file.as_ref().map(|path| {
        let text = std::fs::read_to_string(path)
            .map_err(|error| StartError::Token { path: path.clone(), problem: error.to_string() })?;
        let token = text.trim().to_owned();
        let is_token = !token.is_empty() && token.chars().all(|c| c.is_ascii_graphic());
        let problem = "it holds no token: give one line of printable characters without spaces".to_owned();
        if is_token { Ok(token) } else { Err(StartError::Token { path: path.clone(), problem }) }
    });
    let from_file = from_file.transpose()?;
    let token = from_file.as_deref().or(token.filter(|token| !token.is_empty()));
    let guard = api::Guard::new(api.listen, token, api.allowed_hosts.clone());
    if guard.is_read_only() {
        tracing::warn!(listen = %api.listen, "the side port is read-only: it is not on loopback and has no token");
    }
    Ok(guard)
}

/// The engine, if any pool needs one.
fn engine(config: &Config, host: Option<&str>) -> Result<Option<Engine>, StartError> {
    let needs_one = |pool: &config::Pool| matches!(pool.provider, Provider::Containers(_) | Provider::Discover(_));
    let engine = config.pools.iter().any(needs_one).then(|| Engine::new(host, config.docker.timeout));
    engine.transpose().map_err(StartError::Docker)
}

fn open_log(log: &config::AccessLog) -> Result<Log, StartError> {
    AccessLog::open(&log.path, log.format).map_err(|error| StartError::AccessLog { path: log.path.clone(), error })
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

/// Ready once every pool has had a healthy backend. A reload may change which pools there are.
async fn become_ready(state: Arc<State>) {
    let mut have_had_one = HashSet::new();
    loop {
        let view = state.view();
        let of_now = view.pools.iter().filter(|pool| pool.table.load().any_healthy());
        have_had_one.extend(of_now.map(|pool| Arc::clone(&pool.pool)));
        if view.pools.iter().all(|pool| have_had_one.contains(&pool.pool)) {
            break;
        }
        let mut changes = tokio::task::JoinSet::new();
        for pool in view.pools.iter().filter(|pool| !have_had_one.contains(&pool.pool)) {
            let mut changes_of_pool = pool.table.watch();
            let table = pool.table.clone();
            changes
                .spawn(async move { while !table.load().any_healthy() && changes_of_pool.changed().await.is_ok() {} });
        }
        let _ = tokio::time::timeout(NEW_VIEW, changes.join_next()).await;
    }
    if !state.ready.swap(true, Ordering::Relaxed) {
        tracing::info!(after = ?state.started.elapsed(), "ready");
    }
}

async fn upkeep(state: Arc<State>) {
    let mut interval = tokio::time::interval(UPKEEP);
    loop {
        interval.tick().await;
        state.exporter.upkeep();
    }
}
