//! The HTTP form of commands: the handlers that parse calls. [`HttpCall`] is what a client sends.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{ConnectInfo, Path, Query, State as Extract};
use axum::http::StatusCode;
use axum::middleware::from_fn_with_state;
use axum::routing::{delete, post};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::State;
use super::error::Error;
use super::guard::changes;
use crate::backend::Membership;
use crate::control::command::{Caller, Command, ErrorKind, Report};
use crate::control::provider::Listed;

pub use self::call::HttpCall;

mod call;

/// Longest time that a call may give: one day, in seconds, as for a drain in the config.
const LONGEST: f64 = 86_400.0;

/// The query of every command but a reload.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DryRun {
    #[serde(default)]
    dry_run: bool,
}

type DryRunQuery = Result<Query<DryRun>, QueryRejection>;
type Answer = Result<Json<Report>, Error>;
type From = ConnectInfo<SocketAddr>;
type PoolPath = Result<Path<String>, PathRejection>;
type BackendPath = Result<Path<(String, String)>, PathRejection>;

/// The body of a drain.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DrainBody {
    #[serde(skip_serializing_if = "Option::is_none")]
    within_seconds: Option<f64>,
}

/// The body of a change of weight.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WeightBody {
    weight: u32,
}

/// The body of a new backend.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AddBody {
    address: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(default = "one")]
    weight: u32,
    #[serde(default)]
    tier: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_connections: Option<u32>,
}

fn one() -> u32 {
    1
}

/// The body of a rebalance.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RebalanceBody {
    #[serde(skip_serializing_if = "Option::is_none")]
    over_seconds: Option<f64>,
}

/// The body of a change of the number of replicas.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ScaleBody {
    replicas: u32,
}

/// The body of a rollout.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RolloutBody {
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    abort: bool,
}

/// The body of a change of the log.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LogBody {
    /// `null`: as at the start.
    filter: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    for_seconds: Option<f64>,
}

/// The query of a reload.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ReloadQuery {
    #[serde(default)]
    dry_run: bool,
    #[serde(default)]
    reset: bool,
}

/// The routes that run commands, behind the guard.
pub(super) fn routes(state: &Arc<State>) -> axum::Router<Arc<State>> {
    axum::Router::new()
        .route("/api/pools/{pool}/backends", post(add))
        .route("/api/pools/{pool}/backends/{backend}", delete(remove))
        .route("/api/pools/{pool}/backends/{backend}/drain", post(drain))
        .route("/api/pools/{pool}/backends/{backend}/undrain", post(undrain))
        .route("/api/pools/{pool}/backends/{backend}/weight", post(weight))
        .route("/api/pools/{pool}/rebalance", post(rebalance))
        .route("/api/pools/{pool}/rollout", post(rollout))
        .route("/api/pools/{pool}/scale", post(scale))
        .route("/api/reload", post(reload))
        .route("/api/log", post(log))
        .route("/api/log/reopen", post(reopen))
        .route("/api/upgrade", post(upgrade))
        .route_layer(from_fn_with_state(Arc::clone(state), changes))
}

async fn drain(
    Extract(state): Extract<Arc<State>>,
    caller: From,
    query: DryRunQuery,
    path: BackendPath,
    body: Bytes,
) -> Answer {
    let (pool, backend) = backend_of(path)?;
    let DrainBody { within_seconds } = optional(&body)?;
    let within = within_seconds.map(|seconds| duration("within_seconds", seconds)).transpose()?;
    run(&state, caller, query, Command::Drain { pool, backend, within }).await
}

async fn undrain(Extract(state): Extract<Arc<State>>, caller: From, query: DryRunQuery, path: BackendPath) -> Answer {
    let (pool, backend) = backend_of(path)?;
    run(&state, caller, query, Command::Undrain { pool, backend }).await
}

async fn weight(
    Extract(state): Extract<Arc<State>>,
    caller: From,
    query: DryRunQuery,
    path: BackendPath,
    body: Bytes,
) -> Answer {
    let (pool, backend) = backend_of(path)?;
    let WeightBody { weight } = required(&body)?;
    run(&state, caller, query, Command::Weight { pool, backend, weight }).await
}

async fn add(
    Extract(state): Extract<Arc<State>>,
    caller: From,
    query: DryRunQuery,
    path: PoolPath,
    body: Bytes,
) -> Answer {
    let pool = pool_of(path)?;
    let AddBody { address, id, weight, tier, max_connections } = required(&body)?;
    let membership = Membership { weight, tier, max_connections, is_drained: false };
    let backend = Listed::parse(&address, id, membership).map_err(invalid)?;
    run(&state, caller, query, Command::Add { pool, backend }).await
}

