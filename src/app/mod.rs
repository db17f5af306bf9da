//! The only wiring place: turns a config into listeners, workers, replicas and a side port, changes them while they
//! run, and shuts them down in order. Each part gets a small settings struct; no part knows the config.
//!
//! # Layout
//!
//! - this file: the start of the app; [`run`]: serving, commands and shutdown
//! - [`pools`], [`listeners`]: the parts, and how they start, change and end; [`context`]: what pools start with; [`bound`]: the
//!   sockets of listeners
//! - [`tasks`]: the tasks of the control plane; [`threads`]: the threads that they run on
//! - [`provider`]: where the backends of a pool come from, one file for each kind
//! - [`access`]: who may change something by the side port; [`readiness`]: when `/readyz` succeeds
//! - [`settings`]: from the config to the settings of the parts; [`mod@capacity`]: how many connections and pipes fit
//! - [`commands`]: the effect of run-time commands; [`mod@rebalance`], [`mod@rollout`] and
//!   [`mod@reload_commands`]: those of `rebalance`, `rollout`, and `reload` and `check`
//! - [`reload`]: from one config to another; [`outlook`]: what that changes; [`changes`]: run-time changes, kept beside the config
//! - [`offline`]: the listeners and pools of a config that does not run; [`mod@probe`]: whether it could run on this machine
//! - [`upgrade`], [`inheritance`]: from one process to another, as the old and as the new process; [`connections`]: how open
//!   connections follow
//! - [`service_manager`]: notifications to systemd; [`error`]: why the app could not start, or ended early

mod access;
mod bound;
mod capacity;
mod changes;
mod commands;
mod config_watch;
mod connections;
mod context;
mod error;
mod inheritance;
mod listeners;
mod log_commands;
mod offline;
mod outlook;
mod pools;
mod probe;
mod provider;
mod readiness;
mod rebalance;
mod reload;
mod reload_commands;
mod rollout;
mod run;
mod service_manager;
mod settings;
mod tasks;
mod threads;
mod upgrade;

use std::collections::HashMap;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::AbortOnDropHandle;

use self::bound::{Bound, SidePort};
use self::capacity::capacity;
use self::changes::Changes;
use self::context::PoolContext;
pub use self::error::{RunError, StartError};
pub use self::inheritance::{Inheritance, TAKE_OVER, report_failure};
use self::listeners::Listener;
pub use self::offline::Offline;
use self::pools::Pool;
pub use self::probe::{Finding, probe};
use self::tasks::Tasks;
use self::upgrade::Ready;
use crate::address::Address;
use crate::api::{self, LogView, State, View};
use crate::config::{self, Config};
use crate::control::command::{CommandSender, PendingCommand};
use crate::control::docker::credentials;
use crate::control::docker::engine::Engine;
use crate::control::supervisor::handover::Handed;
use crate::control::supervisor::process::let_go;
use crate::events::Events;
use crate::lossy_writer::LostLines;
use crate::metrics::Exporter;
use crate::proxy::access_log::{AccessLog, FlushGuard};
use crate::proxy::{Intercept, Proxy, WorkersEnded};

/// From SIGTERM to SIGKILL for a replica that was taken over and is of no pool.
const UNWANTED_GRACE: Duration = Duration::from_secs(5);

/// Time between two folds of recorded durations into histogram buckets.
const UPKEEP: Duration = Duration::from_secs(5);

/// What the app needs in addition to the config.
#[derive(Debug, Clone)]
pub struct Environment {
    /// Where the config comes from; a reload reads it again.
    pub source: config::Source,
    /// The Ringway binary, which launches replicas and a successor.
    pub executable: PathBuf,
    /// The arguments of a successor, [`TAKE_OVER`] among them.
    pub arguments: Vec<OsString>,
    /// Soft limit on open files that replicas get; `None`: Ringway's own.
    pub replica_open_files: Option<u64>,
    /// The value of `DOCKER_HOST`: the address of the Docker engine.
    pub docker_host: Option<String>,
    /// The token of the side port, unless the config names a file with it. Calls that change something need it.
    pub token: Option<String>,
    /// Counts lines that did not reach the log; `None`: nobody counts them.
    pub log_lost: Option<LostLines>,
    /// The last events of this process.
    pub events: Arc<Events>,
    /// What the log shows; `None`: nobody can change it.
    pub log_filter: Option<Arc<dyn LogFilter>>,
}

/// What a log shows, which a command can change.
pub trait LogFilter: std::fmt::Debug + Send + Sync {
    /// The filter at the start.
    fn first(&self) -> &str;

    /// Whether this is a filter.
    ///
    /// # Errors
    /// What is wrong with the text, and the remedy.
    fn check(&self, filter: &str) -> Result<(), String>;

    /// Changes the filter; `None`: as at the start. Does nothing if `check` refuses the text.
    fn set(&self, filter: Option<&str>);
}

