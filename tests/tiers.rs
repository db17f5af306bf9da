//! Tiers, weights of zero, drained entries, limits of single backends, empty pools, and exclusive pools.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::backends::Server;
use crate::harness::{Ringway, config, echoes, eventually, eventually_async, get, http, soon};
use ringway::backend::{Membership, State};
use ringway::control::command::{Command, CommandError};
use ringway::control::provider::Listed;
use ringway::proxy::stats::RefusalReason;

/// A server that answers the line `CHECK` by its switch, and otherwise echoes after its name.
struct Switched {
    server: Server,
    passes: Arc<AtomicBool>,
}

impl Switched {
    async fn start(name: &'static str) -> Self {
        let passes = Arc::new(AtomicBool::new(true));
        let switch = Arc::clone(&passes);
        let server = Server::start(move |mut stream| {
            let passes = Arc::clone(&switch);
            async move {
                let mut buffer = [0; 1024];
                while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                    let answer = match &buffer[..read] {
                        b"CHECK\n" if passes.load(Ordering::Relaxed) => b"YES".as_slice(),
                        b"CHECK\n" => b"NO",
                        b"name" => name.as_bytes(),
                        other => other,
                    };
                    if stream.write_all(answer).await.is_err() {
                        return;
                    }
                }
            }
        })
        .await;
        Self { server, passes }
    }

    fn set(&self, passes: bool) {
        self.passes.store(passes, Ordering::Relaxed);
    }

    /// As an entry of `static`, with further keys.
    fn entry(&self, id: &str, more: &str) -> String {
        format!("{{ address: \"{}\", id: {id}{more} }}", self.server.address)
    }
}

const CHECK: &str = "health_check: { kind: expect, send: \"CHECK\\n\", expect: \"YES\", interval: 50ms, fast_interval: 20ms, rise: 1, fall: 1 }";

/// A pool of these entries of `static`.
fn pool(entries: &[String], more: &str) -> String {
    config(&format!("static: [{}]", entries.join(", ")), "", &format!("{CHECK}\n{more}"))
}

/// Opens a connection and asks for the name of its backend.
async fn connect(ringway: &Ringway) -> std::io::Result<(TcpStream, String)> {
    let mut stream = TcpStream::connect(ringway.web()).await?;
    stream.write_all(b"name").await?;
    let mut name = [0; 1];
    soon("a name", stream.read_exact(&mut name)).await?;
    Ok((stream, String::from_utf8_lossy(&name).into_owned()))
}

async fn name(ringway: &Ringway) -> String {
    connect(ringway).await.unwrap().1
}

async fn status(ringway: &Ringway) -> serde_json::Value {
    serde_json::from_slice(http(ringway.api(), "GET", "/api/status", b"").await.body()).unwrap()
}

#[tokio::test]
async fn a_standby_tier_serves_while_the_main_tier_fails_and_no_other_key_moves() {
    let [a, b, c] = [Switched::start("a").await, Switched::start("b").await, Switched::start("c").await];
    let entries = [a.entry("a", ""), b.entry("b", ""), c.entry("c", ", tier: 1")];
    let ringway = Ringway::start(&pool(&entries, "tiers: { spill_below: 60 }")).await.all_healthy().await;
    let before = ringway.mapping();
    assert!(before.values().all(|owner| owner != "c"));
    assert!(!status(&ringway).await["pools"][0]["spilled"].as_bool().unwrap());
    for _ in 0..20 {
        assert_ne!(name(&ringway).await, "c");
    }

    b.set(false);
    eventually("b is unhealthy", || ringway.states()[1] == State::Unhealthy).await;
    let during = ringway.mapping();
    assert!(before.iter().all(|(key, owner)| during[key] == if owner == "a" { "a" } else { "c" }));
    let shown = status(&ringway).await;
    assert_eq!((&shown["pools"][0]["spilled"], &shown["pools"][0]["tiers"]), (&true.into(), &vec![0, 1].into()));
    assert_eq!(ringway.metric("ringway_pool_spilled", &[]).await, 1.0);
    a.set(false);
    eventually("a is unhealthy", || ringway.states()[0] == State::Unhealthy).await;
    for _ in 0..20 {
        assert_eq!(name(&ringway).await, "c", "the pool is not in panic while tier 1 is healthy");
    }

    a.set(true);
    b.set(true);
    eventually("all are healthy", || ringway.states() == [State::Healthy; 3]).await;
    assert_eq!(ringway.mapping(), before);
}

