//! The list of open connections, and the end of those that an operator names.

use std::collections::BTreeSet;
use std::time::Duration;

use loadtest::client_hello;
use ringway::proxy::stats::EndReason;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::backends::{Server, Silent};
use crate::harness::program::{Program, run};
use crate::harness::{Ringway, echoes, eventually, eventually_async, get, http, soon};

/// A server that echoes, unless the first byte is `!`: then it reads no more.
async fn server() -> Server {
    Server::start(|mut stream| async move {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(read @ 1..) = stream.read(&mut buffer).await {
            if buffer[0] == b'!' {
                std::future::pending::<()>().await;
            }
            if stream.write_all(&buffer[..read]).await.is_err() {
                return;
            }
        }
        std::future::pending::<()>().await;
    })
    .await
}

fn with_pools(web: &Server, other: std::net::SocketAddr) -> String {
    let pool = "health_check: { kind: none }, ejection: off, drain: 100ms, connect: { timeout: 1m, attempts: 1 }";
    format!(
        "api: {{ listen: \"127.0.0.1:0\" }}\nworkers: 2\nlisteners:\n  - name: web\n    listen: 127.0.0.1:0\n\
         \x20   routes: [{{ sni: [a.example], pool: named }}, {{ from: [127.0.0.2], pool: slow }}]\n    pool: web\npools:\n\
         \x20 - {{ name: web, provider: {{ static: [{{ address: \"{0}\", id: w }}] }}, {pool} }}\n\
         \x20 - {{ name: named, provider: {{ static: [{{ address: \"{0}\", id: n }}] }}, {pool} }}\n\
         \x20 - {{ name: slow, provider: {{ static: [{{ address: \"{other}\", id: s }}] }}, {pool} }}\n",
        web.address
    )
}

async fn list(ringway: &Ringway, query: &str) -> Vec<Value> {
    let (status, answer) = get(ringway.api(), &format!("/api/sessions?{query}")).await;
    assert_eq!(status, 200, "{query}: {answer}");
    serde_json::from_str::<Value>(&answer).unwrap()["sessions"].as_array().unwrap().clone()
}

async fn delete(ringway: &Ringway, path: &str) -> (u16, Value) {
    let answer = http(ringway.api(), "DELETE", path, b"").await;
    (answer.status().as_u16(), serde_json::from_slice(answer.body()).unwrap())
}

async fn connect_from(source: &str, ringway: &Ringway) -> TcpStream {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind(format!("{source}:0").parse().unwrap()).unwrap();
    socket.connect(ringway.web()).await.unwrap()
}

async fn is_reset(stream: &mut TcpStream) {
    soon("a reset", async {
        let mut buffer = [0; 1024];
        // What was on its way may still arrive.
        loop {
            match stream.read(&mut buffer).await {
                Ok(0) => panic!("a clean end"),
                Ok(_) => {}
                Err(_) => return,
            }
        }
    })
    .await;
}

