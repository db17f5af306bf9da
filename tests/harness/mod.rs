//! Starts and stops the processes that the tests need. Every `Drop` removes all that it has made.

pub(crate) mod backends;
pub(crate) mod browser;
pub(crate) mod engine;
pub(crate) mod name_server;
pub(crate) mod program;
pub(crate) mod watchdog;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ringway::api::{State, View};
use ringway::app::{App, Environment, Inheritance};
use ringway::backend::{Backend, State as BackendState};
use ringway::config::{Config, Source};
use ringway::control::command::{Caller, Command, CommandError, Report};
use ringway::outgoing::Outgoing;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use self::watchdog::Watchdog;

/// The longest wait for a condition. It is not an expected duration.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The app in this process, on a separate thread.
pub(crate) struct Ringway {
    state: Arc<State>,
    api: SocketAddr,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
    watchdog: Option<Watchdog>,
}

impl Ringway {
    /// Starts the app with this config and waits until it listens.
    pub(crate) async fn start(yaml: &str) -> Self {
        Self::try_start(yaml).await.unwrap_or_else(|error| panic!("{error}\n{yaml}"))
    }

    /// As [`Ringway::start`], but returns the error.
    pub(crate) async fn try_start(yaml: &str) -> Result<Self, String> {
        let config = Config::parse(yaml, "test").map_err(|error| error.to_string())?;
        let (started, start) = tokio::sync::oneshot::channel();
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                match App::start(config, environment(), Inheritance::default()).await {
                    Ok(app) => {
                        let own = rustix::thread::gettid().as_raw_nonzero().get();
                        let _ = started.send(Ok((Arc::clone(app.state()), app.api_address(), own)));
                        app.run(stopped.cancelled()).await.unwrap();
                    }
                    Err(error) => drop(started.send(Err(error.to_string()))),
                }
            });
        });
        match start.await.unwrap() {
            Ok((state, api, main)) => {
                let watchdog = Watchdog::watch(i32::try_from(std::process::id()).unwrap(), main);
                Ok(Self { state, api, stop, thread: Some(thread), watchdog: Some(watchdog) })
            }
            Err(error) => {
                thread.join().unwrap();
                Err(error)
            }
        }
    }

    /// The address of the first listener.
    pub(crate) fn web(&self) -> SocketAddr {
        let mut address = self.state().listeners[0].address.ip().expect("the first listener has an IP address");
        if address.ip().is_unspecified() {
            address.set_ip([127, 0, 0, 1].into());
        }
        address
    }

    pub(crate) fn api(&self) -> SocketAddr {
        self.api
    }

    /// The current listeners and pools.
    pub(crate) fn state(&self) -> Arc<View> {
        self.state.view()
    }

    /// Sends a command, as the side port does.
    pub(crate) async fn send(&self, command: Command) -> Result<Report, CommandError> {
        soon("the command", self.state.commands().send(command, Caller::Signal)).await
    }

    /// Reloads the app with this config.
    pub(crate) async fn reload(&self, yaml: &str) -> Result<Report, CommandError> {
        self.send(Command::Reload {
            text: Some(yaml.to_owned()),
            is_dry_run: false,
            is_reset: false,
            max_keys_moved: None,
        })
        .await
    }

    /// Waits until every pool has had a healthy backend.
    pub(crate) async fn ready(self) -> Self {
        eventually("ready", || self.state.ready.load(std::sync::atomic::Ordering::Relaxed)).await;
        self
    }

    /// Waits until every backend of every pool is healthy.
    pub(crate) async fn all_healthy(self) -> Self {
        eventually("all healthy", || {
            let healthy = |backend: &Backend| backend.state == BackendState::Healthy;
            self.state().pools.iter().all(|pool| pool.table.load().backends().iter().all(healthy))
        })
        .await;
        self
    }

    /// The backend of each of 2000 keys, by the current ring and states.
    pub(crate) fn mapping(&self) -> BTreeMap<u32, String> {
        let table = self.state().pools[0].table.load();
        let owner = |key: u32| table.candidates(&key.to_le_bytes()).next().map(|(backend, _)| backend.id.to_string());
        (0..2000).filter_map(|key| Some((key, owner(key)?))).collect()
    }

    /// A backend of the first pool in the current table.
    pub(crate) fn backend(&self, index: usize) -> Backend {
        self.state().pools[0].table.load().backends()[index].clone()
    }

    /// The state of each backend of the first pool.
    pub(crate) fn states(&self) -> Vec<BackendState> {
        self.state().pools[0].table.load().backends().iter().map(|backend| backend.state).collect()
    }

    /// The sum of a metric over all series that contain each of `labels`.
    pub(crate) async fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        let text = get(self.api, "/metrics").await.1;
        metric_in(&text, name, labels)
    }

    /// Begins the shutdown.
    pub(crate) fn stop(&self) {
        self.stop.cancel();
    }

    /// Whether the app has ended after [`Ringway::stop`].
    pub(crate) fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Ringway {
    fn drop(&mut self) {
        // At its end, Ringway gives the reader of a log a second.
        self.watchdog = None;
        self.stop.cancel();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !std::thread::panicking()
        {
            panic!("the app panicked");
        }
    }
}

