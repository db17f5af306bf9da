//! Real clients whose connections go through upgrades: each finishes its work.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use tokio::net::TcpListener;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{accept_async, connect_async};

use super::{NO_CHECK, handing_over, upgrade};
use crate::harness::backends::free_ports;
use crate::harness::program::{Killed, Program};
use crate::harness::{eventually, require_tool, soon, static_config};

/// Upgrades in the middle of the work of a client.
const UPGRADES: usize = 3;

fn at(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// A Ringway before this server.
async fn before(server: SocketAddr) -> Program {
    eventually("the server listens", || std::net::TcpStream::connect(server).is_ok()).await;
    Program::start(&handing_over(&static_config(&[server], &format!("{NO_CHECK}\ndrain: 10m")))).await.ready().await
}

fn quiet(command: &mut Command) -> Killed {
    Killed(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
}

/// Upgrades while the client works, and waits for its end.
async fn upgrades_during(program: &mut Program, client: &mut Command) -> Output {
    upgrades_of(program, client.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()).await
}

async fn upgrades_of(program: &mut Program, client: Child) -> Output {
    let ended = tokio::task::spawn_blocking(move || client.wait_with_output().unwrap());
    tokio::time::sleep(Duration::from_millis(300)).await;
    for _ in 0..UPGRADES {
        assert!(!ended.is_finished(), "the client has ended before the last upgrade");
        upgrade(program).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let output = soon("the end of the client", ended).await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

#[tokio::test]
async fn a_subscriber_of_redis_gets_every_message() {
    if !require_tool("redis-server") || !require_tool("redis-cli") {
        return;
    }
    let [port] = free_ports();
    let _server = quiet(Command::new("redis-server").args(["--port", &port.to_string(), "--save", ""]));
    let mut program = before(at(port)).await;
    let web = program.web().port().to_string();
    let mut subscriber = Command::new("redis-cli")
        .args(["-p", &web, "subscribe", "news"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map(Killed)
        .unwrap();
    let mut lines = BufReader::new(subscriber.0.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert_eq!(lines.by_ref().take(3).last().as_deref(), Some("1"), "subscribed");
    let publisher = std::thread::spawn(move || {
        for n in 0..300 {
            let said =
                Command::new("redis-cli").args(["-p", &port.to_string(), "publish", "news", &n.to_string()]).output();
            assert_eq!(said.unwrap().stdout, b"1\n", "message {n} has no subscriber");
        }
    });
    let received =
        std::thread::spawn(move || lines.filter(|line| line.parse::<u32>().is_ok()).take(300).collect::<Vec<_>>());
    while !publisher.is_finished() {
        upgrade(&mut program).await;
    }
    publisher.join().unwrap();
    eventually("all messages", || received.is_finished()).await;
    let wanted: Vec<_> = (0..300).map(|n| n.to_string()).collect();
    assert_eq!(received.join().unwrap(), wanted);
}

#[tokio::test]
async fn iperf_measures_in_both_directions() {
    if !require_tool("iperf3") {
        return;
    }
    let [port] = free_ports();
    let _server = quiet(Command::new("iperf3").args(["-s", "-p", &port.to_string()]));
    let mut program = before(at(port)).await;
    let web = program.web().port().to_string();
    upgrades_during(
        &mut program,
        Command::new("iperf3").args(["-c", "127.0.0.1", "-p", &web, "-t", "4", "-P", "3", "--bidir"]),
    )
    .await;
}

#[tokio::test]
async fn a_websocket_carries_messages_both_ways() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                // The first connection asks only whether the server listens.
                let Ok(socket) = accept_async(stream).await else { return };
                let (mut to, mut from) = socket.split();
                while let Some(Ok(message)) = from.next().await {
                    if message.is_text() && to.send(message).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    let mut program = before(address).await;
    let (mut socket, _) = connect_async(format!("ws://{}/", program.web())).await.unwrap();
    for n in 0..20 {
        // A message on its way during the upgrade, and one after it.
        let text = format!("{n} {}", "x".repeat(n * 1000));
        socket.send(Message::text(text.clone())).await.unwrap();
        if n % 5 == 4 {
            upgrade(&mut program).await;
        }
        let back = soon("the echo", socket.next()).await.unwrap().unwrap();
        assert_eq!(back.into_text().unwrap().as_str(), text);
    }
    server.abort();
}

#[tokio::test]
#[ignore = "needs root and OpenSSH"]
async fn rsync_over_ssh_copies_every_byte() {
    if !require_tool("rsync") || !require_tool("ssh-keygen") {
        return;
    }
    let [port] = free_ports();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f", &path("key")]).status().unwrap();
    assert!(made.success());
    let _ = std::fs::create_dir_all("/run/sshd");
    let mut command = Command::new("/usr/sbin/sshd");
    command.args(["-D", "-f", "/dev/null", "-h", &path("key")]);
    let authorized = format!("AuthorizedKeysFile={}", path("key.pub"));
    for option in
        [&format!("Port={port}"), "ListenAddress=127.0.0.1", "PidFile=none", &authorized, "StrictModes=no", "UsePAM=no"]
    {
        command.args(["-o", option]);
    }
    let _server = quiet(&mut command);
    let mut program = before(at(port)).await;
    std::fs::create_dir(path("from")).unwrap();
    let mut random = crate::harness::Random(crate::harness::seed());
    for n in 0..20 {
        let bytes: Vec<u8> = (0..1_000_000).map(|_| random.below(256) as u8).collect();
        std::fs::write(Path::new(&path("from")).join(n.to_string()), bytes).unwrap();
    }
    let shell = format!(
        "ssh -p {} -i {} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o BatchMode=yes",
        program.web().port(),
        path("key")
    );
    let to = format!("root@127.0.0.1:{}", path("to"));
    upgrades_during(
        &mut program,
        Command::new("rsync").args(["-a", "--bwlimit=5m", "-e", &shell, &format!("{}/", path("from")), &to]),
    )
    .await;
    let same = Command::new("diff").args(["-r", &path("from"), &path("to")]).status().unwrap();
    assert!(same.success());
}

#[tokio::test]
#[ignore = "needs root and PostgreSQL"]
async fn postgresql_copies_every_row_in_both_directions() {
    let Some(programs) = crate::recipes::postgresql() else {
        return crate::harness::skip("PostgreSQL is not installed");
    };
    let [port] = free_ports();
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let _server = crate::recipes::postgresql_server(&programs, folder.path(), port, &["--auth=trust"]);
    let mut program = before(at(port)).await;
    let web = program.web().port().to_string();
    let psql = |port: &str, statement: &str| {
        let mut command = Command::new(format!("{programs}/psql"));
        command.args(["-X", "-q", "-A", "-t", "-h", "127.0.0.1", "-U", "postgres", "-p", port, "-c", statement]);
        command
    };
    eventually("PostgreSQL answers", || psql(&port.to_string(), "SELECT 1").output().unwrap().status.success()).await;
    // 20 MB in two seconds.
    let slow = "COPY (SELECT n, repeat('x', 10000), pg_sleep(0.001) FROM generate_series(1, 2000) n) TO STDOUT";
    let output = upgrades_during(&mut program, &mut psql(&web, slow)).await;
    let numbers =
        output.stdout.split(|&byte| byte == b'\n').filter_map(|line| line.split(|&byte| byte == b'\t').next());
    let numbers: Vec<_> = numbers.filter(|number| !number.is_empty()).collect();
    assert_eq!(numbers.len(), 2000);
    assert!((1..=2000).all(|n: usize| numbers[n - 1] == n.to_string().as_bytes()));

    assert!(psql(&web, "CREATE TABLE t (n integer, filler text)").status().unwrap().success());
    let mut client = psql(&web, "COPY t FROM STDIN").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut rows = client.stdin.take().unwrap();
    let writer = std::thread::spawn(move || {
        for n in 0..2000 {
            writeln!(rows, "{n}\t{}", "y".repeat(10_000)).unwrap();
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    upgrades_of(&mut program, client).await;
    writer.join().unwrap();
    let counted = psql(&web, "SELECT count(DISTINCT n), sum(length(filler)) FROM t").output().unwrap();
    assert_eq!(String::from_utf8_lossy(&counted.stdout), "2000|20000000\n");
}
