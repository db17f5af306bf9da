//! `GET /api/explain`: why a connection goes to its backend.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State as Extract};
use axum::http::StatusCode;
use serde::Deserialize;

use super::error::Error;
use super::{State, View, query};
use crate::client_hello::{Hello, host_name};
use crate::control::provider::WEIGHTS;
use crate::proxy::explain::{Beginning, Explanation, Question, Target, Unexplained, explain};
use crate::proxy::{Route, Routing};
use crate::stream::Client;

/// The question as text. Lists are separated by commas.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parameters {
    /// A pool or a listener; the default is the first listener. A pool comes before a listener of the same name.
    pub target: Option<String>,
    /// A listener.
    pub listener: Option<String>,
    /// The client: an address, an address with a port, or `unix:` and a user id.
    pub from: Option<String>,
    /// The server name for which the client asks.
    pub sni: Option<String>,
    /// The protocols that the client offers.
    pub alpn: Option<String>,
    /// What the client sends first: `tls`, `plain`, `silent` or `undecided`. The default is `tls` with a name or protocols, else
    /// `plain`.
    pub begins: Option<String>,
    /// The key, in place of the client's.
    pub key: Option<String>,
    /// Backends that leave the ring.
    pub without: Option<String>,
    /// Weights that change, like `echo-1=2`.
    pub weight: Option<String>,
}

/// Why a question has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The question is wrong.
    #[error("{0}")]
    Question(String),
    /// There is no such listener or pool.
    #[error("no listener and no pool has the name {name:?}; listeners and pools: {}", known.join(", "))]
    Target {
        /// The name.
        name: String,
        /// The names that there are.
        known: Vec<String>,
    },
    /// The question lacks something.
    #[error(transparent)]
    Unexplained(#[from] Unexplained),
}

/// What there is to explain: listeners and pools.
#[derive(Debug)]
pub struct Known<'a> {
    /// Listeners, with their names.
    pub listeners: Vec<(&'a str, &'a Routing)>,
    /// Pools.
    pub pools: Vec<&'a Route>,
}

pub(super) async fn get(
    Extract(state): Extract<Arc<State>>,
    parameters: Result<Query<Parameters>, QueryRejection>,
) -> Result<Json<Explanation>, Error> {
    let Query(parameters) = parameters.map_err(|rejection| {
        let message = format!(
            "{}: use only the parameters target, listener, from, sni, alpn, begins, key, without and weight",
            rejection.body_text()
        );
        Error::new(StatusCode::BAD_REQUEST, "bad_query", message)
    })?;
    let view = state.view();
    // Building a changed ring takes time and memory, so a blocking thread does it, one call at a time.
    let permit = Arc::clone(&state.explaining).acquire_owned().await;
    let answer = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        Known::of(&view).explain(&parameters)
    })
    .await;
    // It is pure, so a panic is a bug.
    let answer = answer.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
    answer.map(Json).map_err(|fault| {
        let (status, code) = match fault {
            Fault::Target { .. } => (StatusCode::NOT_FOUND, "no_such_target"),
            Fault::Unexplained(Unexplained::NoBackend { .. }) => (StatusCode::NOT_FOUND, "no_such_backend"),
            Fault::Question(_) | Fault::Unexplained(_) => (StatusCode::BAD_REQUEST, "bad_query"),
        };
        Error::new(status, code, fault.to_string())
    })
}

impl<'a> Known<'a> {
    /// The listeners and pools of a running Ringway.
    pub fn of(view: &'a View) -> Self {
        let listeners = view.listeners.iter().map(|listener| (&*listener.name, &*listener.routing));
        Self { listeners: listeners.collect(), pools: view.pools.iter().collect() }
    }

    /// Answers a question.
    ///
    /// # Errors
    /// When the question is wrong.
    pub fn explain(&self, parameters: &Parameters) -> Result<Explanation, Fault> {
        let target = self.target(parameters.target.as_deref(), parameters.listener.as_deref())?;
        Ok(explain(target, &parameters.question()?)?)
    }

