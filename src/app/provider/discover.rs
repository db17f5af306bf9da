//! The provider `docker` with `discover`: containers that something else runs.

use std::sync::Arc;

use super::source::{Prepared, ProviderStatus, Source, Update, scope, watched};
use crate::app::StartError;
use crate::app::context::PoolContext;
use crate::app::tasks::until;
use crate::config;
use crate::control::Event;
use crate::control::docker::label;
use crate::control::provider::discover::{Settings, follow};

/// A pool of discovered containers has nothing to update: other settings make another pool.
#[derive(Debug)]
struct Discovered;

pub(super) fn prepare(
    pool: &config::Pool,
    discover: &config::Discover,
    context: &PoolContext<'_>,
) -> Result<Prepared, StartError> {
    let (engine, engine_status) = watched(context.engine)?;
    let settings = Settings {
        pool: pool.name.as_str().into(),
        label: discover.label.clone().unwrap_or_else(|| format!("{}={}", label::POOL, pool.name)),
        reads_labels: discover.reads_labels,
        port: discover.port,
        scope: scope(context.config, discover.network.as_ref()),
        resync: context.config.docker.resync,
        most_weight: pool.most_weight(),
    };
    let status = Arc::clone(&engine_status);
    Ok(Prepared {
        source: Box::new(Discovered),
        known: Vec::new(),
        status: ProviderStatus::Engine(engine_status),
        start: Box::new(move |start| {
            let following = follow(settings, engine, start.events, status);
            start.tasks.spawn(until(start.over, following));
        }),
    })
}

impl Source for Discovered {
    fn update(&mut self, _update: &Update<'_>) -> Vec<Event> {
        Vec::new()
    }
}
