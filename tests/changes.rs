//! Changes at run time: drain, weight, add, remove and scale, and the permission for them.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ringway::backend::{Membership, State};
use ringway::control::command::{Command, CommandError};
use ringway::control::provider::Listed;
use ringway::proxy::stats::EndReason;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::backends::Server;
use crate::harness::program::{Program, run};
use crate::harness::{
    Ringway, THREE_REPLICAS, config, echoes, eventually, eventually_async, http, http_with, soon, static_config,
};

/// Starts a backend that sends its name on each connection and then echoes.
async fn named(name: &'static str) -> Server {
    Server::start(move |mut stream| async move {
        let _ = stream.write_all(name.as_bytes()).await;
        let mut buffer = [0; 1024];
        while let Ok(read @ 1..) = stream.read(&mut buffer).await {
            if stream.write_all(&buffer[..read]).await.is_err() {
                return;
            }
        }
    })
    .await
}

/// Opens a connection and reads the name of its backend.
async fn connect(ringway: &Ringway) -> (TcpStream, String) {
    let mut stream = TcpStream::connect(ringway.web()).await.unwrap();
    let mut name = [0; 2];
    soon("a name", stream.read_exact(&mut name)).await.unwrap();
    (stream, String::from_utf8_lossy(&name).into_owned())
}

fn drain(backend: &str, within: Option<Duration>) -> Command {
    Command::Drain { pool: "echo".to_owned(), backend: backend.to_owned(), within }
}

async fn three() -> ([Server; 3], Ringway) {
    let servers = [named("b0").await, named("b1").await, named("b2").await];
    let yaml =
        static_config(&servers.each_ref().map(|server| server.address), "health_check: { kind: none }\ndrain: 1m");
    let ringway = Ringway::start(&yaml).await;
    (servers, ringway)
}

/// Opens connections until this backend serves one.
async fn connect_to(ringway: &Ringway, name: &str) -> TcpStream {
    for _ in 0..200 {
        let (stream, who) = connect(ringway).await;
        if who == name {
            return stream;
        }
    }
    panic!("no connection goes to {name}");
}

#[tokio::test]
async fn a_draining_backend_gets_no_new_connection_and_its_connections_finish() {
    let (_servers, ringway) = three().await;
    let before = ringway.mapping();
    let mut old = connect_to(&ringway, "b1").await;
    ringway.send(drain("b1", None)).await.unwrap();
    eventually("draining", || ringway.states()[1] == State::Draining).await;
    for _ in 0..60 {
        assert_ne!(connect(&ringway).await.1, "b1");
    }
    assert!(echoes(&mut old).await);
    let after = ringway.mapping();
    assert!(before.iter().all(|(key, owner)| owner == "b1" || after[key] == *owner), "others moved");
    old.shutdown().await.unwrap();
    soon("the end", old.read_to_end(&mut Vec::new())).await.unwrap();
    eventually("none left", || ringway.backend(1).live.active.load(Ordering::Relaxed) == 0).await;
    assert_eq!(ringway.state().listeners[0].stats.ended(EndReason::DrainDeadline), 0);

    ringway.send(Command::Undrain { pool: "echo".to_owned(), backend: "b1".to_owned() }).await.unwrap();
    eventually("healthy again", || ringway.states() == [State::Healthy; 3]).await;
    assert_eq!(ringway.mapping(), before);
}

#[tokio::test]
async fn a_drain_resets_the_remaining_connections_and_not_before_its_deadline() {
    let (_servers, ringway) = three().await;
    let mut old = connect_to(&ringway, "b1").await;
    let began = Instant::now();
    ringway.send(drain("b1", Some(Duration::from_secs(2)))).await.unwrap();
    let error = soon("the deadline", old.read_exact(&mut [0; 1])).await.unwrap_err();
    let took = began.elapsed();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert!(took >= Duration::from_secs(2), "{took:?}");
    println!("2 s of drain took {took:?}");
    eventually("counted", || ringway.state().listeners[0].stats.ended(EndReason::DrainDeadline) == 1).await;
}

/// Runs `ringway` with these arguments against a program's side port.
pub(crate) async fn cli(program: &Program, arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut all: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
    all.extend(["--api".to_owned(), program.api().to_string()]);
    let run = move || run(&all.iter().map(String::as_str).collect::<Vec<_>>());
    tokio::task::spawn_blocking(run).await.unwrap()
}

