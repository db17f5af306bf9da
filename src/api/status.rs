//! `GET /api/status`, on the side port. [`on_listener`](super::on_listener) answers it on listeners.

mod member;
mod provider;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use axum::Json;
use axum::extract::State as Extract;
use serde::{Deserialize, Serialize};

pub use self::member::{BackendConnections, Drain, Exit, Health, Member, Moved, Replica};
pub use self::provider::{Dns, Engine, File, LastRollout, Provider, Rollout, Scaling};
use super::{ListenerView, LogView, ProviderView, State};
use crate::control::command::Differs;
use crate::control::provider::Location;
use crate::labels::Label as _;
use crate::proxy::{Limit, Route};
use crate::table::Table;

/// In place of a pool: the connections are reset.
const RESET: &str = "reset";

/// The response. Later versions can add fields but never rename one.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/api.md explains each field")]
pub struct Status {
    pub version: String,
    pub pid: Option<u32>,
    pub uptime_seconds: f64,
    pub ready: bool,
    /// `None`: the built-in config, or hidden.
    #[serde(default)]
    pub config: Option<String>,
    #[serde(default)]
    pub config_error: Option<String>,
    /// `None`: nobody can change the log, or hidden.
    #[serde(default)]
    pub log: Option<Log>,
    pub listeners: Vec<Listener>,
    pub pools: Vec<Pool>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/api.md explains each field")]
pub struct Log {
    pub filter: String,
    pub ends_in_seconds: Option<f64>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/api.md explains each field")]
pub struct Listener {
    pub name: String,
    pub address: Option<String>,
    pub pool: String,
    #[serde(default)]
    pub routes: Vec<RouteTaken>,
    pub connections: Connections,
    pub max_connections: Option<u64>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/api.md explains each field")]
pub struct RouteTaken {
    pub name: String,
    pub pool: Option<String>,
    pub connections: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/api.md explains each field")]
pub struct Connections {
    pub active: u64,
    pub total: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/api.md explains each field")]
pub struct Pool {
    pub name: String,
    pub key: String,
    #[serde(default)]
    pub balance: String,
    #[serde(default)]
    pub bound: Option<u16>,
    pub provider: Provider,
    pub ring: Ring,
    pub table_generation: u64,
    pub panic: bool,
    #[serde(default)]
    pub tiers: Vec<u16>,
    #[serde(default)]
    pub spilled: bool,
    pub drain_seconds: f64,
    #[serde(default)]
    pub cut_by_drain: u64,
    pub differs: Vec<Differs>,
    pub backends: Vec<Member>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/api.md explains each field")]
pub struct Ring {
    pub digest: String,
    pub points: usize,
    pub virtual_nodes: u32,
    pub probes: u32,
    pub seed: u64,
}

pub(super) async fn status(Extract(state): Extract<Arc<State>>) -> Json<Status> {
    Json(Status::of(&state))
}

impl Status {
    /// Finds a pool by its own name, or by the name of a listener that uses it.
    pub fn pool(&self, name: &str) -> Option<&Pool> {
        let find = |name: &str| self.pools.iter().find(|pool| pool.name == name);
        let listener = self.listeners.iter().find(|listener| listener.name == name);
        let of_route = |listener: &Listener| listener.routes.iter().find_map(|route| route.pool.clone());
        let behind = listener
            .and_then(|listener| find(&listener.pool).map(|pool| pool.name.clone()).or_else(|| of_route(listener)));
        find(name).or_else(|| find(&behind?))
    }

    /// Keeps what clients of a listener may see: names, states, counts and shares. Removes addresses, process ids,
    /// containers, run-time changes, and texts of servers, replicas and the engine.
    pub(super) fn for_strangers(mut self) -> Self {
        (self.pid, self.config, self.config_error) = (None, None, None);
        for listener in &mut self.listeners {
            listener.address = None;
        }
        for pool in &mut self.pools {
            (pool.provider.engine, pool.provider.dns, pool.provider.file) = (None, None, None);
            if let Some(rollout) = &mut pool.provider.rollout {
                // It has texts of checks and of replicas.
                rollout.reason = None;
            }
            pool.differs.clear();
            for (n, member) in pool.backends.iter_mut().enumerate() {
                (member.address, member.replica, member.last_exit, member.health.last) = (None, None, None, None);
                member.agent = None;
                // Without an id in the config, the address is the id.
                if Location::parse(&member.id).is_ok() {
                    member.id = format!("backend-{}", n + 1);
                }
            }
        }
        self
    }