/// A started app. Dropping it ends replicas and side port at once; the workers drain while the process lives.
pub struct App {
    environment: Environment,
    /// The config as in its file.
    file: Arc<Config>,
    changes: Changes,
    /// The running config: the file with the run-time changes applied.
    config: Arc<Config>,
    engine: Option<Engine>,
    state: Arc<State>,
    proxy: Proxy,
    pools: Vec<Pool>,
    listeners: Vec<Listener>,
    intercept: Intercept,
    access_log: Option<Log>,
    api_address: SocketAddr,
    /// The socket of the side port.
    api_socket: Option<SidePort>,
    /// Listeners that are not open yet, because the predecessor still serves.
    bound: Vec<Bound>,
    inheritance: Inheritance,
    /// Set to true when the predecessor has exited.
    settled: Option<watch::Sender<bool>>,
    is_settled: watch::Receiver<bool>,
    /// The successor that serves.
    successor: Option<Ready>,
    /// Copies of the handles of the replicas that were handed over. The replicas live as long as one process has them, so
    /// they outlive a successor that fails.
    handed_over: Vec<Handed>,
    /// Docker pools that are being removed, by name, with what stops their supervisors.
    retiring: Vec<(String, CancellationToken)>,
    commands: mpsc::Receiver<PendingCommand>,
    /// Ends a change of the log's filter.
    log_ends: Option<AbortOnDropHandle<()>>,
    /// A filter of the log that a command has set, and when it ends.
    log_changed: Option<(String, Option<Instant>)>,
    /// Hear of workers that end, and of tasks that panic.
    trouble: Option<(WorkersEnded, mpsc::UnboundedReceiver<()>)>,
    /// Ends before `ready` becomes false, or it could set `ready` again.
    becoming_ready: Option<AbortOnDropHandle<()>>,
    /// Watches the config, with these settings.
    watching: Option<(config::ConfigWatch, AbortOnDropHandle<()>)>,
    tried: config_watch::Tried,
    tasks: Tasks,
    /// Stops the supervisors when the app is dropped.
    _stop_replicas: DropGuard,
}

impl std::fmt::Debug for App {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("App").field("api_address", &self.api_address).finish_non_exhaustive()
    }
}

/// The access log, and the guard that flushes its queue when the app ends.
type Log = (AccessLog, FlushGuard);

impl App {
    /// Binds everything, then starts workers, replicas and checks. The control plane runs on the current
    /// runtime, which must live on one thread: replicas die with the thread that started them.
    ///
    /// # Errors
    /// When anything that the config asks for is missing. Then nothing keeps running.
    pub async fn start(
        file: Config,
        environment: Environment,
        mut inheritance: Inheritance,
    ) -> Result<Self, StartError> {
        let mut environment = environment;
        // What is written from now on is a change.
        let tried = file.config_watch.map_or(0, |_| environment.source.watched(&[]).1);
        environment.replica_open_files = inheritance.open_files.or(environment.replica_open_files);
        let (settled, is_settled) = watch::channel(!inheritance.takes_over());
        let changes = inheritance.changes(&file);
        let changes = changes.pruned(&changes.over(&file));
        let config = changes.over(&file);
        let workers = workers(&config);
        let capacity = capacity(&config, workers)?;
        capacity.warn();
        let exporter = Exporter::new()?;
        let guard = access::guard(&config.api, environment.token.as_deref())?;

        let engine = engine(&config, environment.docker_host.as_deref())?;
        reload::check_together(&config)?;
        let (tasks, panics) = Tasks::start().map_err(StartError::Threads)?;
        let (named, refused) = inheritance.known();
        let context = PoolContext {
            config: &config,
            engine: engine.as_ref(),
            environment: &environment,
            exporter: &exporter,
            named: &named,
            refused: &refused,
            is_start: true,
            stop_replicas: &tasks.stop_replicas,
            settled: is_settled.clone(),
        };
        let prepared = config.pools.iter().map(|pool| {
            // `let_go` below stops the replicas of a pool that does not supervise processes any more.
            let replicas =
                if provider::takes_over(&pool.provider) { inheritance.replicas(&pool.name) } else { Vec::new() };
            let (key_path, changes, context) = (format!("pools[{}]", pool.name), changes.get(&pool.name), &context);
            async move { pools::prepare(&key_path, pool, &changes, replicas, context).await }
        });
        // Side by side: each may wait for a name server.
        let prepared = try_join_all(prepared.collect::<Vec<_>>()).await?;
        let inherited = inheritance.sockets(inheritance::SIDE_PORT, &config.api.listen.into(), None)?;
        let api_socket = bound::side_port(&config, inherited)?;
        let api_address = api_socket.address().unwrap_or(config.api.listen);
        let mut bound = Vec::new();
        for listener in &config.listeners {
            let (key_path, own) = (format!("listeners[{}]", listener.name), inheritance.addresses());
            let inherited =
                |address: &Address| inheritance.sockets(&listener.name, address, listener.interface.as_deref());
            bound.push(bound::bind(&key_path, listener, &config, workers, inherited, &own)?);
        }
        inheritance.close_leftovers();
        let access_log = config.access_log.as_ref().map(open_log).transpose()?;

        let proxy = settings::proxy(&config, workers, &capacity);
        let (proxy, workers_ended) = Proxy::start(proxy).map_err(StartError::Threads)?;
        let (intercept, intercepted) = api::on_listener::intercept();
        let (sender, commands) = CommandSender::new();
        let settings = settings::side_port(&config.api, &environment, guard, &tasks);
        let state = Arc::new(State::new(exporter, sender, &proxy, settings));
        let pools: Vec<_> = prepared.into_iter().map(|pool| pool.start(&tasks)).collect();
        for replica in std::mem::take(&mut inheritance.replicas) {
            tasks.spawn(let_go(replica, is_settled.clone(), UNWANTED_GRACE));
        }
        tasks.spawn_side_port(api::on_listener::answer(Arc::clone(&state), intercepted));
        tasks.spawn_side_port(upkeep(Arc::clone(&state)));
        tasks.spawn_side_port(api::history::record(Arc::clone(&state)));
        let guard = tasks.stop_replicas.clone().drop_guard();
        let mut app = Self {
            environment,
            file: Arc::new(file),
            changes,
            config: Arc::new(config),
            engine,
            becoming_ready: None,
            watching: None,
            tried: Arc::new(tried.into()),
            state,
            proxy,
            pools,
            listeners: Vec::new(),
            intercept,
            access_log,
            api_address,
            api_socket: Some(api_socket),
            bound,
            inheritance,
            commands,
            log_ends: None,
            log_changed: None,
            trouble: Some((workers_ended, panics)),
            tasks,
            retiring: Vec::new(),
            settled: Some(settled),
            is_settled,
            successor: None,
            handed_over: Vec::new(),
            _stop_replicas: guard,
        };
        if !app.inheritance.takes_over() {
            app.open();
        }
        app.show();
        app.becoming_ready =
            Some(AbortOnDropHandle::new(tokio::spawn(readiness::become_ready(Arc::clone(&app.state)))));
        Ok(app)
    }

