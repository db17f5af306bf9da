//! The provider `file`: a pool's backends follow a list that some tool writes.

use std::path::Path;
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use crate::harness::backends::Server;
use crate::harness::{Ringway, config, echoes, eventually, eventually_async, get, soon};

/// A pool that follows this file.
fn yaml(file: &Path) -> String {
    let provider = format!("file: {{ path: \"{}\" }}", file.display());
    config(&provider, "", "health_check: { interval: 50ms, fall: 1, rise: 1 }")
}

/// A list of backends with these ids.
fn list(backends: &[(&str, &Server)]) -> String {
    let entries: Vec<_> =
        backends.iter().map(|(id, server)| format!("- {{ id: {id}, address: \"{}\" }}\n", server.address)).collect();
    if entries.is_empty() { "[]".to_owned() } else { entries.concat() }
}

/// The ids of the backends that stay.
fn ids(ringway: &Ringway) -> Vec<String> {
    let table = ringway.state().pools[0].table.load();
    let stays = table.backends().iter().filter(|backend| !backend.drain.is_some_and(|drain| drain.leaves));
    stays.map(|backend| backend.id.to_string()).collect()
}

async fn become_ids(ringway: &Ringway, expected: &[&str]) {
    eventually(&format!("{expected:?}"), || ids(ringway) == expected).await;
}

async fn provider(ringway: &Ringway) -> serde_json::Value {
    let status: serde_json::Value = serde_json::from_str(&get(ringway.api(), "/api/status").await.1).unwrap();
    status["pools"][0]["provider"].clone()
}

struct Bench {
    folder: TempDir,
    one: Server,
    two: Server,
    three: Server,
}

impl Bench {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { folder, one: Server::echo("a").await, two: Server::echo("b").await, three: Server::echo("c").await }
    }

    fn at(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.at(name), text).unwrap();
    }

    /// Replaces the file, as most tools do.
    fn replace(&self, name: &str, text: &str) {
        self.write("new", text);
        std::fs::rename(self.at("new"), self.at(name)).unwrap();
    }
}

#[tokio::test]
async fn the_backends_follow_a_file_that_is_replaced_or_written() {
    let bench = Bench::new().await;
    bench.write("list", &list(&[("a", &bench.one), ("b", &bench.two)]));
    let ringway = Ringway::start(&yaml(&bench.at("list"))).await.all_healthy().await;
    assert_eq!(ids(&ringway), ["a", "b"]);
    let before = ringway.mapping();
    bench.replace("list", &list(&[("c", &bench.three), ("b", &bench.two), ("a", &bench.one)]));
    become_ids(&ringway, &["a", "b", "c"]).await;
    let ringway = ringway.all_healthy().await;
    assert!(ringway.mapping().iter().all(|(key, owner)| *owner == before[key] || owner == "c"));
    bench.write("list", &list(&[("a", &bench.one)]));
    become_ids(&ringway, &["a"]).await;
    // In the form of Prometheus, with a weight.
    let target = bench.two.address;
    bench.write("list", &format!("[{{\"targets\": [\"{target}\"], \"labels\": {{\"weight\": \"3\"}}}}]"));
    become_ids(&ringway, &[&target.to_string()]).await;
    let ringway = ringway.all_healthy().await;
    eventually("one backend", || ringway.states().len() == 1).await;
    assert_eq!(ringway.backend(0).weight, 3);
    // An empty list is a list.
    bench.replace("list", &list(&[]));
    become_ids(&ringway, &[]).await;
    let changes = async |kind: &str| ringway.metric("ringway_provider_changes_total", &[&format!("\"{kind}\"")]).await;
    assert_eq!([changes("joined").await, changes("left").await], [4.0, 4.0]);
}

