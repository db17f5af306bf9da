//! Upgrades: the new process takes over without a refused connection, a reset or a restart of a replica. If the upgrade
//! fails, the old process continues.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustix::process::{Signal, kill_process};
use tokio::net::TcpStream;

use crate::harness::backends::Server;
use crate::harness::program::{Program, is_alive, run};
use crate::harness::{
    THREE_REPLICAS, config, echoes, eventually, eventually_async, get, http, metric_in, soon, static_config,
};

fn replicas_config() -> String {
    config(THREE_REPLICAS, "", "health_check: { kind: http, path: /heartbeat, interval: 200ms }\ndrain: 10s")
}

#[tokio::test]
async fn replicas_connections_and_changes_survive_an_upgrade() {
    let mut program = Program::start(&replicas_config()).await.ready().await;
    let (api, web) = (program.api(), program.web());
    let replicas = program.replicas().await;
    assert_eq!(replicas.len(), 3);
    let mut open = loadtest::open(web, 20).await.unwrap();
    for stream in &mut open {
        assert!(soon("an echo", echoes(stream)).await);
    }
    eventually_async("all healthy", async || {
        let status = program.status().await;
        status["pools"][0]["backends"].as_array().unwrap().iter().all(|one| one["state"] == "healthy")
    })
    .await;
    let owner = async |key: usize| {
        let path = format!("/api/request?key={key}");
        http(api, "POST", &path, b"x").await.headers()["x-ringway-backend"].to_str().unwrap().to_owned()
    };
    let mut owners = Vec::new();
    for key in 0..10 {
        owners.push(owner(key).await);
    }
    assert!(owners.iter().any(|owner| owner != "echo-2"), "the drained replica owns every key: {owners:?}");
    let drain = "/api/pools/echo/backends/echo-2/drain";
    assert_eq!(http(api, "POST", drain, b"{\"within_seconds\": 3600}").await.status(), 200);

    let old = program.pid();
    let new = program.upgrade().await;
    assert_ne!(new, old);
    assert_eq!(program.replicas().await, replicas, "the upgrade restarted a replica");
    let status = program.status().await;
    let states: Vec<_> = status["pools"][0]["backends"].as_array().unwrap().iter().map(|one| &one["state"]).collect();
    assert_eq!(states, ["healthy", "draining", "healthy"]);
    assert_eq!(status["pools"][0]["differs"][0]["what"], "drain");
    for (key, before) in owners.iter().enumerate().filter(|(_, before)| *before != "echo-2") {
        assert_eq!(owner(key).await, *before, "key {key}");
    }
    for stream in &mut open {
        assert!(soon("an echo of the old process", echoes(stream)).await);
    }
    let mut late = TcpStream::connect(web).await.unwrap();
    assert!(soon("an echo of the new process", echoes(&mut late)).await);
    drop(open);
    assert_eq!(program.ended().await.code(), Some(0), "the old process exits after its connections");
    assert!(soon("an echo after it", echoes(&mut late)).await);

    // The new process supervises the replicas now, and they end with it.
    kill_process(replicas[0], Signal::KILL).unwrap();
    eventually_async("replaced", async || {
        let now = program.replicas().await;
        now.len() == 3 && now[0] != replicas[0]
    })
    .await;
    let now = program.replicas().await;
    assert_eq!(&now[1..], &replicas[1..]);
    kill_process(new, Signal::KILL).unwrap();
    eventually("the end of all replicas", || !now.iter().any(|&pid| is_alive(pid))).await;
}

#[tokio::test]
async fn a_successor_that_fails_changes_nothing() {
    let mut program = Program::start(&replicas_config()).await.ready().await;
    let replicas = program.replicas().await;
    let mut open = TcpStream::connect(program.web()).await.unwrap();
    assert!(echoes(&mut open).await);
    let old = program.pid();
    for (yaml, words) in [
        ("listeners: nonsense", "the successor failed"),
        // The new process starts, but it cannot open its access log.
        (&*replicas_config().replace("workers: 2", "access_log: { path: /no/such/folder/x }"), "the successor failed"),
    ] {
        program.write_config(yaml);
        let answer = http(program.api(), "POST", "/api/upgrade", b"").await;
        let text = String::from_utf8_lossy(answer.body()).into_owned();
        assert_eq!(answer.status(), 409, "{text}");
        assert!(text.contains(words), "{text}");
        assert_eq!(program.status().await["pid"], old.as_raw_nonzero().get());
        assert_eq!(program.replicas().await, replicas);
        assert!(echoes(&mut open).await);
        assert!(echoes(&mut TcpStream::connect(program.web()).await.unwrap()).await);
    }
    let text = get(program.api(), "/metrics").await.1;
    assert_eq!(metric_in(&text, "ringway_upgrades_total", &["failed"]), 2.0);
    // The old process still replaces replicas, and an upgrade with a valid config succeeds.
    kill_process(replicas[2], Signal::KILL).unwrap();
    eventually_async("replaced", async || {
        let now = program.replicas().await;
        now.len() == 3 && now[2] != replicas[2]
    })
    .await;
    program.write_config(&replicas_config());
    program.upgrade().await;
    assert!(echoes(&mut TcpStream::connect(program.web()).await.unwrap()).await);
}

