//! `/api/sessions`: lists open connections, and ends those that an operator names.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{ConnectInfo, Path, Query, State as Extract};
use axum::http::StatusCode;
use axum::middleware::from_fn_with_state;
use axum::routing::{delete, get};
use serde::{Deserialize, Serialize};

use super::error::Error;
use super::guard::changes;
use super::{State, query};
use crate::client_hello::host_name;
use crate::labels::Label as _;
use crate::networks::{Network, Networks};
use crate::proxy::ConnectionId;
use crate::proxy::sessions::{Cursor, Filter, Session, SessionState};
use crate::text;

/// Sessions in an answer, unless the call asks for another number.
const USUAL_LIMIT: usize = 100;

/// Most sessions in an answer.
pub const MOST: usize = 1000;

/// Which sessions are meant, as text.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "docs/api.md explains each parameter")]
pub struct Parameters {
    pub listener: Option<String>,
    pub pool: Option<String>,
    pub backend: Option<String>,
    pub source: Option<String>,
    pub sni: Option<String>,
    pub older: Option<String>,
    pub idle: Option<String>,
    pub state: Option<String>,
    pub limit: Option<usize>,
    pub cursor: Option<String>,
    pub all: Option<bool>,
}

/// A part of the list. Later versions can add fields but never rename one.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/api.md explains each field")]
pub struct Page {
    pub sessions: Vec<Shown>,
    pub next: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/api.md explains each field")]
pub struct Shown {
    pub id: String,
    pub client: String,
    pub peer: Option<String>,
    pub listener: String,
    pub route: Option<String>,
    pub pool: Option<String>,
    pub sni: Option<String>,
    pub backend: Option<String>,
    pub address: Option<String>,
    pub age_seconds: f64,
    pub idle_seconds: f64,
    pub from_client: u64,
    pub to_client: u64,
    pub path: String,
    pub state: String,
}

/// The number of sessions that were ended.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/api.md explains each field")]
pub struct Ended {
    pub ended: usize,
}

/// The routes of this file. The list needs the rights of a change too: it tells which client talks to which site.
pub(super) fn routes(state: &Arc<State>) -> axum::Router<Arc<State>> {
    axum::Router::new()
        .route("/api/sessions", get(list).delete(end_all))
        .route("/api/sessions/{id}", delete(end_one))
        .route_layer(from_fn_with_state(Arc::clone(state), changes))
}

async fn list(
    Extract(state): Extract<Arc<State>>,
    parameters: Result<Query<Parameters>, QueryRejection>,
) -> Result<Json<Page>, Error> {
    let parameters = parsed(parameters)?;
    let limit = parameters.limit.unwrap_or(USUAL_LIMIT);
    if !(1..=MOST).contains(&limit) {
        return Err(bad(format!("limit: {limit} is not between 1 and {MOST}")));
    }
    let cursor = parameters.cursor.as_deref().map(cursor).transpose()?.unwrap_or_default();
    let page = state.sessions.list(&parameters.filter().map_err(bad)?, cursor, limit).await;
    Ok(Json(Page {
        sessions: page.sessions.iter().map(Shown::of).collect(),
        next: page.next.map(|Cursor { worker, position }| format!("{worker}.{position}")),
    }))
}

async fn end_all(
    Extract(state): Extract<Arc<State>>,
    ConnectInfo(caller): ConnectInfo<SocketAddr>,
    parameters: Result<Query<Parameters>, QueryRejection>,
) -> Result<Json<Ended>, Error> {
    let parameters = parsed(parameters)?;
    if parameters.limit.is_some() || parameters.cursor.is_some() {
        return Err(bad("limit and cursor are only for the list: the call ends all sessions that match".to_owned()));
    }
    let filter = parameters.filter().map_err(bad)?;
    if filter.is_empty() != parameters.all.unwrap_or(false) {
        return Err(
            bad("give at least one condition, or all=true without a condition to end every session".to_owned()),
        );
    }
    let ended = state.sessions.end(&filter).await;
    tracing::info!(%caller, ended, conditions = parameters.conditions(), "an operator ended sessions");
    Ok(Json(Ended { ended }))
}

async fn end_one(
    Extract(state): Extract<Arc<State>>,
    ConnectInfo(caller): ConnectInfo<SocketAddr>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Json<Ended>, Error> {
    let Path(id) = path.map_err(|rejection| bad(rejection.body_text()))?;
    let wanted: ConnectionId =
        id.parse().map_err(|_| bad(format!("{id:?} is not the id of a connection: write 16 hexadecimal digits")))?;
    let filter = Filter { id: Some(wanted), ..Filter::default() };
    let ended = state.sessions.end(&filter).await;
    if ended == 0 {
        let message = format!("no open connection has the id {id}; it may have ended");
        return Err(Error::new(StatusCode::NOT_FOUND, "no_such_session", message));
    }
    tracing::info!(%caller, id = %wanted, "an operator ended a session");
    Ok(Json(Ended { ended }))
}

fn parsed(parameters: Result<Query<Parameters>, QueryRejection>) -> Result<Parameters, Error> {
    parameters.map(|Query(parameters)| parameters).map_err(|rejection| bad(rejection.body_text()))
}

fn bad(message: String) -> Error {
    Error::new(StatusCode::BAD_REQUEST, "bad_query", message)
}

fn cursor(text: &str) -> Result<Cursor, Error> {
    let parsed = text
        .split_once('.')
        .and_then(|(worker, position)| Some(Cursor { worker: worker.parse().ok()?, position: position.parse().ok()? }));
    parsed.ok_or_else(|| bad(format!("cursor: {text:?} does not come from the field next of an answer")))
}

impl Parameters {
    /// The path and the query of the call.
    pub fn path(&self) -> String {
        format!("/api/sessions?{}", self.conditions())
    }

    /// The conditions that are given, as a query.
    fn conditions(&self) -> String {
        let (limit, all) = (self.limit.map(|limit| limit.to_string()), self.all.map(|all| all.to_string()));
        let fields = [
            ("listener", &self.listener),
            ("pool", &self.pool),
            ("backend", &self.backend),
            ("source", &self.source),
            ("sni", &self.sni),
            ("older", &self.older),
            ("idle", &self.idle),
            ("state", &self.state),
            ("limit", &limit),
            ("cursor", &self.cursor),
            ("all", &all),
        ];
        query(&fields)
    }

    fn filter(&self) -> Result<Filter, String> {
        let duration = |name: &str, text: &Option<String>| -> Result<Option<Duration>, String> {
            let parse = |text: &String| {
                text::duration(text)
                    .ok_or_else(|| format!("{name}: {text:?} is not a duration: write it like 30s or 1h"))
            };
            text.as_ref().map(parse).transpose()
        };
        let source = |text: &String| -> Result<Networks, String> {
            text.split(',').map(|one| one.parse::<Network>().map_err(|problem| format!("source: {problem}"))).collect()
        };
        let sni = |text: &String| {
            host_name(text).ok_or_else(|| format!("sni: {text:?} is not a server name, like www.example.com"))
        };
        let state = |text: &String| {
            let found = SessionState::ALL.iter().find(|state| state.as_str() == text).copied();
            let names: Vec<_> = SessionState::ALL.iter().map(|state| state.as_str()).collect();
            found.ok_or_else(|| format!("state: {text:?} is not one of {}", names.join(", ")))
        };
        Ok(Filter {
            id: None,
            listener: self.listener.clone(),
            pool: self.pool.clone(),
            backend: self.backend.clone(),
            source: self.source.as_ref().map(source).transpose()?,
            sni: self.sni.as_ref().map(sni).transpose()?,
            older: duration("older", &self.older)?,
            idle: duration("idle", &self.idle)?,
            state: self.state.as_ref().map(state).transpose()?,
        })
    }
}

impl Shown {
    fn of(session: &Session) -> Self {
        let ((copied, spliced), (copied_back, spliced_back)) = (session.from_client, session.to_client);
        let text = |text: &Arc<str>| text.to_string();
        Self {
            id: session.id.to_string(),
            client: session.client.to_string(),
            peer: session.peer.map(|peer| peer.to_string()),
            listener: text(&session.listener),
            route: session.route.as_ref().map(text),
            pool: session.pool.as_ref().map(text),
            sni: session.sni.as_ref().map(ToString::to_string),
            backend: session.backend.as_ref().map(|(backend, _)| text(backend)),
            address: session.backend.as_ref().map(|(_, address)| address.to_string()),
            age_seconds: seconds(session.age),
            idle_seconds: seconds(session.idle),
            from_client: copied + spliced,
            to_client: copied_back + spliced_back,
            path: if spliced + spliced_back > 0 { "spliced" } else { "copied" }.to_owned(),
            state: session.state.as_str().to_owned(),
        }
    }
}

/// To a millisecond.
fn seconds(time: Duration) -> f64 {
    time.as_millis() as f64 / 1000.0
}
