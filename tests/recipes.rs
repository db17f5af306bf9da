//! The recipes for checks in docs/operations.md, each against the real server, and the checks `grpc` and `exec`.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tonic_health::ServingStatus;

use crate::harness::backends::free_ports;
use crate::harness::program::{Program, is_alive};
use crate::harness::{Ringway, config, eventually, eventually_async, require_tool, static_config};
use ringway::backend::State;
use ringway::config::Config;

const OPERATIONS: &str = include_str!("../docs/operations.md");

/// The recipes: the comment at the beginning of each, and the YAML.
fn recipes() -> Vec<(&'static str, &'static str)> {
    let section = OPERATIONS.split("\n### Recipes for checks\n").nth(1).unwrap().split("\n### ").next().unwrap();
    let blocks = section.split("```yaml\n").skip(1).map(|block| block.split("\n```").next().unwrap());
    blocks.map(|block| block.strip_prefix("# ").unwrap().split_once('\n').unwrap()).collect()
}

/// The recipe whose comment begins with this name, with quick intervals.
fn recipe(name: &str) -> String {
    let found = recipes().into_iter().find(|(comment, _)| comment.split(':').next() == Some(name));
    let (_, yaml) = found.unwrap_or_else(|| panic!("no recipe for {name}"));
    quick(yaml)
}

fn quick(yaml: &str) -> String {
    let more = "interval: 50ms, timeout: 5s, rise: 1, fall: 1";
    match yaml.trim_end().strip_suffix('}') {
        Some(flow) if !yaml.contains('\n') => format!("{flow}, {more} }}"),
        _ => format!("{yaml}\n  {}", more.replace(", ", "\n  ")),
    }
}

/// A config with these backends and a check. It keeps the indentation of the check.
fn with_check(backends: &[SocketAddr], check: &str, pool: &str) -> String {
    let check: Vec<_> = check.lines().map(|line| format!("    {line}")).collect();
    format!("{}\n{}", static_config(backends, pool), check.join("\n"))
}

/// A server that ends when this is dropped, with all of its processes.
pub(crate) struct Ended(Child);

impl Ended {
    fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.0), Signal::TERM);
        let _ = self.0.wait();
    }
}

/// Waits until the checks of the recipe have passed several times.
async fn passes(name: &str, address: SocketAddr) {
    let ringway = Ringway::start(&with_check(&[address], &recipe(name), "")).await;
    let live = ringway.backend(0).live;
    let last = || ringway.backend(0).health.last.as_deref().unwrap_or("none").to_owned();
    let what = format!("{name}: three checks pass");
    eventually(&what, || {
        println!("{name}: {}", last());
        live.counters.checks_passed.load(Ordering::Relaxed) >= 3
    })
    .await;
    assert_eq!((ringway.states(), last()), (vec![State::Healthy], "ok".to_owned()));
}

/// The reason with which the checks of the recipe fail.
async fn fails(name: &str, address: SocketAddr) -> String {
    let ringway = Ringway::start(&with_check(&[address], &recipe(name), "")).await;
    eventually(name, || ringway.states() == [State::Unhealthy]).await;
    ringway.backend(0).health.last.unwrap().to_string()
}

fn at(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}

fn redis(port: u16, options: &[&str]) -> Ended {
    let port = port.to_string();
    Ended::start(
        Command::new("redis-server").args(["--port", &port, "--save", "", "--bind", "127.0.0.1"]).args(options),
    )
}

#[test]
fn every_recipe_is_a_valid_check_and_has_a_test() {
    let here = include_str!("recipes.rs");
    let names: Vec<_> = recipes().iter().map(|(comment, _)| comment.split(':').next().unwrap()).collect();
    assert!(names.len() >= 9, "{names:?}");
    for name in names {
        let yaml = with_check(&[at(1)], &recipe(name), "");
        Config::parse(&yaml, name).unwrap_or_else(|error| panic!("{error}\n{yaml}"));
        let is_tested = here.contains(&format!("\"{name}\"")) || ["Kafka", "MySQL and MariaDB"].contains(&name);
        assert!(is_tested, "no test for the recipe of {name}");
    }
}

