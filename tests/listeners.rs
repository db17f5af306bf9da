//! Where listeners listen: ranges of ports, interfaces, and addresses that come later.

use std::collections::BTreeSet;
use std::sync::Arc;

use ringway::backend::State;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::harness::backends::{Server, Silent};
use crate::harness::program::{Killed, Program};
use crate::harness::{
    Ringway, config, echoes, eventually, eventually_async, get, http, in_namespace, soon, static_config,
};

/// Addresses of the loopback network that no other test process uses: the ports of a range must all be free.
fn own_address(last: u8) -> String {
    let [_, _, high, low] = std::process::id().to_be_bytes();
    format!("127.{}.{low}.{last}", 100 + high % 100)
}

/// Sends nothing, and returns what the server sends first; empty if Ringway or the server closes the connection.
async fn answer(address: &str) -> String {
    let mut text = String::new();
    let read = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.read_to_string(&mut text).await
    };
    let _ = soon("an answer", read).await;
    text
}

/// A server that tells its address and closes.
async fn telling(address: String) -> Server {
    let listener = TcpListener::bind(&address).await.unwrap();
    Server::on(listener, move |mut stream| {
        let address = address.clone();
        async move {
            let _ = stream.write_all(address.as_bytes()).await;
        }
    })
}

#[tokio::test]
async fn a_range_of_ports_leads_to_the_same_ports_of_the_client_s_backend() {
    let (web, backends) = (own_address(1), [own_address(2), own_address(3)]);
    let mut servers = Vec::new();
    for backend in &backends {
        // Nobody listens on the last ports.
        for port in 5000..5030 {
            servers.push(telling(format!("{backend}:{port}")).await);
        }
    }
    let yaml = |ports: &str| {
        let [a, b] = &backends;
        config(
            &format!("static: [{{ address: \"{a}:5000\", id: a }}, {{ address: \"{b}:5000\", id: b }}]"),
            "backend_port: same",
            "key: source_ip\nhealth_check: { kind: tcp, interval: 100ms }\nejection: { after: 1 }",
        )
        .replace("listen: 127.0.0.1:0", &format!("listen: \"{web}:{ports}\""))
    };
    let mut program = Program::start(&yaml("5000-5039")).await.ready().await;
    assert_eq!(program.status().await["listeners"][0]["address"], format!("{web}:5000-5039"));
    let check = async |served: std::ops::Range<u16>, all: std::ops::Range<u16>| {
        let first = answer(&format!("{web}:{}", served.start)).await;
        let backend = first.rsplit_once(':').unwrap().0;
        for port in all {
            let expected = if served.contains(&port) { format!("{backend}:{port}") } else { String::new() };
            assert_eq!(answer(&format!("{web}:{port}")).await, expected, "port {port}");
        }
    };
    // That a port of a backend refuses says nothing about the others.
    check(5000..5030, 5000..5040).await;
    let status = program.status().await;
    assert!(
        status["pools"][0]["backends"].as_array().unwrap().iter().all(|one| one["state"] == "healthy"),
        "{status:#}"
    );
    // Each port has one socket, and a duplicate of it for a successor.
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", program.pid().as_raw_nonzero())).unwrap().count();
    assert!((2 * 40..2 * 40 + 60).contains(&descriptors), "{descriptors} descriptors");

    let explained = get(program.api(), "/api/explain?listener=web&from=10.0.0.9").await.1;
    assert!(explained.contains(&format!("{}, the client's port", backends[0])), "{explained}");

    program.upgrade().await;
    check(5000..5030, 5000..5040).await;
    // A reload makes the range shorter, and an upgrade longer.
    program.write_config(&yaml("5010-5019"));
    assert_eq!(http(program.api(), "POST", "/api/reload", b"").await.status(), 200);
    check(5010..5020, 5000..5040).await;
    program.write_config(&yaml("5005-5024"));
    program.upgrade().await;
    check(5005..5025, 5000..5040).await;
}

