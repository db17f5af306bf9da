//! The provider `static`: backends that the config lists.

use std::sync::Arc;

use super::list::{List, inherited, resolve};
use super::source::{Boxed, Prepared, ProviderStatus, Source, Update};
use crate::app::StartError;
use crate::app::context::PoolContext;
use crate::config::{self, StaticBackend};
use crate::control::Event;
use crate::control::provider::Listed;
use crate::control::provider::names::{Addresses, Resolve};

/// The list of the config.
#[derive(Debug)]
struct Fixed(List);

pub(super) async fn prepare(
    key_path: &str,
    pool: &config::Pool,
    backends: &[StaticBackend],
    context: &PoolContext<'_>,
) -> Result<Prepared, StartError> {
    // A machine may start before its name server. A reload has a person who can mend the name.
    let (key_path, known) = (format!("{key_path}.provider.static"), inherited(&pool.name, context));
    let addresses = resolve(&key_path, backends, &pool.connect.outgoing, |_| context.is_start, known).await?;
    let (list, known) = List::new(backends, &pool.connect.outgoing, addresses);
    let (pool, started) = (pool.name.as_str().into(), list.clone());
    Ok(Prepared {
        source: Box::new(Fixed(list)),
        known,
        status: ProviderStatus::Independent,
        start: Box::new(move |start| started.start(pool, &start)),
    })
}

impl Source for Fixed {
    fn prepare_update<'a>(
        &'a self,
        key_path: &'a str,
        _old: &'a config::Pool,
        new: &'a config::Pool,
    ) -> Boxed<'a, Result<Addresses, StartError>> {
        Box::pin(async move {
            let backends = new.provider.static_backends().unwrap_or_default();
            // A name that did not change keeps its address while the name server is away.
            let key_path = format!("{key_path}.provider.static");
            let known = self.0.known();
            let address = |backend: &StaticBackend| known.address(backend);
            resolve(&key_path, backends, &new.connect.outgoing, |backend| known.has(backend), address).await
        })
    }

    fn update(&mut self, update: &Update<'_>) -> Vec<Event> {
        let backends = update.pool.provider.static_backends().unwrap_or_default();
        let events = self.0.change(backends, &update.pool.connect.outgoing, &update.addresses, update.pool.drain);
        // The run-time changes of a backend end with it, and a drain is one of them.
        let undrained = events.iter().filter_map(|event| match event {
            Event::Leaving { id, .. } => Some(Event::DrainCancelled { id: Arc::clone(id) }),
            _ => None,
        });
        undrained.collect::<Vec<_>>().into_iter().chain(events.iter().cloned()).collect()
    }
}

/// Converts a backend that a command adds into the form of the config.
pub(in crate::app) fn listed(backend: Listed) -> StaticBackend {
    let Listed { id, location, membership } = backend;
    StaticBackend { id: id.to_string(), location, membership, resolve: Resolve::Refresh }
}
