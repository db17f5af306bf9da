//! What happens in the pool: the key, its probes, the walk, and what a change of the ring would do.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::{KeyStep, PoolStep, ProbeStep, Question, Unexplained, WalkStep, WhatIf};
use crate::backend::{Backend, Membership, State};
use crate::labels::Label as _;
use crate::proxy::key::{Key, KeyKind};
use crate::proxy::pick::{Room, in_order};
use crate::proxy::{Balance, Route};
use crate::ring::{MOST_POINTS, Member, Ring};
use crate::stream::Client;
use crate::table::{EXACT, Members, Table};

/// Keys that are looked up to estimate the share of keys that a change of the ring moves. It is then accurate to half a
/// percent.
const SAMPLE: u32 = 1 << 16;

impl PoolStep {
    pub(super) fn of(route: &Route, question: &Question) -> Result<Self, Unexplained> {
        let name = route.pool.to_string();
        let server_name = question.beginning.hello().and_then(|hello| hello.server_name.as_deref());
        let of_client = question.client.map(|client| Key::of(route.key, client, server_name));
        let key = match (&question.key, &of_client) {
            (Some(key), _) => key.as_bytes(),
            (None, Some(_)) if route.key == KeyKind::Source && !question.has_port => {
                let is_unix = matches!(question.client, Some(Client::Unix { .. }));
                return Err(if is_unix { Unexplained::UnixKey(name) } else { Unexplained::NoPort(name) });
            }
            (None, Some(key)) => key.as_bytes(),
            (None, None) => return Err(Unexplained::NoClient),
        };
        let table = route.table.load();
        let probes = probes(&table, key);
        let walk = walk(&table, route, key);
        let first = walk.iter().find(|step| step.attempt == Some(1)).map(|step| step.backend.clone());
        Ok(Self {
            balance: route.balance.as_str().to_owned(),
            bound: route.bound.as_ref().map(|bound| bound.percent()),
            random: is_random(route, &table),
            key: KeyStep {
                kind: question.key.as_ref().map_or(route.key.as_str(), |_| "given").to_owned(),
                bytes: hex(key),
                hash: probes.first().map_or(String::new(), |probe| probe.at.clone()),
            },
            probes,
            panic: table.is_panic(),
            table_generation: table.generation(),
            ring_digest: format!("{:016x}", table.ring().digest()),
            walk,
            backend: first,
            what_if: what_if(&table, route, question, key)?,
            name,
        })
    }
}

fn probes(table: &Table, key: &[u8]) -> Vec<ProbeStep> {
    let step = |probe: crate::ring::Probe| ProbeStep {
        at: format!("{:016x}", probe.at),
        point: format!("{:016x}", probe.point),
        backend: table.backends()[probe.owner].id.to_string(),
        distance: probe.point.wrapping_sub(probe.at) as f64 / 2.0_f64.powi(64),
        wins: probe.wins,
    };
    table.ring().probes(key).into_iter().map(step).collect()
}

/// Whether chance decides which backend gets a connection: one of two random ones, or of those with the smallest load.
fn is_random(route: &Route, table: &Table) -> bool {
    route.balance == Balance::LeastConnections && (table.backends().len() > EXACT || table.has_equals())
}

/// All backends in the order of the ring. The attempts are numbered in the order of the data plane.
fn walk(table: &Table, route: &Route, key: &[u8]) -> Vec<WalkStep> {
    let (is_random, mut attempts) = (is_random(route, table), 0);
    // What comes of each candidate: its room, and the number of its attempt.
    let candidates: HashMap<&str, (Room, usize)> = in_order(route, table, key)
        .into_iter()
        .map(|(backend, room)| {
            attempts += usize::from(!matches!(room, Room::Full(_)));
            (&*backend.id, (room, attempts))
        })
        .collect();
    let now = Instant::now();
    let step = |owner: usize| {
        let backend = &table.backends()[owner];
        let candidate = candidates.get(&*backend.id).copied();
        let attempt = match candidate {
            Some((Room::Free | Room::AtBound(_), attempt)) if !is_random => Some(attempt),
            _ => None,
        };
        let attempt = attempt.filter(|&attempt| attempt <= route.connect_attempts);
        let active = backend.live.active.load(Ordering::Relaxed);
        let load = match route.balance {
            Balance::Ring => String::new(),
            Balance::LeastConnections => format!(": {active} connections with weight {}", backend.membership.weight),
        };
        let despite = match backend.state {
            State::Healthy => String::new(),
            state => format!(", although it is {}: too few backends are healthy", state.as_str()),
        };
        let why = match (candidate, attempt) {
            (None, _) => why_skipped(backend, now),
            (Some((Room::Full(most), _)), _) => format!("full: {active} of {most} connections"),
            _ if is_random && table.backends().len() > EXACT => format!(
                "Ringway compares two random backends, perhaps this one too, and the smaller load gets the connection{load}"
            ),
            _ if is_random => format!("of the backends with the smallest load, a random one gets the connection{load}"),
            (Some((Room::AtBound(bound), _)), Some(1)) => format!(
                "gets the connection although it is at its bound ({active} of {bound} connections): no other backend has room"
            ),
            (Some((Room::AtBound(bound), _)), _) => {
                format!("at its bound: {active} of {bound} connections, so it is tried only if the others fail")
            }
            (Some(_), Some(1)) => format!("gets the connection{load}{despite}"),
            (Some(_), _) if route.balance == Balance::Ring && table.is_spared(backend, key) => {
                let part = backend.admission.as_part() * 100.0;
                format!(
                    "it takes {part:.0} % of its keys now (slow start, or its agent says so), and gets this one only if the other backends fail"
                )
            }
            (Some(_), Some(_)) => format!("next, if the connects before it fail{load}{despite}"),
            (Some(_), None) => format!("not tried: connect.attempts is {}{load}", route.connect_attempts),
        };
        let why = if table.has_tiers() { format!("tier {}: {why}", backend.membership.tier) } else { why };
        WalkStep {
            backend: backend.id.to_string(),
            address: backend.address.as_ref().map(ToString::to_string),
            state: backend.state.as_str().to_owned(),
            attempt,
            why,
        }
    };
    let on_ring: Vec<_> = table.ring().walk(key).collect();
    let mut seen = vec![false; table.backends().len()];
    for &owner in &on_ring {
        seen[owner] = true;
    }
    // A backend that leaves has no points any more, but it still has connections.
    let others = (0..seen.len()).filter(|&owner| !seen[owner]);
    on_ring.iter().copied().chain(others).map(step).collect()
}

