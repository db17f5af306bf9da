//! `explain` says where real connections go.

use std::collections::HashMap;
use std::time::Duration;

use loadtest::client_hello;
use ringway::api::explain::{Known, Parameters};
use ringway::control::command::Command;
use ringway::proxy_header::{Ends, Version, write};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::backends::Server;
use crate::harness::program::{file, run};
use crate::harness::{Random, Ringway, eventually, get, seed, soon};

/// A server that sends its number.
async fn numbered(number: u8) -> Server {
    Server::start(move |mut stream| async move {
        let _ = stream.write_all(&[number]).await;
        let _ = stream.read_to_end(&mut Vec::new()).await;
    })
    .await
}

#[tokio::test]
async fn ten_thousand_connections_go_where_explain_says() {
    const ROUNDS: usize = 25;
    const CONNECTIONS: usize = 400;
    let mut random = Random(seed());
    let mut servers = Vec::new();
    for number in 0..9 {
        servers.push(numbered(number).await);
    }
    let members = |range: std::ops::Range<usize>| {
        let member = |n: usize| format!("{{ address: \"{}\", id: b{n} }}", servers[n].address);
        range.map(member).collect::<Vec<_>>().join(", ")
    };
    let yaml = format!(
        "api: {{ listen: \"127.0.0.1:0\" }}\nworkers: 2\nlisteners:\n  - name: web\n    listen: 127.0.0.1:0\n\
         \x20   proxy_protocol: {{ from: [127.0.0.1] }}\n    deny: [10.0.0.0/8]\n\
         \x20   routes: [{{ sni: [a.example, \"*.b.example\"], pool: names }}, {{ from: [128.0.0.0/1], pool: nets }}, {{ tls: true, pool: reset }}]\n\
         \x20   pool: rest\npools:\n\
         \x20 - {{ name: names, key: sni, provider: {{ static: [{}] }}, health_check: {{ kind: none }} }}\n\
         \x20 - {{ name: nets, key: source_net, provider: {{ static: [{}] }}, health_check: {{ kind: none }} }}\n\
         \x20 - {{ name: rest, key: source, provider: {{ static: [{}] }}, health_check: {{ kind: none }}, panic_threshold: 100 }}\n",
        members(0..3),
        members(3..6),
        members(6..9)
    );
    let ringway = Ringway::start(&yaml).await;
    let pools = ["names", "nets", "rest"];
    let mut outcomes: HashMap<Option<String>, usize> = HashMap::new();
    for _ in 0..ROUNDS {
        // One state of the pools for many connections.
        for number in 0..9 {
            let (pool, backend) = (pools[number / 3].to_owned(), format!("b{number}"));
            let command = match random.below(4) {
                0 => Command::Drain { pool, backend, within: Some(Duration::from_secs(3600)) },
                1 => Command::Undrain { pool, backend },
                2 => Command::Weight { pool, backend, weight: 1 + random.below(5) as u32 },
                _ => continue,
            };
            // A backend that is not drained cannot be undrained.
            let _ = ringway.send(command).await;
        }
        for _ in 0..CONNECTIONS {
            let source = format!("{}:{}", std::net::Ipv4Addr::from(random.next() as u32), 1 + random.below(65_535));
            // Many names, so that each backend owns some.
            let name = match random.below(4) {
                0 => None,
                1 => Some("c.example".to_owned()),
                _ => Some(format!("n{}.b.example", random.below(1000))),
            };
            let parameters = Parameters { from: Some(source.clone()), sni: name.clone(), ..Parameters::default() };
            let expected = Known::of(&ringway.state()).explain(&parameters).unwrap();
            let expected = expected.pool.and_then(|pool| pool.backend);
            let ends = Ends { source: source.parse().unwrap(), destination: "203.0.113.1:443".parse().unwrap() };
            let first = name.as_deref().map_or(b"plain".to_vec(), |name| client_hello(name, &[]));
            let mut stream = TcpStream::connect(ringway.web()).await.unwrap();
            stream.write_all(&[write(Version::V2, Some(ends)), first].concat()).await.unwrap();
            let mut number = [0];
            let got = soon("a number or a reset", stream.read_exact(&mut number)).await;
            let got = got.ok().map(|_| format!("b{}", number[0]));
            assert_eq!(got, expected, "{source} {name:?}");
            *outcomes.entry(got).or_default() += 1;
        }
    }
    // The servers run on this thread, and cannot end connections while the app stops.
    eventually("all ended", || ringway.state().listeners[0].stats.active() == 0).await;
    println!("{outcomes:?}");
    assert_eq!(outcomes.len(), 10, "some backends or resets never came up");
}

