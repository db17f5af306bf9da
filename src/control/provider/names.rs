//! The provider `static`: looks up the host names of listed backends.
//!
//! Ringway looks a name up when it starts, when it reloads, and about every 30 seconds. While a backend has no address, or fails
//! its checks, Ringway repeats the look-up sooner: the name may have another address now, or another of its addresses may
//! answer. A failed look-up changes nothing.
//!
//! These look-ups ask the system (getaddrinfo(3)), because names may come from more than DNS: `/etc/hosts`, mDNS, LDAP.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, HashSet};
use std::hash::BuildHasher as _;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use crate::address::Address;
use crate::backend::State;
use crate::control::provider::Location;
use crate::control::{Event, health};
use crate::label_enum;
use crate::outgoing::Outgoing;
use crate::table::{Table, TableCell};

/// Longest time for all look-ups of a start or a reload, which run side by side.
const PATIENCE: Duration = Duration::from_secs(5);

/// Look-ups that run at the same time. Each takes a thread of the resolver.
const AT_ONCE: usize = 32;

/// How long an address may take to accept a connection, if a name has several.
const ACCEPTS: Duration = Duration::from_secs(1);

/// Wait before the first repeated look-up; doubles each time.
const FIRST: Duration = Duration::from_secs(1);

/// Longest wait between two look-ups.
const LONGEST: Duration = Duration::from_secs(30);

/// Time from one look-up of a healthy backend's name to the next. Up to a tenth shorter, so that instances do not all ask at the
/// same moment.
pub const REFRESH: Duration = Duration::from_secs(30);

label_enum! {
    /// How often Ringway looks a name up.
    #[derive(Default, Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum Resolve {
        /// Again and again.
        #[default]
        Refresh => "refresh",
        /// At a start, at a reload, and while the backend fails.
        Once => "once",
    }
}

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
    /// How often Ringway looks it up.
    pub resolve: Resolve,
    /// Where connections to it come from; `None`: the kernel decides.
    pub outgoing: Option<Arc<Outgoing>>,
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

