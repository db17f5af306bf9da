//! Routes and access lists: which pool gets a connection, and who may connect at all.

mod changes;
mod lists;
mod real_clients;

use std::sync::Arc;
use std::time::Duration;

use loadtest::client_hello;
use loadtest::tls::record;
use ringway::backend::State;
use ringway::control::command::Command;
use ringway::proxy::stats::{EndReason, HelloResult, ListenerStats, RefusalReason};
use ringway::proxy_header::{Ends, Version, write};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::backends::Server;
use crate::harness::{Ringway, echoes, eventually, eventually_async, http, soon};

/// Longer than a busy machine may delay a client.
const TIMEOUT: &str = "    hello: { timeout: 3s }\n";

/// A server that sends its name of one letter, and then everything that it gets.
async fn named(name: u8) -> Server {
    Server::start(move |mut stream| async move {
        let mut buffer = vec![0; 1 << 16];
        let _ = stream.write_all(&[name]).await;
        while let Ok(read @ 1..) = stream.read(&mut buffer).await {
            if stream.write_all(&buffer[..read]).await.is_err() {
                return;
            }
        }
    })
    .await
}

/// One server for each pool, named after its first letter.
async fn servers(pools: &[&str]) -> Vec<Server> {
    let mut servers = Vec::new();
    for pool in pools {
        servers.push(named(pool.as_bytes()[0]).await);
    }
    servers
}

/// A config with these lines for the listener, and with one server for each pool. `settings` are for all pools.
fn routed(listener: &str, pools: &[&str], servers: &[Server], settings: &str) -> String {
    let pools = std::iter::zip(pools, servers).map(|(name, server)| {
        let address = server.address;
        format!("  - {{ name: {name}, provider: {{ static: [{{ address: \"{address}\" }}] }}, {settings} }}\n")
    });
    format!(
        "api: {{ listen: \"127.0.0.1:0\" }}\nworkers: 2\nlisteners:\n  - name: web\n    listen: 127.0.0.1:0\n{listener}pools:\n{}",
        pools.collect::<String>()
    )
}

const PLAIN_POOL: &str = "health_check: { kind: none }, drain: 100ms";

fn stats(ringway: &Ringway) -> Arc<ListenerStats> {
    Arc::clone(&ringway.state().listeners[0].stats)
}

/// Connects, sends `bytes`, and returns the letter of the server, once it has sent all of them back.
async fn taken_by(ringway: &Ringway, bytes: &[u8]) -> char {
    let mut stream = TcpStream::connect(ringway.web()).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    answer(&mut stream, bytes).await
}

/// The letter of the server that has got exactly `bytes`.
async fn answer(stream: &mut TcpStream, bytes: &[u8]) -> char {
    let mut back = vec![0; bytes.len() + 1];
    soon("the server's name and the bytes", stream.read_exact(&mut back)).await.unwrap();
    assert_eq!(&back[1..], bytes);
    char::from(back[0])
}