#[tokio::test]
async fn redis_with_and_without_a_password() {
    if !require_tool("redis-server") {
        return;
    }
    let ports = free_ports::<2>();
    let _open = redis(ports[0], &[]);
    let _closed = redis(ports[1], &["--requirepass", "secret"]);
    passes("Redis", at(ports[0])).await;
    passes("Redis with a password", at(ports[1])).await;
    assert!(fails("Redis", at(ports[1])).await.starts_with("unexpected answer \"-NOAUTH"));
    let answer = fails("Redis with a password", at(ports[0])).await;
    assert!(answer.starts_with("step 1: unexpected answer \"-"), "{answer}");
}

#[tokio::test]
async fn the_primary_of_redis_moves_with_a_failover() {
    if !require_tool("redis-server") || !require_tool("redis-cli") {
        return;
    }
    let ports = free_ports::<2>();
    let _servers = [redis(ports[0], &[]), redis(ports[1], &["--replicaof", "127.0.0.1", &ports[0].to_string()])];
    let yaml = with_check(
        &ports.map(at),
        &recipe("the primary of Redis, for an exclusive pool"),
        "tiers: { exclusive: true }",
    );
    let ringway = Ringway::start(&yaml).await;
    eventually("the primary", || ringway.states() == [State::Healthy, State::Standby]).await;
    let ask = |port: u16, words: &[&str]| {
        let output = Command::new("redis-cli").args(["-p", &port.to_string()]).args(words).output().unwrap();
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    let web = ringway.web().port();
    assert_eq!(ask(web, &["SET", "key", "value"]), "OK");
    assert_eq!(ask(ports[1], &["REPLICAOF", "NO", "ONE"]), "OK");
    assert_eq!(ask(ports[0], &["REPLICAOF", "127.0.0.1", &ports[1].to_string()]), "OK");
    eventually("the other one", || ringway.states() == [State::Standby, State::Healthy]).await;
    assert_eq!(ask(web, &["SET", "key", "later"]), "OK");
    assert_eq!(ask(ports[1], &["GET", "key"]), "later");
}

#[tokio::test]
async fn ssh() {
    let [port] = free_ports();
    let folder = tempfile::tempdir().unwrap();
    let key = folder.path().join("key");
    if !require_tool("ssh-keygen") {
        return;
    }
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status().unwrap();
    assert!(made.success());
    let _ = std::fs::create_dir_all("/run/sshd");
    let options = [format!("Port={port}"), "ListenAddress=127.0.0.1".to_owned(), "PidFile=none".to_owned()];
    let mut command = Command::new("/usr/sbin/sshd");
    command.args(["-D", "-f", "/dev/null", "-h"]).arg(&key).args(options.iter().flat_map(|option| ["-o", option]));
    let _server = Ended::start(&mut command);
    passes("SSH", at(port)).await;
}

#[tokio::test]
async fn mqtt() {
    if !require_tool("mosquitto") {
        return;
    }
    let [port] = free_ports();
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("mosquitto.conf");
    std::fs::write(&config, format!("listener {port} 127.0.0.1\nallow_anonymous true\n")).unwrap();
    let _server = Ended::start(Command::new("mosquitto").arg("-c").arg(&config));
    passes("MQTT 3.1.1", at(port)).await;
}

/// The folder with the server's programs. Debian has only some of them in the `PATH`.
pub(crate) fn postgresql() -> Option<String> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").ok()?;
    versions.filter_map(|entry| Some(entry.ok()?.path().join("bin").display().to_string())).max()
}

/// The database server, made with these options of `initdb`. Every user may write to the folder.
pub(crate) fn postgresql_server(programs: &str, folder: &Path, port: u16, options: &[&str]) -> Ended {
    let data = folder.join("data").display().to_string();
    // The server refuses to run as root.
    let as_user = |program: &str| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", &format!("{programs}/{program}")]);
        command.current_dir("/");
        command
    };
    let made = as_user("initdb").args(["-D", &data]).args(options).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let socket = format!("-k{}", folder.display());
    Ended::start(as_user("postgres").args(["-D", &data, "-p", &port.to_string(), "-h127.0.0.1", &socket]))
}

#[tokio::test]
#[ignore = "needs root and PostgreSQL"]
async fn postgresql_with_a_password() {
    let Some(programs) = postgresql() else { return crate::harness::skip("PostgreSQL is not installed") };
    let [port] = free_ports();
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let _server =
        postgresql_server(&programs, folder.path(), port, &["--auth=scram-sha-256", "--pwfile=/etc/hostname"]);
    passes("PostgreSQL", at(port)).await;
}

