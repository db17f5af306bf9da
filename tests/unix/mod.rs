//! Unix sockets: backends and listeners at a path. [`replicas`] has the replicas that listen on one.

mod replicas;

use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::task::JoinHandle;

use crate::harness::backends::Server;
use crate::harness::program::Program;
use crate::harness::{Ringway, config, echoes, eventually, eventually_async, get, http, soon, static_config};
use ringway::backend::State;
use ringway::proxy::stats::{EndReason, RefusalReason};

/// The demo backend on a Unix socket. It stops when it is dropped.
struct UnixServer(JoinHandle<()>);

impl UnixServer {
    fn start(path: &Path, name: &str) -> Self {
        use clap::Parser as _;

        // The previous server did not remove its file, like a killed server.
        let _ = std::fs::remove_file(path);
        let options = echo_server::Options::parse_from(["echo-server", "--name", name, "--grace-ms", "0"]);
        let listener = UnixListener::bind(path).unwrap();
        Self(tokio::spawn(echo_server::run(listener, options, std::future::pending())))
    }
}

impl Drop for UnixServer {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A config whose static backends are at these paths.
fn to_paths(paths: &[&Path], listener: &str, pool: &str) -> String {
    let members =
        paths.iter().enumerate().map(|(n, path)| format!("{{ address: \"unix:{}\", id: b{n} }}", path.display()));
    config(&format!("static: [{}]", members.collect::<Vec<_>>().join(", ")), listener, pool)
}

/// Moves the listener of a config to a path.
fn on_path(yaml: &str, path: &Path, lines: &str) -> String {
    yaml.replace("    listen: 127.0.0.1:0", &format!("    listen: unix:{}\n    {lines}", path.display()))
}

async fn echoes_unix(stream: &mut UnixStream) -> bool {
    let mut back = [0; 4];
    stream.write_all(b"ping").await.is_ok() && stream.read_exact(&mut back).await.is_ok() && &back == b"ping"
}

async fn connects(path: &Path) -> bool {
    match UnixStream::connect(path).await {
        Ok(mut stream) => echoes_unix(&mut stream).await,
        Err(_) => false,
    }
}

fn paths(folder: &TempDir) -> (PathBuf, PathBuf) {
    (folder.path().join("web"), folder.path().join("server"))
}

#[tokio::test]
async fn every_kind_of_check_works_on_a_unix_socket() {
    let folder = tempfile::tempdir().unwrap();
    let (_, path) = paths(&folder);
    for check in ["kind: tcp", "kind: http, path: /heartbeat", "kind: expect, send: PING, expect: PING"] {
        let server = UnixServer::start(&path, "a");
        let yaml = to_paths(&[&path], "", &format!("health_check: {{ {check}, interval: 50ms, timeout: 5s }}"));
        let ringway = Ringway::start(&yaml).await.all_healthy().await;
        let mut client = TcpStream::connect(ringway.web()).await.unwrap();
        assert!(soon("an echo", echoes(&mut client)).await, "{check}");
        let answer = http(ringway.api(), "POST", "/api/request", b"x").await;
        assert_eq!((answer.status().as_u16(), &answer.headers()["x-ringway-backend"]), (200, &"b0".parse().unwrap()));
        drop(server);
        eventually(check, || ringway.states() == [State::Unhealthy]).await;
        let _server = UnixServer::start(&path, "a");
        eventually(check, || ringway.states() == [State::Healthy]).await;
        let status: serde_json::Value = serde_json::from_str(&get(ringway.api(), "/api/status").await.1).unwrap();
        assert_eq!(status["pools"][0]["backends"][0]["address"], format!("unix:{}", path.display()));
    }
}

#[tokio::test]
async fn ringway_tries_the_next_backend_if_a_socket_is_missing_or_stale() {
    let folder = tempfile::tempdir().unwrap();
    let (missing, dead, alive) = (folder.path().join("m"), folder.path().join("d"), folder.path().join("a"));
    drop(UnixListener::bind(&dead).unwrap());
    let _server = UnixServer::start(&alive, "a");
    let yaml = to_paths(&[&missing, &dead, &alive], "", "health_check: { kind: none }");
    let ringway = Ringway::start(&yaml).await;
    for _ in 0..20 {
        let mut client = TcpStream::connect(ringway.web()).await.unwrap();
        assert!(soon("an echo", echoes(&mut client)).await);
    }
    for backend in ["backend=\"b0\"", "backend=\"b1\""] {
        let refused = ringway.metric("ringway_connect_failures_total", &[backend, "cause=\"refused\""]).await;
        assert!(refused > 0.0, "{backend}");
    }
}

/// The kernel gives no signal when the queue has room again.
#[tokio::test]
async fn ringway_waits_for_room_in_the_queue_of_a_backend_until_the_timeout() {
    let folder = tempfile::tempdir().unwrap();
    let (_, path) = paths(&folder);
    let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    socket.bind(&socket2::SockAddr::unix(&path).unwrap()).unwrap();
    socket.listen(1).unwrap();
    let crowd: Vec<_> = (0..2).map(|_| std::os::unix::net::UnixStream::connect(&path).unwrap()).collect();
    let yaml = to_paths(&[&path], "", "health_check: { kind: none }\nconnect: { timeout: 300ms, attempts: 1 }");
    let ringway = Ringway::start(&yaml).await;
    let mut client = TcpStream::connect(ringway.web()).await.unwrap();
    let refused = async || ringway.metric("ringway_connect_failures_total", &["cause=\"timeout\""]).await == 1.0;
    eventually_async("the timeout", refused).await;
    assert_eq!(client.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);

    let patient = yaml.replace("300ms", "1m");
    assert!(ringway.reload(&patient).await.is_ok());
    let mut client = TcpStream::connect(ringway.web()).await.unwrap();
    let live = || ringway.backend(0).live.counters.attempts.load(std::sync::atomic::Ordering::Relaxed);
    eventually("the attempt", || live() == 2).await;
    // The server makes room: it accepts the waiting connections, then Ringway's.
    socket.set_nonblocking(true).unwrap();
    let mut accepted = Vec::new();
    eventually("all are accepted", || {
        accepted.extend(socket.accept());
        accepted.len() == 3
    })
    .await;
    accepted[2].0.set_nonblocking(false).unwrap();
    client.write_all(b"x").await.unwrap();
    let mut byte = [std::mem::MaybeUninit::uninit(); 1];
    assert_eq!(accepted[2].0.recv(&mut byte).unwrap(), 1);
    drop(crowd);
}

#[tokio::test]
async fn a_listener_at_a_path_has_its_mode_and_removes_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let (web, _) = paths(&folder);
    let server = Server::echo("a").await;
    let yaml = static_config(&[server.address], "health_check: { kind: none }");
    let ringway = Ringway::start(&on_path(&yaml, &web, "backlog: 100")).await;
    let mode = || web.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(), 0o600, "only the owner by default");
    let mut kept = UnixStream::connect(&web).await.unwrap();
    assert!(soon("an echo", echoes_unix(&mut kept)).await);
    ringway.reload(&on_path(&yaml, &web, "mode: \"0666\"")).await.unwrap();
    assert_eq!(mode(), 0o666);
    assert!(soon("an echo", connects(&web)).await);
    let status: serde_json::Value = serde_json::from_str(&get(ringway.api(), "/api/status").await.1).unwrap();
    assert_eq!(status["listeners"][0]["address"], format!("unix:{}", web.display()));

    // A reload that fails leaves no file behind, and one that moves the listener removes it.
    let other = folder.path().join("other");
    let bad = on_path(&yaml, &other, "")
        + "\n  - { name: bad, provider: { process: { replicas: 1, command: [/no/such, \"{port}\"] } } }";
    assert!(ringway.reload(&bad).await.is_err());
    assert!(!other.exists() && web.exists());
    ringway.reload(&on_path(&yaml, &other, "")).await.unwrap();
    assert!(other.exists() && !web.exists());
    assert!(soon("an echo", connects(&other)).await);
    assert!(soon("an echo of the old connection", echoes_unix(&mut kept)).await);
    drop(ringway);
    assert!(!other.exists());
}

