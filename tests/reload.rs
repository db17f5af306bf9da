//! Reloads: the changes that they make, and the connections that they keep.

use std::sync::Arc;
use std::time::Duration;

use ringway::backend::State;
use ringway::control::command::{Command, CommandError};
use rustix::process::Signal;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::backends::{Refusing, Server};
use crate::harness::program::Program;
use crate::harness::{
    Ringway, THREE_REPLICAS, config, echoes, eventually, eventually_async, get, http, metric_in, soon, static_config,
};

/// Starts a server that echoes bytes.
async fn echo() -> Server {
    Server::start(|mut stream| async move {
        let mut buffer = [0; 1024];
        while let Ok(read @ 1..) = stream.read(&mut buffer).await {
            if stream.write_all(&buffer[..read]).await.is_err() {
                return;
            }
        }
    })
    .await
}

fn with_second_listener(yaml: &str, address: &str) -> String {
    yaml.replace("pools:\n", &format!("  - {{ name: second, listen: \"{address}\", pool: echo }}\npools:\n"))
}

#[tokio::test]
async fn a_reload_adds_and_removes_listeners_and_keeps_their_connections() {
    let server = echo().await;
    let yaml = static_config(&[server.address], "health_check: { kind: none }");
    let ringway = Ringway::start(&yaml).await;
    let free = Refusing::new();
    let address = free.address;
    drop(free);
    let report = ringway.reload(&with_second_listener(&yaml, &address.to_string())).await.unwrap();
    assert!(report.changes[0].starts_with("listeners[second]: added"), "{report:?}");
    let mut on_second = TcpStream::connect(address).await.unwrap();
    let mut on_first = TcpStream::connect(ringway.web()).await.unwrap();
    assert!(echoes(&mut on_second).await && echoes(&mut on_first).await);
    ringway.reload(&yaml).await.unwrap();
    let closed = async || TcpStream::connect(address).await.is_err();
    eventually_async("closed", closed).await;
    assert!(echoes(&mut on_second).await && echoes(&mut on_first).await);
    assert_eq!(ringway.state().listeners.len(), 1);
    let mut late = TcpStream::connect(ringway.web()).await.unwrap();
    assert!(echoes(&mut late).await);
}

#[tokio::test]
async fn a_reload_that_fails_changes_nothing() {
    let server = echo().await;
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let yaml = static_config(&[server.address], "health_check: { kind: none }");
    let ringway = Ringway::start(&yaml).await;
    let mut open = TcpStream::connect(ringway.web()).await.unwrap();
    assert!(echoes(&mut open).await);
    let taken = with_second_listener(&yaml, &taken.local_addr().unwrap().to_string());
    let other = Server::echo("x").await;
    let unresolvable = yaml.replace(&server.address.to_string(), "no-such-host.invalid:1");
    let no_program = config("process: { replicas: 1, command: [/no/such/program, \"{port}\"] }", "", "");
    let bad = static_config(&[other.address], "connect: { attempts: 0 }");
    let log = format!("access_log: {{ path: /no/such/folder/log }}\n{yaml}");
    for (yaml, words) in [
        (&taken, "already listens there"),
        (&unresolvable, "cannot resolve"),
        (&no_program, "cannot find an executable program"),
        (&bad, "pools[echo].connect.attempts"),
        (&log, "access_log.path"),
    ] {
        let refusal = ringway.reload(yaml).await.unwrap_err();
        assert!(refusal.to_string().contains(words), "{refusal}");
        assert!(matches!(refusal, CommandError::CannotPrepare(_) | CommandError::BadConfig(_)));
    }
    assert!(echoes(&mut open).await);
    assert_eq!(ringway.state().listeners.len(), 1);
    assert_eq!(ringway.backend(0).address, Some(server.address.into()));
    let mut late = TcpStream::connect(ringway.web()).await.unwrap();
    assert!(echoes(&mut late).await);
    assert_eq!(ringway.metric("ringway_config_reloads_total", &["failed"]).await, 5.0);
}