#[tokio::test]
async fn a_standby_takes_a_connection_that_no_backend_of_the_main_tier_takes() {
    let (main, spare) = (Switched::start("a").await, Switched::start("b").await);
    let entries = [main.entry("a", ""), spare.entry("b", ", tier: 1")];
    let ringway = Ringway::start(&pool(&entries, "health_check: { kind: none }").replacen(CHECK, "", 1)).await;
    assert_eq!(name(&ringway).await, "a");
    drop(main);
    eventually_async("the standby", async || connect(&ringway).await.is_ok_and(|(_, name)| name == "b")).await;
}

#[tokio::test]
async fn an_entry_can_be_drained_or_without_weight_and_a_reload_changes_it() {
    let [a, b, c] = [Switched::start("a").await, Switched::start("b").await, Switched::start("c").await];
    let yaml = |of_b: &str, of_c: &str| pool(&[a.entry("a", ""), b.entry("b", of_b), c.entry("c", of_c)], "drain: 1m");
    let ringway = Ringway::start(&yaml(", state: drained", ", weight: 0")).await.ready().await;
    eventually("judged", || ringway.states() == [State::Healthy, State::Draining, State::Healthy]).await;
    assert!(ringway.mapping().values().all(|owner| owner == "a"));
    let undrain = Command::Undrain { pool: "echo".to_owned(), backend: "b".to_owned() };
    let error = ringway.send(undrain).await.unwrap_err();
    assert!(matches!(error, CommandError::DrainedByList { .. }), "{error}");

    let report = ringway.reload(&yaml("", ", weight: 1")).await.unwrap();
    assert!(report.changes.iter().any(|change| change.ends_with("static[b].state: drained -> ready")), "{report:?}");
    assert!(report.moved[0].share > 0.4, "{report:?}");
    eventually("all serve", || ringway.states() == [State::Healthy; 3]).await;
    let mut at_b = loop {
        let (stream, name) = connect(&ringway).await.unwrap();
        if name == "b" {
            break stream;
        }
    };
    let mut at_c = loop {
        let (stream, name) = connect(&ringway).await.unwrap();
        if name == "c" {
            break stream;
        }
    };
    ringway.reload(&yaml(", state: drained", ", weight: 0")).await.unwrap();
    for _ in 0..30 {
        assert_eq!(name(&ringway).await, "a");
    }
    assert!(echoes(&mut at_b).await && echoes(&mut at_c).await, "open connections go on");
    drop((at_b, at_c));
    let weight = Command::Weight { pool: "echo".to_owned(), backend: "c".to_owned(), weight: 1 };
    ringway.send(weight).await.unwrap();
    eventually("c serves", || ringway.mapping().values().any(|owner| owner == "c")).await;
}

#[tokio::test]
async fn a_backend_can_have_a_limit_of_its_own() {
    let (a, b) = (Switched::start("a").await, Switched::start("b").await);
    let entries = [a.entry("a", ", max_connections: 3"), b.entry("b", "")];
    let ringway = Ringway::start(&pool(&entries, "max_connections_per_backend: 5")).await.all_healthy().await;
    let mut open = Vec::new();
    let mut counts = [0, 0];
    for _ in 0..8 {
        let (stream, name) = connect(&ringway).await.unwrap();
        open.push(stream);
        counts[usize::from(name == "b")] += 1;
    }
    assert_eq!(counts, [3, 5]);
    assert!(connect(&ringway).await.is_err());
    eventually("counted", || ringway.state().listeners[0].stats.refused(RefusalReason::BackendsFull) == 1).await;
}