/// Looks up all names side by side. The results are in the order of the names. An address that is `current` stays as long as the
/// name has it.
pub async fn resolve_all(names: &[Name], current: impl Fn(&Name) -> Option<SocketAddr>) -> Vec<io::Result<Address>> {
    let at_once = Arc::new(Semaphore::new(AT_ONCE));
    let mut lookups = JoinSet::new();
    let mut found: Vec<io::Result<Address>> = Vec::with_capacity(names.len());
    for (n, name) in names.iter().enumerate() {
        let address = name.address();
        if let Err((host, port)) = address {
            let (at_once, host, current) = (Arc::clone(&at_once), host.to_owned(), current(name));
            let outgoing = name.outgoing.clone();
            lookups.spawn(async move {
                let _permit = at_once.acquire().await;
                (n, resolve(&host, port, current, outgoing).await.map(Address::Ip))
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

/// The current address, if the name still has it; else the first that accepts a connection; if none does, the first. IPv4
/// comes before IPv6, so that instances on one network agree.
async fn resolve(
    host: &str,
    port: u16,
    current: Option<SocketAddr>,
    outgoing: Option<Arc<Outgoing>>,
) -> io::Result<SocketAddr> {
    let mut addresses: Vec<SocketAddr> = tokio::net::lookup_host((host, port)).await?.collect();
    if let Some(current) = current.filter(|current| addresses.contains(current)) {
        return Ok(current);
    }
    addresses.sort_by_key(SocketAddr::is_ipv6);
    addresses.dedup();
    let first = *addresses.first().ok_or(io::ErrorKind::NotFound)?;
    if addresses.len() == 1 {
        return Ok(first);
    }
    let mut tries: Vec<_> = addresses
        .iter()
        .map(|&address| {
            let outgoing = outgoing.clone();
            tokio::spawn(async move { health::accepts(&Address::Ip(address), outgoing, ACCEPTS).await })
        })
        .collect();
    for (address, accepts) in std::iter::zip(&addresses, &mut tries) {
        if accepts.await.unwrap_or_default() {
            return Ok(*address);
        }
    }
    Ok(first)
}

/// Repeats the look-ups of backends that need one, until the pool ends. `every` is the time from one look-up of a healthy
/// backend's name to the next.
pub async fn follow(
    pool: Arc<str>,
    every: Duration,
    mut names: watch::Receiver<Vec<Name>>,
    addresses: SharedAddresses,
    table: TableCell,
    events: mpsc::Sender<Event>,
) {
    let (mut changes, random) = (table.watch(), RandomState::new());
    let refreshed = || {
        let chance = random.hash_one(Instant::now()) as f64 / u64::MAX as f64;
        Instant::now() + every.mul_f64(1.0 - chance / 10.0)
    };
    let (mut wait, mut refresh) = (FIRST, refreshed());
    // Healthy backends whose current address was not in the last answer.
    let mut missing = HashSet::new();
    // Only these can change their addresses. There can be thousands of others.
    let hosts = |names: &mut watch::Receiver<Vec<Name>>| -> Vec<Name> {
        names.borrow_and_update().iter().filter(|name| name.address().is_err()).cloned().collect()
    };
    let mut of_hosts = hosts(&mut names);
    loop {
        let down = down(&of_hosts, &table.load());
        let refreshes = of_hosts.iter().any(|name| name.resolve == Resolve::Refresh);
        let next = [refreshes.then_some(refresh), (!down.is_empty()).then(|| Instant::now() + wait)];
        let next = next.into_iter().flatten().min();
        tokio::select! {
            () = tokio::time::sleep_until(next.unwrap_or(refresh).into()), if next.is_some() => {}
            changed = names.changed() => match changed {
                Ok(()) => {
                    of_hosts = hosts(&mut names);
                    missing.clear();
                    continue;
                }
                Err(_) => return,
            },
            changed = changes.changed(), if down.is_empty() => match changed {
                Ok(()) => continue,
                Err(_) => return,
            },
        }
        // A backend may have recovered meanwhile.
        let down = self::down(&of_hosts, &table.load());
        wait = if down.is_empty() { FIRST } else { (wait * 2).min(LONGEST) };
        let is_down = |name: &Name| down.iter().any(|down| down.id == name.id);
        let mut asked = down.clone();
        if Instant::now() >= refresh {
            refresh = refreshed();
            let others = of_hosts.iter().filter(|name| name.resolve == Resolve::Refresh && !is_down(name));
            asked.extend(others.cloned());
        }
        let known = addresses.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let current = |name: &Name| known.get(&name.id).filter(|_| !is_down(name))?.ip();
        let found = resolve_all(&asked, current).await;
        for (name, found) in std::iter::zip(&asked, found) {
            let Ok(address) = found else { continue };
            let is_current = known.get(&name.id) == Some(&address);
            // An answer can lack an address for a moment. A backend that works moves at the second one.
            if is_current {
                missing.remove(&name.id);
            }
            if is_current || (!is_down(name) && missing.insert(Arc::clone(&name.id))) {
                continue;
            }
            if !is_down(name) && !health::accepts(&address, name.outgoing.clone(), ACCEPTS).await {
                continue;
            }
            missing.remove(&name.id);
            // A reload may have given the backend another name meanwhile.
            if !names.borrow().contains(name) {
                continue;
            }
            addresses.lock().unwrap_or_else(PoisonError::into_inner).insert(Arc::clone(&name.id), address.clone());
            tracing::info!(%pool, backend = %name.id, name = %name.location, %address, "the backend has a new address");
            let event = Event::Started { id: Arc::clone(&name.id), address, replica: None };
            if events.send(event).await.is_err() {
                return;
            }
        }
    }
}

/// Those names whose backend has no address or fails its checks. In an exclusive pool without a primary, also those of standbys: a
/// name may have moved with a failover.
fn down(names: &[Name], table: &Table) -> Vec<Name> {
    let is_down = |name: &&Name| {
        table.backends().find(&name.id).is_some_and(|backend| match backend.state {
            State::Starting | State::Unhealthy => true,
            State::Standby => !table.any_healthy(),
            _ => false,
        })
    };
    names.iter().filter(is_down).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Membership;
    use crate::control::publisher::{Publisher, Settings};

    const EVERY: Duration = Duration::from_millis(20);

    /// The first event of a pool with a healthy backend at an address that its name, `localhost`, does not have.
    async fn first_event(resolve: Resolve, outgoing: Option<Arc<Outgoing>>, patience: Duration) -> Option<Event> {
        let id: Arc<str> = "a".into();
        let old = Address::Ip(([127, 0, 0, 99], 80).into());
        let started = Event::Started { id: Arc::clone(&id), address: old.clone(), replica: None };
        let known = [Event::Joined { id: Arc::clone(&id), membership: Membership::weighing(1) }, started];
        let publisher = Publisher::new("p".into(), Settings::plain(), known, Instant::now());
        // A healthy backend moves only to an address that accepts connections.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let location = Location::parse(&format!("localhost:{port}")).unwrap();
        let (_names, receiver) = watch::channel(vec![Name { id: Arc::clone(&id), location, resolve, outgoing }]);
        let addresses: SharedAddresses = Arc::new(Mutex::new([(id, old)].into()));
        let (sender, mut events) = mpsc::channel(8);
        let following = follow("p".into(), EVERY, receiver, addresses, publisher.table(), sender);
        tokio::select! {
            () = following => None,
            event = events.recv() => event,
            () = tokio::time::sleep(patience) => None,
        }
    }

    #[tokio::test]
    async fn a_healthy_backend_follows_its_name() {
        let event = first_event(Resolve::Refresh, None, Duration::from_secs(60)).await;
        let Some(Event::Started { address, .. }) = event else { panic!("{event:?}") };
        assert!(address.ip().unwrap().ip().is_loopback() && address.ip().unwrap() != ([127, 0, 0, 99], 80).into());
    }

    #[tokio::test]
    async fn a_name_that_is_looked_up_once_changes_nothing_while_the_backend_is_healthy() {
        let event = first_event(Resolve::Once, None, 20 * EVERY).await;
        assert!(event.is_none(), "{event:?}");
    }

    #[tokio::test]
    async fn a_healthy_backend_moves_only_to_an_address_that_accepts_connections_from_the_pool_s_source() {
        // A documentation address, which no machine has (RFC 5737).
        let outgoing = Outgoing { sources: vec![[198, 51, 100, 1].into()], ..Outgoing::default() };
        let event = first_event(Resolve::Refresh, Some(Arc::new(outgoing)), 20 * EVERY).await;
        assert!(event.is_none(), "{event:?}");
    }
}
