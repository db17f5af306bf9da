//! Host names of static backends: several addresses, unknown names, and a name server that does not answer.

use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::time::Duration;

use rustix::process::Signal;
use tempfile::NamedTempFile;

use crate::harness::backends::Server;
use crate::harness::program::{Program, file};
use crate::harness::{config, eventually, eventually_async, http, skip, soon};

/// Whether this process may mount its own `/etc/hosts`.
fn may_mount() -> bool {
    let may = rustix::process::geteuid().is_root();
    if !may {
        skip("only root can give a process its own /etc/hosts");
    }
    may
}

/// A config with two static backends, and checks that find a change soon.
fn two(first: &str, second: &str) -> String {
    let backends = format!("static: [{{ address: \"{first}\", id: a }}, {{ address: \"{second}\", id: b }}]");
    config(&backends, "", "health_check: { interval: 50ms, fall: 1, rise: 1 }")
}

/// A resolver without servers: every name that `/etc/hosts` lacks is unknown.
fn nobody() -> NamedTempFile {
    file("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
}

async fn states(program: &Program) -> Vec<String> {
    let status = program.status().await;
    let backends = status["pools"][0]["backends"].as_array().unwrap();
    backends.iter().map(|backend| backend["state"].as_str().unwrap().to_owned()).collect()
}

async fn becomes(program: &Program, wanted: [&str; 2]) {
    eventually_async(&format!("{wanted:?}"), async || states(program).await == wanted).await;
}

/// Changes the file in place, because the program has mounted it.
fn write(file: &NamedTempFile, text: &str) {
    std::fs::write(file.path(), text).unwrap();
}

#[tokio::test]
async fn a_dead_address_of_a_name_does_not_hide_another_one() {
    if !may_mount() {
        return;
    }
    let here = Server::echo_at("127.0.0.3:0").await;
    let port = here.address.port();
    let hosts = file("127.0.0.2 twofold.test\n127.0.0.3 twofold.test\n");
    let yaml = two(&format!("twofold.test:{port}"), &here.address.to_string());
    let program = Program::start_with_names(&yaml, hosts.path(), nobody().path()).await.ready().await;
    becomes(&program, ["healthy", "healthy"]).await;
    // The server moves to the other address.
    drop(here);
    let _there = Server::echo_at(&format!("127.0.0.2:{port}")).await;
    becomes(&program, ["healthy", "unhealthy"]).await;
    let there = format!("127.0.0.2:{port}");
    eventually_async("the other address", async || {
        program.status().await["pools"][0]["backends"][0]["address"] == there
    })
    .await;
    becomes(&program, ["healthy", "unhealthy"]).await;
}

#[tokio::test]
async fn a_backend_with_an_unknown_name_starts_once_the_name_is_known() {
    if !may_mount() {
        return;
    }
    let server = Server::echo("a").await;
    let hosts = file("127.0.0.1 localhost\n");
    let yaml = two(&server.address.to_string(), &format!("late.test:{}", server.address.port()));
    let program = Program::start_with_names(&yaml, hosts.path(), nobody().path()).await;
    becomes(&program, ["healthy", "starting"]).await;
    let warning = "pools[echo].provider.static[b].address: cannot resolve \"late.test\"";
    eventually(warning, || program.log().contains(warning)).await;
    assert_eq!(http(program.web(), "GET", "/heartbeat", b"").await.status(), 200);
    // A reload that leaves the name alone succeeds, one that adds another unknown name does not.
    program.write_config(&yaml.replace("drain: 100ms", "drain: 200ms"));
    assert_eq!(http(program.api(), "POST", "/api/reload", b"").await.status(), 200);
    program.write_config(&yaml.replace("late.test", "wrong.test"));
    assert_eq!(http(program.api(), "POST", "/api/reload", b"").await.status(), 409);
    program.write_config(&yaml);
    write(&hosts, "127.0.0.1 localhost late.test\n");
    becomes(&program, ["healthy", "healthy"]).await;
    // It can also leave while it is unknown.
    write(&hosts, "127.0.0.1 localhost\n");
    assert_eq!(http(program.api(), "DELETE", "/api/pools/echo/backends/b", b"").await.status(), 200);
    eventually_async("b has left", async || states(&program).await == ["healthy"]).await;
}

/// Each look-up of a silent name server takes ten seconds.
#[tokio::test]
async fn look_ups_run_side_by_side_and_a_stop_does_not_wait_for_them() {
    if !may_mount() {
        return;
    }
    let silent = UdpSocket::bind("127.0.0.153:53").unwrap();
    silent.set_nonblocking(true).unwrap();
    let resolver = file("nameserver 127.0.0.153\n");
    let server = Server::echo("a").await;
    let yaml = two(&server.address.to_string(), &server.address.to_string());
    let hosts = file("127.0.0.1 localhost\n");
    let mut program = Program::start_with_names(&yaml, hosts.path(), resolver.path()).await.ready().await;
    let names: Vec<_> = (0..8).map(|n| format!("{{ address: \"name{n}.test:80\" }}")).collect();
    program.write_config(&config(&format!("static: [{}]", names.join(", ")), "", ""));
    let reload = tokio::spawn({
        let api = program.api();
        async move { http(api, "POST", "/api/reload", b"").await.status().as_u16() }
    });
    let (mut asked, mut query) = (BTreeSet::new(), [0; 512]);
    eventually("all names asked", || {
        while let Ok(length) = silent.recv(&mut query) {
            // The first label of the question (RFC 1035, section 4.1).
            asked.insert(query[12..length.min(18)].to_vec());
        }
        asked.len() == 8
    })
    .await;
    assert!(!reload.is_finished(), "the names are asked one after the other");
    assert_eq!(soon("status", http(program.api(), "GET", "/api/status", b"")).await.status(), 200);
    program.signal(Signal::TERM);
    assert!(tokio::time::timeout(Duration::from_secs(9), program.ended()).await.unwrap().success());
}
