//! The side port: status, commands, forwarded requests, metrics and health of Ringway itself, over HTTP/1.1.
//!
//! # Layout
//!
//! - this file: the shared state of the routes, and the routes
//! - [`status`] answers `/api/status` on the side port; [`on_listener`] on listeners with `answer_status`
//! - [`explain`] answers `/api/explain`: why a connection goes to its backend
//! - [`sessions`] lists and ends open connections
//! - [`page`]: the page for people; [`stream`], [`history`], [`events`]: what it shows; [`openapi`]: the description of all calls
//! - [`request`] answers `/api/request`
//! - [`commands`]: run-time commands as HTTP calls; [`guard`] decides who may call what
//! - [`scrape`] answers `/metrics` with the text of [`exposition`]
//! - [`server`]: the HTTP server with its limits; [`error`]: errors as JSON

pub mod commands;
pub mod events;
pub mod explain;
pub mod history;
pub mod on_listener;
pub mod sessions;
pub mod status;

mod error;
mod exposition;
mod guard;
mod openapi;
mod page;
mod request;
mod scrape;
mod server;
mod stream;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use axum::Router;
use axum::extract::State as Extract;
use axum::http::{Method, StatusCode, Uri};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use self::error::Error;
pub use self::guard::Guard;
use self::history::History;
pub use self::server::{Limits, serve};
use crate::address::Address;
use crate::control::command::{CommandSender, Differs};
use crate::control::provider::ProviderStatus;
use crate::control::supervisor::rollout::RolloutStatus;
use crate::control::supervisor::scaling::ScalingStatus;
use crate::events::Events;
use crate::label_enum;
use crate::labels::Tally;
use crate::lossy_writer::LostLines;
use crate::metrics::{Exporter, PerBackend};
use crate::proxy::sessions::Sessions;
use crate::proxy::socket::TcpOptions;
use crate::proxy::stats::ListenerStats;
use crate::proxy::stats::WorkerStats;
use crate::proxy::{Limit, Proxy, Route, Routing, Sources};
pub use crate::text::encoded;

label_enum! {
    /// Result of a reload or an upgrade.
    pub enum Outcome {
        /// It took effect.
        Ok => "ok",
        /// Nothing has changed.
        Failed => "failed",
    }
}

/// The part of the running app that the routes read.
#[derive(Debug)]
pub struct State {
    /// When the app started.
    pub started: Instant,
    /// True once every pool has had a healthy backend; false again while Ringway stops.
    pub ready: AtomicBool,
    /// Counters of each worker, in the order of the workers.
    pub workers: Vec<Arc<WorkerStats>>,
    /// Holds the histograms.
    pub exporter: Exporter,
    /// Limit on the connections of the whole process.
    pub limit: Arc<Limit>,
    /// The open connections.
    pub sessions: Sessions,
    /// The last events of this process.
    pub events: Arc<Events>,
    /// What pools and backends did lately; `None`: off.
    pub history: Option<Arc<History>>,
    /// Cancelled when the side port ends, because Ringway stops or a successor has taken over: streams end.
    pub stopping: CancellationToken,
    has_page: bool,
    /// For the clients that follow the status.
    streams: Arc<Semaphore>,
    frames: stream::Frames,
    /// For the one explanation at a time.
    explaining: Arc<Semaphore>,
    /// Reloads so far.
    pub reloads: Tally<Outcome>,
    /// Why the last reload of the config file failed or was held; `None`: it was applied.
    pub config_error: ArcSwapOption<String>,
    /// Upgrades so far, failed ones included.
    pub upgrades: Tally<Outcome>,
    /// The runtimes of the control plane, with their names.
    runtimes: Vec<(&'static str, Handle)>,
    /// The last answer to a scrape.
    scrape: scrape::Shared,
    guard: Guard,
    commands: CommandSender,
    view: ArcSwap<View>,
}

/// Settings of the side port.
#[derive(Debug)]
pub struct Settings {
    /// Who may call what.
    pub guard: Guard,
    /// The runtimes of the control plane, with their names.
    pub runtimes: Vec<(&'static str, Handle)>,
    /// The last events of this process.
    pub events: Arc<Events>,
    /// Whether Ringway keeps a history of pools and backends.
    pub has_history: bool,
    /// Whether there is a page for people.
    pub has_page: bool,
}

impl State {
    /// The state of an app without listeners and pools.
    pub fn new(exporter: Exporter, commands: CommandSender, proxy: &Proxy, settings: Settings) -> Self {
        let Settings { guard, runtimes, events, has_history, has_page } = settings;
        Self {
            started: Instant::now(),
            ready: AtomicBool::new(false),
            workers: proxy.workers(),
            exporter,
            limit: Arc::clone(proxy.limit()),
            sessions: proxy.sessions(),
            events,
            history: has_history.then(Arc::default),
            stopping: CancellationToken::new(),
            has_page,
            streams: Arc::new(Semaphore::new(stream::MOST)),
            frames: stream::Frames::default(),
            explaining: Arc::new(Semaphore::new(1)),
            reloads: Tally::default(),
            config_error: ArcSwapOption::empty(),
            upgrades: Tally::default(),
            runtimes,
            scrape: scrape::Shared::default(),
            guard,
            commands,
            view: ArcSwap::from_pointee(View::default()),
        }
    }

    /// Whether somebody can see the page.
    pub fn shows_page(&self) -> bool {
        self.has_page && !self.guard.is_read_only()
    }

    /// Sends commands to the app.
    pub fn commands(&self) -> &CommandSender {
        &self.commands
    }

