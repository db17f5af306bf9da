//! `ringway reap`: removes the containers that Ringway created. They keep running when Ringway stops.

use std::time::Duration;

use clap::Args;
use ringway::config::Provider;
use ringway::control::docker::engine::Engine;
use ringway::control::docker::reap;
use ringway::control::docker::scope::{self, ScopeSettings};
use tokio::signal::unix::{SignalKind, signal};

use super::logging::Log;
use super::{Common, Failure, docker_host, runtime};

/// Time between SIGTERM and SIGKILL if the config has no pool of containers.
const GRACE: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Wait for SIGTERM, then remove the containers only if this compose service has ended for good: `docker compose
    /// down` removes the replicas, `docker compose restart` keeps them
    #[arg(long, value_name = "SERVICE")]
    after: Option<String>,
    /// Owner of the containers [default: `docker.owner` of the config]
    #[arg(long)]
    owner: Option<String>,
}

pub(crate) fn reap(common: &Common, options: &Options) -> Result<(), Failure> {
    let (config, origin) = common.config()?;
    let _log = Log::start(common)?;
    let grace = config.pools.iter().filter_map(|pool| match &pool.provider {
        Provider::Containers(containers) => Some(containers.stop_grace),
        _ => None,
    });
    let longest = grace.max();
    let owner = options.owner.clone().or(config.docker.owner);
    // Without any of them the owner is unknown. The built-in config is an example.
    if longest.is_none() && owner.is_none() && options.after.is_none() {
        return Err(anyhow::anyhow!(
            "{origin} has no pool of containers: pass the right config with --config, or the owner with --owner"
        )
        .into());
    }
    let grace = longest.unwrap_or(GRACE);
    let engine = Engine::new(docker_host().as_deref(), config.docker.timeout).map_err(anyhow::Error::msg)?;
    runtime()?.block_on(async {
        // The network does not matter here.
        let wanted = ScopeSettings { owner, network: Some(String::new()) };
        let Some(service) = &options.after else {
            let scope = scope::find(&engine, &wanted).await.map_err(anyhow::Error::from)?;
            return remove(&engine, &scope.owner, grace).await;
        };
        let cannot_listen = |error| anyhow::anyhow!("cannot listen for signals: {error}");
        let mut terminate = signal(SignalKind::terminate()).map_err(cannot_listen)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot_listen)?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        let (scope, project) = scope::find_in_project(&engine, &wanted).await.map_err(anyhow::Error::from)?;
        let Some(project) = project else {
            return Err(anyhow::anyhow!(
                "--after works only inside a compose project, and this container does not belong to one"
            )
            .into());
        };
        if reap::has_ended(&engine, &project, service).await.map_err(anyhow::Error::from)? {
            return remove(&engine, &scope.owner, grace).await;
        }
        tracing::info!(service, "the service still runs; its replicas stay");
        Ok(())
    })
}

async fn remove(engine: &Engine, owner: &str, grace: Duration) -> Result<(), Failure> {
    let removed = reap::remove_all(engine, owner, grace).await.map_err(anyhow::Error::from)?;
    tracing::info!(owner, removed, "replicas removed");
    Ok(())
}
