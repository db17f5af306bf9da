//! At the edge of descriptors and memory.

use std::time::Duration;

use rustix::process::{Resource, Rlimit, prlimit};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::backends::Server;
use crate::harness::program::Program;
use crate::harness::{eventually_async, get, metric_in, soon, static_config};

async fn metric(program: &Program, name: &str) -> f64 {
    metric_in(&get(program.api(), "/metrics").await.1, name, &[])
}

async fn echoes(stream: &mut TcpStream) -> bool {
    let mut back = [0; 4];
    stream.write_all(b"ping").await.is_ok() && stream.read_exact(&mut back).await.is_ok() && &back == b"ping"
}

#[tokio::test]
async fn out_of_descriptors_it_neither_spins_nor_drops_and_recovers() {
    let server = Server::echo("a").await;
    let check = "health_check: { interval: 100ms }";
    let program = Program::start(&static_config(&[server.address], check)).await.ready().await;
    let mut established = loadtest::open(program.web(), 50).await.unwrap();
    for stream in &mut established {
        assert!(soon("an echo", echoes(stream)).await);
    }
    // The side port keeps a connection of its own through the shortage.
    let limit = Rlimit { current: Some(256), maximum: Some(256) };
    prlimit(Some(program.pid()), Resource::Nofile, limit).unwrap();
    let crowd = loadtest::open(program.web(), 1000).await.unwrap();
    eventually_async("the shortage", async || {
        tokio::time::sleep(Duration::from_millis(50)).await;
        std::fs::read_dir(format!("/proc/{}/fd", program.pid().as_raw_nonzero())).unwrap().count() >= 255
    })
    .await;

    let before = program.cpu_ticks();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let used = program.cpu_ticks() - before;
    assert!(used < 60, "{used} ticks of 10 ms in 2 s: it spins");
    for stream in &mut established {
        assert!(soon("an echo in the shortage", echoes(stream)).await, "a connection in progress was hurt");
    }

    drop(crowd);
    let mut late = TcpStream::connect(program.web()).await.unwrap();
    assert!(soon("room again", echoes(&mut late)).await);
    assert!(metric(&program, "ringway_accept_errors_total").await > 0.0);
    assert_eq!(
        metric(&program, "ringway_health_checks_total{pool=\"echo\",backend=\"b0\",result=\"failed\"}").await,
        0.0
    );
    assert!(!program.log().contains("unhealthy"), "its own shortage was held against the backend");
    for stream in &mut established {
        assert!(soon("an echo after it", echoes(stream)).await);
    }
}

#[tokio::test]
async fn an_idle_connection_costs_little_memory() {
    const CONNECTIONS: usize = 4000;
    let server = Server::echo("a").await;
    let program = Program::start(&static_config(&[server.address], "health_check: { kind: none }")).await;
    // What the first connections cost once and for all is not theirs.
    drop(loadtest::open(program.web(), 100).await.unwrap());
    eventually_async("none open", async || metric(&program, "ringway_connections_active").await == 0.0).await;
    let before = program.memory();
    let open = loadtest::open(program.web(), CONNECTIONS).await.unwrap();
    eventually_async("all open", async || {
        metric(&program, "ringway_backend_connections_active").await == CONNECTIONS as f64
    })
    .await;
    let each = program.memory().saturating_sub(before) / CONNECTIONS as u64;
    println!("{each} bytes for each of {CONNECTIONS} idle connections");
    assert!(each <= 2000, "{each} bytes");
    drop(open);
}
