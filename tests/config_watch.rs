//! `config_watch`: Ringway reloads by itself when its config changes.

use std::path::Path;
use std::time::Duration;

use tokio::net::TcpStream;

use crate::harness::backends::Server;
use crate::harness::program::Program;
use crate::harness::{echoes, eventually, eventually_async, get, http, metric_in, soon, static_config};

/// A config that watches itself, with more keys of the watch.
fn watching(keys: &str, pool: &str) -> String {
    format!("config_watch: {{ settle: 200ms, {keys} }}\n{pool}")
}

async fn drain_seconds(program: &Program) -> f64 {
    program.status().await["pools"][0]["drain_seconds"].as_f64().unwrap()
}

async fn drain_becomes(program: &Program, seconds: f64) {
    eventually_async(&format!("a drain of {seconds} s"), async || drain_seconds(program).await == seconds).await;
}

async fn metric(program: &Program, name: &str, label: &str) -> f64 {
    metric_in(&get(program.api(), "/metrics").await.1, name, &[label])
}

async fn reloads(program: &Program) -> f64 {
    metric(program, "ringway_config_reloads_total", "").await
}

/// Replaces a file, as editors do.
fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, path).unwrap();
}

#[tokio::test]
async fn a_changed_config_is_applied_and_an_unchanged_one_is_not() {
    let server = Server::echo("a").await;
    let yaml = watching("poll: 1h", &static_config(&[server.address], "drain: 1s"));
    let program = Program::start(&yaml).await.ready().await;
    program.write_config(&yaml.replace("drain: 1s", "drain: 2s"));
    drain_becomes(&program, 2.0).await;
    replace(program.config_path(), &yaml.replace("drain: 1s", "drain: 3s"));
    drain_becomes(&program, 3.0).await;
    assert_eq!(reloads(&program).await, 2.0);
    // The same content again, several times and each time for longer than it takes to settle.
    for _ in 0..3 {
        program.write_config(&yaml.replace("drain: 1s", "drain: 3s"));
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    assert_eq!(reloads(&program).await, 2.0, "a file without a change was reloaded");
    // A file that is away for a moment is no config.
    std::fs::remove_file(program.config_path()).unwrap();
    let refused = "the file does not exist";
    eventually_async(refused, async || program.status().await["config_error"].to_string().contains(refused)).await;
    assert_eq!(drain_seconds(&program).await, 3.0);
    program.write_config(&yaml.replace("drain: 1s", "drain: 4s"));
    drain_becomes(&program, 4.0).await;
    // The watch can be turned off, and on again.
    program.write_config(&yaml.replace("drain: 1s", "drain: 5s").replace("config_watch", "x-watch"));
    drain_becomes(&program, 5.0).await;
    program.write_config(&yaml.replace("drain: 1s", "drain: 6s"));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(drain_seconds(&program).await, 5.0, "applied without a watch");
    assert_eq!(http(program.api(), "POST", "/api/reload", b"").await.status(), 200);
    program.write_config(&yaml.replace("drain: 1s", "drain: 7s"));
    drain_becomes(&program, 7.0).await;
}

#[tokio::test]
async fn a_faulty_config_is_refused_once_and_shown() {
    let server = Server::echo("a").await;
    let yaml = watching("poll: 100ms", &static_config(&[server.address], "drain: 1s"));
    let program = Program::start(&yaml).await.ready().await;
    program.write_config(&yaml.replace("drain: 1s", "drain: soon"));
    let fault = "pools[echo].drain";
    eventually_async(fault, async || program.status().await["config_error"].to_string().contains(fault)).await;
    assert_eq!(metric(&program, "ringway_config_file_differs", "").await, 1.0);
    // The poll looks again and again, and says nothing more.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(metric(&program, "ringway_config_reloads_total", "failed").await, 1.0);
    assert_eq!(drain_seconds(&program).await, 1.0);
    program.write_config(&yaml.replace("drain: 1s", "drain: 2s"));
    drain_becomes(&program, 2.0).await;
    assert!(program.status().await["config_error"].is_null());
    assert_eq!(metric(&program, "ringway_config_file_differs", "").await, 0.0);
}

#[tokio::test]
async fn included_files_and_lists_are_watched_too() {
    let server = Server::echo("a").await;
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let pool = |name: &str| {
        format!("pools:\n  - {{ name: {name}, provider: {{ static: [{{ address: \"{}\" }}] }} }}\n", server.address)
    };
    std::fs::write(at("deny"), "192.0.2.1\n").unwrap();
    std::fs::write(at("a.yaml"), pool("a")).unwrap();
    let yaml = static_config(&[server.address], "");
    let deny = format!("    deny: {{ file: {} }}\n    pool: echo", at("deny").display());
    let yaml = yaml.replacen("    pool: echo", &deny, 1);
    let yaml = watching("poll: 1h", &format!("include: {}/*.yaml\n{yaml}", folder.path().display()));
    let program = Program::start(&yaml).await.ready().await;
    let pools = async || -> Vec<String> {
        let status = program.status().await;
        status["pools"].as_array().unwrap().iter().map(|pool| pool["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(pools().await, ["echo", "a"]);
    // A reload by an operator is not repeated.
    assert_eq!(http(program.api(), "POST", "/api/reload", b"").await.status(), 200);
    // One more file, a change of one, and a fault in one that is mended in place.
    std::fs::write(at("b.yaml"), pool("b")).unwrap();
    eventually_async("a new file", async || pools().await == ["echo", "a", "b"]).await;
    replace(&at("a.yaml"), &pool("c"));
    eventually_async("a changed file", async || pools().await == ["echo", "c", "b"]).await;
    std::fs::write(at("b.yaml"), "pools: [").unwrap();
    eventually_async("a fault", async || program.status().await["config_error"].is_string()).await;
    std::fs::write(at("b.yaml"), pool("d")).unwrap();
    eventually_async("the mended file", async || pools().await == ["echo", "c", "d"]).await;
    let before = reloads(&program).await;
    std::fs::write(at("deny"), "192.0.2.1\n192.0.2.2\n").unwrap();
    eventually_async("the list", async || reloads(&program).await > before).await;
}

#[tokio::test]
async fn a_change_that_moves_too_many_keys_waits_for_an_operator() {
    let (one, two) = (Server::echo("a").await, Server::echo("b").await);
    let yaml =
        |addresses: &[std::net::SocketAddr]| watching("poll: 1h, max_keys_moved: 20", &static_config(addresses, ""));
    let program = Program::start(&yaml(&[one.address])).await.ready().await;
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("access.log");
    let more = format!("access_log: {{ path: {} }}\n{}", log.display(), yaml(&[one.address, two.address]));
    program.write_config(&more);
    let held = "of the keys of pool echo would move";
    eventually_async(held, async || program.status().await["config_error"].to_string().contains(held)).await;
    eventually("the log", || program.log().contains("config_watch.max_keys_moved is 20 %")).await;
    assert_eq!(program.status().await["pools"][0]["backends"].as_array().unwrap().len(), 1);
    assert!(!log.exists(), "a change that was held has opened the access log");
    assert_eq!(http(program.api(), "POST", "/api/reload", b"").await.status(), 200);
    assert_eq!(program.status().await["pools"][0]["backends"].as_array().unwrap().len(), 2);
    assert!(log.exists());
    assert!(program.status().await["config_error"].is_null());
}

/// The successor watches, and the old process does not while it drains.
#[tokio::test]
async fn the_watch_goes_on_after_an_upgrade() {
    let server = Server::echo("a").await;
    let yaml = watching("poll: 1h", &static_config(&[server.address], "drain: 1s"));
    let mut program = Program::start(&yaml).await.ready().await;
    // The old process drains for as long as this is open.
    let mut open = TcpStream::connect(program.web()).await.unwrap();
    assert!(soon("an echo", echoes(&mut open)).await);
    program.upgrade().await;
    program.write_config(&yaml.replace("drain: 1s", "drain: 2s"));
    drain_becomes(&program, 2.0).await;
    assert_eq!(program.log().matches("caller=the watch of the config").count(), 1, "{}", program.log());
}
