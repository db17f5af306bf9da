//! A list of backends and the addresses of their names, for the providers `static` and `file`.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use super::source::Start;
use crate::address::Address;
use crate::app::StartError;
use crate::app::context::PoolContext;
use crate::app::tasks::until;
use crate::config::StaticBackend;
use crate::control::Event;
use crate::control::provider::Location;
use crate::control::provider::names::{Addresses, Name, REFRESH, SharedAddresses, follow, resolve_all};
use crate::outgoing::Outgoing;

/// Where connections to the backends of a pool come from.
type Origin<'a> = &'a Option<Arc<Outgoing>>;

/// The addresses of the backends, and where the task that repeats look-ups finds their names.
#[derive(Debug, Clone)]
pub(super) struct List {
    addresses: SharedAddresses,
    names: watch::Sender<Vec<Name>>,
}

impl List {
    /// The list at the start of a pool, and the events that announce its backends.
    pub(super) fn new(backends: &[StaticBackend], outgoing: Origin<'_>, addresses: Addresses) -> (Self, Vec<Event>) {
        let mut known = Vec::new();
        for backend in backends {
            let id: Arc<str> = backend.id.as_str().into();
            known.push(Event::Joined { id: Arc::clone(&id), membership: backend.membership });
            let address = addresses.get(&id).cloned();
            known.extend(address.map(|address| Event::Started { id, address, replica: None }));
        }
        let addresses = Arc::new(Mutex::new(addresses));
        (Self { addresses, names: watch::Sender::new(names(backends, outgoing)) }, known)
    }

    /// Starts the task that repeats look-ups.
    pub(super) fn start(&self, pool: Arc<str>, start: &Start<'_>) {
        let (names, addresses) = (self.names.subscribe(), Arc::clone(&self.addresses));
        let following = follow(pool, REFRESH, names, addresses, start.table.clone(), start.events.clone());
        start.tasks.spawn(until(start.over.clone(), following));
    }

    /// The backends of the list: what their addresses are, if they are known.
    pub(super) fn known(&self) -> Known {
        let (names, addresses) = (self.names.borrow(), self.addresses.lock().unwrap_or_else(PoisonError::into_inner));
        let known = |name: &Name| (Arc::clone(&name.id), (name.location.clone(), addresses.get(&name.id).cloned()));
        Known(names.iter().map(known).collect())
    }

    /// Whether all look-ups try addresses from there.
    pub(super) fn comes_from(&self, outgoing: Origin<'_>) -> bool {
        self.names.borrow().iter().all(|name| name.outgoing == *outgoing)
    }

    /// Changes the list. Returns what the publisher must hear of it.
    pub(super) fn change(
        &self,
        backends: &[StaticBackend],
        outgoing: Origin<'_>,
        found: &Addresses,
        drain: Duration,
    ) -> Vec<Event> {
        let mut addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.names.send_replace(names(backends, outgoing));
        let events = changed_backends(&before, &addresses, found, backends, drain);
        addresses.clone_from(found);
        events
    }
}

/// Backends that a list has had.
pub(super) struct Known(HashMap<Arc<str>, (Location, Option<Address>)>);

impl Known {
    /// Whether the list had this backend, perhaps with another weight.
    pub(super) fn has(&self, backend: &StaticBackend) -> bool {
        self.0.get(backend.id.as_str()).is_some_and(|(location, _)| *location == backend.location)
    }

    /// The address that the backend had, if it is known.
    pub(super) fn address(&self, backend: &StaticBackend) -> Option<Address> {
        let (_, address) = self.0.get(backend.id.as_str()).filter(|(location, _)| *location == backend.location)?;
        address.clone()
    }
}

/// The addresses that an old process had from a name server, for [`resolve`].
pub(super) fn inherited(pool: &str, context: &PoolContext<'_>) -> impl Fn(&StaticBackend) -> Option<Address> + use<> {
    let known: HashMap<_, _> =
        context.known(pool).map(|named| (Arc::clone(&named.id), (named.name.clone(), named.address))).collect();
    move |backend| {
        let (name, address) = known.get(backend.id.as_str())?;
        (*name == backend.location.to_string()).then_some(Address::Ip(*address))
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
    let mut events = Vec::new();
    for backend in backends {
        let id: Arc<str> = backend.id.as_str().into();
        events.push(Event::Joined { id: Arc::clone(&id), membership: backend.membership });
        match (known.get(&id), found.get(&id)) {
            (Some(was), Some(is)) if was == is => {}
            (_, Some(address)) => events.push(Event::Started { id, address: address.clone(), replica: None }),
            // The backend is somewhere else now, and nobody knows where.
            (Some(_), None) => events.push(Event::Stopped { id, crash_loop: false, exit: None }),
            (None, None) => {}
        }
    }
    // The publisher may publish in between: backends join before others leave.
    let stays: HashSet<&str> = backends.iter().map(|backend| backend.id.as_str()).collect();
    let gone = before.iter().map(|name| &name.id).filter(|id| !stays.contains(&***id));
    events.extend(gone.map(|id| Event::Leaving { id: Arc::clone(id), within: drain }));
    events
}

fn names(backends: &[StaticBackend], outgoing: Origin<'_>) -> Vec<Name> {
    let name = |backend: &StaticBackend| Name {
        id: backend.id.as_str().into(),
        location: backend.location.clone(),
        resolve: backend.resolve,
        outgoing: outgoing.clone(),
    };
    backends.iter().map(name).collect()
}

/// The addresses of the backends. The address that `known` knows stays if the name still has it, or if the name cannot be resolved. A
/// name without an address is an error, unless `may_miss` allows it: Ringway looks the name up again later.
pub(super) async fn resolve(
    key_path: &str,
    backends: &[StaticBackend],
    outgoing: Origin<'_>,
    may_miss: impl Fn(&StaticBackend) -> bool,
    known: impl Fn(&StaticBackend) -> Option<Address>,
) -> Result<Addresses, StartError> {
    let current: HashMap<_, _> = backends.iter().filter_map(|one| Some((&*one.id, known(one)?.ip()?))).collect();
    let results = resolve_all(&names(backends, outgoing), |name| current.get(&*name.id).copied()).await;
    let mut found = Addresses::new();
    for (backend, result) in std::iter::zip(backends, results) {
        let address = match result {
            Ok(address) => Some(address),
            Err(error) => match known(backend) {
                None if !may_miss(backend) => return Err(unresolved(key_path, backend, error)),
                None => {
                    let error = unresolved(key_path, backend, error);
                    tracing::warn!("{error}; the backend is starting until Ringway can resolve its name");
                    None
                }
                known => known,
            },
        };
        found.extend(address.map(|address| (backend.id.as_str().into(), address)));
    }
    Ok(found)
}

/// The backends whose names cannot be resolved now, each as the error that names its key path.
pub(super) async fn unknown_names(key_path: &str, backends: &[StaticBackend], outgoing: Origin<'_>) -> Vec<StartError> {
    let results = std::iter::zip(backends, resolve_all(&names(backends, outgoing), |_| None).await);
    results.filter_map(|(backend, result)| Some(unresolved(key_path, backend, result.err()?))).collect()
}

fn unresolved(key_path: &str, backend: &StaticBackend, error: io::Error) -> StartError {
    let key_path = format!("{key_path}[{}].address", backend.id);
    // Only host names need a look-up.
    let host = if let Location::Host { host, .. } = &backend.location { host.clone() } else { String::new() };
    StartError::Resolve { key_path, host, error }
}
