//! System calls of a request and of a connection. Unlike their time, their number is the same on every machine.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::backends::{Server, free_ports};
use crate::harness::program::{Killed, Program};
use crate::harness::{eventually, eventually_async, get, http, metric_in, require_tool, skip, soon, static_config};

/// Counts the system calls of a process until [`Trace::end`].
struct Trace {
    strace: Killed,
    file: tempfile::NamedTempFile,
}

impl Trace {
    /// Attaches strace to the process. `None` if the system does not let it trace.
    async fn begin(pid: Pid) -> Option<Self> {
        let (file, messages) = (tempfile::NamedTempFile::new().unwrap(), tempfile::NamedTempFile::new().unwrap());
        let strace = Command::new("strace")
            .args(["-f", "-c", "-U", "name,calls", "-o"])
            .arg(file.path())
            .args(["-p", &pid.as_raw_nonzero().to_string()])
            .stdout(Stdio::null())
            .stderr(messages.reopen().unwrap())
            .spawn();
        let mut strace = Killed(strace.unwrap());
        // strace says so when it has stopped all threads. What they do before that, it does not count.
        let is_attached = || std::fs::read_to_string(messages.path()).unwrap().contains("attached");
        let mut gone = false;
        eventually("strace", || {
            gone = strace.0.try_wait().unwrap().is_some();
            gone || is_attached()
        })
        .await;
        (!gone).then_some(Self { strace, file })
    }

    /// The number of calls by name.
    async fn end(mut self) -> BTreeMap<String, f64> {
        let pid = Pid::from_raw(i32::try_from(self.strace.0.id()).unwrap()).unwrap();
        kill_process(pid, Signal::INT).unwrap();
        eventually("the end of strace", || self.strace.0.try_wait().unwrap().is_some()).await;
        let text = std::fs::read_to_string(self.file.path()).unwrap();
        let call = |line: &str| {
            let (name, calls) = line.trim().split_once(char::is_whitespace)?;
            Some((name.to_owned(), calls.trim().parse::<f64>().ok()?))
        };
        text.lines().filter_map(call).filter(|(name, _)| name != "total").collect()
    }
}

/// The sum of these calls divided by `count`.
fn each(calls: &BTreeMap<String, f64>, names: &[&str], count: usize) -> f64 {
    names.iter().filter_map(|name| calls.get(*name)).sum::<f64>() / count as f64
}

async fn ping(stream: &mut TcpStream) {
    let mut back = [0; 4];
    let echo = async {
        stream.write_all(b"ping").await.unwrap();
        stream.read_exact(&mut back).await.unwrap();
    };
    soon("an echo", echo).await;
    assert_eq!(&back, b"ping");
}

#[tokio::test]
async fn a_request_and_a_connection_take_a_bounded_number_of_system_calls() {
    const REQUESTS: usize = 500;
    const CONNECTIONS: usize = 200;
    if !require_tool("strace") {
        return;
    }
    let server = Server::echo_at(&format!("127.0.0.1:{}", free_ports::<1>()[0])).await;
    let yaml = static_config(&[server.address], "health_check: { kind: none }");
    let yaml = yaml.replace("workers: 2", "workers: 1");
    let program = Program::start(&yaml).await;
    let mut stream = TcpStream::connect(program.web()).await.unwrap();
    ping(&mut stream).await;

    let Some(trace) = Trace::begin(program.pid()).await else {
        skip("strace is not permitted to trace");
        return;
    };
    for _ in 0..REQUESTS {
        ping(&mut stream).await;
    }
    let calls = trace.end().await;
    println!("{REQUESTS} requests: {calls:?}");
    // Each request needs a read and a write each way. No read finds an empty socket.
    for name in ["recvfrom", "sendto"] {
        let each = each(&calls, &[name], REQUESTS);
        assert!((2.0..2.05).contains(&each), "{each} {name} a request: {calls:?}");
    }
    // Each side needs one wake-up at most. The rest is for the timeout task.
    let waits = each(&calls, &["epoll_wait", "epoll_pwait", "epoll_pwait2"], REQUESTS);
    assert!(waits < 2.3, "{waits} waits a request");
    let total: f64 = calls.values().sum::<f64>() / REQUESTS as f64;
    assert!(total < 6.8, "{total} a request: {calls:?}");

    drop(program);
    let mut connections = trace_connections(CONNECTIONS, &yaml, b"").await;
    for _ in 1..5 {
        if !connections.calls.contains_key("bind") {
            break;
        }
        // strace on a busy machine made connects so slow that the program took them for searches for a port.
        connections = trace_connections(CONNECTIONS, &yaml, b"").await;
    }
    let Connections { calls, looks, met } = connections;
    println!("{CONNECTIONS} connections: {calls:?}");
    for (names, most) in [
        (&["accept4"][..], 2.1),
        (&["socket"], 1.05),
        (&["connect"], 1.05),
        // Only four for keepalive, if the timeout task saw the connection.
        (&["setsockopt"], 0.05 + 4.0 * met / CONNECTIONS as f64),
        (&["getsockopt", "getsockname", "getpeername"], 0.05),
        (&["shutdown"], 1.05),
        // The request, the answer and two ends. Some reads find an empty socket.
        (&["recvfrom"], 5.2),
        (&["sendto"], 2.05),
        (&["epoll_ctl"], 4.1),
        (&["close"], 2.1),
    ] {
        let each = each(&calls, names, CONNECTIONS);
        let most = most + 4.0 * looks / CONNECTIONS as f64;
        assert!(each <= most, "{each} {names:?} a connection: {calls:?}");
    }
}

