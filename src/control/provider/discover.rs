//! Discovers containers that Ringway does not run itself: running containers with a certain label are the pool's
//! backends. Ringway does not start or stop them.

mod labels;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::{Notify, mpsc, watch};

use crate::address::Address;
use crate::backend::{Membership, Replica};
use crate::control::Event;
use crate::control::docker::container::{Container, State};
use crate::control::docker::engine::Engine;
use crate::control::docker::label;
use crate::control::docker::scope::{self, ScopeSettings};
use crate::control::docker::watch::{EngineStatus, Watch};

/// Settings of discovery.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The pool's name.
    pub pool: Arc<str>,
    /// The label that a backend must have: `name` or `name=value`.
    pub label: String,
    /// Whether labels of the containers say how they take part, and how they are checked.
    pub reads_labels: bool,
    /// The port on which the containers listen; `None`: the only one that a container exposes. A label may name another.
    pub port: Option<u16>,
    /// The network on which Ringway reaches the containers.
    pub scope: ScopeSettings,
    /// Longest time between two full lists.
    pub resync: std::time::Duration,
    /// The largest sum of weights for which the ring has room.
    pub most_weight: u64,
}

/// A backend as last reported to the publisher.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Reported {
    membership: Membership,
    replica: Replica,
    address: Address,
    is_bad: bool,
    /// The container has got the signal to stop.
    is_stopping: bool,
}

/// Reports changes of the labeled containers until the task is dropped.
pub async fn follow(settings: Settings, engine: Engine, events: mpsc::Sender<Event>, engine_status: Arc<EngineStatus>) {
    let scope = scope::wait_for(&engine, &settings.scope, &settings.pool, &engine_status).await;
    let (sender, mut seen) = watch::channel(None);
    let watch = Watch {
        notices_stops: true,
        engine,
        pool: Arc::clone(&settings.pool),
        labels: vec![settings.label.clone()],
        resync: settings.resync,
        engine_status,
        poke: Arc::new(Notify::new()),
    };
    let watching = watch.run(sender);
    let following = async {
        let (mut reported, mut told) = (HashMap::new(), HashSet::new());
        while seen.changed().await.is_ok() {
            let Some(now) = seen.borrow_and_update().clone() else { continue };
            let (members, problems) = members(&settings, &scope.network, &now.containers, &reported);
            for event in news(&reported, &members) {
                if events.send(event).await.is_err() {
                    return;
                }
            }
            reported = members;
            tell(&settings.pool, &now.containers, problems, &mut told);
        }
    };
    tokio::select! {
        () = watching => {}
        () = following => {}
    }
}

/// What is wrong with a container.
#[derive(Debug, PartialEq, Eq)]
struct Problem<'a> {
    container: &'a Container,
    text: String,
    /// The container is no backend because of it.
    is_ignored: bool,
}

/// The running containers. A container's name is its identity on the ring: it stays when the container is recreated. If the
/// ring has no room for all, those that are backends already come first.
fn members<'a>(
    settings: &Settings,
    network: &str,
    containers: &'a [Container],
    before: &HashMap<Arc<str>, Reported>,
) -> (HashMap<Arc<str>, Reported>, Vec<Problem<'a>>) {
    let (mut members, mut problems, mut weight) = (HashMap::new(), Vec::new(), 0);
    let is_candidate = |container: &&Container| {
        // Ringway's own containers have labels of the same names.
        let is_replica = settings.reads_labels && container.labels.contains_key(label::OWNER);
        container.state == State::Running && !is_replica
    };
    let mut running: Vec<_> = containers.iter().filter(is_candidate).collect();
    running.sort_by_key(|container| (!before.contains_key(&container.name), &container.name));
    for container in running {
        let member = member(settings, network, container).and_then(|member| {
            let with_it = weight + u64::from(member.membership.weight);
            if with_it > settings.most_weight {
                let most = settings.most_weight;
                return Err(format!(
                    "with it, the weights of the pool would be {with_it} together, and {most} is the most: lower them"
                ));
            }
            weight = with_it;
            Ok(member)
        });
        match member {
            Ok(member) => drop(members.insert(Arc::clone(&container.name), member)),
            Err(text) => problems.push(Problem { container, text, is_ignored: true }),
        }
        if settings.reads_labels {
            let unknown = labels::unknown(&container.labels);
            let text = format!("Ringway does not know its labels {unknown:?}: correct or remove them");
            problems.extend((!unknown.is_empty()).then_some(Problem { container, text, is_ignored: false }));
        }
    }
    (members, problems)
}