async fn remove(Extract(state): Extract<Arc<State>>, caller: From, query: DryRunQuery, path: BackendPath) -> Answer {
    let (pool, backend) = backend_of(path)?;
    run(&state, caller, query, Command::Remove { pool, backend }).await
}

async fn rebalance(
    Extract(state): Extract<Arc<State>>,
    caller: From,
    query: DryRunQuery,
    path: PoolPath,
    body: Bytes,
) -> Answer {
    let pool = pool_of(path)?;
    let RebalanceBody { over_seconds } = optional(&body)?;
    let over = over_seconds.map(|seconds| duration("over_seconds", seconds)).transpose()?;
    run(&state, caller, query, Command::Rebalance { pool, over }).await
}

async fn rollout(
    Extract(state): Extract<Arc<State>>,
    caller: From,
    query: DryRunQuery,
    path: PoolPath,
    body: Bytes,
) -> Answer {
    let pool = pool_of(path)?;
    let command = match optional(&body)? {
        RolloutBody { image: Some(_), abort: true } => {
            return Err(invalid("image and abort contradict each other: omit one".to_owned()));
        }
        RolloutBody { abort: true, .. } => Command::AbortRollout { pool },
        RolloutBody { image, .. } => Command::Rollout { pool, image },
    };
    run(&state, caller, query, command).await
}

async fn scale(
    Extract(state): Extract<Arc<State>>,
    caller: From,
    query: DryRunQuery,
    path: PoolPath,
    body: Bytes,
) -> Answer {
    let pool = pool_of(path)?;
    let ScaleBody { replicas } = required(&body)?;
    run(&state, caller, query, Command::Scale { pool, replicas }).await
}

async fn reload(
    Extract(state): Extract<Arc<State>>,
    caller: From,
    query: Result<Query<ReloadQuery>, QueryRejection>,
    body: Bytes,
) -> Answer {
    let Query(ReloadQuery { dry_run, reset }) = query.map_err(|rejection| {
        invalid(format!("{}: the query parameters are dry_run=true and reset=true", rejection.body_text()))
    })?;
    let text = (!body.is_empty()).then(|| String::from_utf8(body.to_vec()));
    let text = text.transpose().map_err(|_| invalid("the config is not UTF-8".to_owned()))?;
    if text.is_some() && !dry_run {
        let message = "a reload reads the file that Ringway was started with; a body is only for ?dry_run=true";
        return Err(invalid(message.to_owned()));
    }
    send(&state, caller, false, Command::Reload { text, is_dry_run: dry_run, is_reset: reset, max_keys_moved: None })
        .await
}

async fn log(Extract(state): Extract<Arc<State>>, caller: From, query: DryRunQuery, body: Bytes) -> Answer {
    let LogBody { filter, for_seconds } = required(&body)?;
    let lasts = for_seconds.map(|seconds| duration("for_seconds", seconds)).transpose()?;
    run(&state, caller, query, Command::Log { filter, lasts }).await
}

async fn reopen(Extract(state): Extract<Arc<State>>, caller: From, query: DryRunQuery) -> Answer {
    run(&state, caller, query, Command::Reopen).await
}

async fn upgrade(Extract(state): Extract<Arc<State>>, caller: From, query: DryRunQuery) -> Answer {
    run(&state, caller, query, Command::Upgrade).await
}

async fn run(state: &State, caller: From, query: DryRunQuery, command: Command) -> Answer {
    let Query(DryRun { dry_run }) = query
        .map_err(|rejection| invalid(format!("{}: the only query parameter is dry_run=true", rejection.body_text())))?;
    send(state, caller, dry_run, command).await
}

async fn send(state: &State, ConnectInfo(caller): From, is_dry_run: bool, command: Command) -> Answer {
    let (commands, caller) = (&state.commands, Caller::SidePort(caller));
    let report =
        if is_dry_run { commands.dry_run(command, caller).await } else { commands.send(command, caller).await };
    let report = report.map_err(|error| {
        let message = error.to_string();
        match error.kind() {
            ErrorKind::NotFound => Error::new(StatusCode::NOT_FOUND, "not_found", message),
            ErrorKind::Conflict => Error::new(StatusCode::CONFLICT, "conflict", message),
            ErrorKind::Invalid => invalid(message),
        }
    })?;
    Ok(Json(report))
}

/// A number of seconds as a duration.
fn duration(field: &str, seconds: f64) -> Result<Duration, Error> {
    let fits = (0.0..=LONGEST).contains(&seconds);
    fits.then(|| Duration::from_secs_f64(seconds))
        .ok_or_else(|| invalid(format!("{field}: {seconds} is not between 0 and {LONGEST}")))
}

