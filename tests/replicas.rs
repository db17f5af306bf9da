//! Replicas: Ringway replaces dead replicas, and no replica outlives Ringway.

use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};

use crate::harness::program::{Program, is_alive, run};
use crate::harness::{Ringway, THREE_REPLICAS, config, eventually, eventually_async, get, http, soon};
use ringway::backend::State;

fn pid_of(ringway: &Ringway, slot: usize) -> Option<rustix::process::Pid> {
    let table = ringway.state().pools[0].table.load();
    match table.backends()[slot].replica {
        Some(ringway::backend::Replica::Process { pid }) => rustix::process::Pid::from_raw(i32::try_from(pid).ok()?),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_replica_is_replaced_and_only_its_own_connections_fail() {
    let check = "health_check: { kind: http, path: /heartbeat }";
    let ringway = Ringway::start(&config(THREE_REPLICAS, "", check)).await.all_healthy().await;
    let before = ringway.mapping();
    let victim = pid_of(&ringway, 1).unwrap();
    let state = || ringway.state().pools[0].table.load().backends()[1].clone();
    let load_began = Instant::now();
    let load = tokio::spawn(loadtest::churn(ringway.web(), 200, Duration::from_secs(4), Duration::from_secs(10)));
    eventually("load on the victim", || state().live.counters.total.load(std::sync::atomic::Ordering::Relaxed) > 20)
        .await;

    kill_process(victim, Signal::KILL).unwrap();
    let killed = Instant::now();
    eventually("replaced", || pid_of(&ringway, 1).is_some_and(|pid| pid != victim)).await;
    eventually("healthy again", || state().state == State::Healthy).await;
    // The documented limit. The replacement takes about a tenth of a second.
    assert!(killed.elapsed() < Duration::from_secs(2), "healthy again after {:?}", killed.elapsed());

    let report = soon("the load", load).await.unwrap();
    // Only connections that started before the kill may fail.
    for failure in report.outcomes.iter().filter(|outcome| outcome.server.is_err()) {
        let after_death = (load_began + failure.start).checked_duration_since(killed);
        assert!(after_death.is_none(), "{failure:?} began {after_death:?} after the kill");
    }
    assert!(report.outcomes.len() > 500 && report.servers().len() == 3);
    assert_eq!(ringway.mapping(), before, "a key moved");
    assert_eq!(ringway.metric("ringway_replica_restarts_total", &[]).await, 1.0);
}

#[tokio::test]
async fn a_replica_that_hangs_is_replaced() {
    let provider = THREE_REPLICAS.replace(" }", ", restart: { replace_after: 1s }, stop_grace: 100ms }");
    let check = "health_check: { kind: http, path: /heartbeat, interval: 100ms, timeout: 200ms, fall: 2 }";
    let ringway = Ringway::start(&config(&provider, "", check)).await.all_healthy().await;
    let pids = |slots: [usize; 3]| slots.map(|slot| pid_of(&ringway, slot).unwrap());
    let before = pids([0, 1, 2]);
    kill_process(before[1], Signal::STOP).unwrap();
    let state = || ringway.state().pools[0].table.load().backends()[1].state;
    eventually("unhealthy", || state() == State::Unhealthy).await;
    eventually("replaced", || pid_of(&ringway, 1).is_some_and(|pid| pid != before[1])).await;
    eventually("healthy again", || state() == State::Healthy).await;
    eventually("the end of the old one", || !is_alive(before[1])).await;
    assert_eq!([pids([0, 1, 2])[0], pids([0, 1, 2])[2]], [before[0], before[2]], "another replica was replaced");
}

/// A rollout that stops at its first replica must not look finished.
#[tokio::test]
async fn a_rollout_that_waits_for_a_replica_says_so_until_it_goes_on() {
    let with = |word: &str| {
        let provider = format!(
            "process: {{ replicas: 3, restart: {{ backoff: 10m, max_backoff: 10m, start_grace: 10m, crash_loop_after: 3 }}, \
             rollout: {{ order: stop_first, healthy_for: 0s }}, \
             command: [sh, -c, 'case $1 in good) exec $0 echo-server --listen 127.0.0.1:{{port}} --name {{slot}};; hangs) exec sleep 600;; esac; exit 3', ringway, {word}] }}"
        );
        let provider = provider.replace(", ringway,", &format!(", {:?},", env!("CARGO_BIN_EXE_ringway")));
        config(&provider, "", "drain: 100ms")
    };
    let program = Program::start(&with("good")).await.ready().await;
    let outdated = async || {
        let status = program.status().await;
        let backends = status["pools"][0]["backends"].as_array().unwrap();
        backends.iter().filter(|backend| backend["outdated"] == true).count()
    };
    let words = || run(&["status", "--api", &program.api().to_string()]).1;
    assert_eq!(outdated().await, 0);
    // The correction is rolled out at once, although the back-off and the grace of a new replica are long.
    for (wrong, drain) in [("exits", "200ms"), ("hangs", "300ms")] {
        program.write_config(&with(wrong));
        program.signal(Signal::HUP);
        eventually_async("a rollout that waits", async || outdated().await == 2).await;
        eventually("what it waits for", || {
            let words = words();
            let waits = words.lines().find(|line| line.starts_with("pool echo: rollout: 2 of 3 replicas still have"));
            waits.is_some_and(|line| line.contains(": Ringway waits until echo-") && line.ends_with(" is healthy"))
        })
        .await;
        program.write_config(&with("good").replace("drain: 100ms", &format!("drain: {drain}")));
        program.signal(Signal::HUP);
        eventually_async("no outdated replica", async || {
            let status = program.status().await;
            let mut backends = status["pools"][0]["backends"].as_array().unwrap().iter();
            backends.all(|backend| backend["outdated"] == false && backend["state"] == "healthy")
        })
        .await;
    }
    assert!(!words().contains("rollout"), "{}", words());
}

#[tokio::test]
async fn a_replica_that_keeps_exiting_is_in_a_crash_loop_and_the_others_still_serve() {
    let provider = "process: { replicas: 2, command: [sh, -c, \"case {slot} in *-1) echo cannot go on; echo because of this; exit 3;; esac; exec sleep 600 {port}\"], \
                    restart: { backoff: 1m, max_backoff: 1h, crash_loop_after: 2 } }";
    let ringway = Ringway::start(&config(provider, "answer_status: true", "health_check: { kind: none }")).await;
    let states = || -> Vec<State> {
        ringway.state().pools[0].table.load().backends().iter().map(|backend| backend.state).collect()
    };
    eventually("the breaker", || states() == [State::CrashLoop, State::Healthy]).await;
    assert_eq!(ringway.metric("ringway_replica_crash_loop", &["echo-1"]).await, 1.0);
    assert_eq!(ringway.metric("ringway_replica_crash_loop", &["echo-2"]).await, 0.0);
    let status = get(ringway.api(), "/api/status").await.1;
    assert!(status.contains(r#""state":"crash_loop""#), "{status}");
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let exit = &status["pools"][0]["backends"][0]["last_exit"];
    assert_eq!((&exit["code"], &exit["reason"]), (&3.into(), &"exit status: 3".into()), "{exit}");
    assert_eq!(exit["output"], serde_json::json!(["cannot go on", "because of this"]), "the last lines of its output");
    let on_listener: serde_json::Value = serde_json::from_str(&get(ringway.web(), "/api/status").await.1).unwrap();
    let same = &on_listener["pools"][0]["backends"][0]["last_exit"]["output"];
    assert_eq!(same, &exit["output"], "a client on loopback sees everything on a listener too");
}

/// The ids of the processes that have this argument.
fn processes_with(word: &str) -> Vec<rustix::process::Pid> {
    let entries =
        std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    entries
        .filter(|pid: &i32| {
            std::fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).split('\0').any(|argument| argument == word))
        })
        .filter_map(rustix::process::Pid::from_raw)
        .collect()
}

/// The child of a shell must end with the shell, because it would keep the port of the next replica.
#[tokio::test]
async fn the_children_of_a_dead_replica_end_with_it() {
    // The argument distinguishes the sleep of this test from all others.
    let word = format!("60{}", std::process::id());
    let provider =
        format!("process: {{ replicas: 1, command: [sh, -c, \"sleep {word} & wait {{port}}; sleep {word}\"] }}");
    let ringway = Ringway::start(&config(&provider, "", "health_check: { kind: none }")).await.all_healthy().await;
    eventually("the shell's child", || !processes_with(&word).is_empty()).await;
    let orphans = processes_with(&word);
    kill_process(pid_of(&ringway, 0).unwrap(), Signal::KILL).unwrap();
    eventually("the child's end", || !orphans.iter().any(|&pid| is_alive(pid))).await;
    eventually("the next one", || !processes_with(&word).is_empty()).await;
    drop(ringway);
    eventually("nothing left", || !processes_with(&word).iter().any(|&pid| is_alive(pid))).await;
}

/// A daemon leaves the process group and the session of the replica that has started it.
#[tokio::test]
async fn descendants_in_another_session_end_with_their_replica() {
    let word = format!("{}.4321", std::process::id() + 200_000);
    let script = format!("setsid sh -c \\\"setsid sleep {word} & sleep {word}\\\" & exec sleep {word} {{port}}");
    let provider = format!("process: {{ replicas: 1, command: [sh, -c, \"{script}\"] }}");
    let ringway = Ringway::start(&config(&provider, "", "health_check: { kind: none }")).await.all_healthy().await;
    eventually("the descendants", || processes_with(&word).len() == 3).await;
    let before = processes_with(&word);
    kill_process(pid_of(&ringway, 0).unwrap(), Signal::KILL).unwrap();
    eventually("their end", || !before.iter().any(|&pid| is_alive(pid))).await;
    eventually("the next ones", || processes_with(&word).len() == 3).await;
    drop(ringway);
    eventually("nothing left", || !processes_with(&word).iter().any(|&pid| is_alive(pid))).await;
}

#[tokio::test]
async fn replicas_get_their_slot_port_environment_and_range() {
    // A range of ports that were free a moment ago.
    let free: Vec<u16> =
        (0..40).map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()).collect();
    let first = free.iter().copied().find(|port| (10_000..60_000).contains(port)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let provider = format!(
        "process: {{ replicas: 2, ports: \"{first}-{}\", env: {{ SAYS: \"{{slot}} on {{port}}\" }}, \
         command: [sh, -c, \"echo $SAYS > {}/{{slot}}; exec sleep 600\"] }}",
        first + 20,
        folder.path().display(),
    );
    let ringway = Ringway::start(&config(&provider, "", "health_check: { kind: none }")).await.all_healthy().await;
    let table = ringway.state().pools[0].table.load();
    for backend in table.backends() {
        let port = backend.address.as_ref().unwrap().ip().unwrap().port();
        assert!((first..=first + 20).contains(&port));
        let file = folder.path().join(&*backend.id);
        let said = || std::fs::read_to_string(&file).unwrap_or_default();
        eventually("the file of the replica", || said() == format!("{} on {port}\n", backend.id)).await;
    }
}

fn program_config() -> String {
    config(THREE_REPLICAS, "", "")
}

#[tokio::test]
async fn a_killed_ringway_leaves_no_child() {
    let program = Program::start(&program_config()).await.ready().await;
    let replicas = program.replicas().await;
    assert_eq!(replicas.len(), 3);
    program.signal(Signal::KILL);
    eventually("no child left", || !replicas.iter().any(|&pid| is_alive(pid))).await;
}

#[tokio::test]
async fn sigterm_and_sigint_stop_ringway_and_its_replicas_with_exit_code_0() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut program = Program::start(&program_config()).await.ready().await;
        let replicas = program.replicas().await;
        program.signal(signal);
        let status = program.ended().await;
        assert_eq!(status.code(), Some(0), "{}", program.log());
        assert!(!replicas.iter().any(|&pid| is_alive(pid)), "a replica outlived Ringway");
        eventually("the last line", || program.log().contains("stopped")).await;
    }
}

