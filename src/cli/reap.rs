//! `ringway reap`: removes the containers that Ringway has made, which go on when Ringway stops.

use std::time::Duration;

use clap::Args;
use ringway::config::Provider;
use ringway::control::docker::engine::Engine;
use ringway::control::docker::reap;
use ringway::control::docker::scope::{self, ScopeSettings};
use tokio::signal::unix::{SignalKind, signal};

use super::{Common, Failure, docker_host, runtime};

/// From SIGTERM to SIGKILL where the config has no replicas in containers any more.
const GRACE: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Wait for SIGTERM first. Then remove them if the containers of this compose service have ended and do not
    /// come back: so `docker compose down` removes replicas, and `docker compose restart` keeps them
    #[arg(long, value_name = "SERVICE")]
    after: Option<String>,
    /// Whose containers; without it the config's `docker.owner`
    #[arg(long)]
    owner: Option<String>,
}

pub(crate) fn reap(common: &Common, options: &Options) -> Result<(), Failure> {
    let (config, origin) = common.config()?;
    common.start_logging()?;
    let grace = config.pools.iter().filter_map(|pool| match &pool.provider {
        Provider::Containers(containers) => Some(containers.stop_grace),
        _ => None,
    });
    let longest = grace.max();
    let owner = options.owner.clone().or(config.docker.owner);
    // The built-in config, for example, says nothing of whose containers are meant.
    if longest.is_none() && owner.is_none() && options.after.is_none() {
        return Err(anyhow::anyhow!("{origin} makes no containers: give its config with --config, or --owner").into());
    }
    let grace = longest.unwrap_or(GRACE);
    let engine = Engine::new(docker_host().as_deref(), config.docker.timeout).map_err(anyhow::Error::msg)?;
    runtime()?.block_on(async {
        // Which network does not matter here.
        let wanted = ScopeSettings { owner, network: Some(String::new()) };
        let Some(service) = &options.after else {
            let place = scope::find(&engine, &wanted).await.map_err(anyhow::Error::from)?;
            return remove(&engine, &place.owner, grace).await;
        };
        let cannot_listen = |error| anyhow::anyhow!("cannot listen for signals: {error}");
        let mut terminate = signal(SignalKind::terminate()).map_err(cannot_listen)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot_listen)?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        let (place, project) = scope::find_in_project(&engine, &wanted).await.map_err(anyhow::Error::from)?;
        let Some(project) = project else {
            return Err(anyhow::anyhow!("--after is for a service of a compose project, and this is none").into());
        };
        if reap::has_ended(&engine, &project, service).await.map_err(anyhow::Error::from)? {
            return remove(&engine, &place.owner, grace).await;
        }
        tracing::info!(service, "it runs on: its replicas are kept");
        Ok(())
    })
}

async fn remove(engine: &Engine, owner: &str, grace: Duration) -> Result<(), Failure> {
    let removed = reap::remove_all(engine, owner, grace).await.map_err(anyhow::Error::from)?;
    tracing::info!(owner, removed, "replicas removed");
    Ok(())
}
