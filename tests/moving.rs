//! Rebalancing: after a change of the ring, connections whose keys lead to other backends end, and no others.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::harness::backends::Server;
use crate::harness::program::{Program, run};
use crate::harness::{Ringway, echoes, eventually_async, get, http, metric_in, served_from, soon, static_config};
use ringway::backend::Membership;
use ringway::control::command::{Command, CommandError};
use ringway::control::provider::Listed;
use ringway::table::Table;

const OVER: Duration = Duration::from_secs(20);

/// Time between two exchanges of a busy client. In it, there is a second of silence.
const PAUSE: Duration = Duration::from_secs(4);

fn yaml(servers: &[Server], more: &str) -> String {
    let addresses: Vec<_> = servers.iter().map(|server| server.address).collect();
    static_config(&addresses, &format!("health_check: {{ kind: none }}\nkey: source_ip\n{more}"))
}

/// The address of client `n`.
fn client(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(127, 8, 0, 1)) + n)
}

/// The backend to which the key of this client leads.
fn owner(table: &Table, n: u32) -> Arc<str> {
    Arc::clone(&table.candidates(&client(n).octets()).next().unwrap().0.id)
}

fn table(ringway: &Ringway) -> Arc<Table> {
    ringway.state().pools[0].table.load()
}

/// Connects client `n`.
async fn connect(web: std::net::SocketAddr, n: u32) -> TcpStream {
    served_from(&client(n).to_string(), web).await.unwrap()
}

/// The backends of all clients.
async fn backends(api: std::net::SocketAddr) -> BTreeMap<String, String> {
    let list: serde_json::Value = serde_json::from_str(&get(api, "/api/sessions?limit=1000").await.1).unwrap();
    let of = |session: &serde_json::Value| {
        let client = session["client"].as_str().unwrap().rsplit_once(':').unwrap().0.to_owned();
        (client, session["backend"].as_str().unwrap_or_default().to_owned())
    };
    list["sessions"].as_array().unwrap().iter().map(of).collect()
}

/// Waits for the end of the connection. A busy one exchanges messages meanwhile, and fails if it ends in the middle of an exchange.
async fn end(stream: &mut TcpStream, is_busy: bool) -> Result<(), String> {
    loop {
        let mut byte = [0];
        let ended = tokio::time::timeout(PAUSE, stream.read(&mut byte)).await;
        match ended {
            Ok(Ok(1)) => return Err("a byte that nobody has sent".to_owned()),
            Ok(_) => return Ok(()),
            Err(_elapsed) if !is_busy => {}
            Err(_elapsed) => {
                // An exchange of several messages, with pauses that are too short to be silent moments.
                for message in 0..4 {
                    let last = Instant::now();
                    tokio::time::sleep(Duration::from_millis(if message == 0 { 0 } else { 200 })).await;
                    let gap = last.elapsed();
                    // Ringway cannot know of a first message that crosses the reset. And a stalled test makes silent moments.
                    if !echoes(stream).await {
                        let what = format!("ended at message {message} of an exchange, {gap:?} after the one before");
                        return if message == 0 || gap > Duration::from_millis(900) { Ok(()) } else { Err(what) };
                    }
                }
            }
        }
    }
}