#[tokio::test]
async fn ringway_replaces_a_stale_socket_but_not_one_in_use() {
    let folder = tempfile::tempdir().unwrap();
    let (web, _) = paths(&folder);
    let server = Server::echo("a").await;
    let yaml = on_path(&static_config(&[server.address], "health_check: { kind: none }"), &web, "");
    let mut first = Program::start(&yaml).await;
    let Err(error) = Ringway::try_start(&yaml).await else { panic!("two listen at one path") };
    assert!(error.contains("already listens there"), "{error}");
    assert!(soon("an echo", connects(&web)).await, "the second one took the path");
    first.signal(Signal::KILL);
    first.ended().await;
    assert!(web.exists());
    let second = Ringway::start(&yaml).await;
    assert!(soon("an echo", connects(&web)).await);
    drop(second);
    std::fs::write(&web, "a file of the user").unwrap();
    assert!(Ringway::try_start(&yaml).await.is_err());
    assert_eq!(std::fs::read_to_string(&web).unwrap(), "a file of the user");
}

#[tokio::test]
async fn a_listener_whose_file_was_deleted_gets_a_new_one_by_reload() {
    let folder = tempfile::tempdir().unwrap();
    let (web, _) = paths(&folder);
    let server = Server::echo("a").await;
    let yaml = on_path(&static_config(&[server.address], "health_check: { kind: none }"), &web, "backlog: 100");
    let ringway = Ringway::start(&yaml).await;
    let mut kept = UnixStream::connect(&web).await.unwrap();
    std::fs::remove_file(&web).unwrap();
    ringway.reload(&yaml).await.unwrap();
    assert!(soon("an echo", connects(&web)).await);
    assert!(soon("an echo of the old connection", echoes_unix(&mut kept)).await);
    // A file of somebody else is not touched.
    std::fs::remove_file(&web).unwrap();
    std::fs::write(&web, "a file of the user").unwrap();
    let error = ringway.reload(&yaml.replace("backlog: 100", "mode: \"0666\"")).await.unwrap_err();
    assert!(error.to_string().contains("the file is not a socket"), "{error}");
    drop(ringway);
    assert_eq!(web.metadata().unwrap().permissions().mode() & 0o111, 0);
    assert_eq!(std::fs::read_to_string(&web).unwrap(), "a file of the user");
}

