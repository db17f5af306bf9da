//! `ringway run`: the main job, from the config to the exit code.

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use ringway::api::status::Status;
use ringway::app::{App, Environment};
use ringway::config::{Config, Provider};
use ringway::limits;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::{Common, Failure, LogFormat, docker_host, runtime, side_port};

pub(crate) fn run(common: &Common) -> Result<(), Failure> {
    let (config, origin) = common.config()?;
    common.start_logging()?;
    let (before, _) = limits::raise_open_files();
    let executable = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("/proc/self/exe"));
    let environment = Environment { executable, replica_open_files: Some(before), docker_host: docker_host() };
    let is_demo = is_demo(&config);
    let runtime = runtime()?;
    let outcome = runtime.block_on(async {
        let signals = Signals::new().map_err(|error| anyhow::anyhow!("cannot listen for signals: {error}"))?;
        let stop = CancellationToken::new();
        let second = tokio::spawn(obey(signals, stop.clone()));
        let app = tokio::select! {
            app = App::start(config, environment) => app?,
            () = stop.cancelled() => return Ok(()),
        };
        if common.log_format == LogFormat::Text {
            // Nobody may be reading it any more.
            let _ = std::io::stderr().write_all(banner(&app, &origin, is_demo).as_bytes());
        }
        tokio::select! {
            ended = app.run(stop.cancelled_owned()) => ended.map_err(|error| Failure::Other(error.into()))?,
            _ = second => return Err(anyhow::anyhow!("ended at once by a second signal").into()),
        }
        tracing::info!("stopped");
        Ok(())
    });
    // Not waiting for name look-ups under way. Dropping its tasks ends the replicas.
    runtime.shutdown_background();
    outcome
}

/// Signals within this time after the first belong to it.
const REPEATED: Duration = Duration::from_millis(300);

/// The first signal stops in order; done at the second.
async fn obey(mut signals: Signals, stop: CancellationToken) {
    let name = signals.next().await;
    tracing::info!(signal = name, "stopping: open connections may finish; once more to exit at once");
    stop.cancel();
    // `timeout` and some supervisors signal both a process and its group: two at once are one.
    let _ = tokio::time::timeout(REPEATED, async {
        loop {
            signals.next().await;
        }
    })
    .await;
    signals.next().await;
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for SIGTERM or SIGINT. A SIGHUP, as a closed terminal or a log rotation sends it, is no reason to
    /// end.
    async fn next(&mut self) -> &'static str {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return "SIGTERM",
                _ = self.interrupt.recv() => return "SIGINT",
                _ = self.hangup.recv() => tracing::warn!("SIGHUP is ignored: a changed config needs a restart"),
            }
        }
    }
}

/// What listens where, and what to try.
fn banner(app: &App, origin: &str, is_demo: bool) -> String {
    use std::fmt::Write as _;

    let status = Status::of(app.state());
    let api = app.api_address();
    let mut text = format!("Ringway {}, with {origin}\n\n", status.version);
    // Writing to a String cannot fail.
    for listener in &status.listeners {
        let pool = status.pools.iter().find(|pool| pool.name == listener.pool);
        let (backends, key) = pool.map_or((0, ""), |pool| (pool.backends.len(), pool.key.as_str()));
        let (address, name, pool) = (&listener.address, &listener.name, &listener.pool);
        let _ = writeln!(text, "  {address:<21} {name}: pool {pool}, {backends} backends, key {key}");
    }
    let _ = writeln!(text, "  {:<21} side port: /api/request /api/status /metrics /healthz /readyz\n", api.to_string());
    text.push_str("Try:\n");
    if let Some(listener) = app.state().listeners.first().filter(|_| is_demo) {
        let port = listener.address.port();
        let _ = writeln!(text, "  curl -X POST -d '{{\"data\": \"example\"}}' http://localhost:{port}/api/request");
        let _ = writeln!(text, "  printf hello | nc -N localhost {port}");
    }
    let api = side_port::reachable(api);
    let _ = writeln!(text, "  curl http://{api}/api/status\n  {} status --api {api}\n", program());
    text
}

/// How this program was called: what a person can type again.
fn program() -> String {
    std::env::args().next().unwrap_or_else(|| "ringway".to_owned())
}

/// Whether the first listener leads to the demo backend, which speaks what the banner proposes.
fn is_demo(config: &Config) -> bool {
    let first =
        config.listeners.first().and_then(|listener| config.pools.iter().find(|pool| pool.name == listener.pool));
    first.is_some_and(|pool| match &pool.provider {
        Provider::Process(process) => process.command.iter().take(2).eq(["ringway", "echo-server"]),
        Provider::Containers(containers) => {
            containers.spec.command.iter().flatten().next().is_some_and(|word| word == "echo-server")
        }
        Provider::Static(_) | Provider::Discover(_) => false,
    })
}
