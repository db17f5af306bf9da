//! Sockets from a service manager, and notifications to it.

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};

use command_fds::{CommandFdExt as _, FdMapping};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::NamedTempFile;
use tokio::net::TcpStream;

use crate::harness::backends::Server;
use crate::harness::program::{Killed, Program, file};
use crate::harness::{echoes, eventually_async, get, http, soon, static_config};

/// Starts `ringway` with these sockets, as systemd does. A shell sets `LISTEN_PID` to the id of the process.
fn start(config: &NamedTempFile, sockets: Vec<OwnedFd>) -> Killed {
    let script = format!("LISTEN_PID=$$ LISTEN_FDS={} exec \"$@\"", sockets.len());
    let mappings = sockets.into_iter().zip(3..).map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd });
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", &script, "sh", env!("CARGO_BIN_EXE_ringway"), "--config"])
        .arg(config.path())
        .stderr(Stdio::piped())
        .fd_mappings(mappings.collect())
        .unwrap();
    Killed(command.spawn().unwrap())
}

fn stop(ringway: &Killed) {
    kill_process(Pid::from_child(&ringway.0), Signal::TERM).unwrap();
}

/// Stops the process that serves now, perhaps after an upgrade.
async fn stop_serving(api: SocketAddr) {
    let status: serde_json::Value = serde_json::from_str(&get(api, "/api/status").await.1).unwrap();
    let pid = i32::try_from(status["pid"].as_i64().unwrap()).unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::TERM).unwrap();
}

/// A config of these backends, whose listener has this value of `listen`. The side port is at `api`.
fn listening(backends: &[SocketAddr], listen: &str, api: SocketAddr) -> String {
    static_config(backends, "health_check: { kind: none }")
        .replace("listen: 127.0.0.1:0", &format!("listen: {listen}"))
        .replace("listen: \"127.0.0.1:0\"", &format!("listen: \"{api}\""))
}

/// Waits for the end, and returns the exit code and the log.
async fn ended(mut ringway: Killed) -> (Option<i32>, String) {
    let wait = tokio::task::spawn_blocking(move || {
        let mut log = String::new();
        std::io::Read::read_to_string(&mut ringway.0.stderr.take().unwrap(), &mut log).unwrap();
        (ringway.0.wait().unwrap().code(), log)
    });
    soon("the end of ringway", wait).await.unwrap()
}

#[tokio::test]
async fn listening_sockets_come_from_the_service_manager() {
    let server = Server::echo("a").await;
    let web = TcpListener::bind("127.0.0.1:0").unwrap();
    let api = TcpListener::bind("127.0.0.1:0").unwrap();
    let stray = TcpListener::bind("127.0.0.1:0").unwrap();
    let (web_address, api_address) = (web.local_addr().unwrap(), api.local_addr().unwrap());
    let yaml = listening(&[server.address], &web_address.to_string(), api_address);
    // The connection waits in the backlog until Ringway starts.
    let mut early = TcpStream::connect(web_address).await.unwrap();
    let config = file(&yaml);
    let sockets = || [&api, &web, &stray].map(|socket| OwnedFd::from(socket.try_clone().unwrap())).into();
    let first = start(&config, sockets());
    assert!(soon("an echo", echoes(&mut early)).await);
    eventually_async("the side port", async || TcpStream::connect(api_address).await.is_ok()).await;
    assert_eq!(get(api_address, "/healthz").await.0, 200);
    // A restart keeps the backlog, because the service manager holds the sockets.
    stop(&first);
    assert_eq!(ended(first).await.0, Some(0));
    let mut queued = TcpStream::connect(web_address).await.unwrap();
    let second = start(&config, sockets());
    assert!(soon("an echo", echoes(&mut queued)).await);
    stop(&second);
    let (_, log) = ended(second).await;
    assert!(log.contains("a socket from LISTEN_FDS matches no listener's address"), "{log}");
    assert!(log.contains(&stray.local_addr().unwrap().to_string()), "{log}");
}

/// The manager keeps the socket, and a later config may use it again.
#[tokio::test]
async fn a_listener_that_moves_leaves_the_socket_of_the_service_manager_usable() {
    let server = Server::echo("a").await;
    let web = TcpListener::bind("127.0.0.1:0").unwrap();
    let api = TcpListener::bind("127.0.0.1:0").unwrap();
    let (web_address, api_address) = (web.local_addr().unwrap(), api.local_addr().unwrap());
    let yaml = |listen: &str| listening(&[server.address], listen, api_address);
    let config = file(&yaml(&web_address.to_string()));
    let sockets = || [&api, &web].map(|socket| OwnedFd::from(socket.try_clone().unwrap())).into();
    for command in ["/api/reload", "/api/upgrade"] {
        std::fs::write(config.path(), yaml(&web_address.to_string())).unwrap();
        let first = start(&config, sockets());
        let mut client = TcpStream::connect(web_address).await.unwrap();
        assert!(soon("an echo", echoes(&mut client)).await);
        drop(client);
        std::fs::write(config.path(), yaml("127.0.0.2:0")).unwrap();
        assert_eq!(http(api_address, "POST", command, b"").await.status(), 200);
        stop_serving(api_address).await;
        ended(first).await;
        // The queue of the manager's socket still takes clients.
        let client = tokio::time::timeout(std::time::Duration::from_secs(5), TcpStream::connect(web_address)).await;
        client.expect("the socket takes no client").unwrap();
        while web.accept().is_err() {}
    }
}