    /// Opens the listeners.
    fn open(&mut self) {
        let routes = pools::routes(&self.pools);
        let context = listeners::ListenerContext {
            config: &self.config,
            routes: &routes,
            exporter: &self.state.exporter,
            intercept: &self.intercept,
            access_log: self.access_log.as_ref().map(|(log, _)| log),
            workers: self.state.workers.len(),
        };
        for (listener, bound) in std::iter::zip(&self.config.listeners, self.bound.drain(..)) {
            self.listeners.push(Listener::open(bound, listener, &context, &mut self.proxy));
        }
    }

    /// The state that the side port shows, with the real addresses of listeners.
    pub fn state(&self) -> &Arc<State> {
        &self.state
    }

    /// The bound address of the side port.
    pub fn api_address(&self) -> SocketAddr {
        self.api_address
    }

    /// Updates the view of the side port.
    fn show(&self) {
        let configured: HashMap<&str, &config::Pool> =
            self.file.pools.iter().map(|pool| (pool.name.as_str(), pool)).collect();
        let differs = |pool: &Pool| {
            let known = configured.get(pool.config().name.as_str());
            known.map_or(Vec::new(), |known| self.changes.get(&known.name).differs(known))
        };
        self.state.show(View {
            listeners: self.listeners.iter().map(Listener::view).collect(),
            pools: self.pools.iter().map(|pool| pool.route.clone()).collect(),
            providers: self.pools.iter().map(|pool| pool.provider.clone()).collect(),
            differs: self.pools.iter().map(differs).collect(),
            tcp: self.config.tcp,
            per_backend: self.config.metrics.per_backend,
            config: self.environment.source.path(),
            access_log_lost: self.access_log.as_ref().map(|(log, _)| log.lost()),
            log_lost: self.environment.log_lost.clone(),
            log: self
                .environment
                .log_filter
                .as_ref()
                .map(|log| LogView { first: log.first().to_owned(), changed: self.log_changed.clone() }),
        });
    }
}

/// The number of worker threads.
fn workers(config: &Config) -> usize {
    config.workers.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// The Docker engine, if a pool needs one.
fn engine(config: &Config, host: Option<&str>) -> Result<Option<Engine>, StartError> {
    let needs_engine = config.pools.iter().any(|pool| pool.provider.needs_engine());
    if !needs_engine {
        return Ok(None);
    }
    let auth_file = config.docker.auth_file.as_deref();
    auth_file.map_or(Ok(()), credentials::check).map_err(|problem| {
        let key_path = "docker.auth_file".to_owned();
        StartError::Unfit { key_path, problem }
    })?;
    let engine = Engine::new(host, config.docker.timeout).map_err(StartError::Docker)?;
    Ok(Some(engine.with_auth_file(auth_file)))
}

fn open_log(log: &config::AccessLog) -> Result<Log, StartError> {
    AccessLog::open(&log.path, log.format).map_err(|error| StartError::AccessLog { path: log.path.clone(), error })
}

async fn upkeep(state: Arc<State>) {
    let mut interval = tokio::time::interval(UPKEEP);
    loop {
        interval.tick().await;
        state.exporter.upkeep();
    }
}