#[tokio::test]
async fn waiting_for_a_drain_says_how_many_connections_were_reset() {
    let servers = [named("b0").await, named("b1").await];
    let yaml = static_config(&servers.each_ref().map(|server| server.address), "health_check: { kind: none }");
    let program = Program::start(&yaml).await.ready().await;
    let mut open = Vec::new();
    let mut of = [0, 0];
    while of.contains(&0) {
        let mut stream = TcpStream::connect(program.web()).await.unwrap();
        let mut name = [0; 2];
        soon("a name", stream.read_exact(&mut name)).await.unwrap();
        of[usize::from(name[1] - b'0')] += 1;
        open.push(stream);
    }
    let words =
        |count: u32| format!("Ringway reset {count} connection{} at the deadline", if count == 1 { "" } else { "s" });
    let (code, stdout, stderr) = cli(&program, &["drain", "echo/b0", "--wait", "--within", "0s"]).await;
    assert_eq!(code, Some(3), "{stdout}{stderr}");
    assert!(stderr.contains(&words(of[0])), "{stderr}");
    // A backend that leaves takes its own counter along.
    let (code, _, _) = cli(&program, &["undrain", "echo/b0"]).await;
    assert_eq!(code, Some(0));
    let (code, stdout, stderr) = cli(&program, &["remove", "echo/b1", "--wait"]).await;
    assert_eq!(code, Some(3), "{stdout}{stderr}");
    assert!(stderr.contains(&words(of[1])) && stdout.contains("left the pool"), "{stdout}{stderr}");
    // Without connections there is nothing to reset.
    let (code, stdout, stderr) = cli(&program, &["drain", "echo/b0", "--wait"]).await;
    assert_eq!((code, stderr.as_str()), (Some(0), ""), "{stdout}");
    assert!(stdout.contains("echo/b0: 0 connections left"), "{stdout}");
}

#[tokio::test]
async fn a_reload_names_the_changes_that_it_keeps_and_drops_them_when_asked() {
    let servers = [named("b0").await, named("b1").await];
    let yaml = static_config(&servers.each_ref().map(|server| server.address), "health_check: { kind: none }");
    let program = Program::start(&yaml).await.ready().await;
    let (code, stdout, stderr) = cli(&program, &["undrain", "echo/b0"]).await;
    assert_eq!((code, stdout.as_str()), (Some(0), "nothing to change\n"), "{stderr}");
    for change in [&["drain", "echo/b0"][..], &["weight", "echo/b1", "3"]] {
        assert_eq!(cli(&program, change).await.0, Some(0));
    }
    let (_, stdout, _) = cli(&program, &["reload"]).await;
    for part in [
        "nothing to change",
        "kept at run time: pools[echo]: weight of b1 is 3, not 1",
        "b0 is drained",
        "reload --reset",
    ] {
        assert!(stdout.contains(part), "{stdout:?} lacks {part:?}");
    }
    let (code, stdout, stderr) = cli(&program, &["reload", "--reset"]).await;
    assert_eq!(code, Some(0), "{stderr}");
    for part in ["static[b1].weight: 3 -> 1", "pools[echo]: b0 is no longer drained", "keys move"] {
        assert!(stdout.contains(part) && !stdout.contains("kept"), "{stdout:?} lacks {part:?}");
    }
    let status = program.status().await;
    assert_eq!(status["pools"][0]["differs"], serde_json::json!([]));
    assert_eq!(status["pools"][0]["backends"][0]["state"], "healthy");
    let (_, stdout, _) = cli(&program, &["check", "--diff"]).await;
    assert_eq!(stdout, "no difference\n");
}

#[tokio::test]
async fn a_drained_backend_has_its_share_but_gets_no_keys_now() {
    let (_servers, ringway) = three().await;
    let table = || ringway.state().pools[0].table.load();
    let shares = table().ring().shares().to_vec();
    assert_eq!(table().shares_now(), shares);
    ringway.send(drain("b1", None)).await.unwrap();
    eventually("draining", || ringway.states()[1] == State::Draining).await;
    let now = table().shares_now().to_vec();
    assert_eq!(table().ring().shares(), shares);
    assert!(now[1] == 0.0 && (now.iter().sum::<f64>() - 1.0).abs() < 1e-9, "{now:?}");
    // As many keys as the shares say.
    let keys = 20_000_u32;
    let first = |key: u32| table().candidates(&key.to_le_bytes()).next().unwrap().0.id.to_string();
    let to_b0 = (0..keys).filter(|&key| first(key) == "b0").count();
    let part = to_b0 as f64 / f64::from(keys);
    assert!((part - now[0]).abs() < 0.02, "{part} {now:?}");
}