#[tokio::test]
async fn an_unchanged_config_changes_nothing_and_unchanged_backends_keep_their_state() {
    let servers = [Server::echo("b0").await, Server::echo("b1").await];
    let check = "health_check: { kind: http, path: /heartbeat, interval: 50ms }";
    let yaml = static_config(&servers.each_ref().map(|server| server.address), check);
    let ringway = Ringway::start(&yaml).await.all_healthy().await;
    for _ in 0..10 {
        http(ringway.web(), "GET", "/heartbeat", b"").await;
    }
    let before = [ringway.backend(0), ringway.backend(1)];
    let generation = ringway.state().pools[0].table.load().generation();
    let report = ringway.reload(&yaml).await.unwrap();
    assert_eq!(report, ringway::control::command::Report::default());
    assert_eq!(ringway.state().pools[0].table.load().generation(), generation);

    // With another check no backend becomes unhealthy, and the counters continue.
    let other = yaml.replace("interval: 50ms", "interval: 70ms, timeout: 900ms");
    let states = Arc::clone(&ringway.state().pools[0].table.load());
    assert!(states.any_healthy());
    let report = ringway.reload(&other).await.unwrap();
    assert_eq!(report.changes.len(), 3, "{report:?}");
    for _ in 0..20 {
        assert_eq!(ringway.states(), [State::Healthy; 2]);
        // A check that starts from nothing would make a backend unhealthy for a moment.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for (n, before) in before.iter().enumerate() {
        let after = ringway.backend(n);
        assert!(Arc::ptr_eq(&before.live, &after.live) && before.incarnation == after.incarnation);
    }
    assert!(ringway.metric("ringway_backend_connections_total", &[]).await >= 10.0);
}

#[tokio::test]
async fn keys_move_as_a_dry_run_predicts() {
    let servers = [echo().await, echo().await, echo().await, echo().await];
    let addresses = servers.each_ref().map(|server| server.address);
    let none = "health_check: { kind: none }";
    let (four, three) = (static_config(&addresses, none), static_config(&addresses[..3], none));
    let ringway = Ringway::start(&four).await;
    let seeded = format!("{three}\n    ring: {{ seed: 7 }}");
    for next in [&three, &four, &seeded] {
        let before = ringway.mapping();
        let digest = ringway.state().pools[0].table.load().ring().digest();
        let dry = Command::Reload { text: Some(next.clone()), is_dry_run: true, is_reset: false, max_keys_moved: None };
        let predicted = ringway.send(dry).await.unwrap();
        assert_eq!(ringway.mapping(), before, "a dry run changed something");
        let report = ringway.reload(next).await.unwrap();
        assert_eq!(report, predicted);
        eventually("settled", || {
            let table = ringway.state().pools[0].table.load();
            table.ring().digest() != digest && table.backends().iter().all(|backend| backend.drain.is_none())
        })
        .await;
        let after = ringway.mapping();
        let moved = after.iter().filter(|&(key, owner)| before[key] != *owner).count() as f64 / after.len() as f64;
        let share = predicted.moved[0].share;
        println!("predicted {share}, moved {moved}");
        assert!((share - moved).abs() < 0.03, "predicted {share}, moved {moved}");
    }
}

#[tokio::test]
async fn a_changed_command_is_rolled_out_one_replica_at_a_time_and_no_request_fails() {
    let check = "health_check: { kind: http, path: /heartbeat, interval: 100ms }\ndrain: 5s";
    let yaml = config(THREE_REPLICAS, "", check);
    let ringway = Ringway::start(&yaml).await.all_healthy().await;
    let before: Vec<_> = (0..3).map(|n| ringway.backend(n).replica).collect();
    let other = yaml.replace("--name, \"{slot}\"", "--name, \"new-{slot}\"");
    ringway.reload(&other).await.unwrap();
    let mut least = 3;
    let mut asked = 0;
    eventually_requests(&ringway, &mut least, &mut asked, &before).await;
    assert!(least >= 2, "{least} healthy at a time");
    println!("{asked} requests during the roll-out");
    let answer = http(ringway.web(), "POST", "/api/request", b"x").await;
    assert!(String::from_utf8_lossy(answer.body()).contains("new-echo-"));
}