#[tokio::test]
async fn a_planned_stop_of_a_replica_is_no_warning() {
    let program = Program::start(&program_config()).await.ready().await;
    let answer = http(program.api(), "POST", "/api/pools/echo/scale", b"{\"replicas\": 2}").await;
    assert_eq!(answer.status(), 200);
    eventually("the stop", || program.log().contains("replica stopped pool=echo slot=echo-3")).await;
    assert!(!program.log().contains(" WARN "), "{}", program.log());
    kill_process(program.replicas().await[0], Signal::KILL).unwrap();
    eventually("a warning", || program.log().contains(" WARN replica ended pool=echo slot=echo-1")).await;
}

#[tokio::test]
async fn sighup_does_not_stop_ringway() {
    let mut program = Program::start(&program_config()).await.ready().await;
    program.signal(Signal::HUP);
    eventually("a reload", || program.log().contains("command done: reload")).await;
    assert_eq!(get(program.api(), "/readyz").await.0, 200);
    program.signal(Signal::TERM);
    assert_eq!(program.ended().await.code(), Some(0));
}

#[tokio::test]
async fn a_second_signal_exits_immediately() {
    let yaml = config(THREE_REPLICAS, "", "drain: 1h");
    let mut program = Program::start(&yaml).await.ready().await;
    let replicas = program.replicas().await;
    let open = loadtest::open(program.web(), 1).await.unwrap();
    eventually_async("accepted", async || {
        crate::harness::metric_in(&get(program.api(), "/metrics").await.1, "ringway_connections_active", &[]) == 1.0
    })
    .await;
    program.signal(Signal::TERM);
    eventually("the first signal is seen", || program.log().contains("stopping")).await;
    eventually_async("not ready while it drains", async || get(program.api(), "/readyz").await.0 == 503).await;
    // Ringway treats a signal that follows immediately as the same signal.
    tokio::time::sleep(Duration::from_millis(400)).await;
    program.signal(Signal::TERM);
    assert_eq!(program.ended().await.code(), Some(1));
    eventually("no child left", || !replicas.iter().any(|&pid| is_alive(pid))).await;
    drop(open);
}

