//! The provider `static`: backends that the config lists.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::source::{Addresses, Boxed, Prepared, Source, Update};
use crate::app::StartError;
use crate::config::{self, StaticBackend};
use crate::control::Event;
use crate::control::provider::{Listed, resolve};

/// The resolved address of each backend.
#[derive(Debug)]
struct Fixed(Addresses);

pub(super) async fn prepare(key_path: &str, backends: &[StaticBackend]) -> Result<Prepared, StartError> {
    let addresses = resolve_all(key_path, backends).await?;
    let mut known = Vec::new();
    for backend in backends {
        let id: Arc<str> = backend.id.as_str().into();
        known.push(Event::Joined { id: Arc::clone(&id), weight: backend.weight });
        known.extend(addresses.get(&id).map(|&address| Event::Started { id, address, replica: None }));
    }
    Ok(Prepared { source: Box::new(Fixed(addresses)), known, engine_status: None, start: Box::new(|_| {}) })
}

impl Source for Fixed {
    fn prepare_update<'a>(
        &'a self,
        key_path: &'a str,
        _old: &'a config::Pool,
        new: &'a config::Pool,
    ) -> Boxed<'a, Result<Addresses, StartError>> {
        Box::pin(resolve_all(key_path, new.provider.static_backends().unwrap_or_default()))
    }

    fn update(&mut self, update: &Update<'_>) -> Vec<Event> {
        let backends = update.pool.provider.static_backends().unwrap_or_default();
        let events = changed_backends(&self.0, &update.addresses, backends, update.pool.drain);
        self.0.clone_from(&update.addresses);
        events
    }
}

/// The events that bring the publisher from the old to the new backends.
fn changed_backends(known: &Addresses, found: &Addresses, backends: &[StaticBackend], drain: Duration) -> Vec<Event> {
    let stays: HashSet<&str> = backends.iter().map(|backend| backend.id.as_str()).collect();
    let gone = known.keys().filter(|id| !stays.contains(&***id));
    let mut events: Vec<_> = gone.map(|id| Event::Leaving { id: Arc::clone(id), within: drain }).collect();
    for backend in backends {
        let id: Arc<str> = backend.id.as_str().into();
        events.push(Event::Joined { id: Arc::clone(&id), weight: backend.weight });
        let address: Option<SocketAddr> = found.get(&id).copied();
        if let Some(address) = address.filter(|address| known.get(&id) != Some(address)) {
            events.push(Event::Started { id, address, replica: None });
        }
    }
    events
}

async fn resolve_all(key_path: &str, backends: &[StaticBackend]) -> Result<Addresses, StartError> {
    let mut found = Addresses::new();
    for (n, backend) in backends.iter().enumerate() {
        let address = resolve(&backend.host, backend.port).await.map_err(|error| StartError::Resolve {
            key_path: format!("{key_path}.provider.static[{n}].address"),
            host: backend.host.clone(),
            error,
        })?;
        found.insert(backend.id.as_str().into(), address);
    }
    Ok(found)
}

/// Converts a backend that a command adds into the form of the config.
pub(in crate::app) fn listed(backend: Listed) -> StaticBackend {
    StaticBackend { id: backend.id.to_string(), host: backend.host, port: backend.port, weight: backend.weight }
}