#[tokio::test]
async fn a_pool_may_be_empty_and_get_backends_later() {
    let ringway = Ringway::start(&pool(&[], "")).await.ready().await;
    assert!(connect(&ringway).await.is_err());
    eventually("counted", || ringway.state().listeners[0].stats.refused(RefusalReason::NoBackend) == 1).await;
    assert_eq!(get(ringway.api(), "/readyz").await.0, 200);
    let server = Switched::start("a").await;
    let membership = Membership { tier: 3, max_connections: Some(7), ..Membership::weighing(1) };
    let backend = Listed::parse(&server.server.address.to_string(), Some("a".to_owned()), membership).unwrap();
    ringway.send(Command::Add { pool: "echo".to_owned(), backend }).await.unwrap();
    eventually("it is healthy", || ringway.states() == [State::Healthy]).await;
    assert_eq!(ringway.backend(0).membership, membership);
    assert_eq!(name(&ringway).await, "a");
    ringway.send(Command::Remove { pool: "echo".to_owned(), backend: "a".to_owned() }).await.unwrap();
    eventually("it is gone", || ringway.states().is_empty()).await;
    assert!(connect(&ringway).await.is_err());
}

/// Two database servers that do not know of each other: each takes writes whatever its role is. The order of all writes is kept.
struct Pair {
    servers: [Server; 2],
    is_primary: [Arc<AtomicBool>; 2],
    writes: Arc<Mutex<Vec<usize>>>,
}

impl Pair {
    async fn start() -> Self {
        let writes = Arc::new(Mutex::new(Vec::new()));
        let is_primary = [true, false].map(|is| Arc::new(AtomicBool::new(is)));
        let server = async |n: usize| {
            let (writes, is_primary) = (Arc::clone(&writes), Arc::clone(&is_primary[n]));
            Server::start(move |mut stream| {
                let (writes, is_primary) = (Arc::clone(&writes), Arc::clone(&is_primary));
                async move {
                    let mut command = [0; 5];
                    while stream.read_exact(&mut command).await.is_ok() {
                        let answer = match (&command, is_primary.load(Ordering::SeqCst)) {
                            (b"role?", true) => b"main\n",
                            (b"role?", false) => b"side\n",
                            _ => {
                                writes.lock().unwrap().push(n);
                                b"done\n"
                            }
                        };
                        if stream.write_all(answer).await.is_err() {
                            return;
                        }
                    }
                }
            })
            .await
        };
        let servers = [server(0).await, server(1).await];
        Self { servers, is_primary, writes }
    }

    fn set(&self, n: usize, is: bool) {
        self.is_primary[n].store(is, Ordering::SeqCst);
    }

    /// Number of writes so far to this server.
    fn count(&self, n: usize) -> usize {
        self.writes.lock().unwrap().iter().filter(|to| **to == n).count()
    }
}