#[tokio::test]
async fn an_upgrade_closes_a_removed_listener_and_opens_a_new_one() {
    let server = Server::echo("a").await;
    let yaml = static_config(&[server.address], "health_check: { kind: none }\ndrain: 10s");
    let second = yaml.replace("pools:\n", "  - { name: second, listen: \"127.0.0.1:0\", pool: echo }\npools:\n");
    let mut program = Program::start(&second).await.ready().await;
    let gone = program.status().await["listeners"][1]["address"].as_str().unwrap().to_owned();
    let mut open = TcpStream::connect(&gone).await.unwrap();
    assert!(echoes(&mut open).await);
    program.write_config(&second.replace("name: second", "name: third"));
    program.upgrade().await;
    let third = program.status().await["listeners"][1]["address"].as_str().unwrap().to_owned();
    assert!(echoes(&mut TcpStream::connect(&third).await.unwrap()).await);
    eventually_async("closed", async || TcpStream::connect(&gone).await.is_err()).await;
    assert!(echoes(&mut open).await);
}

#[tokio::test]
async fn the_successor_serves_who_connects_after_the_answer_to_an_upgrade() {
    let servers = [Server::echo("a").await, Server::start(async |stream| drop(stream)).await];
    let yaml = |server: &Server| static_config(&[server.address], "health_check: { kind: none }");
    let mut program = Program::start(&yaml(&servers[0])).await.ready().await;
    for n in 1..=20 {
        program.write_config(&yaml(&servers[n % 2]));
        let upgraded = soon("an upgrade", http(program.api(), "POST", "/api/upgrade", b"")).await;
        assert_eq!(upgraded.status(), 200);
        let echoed = echoes(&mut TcpStream::connect(program.web()).await.unwrap()).await;
        assert_eq!(echoed, n % 2 == 0, "upgrade {n}");
        program.follow().await;
    }
}

#[tokio::test]
async fn an_upgrade_stops_removed_replicas_after_the_drain() {
    let yaml = replicas_config().replace("drain: 10s", "drain: 1s");
    let mut program = Program::start(&yaml).await.ready().await;
    let replicas = program.replicas().await;
    program.write_config(&yaml.replace("replicas: 3", "replicas: 2"));
    program.upgrade().await;
    eventually_async("two are left", async || program.replicas().await == replicas[..2]).await;
    eventually("the third has ended", || !is_alive(replicas[2])).await;
    // The upgrade also rolls out another command.
    program.write_config(
        &yaml.replace("replicas: 3", "replicas: 2").replace("--name, \"{slot}\"", "--name, \"new-{slot}\""),
    );
    program.upgrade().await;
    eventually_async("both are new", async || {
        let now = program.replicas().await;
        now.len() == 2 && now.iter().all(|pid| !replicas.contains(pid))
    })
    .await;
    let server = Server::echo("a").await;
    program.write_config(&static_config(&[server.address], "health_check: { kind: none }\ndrain: 1s"));
    let left = program.replicas().await;
    program.upgrade().await;
    eventually("none is left", || !left.iter().any(|&pid| is_alive(pid))).await;
    assert_eq!(http(program.web(), "POST", "/api/request", b"x").await.status(), 200);
}