#[tokio::test]
async fn the_list_shows_what_each_connection_does() {
    let (web, silent) = (server().await, Silent::new());
    let ringway = Ringway::start(&with_pools(&web, silent.address)).await;
    // The first bytes decide that it is no TLS.
    let mut open = connect_from("127.0.0.1", &ringway).await;
    assert!(soon("an echo", echoes(&mut open)).await);
    let mut named = connect_from("127.0.0.1", &ringway).await;
    let hello = client_hello("A.Example", &["h2"]);
    named.write_all(&hello).await.unwrap();
    soon("the echo", named.read_exact(&mut vec![0; hello.len()])).await.unwrap();
    let mut half = connect_from("127.0.0.1", &ringway).await;
    assert!(soon("an echo", echoes(&mut half)).await);
    half.shutdown().await.unwrap();
    let mut connecting = connect_from("127.0.0.2", &ringway).await;
    connecting.write_all(b"x").await.unwrap();
    let mut blocked = connect_from("127.0.0.1", &ringway).await;
    let flood = async {
        let bytes = vec![b'!'; 1 << 20];
        while tokio::time::timeout(Duration::from_secs(1), blocked.write_all(&bytes)).await.is_ok() {}
    };
    soon("no more room", flood).await;

    let mut all = Vec::new();
    eventually_async("all states", async || {
        all = list(&ringway, "").await;
        let states: Vec<_> = all.iter().map(|one| one["state"].as_str().unwrap()).collect();
        let count = |state: &str| states.iter().filter(|found| **found == state).count();
        states.len() == 5
            && (count("open"), count("half_closed"), count("connecting"), count("blocked")) == (2, 1, 1, 1)
    })
    .await;
    let by_client = |stream: &TcpStream| {
        let client = stream.local_addr().unwrap().to_string();
        all.iter().find(|one| one["client"] == client.as_str()).unwrap_or_else(|| panic!("{client}: {all:?}"))
    };
    let one = by_client(&named);
    let shown = |keys: [&str; 6]| keys.map(|key| one[key].clone());
    assert_eq!(
        shown(["listener", "route", "pool", "sni", "backend", "from_client"]),
        [json!("web"), json!("named"), json!("named"), json!("a.example"), json!("n"), json!(hello.len())]
    );
    assert_eq!((&one["address"], &one["peer"]), (&json!(web.address.to_string()), &Value::Null));
    assert_eq!((&by_client(&open)["route"], &by_client(&connecting)["backend"]), (&"default".into(), &Value::Null));
    assert_eq!((&by_client(&blocked)["path"], &by_client(&open)["path"]), (&"spliced".into(), &"copied".into()));
    for (query, count) in [
        ("pool=web", 3),
        ("pool=named", 1),
        ("backend=w", 3),
        ("sni=A.EXAMPLE.", 1),
        ("source=127.0.0.2", 1),
        ("source=10.0.0.0/8,unix", 0),
        ("source=127.0.0.0/8&state=blocked", 1),
        ("listener=web&state=connecting", 1),
        ("older=1h", 0),
        ("older=0s", 5),
    ] {
        assert_eq!(list(&ringway, query).await.len(), count, "{query}");
    }
    eventually_async("it is idle", async || list(&ringway, "idle=1s&pool=named").await.len() == 1).await;
    for query in
        ["limit=0", "limit=1001", "older=long", "source=host", "state=odd", "sni=a%20b", "cursor=x", "colour=red"]
    {
        let (status, answer) = get(ringway.api(), &format!("/api/sessions?{query}")).await;
        assert!(status == 400 && answer.contains("bad_query"), "{query}: {answer}");
    }

    // Both sides get a reset, also the one whose stream had ended.
    let half_id = by_client(&half)["id"].as_str().unwrap().to_owned();
    assert_eq!(delete(&ringway, &format!("/api/sessions/{half_id}")).await.0, 200);
    is_reset(&mut half).await;
    // A connection that has no backend yet can be ended too.
    let id = by_client(&connecting)["id"].as_str().unwrap().to_owned();
    assert_eq!(delete(&ringway, &format!("/api/sessions/{id}")).await, (200, json!({ "ended": 1 })));
    is_reset(&mut connecting).await;
    assert_eq!(delete(&ringway, "/api/sessions?state=blocked").await, (200, json!({ "ended": 1 })));
    is_reset(&mut blocked).await;
    let stats = std::sync::Arc::clone(&ringway.state().listeners[0].stats);
    eventually("counted", || stats.ended(EndReason::Operator) == 3).await;
    let (status, answer) = delete(&ringway, &format!("/api/sessions/{id}")).await;
    assert_eq!((status, &answer["error"]["code"]), (404, &"no_such_session".into()));
    assert!(soon("an echo", echoes(&mut open)).await, "it ended another one");
}