pub(crate) fn environment() -> Environment {
    Environment {
        source: Source::BuiltIn,
        token: None,
        arguments: Vec::new(),
        executable: PathBuf::from(env!("CARGO_BIN_EXE_ringway")),
        replica_open_files: None,
        docker_host: None,
        log_lost: None,
        events: Arc::default(),
        log_filter: None,
    }
}

/// A config with one listener and one pool of static backends. `extra` is further lines of the pool.
pub(crate) fn static_config(backends: &[SocketAddr], extra: &str) -> String {
    let members: Vec<_> =
        backends.iter().enumerate().map(|(n, address)| format!("{{ address: \"{address}\", id: b{n} }}")).collect();
    config(&format!("static: [{}]", members.join(", ")), "", extra)
}

/// A config with one listener and one pool with a short drain. `listener` and `pool` are further lines of them.
pub(crate) fn config(provider: &str, listener: &str, pool: &str) -> String {
    let mut lines = vec![
        "api: { listen: \"127.0.0.1:0\" }".to_owned(),
        "workers: 2".to_owned(),
        "listeners:".to_owned(),
        "  - name: web".to_owned(),
        "    listen: 127.0.0.1:0".to_owned(),
        "    pool: echo".to_owned(),
    ];
    lines.extend(listener.lines().map(|line| format!("    {}", line.trim_start())));
    lines.push("pools:".to_owned());
    lines.push("  - name: echo".to_owned());
    lines.push(format!("    provider: {{ {provider} }}"));
    if !pool.contains("drain:") {
        lines.push("    drain: 100ms".to_owned());
    }
    lines.extend(pool.lines().map(|line| format!("    {}", line.trim_start())));
    lines.join("\n")
}

/// Three replicas of the demo server.
pub(crate) const THREE_REPLICAS: &str =
    "process: { replicas: 3, command: [ringway, echo-server, --listen, \"127.0.0.1:{port}\", --name, \"{slot}\"] }";

/// Waits until `condition` is true. Fails with `what` after [`PATIENCE`].
pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    eventually_async(what, async || condition()).await;
}

/// As [`eventually`], with an async condition.
pub(crate) async fn eventually_async(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Waits for `future`. Fails with `what` after [`PATIENCE`].
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"))
}

/// Sends four bytes and reads them back from a backend that echoes.
pub(crate) async fn echoes(stream: &mut TcpStream) -> bool {
    let mut back = [0; 4];
    stream.write_all(b"ping").await.is_ok() && stream.read_exact(&mut back).await.is_ok() && &back == b"ping"
}

