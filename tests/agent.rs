//! Agents: programs beside the backends that say how many connections those should get.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::harness::{Ringway, config, echoes, eventually, http, soon};
use ringway::backend::State;
use ringway::control::command::{Command, CommandError};

/// A backend on an address of its own, and its agent. Both end when this is dropped.
struct Server {
    address: SocketAddr,
    says: Arc<Mutex<Option<&'static str>>>,
    asked: Arc<Mutex<String>>,
    tasks: [JoinHandle<()>; 2],
}

impl Server {
    /// The agents of a pool have the same port, so the servers have addresses of their own.
    async fn start(last: u8, agent_port: u16) -> Self {
        let backend = TcpListener::bind(SocketAddr::from(([127, 0, 0, last], 0))).await.unwrap();
        let address = backend.local_addr().unwrap();
        let agent = TcpListener::bind(SocketAddr::from(([127, 0, 0, last], agent_port))).await.unwrap();
        let says = Arc::new(Mutex::new(Some("100% up ready")));
        let asked = Arc::new(Mutex::new(String::new()));
        let (line, question) = (Arc::clone(&says), Arc::clone(&asked));
        let answers = tokio::spawn(async move {
            while let Ok((mut stream, _)) = agent.accept().await {
                let mut buffer = [0; 64];
                let read = stream.read(&mut buffer).await.unwrap_or(0);
                *question.lock().unwrap() = String::from_utf8_lossy(&buffer[..read]).into_owned();
                let line = *line.lock().unwrap();
                if let Some(line) = line {
                    let _ = stream.write_all(format!("{line}\r\n").as_bytes()).await;
                }
            }
        });
        let echoes = tokio::spawn(async move {
            while let Ok((mut stream, _)) = backend.accept().await {
                tokio::spawn(async move {
                    let (mut reader, mut writer) = stream.split();
                    let _ = tokio::io::copy(&mut reader, &mut writer).await;
                });
            }
        });
        Self { address, says, asked, tasks: [answers, echoes] }
    }