#[tokio::test]
async fn no_write_reaches_the_loser_of_a_failover() {
    let pair = Pair::start().await;
    let entries: Vec<_> = std::iter::zip(["a", "b"], &pair.servers)
        .map(|(id, server)| format!("{{ address: \"{}\", id: {id} }}", server.address))
        .collect();
    let check = "health_check: { kind: expect, send: \"role?\", expect: \"main\", interval: 50ms, fast_interval: 20ms, rise: 1, fall: 1 }";
    let yaml = config(
        &format!("static: [{}]", entries.join(", ")),
        "",
        &format!("{check}\ntiers: {{ exclusive: true }}\nkey: source_ip"),
    );
    let ringway = Ringway::start(&yaml).await.ready().await;
    eventually("one primary, one standby", || ringway.states() == [State::Healthy, State::Standby]).await;
    let is_over = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let (web, is_over) = (ringway.web(), Arc::clone(&is_over));
            tokio::spawn(async move {
                while !is_over.load(Ordering::Relaxed) {
                    let Ok(mut stream) = TcpStream::connect(web).await else { continue };
                    let mut answer = [0; 5];
                    while stream.write_all(b"write").await.is_ok()
                        && stream.read_exact(&mut answer).await.is_ok()
                        && !is_over.load(Ordering::Relaxed)
                    {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                }
            })
        })
        .collect();
    eventually("writes", || pair.count(0) > 20).await;
    for round in 0..6 {
        let (old, new) = (round % 2, (round + 1) % 2);
        // For a while, both say that they are the primary. The old one keeps the connections.
        pair.set(new, true);
        let check = |n: usize| ringway.backend(n).last_check().map(str::to_owned);
        eventually("the second claim", || check(new).as_deref() == Some("ok")).await;
        let writes = pair.count(old);
        eventually("more writes", || pair.count(old) > writes + 20).await;
        assert_eq!(ringway.states()[new], State::Standby);
        let before = pair.count(new);
        pair.set(old, false);
        eventually("writes to the new primary", || pair.count(new) > before + 20).await;
    }
    is_over.store(true, Ordering::Relaxed);
    for client in clients {
        soon("a client", client).await.unwrap();
    }
    let mut order = pair.writes.lock().unwrap().clone();
    order.dedup();
    assert_eq!(order, [0, 1, 0, 1, 0, 1, 0], "a write reached the loser after the winner had one");

    // A standby is up, and a server that is gone is not.
    let up = async |id: &str| ringway.metric("ringway_backend_up", &[id]).await;
    assert_eq!((up("\"a\"").await, up("\"b\"").await), (1.0, 1.0));
    assert_eq!(ringway.metric("ringway_backend_standby", &[]).await, 1.0);
    let Pair { servers: [_a, b], .. } = pair;
    drop(b);
    eventually("b is gone", || ringway.states()[1] == State::Unhealthy).await;
    assert_eq!(up("\"b\"").await, 0.0);
}

#[tokio::test]
async fn a_reload_keeps_the_holder_unless_the_check_asks_for_something_else() {
    let (a, b) = (Switched::start("a").await, Switched::start("b").await);
    b.set(false);
    let yaml = pool(&[a.entry("a", ""), b.entry("b", "")], "tiers: { exclusive: true }\ndrain: 1m");
    let ringway = Ringway::start(&yaml).await.ready().await;
    let holds = || ringway.states() == [State::Healthy, State::Standby];
    eventually("a holds the pool", holds).await;
    let (mut open, _) = connect(&ringway).await.unwrap();
    let report = ringway.reload(&yaml.replace("interval: 50ms", "interval: 60ms")).await.unwrap();
    assert_eq!((report.changes.len(), report.moved.len()), (1, 0), "{report:?}");
    let passed = ringway.backend(0).live.counters.checks_passed.load(Ordering::Relaxed);
    let more = || ringway.backend(0).live.counters.checks_passed.load(Ordering::Relaxed) > passed + 3;
    while !more() {
        assert!(holds(), "{:?}", ringway.states());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(echoes(&mut open).await, "a reload has reset the connections of the primary");

    // Whoever drains the holder hears that nobody takes over before its connections have ended.
    let drain = |backend: &str| Command::Drain { pool: "echo".to_owned(), backend: backend.to_owned(), within: None };
    b.set(true);
    eventually("b would take over", || ringway.backend(1).claims()).await;
    let report = ringway.send(drain("a")).await.unwrap();
    assert!(report.changes[0].starts_with("The pool is exclusive: no other backend"), "{report:?}");
    eventually("nobody holds the pool", || ringway.states() == [State::Draining, State::Standby]).await;
    ringway.send(Command::Undrain { pool: "echo".to_owned(), backend: "a".to_owned() }).await.unwrap();
    eventually("a holds it again", holds).await;
    assert!(echoes(&mut open).await);
    b.set(false);

    // Another check asks another question, and the one who answers it is the primary.
    let other = yaml.replace("CHECK\\n", "name").replace("\"YES\"", "b");
    ringway.reload(&other).await.unwrap();
    eventually("b holds the pool", || ringway.states() == [State::Standby, State::Healthy]).await;
    assert_eq!(name(&ringway).await, "b");
    // Whoever turns it off spreads the keys again.
    let report = ringway.reload(&other.replace("exclusive: true", "exclusive: false")).await.unwrap();
    assert!((0.2..0.8).contains(&report.moved[0].share), "{report:?}");
}
