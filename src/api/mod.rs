//! The side port: status, forwarded requests, metrics and health of Ringway itself, over HTTP/1.1.
//!
//! # Layout
//!
//! - this file: what the routes see, and the routes
//! - [`status`] answers `/api/status`, and the same on a listener that answers it
//! - [`request`] answers `/api/request`
//! - [`orders`] answers what changes something, [`guard`] says who may
//! - [`scrape`] answers `/metrics`
//! - [`error`]: errors as JSON

pub mod status;

mod error;
mod guard;
mod orders;
mod request;
mod scrape;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use axum::Router;
use axum::extract::{DefaultBodyLimit, State as Extract};
use axum::http::{Method, StatusCode, Uri};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{delete, get, post};

use arc_swap::ArcSwap;

use self::error::Error;
pub use self::guard::Guard;
use crate::control::docker::watch::Freshness;
use crate::control::operator::{Differs, Operator};
use crate::label_enum;
use crate::labels::Tally;
use crate::metrics::Exporter;
use crate::proxy::access_log::LostLines;
use crate::proxy::socket::TcpOptions;
use crate::proxy::stats::ListenerStats;
use crate::proxy::stats::WorkerStats;
use crate::proxy::{Limit, Proxy, Route, Sources};

/// Longest body of a request to the side port.
const BODY_LIMIT: usize = 1024 * 1024;

label_enum! {
    /// How a reload or an upgrade came out.
    pub enum Outcome {
        /// It is in force.
        Ok => "ok",
        /// Nothing has changed.
        Failed => "failed",
    }
}

/// What the routes see of the running app.
#[derive(Debug)]
pub struct State {
    /// When the app started.
    pub started: Instant,
    /// True once every pool has had a healthy backend, false again while stopping.
    pub ready: AtomicBool,
    /// In the workers' order.
    pub workers: Vec<Arc<WorkerStats>>,
    /// Renders the metrics.
    pub exporter: Exporter,
    /// Connections of the whole process.
    pub limit: Arc<Limit>,
    /// Reloads so far.
    pub reloads: Tally<Outcome>,
    /// Tries to hand over to a successor so far.
    pub upgrades: Tally<Outcome>,
    guard: Guard,
    operator: Operator,
    view: ArcSwap<View>,
}

impl State {
    /// Of an app that has nothing to show yet.
    pub fn new(exporter: Exporter, guard: Guard, operator: Operator, proxy: &Proxy) -> Self {
        Self {
            started: Instant::now(),
            ready: AtomicBool::new(false),
            workers: proxy.workers(),
            exporter,
            limit: Arc::clone(proxy.limit()),
            reloads: Tally::default(),
            upgrades: Tally::default(),
            guard,
            operator,
            view: ArcSwap::from_pointee(View::default()),
        }
    }

    /// Who gives orders to the app.
    pub fn operator(&self) -> &Operator {
        &self.operator
    }

    /// Listeners and pools of this moment.
    pub fn view(&self) -> Arc<View> {
        self.view.load_full()
    }

    /// Shows these from now on.
    pub fn show(&self, view: View) {
        self.view.store(Arc::new(view));
    }
}

/// Listeners and pools as the config of a moment has them.
#[derive(Debug, Default)]
pub struct View {
    /// In the config's order.
    pub listeners: Vec<ListenerView>,
    /// In the config's order.
    pub pools: Vec<Route>,
    /// Where their backends come from, in the same order.
    pub providers: Vec<ProviderView>,
    /// What of them was changed at run time, in the same order.
    pub differs: Vec<Vec<Differs>>,
    /// Options of sockets towards backends.
    pub tcp: TcpOptions,
    /// Counts lines that did not get into the access log.
    pub access_log_lost: Option<LostLines>,
}

/// Where a pool's backends come from, as the side port shows it.
#[derive(Debug, Clone)]
pub struct ProviderView {
    /// `static`, `process` or `docker`.
    pub kind: &'static str,
    /// How fresh the view of the engine is, where there is one.
    pub freshness: Option<Arc<Freshness>>,
}

/// A listener as the side port shows it.
#[derive(Debug, Clone)]
pub struct ListenerView {
    /// Its name in the config.
    pub name: Arc<str>,
    /// Where it really listens.
    pub address: SocketAddr,
    /// The pool behind it.
    pub pool: Arc<str>,
    /// Counters.
    pub stats: Arc<ListenerStats>,
    /// Connections that it may have.
    pub limit: Arc<Limit>,
    /// What one source address may do, if that is limited.
    pub sources: Option<Arc<Sources>>,
}

/// Every route of the side port.
pub fn router(state: Arc<State>) -> Router {
    Router::new()
        .route("/api/request", post(request::forward))
        .route("/api/status", get(status::status))
        .merge(changes(&state))
        .route("/metrics", get(scrape::metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .fallback(not_found)
        .method_not_allowed_fallback(not_allowed)
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(state)
}

/// The routes that change something.
fn changes(state: &Arc<State>) -> Router<Arc<State>> {
    Router::new()
        .route("/api/pools/{pool}/backends", post(orders::add))
        .route("/api/pools/{pool}/backends/{backend}", delete(orders::remove))
        .route("/api/pools/{pool}/backends/{backend}/drain", post(orders::drain))
        .route("/api/pools/{pool}/backends/{backend}/undrain", post(orders::undrain))
        .route("/api/pools/{pool}/backends/{backend}/weight", post(orders::weight))
        .route("/api/pools/{pool}/scale", post(orders::scale))
        .route("/api/reload", post(orders::reload))
        .route("/api/upgrade", post(orders::upgrade))
        .route_layer(from_fn_with_state(Arc::clone(state), guard::guard))
}

async fn ready(Extract(state): Extract<Arc<State>>) -> Response {
    if state.ready.load(Ordering::Relaxed) {
        return "ready\n".into_response();
    }
    let message = "stopping, or a pool has had no healthy backend yet";
    Error::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", message).into_response()
}

async fn not_found(uri: Uri) -> Error {
    let known = "/api/request, /api/status, /api/reload, /api/upgrade, /api/pools/POOL/…, /metrics, /healthz, /readyz";
    Error::new(StatusCode::NOT_FOUND, "not_found", format!("there is no {}; there are {known}", uri.path()))
}

/// The router adds the header `allow`.
async fn not_allowed(method: Method, uri: Uri) -> Error {
    let message = format!("{} does not take {method}; see the header allow", uri.path());
    Error::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}