/// A received header takes a look and a read. A sent one takes a write, the client's destination, and `TCP_NODELAY` for the
/// bytes that follow. The port of this backend takes another look for a connection to itself. A route by server name takes a
/// look.
#[tokio::test]
async fn proxy_headers_and_routes_take_a_bounded_number_of_system_calls() {
    const CONNECTIONS: usize = 100;
    if !require_tool("strace") {
        return;
    }
    let echo = Server::echo_at(&format!("127.0.0.1:{}", free_ports::<1>()[0])).await;
    let behind_header = Server::start(|stream| async move {
        let mut stream = tokio::io::BufReader::new(stream);
        let mut line = String::new();
        let _ = tokio::io::AsyncBufReadExt::read_line(&mut stream, &mut line).await;
        let mut bytes = [0; 4];
        while stream.read_exact(&mut bytes).await.is_ok() && stream.write_all(&bytes).await.is_ok() {}
    })
    .await;
    let one_worker = |yaml: String| yaml.replace("workers: 2", "workers: 1");
    let receives = static_config(&[echo.address], "health_check: { kind: none }")
        .replace("    pool: echo", "    proxy_protocol: { from: [127.0.0.1] }\n    pool: echo");
    let sends = static_config(&[behind_header.address], "health_check: { kind: none }\nsend_proxy: v1");
    let header = b"PROXY TCP4 198.51.100.7 203.0.113.1 1 2\r\n";
    let hello = loadtest::client_hello("a.example", &["h2"]);
    let length = hello.len();
    let behind_hello = Server::start(move |mut stream| async move {
        let mut bytes = vec![0; length];
        let _ = stream.read_exact(&mut bytes).await;
        let mut bytes = [0; 4];
        while stream.read_exact(&mut bytes).await.is_ok() && stream.write_all(&bytes).await.is_ok() {}
    })
    .await;
    let routes = static_config(&[behind_hello.address], "health_check: { kind: none }")
        .replace("    pool: echo", "    routes: [{ sni: [a.example], pool: echo }]\n    pool: reset");
    for (yaml, header, most) in [
        (receives, &header[..], [("recvfrom", 8.2), ("sendto", 2.05), ("setsockopt", 0.2), ("getsockname", 0.05)]),
        (sends, b"", [("recvfrom", 5.2), ("sendto", 3.05), ("setsockopt", 1.3), ("getsockname", 2.1)]),
        (routes, &hello[..], [("recvfrom", 6.2), ("sendto", 2.05), ("setsockopt", 0.2), ("getsockname", 1.1)]),
    ] {
        let Connections { calls, looks, met } = trace_connections(CONNECTIONS, &one_worker(yaml), header).await;
        println!("{CONNECTIONS} connections: {calls:?}");
        for (name, most) in most {
            let each = each(&calls, &[name], CONNECTIONS);
            let most = most + 4.0 * (looks + met) / CONNECTIONS as f64;
            assert!(each <= most, "{each} {name} a connection: {calls:?}");
        }
    }
}

/// The system calls of short connections.
struct Connections {
    calls: BTreeMap<String, f64>,
    /// Requests for the metrics among them. Each is a connection too.
    looks: f64,
    /// Connections that the timeout task can have met.
    met: f64,
}