async fn is_reset(stream: &mut TcpStream) {
    let error = soon("a reset", stream.read(&mut [0])).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn the_first_route_that_matches_takes_the_connection() {
    const POOLS: [&str; 4] = ["db", "grpc", "plain", "web"];
    let servers = servers(&POOLS).await;
    let log = tempfile::NamedTempFile::new().unwrap();
    let routes = "    routes:\n\
                  \x20     - { sni: [db.example.com], pool: db }\n\
                  \x20     - { sni: [\"*.example.com\"], alpn: [h2], pool: grpc, name: rpc }\n\
                  \x20     - { sni: [no.example.com], pool: reset }\n\
                  \x20     - { tls: false, pool: plain }\n    pool: web\n";
    let yaml = routed(routes, &POOLS, &servers, PLAIN_POOL);
    let ringway = Ringway::start(&format!("access_log: {{ path: {:?}, format: json }}\n{yaml}", log.path())).await;
    for (bytes, wanted) in [
        (client_hello("DB.example.com.", &[]), 'd'),
        (client_hello("a.example.com", &["h2", "http/1.1"]), 'g'),
        (client_hello("a.example.com", &["http/1.1"]), 'w'),
        (client_hello("a.b.example.com", &["h2"]), 'w'),
        (client_hello("", &[]), 'w'),
        (client_hello("192.0.2.1", &["h2"]), 'w'),
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), 'p'),
        // The hello of an SSL 2 client.
        (vec![0x80, 0x2e, 1, 3, 1, 0, 0x15], 'p'),
    ] {
        assert_eq!(taken_by(&ringway, &bytes).await, wanted, "{:?}", String::from_utf8_lossy(&bytes));
    }
    let mut refused = TcpStream::connect(ringway.web()).await.unwrap();
    refused.write_all(&client_hello("no.example.com", &[])).await.unwrap();
    is_reset(&mut refused).await;
    // It will never send a byte, so it is a client without TLS.
    let mut ended = TcpStream::connect(ringway.web()).await.unwrap();
    ended.shutdown().await.unwrap();
    assert_eq!(answer(&mut ended, b"").await, 'p');

    let stats = stats(&ringway);
    eventually("counted", || stats.total_ended() == 9 && stats.refused(RefusalReason::NoRoute) == 1).await;
    assert_eq!((stats.hellos(HelloResult::Sni), stats.hellos(HelloResult::NoSni)), (5, 2));
    assert_eq!(stats.hellos(HelloResult::Plain), 3);
    for (route, count) in [("db", 1.0), ("rpc", 1.0), ("reset", 1.0), ("plain", 3.0), ("default", 4.0)] {
        let label = format!("route=\"{route}\"");
        assert_eq!(ringway.metric("ringway_routes_total", &[&label]).await, count, "{route}");
    }
    assert_eq!(ringway.metric("ringway_hello_bytes_count", &[]).await, 7.0);
    let status = http(ringway.api(), "GET", "/api/status", b"").await;
    let status: serde_json::Value = serde_json::from_slice(status.body()).unwrap();
    let routes = &status["listeners"][0]["routes"];
    assert_eq!((&routes[1]["name"], &routes[1]["pool"]), (&"rpc".into(), &"grpc".into()));
    assert_eq!((&routes[2]["pool"], &routes[4]["connections"]), (&serde_json::Value::Null, &4.into()));
    drop(ringway);

    let lines = std::fs::read_to_string(log.path()).unwrap();
    let lines: Vec<serde_json::Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of =
        |route: &str| lines.iter().find(|line| line["route"] == route).unwrap_or_else(|| panic!("{route}: {lines:?}"));
    let rpc = of("rpc");
    assert_eq!(
        (&rpc["pool"], &rpc["sni"], &rpc["alpn"]),
        (&"grpc".into(), &"a.example.com".into(), &serde_json::json!(["h2", "http/1.1"]))
    );
    assert_eq!((&of("reset")["pool"], &of("reset")["end"]), (&serde_json::Value::Null, &"no_route".into()));
    assert_eq!((&of("plain")["sni"], &of("plain")["alpn"]), (&serde_json::Value::Null, &serde_json::Value::Null));
    let ids: std::collections::BTreeSet<_> = lines.iter().map(|line| line["id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), 10, "two connections have one id");
}

#[tokio::test]
async fn no_cut_changes_the_route() {
    let servers = servers(&["a", "b"]).await;
    let routes = "    routes: [{ sni: [a.example], alpn: [h2], pool: a }]\n    pool: b\n";
    let ringway = Ringway::start(&routed(routes, &["a", "b"], &servers, PLAIN_POOL)).await;
    let one = client_hello("a.example", &["http/1.1", "h2"]);
    let message = &one[5..];
    for cut in 1..message.len() {
        // Over two records, which arrive in two pieces, cut elsewhere.
        let bytes = [record(&message[..cut]), record(&message[cut..])].concat();
        let other = (cut * 7) % bytes.len();
        let mut stream = TcpStream::connect(ringway.web()).await.unwrap();
        stream.set_nodelay(true).unwrap();
        for piece in [&bytes[..other], &bytes[other..]] {
            stream.write_all(piece).await.unwrap();
            tokio::task::yield_now().await;
        }
        assert_eq!(answer(&mut stream, &bytes).await, 'a', "cut at {cut} and {other}");
    }
    let mut stream = TcpStream::connect(ringway.web()).await.unwrap();
    stream.set_nodelay(true).unwrap();
    // Many records, and one byte at a time.
    let bytes: Vec<u8> = message.chunks(2).flat_map(record).collect();
    for byte in &bytes {
        stream.write_all(&[*byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    assert_eq!(answer(&mut stream, &bytes).await, 'a');
}

/// A large hello: a client with a post-quantum key share, a long session ticket, or padding.
#[tokio::test]
async fn large_hellos_are_read_up_to_the_limit() {
    let servers = servers(&["a", "b"]).await;
    let routes = "    routes: [{ sni: [a.example], pool: a }]\n    pool: b\n";
    let yaml = routed(routes, &["a", "b"], &servers, PLAIN_POOL);
    let ringway = Ringway::start(&yaml).await;
    let padded = |protocols: usize| client_hello("a.example", &vec!["p".repeat(250).as_str(); protocols]);
    for protocols in [8, 60, 160, 240] {
        let one = padded(protocols);
        // Records of 16 KiB at most.
        let bytes: Vec<u8> = one[5..].chunks(1 << 14).flat_map(record).collect();
        assert_eq!(taken_by(&ringway, &bytes).await, 'a', "{} bytes", bytes.len());
    }
    ringway.reload(&yaml.replace("    pool: b", "    hello: { max_kib: 8 }\n    pool: b")).await.unwrap();
    let mut stream = TcpStream::connect(ringway.web()).await.unwrap();
    // The length alone shows that it is too large.
    stream.write_all(&padded(60)[..9]).await.unwrap();
    is_reset(&mut stream).await;
    eventually("counted", || stats(&ringway).refused(RefusalReason::HelloTooLarge) == 1).await;
    assert_eq!(stats(&ringway).hellos(HelloResult::TooLarge), 1);
}

#[tokio::test]
async fn what_decides_nothing_never_takes_the_default_route() {
    let servers = servers(&["a", "b"]).await;
    let routes = format!("    routes: [{{ sni: [a.example], pool: a }}]\n    pool: b\n{TIMEOUT}");
    let yaml = routed(&routes, &["a", "b"], &servers, PLAIN_POOL);
    let ringway = Ringway::start(&yaml).await;
    let hello = client_hello("a.example", &[]);
    // The extension has the length of a list with two names: a name, and the same name once more.
    let entry = [&[0, 0, 9][..], b"a.example"].concat();
    let list = [&entry[..], &entry].concat();
    let name = [&[0, 0, 0, 26, 0, 24][..], &list].concat();
    let body = [&[3, 3][..], &[7; 32], &[0], &[0, 2, 0x13, 1], &[1, 0], &[0, 30], &name].concat();
    let two_names = record(&[&[1, 0, 0, u8::try_from(body.len()).unwrap()][..], &body].concat());
    let alert = [&record(&hello[5..30])[..], &[21, 3, 1, 0, 2, 2, 40]].concat();
    let not_a_name = client_hello("a example", &[]);
    // Servers made with Go or GnuTLS accept these records before the hello.
    let after_alert = [&[21, 3, 1, 0, 2, 1, 0x70][..], &hello].concat();
    let after_old_alert = [&[21, 0, 0, 0, 2, 1, 0x70][..], &hello].concat();
    let after_change = [&[20, 3, 3, 0, 1, 1][..], &hello].concat();
    let (invalid, late) = (RefusalReason::HelloInvalid, RefusalReason::HelloTimeout);
    for (bytes, ends, wanted) in [
        (&two_names[..], false, invalid),
        (&after_alert, false, invalid),
        (&after_old_alert, false, invalid),
        (&after_change, false, invalid),
        (&alert, false, invalid),
        (&not_a_name, false, invalid),
        (&[22, 3, 1, 0, 0], false, invalid),
        (&hello[..40], true, invalid),
        (&hello[..40], false, late),
        (b"", false, late),
    ] {
        let before = stats(&ringway).refused(wanted);
        let mut stream = TcpStream::connect(ringway.web()).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        if ends {
            stream.shutdown().await.unwrap();
        }
        is_reset(&mut stream).await;
        eventually("counted", || stats(&ringway).refused(wanted) == before + 1).await;
    }
    assert_eq!(ringway.metric("ringway_connect_attempts_total", &[]).await, 0.0);
    assert_eq!((stats(&ringway).hellos(HelloResult::Timeout), stats(&ringway).hellos(HelloResult::Silent)), (1, 1));
    // Unless the config says so.
    let permissive = yaml.replace("timeout: 3s", "timeout: 3s, undecided: default");
    ringway.reload(&permissive).await.unwrap();
    assert_eq!(taken_by(&ringway, &alert).await, 'b');
    let mut silent = TcpStream::connect(ringway.web()).await.unwrap();
    assert_eq!(answer(&mut silent, b"").await, 'b');
}

/// A client that drips its hello does not get more time with each byte.
#[tokio::test]
async fn the_deadline_is_for_the_whole_hello() {
    let servers = servers(&["a", "b"]).await;
    let routes = format!("    routes: [{{ sni: [a.example], pool: a }}]\n    pool: b\n{TIMEOUT}");
    let ringway = Ringway::start(&routed(&routes, &["a", "b"], &servers, PLAIN_POOL)).await;
    let hello = client_hello("a.example", &[]);
    let stream = TcpStream::connect(ringway.web()).await.unwrap();
    let (mut reading, mut writing) = stream.into_split();
    let dripping = tokio::spawn(async move {
        for byte in &hello[..hello.len() - 1] {
            if writing.write_all(&[*byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        std::future::pending::<()>().await;
    });
    soon("a reset", reading.read(&mut [0])).await.unwrap_err();
    eventually("counted", || stats(&ringway).refused(RefusalReason::HelloTimeout) == 1).await;
    dripping.abort();
}

#[tokio::test]
async fn a_server_can_speak_first_beside_tls_routes() {
    const POOLS: [&str; 3] = ["ssh", "tls", "inside"];
    let servers = servers(&POOLS).await;
    let late = format!(
        "    routes: [{{ sni: [t.example], pool: tls }}, {{ tls: false, pool: ssh }}]\n    pool: reset\n{TIMEOUT}"
    );
    let ringway = Ringway::start(&routed(&late, &POOLS, &servers, PLAIN_POOL)).await;
    // After the timeout.
    let mut silent = TcpStream::connect(ringway.web()).await.unwrap();
    assert_eq!(answer(&mut silent, b"").await, 's');
    assert!(soon("an echo", echoes(&mut silent)).await);
    // A route for its address needs no byte, so there is no delay: the timeout is the longest possible.
    let early = "    routes: [{ from: [127.0.0.1], pool: inside }, { sni: [t.example], pool: tls }]\n    pool: reset\n    hello: { timeout: 1m }\n";
    ringway.reload(&routed(early, &POOLS, &servers, PLAIN_POOL)).await.unwrap();
    let mut silent = TcpStream::connect(ringway.web()).await.unwrap();
    let name = tokio::time::timeout(Duration::from_secs(30), answer(&mut silent, b"")).await;
    assert_eq!(name.unwrap(), 'i');
}

/// The client in a PROXY header is the client for routes too, and its first bytes follow the header.
#[tokio::test]
async fn a_route_can_depend_on_the_client_in_a_proxy_header() {
    const POOLS: [&str; 3] = ["near", "tls", "far"];
    let servers = servers(&POOLS).await;
    let routes = "    proxy_protocol: { from: [127.0.0.1] }\n    routes: [{ from: [198.51.100.0/24], pool: near }, { sni: [t.example], pool: tls }]\n    pool: far\n";
    let ringway = Ringway::start(&routed(routes, &POOLS, &servers, PLAIN_POOL)).await;
    let (tls, plain) = (client_hello("t.example", &[]), b"plain".to_vec());
    for (source, bytes, wanted) in
        [("198.51.100.7:1", &tls, 'n'), ("203.0.113.9:1", &tls, 't'), ("203.0.113.9:1", &plain, 'f')]
    {
        let ends = Ends { source: source.parse().unwrap(), destination: "203.0.113.1:443".parse().unwrap() };
        let mut stream = TcpStream::connect(ringway.web()).await.unwrap();
        stream.write_all(&[write(Version::V2, Some(ends)), bytes.clone()].concat()).await.unwrap();
        assert_eq!(answer(&mut stream, bytes).await, wanted);
    }
}

#[tokio::test]
async fn with_the_key_sni_all_connections_for_a_name_have_one_backend() {
    let servers = servers(&["a", "b", "c", "d"]).await;
    let members: Vec<_> = servers.iter().map(|server| format!("{{ address: \"{}\" }}", server.address)).collect();
    let yaml = format!(
        "api: {{ listen: \"127.0.0.1:0\" }}\nlisteners: [{{ name: web, listen: \"127.0.0.1:0\", pool: p, hello: {{ timeout: 3s }} }}]\n\
         pools: [{{ name: p, key: sni, provider: {{ static: [{}] }}, {PLAIN_POOL} }}]",
        members.join(", ")
    );
    let ringway = Ringway::start(&yaml).await;
    let mut used = std::collections::BTreeSet::new();
    for n in 0..20 {
        let name = format!("site-{n}.example");
        let table = ringway.state().pools[0].table.load();
        let owner = table.candidates(name.as_bytes()).next().unwrap().1.clone();
        let wanted = servers.iter().position(|server| Some(server.address) == owner.ip()).unwrap();
        for _ in 0..3 {
            let letter = taken_by(&ringway, &client_hello(&name.to_uppercase(), &[])).await;
            assert_eq!(letter, ['a', 'b', 'c', 'd'][wanted], "{name}");
            used.insert(letter);
        }
    }
    assert!(used.len() > 2, "{used:?}");
    // Without a name, the client's address is the key. First bytes that are wrong do not matter to the only route.
    let mut letters = std::collections::BTreeSet::new();
    for bytes in [&client_hello("", &[])[..], b"plain", &[22, 3, 1, 0, 0], b""] {
        letters.insert(taken_by(&ringway, bytes).await);
    }
    assert_eq!(letters.len(), 1, "{letters:?}");
}

/// Each pool's limits, timeouts and drain apply to the connections that its routes lead to it.
#[tokio::test]
async fn a_connection_follows_its_route() {
    const POOLS: [&str; 2] = ["a", "b"];
    let servers = servers(&POOLS).await;
    let routes = "    routes: [{ sni: [a.example], pool: a }]\n    pool: b\n";
    let yaml = routed(routes, &POOLS, &servers, "health_check: { kind: none }, drain: 10s");
    let ringway = Ringway::start(&yaml.replacen("drain: 10s", "drain: 10s, max_connections_per_backend: 1", 1)).await;
    let (to_a, to_b) = (client_hello("a.example", &[]), b"plain".to_vec());
    let open = async |bytes: &[u8]| {
        let mut stream = TcpStream::connect(ringway.web()).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream
    };
    let mut on_b = open(&to_b).await;
    assert_eq!(answer(&mut on_b, &to_b).await, 'b');
    let mut on_a = open(&to_a).await;
    assert_eq!(answer(&mut on_a, &to_a).await, 'a');
    is_reset(&mut open(&to_a).await).await;
    eventually("counted", || stats(&ringway).refused(RefusalReason::BackendsFull) == 1).await;
    drop(on_a);
    ringway.reload(&yaml.replacen("drain: 10s", "drain: 10s, timeouts: { idle: 200ms }", 1)).await.unwrap();
    let mut on_a = open(&to_a).await;
    assert_eq!(answer(&mut on_a, &to_a).await, 'a');
    is_reset(&mut on_a).await;
    eventually("counted", || stats(&ringway).ended(EndReason::IdleTimeout) == 1).await;
    assert!(soon("an echo", echoes(&mut on_b)).await, "the other pool has another timeout");

    let id = ringway.state().pools[1].table.load().backends()[0].id.to_string();
    let drain = Command::Drain { pool: "b".to_owned(), backend: id, within: Some(Duration::ZERO) };
    ringway.send(drain).await.unwrap();
    is_reset(&mut on_b).await;
    eventually("counted", || stats(&ringway).ended(EndReason::DrainDeadline) == 1).await;
    let states = |pool: usize| ringway.state().pools[pool].table.load().backends()[0].state;
    assert_eq!((states(0), states(1)), (State::Healthy, State::Draining));
    assert_eq!(taken_by(&ringway, &to_a).await, 'a');
}
