//! Successors that die, refuse or are of another version: the old process goes on with its connections.

use std::os::fd::AsFd as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use ringway::handover::Channel;
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::{Value, json};
use tempfile::NamedTempFile;
use tokio::net::TcpStream;

use super::{NO_CHECK, handing_over};
use crate::harness::backends::Server;
use crate::harness::program::{Killed, Program, file};
use crate::harness::{echoes, http, soon, static_config};

/// The environment variables that tell this program to act as a successor, and how, and where it notes how many connections it was offered.
const ROLE: &str = "RINGWAY_TEST_SUCCESSOR";
const NOTES: &str = "RINGWAY_TEST_NOTES";

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
    let (mut offered, mut numbers) = (0, 0);
    while let Ok(Some(message)) = channel.receive() {
        let offer: Value = serde_json::from_str(&message.text).unwrap();
        numbers += 1;
        assert_eq!((&offer["version"], &offer["number"]), (&json!(1), &json!(numbers)));
        let connections = offer["connections"].as_array().unwrap().len();
        assert!(message.descriptors.len() >= 2 * connections, "{offer}");
        offered += connections;
        std::fs::write(std::env::var(NOTES).unwrap(), offered.to_string()).unwrap();
        let answer = |taken: Vec<bool>, room| json!({ "number": numbers, "taken": taken, "room": room }).to_string();
        let answer = match role.as_str() {
            // The first question is for the room.
            _ if connections == 0 => answer(Vec::new(), 10),
            "dies" => std::process::exit(0),
            "speaks another language" => "?".to_owned(),
            "answers another batch" => {
                json!({ "number": 77, "taken": vec![true; connections], "room": 10 }).to_string()
            }
            "has no room" => answer(Vec::new(), 0),
            _ => answer(vec![false; connections], 10),
        };
        channel.send(&answer, &[]).unwrap();
    }
}

/// Upgrades to a successor with this role. Returns the answer, and how many connections it was offered meanwhile.
async fn upgrade_to(program: &Program, role: &str) -> (String, usize) {
    let notes = file("0");
    let own = std::env::current_exe().unwrap();
    let script = format!(
        "#!/bin/sh\nexport {ROLE}='{role}' {NOTES}='{}'\nexec '{}' --exact hand_over::failures::successor --ignored --nocapture >/dev/null\n",
        notes.path().display(),
        own.display()
    );
    program.replace_binary(&script);
    let answer = soon("an answer", http(program.api(), "POST", "/api/upgrade", b"")).await;
    let text = String::from_utf8_lossy(answer.body()).into_owned();
    assert_eq!(answer.status(), 200, "{role}: {text}");
    (text, std::fs::read_to_string(notes.path()).unwrap().parse().unwrap())
}

#[tokio::test]
async fn the_old_process_goes_on_with_what_no_successor_takes() {
    let server = Server::echo("a").await;
    let yaml = handing_over(&static_config(&[server.address], &format!("{NO_CHECK}\ndrain: 10m")));
    for (role, least, said) in [
        ("dies", 1, "takes no open connections"),
        ("refuses", 50, "0 go on there, 50 are in the old process"),
        ("has no room", 1, "0 go on there, 50 are in the old process"),
        ("speaks another language", 1, "takes no open connections"),
        ("answers another batch", 1, "takes no open connections"),
        ("old", 0, "has taken over"),
    ] {
        let mut program = Program::start_copy(&yaml).await.ready().await;
        let mut open = loadtest::open(program.web(), 50).await.unwrap();
        for stream in &mut open {
            assert!(soon("an echo", echoes(stream)).await);
        }
        let (text, offered) = upgrade_to(&program, role).await;
        assert!(offered >= least && text.contains(said), "{role}: {offered}, {text}");
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
    let nonsense = [
        r#"{"version":2,"number":1,"connections":[],"has_bytes":false}"#,
        r#"{"version":1,"number":2,"connections":[{}],"has_bytes":false}"#,
        r#"{"version":1,"number":3,"connections":[],"has_bytes":true}"#,
        "?",
    ];
    for (n, text) in nonsense.iter().enumerate() {
        let answer = ask(text);
        assert_eq!((&answer["number"], &answer["taken"]), (&json!(n + 1), &json!([])), "{text}: {answer}");
        assert!(answer["room"].as_u64().unwrap() > 0);
    }
}

/// A message of several packets whose descriptors do not fit gets one answer, and the next message another one.
#[tokio::test]
async fn a_successor_without_descriptors_refuses_and_stays_in_step() {
    let server = Server::echo("a").await;
    let yaml = file(&handing_over(&static_config(&[server.address], NO_CHECK)));
    let rest = json!({ "changes": {}, "healthy": [], "is_ready": true, "open_files": null, "has_connections": true });
    let (child, channel) = take_over(&yaml, &rest);
    assert_eq!(channel.receive().unwrap().unwrap().text, "ready for connections");
    let few = Rlimit { current: Some(100), maximum: Some(100) };
    prlimit(Some(Pid::from_child(&child.0)), Resource::Nofile, few).unwrap();
    let stream = TcpStream::connect(server.address).await.unwrap();
    let many = vec![stream.as_fd(); 190];
    for (n, length) in [(1, 10), (2, 400_000), (3, 10), (4, 400_000)] {
        channel.send(&"x".repeat(length), &many).unwrap();
        let answer: Value = serde_json::from_str(&channel.receive().unwrap().unwrap().text).unwrap();
        assert_eq!((&answer["number"], &answer["taken"]), (&json!(n), &json!([])));
    }
}
