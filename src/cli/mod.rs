//! The command line: its arguments, and the small commands.
//!
//! # Layout
//!
//! - [`run`]: the main job; [`check`]: whether a config could run
//! - [`status`]: the state of a running Ringway as a table; [`top`]: the same, live
//! - [`explain`], [`sessions`]: why a connection goes where it goes; open connections
//! - [`commands`]: run-time commands for a running Ringway
//! - [`reap`]: removes containers that Ringway created
//! - [`healthcheck`], [`init`]: the health check and process 1 of Ringway's own container
//! - [`new_config`]: writes a first config; [`packaging`]: schema, completions and manual pages; [`help`]: the list of commands
//! - [`logging`]: the log on standard error
//! - [`side_port`]: HTTP client of the side port; [`table`], [`terminal`]: how commands print

pub(crate) mod check;
pub(crate) mod commands;
pub(crate) mod explain;
pub(crate) mod healthcheck;
pub(crate) mod init;
pub(crate) mod new_config;
pub(crate) mod packaging;
pub(crate) mod reap;
pub(crate) mod run;
pub(crate) mod sessions;
pub(crate) mod status;
pub(crate) mod top;

mod help;
mod logging;
mod rollout;
mod side_port;
mod table;
mod terminal;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ringway::app::StartError;
use ringway::config::{self, Config, Place, Source};
use ringway::control::supervisor::launch::{self, Launch};
use ringway::control::supervisor::shim::{self, Shim};

/// A Layer-4 TCP load balancer on a consistent-hash ring, with self-healing replicas
#[derive(Debug, Parser)]
#[command(name = "ringway", version, term_width = 80, disable_help_subcommand = true)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

/// Arguments of every command.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Common {
    /// Config file [default: the first of ./config.yaml and /etc/ringway/config.yaml that exists, else the built-in config]
    #[arg(long, short, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Log level (error, warn, info, debug, trace) or a filter like `info,ringway::proxy=debug`
    #[arg(
        long,
        global = true,
        env = "RINGWAY_LOG",
        hide_env_values = true,
        default_value = "info",
        value_name = "FILTER"
    )]
    log: String,
    /// Take over from the Ringway that started this process
    #[arg(long, global = true, hide = true)]
    take_over: bool,
    /// Format of the log, which goes to standard error
    #[arg(long, global = true, value_name = "FORMAT", value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

/// Format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Balance connections (the default)
    Run,
    /// Validate a config, and try whether it could start here
    Check(check::Options),
    /// Show the pools and backends of a running Ringway
    Status(status::Options),
    /// Watch a running Ringway: backends, rates and sessions
    Top(top::Options),
    /// Show why a connection goes to its backend
    Explain(explain::Options),
    /// List the open connections
    Sessions(sessions::List),
    /// End open connections with a reset, by id or by conditions
    Kill(sessions::Kill),
    /// Remove the containers that Ringway created
    Reap(reap::Options),
    /// Exit with 0 if process 1 of this container is ready
    Healthcheck {
        /// Ringway need not be ready: exit with 0 if it is alive
        #[arg(long)]
        live: bool,
    },
    /// Write a commented config to start from
    Init(new_config::Options),
    /// Print a JSON Schema of the config, for editors
    Schema(packaging::Schema),
    #[command(flatten)]
    Runtime(commands::RuntimeCommand),
    /// Run the demo backend
    EchoServer(echo_server::Options),
    /// Print a shell's completions
    #[command(hide = true)]
    Completions(packaging::Completions),
    /// Write the manual pages to a folder
    #[command(hide = true)]
    Man(packaging::Man),
    /// Run a replica until its Ringway stops it or exits
    #[command(hide = true)]
    Shim(Shim),
    /// Become the program of a replica, and die with its shim
    #[command(hide = true)]
    Launch(Launch),
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    Config(#[from] config::Error),
    #[error("--log {filter:?}: {error}")]
    Log { filter: String, error: String },
    #[error("{}{error}", place.as_ref().map(|place| format!("{place}: ")).unwrap_or_default())]
    Start { place: Option<Place>, error: StartError },
    #[error("{what}: Ringway reset {} at the deadline", counted(*cut, "connection"))]
    Cut { what: String, cut: u64 },
    #[error("{0:#}")]
    Other(#[from] anyhow::Error),
}

impl Failure {
    /// The app could not start with the config of this source.
    fn start(source: &Source, error: StartError) -> Self {
        Self::Start { place: error.key_path().and_then(|path| source.place(path)), error }
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Config(_) | Self::Log { .. } => ExitCode::from(2),
            Self::Start { .. } | Self::Other(_) => ExitCode::FAILURE,
            Self::Cut { .. } => ExitCode::from(3),
        }
    }
}

impl Common {
    /// Where the config comes from.
    fn source(&self) -> Source {
        Source::find(self.config.clone())
    }

    /// The config, and where it comes from.
    fn config(&self) -> Result<(Config, Source), config::Error> {
        let source = self.source();
        Ok((source.load()?, source))
    }
}

/// Parses a duration of the command line.
fn duration(text: &str) -> Result<Duration, &'static str> {
    ringway::text::duration(text).ok_or("write it with a unit, like 500ms, 10s or 5m")
}

/// A number with its noun: `1 connection`, `2 connections`.
fn counted(count: u64, noun: &str) -> String {
    if count == 1 { format!("1 {noun}") } else { format!("{count} {noun}s") }
}

/// Prints to standard output. A closed pipe (`ringway check | head`) is not a failure.
fn print(text: &str) -> Result<(), Failure> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(anyhow::anyhow!("cannot write to standard output: {error}").into())
        }
        _ => Ok(()),
    }
}

pub(crate) fn echo_server(options: echo_server::Options) -> Result<(), Failure> {
    Ok(runtime()?.block_on(::echo_server::run_until_signalled(options))?)
}

pub(crate) fn launch(launch: &Launch) -> Result<(), Failure> {
    let program = launch.command.first().map(|program| program.display().to_string()).unwrap_or_default();
    Err(anyhow::anyhow!("cannot run {program}: {}", launch::launch(launch)).into())
}

pub(crate) fn shim(shim: &Shim) -> Result<(), Failure> {
    Ok(shim::run(shim).map_err(|error| anyhow::anyhow!("cannot run a replica: {error}"))?)
}

/// One thread, because replicas die with the thread that started them.
fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    Ok(runtime.map_err(|error| anyhow::anyhow!("cannot start the runtime: {error}"))?)
}

/// The address of the Docker engine, from the variables that Docker's own tools use.
fn docker_host() -> Option<String> {
    let host = std::env::var("DOCKER_HOST").ok()?;
    let wants_tls = std::env::var_os("DOCKER_TLS_VERIFY").is_some_and(|verify| !verify.is_empty());
    // Never unencrypted if the user asks for TLS: Ringway rejects `https` with a remedy.
    Some(if wants_tls { host.replacen("tcp://", "https://", 1) } else { host })
}