/// A container as a backend.
///
/// # Errors
/// Why it cannot be one.
fn member(settings: &Settings, network: &str, container: &Container) -> Result<Reported, String> {
    let &ip = container.addresses.get(network).ok_or_else(|| {
        let networks: Vec<_> = container.addresses.keys().collect::<BTreeSet<_>>().into_iter().collect();
        format!(
            "it is on the networks {networks:?}, and Ringway reaches backends on {network}: connect it to that network"
        )
    })?;
    let labeled = if settings.reads_labels { Some(labels::read(&container.labels)?) } else { None };
    let of_label = labeled.as_ref().and_then(|labeled| labeled.port);
    let only = if let [port] = container.ports[..] { Some(port) } else { None };
    let port = of_label.or(settings.port).or(only).ok_or_else(|| {
        format!("it exposes the ports {:?}, and Ringway needs one: give it the label {}", container.ports, label::PORT)
    })?;
    let (id, name) = (Arc::clone(&container.id), Arc::clone(&container.name));
    let membership = labeled.as_ref().map_or(Membership::weighing(1), |labeled| labeled.membership);
    Ok(Reported {
        membership,
        replica: Replica::Container { id, name, check: labeled.and_then(|labeled| labeled.check) },
        address: Address::Ip(SocketAddr::new(ip, port)),
        is_bad: container.healthy == Some(false),
        is_stopping: container.is_stopping,
    })
}

