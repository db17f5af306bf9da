//! Tests of the command line.

use std::net::SocketAddr;
use std::process::{Command, Output};

use clap::Parser as _;

fn loadtest(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_loadtest")).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Starts an echo server that runs until the process ends.
fn server() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let options = echo_server::Options::parse_from(["echo-server", "--name", "one"]);
            echo_server::run(listener, options, std::future::pending()).await;
        });
    });
    address
}

#[test]
fn wrong_arguments_and_targets_give_one_line_and_an_exit_code() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    for (arguments, code, says) in [
        (&["run"][..], 2, "<SCENARIO>"),
        (&["run", "requests", "--connections", "0"], 2, "0 is not in 1.."),
        (&["run", "requests", "--rate", "never"], 2, "a number from 0.01 to 1000000"),
        (&["walk"], 2, "unrecognized subcommand"),
        (&["run", "requests", "--target", &nobody], 1, "is the balancer running?"),
        (&["run", "requests", "--target", "192.0.2.1:80"], 1, "--allow-remote"),
        (&["run", "requests", "--target", "[::1]:80", "--sources", "2"], 1, "leave it out"),
        (&["run", "idle", "--target", &nobody, "--connections", "4000000000"], 1, "open files"),
        (&["run", "requests", "--target", &nobody, "--seconds", "10000000"], 1, "the maximum is one week"),
        (&["soak", "--api", &nobody], 1, "--api"),
        (&["compare", "--ringway", "/no/such/file", "--only", "ringway"], 1, "cannot start /no/such/file"),
        (&["compare", "--work", "latency"], 1, "--work requests"),
        (
            &["tune", "--ringway", "/no/such/file", "--balancer-cpu", "0", "--load-cpu", "0"],
            1,
            "two different processors",
        ),
        (&["scale", "--servers", "1", "--ringway", "/no/such/file"], 1, "cannot start /no/such/file"),
    ] {
        let output = loadtest(arguments);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(said.contains(says), "{arguments:?}: {said}");
        // A warning depends on what else runs on this machine.
        let lines = said.trim().lines().filter(|line| !line.starts_with("warning: "));
        assert!(code == 2 || lines.count() == 1, "{arguments:?}: {said}");
    }
}

#[test]
fn a_run_prints_a_table_or_json_and_writes_a_page() {
    let target = server().to_string();
    let files = tempfile::tempdir().unwrap();
    let pid = std::process::id().to_string();
    for (scenario, bytes) in
        [("requests", false), ("connections", false), ("bulk", true), ("idle", false), ("mixed", true)]
    {
        let html = files.path().join("report.html");
        let common =
            ["run", scenario, "--target", &target, "--seconds", "1", "--connections", "4", "--mib", "1", "--pid", &pid];
        let output = loadtest(&[&common[..], &["--json", "--html", html.to_str().unwrap(), "--sources", "3"]].concat());
        assert!(output.status.success(), "{scenario}: {}", text(&output.stderr));
        let result: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&result["scenario"], &result["failed"]), (&scenario.into(), &0.into()), "{result}");
        assert!(result["requests"].as_u64() >= Some(4) && result["watched"]["resident"].as_u64() > Some(0), "{result}");
        assert_eq!(result["bytes_per_second"].as_f64().unwrap() > 0.0, bytes, "{result}");
        let page = std::fs::read_to_string(&html).unwrap();
        assert!(
            page.contains("<svg ") && page.contains("answers by server") && page.ends_with("</html>\n"),
            "{scenario}"
        );
    }
    let output = loadtest(&[
        "run",
        "requests",
        "--target",
        &target,
        "--seconds",
        "1",
        "--rate",
        "50",
        "--threads",
        "2",
        "--protocol",
        "echo",
    ]);
    let table = text(&output.stdout);
    assert!(output.status.success() && table.contains("offered per second") && table.contains("p99, ms"), "{table}");
    for direction in ["up", "both"] {
        let common =
            ["run", "bulk", "--target", &target, "--seconds", "1", "--connections", "2", "--mib", "1", "--json"];
        let output = loadtest(&[&common[..], &["--direction", direction]].concat());
        let result: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(result["failed"], 0, "{result}");
        assert!(result["bytes_per_second"].as_f64() > Some(0.0), "{result}");
    }
}
