//! Explains why a connection goes to its backend: the rules of the listener, the key, its probes on the ring, and the walk.
//! It asks the same functions as the data plane.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::key::{Key, KeyKind};
use super::routing::{Begin, Condition, FirstBytes, Mismatch, Route, Routing};
use super::stats::RefusalReason;
use crate::backend::{Backend, State};
use crate::client_hello::Hello;
use crate::labels::Label as _;
use crate::ring::{MOST_POINTS, Member, Ring};
use crate::stream::Client;
use crate::table::{Members, Table};

/// Keys that are looked up to estimate the share of keys that a change of the ring moves. It is then accurate to half a
/// percent.
const SAMPLE: u32 = 1 << 16;

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
    /// The rules up to the first one that matches.
    pub routes: Vec<RouteStep>,
    /// The pool; `None`: the connection is reset.
    pub pool: Option<PoolStep>,
}

/// A rule of the listener.
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
    /// What is hashed.
    pub key: KeyStep,
    /// The probes of the key.
    pub probes: Vec<ProbeStep>,
    /// Whether Ringway tries all backends, whatever their checks say.
    pub panic: bool,
    /// Number of the table.
    pub table_generation: u64,
    /// Digest of the ring, as 16 hexadecimal digits.
    pub ring_digest: String,
    /// All backends in the order of the ring, beginning at the key.
    pub walk: Vec<WalkStep>,
    /// The backend that gets the connection; `None`: none may.
    pub backend: Option<String>,
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
    let pool = route.map(|route| PoolStep::of(route, question)).transpose()?;
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

impl PoolStep {
    fn of(route: &Route, question: &Question) -> Result<Self, Unexplained> {
        let name = route.pool.to_string();
        let server_name = question.beginning.hello().and_then(|hello| hello.server_name.as_deref());
        let of_client = question.client.map(|client| Key::of(route.key, client, server_name));
        let key = match (&question.key, &of_client) {
            (Some(key), _) => key.as_bytes(),
            (None, Some(_)) if route.key == KeyKind::Source && !question.has_port => {
                let is_unix = matches!(question.client, Some(Client::Unix { .. }));
                return Err(if is_unix { Unexplained::UnixKey(name) } else { Unexplained::NoPort(name) });
            }
            (None, Some(key)) => key.as_bytes(),
            (None, None) => return Err(Unexplained::NoClient),
        };
        let table = route.table.load();
        let probes = probes(&table, key);
        let walk = walk(&table, route, key);
        let first = walk.iter().find(|step| step.attempt == Some(1)).map(|step| step.backend.clone());
        Ok(Self {
            key: KeyStep {
                kind: question.key.as_ref().map_or(route.key.as_str(), |_| "given").to_owned(),
                bytes: hex(key),
                hash: probes.first().map_or(String::new(), |probe| probe.at.clone()),
            },
            probes,
            panic: table.is_panic(),
            table_generation: table.generation(),
            ring_digest: format!("{:016x}", table.ring().digest()),
            walk,
            backend: first,
            what_if: what_if(&table, route, question, key)?,
            name,
        })
    }
}

fn probes(table: &Table, key: &[u8]) -> Vec<ProbeStep> {
    let step = |probe: crate::ring::Probe| ProbeStep {
        at: format!("{:016x}", probe.at),
        point: format!("{:016x}", probe.point),
        backend: table.backends()[probe.owner].id.to_string(),
        distance: probe.point.wrapping_sub(probe.at) as f64 / 2.0_f64.powi(64),
        wins: probe.wins,
    };
    table.ring().probes(key).into_iter().map(step).collect()
}

/// All backends in the order of the ring. The attempts are numbered in the order of the data plane.
fn walk(table: &Table, route: &Route, key: &[u8]) -> Vec<WalkStep> {
    let is_full = |backend: &Backend| backend.live.active.load(Ordering::Relaxed) >= route.most_per_backend;
    let mut attempts = 0;
    // What comes of each candidate: the number of its attempt, or none if it is full.
    let candidates: HashMap<&str, Option<usize>> = table
        .candidates(key)
        .map(|(backend, _)| {
            let attempt = (!is_full(backend)).then(|| {
                attempts += 1;
                attempts
            });
            (&*backend.id, attempt)
        })
        .collect();
    let now = Instant::now();
    let step = |owner: usize| {
        let backend = &table.backends()[owner];
        let candidate = candidates.get(&*backend.id).copied();
        let attempt = candidate.flatten().filter(|&attempt| attempt <= route.connect_attempts);
        let despite = match backend.state {
            State::Healthy => String::new(),
            state => format!(", although it is {}: too few backends are healthy", state.as_str()),
        };
        let why = match (candidate, attempt) {
            (None, _) => why_skipped(backend, now),
            (Some(None), _) => {
                let active = backend.live.active.load(Ordering::Relaxed);
                format!("full: {active} of {} connections", route.most_per_backend)
            }
            (Some(Some(_)), Some(1)) => format!("gets the connection{despite}"),
            (Some(Some(_)), _) if table.is_spared(backend, key) => {
                let part = backend.admission.as_part() * 100.0;
                format!("slow start: it takes {part:.0} % of its keys, and not this one, unless the others fail")
            }
            (Some(Some(_)), Some(_)) => format!("next, if the connects before it fail{despite}"),
            (Some(Some(_)), None) => format!("not tried: connect.attempts is {}", route.connect_attempts),
        };
        WalkStep {
            backend: backend.id.to_string(),
            address: backend.address.as_ref().map(ToString::to_string),
            state: backend.state.as_str().to_owned(),
            attempt,
            why,
        }
    };
    let on_ring: Vec<_> = table.ring().walk(key).collect();
    let mut seen = vec![false; table.backends().len()];
    for &owner in &on_ring {
        seen[owner] = true;
    }
    // A backend that leaves has no points any more, but it still has connections.
    let others = (0..seen.len()).filter(|&owner| !seen[owner]);
    on_ring.iter().copied().chain(others).map(step).collect()
}

