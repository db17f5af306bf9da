use std::borrow::Cow;
use std::sync::Arc;
use std::time::Instant;

use ::metrics::Histogram;
use proptest::prelude::*;

use super::*;
use crate::address::Address;
use crate::backend::{Admission, Backend, BackendPermit, Health, Membership, State};
use crate::proxy::key::KeyKind;
use crate::proxy::{Want, connect};
use crate::ring::{Member, Parameters, Ring};
use crate::table::{Members, Rules, Table, TableCell};

fn backend(id: String, state: State, has_address: bool, part: f64) -> Backend {
    Backend {
        address: has_address.then(|| Address::Ip(([127, 0, 0, 1], 1).into())),
        state,
        health: Health { last: Some("connect refused".into()), verdict: None, since: Instant::now() },
        admission: Admission::part(part),
        ..Backend::new(id.into(), Membership::weighing(1), Instant::now())
    }
}

fn route(key: KeyKind, backends: Vec<Backend>, panic_below: u8, attempts: usize, most: u64) -> Route {
    let members: Vec<_> = backends.iter().map(|one| Member { id: &one.id, weight: one.membership.weight }).collect();
    let ring = Ring::build(Parameters { virtual_nodes: 20, probes: 3, seed: 0 }, &members);
    let table = Table::new(
        7,
        Arc::new(ring),
        Members::new(backends, 0),
        Rules { panic_below, spill_below: 50, is_exclusive: false },
    );
    Route {
        key,
        most_per_backend: most,
        connect_attempts: attempts,
        ..Route::new("p".into(), TableCell::new(table), Histogram::noop())
    }
}

fn question(client: &str) -> Question {
    let (client, has_port) = match client.parse() {
        Ok(client) => (client, true),
        Err(_) => ((client.parse::<std::net::IpAddr>().unwrap(), 0).into(), false),
    };
    Question {
        client: Some(Client::Ip(client)),
        has_port,
        beginning: Beginning::Plain,
        key: None,
        without: Vec::new(),
        weights: Vec::new(),
    }
}

fn healthy(count: usize) -> Vec<Backend> {
    (1..=count).map(|n| backend(format!("b{n}"), State::Healthy, true, 1.0)).collect()
}

fn pool(route: &Route, question: &Question) -> PoolStep {
    explain(Target::Pool(route), question).unwrap().pool.unwrap()
}

#[test]
fn each_backend_has_its_reason() {
    let states = [
        State::Healthy,
        State::Unhealthy,
        State::Ejected,
        State::Draining,
        State::CrashLoop,
        State::Starting,
        State::Healthy,
    ];
    let mut backends: Vec<_> =
        (0..7).map(|n| backend(format!("b{n}"), states[n], states[n] != State::Starting, 1.0)).collect();
    backends.push(backend("full".to_owned(), State::Healthy, true, 1.0));
    let full = Arc::clone(&backends[7].live);
    let _permit = BackendPermit::take(&full, 1).unwrap();
    let route = route(KeyKind::SourceIp, backends, 0, 1, 1);
    let walk = pool(&route, &question("10.0.0.9")).walk;
    assert_eq!(walk.len(), 8);
    let why = |id: &str| walk.iter().find(|step| step.backend == id).unwrap().why.clone();
    assert!(why("b1").starts_with("for ") && why("b1").ends_with("; last check: connect refused"), "{}", why("b1"));
    for (id, wanted) in [
        ("b2", "connects to it kept failing"),
        ("b3", "its replica stops"),
        ("b4", "its replicas keep dying"),
        ("b5", "it has no replica yet"),
        ("full", "full: 1 of 1 connections"),
    ] {
        assert_eq!(why(id), wanted);
    }
    let mut others = [why("b0"), why("b6")];
    others.sort();
    assert_eq!(others, ["gets the connection", "not tried: connect.attempts is 1"]);
}

#[test]
fn reasons_name_the_tier_of_each_backend() {
    let mut backends = healthy(4);
    backends[0].state = State::Unhealthy;
    backends[1].membership.weight = 0;
    for backend in &mut backends[2..] {
        backend.membership.tier = 1;
    }
    let step = pool(&route(KeyKind::SourceIp, backends, 50, 1, u64::MAX), &question("10.0.0.9"));
    let why = |id: &str| step.walk.iter().find(|step| step.backend == id).unwrap().why.clone();
    assert!(why("b1").starts_with("tier 0: for "), "{}", why("b1"));
    assert_eq!(why("b2"), "tier 0: its weight is 0");
    let mut others = [why("b3"), why("b4")];
    others.sort();
    assert_eq!(others, ["tier 1: gets the connection", "tier 1: not tried: connect.attempts is 1"]);
}

#[test]
fn a_slow_starting_owner_says_why_its_key_is_elsewhere() {
    let mut backends = healthy(6);
    for backend in &mut backends {
        backend.admission = Admission::part(if *backend.id == *"b1" { 0.0 } else { 1.0 });
    }
    let route = route(KeyKind::SourceIp, backends, 50, 2, u64::MAX);
    let owned =
        (0..250).map(|n| pool(&route, &question(&format!("10.0.0.{n}")))).find(|step| step.walk[0].backend == "b1");
    let step = owned.unwrap();
    assert!(step.walk[0].why.starts_with("it takes 0 % of its keys now"), "{:?}", step.walk[0]);
    assert_eq!((step.walk[0].attempt, step.backend.as_ref()), (None, Some(&step.walk[1].backend)));
}