/// Ringway continues if the reader of its log exits.
#[tokio::test]
async fn ringway_replaces_replicas_after_the_reader_of_its_log_exits() {
    let mut program = Program::start(&program_config()).await.ready().await;
    let replicas = program.replicas().await;
    program.close_log();
    for round in 0..2 {
        let victim = program.replicas().await[round];
        kill_process(victim, Signal::KILL).unwrap();
        eventually_async("its successor", async || {
            let now = program.replicas().await;
            now.len() == 3 && !now.contains(&victim)
        })
        .await;
    }
    assert!(is_alive(replicas[2]), "the other replica is gone");
    program.signal(Signal::TERM);
    assert_eq!(program.ended().await.code(), Some(0));
}

/// The time in which Ringway itself is stopped does not count as silence of a connection.
#[tokio::test]
async fn a_stopped_and_continued_ringway_keeps_its_connections() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    let server = crate::harness::backends::Server::echo("a").await;
    let yaml = crate::harness::static_config(&[server.address], "timeouts: { idle: 1s, half_closed: 1s }");
    let program = Program::start(&yaml).await.ready().await;
    let mut client = tokio::net::TcpStream::connect(program.web()).await.unwrap();
    for _ in 0..3 {
        client.write_all(b"ping").await.unwrap();
        soon("an echo", client.read_exact(&mut [0; 4])).await.unwrap();
        program.signal(Signal::STOP);
        // A running Ringway would reset the silent connection after one second.
        tokio::time::sleep(Duration::from_millis(1500)).await;
        program.signal(Signal::CONT);
    }
}

#[tokio::test]
async fn the_log_has_the_output_of_replicas_with_their_slot() {
    let program = Program::start(&program_config()).await.ready().await;
    eventually("a line of a replica", || program.log().contains("echo-2 listens on 127.0.0.1")).await;
    assert!(program.log().lines().any(|line| line.contains("echo-2 listens on") && line.contains("slot=echo-2")));
}
