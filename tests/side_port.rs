//! The answers and the JSON errors of the side port.

use std::collections::BTreeSet;

use rustix::process::Signal;
use serde_json::json;
use tokio::io::AsyncReadExt as _;

use crate::changes::cli;
use crate::harness::backends::{Refusing, Server};
use crate::harness::program::{Program, run};
use crate::harness::{
    Ringway, THREE_REPLICAS, config, eventually, get, http, http_with, metric_in, require_tool, skip, static_config,
};

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

/// A web page can make a browser call this port under a name that it chooses (DNS rebinding).
#[tokio::test]
async fn calls_under_api_must_name_this_host() {
    let server = Server::echo("a").await;
    let ringway = Ringway::start(&static_config(&[server.address], "")).await.all_healthy().await;
    let call = async |method, path, host| {
        http_with(ringway.api(), method, path, &[("host", host)], b"").await.status().as_u16()
    };
    for (method, path) in [("GET", "/api/status"), ("POST", "/api/request"), ("POST", "/api/reload")] {
        assert_eq!(call(method, path, "evil.example").await, 421, "{path}");
        assert_ne!(call(method, path, "localhost").await, 421, "{path}");
    }
    // Scrapers and load balancers call these by any name.
    for path in ["/metrics", "/healthz", "/readyz"] {
        assert_ne!(call("GET", path, "ringway.example").await, 421, "{path}");
    }
    assert_eq!(ringway.metric("ringway_api_rejected_total", &["foreign_host"]).await, 3.0);
}

#[tokio::test]
async fn requests_reach_the_servers_with_the_token_only_unless_the_config_allows_them() {
    let server = Server::echo("a").await;
    let yaml = static_config(&[server.address], "");
    let public = yaml.replacen("api: { listen", "api: { public_request: true, listen", 1);
    for (yaml, anonymous) in [(&yaml, 401), (&public, 200)] {
        let program = Program::start_with(yaml, &[("RINGWAY_TOKEN", "secret")]).await.ready().await;
        let host = program.api().to_string();
        let call = async |headers: &[(&str, &str)]| {
            let headers = [&[("host", host.as_str())], headers].concat();
            http_with(program.api(), "POST", "/api/request", &headers, b"x").await.status().as_u16()
        };
        assert_eq!(call(&[]).await, anonymous);
        assert_eq!(call(&[("authorization", "Bearer secret")]).await, 200);
        assert_eq!(call(&[("origin", "http://evil.example")]).await, 403);
    }
}

#[tokio::test]
async fn the_log_names_the_caller_of_a_command_and_of_a_rejected_one() {
    let server = Server::echo("a").await;
    let yaml = static_config(&[server.address], "");
    let program = Program::start_with(&yaml, &[("RINGWAY_TOKEN", "secret")]).await.ready().await;
    let host = program.api().to_string();
    for token in ["Bearer wrong", "Bearer guess", "Bearer secret"] {
        let headers = [("host", host.as_str()), ("authorization", token)];
        http_with(program.api(), "POST", "/api/reload", &headers, b"").await;
    }
    program.signal(Signal::HUP);
    eventually("a reload by a signal", || {
        program.log().contains("command done: reload command=\"reload\" caller=a signal")
    })
    .await;
    let log = program.log();
    assert!(log.contains("command done: reload command=\"reload\" caller=127.0.0.1:"), "{log}");
    // The second one is only counted.
    let rejected: Vec<_> = log.lines().filter(|line| line.contains("rejected a call")).collect();
    assert!(rejected.len() == 1 && rejected[0].contains("why=\"unauthorized\""), "{log}");
    let text = get(program.api(), "/metrics").await.1;
    assert_eq!(metric_in(&text, "ringway_api_rejected_total", &["unauthorized"]), 2.0);
    let (_, _, stderr) = run(&["reload", "--api", &host]);
    assert!(stderr.contains("wrong or missing token: use --token-file or RINGWAY_TOKEN"), "{stderr}");
}

/// A replica runs as the same user as Ringway.
#[tokio::test]
async fn a_process_of_the_same_user_cannot_read_the_token() {
    if !rustix::process::geteuid().is_root() || !require_tool("setpriv") {
        return skip("the test needs root, to run Ringway as another user");
    }
    let user = ["--reuid", "65534", "--regid", "65534", "--clear-groups", "--inh-caps=-all"];
    let yaml = config(THREE_REPLICAS, "", "");
    let program = Program::start_as(&user, &yaml, &[("RINGWAY_TOKEN", "secret")]).await.ready().await;
    let environ = format!("/proc/{}/environ", program.pid().as_raw_nonzero());
    let read = std::process::Command::new("setpriv").args(user).arg("cat").arg(&environ).output().unwrap();
    assert!(!read.status.success(), "{}", String::from_utf8_lossy(&read.stdout));
    let replica = format!("/proc/{}/environ", program.replicas().await[0].as_raw_nonzero());
    assert!(!std::fs::read_to_string(replica).unwrap().contains("secret"));
    // Ringway itself still counts its descriptors there.
    let text = get(program.api(), "/metrics").await.1;
    assert!(metric_in(&text, "ringway_open_files", &[]) > 5.0);
}

#[tokio::test]
async fn the_id_of_a_backend_is_one_word() {
    let server = Server::echo("a").await;
    let ringway = Ringway::start(&static_config(&[server.address], "")).await;
    for id in ["", "two words", "line\nbreak", "tab\t", "\u{7f}"] {
        let body = json!({ "address": "127.0.0.1:1", "id": id }).to_string();
        let answer = http(ringway.api(), "POST", "/api/pools/echo/backends", body.as_bytes()).await;
        assert_eq!(answer.status(), 400, "{id:?}");
    }
}

#[tokio::test]
async fn the_log_shows_something_else_until_it_is_reset_or_the_time_is_over() {
    let server = Server::echo("b0").await;
    let program = Program::start(&static_config(&[server.address], "")).await.ready().await;
    let (code, _, stderr) = cli(&program, &["log", "debgu"]).await;
    assert!(code == Some(1) && stderr.contains("\"debgu\" is not a level: use one of error, warn"), "{stderr}");
    let (code, stdout, stderr) = cli(&program, &["log", "warn,ringway::app=debug", "--for", "1h"]).await;
    assert_eq!((code, stdout.as_str()), (Some(0), "log: warn,ringway::app=debug for 1h, then info\n"), "{stderr}");
    let shown = async || cli(&program, &["log"]).await.1;
    assert_eq!(shown().await, "warn,ringway::app=debug for 1 h more\n");
    assert_eq!(cli(&program, &["log", "off"]).await.0, Some(0));
    assert_eq!(shown().await, "off\n");
    assert_eq!(cli(&program, &["weight", "echo/b0", "2"]).await.0, Some(0));
    let (code, stdout, _) = cli(&program, &["log", "--reset"]).await;
    assert_eq!((code, stdout.as_str()), (Some(0), "log: info, as at the start\n"));
    assert_eq!(cli(&program, &["weight", "echo/b0", "3"]).await.0, Some(0));
    eventually("a line", || program.log().contains("command done: weight echo/b0 3")).await;
    assert!(!program.log().contains("weight echo/b0 2"), "{}", program.log());
    let (code, _, _) = cli(&program, &["log", "off", "--for", "1ms"]).await;
    assert_eq!(code, Some(0));
    eventually("the usual log", || program.log().contains("the log is as at the start again")).await;
    assert_eq!(shown().await, "info\n");
}