/// `loadtest soak` runs the longer version of this test.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reloads_and_upgrades_refuse_and_reset_no_connection() {
    let mut program = Program::start(&replicas_config()).await.ready().await;
    let load = tokio::spawn(loadtest::churn(program.web(), 300, Duration::from_secs(6), Duration::from_secs(20)));
    let variants =
        [replicas_config(), replicas_config().replace("attempts: 3", "attempts: 4").replace("drain: 10s", "drain: 9s")];
    for n in 0..12_usize {
        program.write_config(&variants[n % 2]);
        if n % 4 == 3 {
            program.upgrade().await;
        } else {
            assert_eq!(http(program.api(), "POST", "/api/reload", b"").await.status(), 200);
        }
        // A reload or an upgrade that drops connections would fail a part of the load in this time.
        tokio::time::sleep(Duration::from_millis(400)).await;
    }
    let report = soon("the load", load).await.unwrap();
    let failures: Vec<_> = report.outcomes.iter().filter(|outcome| outcome.server.is_err()).collect();
    assert!(failures.is_empty(), "{} of {}: {:?}", failures.len(), report.outcomes.len(), failures.first());
    assert!(report.outcomes.len() > 1500, "{}", report.outcomes.len());
}

#[tokio::test]
async fn sigusr2_upgrades_and_sigterm_stops_the_new_process_with_its_replicas() {
    let mut program = Program::start(&replicas_config()).await.ready().await;
    let old = program.pid();
    program.signal(Signal::USR2);
    eventually_async("another process answers", async || program.status().await["pid"] != old.as_raw_nonzero().get())
        .await;
    // Until it has ended, the old process may answer too.
    assert_eq!(program.ended().await.code(), Some(0));
    let new = program.follow().await;
    let replicas = program.replicas().await;
    kill_process(new, Signal::TERM).unwrap();
    eventually("it ends", || !is_alive(new)).await;
    eventually("no replica is left", || !replicas.iter().any(|&pid| is_alive(pid))).await;
}

#[tokio::test]
async fn the_command_line_sends_commands_to_a_running_ringway() {
    let yaml = replicas_config();
    let mut program = Program::start(&yaml).await.ready().await;
    let api = program.api().to_string();
    let command = |words: &[&str]| {
        let mut arguments = words.to_vec();
        arguments.extend(["--api", &api]);
        run(&arguments)
    };
    let (code, out, err) = command(&["drain", "echo/echo-1", "--wait"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("echo/echo-1: no new connections") && out.contains("0 connections left"), "{out}");
    let (code, out, _) = command(&["scale", "web", "4"]);
    assert!(code == Some(0) && out.contains("pools[echo].provider.process.replicas: 3 -> 4"), "{out}");
    assert!(out.contains("% of the keys move"), "{out}");
    let (code, _, err) = command(&["undrain", "echo/echo-9"]);
    assert!(code == Some(1) && err.contains("refused: ") && err.contains("echo-1, echo-2, echo-3"), "{err}");
    let (code, _, err) = command(&["weight", "echo", "3"]);
    assert!(code == Some(2) && err.contains("write it as POOL/BACKEND"), "{err}");
    let file =
        crate::harness::program::file(&yaml.replace("drain: 10s", "drain: 11s").replace("replicas: 3", "replicas: 5"));
    let (code, out, err) = command(&["check", "--diff", "--config", file.path().to_str().unwrap()]);
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("pools[echo].drain: 10s -> 11s") && out.contains("replicas: 4 -> 5"), "{out}");
    assert_eq!(program.status().await["pools"][0]["drain_seconds"], 10.0, "check --diff changed the drain");
    let (code, out, _) = command(&["upgrade"]);
    assert!(code == Some(0) && out.contains("has taken over"), "{out}");
    program.follow().await;
    let (code, _, err) = run(&["reload", "--api", "127.0.0.1:1"]);
    assert!(code == Some(1) && err.contains("cannot reach the side port at 127.0.0.1:1"), "{err}");
}

/// These backends are more than one message holds.
#[tokio::test]
async fn an_upgrade_hands_over_any_number_of_changes_and_any_environment() {
    let server = Server::echo("a").await;
    let long = "x".repeat(245);
    let backend = |n: usize| format!("{{ address: \"{}\", id: {long}-{n} }}", server.address);
    let backends: Vec<_> = (0..600).map(backend).collect();
    let provider = format!("static: [{}]", backends.join(", "));
    let pool = "health_check: { kind: none }\nring: { virtual_nodes: 1 }";
    let mut program = Program::start(&config(&provider, "", pool)).await;
    for n in 0..600 {
        let path = format!("/api/pools/echo/backends/{long}-{n}/drain");
        assert_eq!(http(program.api(), "POST", &path, b"").await.status(), 200);
    }
    program.upgrade().await;
    let status = program.status().await;
    assert_eq!(status["pools"][0]["differs"].as_array().unwrap().len(), 600);
    drop(program);
    let large = "x".repeat(100_000);
    let env = format!("env: {{ ONE: \"{large}\", TWO: \"{large}\" }}, command: [ringway");
    let yaml = replicas_config().replacen("command: [ringway", &env, 1);
    let mut program = Program::start(&yaml).await.ready().await;
    let replicas = program.replicas().await;
    program.upgrade().await;
    assert_eq!(program.replicas().await, replicas);
}

