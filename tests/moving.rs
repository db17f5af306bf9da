//! Moving home: after a change of the ring, connections whose keys lead to other backends end, and no others.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::harness::backends::Server;
use crate::harness::program::{Program, run};
use crate::harness::{Ringway, config, echoes, eventually, get, http, metric_in, soon, static_config};
use ringway::backend::Membership;
use ringway::control::command::{Command, CommandError};
use ringway::control::provider::Listed;
use ringway::table::Table;

const OVER: Duration = Duration::from_secs(10);

/// Time between two exchanges of a busy client. In it, there is a second of silence.
const PAUSE: Duration = Duration::from_secs(4);

fn yaml(servers: &[Server], more: &str) -> String {
    let entries: Vec<_> =
        servers.iter().enumerate().map(|(n, one)| format!("{{ address: \"{}\", id: b{n} }}", one.address)).collect();
    config(&format!("static: [{}]", entries.join(", ")), "", &format!("health_check: {{ kind: none }}\n{more}"))
}

async fn servers<const N: usize>() -> Vec<Server> {
    let mut servers = Vec::new();
    for n in 0..N {
        servers.push(Server::echo(&format!("b{n}")).await);
    }
    servers
}

/// The backend to which the key of this client leads.
fn owner(table: &Table, client: SocketAddr) -> Arc<str> {
    let std::net::IpAddr::V4(ip) = client.ip() else { panic!("{client}") };
    let key = [&ip.octets()[..], &client.port().to_be_bytes()].concat();
    Arc::clone(&table.candidates(&key).next().unwrap().0.id)
}

fn table(ringway: &Ringway) -> Arc<Table> {
    ringway.state().pools[0].table.load()
}

async fn connect(ringway: &Ringway) -> (SocketAddr, TcpStream) {
    let mut stream = TcpStream::connect(ringway.web()).await.unwrap();
    assert!(soon("an echo", echoes(&mut stream)).await);
    (stream.local_addr().unwrap(), stream)
}

/// Waits for the end of the connection. A busy one exchanges messages meanwhile, and fails if it ends in the middle of an exchange.
async fn end(mut stream: TcpStream, is_busy: bool) -> Result<(), String> {
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
                    if !echoes(&mut stream).await {
                        return Err(format!("ended at message {message} of an exchange"));
                    }
                    tokio::time::sleep(Duration::from_millis(200)).await;
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
async fn exactly_the_connections_whose_owner_changed_end_at_silent_moments() {
    let servers = servers::<4>().await;
    let more = format!("on_move: {{ close_over: {}s }}", OVER.as_secs());
    let ringway = Ringway::start(&yaml(&servers[..3], &more)).await.ready().await;
    let mut streams = Vec::new();
    for _ in 0..1000 {
        streams.push(connect(&ringway).await);
    }
    let before = table(&ringway);
    ringway.send(add(&servers[3], "b3")).await.unwrap();
    let (began, after) = (Instant::now(), table(&ringway));
    let moved: BTreeSet<_> = streams
        .iter()
        .map(|(client, _)| *client)
        .filter(|&client| owner(&before, client) != owner(&after, client))
        .collect();
    assert!((150..350).contains(&moved.len()), "{}", moved.len());
    let mut clients = JoinSet::new();
    for (n, (client, stream)) in streams.into_iter().enumerate() {
        clients.spawn(async move { (client, n % 2 == 0, end(stream, n % 2 == 0).await) });
    }
    let (mut ended, mut times) = (BTreeSet::new(), Vec::new());
    while ended.len() < moved.len() {
        let (client, is_busy, result) = soon("an end", clients.join_next()).await.unwrap().unwrap();
        assert!(moved.contains(&client), "{client} has stayed at home, and ended: {result:?}");
        assert_eq!(result, Ok(()), "{client}, busy: {is_busy}");
        ended.insert(client);
        times.push(began.elapsed());
    }
    // Ends are spread over the time, and nobody waited for a silent moment to the last.
    let quarter = |n: u32| times.iter().filter(|&&time| time >= OVER * n / 4 && time < OVER * (n + 1) / 4).count();
    println!("ends by quarters of the time: {:?}", (0..5).map(quarter).collect::<Vec<_>>());
    assert!(quarter(0) > 0 && quarter(1) > 0 && quarter(2) > 0);
    // The rest is for a slow machine.
    assert!(times.iter().all(|&time| time < OVER + Duration::from_secs(5)));
    // Nobody else ends.
    let more = tokio::time::timeout(Duration::from_secs(2), clients.join_next()).await;
    assert!(more.is_err(), "{more:?}");
    let metrics = get(ringway.api(), "/metrics").await.1;
    let counted = metric_in(&metrics, "ringway_connections_ended_total", &["reason=\"moved\""]);
    assert_eq!(counted, moved.len() as f64);
    clients.abort_all();
}

/// Drains say by themselves what becomes of their connections, so only the way back matters here.
#[tokio::test]
async fn connections_go_home_when_their_backend_is_back() {
    let servers = servers::<3>().await;
    let ringway = Ringway::start(&yaml(&servers, "on_move: { close_over: 1s }\ndrain: 3s")).await.ready().await;
    let before = table(&ringway);
    let drain = Command::Drain { pool: "echo".to_owned(), backend: "b0".to_owned(), within: None };
    ringway.send(drain).await.unwrap();
    let mut streams = Vec::new();
    for _ in 0..60 {
        streams.push(connect(&ringway).await);
    }
    // The drain alone ends nothing, for longer than the time to move.
    tokio::time::sleep(Duration::from_secs(2)).await;
    for (_, stream) in &mut streams {
        assert!(soon("an echo", echoes(stream)).await);
    }
    ringway.send(Command::Undrain { pool: "echo".to_owned(), backend: "b0".to_owned() }).await.unwrap();
    for (client, mut stream) in streams {
        if *owner(&before, client) == *"b0" {
            let read = soon("the end", stream.read(&mut [0])).await;
            assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
        } else {
            assert!(soon("an echo", echoes(&mut stream)).await);
        }
    }
}

#[tokio::test]
async fn without_on_move_connections_stay_until_an_operator_moves_them() {
    let servers = servers::<4>().await;
    let mut program = Program::start(&yaml(&servers[..3], "")).await.ready().await;
    let api = program.api().to_string();
    let rebalance = |more: &[&str]| {
        let words = [&["rebalance", "web", "--api", &api], more].concat();
        run(&words.iter().map(|word| &**word).collect::<Vec<_>>())
    };
    let mut streams = Vec::new();
    for _ in 0..40 {
        let mut stream = TcpStream::connect(program.web()).await.unwrap();
        assert!(soon("an echo", echoes(&mut stream)).await);
        streams.push(stream);
    }
    let (code, said, _) = rebalance(&["--dry-run"]);
    assert_eq!((code, said.as_str()), (Some(0), "pool echo: the keys of 0 of 40 connections lead to other backends\n"));
    program.write_config(&yaml(&servers, ""));
    assert_eq!(http(program.api(), "POST", "/api/reload", b"").await.status(), 200);
    let (_, said, _) = rebalance(&["--dry-run", "--over", "1s"]);
    let away: usize = said.split_whitespace().nth(5).unwrap().parse().unwrap();
    assert!(away > 0 && said.contains(&format!("{away} of 40 connections")) && said.contains("within 1s"), "{said}");
    // A dry run changes nothing, and neither did the reload.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    for stream in &mut streams {
        assert!(soon("an echo", echoes(stream)).await);
    }
    let (code, said, _) = rebalance(&["--over", "1s"]);
    assert!(code == Some(0) && said.contains(&format!("{away} of 40 connections")), "{said}");
    let mut ended = JoinSet::new();
    for stream in streams {
        ended.spawn(end(stream, false));
    }
    for _ in 0..away {
        soon("an end", ended.join_next()).await.unwrap().unwrap().unwrap();
    }
    assert!(tokio::time::timeout(Duration::from_secs(2), ended.join_next()).await.is_err());
    let (_, said, _) = rebalance(&[]);
    let left = 40 - away;
    assert_eq!(said, format!("pool echo: the keys of 0 of {left} connections lead to other backends\n"));
    // The default time, and that of an upgraded process.
    program.write_config(&yaml(&servers[..3], ""));
    program.upgrade().await;
    let (code, said, _) = rebalance(&[]);
    assert_eq!((code, said.as_str()), (Some(0), "pool echo: the keys of 0 of 0 connections lead to other backends\n"));
    ended.abort_all();
}