#[tokio::test]
async fn a_failed_upgrade_changes_no_permissions() {
    let folder = tempfile::tempdir().unwrap();
    let (web, _) = paths(&folder);
    let server = Server::echo("a").await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let yaml = on_path(&static_config(&[server.address], "health_check: { kind: none }"), &web, "mode: \"0660\"");
    let program = Program::start(&yaml).await;
    let other = format!("  - {{ name: taken, listen: \"{}\", pool: echo }}\npools:", taken.local_addr().unwrap());
    program.write_config(&yaml.replace("0660", "0666").replace("pools:", &other));
    assert_ne!(http(program.api(), "POST", "/api/upgrade", b"").await.status(), 200);
    assert_eq!(web.metadata().unwrap().permissions().mode() & 0o777, 0o660);
    assert!(soon("an echo", connects(&web)).await);
}

#[tokio::test]
async fn commands_follow_the_rules_of_the_config_for_unix_sockets() {
    let folder = tempfile::tempdir().unwrap();
    let (web, path) = paths(&folder);
    let server = Server::echo("a").await;
    let check = format!("health_check: {{ kind: tcp, port: {} }}", server.address.port());
    let ringway = Ringway::start(&on_path(&static_config(&[server.address], &check), &web, "")).await;
    let add = async |address: &Path| {
        let body = format!("{{\"address\": \"unix:{}\"}}", address.display());
        let answer = http(ringway.api(), "POST", "/api/pools/echo/backends", body.as_bytes()).await;
        (answer.status().as_u16(), String::from_utf8(answer.into_body().to_vec()).unwrap())
    };
    let (status, text) = add(&path).await;
    assert!(status == 409 && text.contains("health_check.port needs backends with a TCP address"), "{status} {text}");
    let unchecked = static_config(&[server.address], "health_check: { kind: none }");
    ringway.reload(&on_path(&unchecked, &web, "")).await.unwrap();
    let (status, text) = add(&web).await;
    assert!(status == 409 && text.contains("leads back to this pool"), "{status} {text}");
    let (status, text) = add(&path).await;
    assert_eq!(status, 200, "{text}");
}