/// The sender and the lines of the next message to a service manager.
fn next_message(manager: &std::os::unix::net::UnixDatagram) -> (i32, String) {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
    let (mut control, mut text) = (RecvAncillaryBuffer::new(&mut space), [0; 1024]);
    // A signal, like that of a child's end, may interrupt it.
    let mut receive = || recvmsg(manager, &mut [std::io::IoSliceMut::new(&mut text)], &mut control, RecvFlags::empty());
    let received = loop {
        match receive() {
            Err(rustix::io::Errno::INTR) => {}
            received => break received,
        }
    };
    let length = received.expect("no message").bytes;
    let sender = control.drain().find_map(|part| match part {
        RecvAncillaryMessage::ScmCredentials(sender) => Some(sender.pid.as_raw_nonzero().get()),
        _ => None,
    });
    (sender.unwrap(), String::from_utf8_lossy(&text[..length]).into_owned())
}

/// After an upgrade, the successor has to answer, although the variables name its predecessor.
#[tokio::test(flavor = "multi_thread")]
async fn the_watchdog_hears_from_the_process_that_serves() {
    let server = Server::echo("a").await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let manager = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    rustix::net::sockopt::set_socket_passcred(&manager, true).unwrap();
    manager.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
    let environment = [("NOTIFY_SOCKET", path.to_str().unwrap()), ("WATCHDOG_USEC", "100000")];
    let yaml = static_config(&[server.address], "health_check: { kind: none }\ndrain: 1m");
    let mut program = Program::start_with(&yaml, &environment).await.ready().await;
    let signs = |count: usize| {
        let signs = std::iter::repeat_with(|| next_message(&manager)).filter(|(_, text)| text == "WATCHDOG=1");
        signs.map(|(sender, _)| sender).take(count).collect::<Vec<_>>()
    };
    let senders = tokio::task::block_in_place(|| signs(3));
    assert!(senders.iter().all(|&sender| sender == senders[0]), "{senders:?}");
    let new = program.upgrade().await.as_raw_nonzero().get();
    tokio::task::block_in_place(|| {
        while next_message(&manager).1 != format!("MAINPID={new}") {}
        // One of the old process may be on its way.
        let after = signs(6);
        assert!(after[1..].iter().all(|&sender| sender == new), "{after:?}, and the new process is {new}");
    });
    // A message during a stop starts the watchdog of systemd again, so the messages go on until the end.
    let mut open = TcpStream::connect(program.web()).await.unwrap();
    assert!(soon("an echo", echoes(&mut open)).await);
    kill_process(Pid::from_raw(new).unwrap(), Signal::TERM).unwrap();
    tokio::task::block_in_place(|| {
        while next_message(&manager).1 != "STOPPING=1" {}
        assert_eq!(signs(3), [new; 3]);
    });
    drop(open);
}

/// As `ListenStream=8000` makes it.
#[tokio::test]
async fn a_dual_stack_socket_serves_a_listener_on_all_addresses() {
    let server = Server::echo("a").await;
    let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None).unwrap();
    socket.set_only_v6(false).unwrap();
    socket.bind(&"[::]:0".parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
    socket.listen(16).unwrap();
    let port = socket.local_addr().unwrap().as_socket().unwrap().port();
    let yaml = static_config(&[server.address], "health_check: { kind: none }")
        .replace("listen: 127.0.0.1:0", &format!("listen: 0.0.0.0:{port}"));
    let config = file(&yaml);
    let ringway = start(&config, vec![socket.into()]);
    for address in [format!("127.0.0.1:{port}"), format!("[::1]:{port}")] {
        let mut client = TcpStream::connect(&address).await.unwrap();
        assert!(soon("an echo", echoes(&mut client)).await, "{address}");
    }
    stop(&ringway);
    let (code, log) = ended(ringway).await;
    assert_eq!(code, Some(0), "{log}");
}

