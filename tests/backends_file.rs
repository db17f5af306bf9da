//! The provider `file`: a pool's backends follow a list that some tool writes.

use std::path::Path;
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use crate::harness::backends::{Server, free_ports};
use crate::harness::program::Program;
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
    assert_eq!(ringway.backend(0).membership.weight, 3);
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
        ("[{ address: \"a:1\", weight: 1000 }, { address: \"b:1\", weight: 1001 }]", "weight"),
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

/// A tool that writes the same list again and again does not hide a change.
#[tokio::test]
async fn a_list_that_is_written_all_the_time_is_applied() {
    let bench = Bench::new().await;
    bench.write("list", &list(&[("a", &bench.one)]));
    let ringway = Ringway::start(&yaml(&bench.at("list"))).await.all_healthy().await;
    let writing = tokio::spawn({
        let (file, new) = (bench.at("list"), bench.at("new"));
        let text = list(&[("a", &bench.one), ("b", &bench.two)]);
        async move {
            loop {
                std::fs::write(&new, &text).unwrap();
                std::fs::rename(&new, &file).unwrap();
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    });
    become_ids(&ringway, &["a", "b"]).await;
    writing.abort();
}

#[tokio::test]
async fn a_list_that_cannot_work_is_refused() {
    let bench = Bench::new().await;
    bench.write("list", &list(&[("a", &bench.one)]));
    let yaml = yaml(&bench.at("list")).replace("interval: 50ms", "port: 9, interval: 50ms");
    let [port] = free_ports();
    let ringway = Ringway::start(&yaml.replacen("listen: 127.0.0.1:0", &format!("listen: 127.0.0.1:{port}"), 1)).await;
    let own = ringway.web();
    for (text, says) in [
        (format!("[{{ address: \"{own}\" }}]"), "leads back to"),
        ("[{ address: unix:/run/a }]".to_owned(), "has a Unix socket"),
        ("[{ address: \"a:1\", weight: 1000 }]".replace("a:1", "127.0.0.1:1") + " # fits", ""),
    ] {
        bench.replace("list", &text);
        if says.is_empty() {
            become_ids(&ringway, &["127.0.0.1:1"]).await;
        } else {
            eventually_async(says, async || provider(&ringway).await["file"]["error"].to_string().contains(says)).await;
            assert_eq!(ids(&ringway), ["a"]);
        }
    }
    // A list that is refused by the config is judged again with another config.
    bench.replace("list", "[{ address: unix:/run/b }]");
    eventually_async("refused", async || provider(&ringway).await["file"]["error"].is_string()).await;
    let without_port = yaml.replace("port: 9, ", "").replacen("listen: 127.0.0.1:0", &format!("listen: {own}"), 1);
    ringway.reload(&without_port).await.unwrap();
    become_ids(&ringway, &["unix:/run/b"]).await;
    let made = std::process::Command::new("mkfifo").arg(bench.at("pipe")).status().unwrap();
    assert!(made.success());
    let pipe = yaml.replace("/list", "/pipe").replacen("listen: 127.0.0.1:0", &format!("listen: {own}"), 1);
    let error = soon("an answer", ringway.reload(&pipe)).await.unwrap_err().to_string();
    assert!(error.contains("is not a regular file"), "{error}");
}

/// The keys of the backend move until its name is known: its old address is that of something else.
#[tokio::test]
async fn a_backend_that_moves_to_an_unknown_name_loses_its_address() {
    let bench = Bench::new().await;
    bench.write("list", &list(&[("a", &bench.one), ("b", &bench.two)]));
    let ringway = Ringway::start(&yaml(&bench.at("list"))).await.all_healthy().await;
    let other = list(&[("b", &bench.two)]) + "- { id: a, address: \"no.such.invalid:80\" }\n";
    bench.replace("list", &other);
    eventually("no address", || ringway.backend(0).address.is_none()).await;
    assert_eq!(ids(&ringway), ["a", "b"]);
    bench.replace("list", &list(&[("a", &bench.three), ("b", &bench.two)]));
    let third = bench.three.address.to_string();
    eventually("an address", || ringway.backend(0).address.is_some_and(|address| address.to_string() == third)).await;
    ringway.all_healthy().await;
}

/// The successor knows the list of the old process, even if the file has faults meanwhile.
#[tokio::test]
async fn an_upgrade_keeps_the_list_while_the_file_has_faults() {
    let bench = Bench::new().await;
    bench.write("list", &list(&[("a", &bench.one), ("b", &bench.two)]));
    let mut program = Program::start(&yaml(&bench.at("list"))).await.ready().await;
    bench.replace("list", "- [");
    program.upgrade().await;
    let status = program.status().await;
    let backends = status["pools"][0]["backends"].as_array().unwrap().clone();
    let known: Vec<_> = backends.iter().map(|backend| backend["id"].as_str().unwrap()).collect();
    assert_eq!(known, ["a", "b"]);
    assert!(status["pools"][0]["provider"]["file"]["error"].is_string());
    assert!(soon("an echo", echoes(&mut TcpStream::connect(program.web()).await.unwrap())).await);
    bench.replace("list", &list(&[("b", &bench.two)]));
    eventually_async("one backend", async || {
        program.status().await["pools"][0]["backends"].as_array().unwrap().len() == 1
    })
    .await;
}
