//! Explains why a connection goes to its backend: the rules of the listener, then the key, its probes on the ring and the walk
//! ([`pool`]). It asks the same functions as the data plane.

use serde::{Deserialize, Serialize};

use super::routing::{Begin, Condition, FirstBytes, Mismatch, Route, Routing};
use super::stats::RefusalReason;
use crate::client_hello::Hello;
use crate::labels::Label as _;
use crate::ring::MOST_POINTS;
use crate::stream::Client;

/// A connection that may come.
#[derive(Debug)]
pub struct Question {
    /// The client, as a PROXY header would name it; `None`: any.
    pub client: Option<Client>,
    /// Whether the client's port is known.
    pub has_port: bool,
    /// What the client sends first.
    pub beginning: Beginning,
    /// The key, in place of the one that follows from the client.
    pub key: Option<String>,
    /// Backends that leave the ring.
    pub without: Vec<String>,
    /// Backends whose weights change.
    pub weights: Vec<(String, u32)>,
}

/// What a client sends first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Beginning {
    /// A ClientHello.
    Tls(Hello),
    /// Something else.
    Plain,
    /// Nothing: it waits for the server.
    Silent,
    /// The beginning of TLS, and then wrong, too many or too few bytes.
    Undecided,
}

impl Beginning {
    fn hello(&self) -> Option<&Hello> {
        if let Self::Tls(hello) = self { Some(hello) } else { None }
    }

    fn first_bytes(&self) -> FirstBytes<'_> {
        match self {
            Self::Tls(hello) => FirstBytes::Known(Begin::Tls(hello)),
            Self::Plain => FirstBytes::Known(Begin::Plain),
            Self::Silent => FirstBytes::Silent,
            Self::Undecided => FirstBytes::Undecided,
        }
    }
}

/// Where a connection arrives.
#[derive(Debug, Clone, Copy)]
pub enum Target<'a> {
    /// At a listener, which decides the route.
    Listener(&'a Routing),
    /// At a pool, without a listener.
    Pool(&'a Route),
}

/// Why there is no explanation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unexplained {
    /// Somebody has to connect.
    #[error("from is missing: give the client's address, like 10.0.0.9:5000")]
    NoClient,
    /// The key has a part that nobody can know.
    #[error("the pool {0} gives each connection of a Unix socket a key of its own: give the key")]
    UnixKey(String),
    /// The ring would be too large.
    #[error("the ring would have {0} points, but the maximum is {MOST_POINTS}: give smaller weights")]
    TooManyPoints(u64),
    /// The key needs a port.
    #[error("the pool {0} hashes the client's port too: give the client as ADDRESS:PORT")]
    NoPort(String),
    /// The change names a backend that the pool does not have.
    #[error("the pool {pool} has no backend {backend:?}; its backends: {}", known.join(", "))]
    NoBackend {
        /// The pool.
        pool: String,
        /// The backend.
        backend: String,
        /// The backends that it has.
        known: Vec<String>,
    },
}

/// Why a connection goes to its backend. Later versions can add fields but never rename one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    /// The client; `None`: any.
    pub client: Option<String>,
    /// Why the listener refuses the client, in the words of the metrics; `None`: it does not.
    pub refused: Option<String>,
    /// The listener's routes up to the first one that matches.
    pub routes: Vec<RouteStep>,
    /// The pool; `None`: the connection is reset.
    pub pool: Option<PoolStep>,
}

/// A route of the listener.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteStep {
    /// Its name.
    pub name: String,
    /// Its pool; `None`: it resets connections.
    pub pool: Option<String>,
    /// Whether it matches.
    pub matches: bool,
    /// Why, in words.
    pub why: String,
}

/// What happens in the pool.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PoolStep {
    /// Its name.
    pub name: String,
    /// How a backend is chosen: `ring` or `least_connections`.
    #[serde(default)]
    pub balance: String,
    /// The most connections of a backend, in percent of its fair share; `None`: any number.
    #[serde(default)]
    pub bound: Option<u16>,
    /// What is hashed.
    pub key: KeyStep,
    /// The probes of the key.
    pub probes: Vec<ProbeStep>,
    /// Whether Ringway ignores health and tries all backends.
    pub panic: bool,
    /// Number of the table.
    pub table_generation: u64,
    /// Digest of the ring, as 16 hexadecimal digits.
    pub ring_digest: String,
    /// All backends in the order of the ring, beginning at the key.
    pub walk: Vec<WalkStep>,
    /// The backend that gets the connection; `None`: none may, or chance decides.
    pub backend: Option<String>,
    /// Whether chance decides.
    #[serde(default)]
    pub random: bool,
    /// The same after the change of the question.
    pub what_if: Option<WhatIf>,
}

/// The key of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyStep {
    /// `source`, `source_ip`, `source_net`, `sni`, or `given`.
    pub kind: String,
    /// Its bytes, as hexadecimal digits.
    pub bytes: String,
    /// Its hash, as 16 hexadecimal digits.
    pub hash: String,
}

