//! Nothing that others do stops the control plane: readers of logs, replicas, scrapers, clients of the side port.

use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::{Signal, kill_process};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use crate::harness::backends::Server;
use crate::harness::program::Program;
use crate::harness::{THREE_REPLICAS, config, eventually, eventually_async, get, http, metric_in, soon, static_config};

/// Replicas that write without end, and try to move the cursor of a terminal.
const FLOOD: &str = "process: { replicas: 4, command: [sh, -c, 'printf \"\\033[2J\\r\"; exec yes \"{slot} {port}\"'] }";

async fn metric(program: &Program, name: &str) -> f64 {
    metric_in(&get(program.api(), "/metrics").await.1, name, &[])
}

async fn is_replaced(program: &Program) {
    let replicas = program.replicas().await;
    kill_process(replicas[0], Signal::KILL).unwrap();
    eventually_async("a replacement", async || {
        let now = program.replicas().await;
        now.len() == replicas.len() && !now.contains(&replicas[0])
    })
    .await;
}

#[tokio::test]
async fn a_log_that_nobody_reads_stops_nothing() {
    let mut program = Program::start(&config(FLOOD, "", "health_check: { kind: none }")).await.ready().await;
    program.stall_log(true);
    eventually_async("lost lines", async || metric(&program, "ringway_log_lost_lines_total").await > 0.0).await;
    for _ in 0..60 {
        assert_eq!(soon("a reload", http(program.api(), "POST", "/api/reload", b"")).await.status(), 200);
        assert_eq!(soon("health", get(program.api(), "/healthz")).await.0, 200);
    }
    is_replaced(&program).await;
    program.stall_log(false);
    eventually("a line about the lost ones", || program.log().contains("log lines were lost")).await;
    program.stall_log(true);
    eventually_async("lost lines", async || metric(&program, "ringway_log_lost_lines_total").await > 0.0).await;
    program.signal(Signal::TERM);
    assert!(program.ended().await.success());
}

/// Makes connections until the access log has lost lines.
async fn lose_lines(program: &Program) {
    eventually_async("lost lines", async || {
        for _ in 0..200 {
            assert!(TcpStream::connect(program.web()).await.is_ok());
        }
        metric(program, "ringway_access_log_lost_lines_total").await > 0.0
    })
    .await;
}

fn access_log(path: &str) -> String {
    let listener = "answer_status: false";
    format!("access_log: {{ path: {path:?}, format: json }}\n{}", config(THREE_REPLICAS, listener, "key: source"))
}