/// As `ListenStream=/run/web.sock` and `SocketMode=0666` make it.
#[tokio::test]
async fn a_unix_socket_comes_from_the_service_manager_and_keeps_its_file() {
    use std::os::unix::fs::PermissionsExt;

    let server = Server::echo("a").await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("web");
    let socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o666)).unwrap();
    let yaml = static_config(&[server.address], "health_check: { kind: none }")
        .replace("listen: 127.0.0.1:0", &format!("listen: unix:{}\n    mode: \"0600\"", path.display()));
    let config = file(&yaml);
    // The first connection waits in the queue until Ringway starts.
    let mut clients = vec![tokio::net::UnixStream::connect(&path).await.unwrap()];
    for _ in 0..2 {
        let ringway = start(&config, vec![OwnedFd::from(socket.try_clone().unwrap())]);
        clients.push(tokio::net::UnixStream::connect(&path).await.unwrap());
        for mut client in clients.drain(..) {
            use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

            client.write_all(b"ping").await.unwrap();
            soon("an echo", client.read_exact(&mut [0; 4])).await.unwrap();
        }
        stop(&ringway);
        let (code, log) = ended(ringway).await;
        assert_eq!(code, Some(0), "{log}");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o666);
    }
}

#[tokio::test]
async fn an_abstract_unix_socket_in_the_unit_is_a_clear_error() {
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::net::{SocketAddr, UnixListener};

    let server = Server::echo("a").await;
    let config = file(&static_config(&[server.address], "health_check: { kind: none }"));
    let name = format!("ringway-test-{}", std::process::id());
    let socket = UnixListener::bind_addr(&SocketAddr::from_abstract_name(name).unwrap()).unwrap();
    let (code, log) = ended(start(&config, vec![socket.into()])).await;
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("a Unix socket without a path: write the path in ListenStream="), "{log}");
}

#[tokio::test]
async fn a_udp_socket_in_the_unit_is_a_clear_error() {
    let server = Server::echo("a").await;
    let config = file(&static_config(&[server.address], "health_check: { kind: none }"));
    let (code, log) = ended(start(&config, vec![UdpSocket::bind("127.0.0.1:0").unwrap().into()])).await;
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("descriptor 0 of LISTEN_FDS is not a listening TCP or Unix stream socket"), "{log}");
    assert!(log.contains("use ListenStream="), "{log}");
}

#[tokio::test]
async fn ringway_notifies_the_service_manager() {
    let server = Server::echo("a").await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let manager = tokio::net::UnixDatagram::bind(&path).unwrap();
    let environment = [("NOTIFY_SOCKET", path.to_str().unwrap())];
    let yaml = static_config(&[server.address], "health_check: { kind: none }");
    let mut program = Program::start_with(&yaml, &environment).await.ready().await;
    let told = async |wanted: &str| {
        let mut message = [0; 1024];
        soon(wanted, async {
            loop {
                let received = manager.recv(&mut message).await.unwrap();
                if String::from_utf8_lossy(&message[..received]).lines().any(|line| line == wanted) {
                    return;
                }
            }
        })
        .await;
    };
    told("READY=1").await;
    let new = program.upgrade().await;
    told(&format!("MAINPID={}", new.as_raw_nonzero())).await;
    kill_process(new, Signal::TERM).unwrap();
    told("STOPPING=1").await;
}

/// systemd sets `TCPCongestion=`, `IPTOS=`, `IPTTL=`, `ReceiveBuffer=` and `FreeBind=` of a socket unit in this way.
#[tokio::test]
async fn options_that_the_service_manager_has_set_survive_an_upgrade_and_a_reload() {
    let server = Server::echo("a").await;
    let web = TcpListener::bind("127.0.0.1:0").unwrap();
    let api = TcpListener::bind("127.0.0.1:0").unwrap();
    let (web_address, api_address) = (web.local_addr().unwrap(), api.local_addr().unwrap());
    let socket = socket2::SockRef::from(&web);
    socket.set_tcp_congestion(b"reno").unwrap();
    socket.set_tos_v4(0x10).unwrap();
    socket.set_ttl_v4(9).unwrap();
    socket.set_recv_buffer_size(99_000).unwrap();
    socket.set_freebind_v4(true).unwrap();
    let options = || {
        let name = socket.tcp_congestion().unwrap();
        let name: Vec<_> = name.into_iter().take_while(|&byte| byte != 0).collect();
        let (tos, ttl) = (socket.tos_v4().unwrap(), socket.ttl_v4().unwrap());
        (name, tos, ttl, socket.recv_buffer_size().unwrap(), socket.freebind_v4().unwrap())
    };
    let before = options();
    assert_eq!((&before.0[..], before.1, before.2), (&b"reno"[..], 0x10, 9));
    let yaml = listening(&[server.address], &web_address.to_string(), api_address);
    let config = file(&yaml);
    let first = start(&config, [&api, &web].map(|socket| OwnedFd::from(socket.try_clone().unwrap())).into());
    for command in ["/api/reload", "/api/upgrade", "/api/reload"] {
        let mut client = TcpStream::connect(web_address).await.unwrap();
        assert!(soon("an echo", echoes(&mut client)).await);
        assert_eq!(options(), before, "before {command}");
        drop(client);
        std::fs::write(config.path(), format!("{yaml}\ntcp: {{ user_timeout: 9s }}")).unwrap();
        assert_eq!(http(api_address, "POST", command, b"").await.status(), 200);
        assert_eq!(options(), before, "after {command}");
    }
    stop_serving(api_address).await;
    ended(first).await;
}

