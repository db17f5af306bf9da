//! Unix sockets: backends and listeners at a path, and replicas that listen on one.

use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Signal, kill_process};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::task::JoinHandle;

use crate::harness::backends::Server;
use crate::harness::program::{Program, is_alive};
use crate::harness::{
    Ringway, config, echoes, eventually, eventually_async, get, http, metric_in, soon, static_config,
};
use ringway::backend::State;
use ringway::proxy::stats::{EndReason, RefusalReason};

/// The demo backend on a Unix socket. It stops when it is dropped.
struct UnixServer(JoinHandle<()>);

impl UnixServer {
    fn start(path: &Path, name: &str) -> Self {
        use clap::Parser as _;

        // Like a server that was killed, the one before has not removed its file.
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
async fn a_missing_socket_and_a_dead_one_are_refusals_and_the_next_backend_serves() {
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
    let live = || ringway.backend(0).live.attempts.load(std::sync::atomic::Ordering::Relaxed);
    eventually("the attempt", || live() == 2).await;
    // Room: the server accepts those that wait, and then Ringway.
    let accepted: Vec<_> = (0..3).map(|_| socket.accept().unwrap()).collect();
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
async fn the_file_of_a_killed_ringway_is_replaced_and_that_of_a_living_one_is_not() {
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

/// A Unix socket has no reset. What a client sees instead is in the documentation of the relay.
#[tokio::test]
async fn what_the_other_side_sees_of_an_abnormal_end() {
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

    // A client's reset is the end of the stream for the backend, or an error if bytes of the backend were not read.
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

/// The user stands for the address, and the connection's number for the port.
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
    let used =
        || (0..3).filter(|&n| ringway.backend(n).live.total.load(std::sync::atomic::Ordering::Relaxed) > 0).count();
    for _ in 0..30 {
        assert!(soon("an echo", connects(&web)).await);
    }
    assert_eq!(used(), 1, "the connections of a user went to several backends");
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

/// Three replicas of the demo server on Unix sockets.
const ON_SOCKETS: &str =
    "process: { replicas: 3, command: [ringway, echo-server, --listen, \"unix:{socket}\", --name, \"{slot}\"] }";

const CHECK: &str = "health_check: { kind: http, path: /heartbeat, interval: 200ms }\ndrain: 10s";

/// The folders of sockets below `folder`.
fn folders(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[tokio::test]
async fn replicas_on_sockets_have_private_folders_that_go_with_them() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = [("RUNTIME_DIRECTORY", folder.path().to_str().unwrap())];
    let mut program = Program::start_with(&config(ON_SOCKETS, "", CHECK), &runtime).await.ready().await;
    let healthy = async |program: &Program| {
        eventually_async("all healthy", async || {
            let status = program.status().await;
            status["pools"][0]["backends"].as_array().unwrap().iter().all(|one| one["state"] == "healthy")
        })
        .await;
    };
    healthy(&program).await;
    let before = folders(folder.path());
    assert_eq!(before.len(), 3);
    for folder in &before {
        assert_eq!(folder.metadata().unwrap().permissions().mode() & 0o777, 0o700);
        assert!(folder.join("socket").exists());
    }
    let mut client = TcpStream::connect(program.web()).await.unwrap();
    assert!(soon("an echo", echoes(&mut client)).await);

    let replicas = program.replicas().await;
    kill_process(replicas[1], Signal::KILL).unwrap();
    eventually_async("replaced", async || {
        let now = program.replicas().await;
        now.len() == 3 && now[1] != replicas[1]
    })
    .await;
    healthy(&program).await;
    let after = folders(folder.path());
    assert_eq!(after.len(), 3);
    assert_eq!(after.iter().filter(|folder| before.contains(folder)).count(), 2, "the folder of the dead one stays");

    // They go with a Ringway that is killed, too.
    program.signal(Signal::KILL);
    program.ended().await;
    eventually("no folder", || folders(folder.path()).is_empty()).await;
    let mut program = Program::start_with(&config(ON_SOCKETS, "", CHECK), &runtime).await.ready().await;
    program.signal(Signal::TERM);
    assert_eq!(program.ended().await.code(), Some(0));
    assert!(folders(folder.path()).is_empty());
}

#[tokio::test]
async fn a_folder_that_cannot_be_created_is_a_clear_reason() {
    let yaml = config(ON_SOCKETS, "", "health_check: { kind: none }");
    let program = Program::start_with(&yaml, &[("RUNTIME_DIRECTORY", "/proc/nowhere")]).await;
    eventually_async("the reason", async || {
        let reason = program.status().await["pools"][0]["backends"][0]["last_exit"]["reason"].to_string();
        reason.contains("cannot create a socket in /proc/nowhere") && reason.contains("set RUNTIME_DIRECTORY")
    })
    .await;
}

#[tokio::test]
async fn sockets_of_listeners_and_replicas_survive_an_upgrade() {
    let folder = tempfile::tempdir().unwrap();
    let sockets = tempfile::tempdir().unwrap();
    let (web, _) = paths(&folder);
    let gone = folder.path().join("gone");
    let yaml = config(ON_SOCKETS, "", CHECK);
    let with = |path: &Path| {
        yaml.clone().replace(
            "pools:",
            &format!("  - {{ name: unix, listen: \"unix:{}\", pool: echo }}\npools:", path.display()),
        )
    };
    let both = with(&web)
        .replace("pools:", &format!("  - {{ name: gone, listen: \"unix:{}\", pool: echo }}\npools:", gone.display()));
    let runtime = [("RUNTIME_DIRECTORY", sockets.path().to_str().unwrap())];
    let mut program = Program::start_with(&both, &runtime).await.ready().await;
    let replicas = program.replicas().await;
    let mut open = UnixStream::connect(&web).await.unwrap();
    assert!(soon("an echo", echoes_unix(&mut open)).await);
    assert!(soon("an echo", connects(&gone)).await);
    let before = folders(sockets.path());

    program.write_config(&with(&web));
    let new = program.upgrade().await;
    assert_eq!(program.replicas().await, replicas, "the upgrade restarted a replica");
    eventually("the file of the removed listener goes", || !gone.exists()).await;
    assert!(soon("an echo of the new process", connects(&web)).await);
    assert!(soon("an echo of the old process", echoes_unix(&mut open)).await);
    drop(open);
    assert_eq!(program.ended().await.code(), Some(0));
    assert!(soon("an echo after the old process", connects(&web)).await);
    assert_eq!(folders(sockets.path()).len(), before.len());

    // The new process supervises the replicas, and removes the files at its end.
    kill_process(replicas[0], Signal::KILL).unwrap();
    eventually_async("replaced", async || {
        let now = program.replicas().await;
        now.len() == 3 && now[0] != replicas[0]
    })
    .await;
    let text = get(program.api(), "/metrics").await.1;
    assert_eq!(metric_in(&text, "ringway_replica_restarts_total", &[]), 1.0);
    kill_process(new, Signal::TERM).unwrap();
    eventually("the end of the new process", || !is_alive(new)).await;
    assert!(!web.exists() && folders(sockets.path()).is_empty());
}

/// A pool changes from ports to sockets and back without a failed request.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reload_moves_replicas_from_ports_to_sockets_and_back() {
    let on_ports = config(crate::harness::THREE_REPLICAS, "", CHECK);
    let ringway = Ringway::start(&on_ports).await.all_healthy().await;
    let load = tokio::spawn(loadtest::churn(ringway.web(), 100, Duration::from_secs(4), Duration::from_secs(10)));
    let are_on_sockets = || {
        let table = ringway.state().pools[0].table.load();
        let is_on_socket =
            |backend: &ringway::backend::Backend| backend.address.as_ref().is_some_and(|it| it.ip().is_none());
        let healthy = table.backends().iter().all(|backend| backend.state == State::Healthy);
        let on_sockets = table.backends().iter().filter(|backend| is_on_socket(backend)).count();
        healthy.then_some(on_sockets)
    };
    ringway.reload(&config(ON_SOCKETS, "", CHECK)).await.unwrap();
    eventually("all on sockets", || are_on_sockets() == Some(3)).await;
    ringway.reload(&on_ports).await.unwrap();
    eventually("all on ports", || are_on_sockets() == Some(0)).await;
    let report = soon("the load", load).await.unwrap();
    let failed: Vec<_> = report.outcomes.iter().filter(|outcome| outcome.server.is_err()).collect();
    assert!(failed.is_empty() && report.outcomes.len() > 200, "{failed:?}");
}
