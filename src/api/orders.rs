//! Calls that change something: each becomes an order, and its answer is what came of it.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::extract::{Path, Query, State as Extract};
use axum::http::StatusCode;
use bytes::Bytes;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::State;
use super::error::Error;
use crate::control::operator::{Order, Refusal, Report};
use crate::control::provider::Listed;

/// Longest drain that may be asked for: a day, as in the config.
const LONGEST: f64 = 86_400.0;

type Body = Result<Bytes, BytesRejection>;
type Answer = Result<Json<Report>, Error>;
type InPool = Result<Path<String>, PathRejection>;
type OfBackend = Result<Path<(String, String)>, PathRejection>;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Drain {
    within_seconds: Option<f64>,
}

pub(super) async fn drain(Extract(state): Extract<Arc<State>>, path: OfBackend, body: Body) -> Answer {
    let (pool, backend) = parts(path)?;
    let Drain { within_seconds } = optional(body)?;
    let within = within_seconds.map(|seconds| {
        let fits = (0.0..=LONGEST).contains(&seconds);
        fits.then(|| Duration::from_secs_f64(seconds))
            .ok_or_else(|| invalid(format!("within_seconds: {seconds} is not between 0 and {LONGEST}")))
    });
    carry_out(&state, Order::Drain { pool, backend, within: within.transpose()? }).await
}

pub(super) async fn undrain(Extract(state): Extract<Arc<State>>, path: OfBackend) -> Answer {
    let (pool, backend) = parts(path)?;
    carry_out(&state, Order::Undrain { pool, backend }).await
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Weight {
    weight: u32,
}

pub(super) async fn weight(Extract(state): Extract<Arc<State>>, path: OfBackend, body: Body) -> Answer {
    let (pool, backend) = parts(path)?;
    let Weight { weight } = required(body)?;
    carry_out(&state, Order::Weight { pool, backend, weight }).await
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Add {
    address: String,
    id: Option<String>,
    #[serde(default = "one")]
    weight: u32,
}

fn one() -> u32 {
    1
}

pub(super) async fn add(Extract(state): Extract<Arc<State>>, path: InPool, body: Body) -> Answer {
    let Path(pool) = path.map_err(|rejection| invalid(rejection.body_text()))?;
    let Add { address, id, weight } = required(body)?;
    let id = id.unwrap_or_else(|| address.clone());
    let Some((host, port)) = Listed::host_and_port(&address) else {
        return Err(invalid(format!("address: {address:?} is not host:port, like 10.0.0.5:6379 or [::1]:6379")));
    };
    if id.is_empty() {
        return Err(invalid("id: is empty: give a name, or leave it out for the address".to_owned()));
    }
    carry_out(&state, Order::Add { pool, backend: Listed { id: id.into(), host, port, weight } }).await
}

pub(super) async fn remove(Extract(state): Extract<Arc<State>>, path: OfBackend) -> Answer {
    let (pool, backend) = parts(path)?;
    carry_out(&state, Order::Remove { pool, backend }).await
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Scale {
    replicas: u32,
}

pub(super) async fn scale(Extract(state): Extract<Arc<State>>, path: InPool, body: Body) -> Answer {
    let Path(pool) = path.map_err(|rejection| invalid(rejection.body_text()))?;
    let Scale { replicas } = required(body)?;
    carry_out(&state, Order::Scale { pool, replicas }).await
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HowToReload {
    #[serde(default)]
    dry_run: bool,
}

pub(super) async fn reload(
    Extract(state): Extract<Arc<State>>,
    how: Result<Query<HowToReload>, QueryRejection>,
    body: Body,
) -> Answer {
    let Query(HowToReload { dry_run }) =
        how.map_err(|rejection| invalid(format!("{}: takes ?dry_run=true", rejection.body_text())))?;
    let body = bytes(body)?;
    let text = (!body.is_empty()).then(|| String::from_utf8(body.to_vec()));
    let text = text.transpose().map_err(|_| invalid("the config is not UTF-8".to_owned()))?;
    if text.is_some() && !dry_run {
        let message = "a reload reads the file that Ringway was started with; a body is only for ?dry_run=true";
        return Err(invalid(message.to_owned()));
    }
    carry_out(&state, Order::Reload { text, is_dry_run: dry_run }).await
}

pub(super) async fn upgrade(Extract(state): Extract<Arc<State>>) -> Answer {
    carry_out(&state, Order::Upgrade).await
}

async fn carry_out(state: &State, order: Order) -> Answer {
    let report = state.operator.order(order).await.map_err(|refusal| {
        let message = refusal.to_string();
        match refusal {
            Refusal::NotFound(_) => Error::new(StatusCode::NOT_FOUND, "not_found", message),
            Refusal::Conflict(_) => Error::new(StatusCode::CONFLICT, "conflict", message),
            Refusal::Invalid(_) => invalid(message),
        }
    })?;
    Ok(Json(report))
}

fn parts(path: OfBackend) -> Result<(String, String), Error> {
    path.map(|Path(parts)| parts).map_err(|rejection| invalid(rejection.body_text()))
}

/// A body that may be left out.
fn optional<T: DeserializeOwned + Default>(body: Body) -> Result<T, Error> {
    let body = bytes(body)?;
    if body.is_empty() { Ok(T::default()) } else { parse(&body) }
}

fn required<T: DeserializeOwned>(body: Body) -> Result<T, Error> {
    parse(&bytes(body)?)
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(|error| invalid(format!("the body is not what this call takes: {error}")))
}

fn bytes(body: Body) -> Result<Bytes, Error> {
    body.map_err(|rejection| Error::of_body(&rejection))
}

fn invalid(message: String) -> Error {
    Error::new(StatusCode::BAD_REQUEST, "invalid", message)
}
