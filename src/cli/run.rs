//! `ringway run`: the main job, from the config to the exit code.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use ringway::api::status::Status;
use ringway::app::{App, Environment, Inheritance, TAKE_OVER, report_failure};
use ringway::config::{Config, Provider, Source};
use ringway::control::command::{Caller, Command, CommandSender};
use ringway::limits;
use rustix::process::DumpableBehavior;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::logging::{Log, report_lost};
use super::{Common, Failure, LogFormat, docker_host, runtime, side_port};

pub(crate) fn run(common: &Common) -> Result<ExitCode, Failure> {
    let read = common.config();
    if let (Err(error), true) = (&read, common.take_over) {
        report_failure(&error.to_string());
    }
    let (config, source) = read?;
    let log = Log::start(common)?;
    Ok(serve(common, config, &source, &log).map_or_else(
        |failure| {
            // Not directly to standard error: nobody may be reading it.
            log.print(format!("ringway: {failure}\n"));
            if common.take_over {
                report_failure(&failure.to_string());
            }
            failure.exit_code()
        },
        |()| ExitCode::SUCCESS,
    ))
}

fn serve(common: &Common, config: Config, source: &Source, log: &Log) -> Result<(), Failure> {
    let (before, _) = limits::raise_open_files();
    let executable = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("/proc/self/exe"));
    let environment = Environment {
        source: source.clone(),
        executable,
        arguments: successor_arguments(),
        replica_open_files: Some(before),
        docker_host: docker_host(),
        token: std::env::var(side_port::TOKEN).ok(),
        log_lost: Some(log.lost()),
        events: log.events(),
        log_filter: Some(log.filter()),
    };
    if environment.token.is_some() || config.api.token_file.is_some() {
        // Processes of the same user cannot read the environment and the memory of this one then (prctl(2)).
        let _ = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable);
    }
    let is_demo = is_demo(&config);
    let runtime = runtime()?;
    let outcome = runtime.block_on(async {
        let signals = Signals::new().map_err(|error| anyhow::anyhow!("cannot listen for signals: {error}"))?;
        let stop = CancellationToken::new();
        let (from_signals, pending) = mpsc::channel(4);
        let second = tokio::spawn(obey(signals, stop.clone(), from_signals));
        let inheritance = Inheritance::take(common.take_over);
        let inheritance = inheritance.map_err(|error| anyhow::anyhow!("cannot take over: {error}"))?;
        let app = tokio::select! {
            app = App::start(config, environment, inheritance) => app.map_err(|error| Failure::start(source, error))?,
            () = stop.cancelled() => return Ok(()),
        };
        tokio::spawn(report_lost(log.lost()));
        tokio::spawn(forward(pending, app.state().commands().clone()));
        if common.log_format == LogFormat::Text && !common.take_over {
            log.print(banner(&app, &source.to_string(), is_demo));
        }
        tokio::select! {
            ended = app.run(stop.cancelled_owned()) => ended.map_err(|error| Failure::Other(error.into()))?,
            _ = second => return Err(anyhow::anyhow!("a second signal ended Ringway at once").into()),
        }
        tracing::info!("stopped");
        Ok(())
    });
    // Without waiting for name lookups. Dropping the tasks of the runtime ends the replicas.
    runtime.shutdown_background();
    outcome
}

/// Signals within this time after the first count as the first.
const REPEATED: Duration = Duration::from_millis(300);

/// The arguments of a successor: those of this process, with `--take-over` first.
fn successor_arguments() -> Vec<OsString> {
    let own = std::env::args_os().skip(1).filter(|argument| argument != TAKE_OVER);
    std::iter::once(TAKE_OVER.into()).chain(own).collect()
}

/// Forwards the commands of signals to the app.
async fn forward(mut pending: mpsc::Receiver<Command>, app: CommandSender) {
    while let Some(command) = pending.recv().await {
        // The app logs the outcome.
        let _ = app.send(command, Caller::Signal).await;
    }
}