#[tokio::test]
async fn a_faulty_file_changes_nothing_and_says_so() {
    let bench = Bench::new().await;
    bench.write("list", &list(&[("a", &bench.one)]));
    let ringway = Ringway::start(&yaml(&bench.at("list"))).await.all_healthy().await;
    let faulty = [
        ("", "the file is empty"),
        ("- { adress: \"10.0.0.5:80\" }", "did you mean \\\"address\\\""),
        ("- [", "not valid YAML"),
        ("[{ address: \"a:1\", weight: 1000 }, { address: \"b:1\", weight: 0 }]", "weight"),
    ];
    for (text, says) in faulty {
        bench.replace("list", text);
        eventually_async(says, async || provider(&ringway).await["file"]["error"].to_string().contains(says)).await;
        assert_eq!(ids(&ringway), ["a"]);
        assert_eq!(ringway.metric("ringway_provider_file_faulty", &[]).await, 1.0);
    }
    std::fs::remove_file(bench.at("list")).unwrap();
    let gone = "does not exist";
    eventually_async(gone, async || provider(&ringway).await["file"]["error"].to_string().contains(gone)).await;
    assert_eq!(ids(&ringway), ["a"]);
    // The same list again is no change, and no fault any more.
    let generation = ringway.state().pools[0].table.load().generation();
    bench.write("list", &list(&[("a", &bench.one)]));
    eventually_async("no error", async || provider(&ringway).await["file"]["error"].is_null()).await;
    assert_eq!(ringway.state().pools[0].table.load().generation(), generation);
    assert_eq!(ringway.metric("ringway_provider_file_faulty", &[]).await, 0.0);
    assert!(soon("an echo", echoes(&mut TcpStream::connect(ringway.web()).await.unwrap())).await);
}

/// As a `ConfigMap` of Kubernetes changes.
#[tokio::test]
async fn a_swapped_link_under_load_fails_no_connection() {
    let bench = Bench::new().await;
    for (version, server) in [("1", &bench.one), ("2", &bench.two)] {
        std::fs::create_dir(bench.at(version)).unwrap();
        bench.write(&format!("{version}/list"), &list(&[(version, server)]));
    }
    std::os::unix::fs::symlink("1", bench.at("..data")).unwrap();
    std::os::unix::fs::symlink("..data/list", bench.at("list")).unwrap();
    let yaml = yaml(&bench.at("list")).replace("drain: 100ms", "drain: 5s");
    let ringway = Ringway::start(&yaml).await.all_healthy().await;
    let (web, stop) = (ringway.web(), CancellationToken::new());
    let client = tokio::spawn({
        let stop = stop.clone();
        async move {
            let mut count = 0;
            while !stop.is_cancelled() {
                let mut stream = TcpStream::connect(web).await.unwrap();
                assert!(soon("an echo", echoes(&mut stream)).await, "a connection failed");
                count += 1;
            }
            count
        }
    });
    for version in ["2", "1", "2"] {
        std::os::unix::fs::symlink(version, bench.at("..new")).unwrap();
        std::fs::rename(bench.at("..new"), bench.at("..data")).unwrap();
        become_ids(&ringway, &[version]).await;
        eventually("the other has left", || ringway.states().len() == 1).await;
    }
    stop.cancel();
    assert!(soon("the client", client).await.unwrap() > 10);
}

#[tokio::test]
async fn a_start_goes_on_without_the_file_and_a_reload_does_not() {
    let bench = Bench::new().await;
    let ringway = Ringway::start(&yaml(&bench.at("late"))).await;
    assert!(ids(&ringway).is_empty());
    assert_eq!(get(ringway.api(), "/readyz").await.0, 503);
    let error = ringway.reload(&yaml(&bench.at("typo"))).await.unwrap_err().to_string();
    assert!(error.contains("pools[echo].provider.file.path") && error.contains("does not exist"), "{error}");
    bench.write("late", &list(&[("a", &bench.one)]));
    let ringway = ringway.ready().await;
    assert_eq!(ids(&ringway), ["a"]);
    // Another file is another pool of the same name.
    bench.write("other", &list(&[("b", &bench.two)]));
    ringway.reload(&yaml(&bench.at("other"))).await.unwrap();
    become_ids(&ringway, &["b"]).await;
    assert!(soon("an echo", echoes(&mut TcpStream::connect(ringway.web()).await.unwrap())).await);
}

/// A reload does not wait for the file to settle.
#[tokio::test]
async fn a_reload_reads_the_file_at_once() {
    let bench = Bench::new().await;
    bench.write("list", &list(&[("a", &bench.one)]));
    let ringway = Ringway::start(&yaml(&bench.at("list"))).await.all_healthy().await;
    let writing = tokio::spawn({
        let file = bench.at("list");
        let text = list(&[("a", &bench.one), ("b", &bench.two)]);
        async move {
            // It never settles.
            loop {
                std::fs::write(&file, &text).unwrap();
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    ringway.reload(&yaml(&bench.at("list"))).await.unwrap();
    become_ids(&ringway, &["a", "b"]).await;
    writing.abort();
}