    /// The current listeners and pools.
    pub fn view(&self) -> Arc<View> {
        self.view.load_full()
    }

    /// Replaces the current listeners and pools.
    pub fn show(&self, view: View) {
        self.view.store(Arc::new(view));
    }
}

/// Listeners and pools under one config.
#[derive(Debug)]
pub struct View {
    /// In the order of the config.
    pub listeners: Vec<ListenerView>,
    /// In the order of the config.
    pub pools: Vec<Route>,
    /// Where their backends come from, in the same order.
    pub providers: Vec<ProviderView>,
    /// What of them was changed at run time, in the same order.
    pub differs: Vec<Vec<Differs>>,
    /// Options of sockets towards backends.
    pub tcp: TcpOptions,
    /// Which metrics each backend has.
    pub per_backend: PerBackend,
    /// The path of the config file; `None`: the built-in config.
    pub config: Option<PathBuf>,
    /// Counts lines that the access log dropped.
    pub access_log_lost: Option<LostLines>,
    /// Counts lines that the log dropped.
    pub log_lost: Option<LostLines>,
    /// What the log shows; `None`: nobody can change it.
    pub log: Option<LogView>,
}

/// What the log shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogView {
    /// The filter at the start.
    pub first: String,
    /// Another filter, and when the first one applies again; `None`: never.
    pub changed: Option<(String, Option<Instant>)>,
}

impl Default for View {
    fn default() -> Self {
        Self {
            listeners: Vec::new(),
            pools: Vec::new(),
            providers: Vec::new(),
            differs: Vec::new(),
            tcp: TcpOptions::default(),
            per_backend: PerBackend::Full,
            config: None,
            access_log_lost: None,
            log_lost: None,
            log: None,
        }
    }
}

/// A pool's provider as the side port shows it.
#[derive(Debug, Clone)]
pub struct ProviderView {
    /// `static`, `process`, `docker`, `dns` or `file`.
    pub kind: &'static str,
    /// The state of what the provider depends on.
    pub status: ProviderStatus,
    /// The rollouts of a pool with replicas.
    pub rollout: Option<Arc<RolloutStatus>>,
    /// How a pool with replicas scales by itself.
    pub scaling: Option<Arc<ScalingStatus>>,
}

/// A listener as the side port shows it.
#[derive(Debug, Clone)]
pub struct ListenerView {
    /// Its name in the config.
    pub name: Arc<str>,
    /// The first bound address, with the real port.
    pub address: Address,
    /// All of them in the form of the config: `0.0.0.0:5000-5149`.
    pub addresses: String,
    /// Its routes.
    pub routing: Arc<Routing>,
    /// Counters.
    pub stats: Arc<ListenerStats>,
    /// Limit on its connections.
    pub limit: Arc<Limit>,
    /// The counts of source addresses, if their limits are on or have been on.
    pub sources: Option<Arc<Sources>>,
}

impl ListenerView {
    /// The pool of the last rule, which takes what no other rule takes; `None`: those connections are reset.
    pub fn default_pool(&self) -> Option<&str> {
        let rule = self.routing.rules.last()?;
        Some(&self.routing.routes[rule.route?].pool)
    }

    /// The default pool, or that of the first route.
    pub fn main_pool(&self) -> Option<&str> {
        self.default_pool().or_else(|| self.routing.routes.first().map(|route| &*route.pool))
    }
}

/// Every route of the side port.
pub fn router(state: Arc<State>) -> Router {
    let request = post(request::forward).route_layer(from_fn_with_state(Arc::clone(&state), guard::requests));
    let reads = Router::new()
        .route("/api/status", get(status::status))
        .route("/api/explain", get(explain::get))
        .route("/api/openapi.json", get(openapi::get))
        .route_layer(from_fn_with_state(Arc::clone(&state), guard::reads));
    // They tell who connects, so they need the rights of a change.
    let private = Router::new()
        .route("/api/events", get(events::get))
        .route("/api/history", get(history::get))
        .route("/api/stream", get(stream::get))
        .route_layer(from_fn_with_state(Arc::clone(&state), guard::changes));
    let mut router = Router::new()
        .route("/api/request", request)
        .merge(reads)
        .merge(private)
        .merge(commands::routes(&state))
        .merge(sessions::routes(&state))
        .route("/metrics", get(scrape::metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready));
    if state.has_page {
        router = router.merge(page::routes(&state));
    }
    router.fallback(not_found).method_not_allowed_fallback(not_allowed).with_state(state)
}

/// The query with these parameters, of those that have a value.
fn query(parameters: &[(&str, &Option<String>)]) -> String {
    let given = parameters.iter().filter_map(|(name, value)| Some(format!("{name}={}", encoded(value.as_deref()?))));
    given.collect::<Vec<_>>().join("&")
}

async fn ready(Extract(state): Extract<Arc<State>>) -> Response {
    if state.ready.load(Ordering::Relaxed) {
        return "ready\n".into_response();
    }
    let message = "Ringway is stopping, or a pool has not had a healthy backend yet";
    Error::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", message).into_response()
}

async fn not_found(uri: Uri) -> Error {
    let known = "/, /api/openapi.json (which describes all calls), /metrics, /healthz, /readyz";
    Error::new(StatusCode::NOT_FOUND, "not_found", format!("unknown path {}; known paths: {known}", uri.path()))
}

/// The router adds the header `allow`.
async fn not_allowed(method: Method, uri: Uri) -> Error {
    let message = format!("{} does not support {method}; the `allow` header lists the supported methods", uri.path());
    Error::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}
