//! Run-time commands (`ringway drain`, `scale`, `reload` …): from arguments to a call of the side port.

use std::time::{Duration, Instant};

use clap::Subcommand;
use ringway::api::status::Status;
use ringway::backend::Membership;
use ringway::control::command::{Command, Report};
use ringway::control::provider::Listed;

use super::side_port::{self, Port};
use super::status::time;
use super::{Common, Failure, counted, duration, print, rollout, runtime};

/// Time between two reads of the status while `--wait` waits.
const LOOK: Duration = Duration::from_millis(250);

/// Commands for a running Ringway.
#[derive(Debug, Subcommand)]
pub(crate) enum RuntimeCommand {
    /// Send a backend no new connections; open ones may finish
    Drain {
        /// POOL/BACKEND, like echo/echo-2
        #[arg(value_parser = backend)]
        backend: Backend,
        /// Time until open connections are reset [default: the pool's `drain`]
        #[arg(long, value_name = "DURATION", value_parser = duration)]
        within: Option<Duration>,
        /// Wait until the last connection has ended, and show how many are left
        #[arg(long)]
        wait: bool,
        #[command(flatten)]
        port: Port,
    },
    /// Send new connections to a drained backend again
    Undrain {
        /// POOL/BACKEND
        #[arg(value_parser = backend)]
        backend: Backend,
        #[command(flatten)]
        port: Port,
    },
    /// Change the weight of a backend
    Weight {
        /// POOL/BACKEND
        #[arg(value_parser = backend)]
        backend: Backend,
        /// 0 to 1000; with 0, the backend gets no new connections
        weight: u32,
        #[command(flatten)]
        port: Port,
    },
    /// Add a backend to a static pool
    Add {
        /// The pool
        pool: String,
        /// host:port or `unix:/path`
        address: String,
        /// Identity on the ring [default: the address]
        #[arg(long)]
        id: Option<String>,
        /// 0 to 1000
        #[arg(long, default_value_t = 1)]
        weight: u32,
        /// Tier; those above 0 get connections only if too few of the lower ones are healthy
        #[arg(long, default_value_t = 0)]
        tier: u16,
        /// Maximum of open connections [default: as the pool says]
        #[arg(long)]
        max_connections: Option<u32>,
        #[command(flatten)]
        port: Port,
    },
    /// Drain a backend of a static pool, then remove it
    Remove {
        /// POOL/BACKEND
        #[arg(value_parser = backend)]
        backend: Backend,
        /// Wait until the last connection has ended, and show how many are left
        #[arg(long)]
        wait: bool,
        #[command(flatten)]
        port: Port,
    },
    /// Move open connections to the backends of their keys
    ///
    /// After a change of the ring, Ringway resets those whose keys lead to other backends, so that their clients connect to these.
    Rebalance {
        /// The pool
        pool: String,
        /// Time in which they end, each at a moment without traffic if there is one [default: the pool's `on_move`, or 5m]
        #[arg(long, value_name = "DURATION", value_parser = duration)]
        over: Option<Duration>,
        /// Only say how many there are
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        port: Port,
    },
    /// Change the number of replicas of a pool
    Scale {
        /// The pool
        pool: String,
        /// 1 to 1000
        replicas: u32,
        #[command(flatten)]
        port: Port,
    },
    /// Replace the replicas of a pool, without a reset
    ///
    /// Ringway starts new replicas as the pool's section `rollout` says. Without `--image`, it replaces all of them.
    Rollout {
        /// The pool
        pool: String,
        /// Start containers from this image until the config names another one, and replace those from other images
        #[arg(long)]
        image: Option<String>,
        /// Wait for the end, and fail unless all replicas were replaced
        #[arg(long)]
        wait: bool,
        /// End the rollout that is under way, as if it had failed. Once more: end also the way back
        #[arg(long, conflicts_with_all = ["image", "wait"])]
        abort: bool,
        /// Only say what would change
        #[arg(long, conflicts_with = "wait")]
        dry_run: bool,
        #[command(flatten)]
        port: Port,
    },
    /// Show or change what a running Ringway logs
    Log {
        /// A level (error, warn, info, debug, trace) or a filter like `info,ringway::proxy=debug`
        filter: Option<String>,
        /// How long; after this time, Ringway logs as at its start
        #[arg(long = "for", requires = "filter", value_name = "DURATION", value_parser = duration)]
        lasts: Option<Duration>,
        /// Log as at the start
        #[arg(long, conflicts_with_all = ["filter", "lasts"])]
        reset: bool,
        /// Open the file of the access log again, after a rotation
        #[arg(long, conflicts_with_all = ["filter", "lasts", "reset"])]
        reopen: bool,
        #[command(flatten)]
        port: Port,
    },
    /// Read the config file again and apply its changes
    Reload {
        /// Drop the changes made at run time, which a reload keeps otherwise
        #[arg(long)]
        reset: bool,
        #[command(flatten)]
        port: Port,
    },
    /// Hand over to a new process with the current binary and config
    Upgrade {
        #[command(flatten)]
        port: Port,
    },
}

