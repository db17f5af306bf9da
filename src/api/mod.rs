//! The side port: status, forwarded requests, metrics and health of Ringway itself, over HTTP/1.1.
//!
//! # Layout
//!
//! - this file: what the routes see, and the routes
//! - [`status`] answers `/api/status`, and the same on a listener that answers it
//! - [`request`] answers `/api/request`
//! - [`scrape`] answers `/metrics`
//! - [`error`]: errors as JSON

pub mod status;

mod error;
mod request;
mod scrape;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use axum::Router;
use axum::extract::{DefaultBodyLimit, State as Extract};
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};

use self::error::Error;
use crate::control::docker::watch::Freshness;
use crate::metrics::Exporter;
use crate::proxy::Route;
use crate::proxy::access_log::LostLines;
use crate::proxy::socket::TcpOptions;
use crate::proxy::stats::ListenerStats;
use crate::proxy::stats::WorkerStats;

/// Longest body of a request to the side port.
const BODY_LIMIT: usize = 1024 * 1024;

/// What the routes see of the running app.
#[derive(Debug)]
pub struct State {
    /// When the app started.
    pub started: Instant,
    /// True once every pool has had a healthy backend, false again while stopping.
    pub ready: AtomicBool,
    /// In the config's order.
    pub listeners: Vec<ListenerView>,
    /// In the config's order.
    pub pools: Vec<Route>,
    /// Where their backends come from, in the same order.
    pub providers: Vec<ProviderView>,
    /// Options of sockets towards backends.
    pub tcp: TcpOptions,
    /// In the workers' order.
    pub workers: Vec<Arc<WorkerStats>>,
    /// Renders the metrics.
    pub exporter: Exporter,
    /// Counts lines that did not get into the access log.
    pub access_log_lost: Option<LostLines>,
    /// Connections of the whole process.
    pub max_connections: usize,
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
}

/// Every route of the side port.
pub fn router(state: Arc<State>) -> Router {
    Router::new()
        .route("/api/request", post(request::forward))
        .route("/api/status", get(status::status))
        .route("/metrics", get(scrape::metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .fallback(not_found)
        .method_not_allowed_fallback(not_allowed)
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(state)
}

async fn ready(Extract(state): Extract<Arc<State>>) -> Response {
    if state.ready.load(Ordering::Relaxed) {
        return "ready\n".into_response();
    }
    let message = "stopping, or a pool has had no healthy backend yet";
    Error::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", message).into_response()
}

async fn not_found(uri: Uri) -> Error {
    let known = "/api/request, /api/status, /metrics, /healthz, /readyz";
    Error::new(StatusCode::NOT_FOUND, "not_found", format!("there is no {}; there are {known}", uri.path()))
}

/// The router adds the header `allow`.
async fn not_allowed(method: Method, uri: Uri) -> Error {
    let message = format!("{} does not take {method}; see the header allow", uri.path());
    Error::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}
