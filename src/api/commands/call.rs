//! The call of a client that makes a server run a command.

use axum::http::Method;
use serde::Serialize;

use super::{AddBody, DrainBody, LogBody, RebalanceBody, RolloutBody, ScaleBody, WeightBody};
use crate::api::encoded;
use crate::backend::Membership;
use crate::control::command::Command;

/// A command as a client sends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpCall {
    /// `POST` or `DELETE`.
    pub method: Method,
    /// Path and query.
    pub path: String,
    /// JSON, or the config of a reload; may be empty.
    pub body: String,
}

impl HttpCall {
    /// The call that makes a server run this command.
    pub fn of(command: &Command) -> Self {
        let post = |path: String, body: String| Self { method: Method::POST, path, body };
        match command {
            Command::Drain { pool, backend, within } => {
                let body = within.map(|within| json(&DrainBody { within_seconds: Some(within.as_secs_f64()) }));
                post(backend_path(pool, backend, "/drain"), body.unwrap_or_default())
            }
            Command::Undrain { pool, backend } => post(backend_path(pool, backend, "/undrain"), String::new()),
            Command::Weight { pool, backend, weight } => {
                post(backend_path(pool, backend, "/weight"), json(&WeightBody { weight: *weight }))
            }
            Command::Add { pool, backend } => {
                let address = backend.location.to_string();
                let Membership { weight, tier, max_connections, .. } = backend.membership;
                let body = AddBody { address, id: Some(backend.id.to_string()), weight, tier, max_connections };
                post(format!("/api/pools/{}/backends", encoded(pool)), json(&body))
            }
            Command::Remove { pool, backend } => {
                Self { method: Method::DELETE, path: backend_path(pool, backend, ""), body: String::new() }
            }
            Command::Rebalance { pool, over } => {
                let body = over.map(|over| json(&RebalanceBody { over_seconds: Some(over.as_secs_f64()) }));
                post(format!("/api/pools/{}/rebalance", encoded(pool)), body.unwrap_or_default())
            }
            Command::Scale { pool, replicas } => {
                post(format!("/api/pools/{}/scale", encoded(pool)), json(&ScaleBody { replicas: *replicas }))
            }
            Command::Rollout { pool, image } => {
                let body = RolloutBody { image: image.clone(), abort: false };
                post(format!("/api/pools/{}/rollout", encoded(pool)), json(&body))
            }
            Command::AbortRollout { pool } => {
                let body = RolloutBody { image: None, abort: true };
                post(format!("/api/pools/{}/rollout", encoded(pool)), json(&body))
            }
            Command::Reload { text, is_dry_run, is_reset, .. } => {
                let given = [(*is_dry_run, "dry_run=true"), (*is_reset, "reset=true")];
                let given: Vec<_> = given.iter().filter(|(is_given, _)| *is_given).map(|(_, text)| *text).collect();
                let mark = if given.is_empty() { "" } else { "?" };
                post(format!("/api/reload{mark}{}", given.join("&")), text.clone().unwrap_or_default())
            }
            Command::Log { filter, lasts } => {
                let for_seconds = lasts.map(|lasts| lasts.as_secs_f64());
                post("/api/log".to_owned(), json(&LogBody { filter: filter.clone(), for_seconds }))
            }
            Command::Reopen => post("/api/log/reopen".to_owned(), String::new()),
            Command::Upgrade => post("/api/upgrade".to_owned(), String::new()),
        }
    }
}

fn backend_path(pool: &str, backend: &str, action: &str) -> String {
    format!("/api/pools/{}/backends/{}{action}", encoded(pool), encoded(backend))
}

fn json(body: &impl Serialize) -> String {
    // Strings and numbers always serialize.
    serde_json::to_string(body).unwrap_or_default()
}