/// A probe of the key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbeStep {
    /// Its position, as 16 hexadecimal digits.
    pub at: String,
    /// The position of the next point, as 16 hexadecimal digits.
    pub point: String,
    /// The point's backend.
    pub backend: String,
    /// The distance to the point, as a part of the circle.
    pub distance: f64,
    /// Whether it is the nearest.
    pub wins: bool,
}

/// A backend on the walk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalkStep {
    /// Its id.
    pub backend: String,
    /// Its address.
    pub address: Option<String>,
    /// Its state, in the words of the status.
    pub state: String,
    /// The number of the attempt that goes to it, if all before it fail; `None`: no attempt goes to it.
    pub attempt: Option<usize>,
    /// Why, in words.
    pub why: String,
}

/// What a change of the ring would do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WhatIf {
    /// The backend that would get the connection.
    pub backend: Option<String>,
    /// The share of all keys that would have another owner, from 0 to 1.
    pub moved: f64,
}

/// Explains what would happen to the connection now.
///
/// # Errors
/// When the question lacks something, or names an unknown backend.
pub fn explain(target: Target<'_>, question: &Question) -> Result<Explanation, Unexplained> {
    let (mut routes, mut refused) = (Vec::new(), None);
    let route = match target {
        Target::Pool(route) => Some(route),
        Target::Listener(routing) => {
            let client = question.client.ok_or(Unexplained::NoClient)?;
            refused = routing.keeps_out(client);
            let rule = match refused {
                Some(_) => None,
                None => routing.settle(client, question.beginning.first_bytes()),
            };
            let last = match (refused, rule) {
                (Some(_), _) => 0,
                (None, Some(rule)) => rule + 1,
                (None, None) => {
                    let is_silent = question.beginning == Beginning::Silent;
                    refused = Some(if is_silent { RefusalReason::HelloTimeout } else { RefusalReason::HelloInvalid });
                    routing.rules.len()
                }
            };
            routes.extend((0..last).map(|n| RouteStep::of(routing, n, rule, client, &question.beginning)));
            rule.and_then(|rule| routing.route_of(rule))
        }
    };
    let refused = refused.map(|refusal| refusal.as_str().to_owned());
    let mut pool = route.map(|route| PoolStep::of(route, question)).transpose()?;
    if let (Target::Listener(Routing { keeps_port: true, .. }), Some(pool)) = (target, &mut pool) {
        for address in pool.walk.iter_mut().filter_map(|step| step.address.as_mut()) {
            // No port of the config is meant.
            let host = address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host);
            *address = format!("{host}, the client's port");
        }
    }
    let client = question.client.map(|client| match client {
        Client::Ip(address) if !question.has_port => address.ip().to_string(),
        Client::Unix { user, .. } => format!("unix:{user}"),
        client @ Client::Ip(_) => client.to_string(),
    });
    Ok(Explanation { client, refused, routes, pool })
}

impl RouteStep {
    /// The step of rule `n`, if `chosen` is the rule that takes the connection.
    fn of(routing: &Routing, n: usize, chosen: Option<usize>, client: Client, beginning: &Beginning) -> Self {
        let rule = &routing.rules[n];
        let known = if let FirstBytes::Known(begin) = beginning.first_bytes() { Some(begin) } else { None };
        let (is_default, is_chosen) = (rule.when == Condition::default(), chosen == Some(n));
        let why = match rule.when.check(client, known) {
            Some(Err(mismatch)) => why_not(&rule.when, mismatch, beginning),
            Some(Ok(())) if !is_chosen => "it is not for a client whose first bytes decide nothing".to_owned(),
            _ if is_default && !routing.has_rules() => "the listener has no routes".to_owned(),
            _ if is_default => "no other route matches".to_owned(),
            Some(Ok(())) => "all of its conditions hold".to_owned(),
            None if is_chosen => "the client sends nothing, so it counts as one without TLS".to_owned(),
            None => "it depends on the client's first bytes, and they decide nothing".to_owned(),
        };
        let pool = routing.route_of(n).map(|route| route.pool.to_string());
        Self { name: rule.name.to_string(), pool, matches: is_chosen, why }
    }
}

/// Why a rule does not match.
fn why_not(when: &Condition, mismatch: Mismatch, beginning: &Beginning) -> String {
    fn list<T: ToString>(items: &[T]) -> String {
        items.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
    }
    match mismatch {
        Mismatch::From => {
            let networks = when.from.as_ref().map_or(String::new(), |from| list(from.list()));
            format!("the client is not in {networks}")
        }
        Mismatch::IsTls => "the client begins with TLS".to_owned(),
        Mismatch::IsPlain => "the client does not begin with TLS".to_owned(),
        Mismatch::Sni => {
            let name = beginning.hello().and_then(|hello| hello.server_name.as_deref());
            let none = || "the client asks for no name".to_owned();
            name.map_or_else(none, |name| format!("{name} is not one of {}", list(&when.sni)))
        }
        Mismatch::Alpn => format!("the client offers none of {}", list(&when.alpn)),
    }
}

mod pool;
#[cfg(test)]
mod tests;