fn add(server: &Server, id: &str) -> Command {
    let backend = Listed::parse(&server.address.to_string(), Some(id.to_owned()), Membership::weighing(1)).unwrap();
    Command::Add { pool: "echo".to_owned(), backend }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exactly_the_connections_whose_owner_changed_move_at_silent_moments() {
    let servers = Server::echoes(4).await;
    let more = format!("on_move: {{ close_over: {}s }}", OVER.as_secs());
    let ringway = Ringway::start(&yaml(&servers[..3], &more)).await.ready().await;
    let mut streams = Vec::new();
    for n in 0..1000 {
        streams.push(connect(ringway.web(), n).await);
    }
    let before = table(&ringway);
    ringway.send(add(&servers[3], "b3")).await.unwrap();
    let (began, after) = (Instant::now(), table(&ringway));
    let moved = (0..1000).filter(|&n| owner(&before, n) != owner(&after, n)).count();
    assert!((150..350).contains(&moved), "{moved}");
    let (web, mut clients) = (ringway.web(), JoinSet::new());
    for (n, mut stream) in (0..).zip(streams) {
        clients.spawn(async move {
            let ended = end(&mut stream, n % 2 == 0).await;
            let time = began.elapsed();
            // Its key leads to the new backend now.
            (n, ended, time, connect(web, n).await)
        });
    }
    let (mut times, mut again) = (Vec::new(), Vec::new());
    while times.len() < moved {
        let (n, ended, time, stream) = soon("an end", clients.join_next()).await.unwrap().unwrap();
        assert!(owner(&before, n) != owner(&after, n), "{n} has stayed at home, and ended: {ended:?}");
        assert_eq!(ended, Ok(()), "{n}");
        times.push(time);
        again.push(stream);
    }
    let quarter = |n: u32| times.iter().filter(|&&time| time >= OVER * n / 4 && time < OVER * (n + 1) / 4).count();
    assert!(quarter(0) > 0 && quarter(1) > 0 && quarter(2) > 0, "{:?}", (0..5).map(quarter).collect::<Vec<_>>());
    // Nobody else ends, and everybody is at home.
    let more = tokio::time::timeout(Duration::from_secs(2), clients.join_next()).await;
    assert!(more.is_err(), "{more:?}");
    let now = backends(ringway.api()).await;
    assert!((0..1000).all(|n| now[&client(n).to_string()] == *owner(&after, n)));
    let metrics = get(ringway.api(), "/metrics").await.1;
    let counted = metric_in(&metrics, "ringway_connections_ended_total", &["reason=\"moved\""]);
    assert_eq!(counted, moved as f64);
    clients.abort_all();
}

/// A drain says by itself what happens to connections, so only the way back matters here.
#[tokio::test]
async fn connections_move_when_their_backend_is_back() {
    let servers = Server::echoes(3).await;
    let ringway = Ringway::start(&yaml(&servers, "on_move: { close_over: 1s }\ndrain: 3s")).await.ready().await;
    let before = table(&ringway);
    // The workers have seen the pool before the drain, which does not last long.
    let mut streams = Vec::new();
    for n in 0..20 {
        streams.push(connect(ringway.web(), n).await);
    }
    tokio::time::sleep(Duration::from_millis(1200)).await;
    streams.clear();
    for n in 100..120 {
        streams.push(connect(ringway.web(), n).await);
    }
    let drain = Command::Drain { pool: "echo".to_owned(), backend: "b0".to_owned(), within: None };
    ringway.send(drain).await.unwrap();
    let first = std::mem::take(&mut streams);
    for n in 0..60 {
        streams.push(connect(ringway.web(), n).await);
    }
    // The drain alone ends nothing, for longer than the time to move.
    tokio::time::sleep(Duration::from_secs(2)).await;
    for stream in &mut streams {
        assert!(soon("an echo", echoes(stream)).await);
    }
    ringway.send(Command::Undrain { pool: "echo".to_owned(), backend: "b0".to_owned() }).await.unwrap();
    let (mut stayed, mut moved) = (Vec::new(), 0);
    for (n, mut stream) in (0..).zip(streams) {
        if *owner(&before, n) == *"b0" {
            soon("the end", end(&mut stream, false)).await.unwrap();
            moved += 1;
        } else {
            stayed.push(stream);
        }
    }
    assert!(moved > 5);
    drop(first);
    for stream in &mut stayed {
        assert!(soon("an echo", echoes(stream)).await);
    }
}

/// Bytes that the client does not take wait in Ringway: that is no silent moment, however long it lasts.
#[tokio::test]
async fn a_connection_with_bytes_that_wait_moves_only_at_the_end_of_the_time() {
    let talking = async || {
        Server::start(async |mut stream: TcpStream| {
            let mut first = [0; 4];
            let _ = stream.read_exact(&mut first).await;
            let _ = stream.write_all(&first).await;
            let _ = stream.write_all(&vec![7; 64 << 20]).await;
            let _ = stream.read(&mut first).await;
        })
        .await
    };
    let servers = [talking().await, talking().await];
    let ringway = Ringway::start(&yaml(&servers[..1], "on_move: { close_over: 8s }")).await.ready().await;
    let mut streams = Vec::new();
    for n in 0..8 {
        streams.push(connect(ringway.web(), n).await);
    }
    ringway.send(add(&servers[1], "b1")).await.unwrap();
    let (began, after) = (Instant::now(), table(&ringway));
    let ended =
        async || metric_in(&get(ringway.api(), "/metrics").await.1, "ringway_connections_ended_total", &["moved"]);
    let away = (0..8).filter(|&n| *owner(&after, n) == *"b1").count();
    assert!(away > 0);
    eventually_async("the ends", async || ended().await == away as f64).await;
    // A silent one would have ended in the first half of the time.
    assert!(began.elapsed() > Duration::from_secs(5), "{:?}", began.elapsed());
}

#[tokio::test]
async fn without_on_move_connections_stay_until_an_operator_moves_them() {
    let servers = Server::echoes(4).await;
    let program = Program::start(&yaml(&servers[..3], "")).await.ready().await;
    let api = program.api().to_string();
    let rebalance = |more: &[&str]| {
        let words = [&["rebalance", "web", "--api", &api], more].concat();
        run(&words.iter().map(|word| &**word).collect::<Vec<_>>())
    };
    let mut streams = Vec::new();
    for n in 0..40 {
        streams.push(connect(program.web(), n).await);
    }
    let (code, said, _) = rebalance(&["--dry-run"]);
    assert_eq!((code, said.as_str()), (Some(0), "pool echo: the keys of 0 of 40 connections lead to other backends\n"));
    program.write_config(&yaml(&servers, ""));
    assert_eq!(http(program.api(), "POST", "/api/reload", b"").await.status(), 200);
    let (_, said, _) = rebalance(&["--dry-run"]);
    let away: usize = said.split_whitespace().nth(5).unwrap().parse().unwrap();
    assert!(away > 0 && said.contains(&format!("{away} of 40 connections")) && said.contains("within 5m"), "{said}");
    // A dry run changes nothing, and neither did the reload.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    for stream in &mut streams {
        assert!(soon("an echo", echoes(stream)).await);
    }
    let (code, said, _) = rebalance(&["--over", "1s"]);
    assert!(code == Some(0) && said.contains(&format!("{away} of 40 connections")), "{said}");
    let mut ended = JoinSet::new();
    for mut stream in streams {
        ended.spawn(async move { end(&mut stream, false).await });
    }
    for _ in 0..away {
        soon("an end", ended.join_next()).await.unwrap().unwrap().unwrap();
    }
    assert!(tokio::time::timeout(Duration::from_secs(2), ended.join_next()).await.is_err());
    let (_, said, _) = rebalance(&[]);
    assert_eq!(said, format!("pool echo: the keys of 0 of {} connections lead to other backends\n", 40 - away));
    ended.abort_all();
}