fn pool_of(path: PoolPath) -> Result<String, Error> {
    path.map(|Path(pool)| pool).map_err(|rejection| invalid(rejection.body_text()))
}

fn backend_of(path: BackendPath) -> Result<(String, String), Error> {
    path.map(|Path(parts)| parts).map_err(|rejection| invalid(rejection.body_text()))
}

/// A body that the caller may leave out.
fn optional<T: DeserializeOwned + Default>(body: &[u8]) -> Result<T, Error> {
    if body.is_empty() { Ok(T::default()) } else { required(body) }
}

fn required<T: DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(|error| invalid(format!("invalid request body: {error}")))
}

fn invalid(message: String) -> Error {
    Error::new(StatusCode::BAD_REQUEST, "invalid", message)
}

#[cfg(test)]
mod tests {
    use axum::body::Body as HttpBody;
    use axum::http::Request;
    use axum::routing::Router;
    use tokio::sync::mpsc;

    use super::*;

    /// What a server makes of a client's call: the path, query and body go through the real extractors.
    async fn received(call: &HttpCall) -> Command {
        let (sender, mut queue) = crate::control::command::CommandSender::new();
        let (parsed, mut commands) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(pending) = queue.recv().await {
                let _ = parsed.send(pending.command);
                let _ = pending.outcome.send(Ok(Report::default()));
            }
        });
        let guard = crate::api::Guard::new(([127, 0, 0, 1], 0).into(), None, Vec::new(), false);
        let settings =
            crate::proxy::Settings { workers: 1, max_connections: 1, max_pipes: 0, buffer: 4096, splice_from: 4096 };
        let (proxy, _ended) = crate::proxy::Proxy::start(settings).unwrap();
        let exporter = crate::metrics::Exporter::new().unwrap();
        let settings = crate::api::Settings {
            guard,
            runtimes: Vec::new(),
            events: Arc::default(),
            has_history: false,
            has_page: false,
        };
        let state = Arc::new(State::new(exporter, sender, &proxy, settings));
        let caller = ConnectInfo(SocketAddr::from(([127, 0, 0, 1], 1)));
        let router: Router = routes(&state).layer(axum::Extension(caller)).with_state(state);
        let request = Request::builder().method(&call.method).uri(&call.path).header("host", "localhost");
        let request = request.body(HttpBody::from(call.body.clone())).unwrap();
        let response = hyper::service::Service::call(&hyper_util::service::TowerToHyperService::new(router), request);
        assert!(response.await.unwrap().status().is_success(), "{call:?}");
        commands.recv().await.unwrap()
    }

    #[tokio::test]
    async fn a_server_receives_the_command_that_a_client_sends() {
        let (pool, backend) = ("a/b %".to_owned(), "[::1]:6379".to_owned());
        let listed = |address: &str| {
            Listed::parse(address, Some("née?".to_owned()), Membership { tier: 2, ..Membership::weighing(7) }).unwrap()
        };
        let within = Some(Duration::from_millis(1500));
        for command in [
            Command::Drain { pool: pool.clone(), backend: backend.clone(), within },
            Command::Drain { pool: pool.clone(), backend: backend.clone(), within: None },
            Command::Undrain { pool: pool.clone(), backend: backend.clone() },
            Command::Weight { pool: pool.clone(), backend: backend.clone(), weight: 3 },
            Command::Add { pool: pool.clone(), backend: listed("[::1]:6379") },
            Command::Add { pool: pool.clone(), backend: listed("unix:/run/db.sock") },
            Command::Remove { pool: pool.clone(), backend },
            Command::Scale { pool: pool.clone(), replicas: 5 },
            Command::Rollout { pool: pool.clone(), image: Some("web:2".to_owned()) },
            Command::Rollout { pool: pool.clone(), image: None },
            Command::AbortRollout { pool },
            Command::Reload { text: None, is_dry_run: false, is_reset: false, max_keys_moved: None },
            Command::Reload { text: None, is_dry_run: true, is_reset: true, max_keys_moved: None },
            Command::Reload {
                text: Some("listeners: []".to_owned()),
                is_dry_run: true,
                is_reset: false,
                max_keys_moved: None,
            },
            Command::Log {
                filter: Some("info,ringway::proxy=debug".to_owned()),
                lasts: Some(Duration::from_secs(300)),
            },
            Command::Log { filter: None, lasts: None },
            Command::Reopen,
            Command::Upgrade,
        ] {
            assert_eq!(received(&HttpCall::of(&command)).await, command);
        }
    }
}
