//! `POST /api/request`: forwards the request body to the backend that the ring picks for the caller.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{ConnectInfo, Query, State as Extract};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, HeaderName, HeaderValue};
use serde::Deserialize;

use super::error::Error;
use super::{State, View};
use crate::http_client::exchange;
use crate::labels::Label as _;
use crate::proxy::key::Key;
use crate::proxy::socket::TcpOptions;
use crate::proxy::stats::RefusalReason;
use crate::proxy::{self, Connected, Route};
use crate::proxy_header::OwnHeader;
use crate::stream::{Client, Stream};

/// Maximum time from the connect to the end of the backend's response.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Maximum size of a forwarded response in bytes.
const ANSWER_LIMIT: usize = 16 * 1024 * 1024;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Parameters {
    /// Key to hash instead of the caller's address.
    key: Option<String>,
    /// Name of the pool; the default is the pool of the first listener.
    pool: Option<String>,
}

pub(super) async fn forward(
    Extract(state): Extract<Arc<State>>,
    ConnectInfo(caller): ConnectInfo<SocketAddr>,
    parameters: Result<Query<Parameters>, QueryRejection>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, Error> {
    let Query(parameters) = parameters.map_err(|rejection| {
        let message = format!("{}: use only the parameters key and pool", rejection.body_text());
        Error::new(StatusCode::BAD_REQUEST, "bad_query", message)
    })?;
    let state = state.view();
    let pool = find_pool(&state, parameters.pool.as_deref())?;
    let address_key = Key::of(pool.key, Client::Ip(caller), None);
    let key = parameters.key.as_ref().map_or(address_key.as_bytes(), String::as_bytes);
    let Connected { backend, address, stream, permit: _permit } = connect(pool, &state.tcp, key).await?;
    // The id of a backend is a host, unless it is a path.
    let host = if address.ip().is_some() { &*backend } else { "localhost" };

    if pool.own_header != OwnHeader::Absent {
        // The request must not wait until the header is acknowledged.
        stream.set_nodelay();
    }
    let content_type =
        headers.get(CONTENT_TYPE).cloned().unwrap_or(HeaderValue::from_static("application/octet-stream"));
    let request = Request::post("/api/request")
        .header(HOST, host)
        .header(CONNECTION, "close")
        .header(CONTENT_TYPE, content_type)
        .body(Full::new(body))
        .map_err(|error| bad_gateway(&backend, &error))?;
    let answer = match tokio::time::timeout(ANSWER_TIMEOUT, exchange(stream, request, ANSWER_LIMIT)).await {
        Ok(answer) => answer.map_err(|error| bad_gateway(&backend, &error))?,
        Err(_elapsed) => {
            let message = format!("{backend} did not answer within {} s", ANSWER_TIMEOUT.as_secs());
            return Err(Error::new(StatusCode::GATEWAY_TIMEOUT, "backend_timeout", message));
        }
    };
    Ok(passed_on(&backend, answer))
}

fn find_pool<'a>(state: &'a View, wanted: Option<&str>) -> Result<&'a Route, Error> {
    let first = || state.listeners.first().and_then(|listener| listener.main_pool());
    let wanted = wanted.or_else(first).unwrap_or_default();
    state.pools.iter().find(|pool| &*pool.pool == wanted).ok_or_else(|| {
        let names: Vec<_> = state.pools.iter().map(|pool| &*pool.pool).collect();
        let message = format!("pool {wanted:?} does not exist; existing pools: {}", names.join(", "));
        Error::new(StatusCode::NOT_FOUND, "no_such_pool", message)
    })
}

/// Connects to the first backend in ring order that accepts, as the data plane does.
async fn connect(pool: &Route, tcp: &TcpOptions, key: &[u8]) -> Result<Connected, Error> {
    let header = |stream: &Stream| Cow::Owned(pool.own_header.bytes(|| stream.ends()));
    let want = proxy::Want { key, port: None, tcp };
    let connected = proxy::connect(pool, || pool.table.load(), want, header, &mut Vec::new()).await;
    connected.map_err(|reason| {
        let (status, what) = match reason {
            RefusalReason::NoBackend => (StatusCode::BAD_GATEWAY, "has no backend that accepts new connections"),
            RefusalReason::BackendsFull => {
                (StatusCode::SERVICE_UNAVAILABLE, "has no backend below its connection limit")
            }
            RefusalReason::WakeTimeout => {
                (StatusCode::SERVICE_UNAVAILABLE, "slept, and no backend was healthy in time")
            }
            RefusalReason::TooManyWaiting => {
                (StatusCode::SERVICE_UNAVAILABLE, "sleeps, and no more connections may wait for it")
            }
            // Only listeners have these reasons.
            RefusalReason::SourceConnections
            | RefusalReason::SourceRate
            | RefusalReason::ProxyUntrusted
            | RefusalReason::ProxyHeaderMissing
            | RefusalReason::ProxyHeaderInvalid
            | RefusalReason::ProxyHeaderTimeout
            | RefusalReason::Denied
            | RefusalReason::NotAllowed
            | RefusalReason::HelloInvalid
            | RefusalReason::HelloTooLarge
            | RefusalReason::HelloTimeout
            | RefusalReason::NoRoute => (StatusCode::FORBIDDEN, "refuses the request"),
            RefusalReason::ConnectFailed => (StatusCode::BAD_GATEWAY, "has no backend that could be reached"),
            RefusalReason::NoDescriptors => {
                (StatusCode::SERVICE_UNAVAILABLE, "cannot be reached because Ringway is out of file descriptors")
            }
        };
        Error::new(status, reason.as_str(), format!("pool {} {what}", pool.pool))
    })
}

fn bad_gateway(backend: &str, error: &dyn std::error::Error) -> Error {
    Error::new(StatusCode::BAD_GATEWAY, "bad_answer", format!("{backend}: {error}"))
}

/// Builds the response: the backend's status, body and content type, plus the backend's id in `x-ringway-backend`.
fn passed_on(backend: &str, answer: hyper::Response<Bytes>) -> Response {
    let (head, body) = answer.into_parts();
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = head.status;
    for name in [CONTENT_TYPE, HeaderName::from_static("x-server")] {
        if let Some(value) = head.headers.get(&name) {
            response.headers_mut().insert(name, value.clone());
        }
    }
    if let Ok(value) = HeaderValue::from_str(backend) {
        response.headers_mut().insert("x-ringway-backend", value);
    }
    response
}
