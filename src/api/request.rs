//! `POST /api/request`: forwards the body to the backend that the ring picks for the caller.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::extract::{ConnectInfo, Query, State as Extract};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, HeaderName, HeaderValue};
use serde::Deserialize;
use tokio::net::TcpStream;

use super::error::Error;
use super::{PoolView, State};
use crate::http_client::exchange;
use crate::proxy::key::Key;

/// Longest time from the backend's connect to the end of its answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest answer that is passed on.
const ANSWER_LIMIT: usize = 16 * 1024 * 1024;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Parameters {
    /// Hashed instead of the caller's address.
    key: Option<String>,
    /// Instead of the first listener's.
    pool: Option<String>,
}

pub(super) async fn forward(
    Extract(state): Extract<Arc<State>>,
    ConnectInfo(caller): ConnectInfo<SocketAddr>,
    parameters: Result<Query<Parameters>, QueryRejection>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Error> {
    let Query(parameters) = parameters.map_err(|rejection| {
        let message = format!("{}: takes ?key= and ?pool=", rejection.body_text());
        Error::new(StatusCode::BAD_REQUEST, "bad_query", message)
    })?;
    let body = body.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => {
            Error::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", "the body may have up to 1 MiB")
        }
        status => Error::new(status, "bad_body", rejection.body_text()),
    })?;
    let pool = find_pool(&state, parameters.pool.as_deref())?;
    let address_key = Key::of(pool.key, caller);
    let key = parameters.key.as_ref().map_or(address_key.as_bytes(), String::as_bytes);
    let (backend, stream) = connect(pool, key).await?;

    let content_type =
        headers.get(CONTENT_TYPE).cloned().unwrap_or(HeaderValue::from_static("application/octet-stream"));
    let request = Request::post("/api/request")
        .header(HOST, &*backend)
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

fn find_pool<'a>(state: &'a State, wanted: Option<&str>) -> Result<&'a PoolView, Error> {
    let first = state.listeners.first().map(|listener| &*listener.pool);
    let wanted = wanted.or(first).unwrap_or_default();
    state.pools.iter().find(|pool| &*pool.name == wanted).ok_or_else(|| {
        let names: Vec<_> = state.pools.iter().map(|pool| &*pool.name).collect();
        let message = format!("there is no pool {wanted:?}; there are: {}", names.join(", "));
        Error::new(StatusCode::NOT_FOUND, "no_such_pool", message)
    })
}

/// To the first backend of the walk that answers, as the data plane does it.
async fn connect(pool: &PoolView, key: &[u8]) -> Result<(Arc<str>, TcpStream), Error> {
    let table = pool.table.load();
    let (mut tried, mut all_late) = (0, true);
    for (backend, address) in table.candidates(key).take(pool.connect_attempts) {
        tried += 1;
        match tokio::time::timeout(pool.connect_timeout, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok((Arc::clone(&backend.id), stream)),
            Ok(Err(_)) => all_late = false,
            Err(_elapsed) => {}
        }
    }
    let name = &pool.name;
    Err(match (tried, all_late) {
        (0, _) => {
            Error::new(StatusCode::BAD_GATEWAY, "no_backend", format!("pool {name} has no backend at the moment"))
        }
        (_, true) => {
            let message = format!("none of {tried} backends of pool {name} took the connection in time");
            Error::new(StatusCode::GATEWAY_TIMEOUT, "connect_timeout", message)
        }
        (_, false) => {
            let message = format!("none of {tried} backends of pool {name} took the connection");
            Error::new(StatusCode::BAD_GATEWAY, "connect_failed", message)
        }
    })
}

fn bad_gateway(backend: &str, error: &dyn std::error::Error) -> Error {
    Error::new(StatusCode::BAD_GATEWAY, "bad_answer", format!("{backend}: {error}"))
}

/// The backend's status, body and type, and who it was.
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