#[test]
fn the_explanation_of_a_config_is_always_the_same() {
    let config = file(
        "listeners: [{ name: web, listen: \"127.0.0.1:0\", pool: echo, deny: [192.0.2.0/24], routes: [{ sni: [\"*.example.com\"], alpn: [h2], pool: echo, name: rpc }] }]\n\
         pools: [{ name: echo, key: source_ip, provider: { process: { replicas: 3, command: [ringway, \"{port}\"] } } }]\n",
    );
    let ask = |arguments: &[&str]| {
        let path = config.path().display().to_string();
        run(&[&["--config", &path, "explain", "--offline"], arguments].concat())
    };
    let (code, said, error) =
        ask(&["--from", "127.0.0.1", "--sni", "A.Example.com", "--alpn", "http/1.1", "--without", "echo-1"]);
    assert_eq!((code, &*error), (Some(0), ""));
    assert_eq!(
        said,
        "client   127.0.0.1\n\
         route    no rpc (pool echo): the client offers none of h2\n\
         route    -> default (pool echo): no other route matches\n\
         pool     echo, table 1, ring 628bc4437a229e6c\n\
         key      source_ip 7f000001, hash 1141c900b0c895af\n\
         probe       1141c900b0c895af to 114a605fa3f00b93, 0.0131 % of the circle: echo-3\n\
         probe    -> a80010768b05b4f1 to a8042338c06bba7a, 0.0062 % of the circle: echo-1\n\
         probe       98095626537fefc2 to 9990393b8462b388, 0.5964 % of the circle: echo-1\n\
         walk     1 echo-1, healthy: gets the connection\n\
         walk     2 echo-2, healthy: next, if the connects before it fail\n\
         walk     3 echo-3, healthy: next, if the connects before it fail\n\
         result   echo-1\n\
         what if  echo-3; 33.8 % of all keys would move\n"
    );
    let (_, said, _) = ask(&["--from", "127.0.0.1", "--begins", "silent"]);
    assert_eq!(
        said,
        "client   127.0.0.1\nrefused  hello_timeout: Ringway resets the connection\n\
         route    no rpc (pool echo): it depends on the client's first bytes, and they decide nothing\n\
         route    no default (pool echo): it is not for a client whose first bytes decide nothing\n\
         result   Ringway resets the connection\n"
    );
    let (_, said, _) = ask(&["--from", "192.0.2.9"]);
    assert_eq!(
        said,
        "client   192.0.2.9\nrefused  denied: Ringway resets the connection\nresult   Ringway resets the connection\n"
    );
    for (arguments, wanted) in [
        (&["web"][..], "from is missing"),
        (&["--from", "host"], "is not a client: write it like 10.0.0.9"),
        (
            &["nothing", "--from", "10.0.0.1"],
            "no listener and no pool has the name \"nothing\"; listeners and pools: web, echo",
        ),
        (&["--from", "10.0.0.1", "--weight", "echo-1"], "write it like echo-1=2"),
        (
            &["--from", "10.0.0.1", "--without", "echo-9"],
            "the pool echo has no backend \"echo-9\"; its backends: echo-1, echo-2, echo-3",
        ),
        (&["--from", "10.0.0.1", "--sni", "a b"], "is not a server name"),
    ] {
        let (code, _, error) = ask(arguments);
        assert!(code == Some(1) && error.contains(wanted), "{arguments:?}: {code:?} {error}");
    }
}

#[tokio::test]
async fn the_side_port_explains_and_refuses_wrong_questions() {
    let server = numbered(1).await;
    let yaml = crate::harness::static_config(&[server.address], "health_check: { kind: none }");
    let ringway = Ringway::start(&yaml).await.all_healthy().await;
    let (status, answer) = get(ringway.api(), "/api/explain?from=%5B2001:db8::1%5D:80").await;
    let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
    assert_eq!((status, &answer["pool"]["backend"]), (200, &"b0".into()), "{answer}");
    assert_eq!(answer["pool"]["walk"][0]["why"], "gets the connection");
    for (query, status, code) in [
        ("from=10.0.0.1", 400, "bad_query"),
        ("from=10.0.0.1:1&nonsense=1", 400, "bad_query"),
        ("target=other&from=10.0.0.1:1", 404, "no_such_target"),
        ("from=10.0.0.1:1&without=b7", 404, "no_such_backend"),
        ("from=10.0.0.1:1&sni=a.example&begins=plain", 400, "bad_query"),
        ("from=10.0.0.1:1&begins=odd", 400, "bad_query"),
        ("from=unix:1000", 400, "bad_query"),
        ("from=10.0.0.1:1&weight=b0=1000", 200, ""),
    ] {
        let (got, answer) = get(ringway.api(), &format!("/api/explain?{query}")).await;
        let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
        assert_eq!((got, answer["error"]["code"].as_str().unwrap_or_default()), (status, code), "{query}: {answer}");
    }
}
