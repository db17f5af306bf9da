//! The provider `static`: looks up the host names of listed backends.
//!
//! Ringway looks a name up when it starts and when it reloads. While a backend has no address, or fails its checks,
//! Ringway repeats the look-up: the name may have another address now, or another of its addresses may answer.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use crate::address::Address;
use crate::backend::State;
use crate::control::provider::Location;
use crate::control::{Event, health};
use crate::table::{Table, TableCell};

/// Longest time for all look-ups of a start or a reload, which run side by side.
const PATIENCE: Duration = Duration::from_secs(10);

/// Look-ups that run at the same time. Each takes a thread of the resolver.
const AT_ONCE: usize = 32;

/// How long an address may take to accept a connection, if a name has several.
const ACCEPTS: Duration = Duration::from_secs(1);

/// Wait before the first repeated look-up; doubles each time.
const FIRST: Duration = Duration::from_secs(1);

/// Longest wait between two look-ups.
const LONGEST: Duration = Duration::from_secs(30);

/// The address of each listed backend that has one.
pub type Addresses = BTreeMap<Arc<str>, Address>;

/// The addresses, shared with [`follow`].
pub type SharedAddresses = Arc<Mutex<Addresses>>;

/// Where a listed backend is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    /// The backend.
    pub id: Arc<str>,
    /// Where it listens.
    pub location: Location,
}

impl Name {
    /// The address, or the host and port that need a look-up.
    fn address(&self) -> Result<Address, (&str, u16)> {
        match &self.location {
            Location::Host { host, port } => {
                let ip = host.parse::<IpAddr>().map_err(|_| (host.as_str(), *port))?;
                Ok(Address::Ip(SocketAddr::new(ip, *port)))
            }
            Location::Unix { address } => Ok(address.clone()),
        }
    }
}

/// Looks up all names side by side. The results are in the order of the names.
pub async fn resolve_all(names: &[Name]) -> Vec<io::Result<Address>> {
    let at_once = Arc::new(Semaphore::new(AT_ONCE));
    let mut lookups = JoinSet::new();
    let mut found: Vec<io::Result<Address>> = Vec::with_capacity(names.len());
    for (n, name) in names.iter().enumerate() {
        let address = name.address();
        if let Err((host, port)) = address {
            let (at_once, host) = (Arc::clone(&at_once), host.to_owned());
            lookups.spawn(async move {
                let _permit = at_once.acquire().await;
                (n, resolve(&host, port).await.map(Address::Ip))
            });
        }
        found.push(address.map_err(|_| {
            io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {} s", PATIENCE.as_secs()))
        }));
    }
    let _ = tokio::time::timeout(PATIENCE, async {
        while let Some(Ok((n, result))) = lookups.join_next().await {
            found[n] = result;
        }
    })
    .await;
    found
}

/// The first address of a name that accepts a connection; if none does, the first. IPv4 comes before IPv6, so that
/// instances on one network agree.
async fn resolve(host: &str, port: u16) -> io::Result<SocketAddr> {
    let mut addresses: Vec<SocketAddr> = tokio::net::lookup_host((host, port)).await?.collect();
    addresses.sort_by_key(SocketAddr::is_ipv6);
    addresses.dedup();
    let first = *addresses.first().ok_or(io::ErrorKind::NotFound)?;
    if addresses.len() == 1 {
        return Ok(first);
    }
    let mut tries: Vec<_> = addresses
        .iter()
        .map(|&address| tokio::spawn(async move { health::accepts(&Address::Ip(address), ACCEPTS).await }))
        .collect();
    for (address, accepts) in std::iter::zip(&addresses, &mut tries) {
        if accepts.await.unwrap_or_default() {
            return Ok(*address);
        }
    }
    Ok(first)
}

/// Repeats the look-ups of backends that need one, until the pool ends.
pub async fn follow(
    pool: Arc<str>,
    mut names: watch::Receiver<Vec<Name>>,
    addresses: SharedAddresses,
    table: TableCell,
    events: mpsc::Sender<Event>,
) {
    let mut changes = table.watch();
    let mut wait = FIRST;
    // Only these can change their addresses. There can be thousands of others.
    let hosts = |names: &mut watch::Receiver<Vec<Name>>| -> Vec<Name> {
        names.borrow_and_update().iter().filter(|name| name.address().is_err()).cloned().collect()
    };
    let mut of_hosts = hosts(&mut names);
    loop {
        if names.has_changed().unwrap_or(false) {
            of_hosts = hosts(&mut names);
        }
        let due = due(&of_hosts, &table.load());
        if due.is_empty() {
            wait = FIRST;
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                changed = names.changed() => match changed {
                    Ok(()) => of_hosts = hosts(&mut names),
                    Err(_) => return,
                },
            }
            continue;
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(LONGEST);
        for (name, found) in std::iter::zip(&due, resolve_all(&due).await) {
            let Ok(address) = found else { continue };
            // A reload may have given the backend another name meanwhile.
            let is_current = names.borrow().contains(name);
            let set = || {
                addresses.lock().unwrap_or_else(PoisonError::into_inner).insert(Arc::clone(&name.id), address.clone())
            };
            if !is_current || set().as_ref() == Some(&address) {
                continue;
            }
            tracing::info!(%pool, backend = %name.id, name = %name.location, %address, "the backend has a new address");
            let event = Event::Started { id: Arc::clone(&name.id), address, replica: None };
            if events.send(event).await.is_err() {
                return;
            }
        }
    }
}

/// Those names whose backend has no address or fails its checks.
fn due(names: &[Name], table: &Table) -> Vec<Name> {
    let down = |name: &&Name| {
        table
            .backends()
            .find(&name.id)
            .is_some_and(|backend| matches!(backend.state, State::Starting | State::Unhealthy))
    };
    names.iter().filter(down).cloned().collect()
}