#[tokio::test]
async fn an_access_log_that_nobody_reads_stops_no_reload() {
    let (mut reader, pipe) = std::io::pipe().unwrap();
    let mut program =
        Program::start_writing(&access_log("stdout"), Stdio::from(OwnedFd::from(pipe))).await.ready().await;
    lose_lines(&program).await;
    // The same path: the writer is still blocked. Another path: lines go there at once.
    let file = tempfile::NamedTempFile::new().unwrap();
    let other = access_log(&file.path().display().to_string());
    for yaml in [&access_log("stdout"), &other] {
        program.write_config(yaml);
        let answer = soon("a reload", http(program.api(), "POST", "/api/reload", b"")).await;
        assert_eq!(answer.status(), 200, "{}", program.log());
    }
    assert!(TcpStream::connect(program.web()).await.is_ok());
    eventually("a line in the new file", || !std::fs::read_to_string(file.path()).unwrap().is_empty()).await;
    is_replaced(&program).await;
    program.signal(Signal::TERM);
    assert!(program.ended().await.success());
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert!(text.starts_with(r#"{"time":"#));
}

#[tokio::test]
async fn a_fifo_without_a_reader_is_an_access_log() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("log");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    let yaml = access_log(&fifo.display().to_string());
    let mut program = Program::start(&yaml).await.ready().await;
    assert_eq!(soon("a reload", http(program.api(), "POST", "/api/reload", b"")).await.status(), 200);
    assert!(TcpStream::connect(program.web()).await.is_ok());
    // Its lines wait for the reader.
    let mut reader = std::fs::OpenOptions::new().read(true).write(true).open(&fifo).unwrap();
    let mut first = [0; 9];
    reader.read_exact(&mut first).unwrap();
    assert_eq!(&first, br#"{"time":""#);
    program.signal(Signal::TERM);
    assert!(program.ended().await.success());
}

/// As when a config file is written by another program, which has not begun.
#[tokio::test]
async fn a_config_that_never_comes_stops_nothing_but_its_reload() {
    let mut program = Program::start(&config(THREE_REPLICAS, "", "")).await.ready().await;
    program.replace_config_by_fifo();
    let reload = tokio::spawn({
        let api = program.api();
        async move { http(api, "POST", "/api/reload", b"").await.status().as_u16() }
    });
    is_replaced(&program).await;
    program.signal(Signal::TERM);
    assert!(program.ended().await.success());
    // Ringway may also have answered that it stops.
    let _ = reload.await;
}

#[tokio::test]
async fn replicas_that_flood_their_output_delay_nobody() {
    let server = Server::echo("b0").await;
    let other = format!("  - name: other\n    provider: {{ static: [{{ address: \"{}\", id: b0 }}] }}", server.address);
    let check = "health_check: { kind: none }";
    let yaml = format!("{}\n{other}\n    health_check: {{ interval: 50ms }}", config(FLOOD, "", check));
    let program = Program::start(&yaml).await;
    eventually_async("lost lines", async || metric(&program, "ringway_replica_output_lost_lines_total").await > 1e6)
        .await;
    assert_eq!(soon("status", get(program.api(), "/api/status")).await.0, 200);
    let text = get(program.api(), "/metrics").await.1;
    let of_other = ["pool=\"other\""];
    assert_eq!(metric_in(&text, "ringway_backend_up", &of_other), 1.0);
    assert_eq!(metric_in(&text, "ringway_health_checks_total", &["pool=\"other\"", "result=\"failed\""]), 0.0);
    assert!(!program.log().contains(['\x1b', '\r']), "a replica moves the cursor");
    eventually("a line about the flood", || program.log().contains("output of a replica was not logged")).await;
}

#[tokio::test]
async fn scrapers_make_no_backend_unhealthy() {
    let server = Server::echo("b").await;
    let members: Vec<_> = (0..1000).map(|n| format!("{{ address: \"{}\", id: b{n} }}", server.address)).collect();
    let checks = "health_check: { kind: http, path: /heartbeat, interval: 2s, timeout: 2s, fall: 1 }";
    let yaml = config(&format!("static: [{}]", members.join(", ")), "", checks);
    let program = Program::start(&yaml).await;
    eventually_async("all healthy", async || metric(&program, "ringway_pool_backends_healthy").await >= 1000.0).await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut scrapers = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let (api, stop) = (program.api(), Arc::clone(&stop));
        scrapers.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                assert_eq!(get(api, "/metrics").await.0, 200);
            }
        });
    }
    let checked = async || {
        let text = get(program.api(), "/metrics").await.1;
        let by = |result| metric_in(&text, "ringway_health_checks_total", &[result]);
        (by("result=\"ok\""), by("result=\"failed\""), metric_in(&text, "ringway_pool_backends_healthy", &[]))
    };
    let (before, ..) = checked().await;
    eventually_async("three rounds of checks", async || checked().await.0 > before + 3000.0).await;
    stop.store(true, Ordering::Relaxed);
    scrapers.join_all().await;
    let (_, failed, healthy) = checked().await;
    assert_eq!((failed, healthy), (0.0, 1000.0));
}

/// As when a machine sleeps, or has other work.
#[tokio::test]
async fn a_pause_of_ringway_makes_no_backend_unhealthy() {
    let server = Server::echo("b").await;
    let checks = "health_check: { kind: http, path: /heartbeat, interval: 20ms, timeout: 400ms, fall: 1 }";
    let program = Program::start(&static_config(&[server.address], checks)).await.ready().await;
    for _ in 0..5 {
        program.signal(Signal::STOP);
        // Longer than a timeout.
        tokio::time::sleep(Duration::from_millis(600)).await;
        program.signal(Signal::CONT);
        let passed = async || {
            let text = get(program.api(), "/metrics").await.1;
            metric_in(&text, "ringway_health_checks_total", &["result=\"ok\""])
        };
        let before = passed().await;
        eventually_async("further checks", async || passed().await > before + 3.0).await;
    }
    let text = get(program.api(), "/metrics").await.1;
    assert_eq!(metric_in(&text, "ringway_health_checks_total", &["result=\"failed\""]), 0.0);
}

#[tokio::test]
async fn clients_of_the_side_port_starve_neither_clients_nor_checks() {
    let server = Server::echo("b").await;
    let yaml = static_config(&[server.address], "health_check: { interval: 20ms }");
    let program = Program::start_limited(&yaml, 256).await.ready().await;
    let mut held = Vec::new();
    for _ in 0..300 {
        let mut stream = TcpStream::connect(program.api()).await.unwrap();
        let _ = stream.write_all(b"GET /metrics HT").await;
        held.push(stream);
    }
    assert!(metric(&program, "ringway_open_files").await < 150.0);
    assert_eq!(soon("a client", http(program.web(), "GET", "/heartbeat", b"")).await.status(), 200);
    let text = get(program.api(), "/metrics").await.1;
    assert_eq!(metric_in(&text, "ringway_health_checks_total", &["result=\"failed\""]), 0.0);
    assert!(!program.log().contains("could not check"), "{}", program.log());
}