#[tokio::test]
async fn backends_of_a_static_pool_come_and_go() {
    let (_servers, ringway) = three().await;
    let new = named("b3").await;
    let before = ringway.mapping();
    let mut old = connect_to(&ringway, "b0").await;
    let backend = Listed::parse(&new.address.to_string(), Some("b3".to_owned()), Membership::weighing(1)).unwrap();
    let report = ringway.send(Command::Add { pool: "echo".to_owned(), backend: backend.clone() }).await.unwrap();
    assert_eq!(report.changes.len(), 1, "{report:?}");
    eventually("the new backend is healthy", || ringway.states() == [State::Healthy; 4]).await;
    let with = ringway.mapping();
    let moved = with.iter().filter(|&(key, owner)| before[key] != *owner).count() as f64 / with.len() as f64;
    assert!(with.iter().all(|(key, owner)| before[key] == *owner || owner == "b3"), "keys moved to others");
    assert!((report.moved[0].share - moved).abs() < 0.03, "predicted {:?}, moved {moved}", report.moved);
    connect_to(&ringway, "b3").await;

    let again = ringway.send(Command::Add { pool: "echo".to_owned(), backend }).await.unwrap_err();
    assert!(matches!(again, CommandError::BackendExists { .. }), "{again}");
    let remove = |id: &str| Command::Remove { pool: "echo".to_owned(), backend: id.to_owned() };
    ringway.send(remove("b0")).await.unwrap();
    eventually("b0 leaves", || ringway.backend(0).drain.is_some_and(|drain| drain.leaves)).await;
    assert!(echoes(&mut old).await, "the connection of the removed backend continues");
    for _ in 0..40 {
        assert_ne!(connect(&ringway).await.1, "b0");
    }
    let status: serde_json::Value =
        serde_json::from_slice(http(ringway.api(), "GET", "/api/status", b"").await.body()).unwrap();
    let differs: Vec<_> = status["pools"][0]["differs"].as_array().unwrap().iter().map(|one| &one["what"]).collect();
    assert_eq!(differs, ["added", "removed"]);
    drop(old);
    eventually("b0 is gone", || ringway.states().len() == 3).await;
    ringway.send(remove("b3")).await.unwrap();
    ringway.send(remove("b1")).await.unwrap();
    ringway.send(remove("b2")).await.unwrap();
    eventually("all are gone", || ringway.states().is_empty()).await;
}

#[tokio::test]
async fn a_weight_moves_keys_as_predicted() {
    let (_servers, ringway) = three().await;
    let before = ringway.mapping();
    let command = Command::Weight { pool: "echo".to_owned(), backend: "b0".to_owned(), weight: 4 };
    let report = ringway.send(command).await.unwrap();
    eventually("the new weight", || ringway.backend(0).membership.weight == 4).await;
    let after = ringway.mapping();
    let moved = after.iter().filter(|&(key, owner)| before[key] != *owner).count() as f64 / after.len() as f64;
    assert!((report.moved[0].share - moved).abs() < 0.03, "predicted {:?}, moved {moved}", report.moved);
    assert!(after.iter().all(|(key, owner)| before[key] == *owner || owner == "b0"));
    assert!(moved > 0.2, "{moved}");
}

