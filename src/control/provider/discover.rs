//! Containers that somebody else runs: those with a certain label are the pool's backends as long as they run.
//! Nothing is started and nothing stopped.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::{Notify, mpsc, watch};

use crate::backend::Replica;
use crate::control::Event;
use crate::control::docker::container::{Container, State};
use crate::control::docker::engine::Engine;
use crate::control::docker::place::{self, Wanted};
use crate::control::docker::watch::{Freshness, Watch};

/// Which containers.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The pool's name.
    pub pool: Arc<str>,
    /// `name` or `name=value`.
    pub label: String,
    /// The port on which they listen.
    pub port: u16,
    /// Where they are reached.
    pub wanted: Wanted,
    /// The longest time between two full lists.
    pub resync: std::time::Duration,
}

/// A backend as the publisher was told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Told {
    replica: Replica,
    address: SocketAddr,
    is_bad: bool,
}

/// Follows the label until the task is dropped.
pub async fn follow(settings: Settings, engine: Engine, events: mpsc::Sender<Event>, freshness: Arc<Freshness>) {
    let place = place::wait_for(&engine, &settings.wanted, &settings.pool, &freshness).await;
    let (sender, mut seen) = watch::channel(None);
    let watch = Watch {
        engine,
        pool: Arc::clone(&settings.pool),
        labels: vec![settings.label.clone()],
        resync: settings.resync,
        freshness,
        poke: Arc::new(Notify::new()),
    };
    let watching = watch.run(sender);
    let following = async {
        let (mut told, mut unreachable) = (HashMap::new(), HashSet::new());
        while seen.changed().await.is_ok() {
            let Some(now) = seen.borrow_and_update().clone() else { continue };
            let members = members(&settings, &place.network, &now.containers);
            for event in news(&told, &members) {
                if events.send(event).await.is_err() {
                    return;
                }
            }
            told = members;
            tell_of_unreachable(&settings, &place.network, &now.containers, &mut unreachable);
        }
    };
    tokio::select! {
        () = watching => {}
        () = following => {}
    }
}

/// The running ones. A container's name is its identity on the ring: it stays when the container is made anew.
fn members(settings: &Settings, network: &str, containers: &[Container]) -> HashMap<Arc<str>, Told> {
    let running = containers.iter().filter(|container| container.state == State::Running);
    let member = |container: &Container| {
        let &ip = container.addresses.get(network)?;
        let replica = Replica::Container { id: Arc::clone(&container.id), name: Arc::clone(&container.name) };
        let address = SocketAddr::new(ip, settings.port);
        Some((Arc::clone(&container.name), Told { replica, address, is_bad: container.healthy == Some(false) }))
    };
    running.filter_map(member).collect()
}

/// One line for each running container that bears the label and is not on the network.
fn tell_of_unreachable(settings: &Settings, network: &str, containers: &[Container], told: &mut HashSet<Arc<str>>) {
    told.retain(|id| containers.iter().any(|container| container.id == *id));
    for container in containers.iter().filter(|container| container.state == State::Running) {
        if !container.addresses.contains_key(network) && told.insert(Arc::clone(&container.id)) {
            let (pool, name, networks) =
                (&settings.pool, &container.name, container.addresses.keys().collect::<Vec<_>>());
            tracing::warn!(%pool, container = %name, network, ?networks,
                "container is no backend: it is not on the network where Ringway could reach it");
        }
    }
}

/// What has changed from `before` to `now`.
fn news(before: &HashMap<Arc<str>, Told>, now: &HashMap<Arc<str>, Told>) -> Vec<Event> {
    let mut news = Vec::new();
    for id in before.keys().filter(|id| !now.contains_key(*id)) {
        news.push(Event::Left { id: Arc::clone(id) });
    }
    for (id, member) in now {
        let known = before.get(id);
        let mut was_bad = known.is_some_and(|known| known.is_bad);
        if known.is_none_or(|known| (&known.replica, known.address) != (&member.replica, member.address)) {
            was_bad = false;
            if known.is_none() {
                news.push(Event::Joined { id: Arc::clone(id), weight: 1 });
            }
            let replica = Some(member.replica.clone());
            news.push(Event::Started { id: Arc::clone(id), address: member.address, replica });
        }
        if was_bad != member.is_bad {
            news.push(Event::Reported { id: Arc::clone(id), healthy: !member.is_bad });
        }
    }
    news
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(id: &str, port: u16, is_bad: bool) -> (Arc<str>, Told) {
        let replica = Replica::Container { id: format!("{id}{port}").into(), name: id.into() };
        (id.into(), Told { replica, address: ([10, 0, 0, 1], port).into(), is_bad })
    }

    fn words(before: &[(Arc<str>, Told)], now: &[(Arc<str>, Told)]) -> Vec<String> {
        let collect = |members: &[(Arc<str>, Told)]| members.iter().cloned().collect::<HashMap<_, _>>();
        let mut words: Vec<_> = news(&collect(before), &collect(now))
            .into_iter()
            .map(|event| match event {
                Event::Joined { id, .. } => format!("{id} joined"),
                Event::Started { id, address, .. } => format!("{id} started {}", address.port()),
                Event::Left { id } => format!("{id} left"),
                Event::Reported { id, healthy } => format!("{id} healthy {healthy}"),
                other => format!("{other:?}"),
            })
            .collect();
        words.sort();
        words
    }

    #[test]
    fn only_changes_are_news() {
        let (a, b) = (told("a", 1, false), told("b", 2, false));
        assert_eq!(words(&[], std::slice::from_ref(&a)), ["a joined", "a started 1"]);
        assert_eq!(words(std::slice::from_ref(&a), &[a.clone(), b.clone()]), ["b joined", "b started 2"]);
        assert_eq!(words(&[a.clone(), b.clone()], std::slice::from_ref(&b)), ["a left"]);
        assert_eq!(words(&[a.clone(), b.clone()], &[a.clone(), b]), Vec::<String>::new());
        assert_eq!(words(std::slice::from_ref(&a), &[told("a", 1, true)]), ["a healthy false"]);
        assert_eq!(words(&[told("a", 1, true)], std::slice::from_ref(&a)), ["a healthy true"]);
        assert_eq!(words(&[told("a", 1, true)], &[told("a", 3, false)]), ["a started 3"], "a new one is not bad yet");
    }
}
