//! The answers and the JSON errors of the side port.

use std::collections::BTreeSet;

use serde_json::json;
use tokio::io::AsyncReadExt as _;

use crate::harness::backends::{Refusing, Server};
use crate::harness::{Ringway, get, http, static_config};

#[tokio::test]
async fn a_key_goes_to_its_backend_on_the_ring() {
    let servers = [Server::echo("b0").await, Server::echo("b1").await, Server::echo("b2").await];
    let addresses = servers.each_ref().map(|server| server.address);
    let ringway = Ringway::start(&static_config(&addresses, "")).await.all_healthy().await;
    let table = ringway.state().pools[0].table.load();
    let mut seen = BTreeSet::new();
    for n in 0..20 {
        let key = format!("user-{n}");
        let expected = table.candidates(key.as_bytes()).next().unwrap().0.id.to_string();
        let answer = http(ringway.api(), "POST", &format!("/api/request?key={key}&pool=echo"), b"plain text").await;
        assert_eq!(answer.headers()["x-ringway-backend"], expected.as_str());
        assert_eq!(answer.body().trim_ascii(), format!(r#"{{"server":"{expected}","data":"plain text"}}"#).as_bytes());
        seen.insert(expected);
    }
    assert_eq!(seen.len(), 3);
}

#[tokio::test]
async fn errors_are_json_with_a_code_and_a_message() {
    let refusing = Refusing::new();
    let ringway = Ringway::start(&static_config(&[refusing.address], "")).await;
    let too_large = vec![b'x'; (1 << 20) + 1];
    let cases: [(&str, &str, &[u8], u16, &str); 7] = [
        ("GET", "/nowhere", b"", 404, "not_found"),
        ("GET", "/api/request", b"", 405, "method_not_allowed"),
        ("DELETE", "/api/status", b"", 405, "method_not_allowed"),
        ("POST", "/api/request", &too_large, 413, "body_too_large"),
        ("POST", "/api/request?pool=nope", b"", 404, "no_such_pool"),
        ("POST", "/api/request?colour=red", b"", 400, "bad_query"),
        ("POST", "/api/request", b"", 502, "connect_failed"),
    ];
    for (method, path, body, status, code) in cases {
        let answer = http(ringway.api(), method, path, body).await;
        assert_eq!(answer.status(), status, "{method} {path}");
        let json: serde_json::Value = serde_json::from_slice(answer.body()).unwrap();
        assert_eq!(json["error"]["code"], code, "{method} {path}: {json}");
        assert!(json["error"]["message"].as_str().is_some_and(|message| message.len() > 10), "{json}");
        assert_eq!(answer.headers().contains_key("allow"), status == 405, "{method} {path}");
    }
}

#[tokio::test]
async fn a_body_of_one_mebibyte_is_forwarded() {
    let server = Server::echo("a").await;
    let ringway = Ringway::start(&static_config(&[server.address], "")).await.all_healthy().await;
    let body = vec![b'x'; 1 << 20];
    let answer = http(ringway.api(), "POST", "/api/request", &body).await;
    assert_eq!(answer.status(), 200);
    assert!(answer.body().len() > 1 << 20);
}

#[tokio::test]
async fn a_backend_without_http_gives_a_bad_gateway() {
    let server = Server::start(|mut stream| async move {
        let _ = stream.read(&mut [0; 10]).await;
    })
    .await;
    let ringway = Ringway::start(&static_config(&[server.address], "")).await.all_healthy().await;
    let answer = http(ringway.api(), "POST", "/api/request", b"x").await;
    assert_eq!(answer.status(), 502);
    let json: serde_json::Value = serde_json::from_slice(answer.body()).unwrap();
    assert_eq!(json["error"]["code"], "bad_answer");
}

#[tokio::test]
async fn readyz_needs_a_healthy_backend_and_healthz_does_not() {
    let refusing = Refusing::new();
    let ringway = Ringway::start(&static_config(&[refusing.address], "")).await;
    assert_eq!(get(ringway.api(), "/healthz").await.0, 200);
    assert_eq!(get(ringway.api(), "/readyz").await.0, 503);
    let server = Server::echo("a").await;
    let ringway = Ringway::start(&static_config(&[server.address], "")).await.ready().await;
    assert_eq!(get(ringway.api(), "/readyz").await.0, 200);
}

#[tokio::test]
async fn the_status_has_a_value_in_every_documented_field() {
    let server = Server::echo("a").await;
    let ringway = Ringway::start(&static_config(&[server.address], "")).await.all_healthy().await.ready().await;
    let status: serde_json::Value = serde_json::from_str(&get(ringway.api(), "/api/status").await.1).unwrap();
    let digest = format!("{:016x}", ringway.state().pools[0].table.load().ring().digest());
    for (pointer, value) in [
        ("/version", json!(ringway::VERSION)),
        ("/pid", json!(std::process::id())),
        ("/ready", json!(true)),
        ("/listeners/0/name", json!("web")),
        ("/listeners/0/address", json!(ringway.web().to_string())),
        ("/listeners/0/pool", json!("echo")),
        ("/listeners/0/connections/active", json!(0)),
        ("/listeners/0/connections/total", json!(0)),
        ("/pools/0/name", json!("echo")),
        ("/pools/0/key", json!("source")),
        ("/pools/0/ring/digest", json!(digest)),
        ("/pools/0/ring/points", json!(160)),
        ("/pools/0/ring/virtual_nodes", json!(160)),
        ("/pools/0/ring/probes", json!(3)),
        ("/pools/0/backends/0/id", json!("b0")),
        ("/pools/0/backends/0/address", json!(server.address.to_string())),
        ("/pools/0/backends/0/state", json!("healthy")),
        ("/pools/0/backends/0/weight", json!(1)),
        ("/pools/0/backends/0/share", json!(1.0)),
        // A static backend is not a replica.
        ("/pools/0/backends/0/replica", json!(null)),
        ("/pools/0/backends/0/restarts", json!(0)),
        ("/pools/0/backends/0/connections/active", json!(0)),
        ("/pools/0/backends/0/connections/total", json!(0)),
        ("/pools/0/backends/0/connections/failed", json!(0)),
        ("/pools/0/backends/0/bytes/from_client", json!(0)),
        ("/pools/0/backends/0/bytes/to_client", json!(0)),
        ("/pools/0/backends/0/health/last", json!("ok")),
    ] {
        assert_eq!(status.pointer(pointer), Some(&value), "{pointer} in {status}");
    }
    for pointer in ["/uptime_seconds", "/pools/0/backends/0/health/since_seconds"] {
        let seconds = status.pointer(pointer).and_then(serde_json::Value::as_f64);
        assert!(seconds.is_some_and(|seconds| seconds >= 0.0), "{pointer} in {status}");
    }
}