/// In the namespace, d0 leads to another host, in a namespace of its own.
#[tokio::test]
#[ignore = "needs root"]
async fn listeners_on_two_interfaces_share_an_address() {
    const NAME: &str = "listeners::listeners_on_two_interfaces_share_an_address";
    const SETUP: &str = "ip link add d0 type veth peer name d1; ip link set d0 up; ip address add 10.9.0.1/24 dev d0";
    if !in_namespace(NAME, SETUP).await {
        return;
    }
    let sleep = std::process::Command::new("unshare").args(["--net", "sleep", "60"]).spawn().unwrap();
    let host = Killed(sleep);
    let pid = host.0.id().to_string();
    let on_host = async |script: &str| {
        let output = tokio::process::Command::new("nsenter").args(["-t", &pid, "-n", "bash", "-c", script]).output();
        String::from_utf8_lossy(&soon("the other host", output).await.unwrap().stdout).into_owned()
    };
    let is_apart = async || {
        let (own, other) = ("/proc/self/ns/net".to_owned(), format!("/proc/{pid}/ns/net"));
        std::fs::read_link(own).unwrap() != std::fs::read_link(other).unwrap()
    };
    eventually_async("the other namespace", is_apart).await;
    let moved = std::process::Command::new("ip").args(["link", "set", "d1", "netns", &pid]).status().unwrap();
    assert!(moved.success());
    on_host("ip address add 10.9.0.2/24 dev d1; ip link set d1 up").await;

    let servers = [telling("127.0.0.1:1001".to_owned()).await, telling("127.0.0.1:1002".to_owned()).await];
    let yaml = |outside: &str| {
        format!(
            "api: {{ listen: \"127.0.0.1:0\" }}\nworkers: 2\n\
             listeners:\n  - {{ name: inside, listen: 0.0.0.0:800, interface: lo, pool: one }}\n\
             \u{20} - {{ name: outside, listen: 0.0.0.0:800, interface: {outside}, pool: two }}\n\
             pools:\n  - {{ name: one, provider: {{ static: [{{ address: \"{}\" }}] }}, health_check: {{ kind: none }} }}\n\
             \u{20} - {{ name: two, provider: {{ static: [{{ address: \"{}\" }}] }}, health_check: {{ kind: none }} }}",
            servers[0].address, servers[1].address
        )
    };
    let from_outside = async || on_host("exec 3<>/dev/tcp/10.9.0.1/800 && timeout 5 cat <&3").await;
    let mut program = Program::start(&yaml("d0")).await.ready().await;
    let sockets = || {
        let listed = std::process::Command::new("ss").args(["-tlneH", "sport = 800"]).output().unwrap();
        let text = String::from_utf8(listed.stdout).unwrap();
        let inodes: BTreeSet<_> =
            text.split_whitespace().filter(|word| word.starts_with("ino:")).map(str::to_owned).collect();
        inodes
    };
    let before = sockets();
    assert_eq!(before.len(), 4, "two workers on two interfaces: {before:?}");
    for _ in 0..2 {
        assert_eq!(answer("127.0.0.1:800").await, "127.0.0.1:1001");
        assert_eq!(
            answer("10.9.0.1:800").await,
            "127.0.0.1:1002",
            "a client of this host comes through the address's interface"
        );
        assert_eq!(from_outside().await, "127.0.0.1:1002");
        program.upgrade().await;
    }
    assert_eq!(sockets(), before, "an upgrade opened other sockets");
    // A wrong name changes nothing.
    program.write_config(&yaml("d9"));
    let answered = http(program.api(), "POST", "/api/reload", b"").await;
    assert_ne!(answered.status(), 200);
    let text = String::from_utf8_lossy(answered.body()).into_owned();
    assert!(text.contains("listeners[outside].interface: d9: this machine has no network interface"), "{text}");
    assert_eq!(from_outside().await, "127.0.0.1:1002");
    // Another interface needs new sockets.
    program.write_config(&yaml("lo").replace("interface: lo, pool: one", "interface: d0, pool: one"));
    program.upgrade().await;
    assert_eq!(answer("127.0.0.1:800").await, "127.0.0.1:1002");
    assert_eq!(from_outside().await, "127.0.0.1:1001");
}

/// The sockets stay bound to the interface that has gone.
#[tokio::test]
#[ignore = "needs root"]
async fn a_reload_opens_the_sockets_of_an_interface_that_has_come_back() {
    const NAME: &str = "listeners::a_reload_opens_the_sockets_of_an_interface_that_has_come_back";
    if !in_namespace(NAME, "ip link add d0 type veth peer name d1; ip link set d0 up").await {
        return;
    }
    let server = telling("127.0.0.1:1001".to_owned()).await;
    let ip = |words: &str| assert!(std::process::Command::new("ip").args(words.split(' ')).status().unwrap().success());
    let yaml = |listener: &str| {
        static_config(&[server.address], "health_check: { kind: none }")
            .replace("listen: 127.0.0.1:0", &format!("listen: 0.0.0.0:800\n{listener}"))
    };
    let on_d0 = yaml("    interface: d0\n");
    let ringway = Ringway::start(&on_d0).await.ready().await;
    let devices = || {
        let listed = std::process::Command::new("ss").args(["-tlnH", "sport = 800"]).output().unwrap();
        let text = String::from_utf8(listed.stdout).unwrap();
        text.lines().map(|line| line.split_whitespace().nth(3).unwrap().to_owned()).collect::<BTreeSet<_>>()
    };
    assert_eq!(devices(), ["0.0.0.0%d0:800".to_owned()].into());
    ip("link del d0");
    ip("link add d0 type veth peer name d1");
    ringway.reload(&on_d0).await.unwrap();
    eventually("the new interface", || devices() == ["0.0.0.0%d0:800".to_owned()].into()).await;
    // Without the key, the listener must not go on with a socket whose interface has gone.
    ip("link del d0");
    ringway.reload(&yaml("")).await.unwrap();
    eventually("all interfaces", || devices() == ["0.0.0.0:800".to_owned()].into()).await;
    assert_eq!(answer("127.0.0.1:800").await, "127.0.0.1:1001");

    // A reload that fails leaves the options of the sockets alone, too.
    let backlogs = || {
        let listed = std::process::Command::new("ss").args(["-tlnH", "sport = 800"]).output().unwrap();
        let text = String::from_utf8(listed.stdout).unwrap();
        text.lines().map(|line| line.split_whitespace().nth(2).unwrap().to_owned()).collect::<BTreeSet<_>>()
    };
    let before = backlogs();
    let taken = TcpListener::bind("127.0.0.1:805").await.unwrap();
    let range = yaml("    backlog: 7\n").replace("0.0.0.0:800", "0.0.0.0:800-809");
    ringway.reload(&range).await.unwrap_err();
    assert_eq!(backlogs(), before);
    drop(taken);
    ringway.reload(&range).await.unwrap();
    eventually("the new backlog", || backlogs() == ["7".to_owned()].into()).await;
}

