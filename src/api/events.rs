//! `GET /api/events`: the last events of this process.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State as Extract};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};

use super::State;
use super::error::Error;
use crate::events::Event;

/// What the call asks for.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Parameters {
    #[serde(default)]
    after: u64,
}

/// The answer. Later versions can add fields but never rename one.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/api.md explains each field")]
pub struct List {
    pub pid: u32,
    pub last: u64,
    pub events: Vec<Event>,
}

pub(super) async fn get(
    Extract(state): Extract<Arc<State>>,
    parameters: Result<Query<Parameters>, QueryRejection>,
) -> Result<Json<List>, Error> {
    let Query(Parameters { after }) = parameters.map_err(|rejection| {
        let message = format!("{}: the only parameter is after, the number of an event", rejection.body_text());
        Error::new(StatusCode::BAD_REQUEST, "bad_query", message)
    })?;
    // A successor counts from 1 again.
    let after = if after > state.events.last() { 0 } else { after };
    let events: Vec<_> = state.events.after(after).iter().map(|event| Event::clone(event)).collect();
    Ok(Json(List { pid: std::process::id(), last: state.events.last(), events }))
}