/// Sends requests on new connections until every replica is new. Every request must get an answer.
async fn eventually_requests(
    ringway: &Ringway,
    least: &mut usize,
    asked: &mut usize,
    before: &[Option<ringway::backend::Replica>],
) {
    eventually_async("all are new", async || {
        *least = (*least).min(ringway.state().pools[0].table.load().healthy());
        let answer = http(ringway.web(), "POST", "/api/request", b"x").await;
        assert_eq!(answer.status(), 200);
        *asked += 1;
        let all = (0..3).map(|n| ringway.backend(n).replica);
        let changed = std::iter::zip(all, before).all(|(now, before)| now.is_some() && now != *before);
        changed && ringway.states() == [State::Healthy; 3]
    })
    .await;
}

#[tokio::test]
async fn a_change_at_run_time_survives_a_reload_of_other_settings() {
    let servers = [echo().await, echo().await];
    let yaml = static_config(&servers.each_ref().map(|server| server.address), "health_check: { kind: none }");
    let ringway = Ringway::start(&yaml).await;
    let drain = Command::Drain { pool: "echo".to_owned(), backend: "b0".to_owned(), within: None };
    ringway.send(drain).await.unwrap();
    ringway.send(Command::Weight { pool: "echo".to_owned(), backend: "b1".to_owned(), weight: 3 }).await.unwrap();
    ringway.reload(&yaml.replace("drain: 100ms", "drain: 200ms")).await.unwrap();
    eventually("still drained", || ringway.states() == [State::Draining, State::Healthy]).await;
    eventually("the weight of the command", || ringway.backend(1).membership.weight == 3).await;
    assert_eq!(ringway.metric("ringway_pool_runtime_changes", &[]).await, 2.0);
    ringway.reload(&yaml.replace("id: b1 }", "id: b1, weight: 2 }")).await.unwrap();
    eventually("the weight of the file", || ringway.backend(1).membership.weight == 2).await;
    assert_eq!(ringway.states()[0], State::Draining);
}

#[tokio::test]
async fn a_reload_changes_the_provider_of_a_pool() {
    let servers = [echo().await, echo().await];
    let none = "health_check: { kind: none }\ndrain: 5s";
    let yaml = static_config(&[servers[0].address], none);
    let ringway = Ringway::start(&yaml).await;
    let mut open = TcpStream::connect(ringway.web()).await.unwrap();
    assert!(echoes(&mut open).await);
    let processes = config(THREE_REPLICAS, "", "health_check: { interval: 50ms }\ndrain: 5s");
    ringway.reload(&processes).await.unwrap();
    assert!(echoes(&mut open).await, "the reload ended a connection to a removed backend");
    eventually("three replicas", || ringway.states() == [State::Healthy; 3]).await;
    let pids: Vec<_> = (0..3).map(|n| ringway.backend(n).replica.unwrap()).collect();
    assert_eq!(http(ringway.web(), "POST", "/api/request", b"x").await.status(), 200);
    ringway.reload(&yaml).await.unwrap();
    eventually("one backend", || ringway.states() == [State::Healthy]).await;
    eventually("no child is left", || {
        pids.iter().all(|replica| match replica {
            ringway::backend::Replica::Process { pid } => !crate::harness::program::is_alive(
                rustix::process::Pid::from_raw(i32::try_from(*pid).unwrap()).unwrap(),
            ),
            ringway::backend::Replica::Container { .. } => false,
        })
    })
    .await;
    let mut late = TcpStream::connect(ringway.web()).await.unwrap();
    assert!(echoes(&mut late).await && echoes(&mut open).await);
}

#[tokio::test]
async fn a_reload_changes_limits_and_names_the_settings_that_need_a_restart() {
    let server = echo().await;
    let yaml = format!("max_connections: 2\n{}", static_config(&[server.address], "health_check: { kind: none }"));
    let ringway = Ringway::start(&yaml).await;
    let mut open = loadtest::open(ringway.web(), 3).await.unwrap();
    let active = || ringway.state().listeners[0].stats.active();
    eventually("two of three", || active() == 2).await;
    let other = yaml.replace("max_connections: 2", "max_connections: 3").replace("workers: 2", "workers: 1");
    let report = ringway.reload(&other).await.unwrap();
    assert_eq!(report.needs_restart, ["workers"]);
    eventually("three", || active() == 3).await;
    for stream in &mut open {
        assert!(echoes(stream).await);
    }
    ringway.reload(&yaml.replace("max_connections: 2", "max_connections: 1")).await.unwrap();
    for stream in &mut open {
        assert!(echoes(stream).await, "a lower limit ended a connection");
    }
    open.truncate(1);
    eventually("one", || active() == 1).await;
    let _waits = loadtest::open(ringway.web(), 1).await.unwrap();
    // A listener that ignores the new limit would accept the second connection in this time.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(active(), 1);
}