/// Connects from this address of the loopback network. `None` if Ringway resets the connection before or after the
/// connect succeeds.
pub(crate) async fn served_from(source: &str, target: SocketAddr) -> Option<TcpStream> {
    // Otherwise the client would take a port for all addresses together.
    let from = Outgoing { sources: vec![source.parse().unwrap()], ..Outgoing::default() };
    let connecting = ringway::outgoing::connect(target, Some(&from), b"", |_| ());
    let mut stream = soon("a connection or a reset", connecting).await.ok()?;
    soon("an answer or a reset", echoes(&mut stream)).await.then_some(stream)
}

/// Runs a test again with a network and mounts of its own, after this setup by a shell. True: the caller is the run inside.
/// Needs root.
pub(crate) async fn in_namespace(test: &str, setup: &str) -> bool {
    const INSIDE: &str = "RINGWAY_TEST_INSIDE";
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let inside = tokio::process::Command::new("unshare")
        .args(["--net", "--mount", "sh", "-c", &format!("set -e; ip link set lo up; {setup}; exec \"$0\" \"$@\"")])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture"])
        .env(INSIDE, "1")
        .kill_on_drop(true)
        .output();
    let inside = soon("the test inside", inside).await.unwrap();
    let said = String::from_utf8_lossy(&inside.stdout) + String::from_utf8_lossy(&inside.stderr);
    assert!(inside.status.success() && said.contains("1 passed"), "{said}");
    false
}

/// Whether `name` is in the `PATH`. A test returns early if it is not.
///
/// # Panics
/// As [`skip`] does.
pub(crate) fn require_tool(name: &str) -> bool {
    let is_installed = has_tool(name);
    if !is_installed {
        skip(&format!("{name} is not installed"));
    }
    is_installed
}

/// Whether `name` is in the `PATH`, for tools that the gate does not install.
pub(crate) fn has_tool(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
}

/// Says that the test is skipped, and why.
///
/// # Panics
/// In CI, where every test must run.
pub(crate) fn skip(reason: &str) {
    assert!(std::env::var_os("CI").is_none(), "the test cannot run in CI: {reason}");
    println!("skipped: {reason}");
}

/// Status and body of a `GET`.
pub(crate) async fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let answer = http(address, "GET", path, b"").await;
    (answer.status().as_u16(), String::from_utf8(answer.into_body().to_vec()).unwrap())
}

/// Sends one request on a new connection.
pub(crate) async fn http(address: SocketAddr, method: &str, path: &str, body: &[u8]) -> hyper::Response<bytes::Bytes> {
    http_with(address, method, path, &[("host", &address.to_string())], body).await
}

/// As [`http`], with only these headers.
pub(crate) async fn http_with(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> hyper::Response<bytes::Bytes> {
    let stream = TcpStream::connect(address).await.unwrap();
    let mut request = hyper::Request::builder().method(method).uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(http_body_util::Full::new(bytes::Bytes::copy_from_slice(body))).unwrap();
    soon(path, ringway::http_client::exchange(stream, request, 1 << 30)).await.unwrap()
}

pub(crate) fn metric_in(text: &str, name: &str, labels: &[&str]) -> f64 {
    let series = |line: &&str| {
        line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']))
            && labels.iter().all(|label| line.contains(label))
    };
    text.lines().filter(series).map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
}

/// The seed of the random tests. It is printed, so a failure can be repeated.
pub(crate) fn seed() -> u64 {
    let given = std::env::var("RINGWAY_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed =
        given.unwrap_or_else(|| u64::from(std::process::id()) ^ (Instant::now().elapsed().as_nanos() as u64) ^ now());
    println!("RINGWAY_TEST_SEED={seed}");
    seed
}

fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |time| u64::from(time.subsec_nanos()))
}

/// A small generator of random numbers: splitmix64 (Steele, Lea, Flood, OOPSLA 2014).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to `below - 1`.
    pub(crate) fn below(&mut self, below: usize) -> usize {
        (self.next() % below as u64) as usize
    }
}