/// Logs each kind of problem once per container.
fn tell(pool: &str, containers: &[Container], problems: Vec<Problem<'_>>, told: &mut HashSet<(Arc<str>, bool)>) {
    told.retain(|(id, _)| containers.iter().any(|container| container.id == *id));
    for Problem { container, text, is_ignored } in problems {
        if told.insert((Arc::clone(&container.id), is_ignored)) {
            let what = if is_ignored { "ignored a container" } else { "a container has unknown labels" };
            tracing::warn!(%pool, container = %container.name, "{what}: {text}");
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
        let mut was_stopping = known.is_some_and(|known| known.is_stopping);
        if known.is_none_or(|known| known.membership != member.membership) {
            news.push(Event::Joined { id: Arc::clone(id), membership: member.membership });
        }
        if known.is_none_or(|known| (&known.replica, &known.address) != (&member.replica, &member.address)) {
            // A drain for a stop ends with the replica that stops.
            (was_bad, was_stopping) = (false, false);
            let replica = Some(member.replica.clone());
            news.push(Event::Started { id: Arc::clone(id), address: member.address.clone(), replica });
        }
        if was_bad != member.is_bad {
            news.push(Event::Reported { id: Arc::clone(id), healthy: !member.is_bad });
        }
        if was_stopping != member.is_stopping {
            let id = Arc::clone(id);
            // The container itself decides how long its connections may take.
            news.push(if member.is_stopping { Event::Retiring { id, within: None } } else { Event::Spared { id } });
        }
    }
    news
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reported(id: &str, port: u16, is_bad: bool) -> (Arc<str>, Reported) {
        let replica = Replica::Container { id: format!("{id}{port}").into(), name: id.into(), check: None };
        let (membership, address) = (Membership::weighing(1), Address::Ip(([10, 0, 0, 1], port).into()));
        (id.into(), Reported { membership, replica, address, is_bad, is_stopping: false })
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
                Event::Retiring { id, within: None } => format!("{id} retires"),
                Event::Spared { id } => format!("{id} stays"),
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

    #[test]
    fn a_container_that_is_told_to_stop_retires_until_it_starts_again() {
        let at = |is_stopping| (reported("a", 1, false).0, Reported { is_stopping, ..reported("a", 1, false).1 });
        assert_eq!(words(&[at(false)], &[at(true)]), ["a retires"]);
        assert_eq!(words(&[at(true)], &[at(true)]), Vec::<String>::new());
        assert_eq!(words(&[at(true)], &[at(false)]), ["a stays"]);
        assert_eq!(words(&[at(true)], &[reported("a", 3, false)]), ["a started 3"], "a new replica does not retire");
    }

    fn container(name: &str, labels: &[(&str, &str)], ports: &[u16]) -> Container {
        Container {
            image: "sha256:1".into(),
            id: format!("id of {name}").into(),
            name: name.into(),
            labels: labels.iter().map(|(name, value)| (format!("ringway.{name}"), (*value).to_owned())).collect(),
            state: State::Running,
            healthy: None,
            addresses: HashMap::from([("net".to_owned(), [10, 0, 0, 9].into())]),
            ports: ports.to_vec(),
            is_stopping: false,
        }
    }

    fn settings(reads_labels: bool, port: Option<u16>) -> Settings {
        Settings {
            pool: "p".into(),
            label: "l".to_owned(),
            reads_labels,
            port,
            scope: ScopeSettings { owner: None, network: None },
            resync: std::time::Duration::ZERO,
            most_weight: 10,
        }
    }

    #[test]
    fn the_port_is_that_of_the_label_else_of_the_pool_else_the_only_one() {
        let port = |settings: &Settings, container: &Container| {
            let member = member(settings, "net", container);
            member.map(|member| member.address.ip().unwrap().port())
        };
        let labeled = container("a", &[("port", "1")], &[3]);
        assert_eq!(port(&settings(true, Some(2)), &labeled), Ok(1));
        assert_eq!(port(&settings(false, Some(2)), &labeled), Ok(2), "labels are not read");
        assert_eq!(port(&settings(true, None), &container("a", &[], &[3])), Ok(3));
        let problem = port(&settings(true, None), &container("a", &[], &[3, 4])).unwrap_err();
        assert!(problem.contains("the ports [3, 4]") && problem.contains("ringway.port"), "{problem}");
        let elsewhere = member(&settings(true, None), "other", &labeled).unwrap_err();
        assert!(elsewhere.contains("on the networks [\"net\"]"), "{elsewhere}");
    }

    #[test]
    fn containers_with_wrong_labels_or_too_much_weight_are_ignored_and_told_of() {
        let containers = [
            container("c", &[("weight", "4")], &[80]),
            container("a", &[("weight", "7")], &[80]),
            container("b", &[("weight", "x")], &[80]),
            container("d", &[("wieght", "2"), ("weight", "3")], &[80]),
            container("own", &[("owner", "ringway"), ("slot", "own-1")], &[80]),
        ];
        let settings = settings(true, None);
        let (members, problems) = super::members(&settings, "net", &containers, &HashMap::new());
        let mut names: Vec<_> = members.keys().map(|name| &**name).collect();
        names.sort_unstable();
        let told: Vec<_> = problems.iter().map(|one| (&*one.container.name, one.is_ignored)).collect();
        assert_eq!(names, ["a", "d"], "c does not fit beside a: {told:?}");
        assert_eq!(told, [("b", true), ("c", true), ("d", false)]);
        assert_eq!(members["a"].membership.weight, 7);
        // A newcomer does not displace a backend.
        let before = HashMap::from([("c".into(), members["a"].clone()), ("d".into(), members["d"].clone())]);
        let (members, _) = super::members(&settings, "net", &containers, &before);
        let mut names: Vec<_> = members.keys().map(|name| &**name).collect();
        names.sort_unstable();
        assert_eq!(names, ["c", "d"]);
    }
}
