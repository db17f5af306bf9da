//! Open connections over an upgrade: they go on in the new process, without a lost byte, and the old process ends. [`failures`] has successors
//! that do not take them, and [`real_clients`] clients that work meanwhile.

mod failures;
mod real_clients;

use std::time::Duration;

use loadtest::streams::{Kind, Server as Streaming};
use rustix::process::Pid;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixListener, UnixStream};

use crate::harness::backends::Server;
use crate::harness::program::{Program, is_alive};
use crate::harness::{
    THREE_REPLICAS, config, echoes, eventually, eventually_async, get, metric_in, served_from, soon, static_config,
};

const NO_CHECK: &str = "health_check: { kind: none }";

/// A config whose process takes over open connections.
fn handing_over(yaml: &str) -> String {
    format!("upgrade: {{ connections: hand_over }}\n{yaml}")
}

/// All connections, without what changes with time.
async fn sessions(program: &Program) -> Vec<Value> {
    let list: Value = serde_json::from_str(&get(program.api(), "/api/sessions?limit=1000").await.1).unwrap();
    let mut all = list["sessions"].as_array().unwrap().clone();
    for one in &mut all {
        for key in ["age_seconds", "idle_seconds"] {
            assert!(one.as_object_mut().unwrap().remove(key).is_some(), "{one}");
        }
    }
    all.sort_by_key(|one| one["id"].as_str().unwrap().to_owned());
    all
}

async fn ends(old: Pid) {
    eventually("the end of the old process", || !is_alive(old)).await;
}

/// Upgrades and waits for the end of the old process.
async fn upgrade(program: &mut Program) {
    let old = program.newest();
    program.upgrade().await;
    ends(old).await;
}

