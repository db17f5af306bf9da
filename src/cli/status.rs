//! `ringway status`: reads the status of a running Ringway and prints it as a table.

use anyhow::Context as _;
use clap::Args;
use ringway::api::status::{Connections, Member, Replica, Status};
use ringway::control::command::Differs;

use super::{Common, Failure, print, runtime, side_port};

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    port: side_port::Port,
}

pub(crate) fn status(common: &Common, options: &Options) -> Result<(), Failure> {
    let answer = runtime()?.block_on(side_port::body(common, &options.port, "/api/status"))?;
    if options.json {
        return print(&format!("{}\n", String::from_utf8_lossy(&answer)));
    }
    let status = serde_json::from_slice(&answer).context("the side port's answer is not a status")?;
    print(&table(&status))
}

fn table(status: &Status) -> String {
    let mut rows = vec![
        ["POOL", "BACKEND", "STATE", "ADDRESS", "REPLICA", "RESTARTS", "ACTIVE", "TOTAL", "FAILED", "SHARE", "CHECK"]
            .map(str::to_owned),
    ];
    for pool in &status.pools {
        rows.extend(pool.backends.iter().map(|backend| row(&pool.name, backend)));
    }
    let ready = if status.ready { "ready" } else { "not ready" };
    let mut lines = vec![format!("Ringway {}, up {:.0} s, {ready}", status.version, status.uptime_seconds)];
    for listener in &status.listeners {
        let Connections { active, total } = listener.connections;
        let (name, address) = (&listener.name, &listener.address);
        let is_pool = status.pools.iter().any(|pool| pool.name == listener.pool);
        let pool = if is_pool { format!("pool {}", listener.pool) } else { listener.pool.clone() };
        lines.push(format!(
            "{name} on {}, {pool}: {active} connections, {total} in total",
            address.as_deref().unwrap_or("-")
        ));
        lines.extend(listener.routes.iter().map(|route| {
            let to = route.pool.as_deref().map_or("reset".to_owned(), |pool| format!("pool {pool}"));
            format!("  route {} to {to}: {} connections in total", route.name, route.connections)
        }));
    }
    for pool in &status.pools {
        if let Some(error) = pool.provider.engine.as_ref().and_then(|engine| engine.error.as_ref()) {
            lines.push(format!("pool {}: {error}", pool.name));
        }
        if pool.panic {
            lines
                .push(format!("pool {}: panic: too few backends are healthy, so Ringway tries all of them", pool.name));
        }
        lines.extend(
            pool.differs
                .iter()
                .map(|differs| format!("pool {}: differs from the config: {}", pool.name, in_words(differs))),
        );
    }
    lines.push(String::new());
    lines.push(super::table(&rows).trim_end().to_owned());
    let exits = status.pools.iter().flat_map(|pool| &pool.backends).filter(|backend| backend.replica.is_none());
    for (backend, exit) in exits.filter_map(|backend| Some((backend, backend.last_exit.as_ref()?))) {
        lines.push(format!("\n{}: {}, {:.0} s ago", backend.id, exit.reason, exit.seconds_ago));
        lines.extend(exit.output.iter().map(|line| format!("  {line}")));
    }
    lines.join("\n") + "\n"
}

/// A run-time change in a few words.
fn in_words(differs: &Differs) -> String {
    let backend = differs.backend.as_ref().map(|id| format!(" {id}")).unwrap_or_default();
    match (differs.config, differs.now) {
        (Some(config), Some(now)) => format!("{}{backend} is {now}, not {config}", differs.what),
        (None, Some(now)) => format!("{}{backend} is {now}", differs.what),
        _ => format!("{}{backend}", differs.what),
    }
}

fn row(pool: &str, backend: &Member) -> [String; 11] {
    [
        pool.to_owned(),
        backend.id.clone(),
        backend.state.clone(),
        backend.address.clone().unwrap_or_else(|| "-".to_owned()),
        backend.replica.as_ref().map_or("-".to_owned(), |replica| match replica {
            Replica::Process { pid } => format!("pid {pid}"),
            Replica::Container { name, .. } => name.clone(),
        }),
        backend.restarts.to_string(),
        backend.connections.active.to_string(),
        backend.connections.total.to_string(),
        backend.connections.failed.to_string(),
        format!("{:.1} %", backend.share * 100.0),
        backend.health.last.clone().unwrap_or_else(|| "-".to_owned()),
    ]
}