#[tokio::test]
async fn a_displaced_connection_goes_home_only_if_there_is_room() {
    let servers = servers::<3>().await;
    let ringway = Ringway::start(&yaml(&servers, "key: source_ip\nring: { bound: 101 }")).await.ready().await;
    let mut streams = Vec::new();
    for _ in 0..30 {
        streams.push(connect(&ringway).await);
    }
    // All keys lead to one backend, which is at its bound: nobody can go home.
    let found = ringway.state().pools.len();
    assert_eq!(found, 1);
    let rebalance = Command::Rebalance { pool: "echo".to_owned(), over: Some(Duration::from_secs(1)) };
    let report = ringway.send(rebalance.clone()).await.unwrap();
    assert_eq!(report.changes, ["pool echo: the keys of 0 of 30 connections lead to other backends"]);
    ringway.reload(&yaml(&servers, "key: source_ip")).await.unwrap();
    // These connections keep the settings they began with.
    let report = ringway.send(rebalance).await.unwrap();
    assert_eq!(report.changes, ["pool echo: the keys of 0 of 30 connections lead to other backends"]);
    drop(streams);
}

#[tokio::test]
async fn pools_without_keys_cannot_be_rebalanced() {
    let server = Server::echo("a").await;
    let yaml = static_config(&[server.address], "health_check: { kind: none }\nbalance: least_connections");
    let ringway = Ringway::start(&yaml).await.ready().await;
    let rebalance = |pool: &str| Command::Rebalance { pool: pool.to_owned(), over: None };
    assert_eq!(ringway.send(rebalance("web")).await, Err(CommandError::NothingToMove("echo".to_owned())));
    assert!(matches!(ringway.send(rebalance("other")).await, Err(CommandError::UnknownPool { .. })));
    let answer = http(ringway.api(), "POST", "/api/pools/echo/rebalance", b"{\"over_seconds\": -1}").await;
    assert_eq!(answer.status(), 400);
    let stream = connect(&ringway).await;
    eventually("it is open", || ringway.state().listeners[0].stats.active() == 1).await;
    drop(stream);
}
