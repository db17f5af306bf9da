//! Listeners and pools of a config that does not run: enough to explain where a connection would go if all backends were
//! healthy.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use metrics_exporter_prometheus::BuildError;
use tokio::sync::mpsc;

use super::listeners::routing;
use super::settings::{base_route, publishing, route};
use crate::address::Address;
use crate::api::explain::Known;
use crate::backend::Membership;
use crate::config::{self, Config};
use crate::control::Event;
use crate::control::provider::slots;
use crate::control::publisher::{Publisher, Settings};
use crate::metrics::Exporter;
use crate::proxy::{Route, Routing};

/// Listeners and pools of a config. Pools that find their backends by a label have none.
#[derive(Debug)]
pub struct Offline {
    listeners: Vec<(String, Routing)>,
    pools: Vec<Route>,
}

impl Offline {
    /// Builds the rings of all pools. Opens nothing and looks up no name.
    ///
    /// # Errors
    /// When the histograms cannot be set up.
    pub fn new(config: &Config) -> Result<Self, BuildError> {
        let exporter = Exporter::new()?;
        let pools: Vec<_> = config.pools.iter().map(|pool| pool_route(pool, &exporter)).collect();
        let routes: HashMap<&str, &Route> = pools.iter().map(|route| (&*route.pool, route)).collect();
        let of = |listener: &config::Listener| (listener.name.clone(), routing(listener, &routes, &exporter, None));
        let listeners = config.listeners.iter().map(of).collect();
        Ok(Self { listeners, pools })
    }

    /// What there is to explain.
    pub fn known(&self) -> Known<'_> {
        let listeners = self.listeners.iter().map(|(name, routing)| (name.as_str(), routing));
        Known { listeners: listeners.collect(), pools: self.pools.iter().collect() }
    }
}

fn pool_route(pool: &config::Pool, exporter: &Exporter) -> Route {
    // The address does not matter to the ring.
    let address = Address::Ip(([0, 0, 0, 0], 0).into());
    let joined = members(pool).into_iter().flat_map(|(id, membership)| {
        let started = Event::Started { id: Arc::clone(&id), address: address.clone(), replica: None };
        [Event::Joined { id, membership }, started]
    });
    // Without checks, a backend is healthy at once.
    let settings = Settings { is_checked: false, slow_start: std::time::Duration::ZERO, ..publishing(pool) };
    let publisher = Publisher::new(pool.name.as_str().into(), settings, joined, Instant::now());
    let (reports, _) = mpsc::channel(1);
    route(&base_route(pool, publisher.table(), exporter), pool, &reports, None)
}

/// The backends of a pool, as its provider lists them.
fn members(pool: &config::Pool) -> Vec<(Arc<str>, Membership)> {
    if let Some(backends) = pool.provider.static_backends() {
        return backends
            .iter()
            .map(|backend| (backend.id.as_str().into(), Membership { is_drained: false, ..backend.membership }))
            .collect();
    }
    let slots = pool.provider.replicas().map_or(Vec::new(), |replicas| slots(&pool.name, replicas));
    slots.into_iter().map(|slot| (slot, Membership::weighing(1))).collect()
}
