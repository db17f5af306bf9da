//! `ringway run`: the main job, from the config to the exit code.

use std::ffi::OsString;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use ringway::api::status::Status;
use ringway::app::{App, Environment, Inheritance, TAKE_OVER};
use ringway::config::{Config, Provider};
use ringway::control::operator::{Operator, Order};
use ringway::limits;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{Common, Failure, LogFormat, docker_host, runtime, side_port};

pub(crate) fn run(common: &Common) -> Result<(), Failure> {
    let (config, source) = common.config()?;
    common.start_logging()?;
    let (before, _) = limits::raise_open_files();
    let executable = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("/proc/self/exe"));
    let environment = Environment {
        source: source.clone(),
        executable,
        arguments: successor_arguments(),
        replica_open_files: Some(before),
        docker_host: docker_host(),
        token: std::env::var(side_port::TOKEN).ok(),
    };
    let is_demo = is_demo(&config);
    let runtime = runtime()?;
    let outcome = runtime.block_on(async {
        let signals = Signals::new().map_err(|error| anyhow::anyhow!("cannot listen for signals: {error}"))?;
        let stop = CancellationToken::new();
        let (give, orders) = mpsc::channel(4);
        let second = tokio::spawn(obey(signals, stop.clone(), give));
        let inheritance = Inheritance::take(common.take_over);
        let inheritance = inheritance.map_err(|error| anyhow::anyhow!("cannot take over: {error}"))?;
        let app = tokio::select! {
            app = App::start(config, environment, inheritance) => app?,
            () = stop.cancelled() => return Ok(()),
        };
        tokio::spawn(carry_on(orders, app.state().operator().clone()));
        if common.log_format == LogFormat::Text && !common.take_over {
            // Nobody may be reading it any more.
            let _ = std::io::stderr().write_all(banner(&app, &source.to_string(), is_demo).as_bytes());
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

/// A successor's: those of this process, but for the one that told it to take over.
fn successor_arguments() -> Vec<OsString> {
    let own = std::env::args_os().skip(1).filter(|argument| argument != TAKE_OVER);
    std::iter::once(TAKE_OVER.into()).chain(own).collect()
}

/// Gives the orders that signals stand for.
async fn carry_on(mut orders: mpsc::Receiver<Order>, operator: Operator) {
    while let Some(order) = orders.recv().await {
        // The app logs what came of it.
        let _ = operator.order(order).await;
    }
}

/// SIGHUP reloads, SIGUSR2 upgrades. The first of the other signals stops in order; done at the second.
async fn obey(mut signals: Signals, stop: CancellationToken, give: mpsc::Sender<Order>) {
    let name = signals.next(Some(&give)).await;
    tracing::info!(signal = name, "stopping: open connections may finish; once more to exit at once");
    stop.cancel();
    // `timeout` and some supervisors signal both a process and its group: two at once are one.
    let _ = tokio::time::timeout(REPEATED, async {
        loop {
            signals.next(None).await;
        }
    })
    .await;
    signals.next(None).await;
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    user2: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            user2: signal(SignalKind::user_defined2())?,
        })
    }

    /// Waits for SIGTERM or SIGINT. A SIGHUP, also that of a closed terminal, is no reason to end.
    async fn next(&mut self, orders: Option<&mpsc::Sender<Order>>) -> &'static str {
        // Where several wait already, one more says nothing new.
        let give = |order| drop(orders.map(|orders| orders.try_send(order)));
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return "SIGTERM",
                _ = self.interrupt.recv() => return "SIGINT",
                _ = self.hangup.recv() => give(Order::Reload { text: None, is_dry_run: false }),
                _ = self.user2.recv() => give(Order::Upgrade),
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
    if let Some(listener) = app.state().view().listeners.first().filter(|_| is_demo) {
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
