//! One pool with many backends, which are checked every two seconds.

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{Figures, Options, Running, addresses, metric};
use crate::balancers::Kind;
use crate::side_port::SidePort;

/// Time over which CPU time is measured.
const STEADY: Duration = Duration::from_secs(10);

pub(super) async fn measure(options: &Options, programs: &[(String, PathBuf)]) -> anyhow::Result<Figures> {
    let mut figures = Figures::default();
    for (name, program) in programs {
        eprintln!("{name}: {} backends", options.backends);
        of_ringway(options, name, program, &mut figures).await?;
    }
    if let Some(program) = Kind::Haproxy.find() {
        eprintln!("haproxy: {} backends", options.backends);
        of_haproxy(options, &program, &mut figures).await?;
    }
    Ok(figures)
}

/// A server on all addresses of the loopback network. Dropping it makes all backends refuse connections.
struct Server {
    port: u16,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind("0.0.0.0:0")?;
        let port = listener.local_addr()?.port();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                // A check ends before this thread accepts it. The thread closes every other connection.
                drop(listener.accept());
            }
        });
        Ok(Self { port, stop, thread: Some(thread) })
    }

    /// The address of backend `number`.
    fn backend(&self, number: u32) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::from(u32::from(Ipv4Addr::new(127, 1, 0, 1)) + number), self.port))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes the thread from its accept.
        let _ = std::net::TcpStream::connect(("127.0.0.1", self.port));
        self.thread.take().map(std::thread::JoinHandle::join);
    }
}

async fn of_ringway(options: &Options, name: &str, program: &Path, figures: &mut Figures) -> anyhow::Result<()> {
    let server = Server::start()?;
    let [web, api] = addresses()?;
    let mut config = format!(
        "workers: 1\n{}api: {{ listen: \"{api}\" }}\nlisteners: [{{ name: web, listen: \"{web}\", pool: web }}]\npools:\n  - name: web\n    \
         health_check: {{ kind: tcp, interval: 2s }}\n    provider:\n      static:\n",
        metrics_off(program)
    );
    for number in 0..options.backends {
        let _ = writeln!(config, "        - {{ address: \"{}\" }}", server.backend(number));
    }
    let running = Running::start(Kind::Ringway, program, &config, Some(options.balancer_cpu))?;
    let side_port = SidePort::new(api);
    let wanted = f64::from(options.backends);
    let healthy = async || metric(side_port, "ringway_pool_backends_healthy").await;
    let took = running.when("all healthy", running.began, async || healthy().await == Some(wanted)).await?;
    figures.add(name, "start: all healthy after", took.as_secs_f64(), "s");
    tokio::time::sleep(Duration::from_secs(3)).await;
    figures.add(name, "CPU time of the checks", running.cpu_over(STEADY).await, "s per s");
    figures.add(name, "memory", running.tree().proportional() as f64 / 1e6, "MB");
    drop(server);
    let began = Instant::now();
    let took = running.when("all down", began, async || healthy().await == Some(0.0)).await?;
    figures.add(name, "all refuse: noticed for all after", took.as_secs_f64(), "s");
    Ok(())
}

/// The line that turns off the metrics of each backend, if the program knows it: a scrape is then cheap. An older Ringway
/// does not.
fn metrics_off(program: &Path) -> &'static str {
    const LINE: &str = "metrics: { per_backend: off }\n";
    let Ok(file) = tempfile::NamedTempFile::new() else { return "" };
    let config = format!(
        "{LINE}listeners: [{{ name: a, listen: \"127.0.0.1:1\", pool: p }}]\n\
         pools: [{{ name: p, provider: {{ static: [{{ address: \"127.0.0.1:2\" }}] }} }}]\n"
    );
    let is_known = std::fs::write(file.path(), config).is_ok()
        && std::process::Command::new(program)
            .args(["check", "--config"])
            .arg(file.path())
            .output()
            .is_ok_and(|output| output.status.success());
    if is_known { LINE } else { "" }
}

async fn of_haproxy(options: &Options, program: &Path, figures: &mut Figures) -> anyhow::Result<()> {
    let server = Server::start()?;
    let [web, _] = addresses()?;
    let mut config = format!(
        "global\n  nbthread 1\n  stats socket unix@admin level admin\ndefaults\n  mode tcp\n  timeout connect 2s\n  timeout client 10m\n  \
         timeout server 10m\nfrontend web\n  bind {web}\n  default_backend web\nbackend web\n  balance source\n  hash-type consistent\n"
    );
    for number in 0..options.backends {
        let _ = writeln!(config, "  server b{number} {} check inter 2s", server.backend(number));
    }
    let running = Running::start(Kind::Haproxy, program, &config, Some(options.balancer_cpu))?;
    let socket = running.files.path().join("admin");
    let up = || states(&socket).map(|text| text.lines().filter(|line| line.contains(",UP")).count());
    let wanted = options.backends as usize;
    running.when("serving", running.began, async || up().is_some_and(|up| up >= wanted)).await?;
    tokio::time::sleep(Duration::from_secs(5)).await;
    figures.add("haproxy", "CPU time of the checks", running.cpu_over(STEADY).await, "s per s");
    figures.add("haproxy", "memory", running.tree().proportional() as f64 / 1e6, "MB");
    drop(server);
    let began = Instant::now();
    let took = running.when("all down", began, async || up() == Some(0)).await?;
    figures.add("haproxy", "all refuse: noticed for all after", took.as_secs_f64(), "s");
    Ok(())
}

/// The states of all servers, from HAProxy's socket.
fn states(socket: &Path) -> Option<String> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.write_all(b"show stat -1 4 -1\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}