#[tokio::test]
async fn scaling_adds_slots_and_drains_the_highest_before_they_stop() {
    let yaml = config(THREE_REPLICAS, "", "health_check: { kind: http, path: /heartbeat, interval: 100ms }\ndrain: 1m");
    let ringway = Ringway::start(&yaml).await.all_healthy().await;
    let before = ringway.mapping();
    let scale = |replicas| Command::Scale { pool: "web".to_owned(), replicas };
    let report = ringway.send(scale(5)).await.unwrap();
    assert!((report.moved[0].share - 0.4).abs() < 0.1, "{report:?}");
    eventually("five", || ringway.states() == [State::Healthy; 5]).await;
    let with = ringway.mapping();
    assert!(with.iter().all(|(key, owner)| before[key] == *owner || owner == "echo-4" || owner == "echo-5"));

    let pids: BTreeSet<_> = (0..3).map(|n| format!("{:?}", ringway.backend(n).replica)).collect();
    let mut old = Vec::new();
    eventually_async("a connection to the fifth", async || {
        let mut stream = TcpStream::connect(ringway.web()).await.unwrap();
        assert!(echoes(&mut stream).await);
        old.push(stream);
        ringway.backend(4).live.active.load(Ordering::Relaxed) > 0
    })
    .await;
    ringway.send(scale(3)).await.unwrap();
    eventually("the fourth is gone or drains", || ringway.state().pools[0].table.load().ring().points() == 480).await;
    // A supervisor that does not wait for the drain would stop the two replicas in this time.
    tokio::time::sleep(Duration::from_millis(300)).await;
    for stream in &mut old {
        assert!(echoes(stream).await, "Ringway stopped a replica with open connections");
    }
    assert_eq!(ringway.mapping(), before);
    drop(old);
    eventually("three", || ringway.states() == [State::Healthy; 3]).await;
    assert_eq!(pids, (0..3).map(|n| format!("{:?}", ringway.backend(n).replica)).collect(), "others were restarted");
    assert_eq!(ringway.metric("ringway_pool_runtime_changes", &[]).await, 0.0, "the pool matches the config again");
    ringway.send(scale(4)).await.unwrap();
    eventually("four", || ringway.states() == [State::Healthy; 4]).await;
}

#[tokio::test]
async fn a_replica_is_kept_if_a_second_scale_wants_it_again() {
    let yaml = config(THREE_REPLICAS, "", "health_check: { interval: 100ms }\ndrain: 1m");
    let ringway = Ringway::start(&yaml).await.all_healthy().await;
    let mut old = Vec::new();
    eventually_async("a connection to the third", async || {
        old.push(TcpStream::connect(ringway.web()).await.unwrap());
        ringway.backend(2).live.active.load(Ordering::Relaxed) > 0
    })
    .await;
    let replica = ringway.backend(2).replica;
    let scale = |replicas| Command::Scale { pool: "echo".to_owned(), replicas };
    ringway.send(scale(2)).await.unwrap();
    eventually("it drains", || ringway.states()[2] == State::Draining).await;
    ringway.send(scale(3)).await.unwrap();
    eventually("it is back", || ringway.states() == [State::Healthy; 3]).await;
    assert_eq!(ringway.backend(2).replica, replica);
    for stream in &mut old {
        assert!(echoes(stream).await);
    }
}

/// Method, path, additional or replaced headers, and body of a request; status and error code of the answer.
type Case<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)], &'a [u8], u16, &'a str);

