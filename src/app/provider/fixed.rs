//! The provider `static`: backends that the config lists.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use super::source::{Boxed, Prepared, ProviderStatus, Source, Update};
use crate::address::Address;
use crate::app::StartError;
use crate::app::context::PoolContext;
use crate::app::tasks::until;
use crate::config::{self, StaticBackend};
use crate::control::Event;
use crate::control::provider::Listed;
use crate::control::provider::Location;
use crate::control::provider::names::{Addresses, Name, REFRESH, Resolve, SharedAddresses, follow, resolve_all};

/// The addresses of the backends, and where the task that repeats look-ups finds their names.
#[derive(Debug)]
struct Fixed {
    addresses: SharedAddresses,
    names: watch::Sender<Vec<Name>>,
}

pub(super) async fn prepare(
    key_path: &str,
    pool: &config::Pool,
    backends: &[StaticBackend],
    context: &PoolContext<'_>,
) -> Result<Prepared, StartError> {
    // A machine may start before its name server. A reload has a person who can mend the name.
    let known: HashMap<_, _> = context.known(&pool.name).map(|named| (&*named.id, named)).collect();
    let kept = |backend: &StaticBackend| {
        let known = known.get(backend.id.as_str()).filter(|known| known.name == backend.location.to_string());
        known.map(|known| Some(Address::Ip(known.address)))
    };
    let addresses = resolve(key_path, backends, context.is_start, kept).await?;
    let mut known = Vec::new();
    for backend in backends {
        let id: Arc<str> = backend.id.as_str().into();
        known.push(Event::Joined { id: Arc::clone(&id), weight: backend.weight });
        known.extend(addresses.get(&id).map(|address| Event::Started { id, address: address.clone(), replica: None }));
    }
    let addresses = Arc::new(Mutex::new(addresses));
    let (sender, names) = watch::channel(names(backends));
    let (pool, shared): (Arc<str>, _) = (pool.name.as_str().into(), Arc::clone(&addresses));
    Ok(Prepared {
        source: Box::new(Fixed { addresses, names: sender }),
        known,
        status: ProviderStatus::Independent,
        start: Box::new(move |start| {
            let following = follow(pool, REFRESH, names, shared, start.table, start.events);
            start.tasks.spawn(until(start.over, following));
        }),
    })
}

impl Source for Fixed {
    fn prepare_update<'a>(
        &'a self,
        key_path: &'a str,
        old: &'a config::Pool,
        new: &'a config::Pool,
    ) -> Boxed<'a, Result<Addresses, StartError>> {
        Box::pin(async {
            let (old, new) = (old.provider.static_backends(), new.provider.static_backends());
            let (old, new) = (old.unwrap_or_default(), new.unwrap_or_default());
            // A name that did not change keeps its address while the name server is away.
            let kept = |backend: &StaticBackend| {
                let same = |old: &&StaticBackend| old.id == backend.id && old.location == backend.location;
                let addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
                old.iter().find(same).map(|old| addresses.get(&*old.id).cloned())
            };
            resolve(key_path, new, false, kept).await
        })
    }

    fn update(&mut self, update: &Update<'_>) -> Vec<Event> {
        let backends = update.pool.provider.static_backends().unwrap_or_default();
        let mut addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.names.send_replace(names(backends));
        let events = changed_backends(&before, &addresses, &update.addresses, backends, update.pool.drain);
        addresses.clone_from(&update.addresses);
        events
    }
}

/// The events that bring the publisher from the old to the new backends.
fn changed_backends(
    before: &[Name],
    known: &Addresses,
    found: &Addresses,
    backends: &[StaticBackend],
    drain: Duration,
) -> Vec<Event> {
    let stays: HashSet<&str> = backends.iter().map(|backend| backend.id.as_str()).collect();
    let gone = before.iter().map(|name| &name.id).filter(|id| !stays.contains(&***id));
    let mut events: Vec<_> = gone.map(|id| Event::Leaving { id: Arc::clone(id), within: drain }).collect();
    for backend in backends {
        let id: Arc<str> = backend.id.as_str().into();
        events.push(Event::Joined { id: Arc::clone(&id), weight: backend.weight });
        let address = found.get(&id);
        if let Some(address) = address.filter(|&address| known.get(&id) != Some(address)) {
            events.push(Event::Started { id, address: address.clone(), replica: None });
        }
    }
    events
}

fn name(backend: &StaticBackend) -> Name {
    Name { id: backend.id.as_str().into(), location: backend.location.clone(), resolve: backend.resolve }
}

fn names(backends: &[StaticBackend]) -> Vec<Name> {
    backends.iter().map(name).collect()
}

/// The addresses of the backends. A name without one is an error, unless `kept` knows the backend or `may_miss` allows it.
/// Ringway looks such a name up again later.
async fn resolve(
    key_path: &str,
    backends: &[StaticBackend],
    may_miss: bool,
    kept: impl Fn(&StaticBackend) -> Option<Option<Address>>,
) -> Result<Addresses, StartError> {
    let results = resolve_all(&names(backends), |_| None).await;
    let mut found = Addresses::new();
    for (backend, result) in std::iter::zip(backends, results) {
        let known = result.is_err().then(|| kept(backend)).flatten();
        let address = match (result, known) {
            (Ok(address), _) => Some(address),
            (Err(_), Some(kept)) => kept,
            (Err(error), None) => {
                let error = unresolved(key_path, backend, error);
                if !may_miss {
                    return Err(error);
                }
                tracing::warn!("{error}; the backend is starting until Ringway can resolve its name");
                None
            }
        };
        found.extend(address.map(|address| (backend.id.as_str().into(), address)));
    }
    Ok(found)
}

/// The backends whose names cannot be resolved now, each as the error that names its key path.
pub(super) async fn unknown_names(key_path: &str, backends: &[StaticBackend]) -> Vec<StartError> {
    let results = std::iter::zip(backends, resolve_all(&names(backends), |_| None).await);
    results.filter_map(|(backend, result)| Some(unresolved(key_path, backend, result.err()?))).collect()
}

fn unresolved(key_path: &str, backend: &StaticBackend, error: io::Error) -> StartError {
    let key_path = format!("{key_path}.provider.static[{}].address", backend.id);
    // Only host names need a look-up.
    let host = if let Location::Host { host, .. } = &backend.location { host.clone() } else { String::new() };
    StartError::Resolve { key_path, host, error }
}

/// Converts a backend that a command adds into the form of the config.
pub(in crate::app) fn listed(backend: Listed) -> StaticBackend {
    let (id, location, weight) = (backend.id.to_string(), backend.location, backend.weight);
    StaticBackend { id, location, weight, resolve: Resolve::Refresh }
}