#[tokio::test]
#[ignore = "needs root and OpenSMTPD"]
async fn smtp() {
    if !require_tool("smtpd") {
        return;
    }
    let [port] = free_ports();
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("smtpd.conf");
    let text = format!("listen on 127.0.0.1 port {port}\naction none relay\nmatch for local action none\n");
    std::fs::write(&config, text).unwrap();
    let _server = Ended::start(Command::new("smtpd").arg("-d").arg("-f").arg(&config));
    passes("SMTP", at(port)).await;
}

#[tokio::test]
async fn a_grpc_server_serves_or_says_why_not() {
    let (reporter, service) = tonic_health::server::health_reporter();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    let server = tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
    reporter.set_service_status("shop.Cart", ServingStatus::Serving).await;
    let check = |more: &str| quick(&format!("health_check: {{ kind: grpc{more} }}"));
    let whole = Ringway::start(&with_check(&[address], &check(""), "")).await;
    let ringway = Ringway::start(&with_check(&[address], &check(", service: shop.Cart"), "")).await;
    let unknown = Ringway::start(&with_check(&[address], &check(", service: other"), "")).await;
    let exclusive =
        Ringway::start(&with_check(&[address], &check(", service: shop.Cart"), "tiers: { exclusive: true }")).await;
    let last = |ringway: &Ringway| ringway.backend(0).health.last.as_deref().unwrap_or("none").to_owned();
    eventually("all serve", || {
        [&whole, &ringway, &exclusive].iter().all(|ringway| ringway.states() == [State::Healthy])
    })
    .await;
    eventually("an unknown service", || last(&unknown) == "gRPC code NOT_FOUND").await;
    reporter.set_service_status("shop.Cart", ServingStatus::NotServing).await;
    eventually("does not serve", || ringway.states() == [State::Unhealthy]).await;
    assert_eq!((last(&ringway), whole.states()), ("NOT_SERVING".to_owned(), vec![State::Healthy]));
    eventually("stands by", || exclusive.states() == [State::Standby]).await;
    server.abort();
}

#[tokio::test]
async fn a_server_without_the_health_service_fails_the_grpc_check() {
    // It speaks HTTP/1.1.
    let echo = crate::harness::backends::Server::echo("echo").await;
    let (_, service) = tonic_health::server::health_reporter();
    drop(service);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    let routes = tonic::service::Routes::default();
    let server = tokio::spawn(tonic::transport::Server::builder().add_routes(routes).serve_with_incoming(incoming));
    let check = quick("health_check: { kind: grpc }");
    let ringway = Ringway::start(&with_check(&[address, echo.address], &check, "")).await;
    eventually("both fail", || ringway.states() == [State::Unhealthy; 2]).await;
    let reason = |n: usize| ringway.backend(n).health.last.unwrap().to_string();
    assert_eq!(reason(0), "gRPC code UNIMPLEMENTED");
    assert!(reason(1).starts_with("no gRPC answer: "), "{}", reason(1));
    server.abort();
}

/// A script in a folder of its own.
fn script(text: &str) -> (TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("check");
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = path.display().to_string();
    (folder, path)
}

fn exec(command: &str, interval: &str, more: &str) -> String {
    let provider = "static: [{ address: \"10.0.0.1:80\", id: one }]";
    let check =
        format!("health_check: {{ kind: exec, command: [{command}], interval: {interval}, rise: 1, fall: 1{more} }}");
    config(provider, "", &check)
}

#[tokio::test]
async fn a_program_decides_whether_a_backend_is_healthy() {
    let (folder, path) = script("cat \"$0.text\"; echo \"$RINGWAY_BACKEND $*\" > \"$0.seen\"; exit $(cat \"$0.code\")");
    let set = |text: &str, code: u8| {
        std::fs::write(folder.path().join("check.text"), text).unwrap();
        std::fs::write(folder.path().join("check.code"), code.to_string()).unwrap();
    };
    set("fine", 0);
    let yaml = exec(&format!("{path}, \"{{address}}\", -p, \"{{host}}:{{port}}/{{backend}} $HOME\""), "50ms", "");
    let ringway = Ringway::start(&yaml).await;
    eventually("healthy", || ringway.states() == [State::Healthy]).await;
    let seen = || std::fs::read_to_string(folder.path().join("check.seen")).unwrap_or_default();
    eventually("the arguments", || seen() == "one 10.0.0.1:80 -p 10.0.0.1:80/one $HOME\n").await;
    set("no route\nand more", 2);
    eventually("unhealthy", || ringway.states() == [State::Unhealthy]).await;
    let last = || ringway.backend(0).health.last.unwrap().to_string();
    eventually("the reason", || last() == "exit status: 2: no route").await;
    set("", 0);
    eventually("healthy again", || ringway.states() == [State::Healthy]).await;

    let pair = Ringway::start(&format!("{}\n    tiers: {{ exclusive: true }}", exec(&path, "50ms", ""))).await;
    eventually("the primary", || pair.states() == [State::Healthy]).await;
    set("not the primary", 1);
    eventually("a standby", || pair.states() == [State::Standby]).await;
    set("broken", 3);
    eventually("no standby", || pair.states() == [State::Unhealthy]).await;
}

