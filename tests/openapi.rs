//! The description of the side port's calls: it has every route, and real answers are as it says.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use jsonschema::Validator;
use serde_json::{Value, json};

use crate::harness::backends::Server;
use crate::harness::program::Program;
use crate::harness::{http, static_config};

async fn description(program: &Program) -> Value {
    let answer = http(program.api(), "GET", "/api/openapi.json", b"").await;
    assert_eq!(answer.headers()["content-type"], "application/json");
    serde_json::from_slice(answer.body()).unwrap()
}

/// Every path in the source of the side port.
fn routes() -> BTreeSet<String> {
    let mut paths = BTreeSet::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src/api")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let source = std::fs::read_to_string(&path).unwrap();
                let source = source.split("#[cfg(test)]").next().unwrap();
                // `.route("/path", …)`, and the files of the page: `("/path", "type", …)`.
                for before in [".route(\"/", "    (\"/"] {
                    let found = source.split(before).skip(1).filter_map(|rest| rest.split('"').next());
                    paths.extend(found.map(|path| format!("/{path}")));
                }
            }
        }
    }
    paths
}

#[tokio::test]
async fn the_description_has_every_route_with_its_methods() {
    let server = Server::echo("a").await;
    let program = Program::start(&static_config(&[server.address], "")).await;
    let description = description(&program).await;
    let described = description["paths"].as_object().unwrap();
    assert_eq!(described.keys().cloned().collect::<BTreeSet<_>>(), routes());
    for (path, operations) in described {
        let example = path.replace("{pool}", "echo").replace("{backend}", "b0").replace("{id}", "0000000000000001");
        let answer = http(program.api(), "PROPFIND", &example, b"").await;
        assert_eq!(answer.status(), 405, "{path}");
        let allowed = answer.headers()["allow"].to_str().unwrap().to_ascii_lowercase();
        // A GET answers HEAD too.
        let allowed: BTreeSet<_> = allowed.split(',').filter(|method| *method != "head").collect();
        let methods: BTreeSet<_> = operations.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(methods, allowed, "{path}");
    }
}

/// The schemas of answers, by operation and status.
fn validators(description: &Value) -> BTreeMap<(String, String), Validator> {
    let mut found = BTreeMap::new();
    let paths = description["paths"].as_object().unwrap();
    for operation in paths.values().flat_map(|operations| operations.as_object().unwrap().values()) {
        for (status, response) in operation["responses"].as_object().unwrap() {
            let pointer = response["$ref"].as_str().and_then(|reference| reference.strip_prefix('#'));
            let response = pointer.map_or(response, |pointer| description.pointer(pointer).unwrap());
            let schema = &response["content"]["application/json"]["schema"];
            if schema.is_object() {
                let whole = json!({
                    "$schema": "https://json-schema.org/draft/2020-12/schema",
                    "allOf": [schema], "components": description["components"],
                });
                let name = operation["operationId"].as_str().unwrap().to_owned();
                found.insert((name, status.clone()), jsonschema::validator_for(&whole).unwrap());
            }
        }
    }
    found
}

#[tokio::test]
async fn real_answers_are_as_the_description_says() {
    let servers = [Server::echo("a").await, Server::echo("b").await];
    let yaml = static_config(&servers.each_ref().map(|server| server.address), "");
    let program = Program::start(&yaml).await.ready().await;
    let mut open = tokio::net::TcpStream::connect(program.web()).await.unwrap();
    assert!(crate::harness::echoes(&mut open).await);
    let validators = validators(&description(&program).await);
    let b0 = "/api/pools/echo/backends/b0";
    crate::harness::eventually_async("a history", async || {
        http(program.api(), "GET", "/api/history?pool=echo", b"").await.status() == 200
    })
    .await;
    let cases: &[(&str, &str, &str, &str, u16)] = &[
        ("status", "GET", "/api/status", "", 200),
        ("explain", "GET", "/api/explain?from=10.0.0.9:5000&without=b0", "", 200),
        ("explain", "GET", "/api/explain?from=nobody", "", 400),
        ("explain", "GET", "/api/explain?target=nothing", "", 404),
        ("sessions", "GET", "/api/sessions?limit=1", "", 200),
        ("sessions", "GET", "/api/sessions?limit=0", "", 400),
        ("events", "GET", "/api/events", "", 200),
        ("events", "GET", "/api/events?after=x", "", 400),
        ("history", "GET", "/api/history?pool=echo&backend=b0&step=1", "", 200),
        ("history", "GET", "/api/history?pool=none", "", 404),
        ("drain", "POST", &format!("{b0}/drain?dry_run=true"), "{\"within_seconds\": 5}", 200),
        ("drain", "POST", &format!("{b0}/drain?dry_run=maybe"), "", 400),
        ("drain", "POST", "/api/pools/none/backends/b0/drain", "", 404),
        ("undrain", "POST", &format!("{b0}/undrain"), "", 200),
        ("weight", "POST", &format!("{b0}/weight?dry_run=true"), "{\"weight\": 5}", 200),
        ("weight", "POST", &format!("{b0}/weight"), "{\"weight\": 1001}", 400),
        ("add", "POST", "/api/pools/echo/backends", "{\"address\": \"127.0.0.1:1\", \"id\": \"b0\"}", 409),
        ("add", "POST", "/api/pools/echo/backends?dry_run=true", "{\"address\": \"127.0.0.1:1\"}", 200),
        ("remove", "DELETE", &format!("{b0}?dry_run=true"), "", 200),
        ("rebalance", "POST", "/api/pools/echo/rebalance", "{\"over_seconds\": 60}", 409),
        ("rollout", "POST", "/api/pools/echo/rollout", "{\"image\": \"web:2\"}", 409),
        ("rollout", "POST", "/api/pools/echo/rollout", "{\"image\": \"web:2\", \"abort\": true}", 400),
        ("scale", "POST", "/api/pools/echo/scale", "{\"replicas\": 2}", 409),
        ("reload", "POST", "/api/reload?dry_run=true", "", 200),
        ("reload", "POST", "/api/reload?dry_run=true", "pools: 5", 400),
        ("log", "POST", "/api/log?dry_run=true", "{\"filter\": \"debug\"}", 200),
        ("log", "POST", "/api/log", "{\"filter\": \"loud\"}", 400),
        ("reopen", "POST", "/api/log/reopen", "", 409),
        ("upgrade", "POST", "/api/upgrade?dry_run=true", "", 200),
        ("request", "POST", "/api/request?pool=none", "", 404),
        ("endSession", "DELETE", "/api/sessions/0000000000000001", "", 404),
        ("endSessions", "DELETE", "/api/sessions", "", 400),
        ("endSessions", "DELETE", "/api/sessions?pool=none", "", 200),
    ];
    for (operation, method, path, body, status) in cases {
        let answer = http(program.api(), method, path, body.as_bytes()).await;
        let value: Value = serde_json::from_slice(answer.body()).unwrap();
        assert_eq!(answer.status(), *status, "{method} {path}: {value}");
        let validator = &validators[&((*operation).to_owned(), status.to_string())];
        let faults: Vec<_> = validator.iter_errors(&value).map(|fault| fault.to_string()).collect();
        assert!(faults.is_empty(), "{method} {path}: {faults:#?}\n{value:#}");
    }
    // The validators can fail.
    let validator = &validators[&("status".to_owned(), "200".to_owned())];
    assert!(!validator.is_valid(&json!({ "version": 1 })));
    // Nothing of the above was more than a forecast.
    assert_eq!(program.status().await["pools"][0]["differs"], json!([]));
}