/// Why the data plane does not try a backend.
fn why_skipped(backend: &Backend, now: Instant) -> String {
    let since = |then: Instant| {
        let seconds = now.saturating_duration_since(then).as_secs();
        humantime::format_duration(std::time::Duration::from_secs(seconds)).to_string()
    };
    match backend.state {
        State::Healthy if backend.membership.weight == 0 => "its weight is 0".to_owned(),
        State::Healthy => "it has no address".to_owned(),
        State::Starting if backend.address.is_none() => "it has no replica yet".to_owned(),
        State::Starting => "it has passed no health check yet".to_owned(),
        State::Standby if backend.health.verdict == Some(false) => {
            format!("its check says no: {}", backend.last_check().unwrap_or("none yet"))
        }
        State::Standby => "another backend holds the exclusive pool, or still has connections".to_owned(),
        State::Unhealthy => {
            let check = backend.last_check().unwrap_or("none yet");
            format!("for {}; last check: {check}", since(backend.health.since))
        }
        State::Ejected => "connects to it kept failing".to_owned(),
        State::Draining => match backend.drain {
            Some(drain) if drain.leaves => format!("it has been leaving the pool for {}", since(drain.since)),
            Some(drain) => {
                let agent = backend.advice.as_ref().filter(|advice| advice.is_drained);
                let why = agent.map(|advice| format!(", its agent says {:?}", advice.text)).unwrap_or_default();
                format!("for {}{why}", since(drain.since))
            }
            None => "its replica stops".to_owned(),
        },
        State::CrashLoop => "its replicas keep dying".to_owned(),
    }
}

/// The effect of the change that the question asks about; `None`: it asks about none.
fn what_if(table: &Table, route: &Route, question: &Question, key: &[u8]) -> Result<Option<WhatIf>, Unexplained> {
    let Question { without, weights, .. } = question;
    if without.is_empty() && weights.is_empty() {
        return Ok(None);
    }
    if let Some(unknown) =
        without.iter().chain(weights.iter().map(|(id, _)| id)).find(|id| table.backends().find(id).is_none())
    {
        return Err(Unexplained::NoBackend {
            pool: route.pool.to_string(),
            backend: unknown.clone(),
            known: table.backends().iter().filter(|one| one.beside.is_none()).map(|one| one.id.to_string()).collect(),
        });
    }
    let weight = |backend: &Backend| {
        let changed = weights.iter().find(|(id, _)| **id == *backend.id);
        changed.map_or(backend.membership.weight, |(_, weight)| *weight)
    };
    let left = table.backends().iter().filter(|backend| !without.iter().any(|id| **id == *backend.id));
    let backends: Vec<_> = left
        .map(|backend| Backend {
            membership: Membership { weight: weight(backend), ..backend.membership },
            ..backend.clone()
        })
        .collect();
    // As the publisher does, a ring has no points of backends that leave.
    let leaves = |backend: &Backend| backend.drain.is_some_and(|drain| drain.leaves);
    let members: Vec<_> = backends
        .iter()
        .map(|backend| Member { id: &backend.id, weight: if leaves(backend) { 0 } else { backend.membership.weight } })
        .collect();
    let points = members.iter().map(|member| u64::from(member.weight)).sum::<u64>()
        * u64::from(table.ring().parameters().virtual_nodes);
    if points > MOST_POINTS {
        return Err(Unexplained::TooManyPoints(points));
    }
    let ring = Arc::new(Ring::build(table.ring().parameters(), &members));
    let after = table.what_if(ring, Members::new(backends, 0));
    let (old, new) = (table.owners(), after.owners());
    let moves = |key: &u32| {
        let key = key.to_le_bytes();
        let before = old.of(&key).map(|owner| &table.backends()[owner].id);
        before != new.of(&key).map(|owner| &after.backends()[owner].id)
    };
    let moved = match route.balance {
        Balance::Ring => (0..SAMPLE).filter(moves).count() as f64 / f64::from(SAMPLE),
        // No key has an owner.
        Balance::LeastConnections => 0.0,
    };
    let walk = walk(&after, route, key);
    let backend = walk.into_iter().find(|step| step.attempt == Some(1)).map(|step| step.backend);
    // Four digits are precise enough for a person.
    Ok(Some(WhatIf { backend, moved: (moved * 1e4).round() / 1e4 }))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat()
}
