//! What the status shows of a backend.

use std::sync::atomic::Ordering;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::backend::{self, Backend, Counters};
use crate::labels::Label as _;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/api.md explains each field")]
pub struct Member {
    pub id: String,
    /// The slot that this incarnation stands beside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beside: Option<String>,
    pub address: Option<String>,
    pub state: String,
    pub weight: u32,
    #[serde(default)]
    pub tier: u16,
    /// `None`: as the pool says.
    #[serde(default)]
    pub max_connections: Option<u32>,
    /// `None`: any number.
    #[serde(default)]
    pub limit: Option<u64>,
    pub share: f64,
    #[serde(default)]
    pub now: f64,
    pub replica: Option<Replica>,
    #[serde(default)]
    pub outdated: bool,
    pub restarts: u64,
    pub last_exit: Option<Exit>,
    pub connections: BackendConnections,
    pub bytes: Moved,
    pub health: Health,
    pub admission: f64,
    /// `None`: it has no agent, or that is silent, or hidden.
    #[serde(default)]
    pub agent: Option<String>,
    pub drain: Option<Drain>,
    pub ejections: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/api.md explains each field")]
pub struct Drain {
    pub since_seconds: f64,
    pub deadline_in_seconds: Option<f64>,
    pub leaves: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
#[expect(missing_docs, reason = "docs/api.md explains each field")]
pub enum Replica {
    Process { pid: u32 },
    Container { container: String, name: String },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/api.md explains each field")]
pub struct Exit {
    pub reason: String,
    pub code: Option<i64>,
    pub seconds_ago: f64,
    pub output: Vec<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/api.md explains each field")]
pub struct BackendConnections {
    pub active: u64,
    pub total: u64,
    pub failed: u64,
    #[serde(default)]
    pub displaced: u64,
    #[serde(default)]
    pub cut_by_drain: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/api.md explains each field")]
pub struct Moved {
    pub from_client: u64,
    pub to_client: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/api.md explains each field")]
pub struct Health {
    pub last: Option<String>,
    pub since_seconds: f64,
}

impl Member {
    pub(super) fn of(backend: &Backend, share: f64, share_now: f64, now: Instant) -> Self {
        let (live, none) = (&backend.live, Counters::default());
        let counters = backend.counters().unwrap_or(&none);
        Self {
            id: backend.id.to_string(),
            beside: backend.beside.as_ref().map(ToString::to_string),
            address: backend.address.as_ref().map(std::string::ToString::to_string),
            state: backend.state.as_str().to_owned(),
            weight: backend.membership.weight,
            tier: backend.membership.tier,
            max_connections: backend.membership.max_connections,
            limit: None,
            share: four_digits(share),
            now: four_digits(share_now),
            replica: backend.replica.as_ref().map(Replica::of),
            outdated: live.outdated.load(Ordering::Relaxed),
            restarts: backend.restarts,
            last_exit: backend.last_exit.as_ref().map(|exit| Exit {
                reason: exit.reason.clone(),
                code: exit.code,
                seconds_ago: now.saturating_duration_since(exit.at).as_secs_f64(),
                output: exit.output.clone(),
            }),
            connections: BackendConnections {
                active: live.active.load(Ordering::Relaxed),
                total: counters.total.load(Ordering::Relaxed),
                failed: counters.failures.total(),
                displaced: counters.displaced.load(Ordering::Relaxed),
                cut_by_drain: counters.cut_by_drain.load(Ordering::Relaxed),
            },
            bytes: Moved { from_client: counters.from_client.total(), to_client: counters.to_client.total() },
            health: Health {
                last: backend.last_check().map(str::to_owned),
                since_seconds: now.saturating_duration_since(backend.health.since).as_secs_f64(),
            },
            admission: four_digits(backend.admission.as_part()),
            agent: backend.advice.as_ref().map(|advice| advice.text.to_string()),
            drain: backend.drain.map(|drain| Drain::of(drain, now)),
            ejections: counters.ejections.load(Ordering::Relaxed),
        }
    }
}

/// Precise enough for a person.
pub(super) fn four_digits(part: f64) -> f64 {
    (part * 1e4).round() / 1e4
}

impl Drain {
    fn of(drain: backend::Drain, now: Instant) -> Self {
        Self {
            since_seconds: now.saturating_duration_since(drain.since).as_secs_f64(),
            deadline_in_seconds: drain.deadline.map(|at| at.saturating_duration_since(now).as_secs_f64()),
            leaves: drain.leaves,
        }
    }
}

impl Replica {
    fn of(replica: &backend::Replica) -> Self {
        match replica {
            backend::Replica::Process { pid } => Self::Process { pid: *pid },
            backend::Replica::Container { id, name, .. } => {
                Self::Container { container: id.to_string(), name: name.to_string() }
            }
        }
    }
}
