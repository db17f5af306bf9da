//! Replicas that listen on Unix sockets.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ringway::backend::State;
use rustix::process::{Signal, kill_process};
use tokio::net::{TcpStream, UnixStream};

use super::{connects, echoes_unix, paths};
use crate::harness::program::{Program, is_alive};
use crate::harness::{Ringway, config, echoes, eventually, eventually_async, get, metric_in, soon};

/// Three replicas of the demo server on Unix sockets.
const ON_SOCKETS: &str =
    "process: { replicas: 3, command: [ringway, echo-server, --listen, \"unix:{socket}\", --name, \"{slot}\"] }";

const CHECK: &str = "health_check: { kind: http, path: /heartbeat, interval: 200ms }\ndrain: 10s";

async fn all_healthy(program: &Program) {
    eventually_async("all healthy", async || {
        let status = program.status().await;
        status["pools"][0]["backends"].as_array().unwrap().iter().all(|one| one["state"] == "healthy")
    })
    .await;
}

/// The folders of sockets below `folder`.
fn folders(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[tokio::test]
async fn ringway_removes_the_private_directory_of_a_replica_that_ends() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = [("RUNTIME_DIRECTORY", folder.path().to_str().unwrap())];
    let mut program = Program::start_with(&config(ON_SOCKETS, "", CHECK), &runtime).await.ready().await;
    all_healthy(&program).await;
    let before = folders(folder.path());
    assert_eq!(before.len(), 3);
    for folder in &before {
        assert_eq!(folder.metadata().unwrap().permissions().mode() & 0o777, 0o700);
        assert!(folder.join("socket").exists());
    }
    let mut client = TcpStream::connect(program.web()).await.unwrap();
    assert!(soon("an echo", echoes(&mut client)).await);

    let replicas = program.replicas().await;
    kill_process(replicas[1], Signal::KILL).unwrap();
    eventually_async("replaced", async || {
        let now = program.replicas().await;
        now.len() == 3 && now[1] != replicas[1]
    })
    .await;
    all_healthy(&program).await;
    let after = folders(folder.path());
    assert_eq!(after.len(), 3);
    assert_eq!(after.iter().filter(|folder| before.contains(folder)).count(), 2, "the folder of the dead one stays");

    // They go with a Ringway that is killed, too.
    program.signal(Signal::KILL);
    program.ended().await;
    eventually("no folder", || folders(folder.path()).is_empty()).await;
    let mut program = Program::start_with(&config(ON_SOCKETS, "", CHECK), &runtime).await.ready().await;
    program.signal(Signal::TERM);
    assert_eq!(program.ended().await.code(), Some(0));
    assert!(folders(folder.path()).is_empty());
}

#[tokio::test]
async fn the_status_says_why_a_socket_directory_cannot_be_created() {
    let yaml = config(ON_SOCKETS, "", "health_check: { kind: none }");
    let program = Program::start_with(&yaml, &[("RUNTIME_DIRECTORY", "/proc/nowhere")]).await;
    eventually_async("the reason", async || {
        let reason = program.status().await["pools"][0]["backends"][0]["last_exit"]["reason"].to_string();
        reason.contains("cannot create a directory for a replica's socket in /proc/nowhere")
            && reason.contains("set RUNTIME_DIRECTORY")
    })
    .await;
}

#[tokio::test]
async fn sockets_of_listeners_and_replicas_survive_an_upgrade() {
    let folder = tempfile::tempdir().unwrap();
    let sockets = tempfile::tempdir().unwrap();
    let (web, _) = paths(&folder);
    let gone = folder.path().join("gone");
    let yaml = config(ON_SOCKETS, "", CHECK);
    let with = |path: &Path| {
        yaml.clone().replace(
            "pools:",
            &format!("  - {{ name: unix, listen: \"unix:{}\", pool: echo }}\npools:", path.display()),
        )
    };
    let both = with(&web)
        .replace("pools:", &format!("  - {{ name: gone, listen: \"unix:{}\", pool: echo }}\npools:", gone.display()));
    let runtime = [("RUNTIME_DIRECTORY", sockets.path().to_str().unwrap())];
    let mut program = Program::start_with(&both, &runtime).await.ready().await;
    all_healthy(&program).await;
    let replicas = program.replicas().await;
    let mut open = UnixStream::connect(&web).await.unwrap();
    assert!(soon("an echo", echoes_unix(&mut open)).await);
    assert!(soon("an echo", connects(&gone)).await);
    let before = folders(sockets.path());

    program.write_config(&with(&web));
    let new = program.upgrade().await;
    assert_eq!(program.replicas().await, replicas, "the upgrade restarted a replica");
    eventually("the file of the removed listener goes", || !gone.exists()).await;
    assert!(soon("an echo of the new process", connects(&web)).await);
    assert!(soon("an echo of the old process", echoes_unix(&mut open)).await);
    drop(open);
    assert_eq!(program.ended().await.code(), Some(0));
    assert!(soon("an echo after the old process", connects(&web)).await);
    assert_eq!(folders(sockets.path()).len(), before.len());

    // The new process supervises the replicas, and removes the files at its end.
    kill_process(replicas[0], Signal::KILL).unwrap();
    eventually_async("replaced", async || {
        let now = program.replicas().await;
        now.len() == 3 && now[0] != replicas[0]
    })
    .await;
    let text = get(program.api(), "/metrics").await.1;
    assert_eq!(metric_in(&text, "ringway_replica_restarts_total", &[]), 1.0);
    kill_process(new, Signal::TERM).unwrap();
    eventually("the end of the new process", || !is_alive(new)).await;
    assert!(!web.exists() && folders(sockets.path()).is_empty());
}

/// A pool changes from ports to sockets and back without a failed request.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reload_moves_replicas_from_ports_to_sockets_and_back() {
    let range = "process: { ports: 31000-31099, ";
    let on_ports = config(&crate::harness::THREE_REPLICAS.replace("process: { ", range), "", CHECK);
    let ringway = Ringway::start(&on_ports).await.all_healthy().await;
    let load = tokio::spawn(loadtest::churn(ringway.web(), 100, Duration::from_secs(4), Duration::from_secs(10)));
    let are_on_sockets = || {
        let table = ringway.state().pools[0].table.load();
        let is_on_socket =
            |backend: &ringway::backend::Backend| backend.address.as_ref().is_some_and(|it| it.ip().is_none());
        let healthy = table.backends().iter().all(|backend| backend.state == State::Healthy);
        let on_sockets = table.backends().iter().filter(|backend| is_on_socket(backend)).count();
        healthy.then_some(on_sockets)
    };
    // The range of ports does not limit replicas on sockets.
    ringway.reload(&config(ON_SOCKETS, "", CHECK)).await.unwrap();
    eventually("all on sockets", || are_on_sockets() == Some(3)).await;
    ringway.reload(&on_ports).await.unwrap();
    eventually("all on ports", || are_on_sockets() == Some(0)).await;
    let report = soon("the load", load).await.unwrap();
    let failed: Vec<_> = report.outcomes.iter().filter(|outcome| outcome.server.is_err()).collect();
    assert!(failed.is_empty() && report.outcomes.len() > 200, "{failed:?}");
}