/// The bytes are already in Ringway's socket when the backend breaks.
#[tokio::test]
async fn a_slow_client_gets_the_whole_answer_of_a_backend_that_closes_with_unread_bytes() {
    const ANSWER: usize = 2 << 20;
    let folder = tempfile::tempdir().unwrap();
    let (web, path) = paths(&folder);
    let backend = UnixListener::bind(&path).unwrap();
    // A client on TCP would lose what waits in the kernel when Ringway passes the reset on.
    let yaml = on_path(&to_paths(&[&path], "", "health_check: { kind: none }"), &web, "");
    let ringway = Ringway::start(&format!("relay: {{ splice: false }}\n{yaml}")).await;
    let mut client = UnixStream::connect(&web).await.unwrap();
    client.write_all(b"unread").await.unwrap();
    let (mut server, _) = soon("accept", backend.accept()).await.unwrap();
    soon("the bytes", server.readable()).await.unwrap();
    let answering = tokio::spawn(async move { server.write_all(&vec![7; ANSWER]).await });
    // Read only until the backend has written all and broken. The rest waits in Ringway and in the sockets on both sides of
    // it. Then pause for two inspections.
    let mut answer = vec![0; ANSWER];
    let mut got = 0;
    while !answering.is_finished() && got < ANSWER {
        got += soon("bytes", client.read(&mut answer[got..ANSWER.min(got + (32 << 10))])).await.unwrap();
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    soon("the end of the backend", answering).await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_millis(2500)).await;
    soon("the rest", client.read_exact(&mut answer[got..])).await.unwrap();
    assert!(answer.iter().all(|&byte| byte == 7));
    assert_eq!(soon("the end", client.read(&mut [0])).await.unwrap(), 0);
    eventually("its reason", || ringway.state().listeners[0].stats.ended(EndReason::BackendReset) == 1).await;
}

