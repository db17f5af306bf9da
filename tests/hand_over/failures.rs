//! Successors that die, refuse or are of another version: the old process goes on with its connections.

use std::os::fd::AsFd as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use ringway::handover::Channel;
use serde_json::{Value, json};
use tempfile::NamedTempFile;
use tokio::net::TcpStream;

use super::{NO_CHECK, handing_over};
use crate::harness::backends::Server;
use crate::harness::program::{Killed, Program, file};
use crate::harness::{echoes, http, soon, static_config};

/// The environment variable that tells this program to act as a successor, and how.
const ROLE: &str = "RINGWAY_TEST_SUCCESSOR";

/// Acts as a successor. An upgrade starts it by way of a script; otherwise it does nothing.
#[test]
#[ignore = "only a part of other tests"]
fn successor() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let channel = Channel::from_stdin().unwrap();
    // The old process hands over the rest last.
    loop {
        let message: Value = serde_json::from_str(&channel.receive().unwrap().unwrap().text).unwrap();
        if let Some(rest) = message.get("Rest") {
            assert_eq!(rest["has_connections"], true);
            break;
        }
    }
    channel.send(if role == "old" { "ready" } else { "ready for connections" }, &[]).unwrap();
    let mut offered = 0;
    while let Ok(Some(message)) = channel.receive() {
        let offer: Value = serde_json::from_str(&message.text).unwrap();
        let connections = offer["connections"].as_array().unwrap().len();
        assert!(message.descriptors.len() >= 2 * connections && offer["version"] == 1, "{offer}");
        offered += connections;
        let answer = match role.as_str() {
            // The first question is for the room.
            _ if connections == 0 => json!({ "taken": [], "room": 10 }).to_string(),
            "dies" => std::process::exit(0),
            "speaks another language" => "?".to_owned(),
            "has no room" => json!({ "taken": [], "room": 0 }).to_string(),
            _ => json!({ "taken": vec![false; connections], "room": 10 }).to_string(),
        };
        channel.send(&answer, &[]).unwrap();
    }
    assert!(offered > 0 || role == "old");
}

/// Upgrades to a successor with this role. Returns the answer.
async fn upgrade_to(program: &Program, role: &str) -> String {
    let own = std::env::current_exe().unwrap();
    let script = format!(
        "#!/bin/sh\nexport {ROLE}='{role}'\nexec '{}' --exact hand_over::failures::successor --ignored --nocapture >/dev/null\n",
        own.display()
    );
    program.replace_binary(&script);
    let answer = soon("an answer", http(program.api(), "POST", "/api/upgrade", b"")).await;
    let text = String::from_utf8_lossy(answer.body()).into_owned();
    assert_eq!(answer.status(), 200, "{role}: {text}");
    text
}

#[tokio::test]
async fn the_old_process_goes_on_with_what_no_successor_takes() {
    let server = Server::echo("a").await;
    let yaml = handing_over(&static_config(&[server.address], &format!("{NO_CHECK}\ndrain: 10m")));
    for role in ["dies", "refuses", "has no room", "speaks another language", "old"] {
        let mut program = Program::start_copy(&yaml).await.ready().await;
        let mut open = loadtest::open(program.web(), 50).await.unwrap();
        for stream in &mut open {
            assert!(soon("an echo", echoes(stream)).await);
        }
        let text = upgrade_to(&program, role).await;
        assert_eq!(text.contains("0 go on there, 50 finish"), role == "refuses", "{role}: {text}");
        for _ in 0..3 {
            for stream in &mut open {
                assert!(soon("an echo of the old process", echoes(stream)).await, "{role}");
            }
            // Some of them are offered again.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        drop(open);
        assert_eq!(program.ended().await.code(), Some(0), "{role}");
    }
}

/// A Ringway that takes over from this process. It has got all messages.
fn take_over(config: &NamedTempFile, rest: &Value) -> (Killed, Channel) {
    let (own, of_successor) = Channel::pair().unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_ringway"))
        .arg("--config")
        .arg(config.path())
        .arg("--take-over")
        .stdin(Stdio::from(of_successor.into_descriptor()))
        .stderr(Stdio::null())
        .spawn();
    let child = Killed(child.unwrap());
    own.set_timeout(Duration::from_secs(60)).unwrap();
    own.send(&json!({ "Rest": rest }).to_string(), &[]).unwrap();
    (child, own)
}

#[tokio::test]
async fn a_successor_understands_only_its_own_version() {
    let server = Server::echo("a").await;
    let yaml = static_config(&[server.address], NO_CHECK);
    let changes: Value = json!({});
    let rest = |has_connections: Option<bool>| {
        let mut rest = json!({ "changes": changes, "healthy": [], "is_ready": true, "open_files": null });
        if let Some(has) = has_connections {
            rest["has_connections"] = has.into();
        }
        rest
    };
    let answer = |channel: &Channel| channel.receive().unwrap().unwrap().text;
    // An old process that knows nothing of it, and a config that does not want it.
    let willing = file(&handing_over(&yaml));
    for (config, has) in [(&willing, None), (&file(&yaml), Some(true))] {
        let (_child, channel) = take_over(config, &rest(has));
        assert_eq!(answer(&channel), "ready");
    }
    let (_child, channel) = take_over(&willing, &rest(Some(true)));
    assert_eq!(answer(&channel), "ready for connections");
    let stream = TcpStream::connect(server.address).await.unwrap();
    let ask = |text: &str| -> Value {
        channel.send(text, &[stream.as_fd()]).unwrap();
        serde_json::from_str(&answer(&channel)).unwrap()
    };
    for text in [
        r#"{"version":2,"connections":[],"has_bytes":false}"#,
        r#"{"version":1,"connections":[{}],"has_bytes":false}"#,
        r#"{"version":1,"connections":[],"has_bytes":true}"#,
        "?",
    ] {
        let answer = ask(text);
        assert_eq!(answer["taken"], json!([]), "{text}: {answer}");
        assert!(answer["room"].as_u64().unwrap() > 0);
    }
}