#[tokio::test]
async fn sighup_reloads_the_file_and_reopens_the_access_log() {
    let server = echo().await;
    let folder = tempfile::tempdir().unwrap();
    let (log, rotated) = (folder.path().join("access.log"), folder.path().join("access.log.1"));
    let pool = static_config(&[server.address], "health_check: { kind: none }");
    let yaml = format!("access_log: {{ path: \"{}\" }}\n{pool}", log.display());
    let program = Program::start(&yaml).await.ready().await;
    let once = async || {
        let mut stream = TcpStream::connect(program.web()).await.unwrap();
        assert!(echoes(&mut stream).await);
    };
    let lines = |path: &std::path::Path| std::fs::read_to_string(path).unwrap_or_default().lines().count();
    once().await;
    eventually("a line", || lines(&log) == 1).await;
    std::fs::rename(&log, &rotated).unwrap();
    program.signal(Signal::HUP);
    eventually("a new log", || log.exists()).await;
    once().await;
    eventually("a line in the new one", || lines(&log) == 1).await;
    assert_eq!(lines(&rotated), 1);

    let reloads = async |result: &str| {
        let text = get(program.api(), "/metrics").await.1;
        metric_in(&text, "ringway_config_reloads_total", &[result])
    };
    program.write_config("listeners: nonsense");
    program.signal(Signal::HUP);
    eventually_async("refused", async || reloads("failed").await == 1.0).await;
    eventually("the reason", || program.log().contains("listeners: \"nonsense\" is not a list")).await;
    once().await;
    program.write_config(&pool.replace("drain: 100ms", "drain: 7s"));
    program.signal(Signal::HUP);
    eventually_async("applied", async || {
        program.status().await["pools"][0]["drain_seconds"] == 7.0 && reloads("ok").await == 2.0
    })
    .await;
    soon("one more", once()).await;
    assert_eq!(lines(&log), 2, "the log is off: {:?}", std::fs::read_to_string(&log));
}

/// A rotation at night must not apply a config that somebody is still writing.
#[tokio::test]
async fn a_rotation_opens_the_access_log_again_and_leaves_the_config_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (log, rotated) = (folder.path().join("access.log"), folder.path().join("access.log.1"));
    let server = Server::echo("a").await;
    let pool = static_config(&[server.address], "health_check: { kind: none }\ndrain: 7s");
    let program = Program::start(&format!("access_log: {{ path: {} }}\n{pool}", log.display())).await.ready().await;
    let lines = |path: &std::path::Path| std::fs::read_to_string(path).unwrap_or_default().lines().count();
    let once = async || {
        let mut stream = TcpStream::connect(program.web()).await.unwrap();
        assert!(echoes(&mut stream).await);
    };
    // Valid, but not to be applied yet.
    program.write_config(&pool.replace("drain: 7s", "drain: 8s"));
    let by_signal = async || program.signal(Signal::USR1);
    let by_call = async || assert_eq!(http(program.api(), "POST", "/api/log/reopen", b"").await.status(), 200);
    for how in ["signal", "call"] {
        once().await;
        eventually("a line", || lines(&log) == 1).await;
        std::fs::rename(&log, &rotated).unwrap();
        match how {
            "signal" => by_signal().await,
            _ => by_call().await,
        }
        eventually("a new log", || log.exists()).await;
        once().await;
        eventually("a line in the new one", || lines(&log) == 1).await;
        assert_eq!(lines(&rotated), 1);
        std::fs::remove_file(&log).unwrap();
        by_call().await;
    }
    assert_eq!(program.status().await["pools"][0]["drain_seconds"], 7.0);
    // If the file cannot be opened, the old one goes on.
    std::fs::remove_file(&log).unwrap();
    std::fs::create_dir(&log).unwrap();
    let answer = http(program.api(), "POST", "/api/log/reopen", b"").await;
    let said = String::from_utf8_lossy(answer.body()).into_owned();
    assert!(answer.status() == 409 && said.contains(&*log.to_string_lossy()), "{said}");
}
