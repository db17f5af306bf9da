//! A real Prometheus scrapes Ringway: the alerts load, and each expression of the alerts and of the dashboard has an answer.

use std::net::SocketAddr;
use std::process::{Command, Stdio};

use ringway::api::encoded;
use serde_json::Value;

use crate::documents::expressions;
use crate::harness::program::{Killed, Program};
use crate::harness::{THREE_REPLICAS, config, eventually_async, get, http, require_tool};

async fn query(address: SocketAddr, path: &str) -> Value {
    serde_json::from_str(&get(address, path).await.1).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_expression_answers_in_a_real_prometheus() {
    if !require_tool("prometheus") {
        return;
    }
    let program = Program::start(&config(THREE_REPLICAS, "", "")).await.ready().await;
    let folder = tempfile::tempdir().unwrap();
    let own = concat!(env!("CARGO_MANIFEST_DIR"), "/docker/prometheus.yml");
    let shipped = std::fs::read_to_string(own).unwrap();
    let settings = shipped
        .replace("alerts.yml", concat!(env!("CARGO_MANIFEST_DIR"), "/docker/alerts.yml"))
        .replace("ringway:8001", &program.api().to_string())
        .replace(": 5s", ": 1s");
    let file = folder.path().join("prometheus.yml");
    std::fs::write(&file, settings).unwrap();
    // A free port: the system's choice of a moment ago.
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let _prometheus = Killed(
        Command::new("prometheus")
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    eventually_async("Prometheus", async || tokio::net::TcpStream::connect(address).await.is_ok()).await;
    eventually_async("two scrapes", async || {
        http(program.web(), "GET", "/heartbeat", b"").await;
        let path = format!("/api/v1/query?query={}", encoded("count_over_time(ringway_ready[1m]) > 2"));
        let (status, body) = get(address, &path).await;
        status == 200 && body.contains("\"value\"")
    })
    .await;
    let mut silent = Vec::new();
    for expression in expressions() {
        let answer = query(address, &format!("/api/v1/query?query={}", encoded(&expression))).await;
        assert_eq!(answer["status"], "success", "{expression}: {answer}");
        let is_silent = answer["data"]["result"].as_array().is_some_and(Vec::is_empty);
        // Conditions need not be met, and this Ringway has no Docker engine.
        let may_be_silent = [" > ", " == ", " != ", "engine"].iter().any(|part| expression.contains(part));
        if is_silent && !may_be_silent {
            silent.push(expression);
        }
    }
    assert!(silent.is_empty(), "without an answer: {silent:#?}");
    let rules = query(address, "/api/v1/rules").await;
    let rules = rules["data"]["groups"][0]["rules"].as_array().unwrap().clone();
    assert!(rules.len() > 5 && rules.iter().all(|rule| rule["health"] != "err"), "{rules:#?}");
    for label in ["instance", "pool"] {
        let values = query(address, &format!("/api/v1/label/{label}/values")).await;
        assert!(!values["data"].as_array().unwrap().is_empty(), "{label}: {values}");
    }
}