#[tokio::test]
async fn every_error_is_json_and_changes_nothing() {
    let (_servers, ringway) = three().await;
    let generation = ringway.state().pools[0].table.load().generation();
    let own = ringway.api().to_string();
    let large = vec![b'x'; (1 << 20) + 1];
    let b0 = "/api/pools/echo/backends/b0";
    let cases: &[Case<'_>] = &[
        ("POST", &format!("{b0}/weight"), &[], b"{}", 400, "invalid"),
        ("POST", &format!("{b0}/weight"), &[], b"not json", 400, "invalid"),
        ("POST", &format!("{b0}/weight"), &[], b"{\"weight\": 1001}", 400, "invalid"),
        ("POST", &format!("{b0}/weight"), &[], b"{\"weight\": -1}", 400, "invalid"),
        ("POST", &format!("{b0}/weight"), &[], b"{\"weight\": 2, \"x\": 1}", 400, "invalid"),
        ("POST", &format!("{b0}/drain"), &[], b"{\"within_seconds\": -1}", 400, "invalid"),
        ("POST", "/api/pools/echo/backends", &[], b"{\"address\": \"nowhere\"}", 400, "invalid"),
        ("POST", "/api/pools/echo/scale", &[], b"{\"replicas\": 0}", 400, "invalid"),
        ("POST", "/api/reload?colour=red", &[], b"", 400, "invalid"),
        ("POST", "/api/reload", &[], b"pools: []", 400, "invalid"),
        ("POST", "/api/reload?dry_run=true", &[], b"pools: []", 400, "invalid"),
        ("POST", &format!("{b0}/drain"), &[("origin", "http://evil.example")], b"", 403, "cross_site"),
        ("POST", "/api/pools/nope/backends/b0/drain", &[], b"", 404, "not_found"),
        ("POST", "/api/pools/echo/backends/nope/drain", &[], b"", 404, "not_found"),
        ("DELETE", "/api/pools/echo/backends/nope", &[], b"", 404, "not_found"),
        ("GET", &format!("{b0}/drain"), &[], b"", 405, "method_not_allowed"),
        ("GET", "/api/reload", &[], b"", 405, "method_not_allowed"),
        ("POST", "/api/pools/echo/scale", &[], b"{\"replicas\": 2}", 409, "conflict"),
        ("POST", "/api/pools/echo/backends", &[], b"{\"address\": \"127.0.0.1:1\", \"id\": \"b0\"}", 409, "conflict"),
        ("POST", &format!("{b0}/weight"), &[], &large, 413, "body_too_large"),
        ("POST", "/api/reload?dry_run=true", &[], &large, 413, "body_too_large"),
        ("POST", &format!("{b0}/drain"), &[("host", "evil.example")], b"", 421, "foreign_host"),
    ];
    for (method, path, headers, body, status, code) in cases {
        let mut all = vec![("host", own.as_str())];
        all.retain(|(name, _)| !headers.iter().any(|(other, _)| other == name));
        all.extend(*headers);
        let answer = http_with(ringway.api(), method, path, &all, body).await;
        let json: serde_json::Value = serde_json::from_slice(answer.body()).unwrap();
        assert_eq!(answer.status(), *status, "{method} {path}: {json}");
        assert_eq!(json["error"]["code"], *code, "{method} {path}: {json}");
        assert!(json["error"]["message"].as_str().is_some_and(|message| message.len() > 10), "{json}");
    }
    assert_eq!(ringway.state().pools[0].table.load().generation(), generation);
    assert_eq!(ringway.metric("ringway_pool_runtime_changes", &[]).await, 0.0);
    assert_eq!(ringway.states(), [State::Healthy; 3]);
}

#[tokio::test]
async fn commands_to_a_public_side_port_need_the_token() {
    let server = named("b0").await;
    let other = named("b1").await;
    let yaml = static_config(&[server.address, other.address], "health_check: { kind: none }");
    let yaml = yaml.replace("api: { listen: \"127.0.0.1:0\" }", "api: { listen: \"0.0.0.0:0\" }");
    let path = "/api/pools/echo/backends/b0/drain";
    let call = async |program: &Program, token: Option<&str>| {
        let mut address = program.api();
        address.set_ip([127, 0, 0, 1].into());
        let (host, bearer) = (address.to_string(), token.map(|token| format!("Bearer {token}")).unwrap_or_default());
        let mut headers = vec![("host", host.as_str())];
        headers.extend(token.map(|_| ("authorization", bearer.as_str())));
        http_with(address, "POST", path, &headers, b"").await.status().as_u16()
    };
    let open = Program::start(&yaml).await;
    assert!(open.log().contains("the side port is read-only"), "{}", open.log());
    assert_eq!(call(&open, None).await, 403);
    assert_eq!(call(&open, Some("anything")).await, 403);
    drop(open);
    let token = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(token.path(), "from-file\n").unwrap();
    let with_file =
        yaml.replace("\"0.0.0.0:0\" }", &format!("\"0.0.0.0:0\", token_file: \"{}\" }}", token.path().display()));
    for (yaml, expected, environment) in
        [(&yaml, "from-env", vec![("RINGWAY_TOKEN", "from-env")]), (&with_file, "from-file", vec![])]
    {
        let program = Program::start_with(yaml, &environment).await;
        assert_eq!(call(&program, None).await, 401);
        assert_eq!(call(&program, Some("wrong")).await, 401);
        assert_eq!(call(&program, Some(expected)).await, 200);
        assert!(!program.log().contains(expected), "the token is in the log");
    }
    let program = Program::start(&with_file).await;
    let mut address = program.api();
    address.set_ip([127, 0, 0, 1].into());
    // The config comes from a pipe, which can be read only once.
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_ringway"))
        .args(["drain", "echo/b0", "--api", &address.to_string(), "--config", "/dev/stdin"])
        .env_remove("RINGWAY_TOKEN")
        .stdin(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    command.stdin.take().unwrap().write_all(with_file.as_bytes()).await.unwrap();
    let output = soon("the report", command.wait_with_output()).await.unwrap();
    assert!(output.status.success(), "{output:?}");
}