/// `header`: what each client sends first.
async fn trace_connections(count: usize, yaml: &str, header: &[u8]) -> Connections {
    let program = Program::start(yaml).await;
    let trace = Trace::begin(program.pid()).await.unwrap();
    let began = Instant::now();
    for _ in 0..count {
        let mut stream = TcpStream::connect(program.web()).await.unwrap();
        if !header.is_empty() {
            stream.write_all(header).await.unwrap();
        }
        ping(&mut stream).await;
    }
    let mut looks = 0.0;
    eventually_async("all have ended", async || {
        looks += 1.0;
        metric_in(&get(program.api(), "/metrics").await.1, "ringway_connections_active", &[]) == 0.0
    })
    .await;
    // The timeout task runs twice a second. It sets keepalive on the connection that exists at that moment.
    let met = began.elapsed().as_secs_f64() * 2.0 + 1.0;
    Connections { calls: trace.end().await, looks, met }
}

#[tokio::test]
async fn half_closed_connections_cost_no_system_calls_and_a_short_timeout_costs_only_while_it_is_used() {
    const CONNECTIONS: usize = 100;
    if !require_tool("strace") {
        return;
    }
    // It neither reads nor answers, and so keeps half-closed connections open.
    let server = Server::start(|stream| async move {
        tokio::time::sleep(Duration::from_secs(3600)).await;
        drop(stream);
    })
    .await;
    let yaml = static_config(&[server.address], "health_check: { kind: none }").replace("workers: 2", "workers: 1");
    let short = yaml.replace("drain: 100ms", "drain: 100ms\n    timeouts: { half_closed: 100ms }");
    let program = Program::start(&short).await;
    // The worker's clock runs a hundred times per second for this one.
    let first = TcpStream::connect(program.web()).await.unwrap();
    let active = async || metric_in(&get(program.api(), "/metrics").await.1, "ringway_connections_active", &[]);
    eventually_async("it has the short timeout", async || active().await == 1.0).await;
    program.write_config(&yaml);
    assert_eq!(http(program.api(), "POST", "/api/reload", b"").await.status(), 200);
    drop(first);
    let mut streams = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut stream = TcpStream::connect(program.web()).await.unwrap();
        stream.shutdown().await.unwrap();
        streams.push(stream);
    }
    eventually_async("only the half-closed ones", async || active().await == CONNECTIONS as f64).await;
    let Some(trace) = Trace::begin(program.pid()).await else {
        skip("strace is not permitted to trace");
        return;
    };
    let began = Instant::now();
    // The time in which the calls are counted.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let calls = trace.end().await;
    let seconds = began.elapsed().as_secs_f64();
    println!("{seconds} s: {calls:?}");
    assert!(each(&calls, &["getpeername", "getsockopt"], 1) < 1.0, "{calls:?}");
    let waits = each(&calls, &["epoll_wait", "epoll_pwait", "epoll_pwait2"], 1) / seconds;
    assert!(waits < 40.0, "{waits} waits per second: {calls:?}");
}

/// Whether an established connection to `port` has this kernel timer. Timer 2 is keepalive.
fn has_timer(port: u16, timer: &str) -> bool {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    table.lines().skip(1).any(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        fields[2].ends_with(&format!(":{port:04X}")) && fields[3] == "01" && fields[5].starts_with(timer)
    })
}

#[tokio::test]
async fn a_connection_to_a_backend_has_keepalive_unless_it_is_off() {
    let server = Server::echo("a").await;
    let yaml = static_config(&[server.address], "health_check: { kind: none }");
    let program = Program::start(&yaml).await;
    // The connection is idle from the start, so only the timeout task can set keepalive.
    let _idle = TcpStream::connect(program.web()).await.unwrap();
    eventually("the keepalive timer", || has_timer(server.address.port(), "02")).await;
    let off = Program::start(&format!("tcp: {{ keepalive: off }}\n{yaml}")).await;
    drop(program);
    let _idle = TcpStream::connect(off.web()).await.unwrap();
    eventually_async("connected", async || {
        metric_in(&get(off.api(), "/metrics").await.1, "ringway_backend_connections_active", &[]) == 1.0
    })
    .await;
    // With keepalive on, the timeout task would set the timer in this time.
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert!(!has_timer(server.address.port(), "02"));
}