    /// Collects the current status of the app.
    pub fn of(state: &State) -> Self {
        let view = state.view();
        let pools = std::iter::zip(&view.pools, std::iter::zip(&view.providers, &view.differs));
        Self {
            version: crate::VERSION.to_owned(),
            pid: Some(std::process::id()),
            uptime_seconds: state.started.elapsed().as_secs_f64(),
            ready: state.ready.load(Ordering::Relaxed),
            config: view.config.as_ref().map(|path| path.display().to_string()),
            config_error: state.config_error.load().as_ref().map(ToString::to_string),
            log: view.log.as_ref().map(|log| Log::of(log, Instant::now())),
            listeners: view.listeners.iter().map(Listener::of).collect(),
            pools: pools.map(|(pool, (provider, differs))| Pool::of(pool, provider, differs)).collect(),
        }
    }
}

impl Log {
    fn of(log: &LogView, now: Instant) -> Self {
        match &log.changed {
            Some((filter, None)) => Self { filter: filter.clone(), ends_in_seconds: None },
            Some((filter, Some(ends))) if *ends > now => {
                Self { filter: filter.clone(), ends_in_seconds: Some((*ends - now).as_secs_f64()) }
            }
            _ => Self { filter: log.first.clone(), ends_in_seconds: None },
        }
    }
}

impl Listener {
    fn of(listener: &ListenerView) -> Self {
        let connections = Connections { active: listener.stats.active(), total: listener.stats.accepted() };
        Self {
            name: listener.name.to_string(),
            address: Some(listener.addresses.clone()),
            pool: listener.default_pool().unwrap_or(RESET).to_owned(),
            routes: RouteTaken::all(listener),
            connections,
            max_connections: Some(listener.limit.size() as u64).filter(|&most| most < Limit::UNLIMITED),
        }
    }
}

impl RouteTaken {
    /// The routes of a listener; empty if it has only its default.
    fn all(listener: &ListenerView) -> Vec<Self> {
        let routing = &listener.routing;
        let taken = routing.rules.iter().filter(|_| routing.has_rules()).map(|rule| Self {
            name: rule.name.to_string(),
            pool: rule.route.map(|route| routing.routes[route].pool.to_string()),
            connections: rule.matched.load(Ordering::Relaxed),
        });
        taken.collect()
    }
}

impl Pool {
    fn of(pool: &Route, provider: &ProviderView, differs: &[Differs]) -> Self {
        let table = pool.table.load();
        let parameters = table.ring().parameters();
        let ring = Ring {
            digest: format!("{:016x}", table.ring().digest()),
            points: table.ring().points(),
            virtual_nodes: parameters.virtual_nodes,
            probes: parameters.probes,
            seed: parameters.seed,
        };
        let backends = members(&table, pool);
        Self {
            name: pool.pool.to_string(),
            key: pool.key.as_str().to_owned(),
            balance: pool.balance.as_str().to_owned(),
            bound: pool.bound.as_ref().map(|bound| bound.percent()),
            provider: Provider::of(provider),
            ring,
            table_generation: table.generation(),
            panic: table.is_panic(),
            tiers: table.joined_tiers().collect(),
            spilled: table.has_spilled(),
            drain_seconds: pool.drain.as_secs_f64(),
            cut_by_drain: pool.stats.cut_by_drain.load(Ordering::Relaxed),
            differs: differs.to_vec(),
            backends,
        }
    }
}

fn members(table: &Table, pool: &Route) -> Vec<Member> {
    let now = Instant::now();
    let shares = std::iter::zip(table.ring().shares(), table.shares_now());
    let members = std::iter::zip(std::iter::zip(table.backends(), pool.limits(table)), shares);
    let member =
        |((backend, limit), (&share, &now_share))| Member { limit, ..Member::of(backend, share, now_share, now) };
    members.map(member).collect()
}