/// A Unix socket has no reset. `docs/configuration.md` says what a peer sees instead.
#[tokio::test]
async fn an_abnormal_end_is_an_error_or_an_end_of_stream() {
    let folder = tempfile::tempdir().unwrap();
    let (web, path) = paths(&folder);
    let backend = UnixListener::bind(&path).unwrap();
    let yaml = to_paths(&[&path], "", "health_check: { kind: none }");
    let ringway = Ringway::start(&yaml).await;
    let ended = async |reason: EndReason, count: u64| {
        eventually("the end", || ringway.state().listeners[0].stats.ended(reason) == count).await;
    };

    // A backend that closes with unread bytes resets the client.
    let mut client = TcpStream::connect(ringway.web()).await.unwrap();
    client.write_all(b"unread").await.unwrap();
    let (server, _) = soon("accept", backend.accept()).await.unwrap();
    soon("the bytes", server.readable()).await.unwrap();
    drop(server);
    assert_eq!(soon("a reset", client.read(&mut [0])).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    ended(EndReason::BackendReset, 1).await;

    // After a client's reset, the backend sees the end of the stream.
    let client = TcpStream::connect(ringway.web()).await.unwrap();
    let (mut server, _) = soon("accept", backend.accept()).await.unwrap();
    client.set_zero_linger().unwrap();
    drop(client);
    assert_eq!(soon("the end", server.read(&mut [0])).await.unwrap(), 0);
    ended(EndReason::ClientReset, 1).await;
    drop((server, backend));

    // A client that is refused sees an error if it has sent something, and otherwise the end of the stream.
    std::fs::remove_file(&path).unwrap();
    ringway.reload(&on_path(&yaml, &web, "")).await.unwrap();
    let mut silent = UnixStream::connect(&web).await.unwrap();
    assert_eq!(soon("the end", silent.read(&mut [0])).await.unwrap(), 0);
    let stats = std::sync::Arc::clone(&ringway.state().listeners[0].stats);
    eventually("the refusal", || stats.refused(RefusalReason::ConnectFailed) == 1).await;
    let mut speaking = UnixStream::connect(&web).await.unwrap();
    // The write fails if Ringway has closed the connection already.
    if speaking.write_all(b"hello").await.is_ok() {
        let error = soon("an error", speaking.read(&mut [0])).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
}

/// Ringway uses the user id instead of the address, and the connection's number instead of the port.
#[tokio::test]
async fn clients_at_a_path_have_keys_limits_and_log_lines() {
    let folder = tempfile::tempdir().unwrap();
    let (web, _) = paths(&folder);
    let log = folder.path().join("log");
    let servers = [Server::echo("b0").await, Server::echo("b1").await, Server::echo("b2").await];
    let addresses = servers.each_ref().map(|server| server.address);
    let config = |key: &str| {
        let yaml = static_config(&addresses, &format!("health_check: {{ kind: none }}\nkey: {key}"));
        let log = format!("access_log: {{ path: {}, format: json }}\n", log.display());
        log + &on_path(&yaml, &web, "per_source: { max_connections: 40 }")
    };
    let ringway = Ringway::start(&config("source_ip")).await;
    let used = || {
        (0..3)
            .filter(|&n| ringway.backend(n).live.counters.total.load(std::sync::atomic::Ordering::Relaxed) > 0)
            .count()
    };
    for _ in 0..30 {
        assert!(soon("an echo", connects(&web)).await);
    }
    assert_eq!(used(), 1, "the connections of a user went to several backends");
    eventually("none is open", || ringway.state().listeners[0].stats.active() == 0).await;
    ringway.reload(&config("source")).await.unwrap();
    let mut open = Vec::new();
    for _ in 0..50 {
        let mut client = UnixStream::connect(&web).await.unwrap();
        if soon("an echo or the end", echoes_unix(&mut client)).await {
            open.push(client);
        }
    }
    assert_eq!((used(), open.len()), (3, 40));
    drop(open);
    let user = rustix::process::getuid().as_raw();
    let line = format!("\"client\":\"unix:user={user},pid={}\"", std::process::id());
    eventually("log lines", || std::fs::read_to_string(&log).is_ok_and(|text| text.matches(&line).count() == 80)).await;
}

#[tokio::test]
async fn a_listener_at_a_path_answers_the_status() {
    let folder = tempfile::tempdir().unwrap();
    let (web, _) = paths(&folder);
    let server = Server::echo("a").await;
    let yaml = static_config(&[server.address], "health_check: { kind: none }");
    let _ringway = Ringway::start(&on_path(&yaml, &web, "answer_status: true")).await;
    let mut client = UnixStream::connect(&web).await.unwrap();
    client.write_all(b"GET /api/status HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    soon("the answer", client.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains(&server.address.to_string()), "{answer}");
    assert!(soon("an echo", connects(&web)).await);
}
