//! Discovers containers that Ringway does not run itself: running containers with a certain label are the pool's
//! backends. Ringway does not start or stop them.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::{Notify, mpsc, watch};

use crate::address::Address;
use crate::backend::{Membership, Replica};
use crate::control::Event;
use crate::control::docker::container::{Container, State};
use crate::control::docker::engine::Engine;
use crate::control::docker::scope::{self, ScopeSettings};
use crate::control::docker::watch::{EngineStatus, Watch};

/// Settings of discovery.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The pool's name.
    pub pool: Arc<str>,
    /// The label that a backend must have: `name` or `name=value`.
    pub label: String,
    /// The port on which the containers listen.
    pub port: u16,
    /// The network on which Ringway reaches the containers.
    pub scope: ScopeSettings,
    /// Longest time between two full lists.
    pub resync: std::time::Duration,
}

/// A backend as last reported to the publisher.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Reported {
    replica: Replica,
    address: Address,
    is_bad: bool,
}

/// Reports changes of the labeled containers until the task is dropped.
pub async fn follow(settings: Settings, engine: Engine, events: mpsc::Sender<Event>, engine_status: Arc<EngineStatus>) {
    let scope = scope::wait_for(&engine, &settings.scope, &settings.pool, &engine_status).await;
    let (sender, mut seen) = watch::channel(None);
    let watch = Watch {
        engine,
        pool: Arc::clone(&settings.pool),
        labels: vec![settings.label.clone()],
        resync: settings.resync,
        engine_status,
        poke: Arc::new(Notify::new()),
    };
    let watching = watch.run(sender);
    let following = async {
        let (mut reported, mut unreachable) = (HashMap::new(), HashSet::new());
        while seen.changed().await.is_ok() {
            let Some(now) = seen.borrow_and_update().clone() else { continue };
            let members = members(&settings, &scope.network, &now.containers);
            for event in news(&reported, &members) {
                if events.send(event).await.is_err() {
                    return;
                }
            }
            reported = members;
            tell_of_unreachable(&settings, &scope.network, &now.containers, &mut unreachable);
        }
    };
    tokio::select! {
        () = watching => {}
        () = following => {}
    }
}

/// The running containers. A container's name is its identity on the ring: it stays when the container is recreated.
fn members(settings: &Settings, network: &str, containers: &[Container]) -> HashMap<Arc<str>, Reported> {
    let running = containers.iter().filter(|container| container.state == State::Running);
    let member = |container: &Container| {
        let &ip = container.addresses.get(network)?;
        let replica = Replica::Container { id: Arc::clone(&container.id), name: Arc::clone(&container.name) };
        let address = Address::Ip(SocketAddr::new(ip, settings.port));
        Some((Arc::clone(&container.name), Reported { replica, address, is_bad: container.healthy == Some(false) }))
    };
    running.filter_map(member).collect()
}

/// Logs a warning, once per container, for running containers that have the label but are not on the network.
fn tell_of_unreachable(settings: &Settings, network: &str, containers: &[Container], reported: &mut HashSet<Arc<str>>) {
    reported.retain(|id| containers.iter().any(|container| container.id == *id));
    for container in containers.iter().filter(|container| container.state == State::Running) {
        if !container.addresses.contains_key(network) && reported.insert(Arc::clone(&container.id)) {
            let (pool, name, networks) =
                (&settings.pool, &container.name, container.addresses.keys().collect::<Vec<_>>());
            tracing::warn!(%pool, container = %name, network, ?networks,
                "ignored a container: it is not on the network on which Ringway reaches backends");
        }
    }
}

/// The events that lead from `before` to `now`.
fn news(before: &HashMap<Arc<str>, Reported>, now: &HashMap<Arc<str>, Reported>) -> Vec<Event> {
    let mut news = Vec::new();
    for id in before.keys().filter(|id| !now.contains_key(*id)) {
        news.push(Event::Left { id: Arc::clone(id) });
    }
    for (id, member) in now {
        let known = before.get(id);
        let mut was_bad = known.is_some_and(|known| known.is_bad);
        if known.is_none_or(|known| (&known.replica, &known.address) != (&member.replica, &member.address)) {
            was_bad = false;
            if known.is_none() {
                news.push(Event::Joined { id: Arc::clone(id), membership: Membership::weighing(1) });
            }
            let replica = Some(member.replica.clone());
            news.push(Event::Started { id: Arc::clone(id), address: member.address.clone(), replica });
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

    fn reported(id: &str, port: u16, is_bad: bool) -> (Arc<str>, Reported) {
        let replica = Replica::Container { id: format!("{id}{port}").into(), name: id.into() };
        (id.into(), Reported { replica, address: Address::Ip(([10, 0, 0, 1], port).into()), is_bad })
    }

    fn words(before: &[(Arc<str>, Reported)], now: &[(Arc<str>, Reported)]) -> Vec<String> {
        let collect = |members: &[(Arc<str>, Reported)]| members.iter().cloned().collect::<HashMap<_, _>>();
        let mut words: Vec<_> = news(&collect(before), &collect(now))
            .into_iter()
            .map(|event| match event {
                Event::Joined { id, .. } => format!("{id} joined"),
                Event::Started { id, address, .. } => format!("{id} started {}", address.ip().unwrap().port()),
                Event::Left { id } => format!("{id} left"),
                Event::Reported { id, healthy } => format!("{id} healthy {healthy}"),
                other => format!("{other:?}"),
            })
            .collect();
        words.sort();
        words
    }

    #[test]
    fn only_changes_cause_events() {
        let (a, b) = (reported("a", 1, false), reported("b", 2, false));
        assert_eq!(words(&[], std::slice::from_ref(&a)), ["a joined", "a started 1"]);
        assert_eq!(words(std::slice::from_ref(&a), &[a.clone(), b.clone()]), ["b joined", "b started 2"]);
        assert_eq!(words(&[a.clone(), b.clone()], std::slice::from_ref(&b)), ["a left"]);
        assert_eq!(words(&[a.clone(), b.clone()], &[a.clone(), b]), Vec::<String>::new());
        assert_eq!(words(std::slice::from_ref(&a), &[reported("a", 1, true)]), ["a healthy false"]);
        assert_eq!(words(&[reported("a", 1, true)], std::slice::from_ref(&a)), ["a healthy true"]);
        assert_eq!(
            words(&[reported("a", 1, true)], &[reported("a", 3, false)]),
            ["a started 3"],
            "a new replica is not unhealthy yet"
        );
    }
}