/// POOL/BACKEND.
#[derive(Debug, Clone)]
pub(crate) struct Backend {
    pool: String,
    id: String,
}

fn backend(text: &str) -> Result<Backend, String> {
    let parts = text.split_once('/').filter(|(pool, id)| !pool.is_empty() && !id.is_empty());
    let (pool, id) = parts.ok_or("write it as POOL/BACKEND, like echo/echo-2; see `ringway status`")?;
    Ok(Backend { pool: pool.to_owned(), id: id.to_owned() })
}

impl std::fmt::Display for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.pool, self.id)
    }
}

pub(crate) fn run(common: &Common, command: RuntimeCommand) -> Result<(), Failure> {
    runtime()?.block_on(async {
        match command {
            RuntimeCommand::Drain { backend, within, wait, port } => {
                let Backend { pool, id } = backend.clone();
                let command = Command::Drain { pool, backend: id, within };
                send_and_wait(common, &port, &command, wait.then_some(&backend)).await
            }
            RuntimeCommand::Undrain { backend: Backend { pool, id }, port } => {
                send(common, &port, &Command::Undrain { pool, backend: id }).await
            }
            RuntimeCommand::Weight { backend: Backend { pool, id }, weight, port } => {
                send(common, &port, &Command::Weight { pool, backend: id, weight }).await
            }
            RuntimeCommand::Add { pool, address, id, weight, tier, max_connections, port } => {
                let membership = Membership { weight, tier, max_connections, is_drained: false };
                let backend = Listed::parse(&address, id, membership).map_err(anyhow::Error::msg)?;
                send(common, &port, &Command::Add { pool, backend }).await
            }
            RuntimeCommand::Remove { backend, wait, port } => {
                let Backend { pool, id } = backend.clone();
                let command = Command::Remove { pool, backend: id };
                send_and_wait(common, &port, &command, wait.then_some(&backend)).await
            }
            RuntimeCommand::Rebalance { pool, over, dry_run, port } => {
                send_or_ask(common, &port, &Command::Rebalance { pool, over }, dry_run).await
            }
            RuntimeCommand::Rollout { pool, abort: true, dry_run, port, .. } => {
                send_or_ask(common, &port, &Command::AbortRollout { pool }, dry_run).await
            }
            RuntimeCommand::Rollout { pool, image, wait: true, port, .. } => {
                rollout::run_and_wait(common, &port, pool, image).await
            }
            RuntimeCommand::Rollout { pool, image, dry_run, port, .. } => {
                send_or_ask(common, &port, &Command::Rollout { pool, image }, dry_run).await
            }
            RuntimeCommand::Scale { pool, replicas, port } => {
                send(common, &port, &Command::Scale { pool, replicas }).await
            }
            RuntimeCommand::Log { reopen: true, port, .. } => send(common, &port, &Command::Reopen).await,
            RuntimeCommand::Log { filter: None, reset: false, port, .. } => show_log(common, &port).await,
            RuntimeCommand::Log { filter, lasts, port, .. } => {
                send(common, &port, &Command::Log { filter, lasts }).await
            }
            RuntimeCommand::Upgrade { port } => send(common, &port, &Command::Upgrade).await,
            RuntimeCommand::Reload { reset, port } => {
                check_file(common, &port).await?;
                send(
                    common,
                    &port,
                    &Command::Reload { text: None, is_dry_run: false, is_reset: reset, max_keys_moved: None },
                )
                .await
            }
        }
    })
}

/// Prints what the log shows.
async fn show_log(common: &Common, port: &Port) -> Result<(), Failure> {
    let log = side_port::status(common, port).await?.log;
    let log = log.ok_or_else(|| anyhow::anyhow!("this Ringway does not say what it logs"))?;
    let ends = log.ends_in_seconds.map(|seconds| format!(" for {} more", time(seconds)));
    print(&format!("{}{}\n", log.filter, ends.unwrap_or_default()))
}