/// SIGHUP reloads, SIGUSR1 opens the access log again, SIGUSR2 upgrades. The first SIGTERM or SIGINT stops Ringway in order; the
/// second ends this future.
async fn obey(mut signals: Signals, stop: CancellationToken, commands: mpsc::Sender<Command>) {
    let name = signals.next(Some(&commands)).await;
    tracing::info!(signal = name, "stopping: open connections may finish; a second signal ends Ringway at once");
    stop.cancel();
    // `timeout` and some supervisors signal both a process and its group: two signals at once count as one.
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
    user1: Signal,
    user2: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            user1: signal(SignalKind::user_defined1())?,
            user2: signal(SignalKind::user_defined2())?,
        })
    }

    /// Waits for SIGTERM or SIGINT. SIGHUP never ends Ringway, not even when the terminal closes.
    async fn next(&mut self, commands: Option<&mpsc::Sender<Command>>) -> &'static str {
        // A full queue holds the same command already.
        let send = |command| drop(commands.map(|commands| commands.try_send(command)));
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return "SIGTERM",
                _ = self.interrupt.recv() => return "SIGINT",
                _ = self.hangup.recv() => send(Command::Reload { text: None, is_dry_run: false, is_reset: false, max_keys_moved: None }),
                _ = self.user1.recv() => send(Command::Reopen),
                _ = self.user2.recv() => send(Command::Upgrade),
            }
        }
    }
}

/// The text that Ringway prints when it has started: addresses, and commands to try.
fn banner(app: &App, origin: &str, is_demo: bool) -> String {
    use std::fmt::Write as _;

    let status = Status::of(app.state());
    let api = app.api_address();
    let mut text = format!("Ringway {}, with {origin}\n\n", status.version);
    // Writing to a String cannot fail.
    for listener in &status.listeners {
        let (address, name) = (listener.address.as_deref().unwrap_or_default(), &listener.name);
        // The last of the routes is the default.
        let routes = match listener.routes.len().saturating_sub(1) {
            0 => String::new(),
            routes => format!("{routes} routes, otherwise "),
        };
        let pool = match status.pools.iter().find(|pool| pool.name == listener.pool) {
            Some(pool) => format!("pool {}, {} backends, key {}", pool.name, pool.backends.len(), pool.key),
            None => listener.pool.clone(),
        };
        let _ = writeln!(text, "  {address:<21} {name}: {routes}{pool}");
    }
    let _ = writeln!(text, "  {:<21} side port: /api/request /api/status /metrics /healthz /readyz\n", api.to_string());
    text.push_str("Try:\n");
    let first = app.state().view().listeners.first().and_then(|listener| listener.address.ip());
    if let Some(port) = first.filter(|_| is_demo).map(|address| address.port()) {
        let _ = writeln!(text, "  curl -X POST -d '{{\"data\": \"example\"}}' http://localhost:{port}/api/request");
        let _ = writeln!(text, "  printf hello | nc -N localhost {port}");
    }
    let api = side_port::reachable(&api.to_string());
    let _ = writeln!(text, "  curl http://{api}/api/status\n  {} status --api {api}", program());
    if app.state().shows_page() {
        let _ = writeln!(text, "  http://{api}/ in a browser");
    }
    text.push('\n');
    text
}

/// The name of this program as the user typed it.
fn program() -> String {
    std::env::args().next().unwrap_or_else(|| "ringway".to_owned())
}

/// Whether the first listener leads to the demo backend, which understands the commands of the banner.
fn is_demo(config: &Config) -> bool {
    let first = config
        .listeners
        .first()
        .and_then(|listener| config.pools.iter().find(|pool| Some(&pool.name) == listener.pool.as_ref()));
    first.is_some_and(|pool| match &pool.provider {
        Provider::Process(process) => process.spec.command.iter().take(2).eq(["ringway", "echo-server"]),
        Provider::Containers(containers) => {
            containers.spec.command.iter().flatten().next().is_some_and(|word| word == "echo-server")
        }
        Provider::Static(_) | Provider::Discover(_) | Provider::Dns(_) | Provider::File(_) => false,
    })
}