#[test]
fn a_ring_that_is_too_large_is_not_built() {
    let route = route(KeyKind::SourceIp, healthy(4), 50, 3, u64::MAX);
    let weights = vec![("b1".to_owned(), u32::MAX)];
    let error = explain(Target::Pool(&route), &Question { weights, ..question("10.0.0.9") }).unwrap_err();
    assert!(error.to_string().contains("but the maximum is 4194304"), "{error}");
}

#[test]
fn the_key_and_its_probes_are_shown() {
    let route = route(KeyKind::Source, healthy(3), 50, 3, u64::MAX);
    assert_eq!(explain(Target::Pool(&route), &question("10.0.0.9")).unwrap_err(), Unexplained::NoPort("p".to_owned()));
    let step = pool(&route, &question("10.0.0.9:5000"));
    assert_eq!((&*step.key.kind, &*step.key.bytes), ("source", "0a0000091388"));
    assert_eq!(step.probes.len(), 3);
    assert_eq!(step.key.hash, step.probes[0].at);
    let winners: Vec<_> = step.probes.iter().filter(|probe| probe.wins).collect();
    assert_eq!(winners.len(), 1);
    assert!(step.probes.iter().all(|probe| probe.distance >= winners[0].distance));
    assert_eq!((Some(&winners[0].backend), &step.walk[0].backend), (step.backend.as_ref(), &winners[0].backend));
    let given = pool(&route, &Question { key: Some("hello".to_owned()), ..question("10.0.0.9") });
    assert_eq!((&*given.key.kind, &*given.key.bytes), ("given", "68656c6c6f"));
}

#[test]
fn a_change_of_the_ring_is_tried_out() {
    let route = route(KeyKind::SourceIp, healthy(4), 50, 3, u64::MAX);
    let now = pool(&route, &question("10.0.0.9"));
    assert_eq!(now.what_if, None);
    let owner = now.backend.unwrap();
    let after = pool(&route, &Question { without: vec![owner.clone()], ..question("10.0.0.9") }).what_if.unwrap();
    assert_eq!(after.backend.as_ref(), Some(&now.walk[1].backend), "the next one on the walk");
    assert!((0.15..0.4).contains(&after.moved), "{}", after.moved);
    let heavy = pool(&route, &Question { weights: vec![(owner, 5)], ..question("10.0.0.9") }).what_if.unwrap();
    assert!(heavy.moved > 0.2, "{}", heavy.moved);
    let unknown = Question { without: vec!["b9".to_owned()], ..question("10.0.0.9") };
    let error = explain(Target::Pool(&route), &unknown).unwrap_err().to_string();
    assert_eq!(error, "the pool p has no backend \"b9\"; its backends: b1, b2, b3, b4");
}

fn backends() -> impl Strategy<Value = Vec<(usize, bool, f64, bool)>> {
    proptest::collection::vec((0..State::ALL.len(), any::<bool>(), 0.0..1.5_f64, any::<bool>()), 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn the_attempts_are_those_of_the_data_plane(
        backends in backends(),
        keys in proptest::collection::vec(any::<u32>(), 20),
        panic_below in 0_u8..=100,
        attempts in 1..4_usize,
    ) {
        let made: Vec<_> = backends.iter().enumerate().map(|(n, &(state, has_address, part, _))| {
            backend(format!("b{n:02}"), State::ALL[state], has_address, part)
        }).collect();
        let full = std::iter::zip(&made, &backends).filter(|(_, (.., is_full))| *is_full);
        let permits: Vec<_> = full.map(|(one, _)| BackendPermit::take(&one.live, 1)).collect();
        let route = route(KeyKind::SourceIp, made, panic_below, attempts, 1);
        let (table, tcp) = (route.table.load(), crate::proxy::socket::TcpOptions::default());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        for key in keys {
            let client = std::net::SocketAddr::from((key.to_be_bytes(), 1));
            let step = pool(&route, &question(&client.to_string()));
            // Nobody listens at the address, so the stage connect tries one backend after the other.
            let mut tries = Vec::new();
            let want = Want { key: &key.to_be_bytes(), port: None, tcp: &tcp };
            let connecting = connect(&route, || Arc::clone(&table), want, |_| Cow::Borrowed(&[]), &mut tries);
            runtime.block_on(connecting).unwrap_err();
            let mut attempts: Vec<_> = step.walk.iter().filter_map(|one| Some((one.attempt?, one.backend.as_str()))).collect();
            attempts.sort_unstable();
            let explained: Vec<_> = attempts.iter().map(|(_, id)| *id).collect();
            prop_assert_eq!(tries.iter().map(|one| &*one.backend).collect::<Vec<_>>(), explained);
            prop_assert_eq!(step.backend.as_deref(), tries.first().map(|one| &*one.backend));
        }
        drop(permits);
    }
}