#[tokio::test]
async fn a_program_that_hangs_or_is_missing_or_says_too_much_is_no_danger() {
    let (folder, path) = script("sleep 1000 & echo $! > \"$0.pid\"; wait");
    let ringway = Ringway::start(&exec(&path, "50ms", ", timeout: 200ms")).await;
    eventually("too late", || ringway.backend(0).health.last.as_deref() == Some("timeout")).await;
    drop(ringway);
    let pid = std::fs::read_to_string(folder.path().join("check.pid")).unwrap();
    eventually("its child has been killed", || !is_alive(Pid::from_raw(pid.trim().parse().unwrap()).unwrap())).await;

    let ringway = Ringway::start(&exec("/nothing/here", "50ms", "")).await;
    let reason = "cannot run /nothing/here: No such file or directory (os error 2)";
    eventually("missing", || ringway.backend(0).health.last.as_deref() == Some(reason)).await;

    // It leaves a process behind that holds its output and goes on writing.
    let (folder, path) = script("yes & echo $! > \"$0.pid\"; head -c 1000000 /dev/zero; exit 0");
    let ringway = Ringway::start(&exec(&path, "1h", "")).await;
    eventually("healthy", || ringway.states() == [State::Healthy]).await;
    let pid = std::fs::read_to_string(folder.path().join("check.pid")).unwrap();
    // Nobody reads what it writes any more.
    eventually("it has ended", || !is_alive(Pid::from_raw(pid.trim().parse().unwrap()).unwrap())).await;
}

#[tokio::test]
async fn at_most_32_programs_run_at_the_same_time() {
    let (folder, path) =
        script("touch \"$0.run.$$\"; ls \"$0\".run.* | wc -l >> \"$0.counts\"; sleep 0.1; rm \"$0.run.$$\"");
    let entries: Vec<_> = (1..=100).map(|n| format!("{{ address: \"10.0.0.{n}:80\" }}")).collect();
    let check = format!("health_check: {{ kind: exec, command: [{path}], interval: 1h, timeout: 30s }}");
    let ringway = Ringway::start(&config(&format!("static: [{}]", entries.join(", ")), "", &check)).await;
    eventually("all are healthy", || ringway.states() == [State::Healthy; 100]).await;
    let counts = std::fs::read_to_string(folder.path().join("check.counts")).unwrap();
    let counts: Vec<u32> = counts.lines().map(|line| line.trim().parse().unwrap()).collect();
    assert_eq!(counts.len(), 100);
    let most = counts.into_iter().max().unwrap();
    assert!((2..=32).contains(&most), "{most}");
}

#[tokio::test]
async fn a_program_does_not_get_the_secrets_of_ringway() {
    let (_folder, path) = script("test -z \"$RINGWAY_TOKEN$NOTIFY_SOCKET\" && test \"$OF_THE_USER\" = x");
    let check = format!("health_check: {{ kind: exec, command: [{path}], interval: 100ms, rise: 1, fall: 1 }}");
    let yaml = config("static: [{ address: \"127.0.0.1:1\" }]", "", &check);
    let environment = [("RINGWAY_TOKEN", "a-token-of-the-side-port"), ("OF_THE_USER", "x")];
    let program = Program::start_with(&yaml, &environment).await;
    eventually_async("a result", async || {
        let status = program.status().await;
        let backend = &status["pools"][0]["backends"][0];
        assert_ne!(backend["state"], "unhealthy", "{backend:#}");
        backend["state"] == "healthy"
    })
    .await;
}
