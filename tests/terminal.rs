//! `ringway top` in a real terminal, and without one.

use rustix::process::{Pid, Signal, kill_process};

use crate::harness::backends::Server;
use crate::harness::program::{Killed, Program, run};
use crate::harness::{eventually, require_tool, static_config};

/// A program in a terminal of its own, whose settings a shell notes before and after it. Returns the settings, and what the terminal
/// has shown.
async fn in_a_terminal(command: &str, end: impl AsyncFnOnce()) -> (String, String, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let script = format!("stty cols 120 rows 30; stty -g > {}; {command}; stty -g > {}", path("before"), path("after"));
    let mut child = Killed(
        std::process::Command::new("script")
            .args(["-qefc", &script, &path("shown")])
            .env("TERM", "xterm")
            .env_remove("NO_COLOR")
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap(),
    );
    let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap_or_default();
    eventually("the program's screen", || read("shown").contains("sorted")).await;
    end().await;
    eventually("the end of the shell", || child.0.try_wait().unwrap().is_some()).await;
    (
        read("before"),
        read("after"),
        String::from_utf8_lossy(&std::fs::read(folder.path().join("shown")).unwrap()).into_owned(),
    )
}

/// The process with these words in its command line.
fn process_with(words: &[&str]) -> Option<Pid> {
    let processes = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let pids = processes.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?));
    pids.into_iter().find(|pid| {
        let line = std::fs::read_to_string(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
        line.split('\0').take(words.len()).skip(1).eq(words.iter().skip(1).copied())
    })
}

#[tokio::test]
async fn top_gives_the_terminal_back_when_a_signal_ends_it() {
    if !require_tool("script") {
        return;
    }
    let server = Server::echo("a").await;
    let program = Program::start(&static_config(&[server.address], "")).await.ready().await;
    let api = program.api().to_string();
    let command = format!("{} top --api {api}", env!("CARGO_BIN_EXE_ringway"));
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let (before, after, shown) = in_a_terminal(&command, async || {
            let pid = process_with(&["ringway", "top", "--api", &api]).expect("top runs");
            kill_process(pid, signal).unwrap();
        })
        .await;
        assert!(!before.is_empty() && before == after, "{signal:?}: {before} {after}");
        // The alternate screen begins and ends (xterm's control sequences).
        assert!(shown.contains("\x1b[?1049h") && shown.contains("\x1b[?1049l"), "{signal:?}");
        assert!(shown.contains("healthy") && shown.contains("\x1b[38;5;2"), "{shown:?}");
    }
}

#[tokio::test]
async fn top_prints_one_table_without_a_terminal() {
    let server = Server::echo("a").await;
    let program = Program::start(&static_config(&[server.address], "")).await.ready().await;
    let api = program.api().to_string();
    let top = move || run(&["top", "--interval", "100ms", "--api", &api]);
    let (code, stdout, stderr) = tokio::task::spawn_blocking(top).await.unwrap();
    assert_eq!(code, Some(0), "{stderr}");
    let lines: Vec<_> = stdout.lines().collect();
    assert!(lines[0].starts_with("POOL  BACKEND  STATE    ACTIVE  CONN/s") && lines.len() == 2, "{stdout}");
    assert!(lines[1].starts_with("echo  b0       healthy  0       0.0 ") && !stdout.contains('\x1b'), "{stdout}");
}