#[tokio::test]
#[ignore = "needs root"]
async fn a_listener_waits_for_an_address_that_comes_later() {
    const NAME: &str = "listeners::a_listener_waits_for_an_address_that_comes_later";
    if !in_namespace(NAME, ":").await {
        return;
    }
    let server = telling("127.0.0.1:1001".to_owned()).await;
    for (late, mask) in [("198.51.100.7", 32), ("[2001:db8::7]", 128)] {
        let yaml = static_config(&[server.address], "health_check: { kind: none }")
            .replace("listen: 127.0.0.1:0", &format!("listen: \"{late}:800\"\n    freebind: true"));
        let error = Ringway::try_start(&yaml.replace("freebind: true", "freebind: false")).await.err().unwrap();
        assert!(error.contains("listeners[web].listen: cannot listen on"), "{error}");
        let ringway = Ringway::start(&yaml).await.ready().await;
        assert_eq!(answer(&format!("{late}:800")).await, "");
        let address = format!("{}/{mask}", late.trim_matches(['[', ']']));
        let added = std::process::Command::new("ip").args(["address", "add", &address, "dev", "lo"]).status();
        assert!(added.unwrap().success());
        eventually_async("an answer", async || answer(&format!("{late}:800")).await == "127.0.0.1:1001").await;
        drop(ringway);
    }
}

/// A reload binds the new ports before it finds that one of them is taken.
#[tokio::test]
async fn a_change_of_the_range_loses_no_client_even_if_it_fails() {
    let web = own_address(11);
    let server = Server::echo("a").await;
    let yaml = |ports: &str| {
        static_config(&[server.address], "health_check: { kind: none }")
            .replace("listen: 127.0.0.1:0", &format!("listen: \"{web}:{ports}\""))
    };
    let ringway = Ringway::start(&yaml("5000-5009")).await.ready().await;
    let taken = TcpListener::bind(format!("{web}:5012")).await.unwrap();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mut clients = JoinSet::new();
    for n in 0..4 {
        let (address, stop) = (format!("{web}:500{n}"), Arc::clone(&stop));
        clients.spawn(async move {
            let mut served = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let mut stream = TcpStream::connect(&address).await.unwrap();
                assert!(soon("an echo", echoes(&mut stream)).await, "a client of {address} was lost");
                // The port is free at once.
                stream.set_zero_linger().unwrap();
                served += 1;
            }
            served
        });
    }
    for _ in 0..10 {
        let error = ringway.reload(&yaml("5000-5019")).await.unwrap_err().to_string();
        assert!(error.contains("listeners[web].listen: cannot listen on") && error.contains(":5012"), "{error}");
    }
    drop(taken);
    for ports in ["5000-5019", "5000-5003", "5000-5009"] {
        ringway.reload(&yaml(ports)).await.unwrap();
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(soon("the clients", clients.join_all()).await.iter().all(|&served| served > 0));
}

#[tokio::test]
async fn a_backend_that_does_not_answer_is_ejected_also_if_connections_keep_their_port() {
    let silent = Silent::new();
    let (port, server) = (silent.address.port(), Server::echo("a").await);
    let provider =
        format!("static: [{{ address: \"127.0.0.1:1\", id: silent }}, {{ address: \"{}\" }}]", server.address);
    let pool = "health_check: { kind: none }\nejection: { after: 1, max_share: 100 }\nconnect: { timeout: 100ms, attempts: 1 }";
    let yaml = config(&provider, "backend_port: same", pool)
        .replace("listen: 127.0.0.1:0", &format!("listen: \"{}:{port}\"", own_address(21)));
    let ringway = Ringway::start(&yaml).await.ready().await;
    let ejected = || ringway.states().contains(&State::Ejected);
    eventually_async("the ejection", async || {
        drop(TcpStream::connect(ringway.web()).await);
        ejected()
    })
    .await;
}