    fn target(&self, name: Option<&str>, listener: Option<&str>) -> Result<Target<'a>, Fault> {
        let pool =
            name.filter(|_| listener.is_none()).and_then(|name| self.pools.iter().find(|pool| *pool.pool == *name));
        if let Some(pool) = pool {
            return Ok(Target::Pool(pool));
        }
        let wanted = listener.or(name);
        let found = self.listeners.iter().find(|(known, _)| wanted.is_none_or(|wanted| wanted == *known));
        found
            .map(|(_, routing)| Target::Listener(routing))
            .ok_or_else(|| Fault::Target { name: wanted.unwrap_or_default().to_owned(), known: self.names() })
    }

    fn names(&self) -> Vec<String> {
        let listeners = self.listeners.iter().map(|(name, _)| (*name).to_owned());
        listeners.chain(self.pools.iter().map(|pool| pool.pool.to_string())).collect()
    }
}

impl Parameters {
    /// The path and the query of the call.
    pub fn path(&self) -> String {
        let fields = [
            ("target", &self.target),
            ("listener", &self.listener),
            ("from", &self.from),
            ("sni", &self.sni),
            ("alpn", &self.alpn),
            ("begins", &self.begins),
            ("key", &self.key),
            ("without", &self.without),
            ("weight", &self.weight),
        ];
        format!("/api/explain?{}", query(&fields))
    }

    fn question(&self) -> Result<Question, Fault> {
        let from = self.from.as_deref().map(client).transpose()?;
        Ok(Question {
            client: from.map(|(client, _)| client),
            has_port: from.is_some_and(|(_, has_port)| has_port),
            beginning: self.beginning()?,
            key: self.key.clone(),
            without: list(self.without.as_deref()),
            weights: list(self.weight.as_deref()).iter().map(|text| weight(text)).collect::<Result<_, _>>()?,
        })
    }

    fn beginning(&self) -> Result<Beginning, Fault> {
        let has_hello = self.sni.is_some() || self.alpn.is_some();
        let other = match self.begins.as_deref() {
            Some("tls") => None,
            None if has_hello => None,
            None | Some("plain") => Some(Beginning::Plain),
            Some("silent") => Some(Beginning::Silent),
            Some("undecided") => Some(Beginning::Undecided),
            Some(text) => {
                let problem = format!("begins: {text:?} is not one of tls, plain, silent, undecided");
                return Err(Fault::Question(problem));
            }
        };
        if let Some(other) = other {
            let problem = "only a client that begins with TLS has sni and alpn: remove them, or begins";
            return if has_hello { Err(Fault::Question(problem.to_owned())) } else { Ok(other) };
        }
        let name = self.sni.as_deref().map(|name| {
            host_name(name)
                .ok_or_else(|| Fault::Question(format!("sni: {name:?} is not a server name, like www.example.com")))
        });
        let protocols = list(self.alpn.as_deref());
        if let Some(wrong) = protocols.iter().find(|name| name.is_empty() || name.len() > 255) {
            return Err(Fault::Question(format!("alpn: {wrong:?} is not the name of a protocol, like h2")));
        }
        Ok(Beginning::Tls(Hello::new(name.transpose()?, &protocols)))
    }
}

/// A client, and whether its port is known.
fn client(text: &str) -> Result<(Client, bool), Fault> {
    if let Some(user) = text.strip_prefix("unix:").and_then(|user| user.parse().ok()) {
        return Ok((Client::Unix { user, pid: 0, number: 0 }, false));
    }
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Ok((Client::Ip(address), true));
    }
    match text.parse::<IpAddr>() {
        Ok(ip) => Ok((Client::Ip((ip, 0).into()), false)),
        Err(_) => Err(Fault::Question(format!(
            "from: {text:?} is not a client: write it like 10.0.0.9, 10.0.0.9:5000, [2001:db8::1]:5000 or unix:1000 (a user id)"
        ))),
    }
}

fn weight(text: &str) -> Result<(String, u32), Fault> {
    let parsed = text.rsplit_once('=').and_then(|(id, weight)| Some((id.to_owned(), weight.parse().ok()?)));
    parsed.filter(|(_, weight)| WEIGHTS.contains(weight)).ok_or_else(|| {
        Fault::Question(format!(
            "weight: {text:?} is not a backend with a weight from 0 to 1000: write it like echo-1=2"
        ))
    })
}

fn list(text: Option<&str>) -> Vec<String> {
    text.map_or(Vec::new(), |text| text.split(',').map(str::to_owned).collect())
}
