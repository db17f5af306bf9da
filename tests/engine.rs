//! A Docker engine that is absent or does not answer. These tests need no engine.

use crate::harness::program::{Program, file};
use crate::harness::{config, eventually, eventually_async, get, metric_in};

const CONTAINERS: &str = "docker: { replicas: 2, image: some, port: 80 }";

async fn engine_error(program: &Program) -> String {
    program.status().await["pools"][0]["provider"]["engine"]["error"].as_str().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn without_an_engine_ringway_reports_it_once_and_tries_again() {
    let folder = tempfile::tempdir().unwrap();
    let host = format!("unix://{}/docker.sock", folder.path().display());
    let program = Program::start_with(&config(CONTAINERS, "", ""), &[("DOCKER_HOST", &host)]).await;
    let expected = format!("cannot reach the Docker engine at {host}: ");
    eventually_async("a reason in the status", async || engine_error(&program).await.starts_with(&expected)).await;
    assert!(
        engine_error(&program).await.ends_with("is it running? In a container: mount its socket, or set DOCKER_HOST")
    );
    eventually("a reason in the log", || program.log().contains(&expected)).await;
    let metrics = get(program.api(), "/metrics").await.1;
    assert_eq!(metric_in(&metrics, "ringway_engine_up", &["echo"]), 0.0);
    eventually_async("further tries", async || {
        metric_in(&get(program.api(), "/metrics").await.1, "ringway_engine_failures_total", &["echo"]) >= 3.0
    })
    .await;
    assert_eq!(program.log().matches(&expected).count(), 1, "the log has one line, not one for each try");
    assert_eq!(get(program.api(), "/readyz").await.0, 503);
}

#[tokio::test]
async fn an_engine_that_hangs_does_not_delay_the_shutdown() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("docker.sock");
    // The socket queues connections and never answers.
    let _silent = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let host = format!("unix://{}", socket.display());
    let yaml = format!("docker: {{ timeout: 1s }}\n{}", config(CONTAINERS, "", ""));
    let mut program = Program::start_with(&yaml, &[("DOCKER_HOST", &host)]).await;
    eventually_async("a reason", async || engine_error(&program).await.contains("no answer within 1 s")).await;
    program.signal(rustix::process::Signal::TERM);
    assert_eq!(program.ended().await.code(), Some(0));
}

#[test]
fn an_invalid_engine_address_is_an_error_at_the_start() {
    let yaml = file(&config(CONTAINERS, "", ""));
    for (host, verify, expected) in [
        ("engine.local", "", "is not an address like unix:///var/run/docker.sock"),
        ("tcp://10.0.0.5:2376", "1", "Ringway supports neither TLS nor SSH here; forward the engine's socket"),
    ] {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_ringway"))
            .arg("--config")
            .arg(yaml.path())
            .envs([("DOCKER_HOST", host), ("DOCKER_TLS_VERIFY", verify)])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(expected), "{said}");
    }
}