#[tokio::test]
async fn a_long_list_has_pages_and_every_connection_once() {
    const CONNECTIONS: usize = 700;
    let web = server().await;
    let yaml = crate::harness::static_config(&[web.address], "health_check: { kind: none }");
    let ringway = Ringway::start(&yaml).await;
    let mut open = loadtest::open(ringway.web(), CONNECTIONS).await.unwrap();
    for stream in &mut open {
        assert!(soon("an echo", echoes(stream)).await);
    }
    let (mut seen, mut pages, mut cursor) = (BTreeSet::new(), 0, String::new());
    loop {
        let (_, answer) = get(ringway.api(), &format!("/api/sessions?limit=90{cursor}")).await;
        let answer: Value = serde_json::from_str(&answer).unwrap();
        for one in answer["sessions"].as_array().unwrap() {
            assert!(seen.insert(one["id"].as_str().unwrap().to_owned()), "{one} is there twice");
        }
        pages += 1;
        match answer["next"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert_eq!(seen.len(), CONNECTIONS);
    assert!((8..11).contains(&pages), "{pages} pages");
    // Everybody at once, but not by accident.
    let (status, answer) = delete(&ringway, "/api/sessions").await;
    assert_eq!((status, &answer["error"]["code"]), (400, &"bad_query".into()));
    assert_eq!(delete(&ringway, "/api/sessions?all=true").await, (200, json!({ "ended": CONNECTIONS })));
    for stream in &mut open {
        is_reset(stream).await;
    }
    eventually_async("none is left", async || list(&ringway, "").await.is_empty()).await;
}

#[tokio::test]
async fn the_commands_list_and_end_sessions_and_need_the_token() {
    let web = server().await;
    let yaml = crate::harness::static_config(&[web.address], "health_check: { kind: none }");
    let token = crate::harness::program::file("secret\n");
    let guarded = yaml.replace("api: {", &format!("api: {{ token_file: {},", token.path().display()));
    let program = Program::start(&guarded).await;
    let mut open = loadtest::open(program.web(), 3).await.unwrap();
    for stream in &mut open {
        assert!(soon("an echo", echoes(stream)).await);
    }
    let api = program.api().to_string();
    let ask = |arguments: &[&str]| run(&[arguments, &["--api", &api]].concat());
    let with_token = |arguments: &[&str]| {
        let token = token.path().display().to_string();
        ask(&[arguments, &["--token-file", &token]].concat())
    };
    // The list tells who talks to whom.
    let (code, _, error) = ask(&["sessions"]);
    assert!(code == Some(1) && error.contains("token"), "{code:?} {error}");
    let (code, said, error) = with_token(&["sessions", "--pool", "echo", "--limit", "2"]);
    assert_eq!((code, said.lines().count()), (Some(0), 3), "{said}{error}");
    assert!(said.starts_with("ID  ") && said.contains(" echo ") && said.contains(" open"), "{said}");
    let (_, said, _) = with_token(&["sessions", "--json"]);
    let sessions: Vec<Value> = serde_json::from_str(&said).unwrap();
    assert_eq!(sessions.len(), 3);
    let id = sessions[0]["id"].as_str().unwrap();
    let (code, _, error) = ask(&["kill", id]);
    assert!(code == Some(1) && error.contains("token"), "{code:?} {error}");
    let (code, said, error) = with_token(&["kill", id]);
    assert_eq!((code, &*said), (Some(0), "ended 1 session\n"), "{error}");
    // It goes on after an id that does not exist any more.
    let other = sessions[1]["id"].as_str().unwrap();
    let (code, _, error) = with_token(&["kill", id, other]);
    assert!(code == Some(1) && error.contains("ended 1 session; ") && error.contains("no open connection"), "{error}");
    let (code, _, error) = with_token(&["kill"]);
    assert!(code == Some(1) && error.contains("give ids, or conditions"), "{error}");
    let (_, said, _) = with_token(&["kill", "--source", "127.0.0.0/8", "--dry-run"]);
    assert!(said.starts_with("ID  ") && said.ends_with("\nwould end 1 session\n"), "{said}");
    let (_, said, _) = with_token(&["kill", "--source", "127.0.0.0/8", "--older", "0s"]);
    assert_eq!(said, "ended 1 session\n");
    for stream in &mut open {
        is_reset(stream).await;
    }
}

/// While Ringway waits for a PROXY header or a ClientHello, and while it stops.
#[tokio::test]
async fn sessions_can_be_ended_at_any_time() {
    let web = server().await;
    let listener = "proxy_protocol: { from: [127.0.0.2], timeout: 1m }\nroutes: [{ sni: [a.example], pool: echo }]\nhello: { timeout: 1m }";
    let provider = format!("static: [{{ address: \"{}\" }}]", web.address);
    let yaml = crate::harness::config(&provider, listener, "health_check: { kind: none }\ndrain: 1m");
    let ringway = Ringway::start(&yaml).await;
    let mut for_header = connect_from("127.0.0.2", &ringway).await;
    let mut for_hello = connect_from("127.0.0.1", &ringway).await;
    for_hello.write_all(&client_hello("a.example", &[])[..20]).await.unwrap();
    let mut served = connect_from("127.0.0.1", &ringway).await;
    let mut other = connect_from("127.0.0.1", &ringway).await;
    assert!(soon("an echo", echoes(&mut served)).await && soon("an echo", echoes(&mut other)).await);
    eventually_async("four", async || list(&ringway, "").await.len() == 4).await;
    assert_eq!(delete(&ringway, "/api/sessions?state=connecting").await, (200, json!({ "ended": 2 })));
    is_reset(&mut for_header).await;
    is_reset(&mut for_hello).await;
    ringway.stop();
    eventually_async("no new clients", async || TcpStream::connect(ringway.web()).await.is_err()).await;
    // It still drains.
    let client = served.local_addr().unwrap().to_string();
    let list = list(&ringway, "pool=echo").await;
    let id = list.iter().find(|one| one["client"] == client.as_str()).unwrap()["id"].as_str().unwrap();
    assert_eq!(delete(&ringway, &format!("/api/sessions/{id}")).await, (200, json!({ "ended": 1 })));
    is_reset(&mut served).await;
    assert!(soon("an echo", echoes(&mut other)).await);
    // The side port ends with the last connection, so there may be no answer.
    let address = ringway.api();
    let last = tokio::spawn(async move { http(address, "DELETE", "/api/sessions?pool=echo", b"").await });
    is_reset(&mut other).await;
    let _ = last.await;
    eventually("the end", || ringway.has_ended()).await;
}