    fn says(&self, line: impl Into<Option<&'static str>>) {
        *self.says.lock().unwrap() = line.into();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Two servers, and a pool of them with agents.
async fn pair() -> ([Server; 2], Ringway) {
    // A port that is free on both addresses.
    let [port] = crate::harness::backends::free_ports();
    let servers = [Server::start(2, port).await, Server::start(3, port).await];
    let entries: Vec<_> = std::iter::zip(["a", "b"], &servers)
        .map(|(id, server)| format!("{{ address: \"{}\", id: {id} }}", server.address))
        .collect();
    let agent = format!("agent: {{ port: {port}, interval: 500ms, send: \"web/{{backend}}\\n\" }}");
    let yaml = config(
        &format!("static: [{}]", entries.join(", ")),
        "",
        &format!("{agent}\nhealth_check: {{ kind: tcp, interval: 50ms }}\ndrain: 1m"),
    );
    let ringway = Ringway::start(&yaml).await.all_healthy().await;
    (servers, ringway)
}

/// The part of all keys that go to `a`.
fn part(ringway: &Ringway) -> f64 {
    let mapping = ringway.mapping();
    mapping.values().filter(|owner| *owner == "a").count() as f64 / mapping.len() as f64
}

#[tokio::test]
async fn an_agent_moves_only_the_keys_of_its_backend() {
    let ([a, b], ringway) = pair().await;
    let before = ringway.mapping();
    let (usual, ring) = (part(&ringway), ringway.state().pools[0].table.load().ring().digest());
    let part_of = |n: usize| ringway.backend(n).admission.as_part();
    for _ in 0..3 {
        a.says("10%");
        eventually("a tenth", || (part_of(0) - 0.1).abs() < 0.01).await;
        assert!((part(&ringway) - usual / 10.0).abs() < 0.05, "{}", part(&ringway));
        let during = ringway.mapping();
        assert!(before.iter().all(|(key, owner)| owner == "a" || during[key] == *owner), "keys of b moved");
        a.says("100%");
        eventually("all", || part_of(0) >= 1.0).await;
        assert_eq!(ringway.mapping(), before);
    }
    assert_eq!(a.asked.lock().unwrap().as_str(), "web/a\n");

    // Only the difference counts if both say less.
    a.says("20%");
    b.says("40%");
    eventually("both less", || part_of(0) < 0.3 && part_of(1) < 0.5).await;
    let table = ringway.state().pools[0].table.load();
    assert!((table.shares_now()[0] - part(&ringway)).abs() < 0.05, "{:?}", table.shares_now());
    assert!(part(&ringway) < usual - 0.05);
    assert_eq!(ring, table.ring().digest(), "an agent rebuilds no ring");
}

#[tokio::test]
async fn an_agent_drains_stops_and_limits_its_backend() {
    let ([a, _b], ringway) = pair().await;
    let mut open = loop {
        let mut stream = TcpStream::connect(ringway.web()).await.unwrap();
        assert!(echoes(&mut stream).await);
        if ringway.backend(0).live.active.load(Ordering::Relaxed) > 0 {
            break stream;
        }
    };
    a.says("drain");
    eventually("drained", || ringway.states() == [State::Draining, State::Healthy]).await;
    assert_eq!(part(&ringway), 0.0);
    assert!(echoes(&mut open).await, "open connections go on");
    drop(open);
    let undrain = Command::Undrain { pool: "echo".to_owned(), backend: "a".to_owned() };
    let error = ringway.send(undrain).await.unwrap_err();
    assert!(matches!(&error, CommandError::DrainedByAgent { said, .. } if said == "drain"), "{error}");
    a.says("ready down # disk full");
    eventually("down", || ringway.states()[0] == State::Unhealthy).await;
    let status: serde_json::Value =
        serde_json::from_slice(http(ringway.api(), "GET", "/api/status", b"").await.body()).unwrap();
    let shown = &status["pools"][0]["backends"][0];
    assert_eq!(
        (&shown["agent"], &shown["health"]["last"]),
        (&shown["health"]["last"], &"ready down # disk full".into())
    );
    a.says("up maxconn:7");
    eventually("healthy", || ringway.states() == [State::Healthy; 2]).await;
    eventually("limited", || ringway.backend(0).most_connections(u64::MAX) == 7).await;
    // Checks win over `up`.
    let address = a.address;
    a.tasks[1].abort();
    eventually("its check fails", || ringway.states()[0] == State::Unhealthy).await;
    assert!(soon("refused", TcpStream::connect(address)).await.is_err());
}

#[tokio::test]
async fn the_words_of_a_silent_agent_no_longer_count() {
    let ([a, b], ringway) = pair().await;
    a.says("50% drain");
    eventually("drained", || ringway.states()[0] == State::Draining).await;
    // It closes the connection without an answer.
    a.says(None);
    eventually("forgotten", || ringway.states()[0] == State::Healthy).await;
    assert!(ringway.backend(0).advice.is_none() && ringway.backend(0).admission.as_part() >= 1.0);
    a.says("down");
    eventually("down", || ringway.states()[0] == State::Unhealthy).await;
    // A pool without agents asks nobody.
    let yaml = config(
        &format!("static: [{{ address: \"{}\", id: a }}, {{ address: \"{}\", id: b }}]", a.address, b.address),
        "",
        "health_check: { kind: tcp, interval: 50ms }\ndrain: 1m",
    );
    ringway.reload(&yaml).await.unwrap();
    eventually("taken back", || ringway.states() == [State::Healthy; 2]).await;
    a.asked.lock().unwrap().clear();
    // As long as it would have asked three times.
    let checks = || ringway.backend(0).live.counters.checks_passed.load(Ordering::Relaxed);
    let before = checks();
    eventually("thirty checks", || checks() >= before + 30).await;
    assert_eq!(a.asked.lock().unwrap().as_str(), "");
}