#[tokio::test]
async fn a_failed_upgrade_tells_the_errors_of_the_config() {
    let program = Program::start(&replicas_config()).await.ready().await;
    let log = "access_log: { path: /no/such/folder/x }\n".to_owned() + &replicas_config();
    for (yaml, why) in
        [("listeners: nonsense", "listeners: \"nonsense\" is not a list"), (&log, "access_log.path: cannot write")]
    {
        program.write_config(yaml);
        let answer = http(program.api(), "POST", "/api/upgrade", b"").await;
        let text = String::from_utf8_lossy(answer.body()).replace("\\\"", "\"");
        assert!(answer.status() == 409 && text.contains(why), "{text}");
    }
}

#[tokio::test]
async fn replicas_outlive_a_successor_that_dies_while_the_old_process_has_connections() {
    let mut program = Program::start(&replicas_config()).await.ready().await;
    let replicas = program.replicas().await;
    let mut open = TcpStream::connect(program.web()).await.unwrap();
    assert!(echoes(&mut open).await);
    let successor = program.upgrade().await;
    kill_process(successor, Signal::KILL).unwrap();
    eventually("the successor's end", || !is_alive(successor)).await;
    // A shim that noticed would kill its replica within this time.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(replicas.iter().all(|&pid| is_alive(pid)));
    assert!(soon("an echo", echoes(&mut open)).await);
    drop(open);
    assert_eq!(program.ended().await.code(), Some(0));
    eventually("the end of the replicas", || !replicas.iter().any(|&pid| is_alive(pid))).await;
}

/// Makes connections one after the other until it is dropped, and counts those that failed.
struct Knocking {
    failed: Arc<AtomicUsize>,
    made: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Knocking {
    fn at(address: std::net::SocketAddr) -> Self {
        let (failed, made) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (fails, counts) = (Arc::clone(&failed), Arc::clone(&made));
        let task = tokio::spawn(async move {
            loop {
                let is_served = match TcpStream::connect(address).await {
                    Ok(mut stream) => echoes(&mut stream).await,
                    Err(_) => false,
                };
                counts.fetch_add(1, Ordering::Relaxed);
                fails.fetch_add(usize::from(!is_served), Ordering::Relaxed);
            }
        });
        Self { failed, made, task }
    }
}

impl Drop for Knocking {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[tokio::test]
async fn a_listener_moves_between_loopback_and_all_addresses_by_reload_and_by_upgrade() {
    let server = Server::echo("a").await;
    let yaml = static_config(&[server.address], "health_check: { kind: none }\ndrain: 100ms");
    let mut program = Program::start(&yaml).await.ready().await;
    let web = program.web();
    let on = |ip: &str| yaml.replacen("listen: 127.0.0.1:0\n", &format!("listen: {ip}:{}\n", web.port()), 1);
    program.write_config(&on("127.0.0.1"));
    program.upgrade().await;
    let knocking = Knocking::at(web);
    for path in ["/api/reload", "/api/upgrade"] {
        for ip in ["0.0.0.0", "127.0.0.1", "0.0.0.0", "127.0.0.1"] {
            program.write_config(&on(ip));
            let answer = http(program.api(), "POST", path, b"").await;
            assert_eq!(answer.status(), 200, "{path} {ip}: {}", String::from_utf8_lossy(answer.body()));
            program.follow().await;
            let before = knocking.made.load(Ordering::Relaxed);
            eventually("further connections", || knocking.made.load(Ordering::Relaxed) > before + 5).await;
            let listen = program.status().await["listeners"][0]["address"].as_str().unwrap().to_owned();
            assert_eq!(listen, format!("{ip}:{}", web.port()));
        }
    }
    let (failed, made) = (knocking.failed.load(Ordering::Relaxed), knocking.made.load(Ordering::Relaxed));
    assert_eq!(failed, 0, "of {made} connections");
}