#[tokio::test]
async fn a_displaced_connection_moves_only_if_there_is_room() {
    let servers = Server::echoes(3).await;
    let ringway = Ringway::start(&yaml(&servers, "ring: { bound: 101 }")).await.ready().await;
    let mut streams = Vec::new();
    for _ in 0..30 {
        streams.push(connect(ringway.web(), 0).await);
    }
    let home = owner(&table(&ringway), 0);
    let rebalance = Command::Rebalance { pool: "echo".to_owned(), over: Some(Duration::from_secs(1)) };
    let said = async || ringway.send(rebalance.clone()).await.unwrap().changes.remove(0);
    // All keys lead to one backend, which is at its bound.
    assert_eq!(said().await, "pool echo: the keys of 0 of 30 connections lead to other backends");
    // Now there are two places, and not one for each of the displaced connections.
    let most = ringway.state().pools[0].limits(&table(&ringway)).into_iter().flatten().max().unwrap();
    ringway.reload(&yaml(&servers, &format!("max_connections_per_backend: {}", most + 2))).await.unwrap();
    let said = said().await;
    let active =
        |id: &str| table(&ringway).backends().find(id).unwrap().live.active.load(std::sync::atomic::Ordering::Relaxed);
    let places = most + 2 - active(&home);
    assert!(said.contains(&format!("the keys of {places} of 30 connections")), "{said}");
    eventually_async("they have ended", async || {
        ringway.state().pools[0].table.load().backends().iter().map(|one| active(&one.id)).sum::<u64>() == 30 - places
    })
    .await;
    drop(streams);
}

#[tokio::test]
async fn pools_without_lasting_keys_cannot_be_rebalanced() {
    let server = Server::echo("a").await;
    for (more, why) in [
        ("balance: least_connections", "balance: least_connections has no keys"),
        ("key: source", "key: source gives a client another key when it connects again"),
    ] {
        let yaml = static_config(&[server.address], &format!("health_check: {{ kind: none }}\n{more}"));
        let ringway = Ringway::start(&yaml).await.ready().await;
        let rebalance = |pool: &str| Command::Rebalance { pool: pool.to_owned(), over: None };
        let refused = CommandError::CannotRebalance { pool: "echo".to_owned(), why };
        assert_eq!(ringway.send(rebalance("web")).await, Err(refused));
        assert!(matches!(ringway.send(rebalance("other")).await, Err(CommandError::UnknownPool { .. })));
        let answer = http(ringway.api(), "POST", "/api/pools/echo/rebalance", b"{\"over_seconds\": -1}").await;
        assert_eq!(answer.status(), 400);
    }
}