/// Why the data plane does not try a backend.
fn why_skipped(backend: &Backend, now: Instant) -> String {
    let since = |then: Instant| {
        let seconds = now.saturating_duration_since(then).as_secs();
        humantime::format_duration(std::time::Duration::from_secs(seconds)).to_string()
    };
    match backend.state {
        State::Healthy => "it has no address".to_owned(),
        State::Starting if backend.address.is_none() => "it has no replica yet".to_owned(),
        State::Starting => "it has passed no health check yet".to_owned(),
        State::Unhealthy => {
            let check = backend.last_check().unwrap_or("none yet");
            format!("last check, for {}: {check}", since(backend.health.since))
        }
        State::Ejected => "connects to it kept failing".to_owned(),
        State::Draining => match backend.drain {
            Some(drain) if drain.leaves => format!("it leaves the pool since {}", since(drain.since)),
            Some(drain) => format!("for {}", since(drain.since)),
            None => "its replica stops".to_owned(),
        },
        State::CrashLoop => "its replicas keep dying".to_owned(),
    }
}

/// The effect of the change that the question asks about; `None`: it asks about none.
fn what_if(table: &Table, route: &Route, question: &Question, key: &[u8]) -> Result<Option<WhatIf>, Unexplained> {
    let Question { without, weights, .. } = question;
    if without.is_empty() && weights.is_empty() {
        return Ok(None);
    }
    if let Some(unknown) =
        without.iter().chain(weights.iter().map(|(id, _)| id)).find(|id| table.backends().find(id).is_none())
    {
        return Err(Unexplained::NoBackend {
            pool: route.pool.to_string(),
            backend: unknown.clone(),
            known: table.backends().iter().map(|backend| backend.id.to_string()).collect(),
        });
    }
    let weight = |backend: &Backend| {
        let changed = weights.iter().find(|(id, _)| **id == *backend.id);
        changed.map_or(backend.weight, |(_, weight)| *weight)
    };
    let left = table.backends().iter().filter(|backend| !without.iter().any(|id| **id == *backend.id));
    let backends: Vec<_> = left.map(|backend| Backend { weight: weight(backend), ..backend.clone() }).collect();
    // As the publisher does, a ring has no points of backends that leave.
    let leaves = |backend: &Backend| backend.drain.is_some_and(|drain| drain.leaves);
    let members: Vec<_> = backends
        .iter()
        .map(|backend| Member { id: &backend.id, weight: if leaves(backend) { 0 } else { backend.weight } })
        .collect();
    let points = members.iter().map(|member| u64::from(member.weight)).sum::<u64>()
        * u64::from(table.ring().parameters().virtual_nodes);
    if points > MOST_POINTS {
        return Err(Unexplained::TooManyPoints(points));
    }
    let ring = Arc::new(Ring::build(table.ring().parameters(), &members));
    let after = table.what_if(ring, Members::new(backends, 0));
    let owner =
        |table: &Table, key: &[u8]| table.ring().lookup(key).map(|owner| Arc::clone(&table.backends()[owner].id));
    let moves = |key: &u32| owner(table, &key.to_le_bytes()) != owner(&after, &key.to_le_bytes());
    let moved = (0..SAMPLE).filter(moves).count() as f64 / f64::from(SAMPLE);
    let walk = walk(&after, route, key);
    let backend = walk.into_iter().find(|step| step.attempt == Some(1)).map(|step| step.backend);
    // Four digits are precise enough for a person.
    Ok(Some(WhatIf { backend, moved: (moved * 1e4).round() / 1e4 }))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat()
}

#[cfg(test)]
mod tests;