/// Fails if the user names another file than the one that a reload reads.
async fn check_file(common: &Common, port: &Port) -> Result<(), Failure> {
    let Some(wanted) = &common.config else { return Ok(()) };
    let running = side_port::status(common, port).await?.config;
    let wanted = std::path::absolute(wanted).unwrap_or_else(|_| wanted.clone());
    match running {
        Some(running) if std::path::Path::new(&running) != wanted => Err(anyhow::anyhow!(
            "a reload reads the file that Ringway was started with, {running}, and not {}",
            wanted.display()
        )
        .into()),
        _ => Ok(()),
    }
}

pub(super) async fn send(common: &Common, port: &Port, command: &Command) -> Result<(), Failure> {
    let report = side_port::run(common, port, command).await?;
    print(&in_words(&report, "nothing to change\n"))
}

/// Sends a command, or asks what it would change.
async fn send_or_ask(common: &Common, port: &Port, command: &Command, is_dry_run: bool) -> Result<(), Failure> {
    if !is_dry_run {
        return send(common, port, command).await;
    }
    let report = side_port::dry_run(common, port, command).await?;
    print(&in_words(&report, "nothing to change\n"))
}

/// A report in words; `nothing` if it is empty.
pub(super) fn in_words(report: &Report, nothing: &str) -> String {
    use std::fmt::Write as _;

    let mut text = String::new();
    // Writing to a String cannot fail.
    for change in &report.changes {
        let _ = writeln!(text, "{change}");
    }
    for moved in &report.moved {
        let _ = writeln!(text, "pool {}: {:.1} % of the keys move to another backend", moved.pool, moved.share * 100.0);
    }
    if !report.needs_restart.is_empty() {
        let _ = writeln!(text, "requires an upgrade or a restart: {}", report.needs_restart.join(", "));
    }
    if text.is_empty() {
        text.push_str(nothing);
    }
    for kept in &report.kept {
        let _ = writeln!(text, "kept at run time: {kept}");
    }
    if !report.kept.is_empty() {
        text.push_str("`ringway reload --reset` drops these changes\n");
    }
    text
}

/// Sends a command that drains a backend. With `waits_for`, waits until it has no connections or has left, and fails if Ringway
/// reset some of them.
async fn send_and_wait(
    common: &Common,
    port: &Port,
    command: &Command,
    waits_for: Option<&Backend>,
) -> Result<(), Failure> {
    let Some(backend) = waits_for else { return send(common, port, command).await };
    let before = cut(&side_port::status(common, port).await?, backend);
    send(common, port, command).await?;
    wait_for(common, port, backend, before).await
}

/// The connections that drains have reset so far: of the pool, and of the backend.
fn cut(status: &Status, backend: &Backend) -> (u64, u64) {
    let pool = status.pool(&backend.pool);
    let member = pool.and_then(|pool| pool.backends.iter().find(|member| member.id == backend.id));
    (pool.map_or(0, |pool| pool.cut_by_drain), member.map_or(0, |member| member.connections.cut_by_drain))
}

/// Waits for the end of a drain, and prints a line for each change of the number of connections.
async fn wait_for(common: &Common, port: &Port, backend: &Backend, before: (u64, u64)) -> Result<(), Failure> {
    let (began, mut shown) = (Instant::now(), None);
    let cut = loop {
        let status = side_port::status(common, port).await?;
        let Some(pool) = status.pool(&backend.pool) else {
            return Err(anyhow::anyhow!("the pool of {backend} is gone").into());
        };
        let member = pool.backends.iter().find(|member| member.id == backend.id);
        let Some(member) = member else {
            print(&format!("{backend} left the pool after {:.1} s\n", began.elapsed().as_secs_f64()))?;
            // Its own counter is gone.
            break pool.cut_by_drain.saturating_sub(before.0);
        };
        let left = member.connections.active;
        let Some(drain) = &member.drain else {
            return Err(anyhow::anyhow!("{backend} is no longer drained").into());
        };
        if shown != Some(left) {
            let deadline = drain
                .deadline_in_seconds
                .map_or("no deadline".to_owned(), |left| format!("{left:.0} s until the deadline"));
            print(&format!("{backend}: {} left, {deadline}\n", counted(left, "connection")))?;
            shown = Some(left);
        }
        if left == 0 && !drain.leaves {
            break member.connections.cut_by_drain.saturating_sub(before.1);
        }
        tokio::time::sleep(LOOK).await;
    };
    if cut == 0 { Ok(()) } else { Err(Failure::Cut { what: backend.to_string(), cut }) }
}