#[tokio::test]
async fn open_connections_go_on_in_the_new_process() {
    let yaml =
        config(THREE_REPLICAS, "", "health_check: { kind: http, path: /heartbeat, interval: 200ms }\ndrain: 10m");
    let mut program = Program::start(&handing_over(&yaml)).await.ready().await;
    let mut open = loadtest::open(program.web(), 50).await.unwrap();
    for stream in &mut open {
        assert!(soon("an echo", echoes(stream)).await);
    }
    let before = sessions(&program).await;
    assert_eq!(before.len(), 50);
    upgrade(&mut program).await;
    assert_eq!(sessions(&program).await, before);
    for stream in &mut open {
        assert!(soon("an echo of the new process", echoes(stream)).await);
    }
    let text = get(program.api(), "/metrics").await.1;
    assert_eq!(metric_in(&text, "ringway_connections_taken_over_total", &["web"]), 50.0);
    assert_eq!(metric_in(&text, "ringway_connections_accepted_total", &["web"]), 0.0);
    assert_eq!(metric_in(&text, "ringway_connections_active", &["web"]), 50.0);
    let status = program.status().await;
    let of_backends = status["pools"][0]["backends"].as_array().unwrap().iter();
    assert_eq!(of_backends.map(|one| one["connections"]["active"].as_u64().unwrap()).sum::<u64>(), 50);
    drop(open);
    eventually_async("the end of all", async || sessions(&program).await.is_empty()).await;
    let text = get(program.api(), "/metrics").await.1;
    assert_eq!(metric_in(&text, "ringway_connections_ended_total", &["web", "finished"]), 50.0);
    assert_eq!(metric_in(&text, "ringway_connections_active", &["web"]), 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_in_every_state_lose_no_byte_over_five_upgrades() {
    let server = Streaming::start(Duration::from_millis(20)).await.unwrap();
    // The drain begins only when all connections have been offered.
    let yaml = static_config(&[server.address], &format!("{NO_CHECK}\ndrain: 0s"));
    let mut program = Program::start(&handing_over(&yaml)).await.ready().await;
    let kinds = [
        (Kind::Idle, 20),
        (Kind::Exchange, 30),
        (Kind::Bulk, 4),
        (Kind::ClosedByClient, 10),
        (Kind::ClosedByServer, 10),
        (Kind::Blocked, 6),
    ];
    let streams = server.open(program.web(), &kinds).await.unwrap();
    let blocked = async || sessions(&program).await.iter().filter(|one| one["state"] == "blocked").count();
    eventually_async("the blocked ones", async || blocked().await >= 6).await;
    for _ in 0..5 {
        upgrade(&mut program).await;
        // Some bytes between two upgrades.
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    soon("the end of all streams", streams.finish()).await.unwrap();
}

#[tokio::test]
async fn the_log_has_one_line_for_a_connection_with_all_its_bytes() {
    let server = Server::echo("a").await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("access.log");
    let yaml = static_config(&[server.address], NO_CHECK);
    let log = format!("access_log: {{ path: {}, format: json }}\n", path.display());
    let mut program = Program::start(&(log + &handing_over(&yaml))).await.ready().await;
    let mut open = TcpStream::connect(program.web()).await.unwrap();
    assert!(echoes(&mut open).await);
    let id = sessions(&program).await[0]["id"].clone();
    let idle = async |program: &Program| {
        let list: Value = serde_json::from_str(&get(program.api(), "/api/sessions").await.1).unwrap();
        list["sessions"][0]["idle_seconds"].as_f64().unwrap()
    };
    eventually_async("a second of silence", async || idle(&program).await >= 1.0).await;
    for _ in 0..2 {
        upgrade(&mut program).await;
        assert!(idle(&program).await >= 1.0, "the silence began again");
    }
    assert!(echoes(&mut open).await);
    drop(open);
    let lines = || std::fs::read_to_string(&path).unwrap();
    eventually("a line", || !lines().is_empty()).await;
    upgrade(&mut program).await;
    assert_eq!(lines().lines().count(), 1, "{}", lines());
    let line: Value = serde_json::from_str(&lines()).unwrap();
    assert_eq!((&line["id"], &line["end"]), (&id, &Value::from("finished")));
    assert_eq!((&line["from_client"], &line["to_client"]), (&Value::from(8), &Value::from(8)));
    assert!(line["duration_ms"].as_f64().unwrap() >= 1000.0, "{line}");
}

#[tokio::test]
async fn what_is_known_about_a_connection_goes_with_it() {
    let servers = Server::echoes(2).await;
    let addresses: Vec<_> = servers.iter().map(|server| server.address).collect();
    // The routes of a listener that reads PROXY headers and server names.
    let yaml = static_config(&addresses, &format!("{NO_CHECK}\nkey: sni\nsend_proxy: off")).replacen(
        "    pool: echo\n",
        "    pool: echo\n    proxy_protocol: { from: [127.0.0.1] }\n    routes: [{ name: a, sni: [\"*.example\"], pool: echo }]\n",
        1,
    );
    let mut program = Program::start(&handing_over(&yaml)).await.ready().await;
    let mut clients = Vec::new();
    for n in 0..5 {
        let mut client = TcpStream::connect(program.web()).await.unwrap();
        let mut sent = format!("PROXY TCP4 192.0.2.{n} 192.0.2.200 1000 443\r\n").into_bytes();
        let hello = loadtest::client_hello(&format!("{n}.example"), &["h2"]);
        sent.extend(&hello);
        client.write_all(&sent).await.unwrap();
        let mut back = vec![0; hello.len()];
        soon("an echo", client.read_exact(&mut back)).await.unwrap();
        assert_eq!(back, hello);
        clients.push(client);
    }
    let before = sessions(&program).await;
    assert_eq!(before[0]["sni"].as_str().map(|name| name.ends_with(".example")), Some(true), "{}", before[0]);
    assert!(before.iter().all(|one| one["client"].as_str().unwrap().starts_with("192.0.2.") && one["route"] == "a"));
    upgrade(&mut program).await;
    assert_eq!(sessions(&program).await, before);
    for client in &mut clients {
        assert!(echoes(client).await);
    }
}

#[tokio::test]
async fn limits_count_the_connections_that_were_taken_over() {
    let server = Server::echo("a").await;
    let yaml = static_config(&[server.address], &format!("{NO_CHECK}\nmax_connections_per_backend: 3"));
    let listener = "    pool: echo\n    per_source: { max_connections: 1 }\n";
    let yaml = yaml.replacen("    pool: echo\n", listener, 1);
    let mut program = Program::start(&handing_over(&yaml)).await.ready().await;
    let web = program.web();
    let mut open = Vec::new();
    for n in 1..=2 {
        open.push(served_from(&format!("127.0.0.{n}"), web).await.unwrap());
    }
    upgrade(&mut program).await;
    assert!(served_from("127.0.0.1", web).await.is_none(), "the source has a connection");
    open.push(served_from("127.0.0.3", web).await.unwrap());
    assert!(served_from("127.0.0.4", web).await.is_none(), "the backend is full");
    drop(open.remove(0));
    eventually_async("room again", async || served_from("127.0.0.1", web).await.is_some()).await;
    for stream in &mut open {
        assert!(echoes(stream).await);
    }
}

#[tokio::test]
async fn a_full_process_takes_the_rest_when_it_has_room() {
    let server = Server::echo("a").await;
    let yaml = static_config(&[server.address], &format!("{NO_CHECK}\ndrain: 10m"));
    let mut program = Program::start(&handing_over(&yaml)).await.ready().await;
    let mut open = loadtest::open(program.web(), 40).await.unwrap();
    for stream in &mut open {
        assert!(echoes(stream).await);
    }
    program.write_config(&format!("max_connections: 10\n{}", handing_over(&yaml)));
    let old = program.newest();
    program.upgrade().await;
    let taken = async || sessions(&program).await.len();
    eventually_async("ten are taken", async || taken().await == 10).await;
    for stream in &mut open {
        assert!(soon("an echo", echoes(stream)).await);
    }
    assert!(is_alive(old));
    // Each connection that ends makes room for another.
    while let Some(stream) = open.pop() {
        drop(stream);
        let left = open.len().min(10);
        eventually_async("the next one", async || taken().await == left).await;
        if let Some(stream) = open.first_mut() {
            assert!(soon("an echo", echoes(stream)).await);
        }
    }
    ends(old).await;
}

#[tokio::test]
async fn connections_that_the_new_config_does_not_know_finish_in_the_old_process() {
    let servers = Server::echoes(2).await;
    let addresses: Vec<_> = servers.iter().map(|server| server.address).collect();
    let yaml = static_config(&addresses, &format!("{NO_CHECK}\nkey: source_ip\ndrain: 10m"));
    let second = yaml.replace("pools:\n", "  - { name: second, listen: \"127.0.0.1:0\", pool: echo }\npools:\n");
    let mut program = Program::start(&handing_over(&second)).await.ready().await;
    let gone = program.status().await["listeners"][1]["address"].as_str().unwrap().to_owned();
    let mut of_gone = TcpStream::connect(&gone).await.unwrap();
    assert!(echoes(&mut of_gone).await);
    let mut clients = Vec::new();
    for n in 1..=20 {
        clients.push(served_from(&format!("127.0.0.{n}"), program.web()).await.unwrap());
    }
    let before = sessions(&program).await;
    let to = |backend: &str| {
        let is_meant = |one: &&Value| one["backend"] == backend && one["listener"] == "web";
        before.iter().filter(is_meant).cloned().collect::<Vec<_>>()
    };
    assert!(to("b0").len() > 1 && to("b1").len() > 1);
    // The listener `second` and the backend `b1` are not in the new config.
    program.write_config(&handing_over(&static_config(
        &addresses[..1],
        &format!("{NO_CHECK}\nkey: source_ip\ndrain: 10m"),
    )));
    let old = program.newest();
    let answer = crate::harness::http(program.api(), "POST", "/api/upgrade", b"").await;
    let text = String::from_utf8_lossy(answer.body()).into_owned();
    let (taken, left) = (to("b0").len(), to("b1").len() + 1);
    let words = format!("open connections: {taken} go on there, {left} are in the old process");
    assert!(answer.status() == 200 && text.contains(&words), "{text}");
    program.follow().await;
    assert_eq!(sessions(&program).await, to("b0"));
    for stream in clients.iter_mut().chain([&mut of_gone]) {
        assert!(soon("an echo", echoes(stream)).await);
    }
    assert!(is_alive(old));
    // The next upgrade leaves them where they are. The process in the middle lives as long as the first one.
    let second = program.newest();
    program.upgrade().await;
    assert_eq!(sessions(&program).await.len(), taken);
    for stream in clients.iter_mut().chain([&mut of_gone]) {
        assert!(soon("an echo", echoes(stream)).await);
    }
    assert!(is_alive(old));
    drop((clients, of_gone));
    ends(old).await;
    ends(second).await;
}

#[tokio::test]
async fn connections_to_the_address_that_a_backend_had_before_stay() {
    let servers = Server::echoes(2).await;
    let yaml = |server: &Server| handing_over(&static_config(&[server.address], &format!("{NO_CHECK}\ndrain: 10m")));
    let mut program = Program::start(&yaml(&servers[0])).await.ready().await;
    let mut open = TcpStream::connect(program.web()).await.unwrap();
    assert!(echoes(&mut open).await);
    program.write_config(&yaml(&servers[1]));
    let old = program.newest();
    program.upgrade().await;
    assert!(sessions(&program).await.is_empty() && is_alive(old));
    assert!(soon("an echo", echoes(&mut open)).await);
    drop(open);
    ends(old).await;
}

#[tokio::test]
async fn connections_to_the_port_of_their_client_go_on() {
    let server = Server::echo("a").await;
    // The listener has the port of the server, at another address.
    let yaml = static_config(&[(server.address.ip(), 9).into()], NO_CHECK).replacen(
        "    listen: 127.0.0.1:0\n",
        &format!("    listen: 127.0.0.2:{}\n    backend_port: same\n", server.address.port()),
        1,
    );
    let mut program = Program::start(&handing_over(&yaml)).await;
    let mut open = TcpStream::connect(program.web()).await.unwrap();
    assert!(soon("an echo", echoes(&mut open)).await);
    upgrade(&mut program).await;
    assert!(soon("an echo", echoes(&mut open)).await && sessions(&program).await.len() == 1);
}

#[tokio::test]
async fn unix_sockets_go_on_too() {
    let folder = tempfile::tempdir().unwrap();
    let (near, far) = (folder.path().join("near"), folder.path().join("far"));
    let listener = UnixListener::bind(&far).unwrap();
    let backend = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
            });
        }
    });
    let yaml = config(&format!("static: [{{ address: \"unix:{}\", id: b }}]", far.display()), "", NO_CHECK)
        .replace("    listen: 127.0.0.1:0", &format!("    listen: unix:{}", near.display()));
    let mut program = Program::start(&handing_over(&yaml)).await;
    let mut client = UnixStream::connect(&near).await.unwrap();
    let mut back = [0; 4];
    for n in 0..3 {
        if n > 0 {
            upgrade(&mut program).await;
        }
        client.write_all(b"ping").await.unwrap();
        soon("an echo", client.read_exact(&mut back)).await.unwrap();
    }
    assert_eq!(sessions(&program).await.len(), 1);
    drop(client);
    eventually_async("its end", async || sessions(&program).await.is_empty()).await;
    backend.abort();
}

#[tokio::test]
async fn a_command_ends_a_connection_of_a_process_with_other_workers() {
    let server = Server::echo("a").await;
    let yaml = static_config(&[server.address], NO_CHECK);
    let mut program = Program::start(&handing_over(&yaml.replace("workers: 2", "workers: 4"))).await.ready().await;
    let mut open = loadtest::open(program.web(), 8).await.unwrap();
    for stream in &mut open {
        assert!(echoes(stream).await);
    }
    program.write_config(&handing_over(&yaml.replace("workers: 2", "workers: 3")));
    upgrade(&mut program).await;
    let all = sessions(&program).await;
    assert_eq!(all.len(), 8);
    for (n, one) in all.iter().enumerate() {
        let path = format!("/api/sessions/{}", one["id"].as_str().unwrap());
        let answer = crate::harness::http(program.api(), "DELETE", &path, b"").await;
        assert_eq!(answer.status(), 200, "{}", String::from_utf8_lossy(answer.body()));
        eventually_async("it is gone", async || sessions(&program).await.len() == 7 - n).await;
    }
}