#[tokio::test]
async fn sockets_of_the_service_manager_go_to_the_listeners_with_their_interface() {
    let servers = [Server::echo("a").await, Server::echo("b").await];
    let api = TcpListener::bind("127.0.0.1:0").unwrap();
    let api_address = api.local_addr().unwrap();
    // A unit with BindToDevice=lo, and one without.
    let on_lo = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    on_lo.bind_device(Some(b"lo")).unwrap();
    on_lo.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    on_lo.listen(16).unwrap();
    let on_lo: TcpListener = on_lo.into();
    let anywhere = TcpListener::bind("127.0.0.1:0").unwrap();
    let (lo_address, any_address) = (on_lo.local_addr().unwrap(), anywhere.local_addr().unwrap());
    let yaml = |interface_of_any: &str| {
        let backends = servers.each_ref().map(|server| server.address);
        listening(&backends, &format!("{lo_address}\n    interface: lo"), api_address).replace(
            "pools:",
            &format!("  - {{ name: any, listen: \"{any_address}\", pool: echo{interface_of_any} }}\npools:"),
        )
    };
    let sockets = || [&api, &on_lo, &anywhere].map(|socket| OwnedFd::from(socket.try_clone().unwrap())).into();
    let problem =
        format!("listeners[any].interface: the service manager has opened {any_address} for other interfaces");
    // The listener would be open to everybody.
    let (code, log) = ended(start(&file(&yaml(", interface: lo")), sockets())).await;
    assert!(code == Some(1) && log.contains(&problem), "{code:?} {log}");

    let config = file(&yaml(""));
    let ringway = start(&config, sockets());
    for address in [lo_address, any_address] {
        let mut client = TcpStream::connect(address).await.unwrap();
        assert!(soon("an echo", echoes(&mut client)).await);
    }
    std::fs::write(config.path(), yaml(", interface: lo")).unwrap();
    let answer = http(api_address, "POST", "/api/reload", b"").await;
    let text = String::from_utf8_lossy(answer.body()).into_owned();
    assert!(answer.status() != 200 && text.contains(&problem), "{text}");
    // A unit may name an interface that the config does not.
    std::fs::write(config.path(), yaml("").replace("\n    interface: lo", "")).unwrap();
    assert_eq!(http(api_address, "POST", "/api/reload", b"").await.status(), 200);
    for address in [lo_address, any_address] {
        let mut client = TcpStream::connect(address).await.unwrap();
        assert!(soon("an echo", echoes(&mut client)).await);
    }
    stop(&ringway);
    ended(ringway).await;
}

/// As systemd opens it with `SocketProtocol=mptcp`.
#[tokio::test]
async fn a_socket_of_mptcp_serves_and_survives_a_reload_and_an_upgrade() {
    let (family, protocol) = (socket2::Domain::IPV4, socket2::Protocol::MPTCP);
    let Ok(web) = socket2::Socket::new(family, socket2::Type::STREAM, Some(protocol)) else {
        // The kernel may have been built without it.
        println!("no MPTCP: nothing checked");
        return;
    };
    web.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    web.listen(16).unwrap();
    let (web, api) = (TcpListener::from(web), TcpListener::bind("127.0.0.1:0").unwrap());
    let (web_address, api_address) = (web.local_addr().unwrap(), api.local_addr().unwrap());
    let server = Server::echo("a").await;
    let yaml = listening(&[server.address], &web_address.to_string(), api_address);
    let config = file(&yaml);
    let first = start(&config, [&api, &web].map(|socket| OwnedFd::from(socket.try_clone().unwrap())).into());
    for command in ["/api/reload", "/api/upgrade", "/api/reload"] {
        // A client with MPTCP.
        let client = socket2::Socket::new(family, socket2::Type::STREAM, Some(protocol)).unwrap();
        client.connect(&web_address.into()).unwrap();
        client.set_nonblocking(true).unwrap();
        let mut client = TcpStream::from_std(client.into()).unwrap();
        assert!(soon("an echo", echoes(&mut client)).await);
        std::fs::write(config.path(), format!("{yaml}\ntcp: {{ user_timeout: 9s }}")).unwrap();
        assert_eq!(http(api_address, "POST", command, b"").await.status(), 200, "{command}");
        assert!(soon("an echo", echoes(&mut client)).await);
    }
    stop_serving(api_address).await;
    ended(first).await;
}
