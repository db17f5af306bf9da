//! The provider `docker`: containers that Ringway supervises.

use std::sync::Arc;

use tokio::sync::watch;

use super::source::{
    Line, Prepared, ProviderStatus, Source, Update, change, line, scope, slot_settings, slots_joined, watched,
};
use crate::app::StartError;
use crate::app::changes::OfPool;
use crate::app::context::PoolContext;
use crate::config::{self, Config, Provider};
use crate::control::Event;
use crate::control::docker::engine::Engine;
use crate::control::supervisor::docker::{Pull, Settings, supervise};

/// The channels to the supervisor.
#[derive(Debug)]
struct Containers {
    settings: watch::Sender<Settings>,
    line: Line,
}

pub(super) fn prepare(
    pool: &config::Pool,
    containers: &config::Containers,
    changes: &OfPool,
    context: &PoolContext<'_>,
) -> Result<Prepared, StartError> {
    let (engine, engine_status) = watched(context.engine)?;
    let (sender, settings) = watch::channel(settings(pool, containers, changes, context.config));
    let (line, signals) = line(&pool.name, context);
    let status = Arc::clone(&engine_status);
    Ok(Prepared {
        source: Box::new(Containers { settings: sender, line }),
        known: slots_joined(pool, changes),
        status: ProviderStatus::Engine(engine_status),
        start: Box::new(move |start| {
            let supervisor = supervise(settings, engine, start.table, start.events, status, signals, start.stop);
            start.tasks.supervise(supervisor);
        }),
    })
}

/// The error of an image that the engine does not have and Ringway may not pull.
pub(super) async fn missing_image(
    key_path: &str,
    containers: &config::Containers,
    engine: &Engine,
) -> Option<StartError> {
    let image = &containers.spec.image;
    let is_missing = containers.spec.pull == Pull::Never && matches!(engine.has_image(image).await, Ok(false));
    is_missing.then(|| StartError::Unfit {
        key_path: format!("{key_path}.provider.docker.image"),
        problem: format!("the engine has no image {image:?}, and pull is never: build or pull the image"),
    })
}

impl Source for Containers {
    fn update(&mut self, update: &Update<'_>) -> Vec<Event> {
        if let Provider::Containers(containers) = &update.pool.provider {
            change(&self.settings, settings(update.pool, containers, update.changes, update.config));
        }
        Vec::new()
    }

    fn retire(&self) {
        self.settings.send_modify(|settings| settings.slots.replicas = 0);
    }

    fn supervisor(&self) -> Option<&Line> {
        Some(&self.line)
    }

    fn has_containers(&self) -> bool {
        true
    }
}

fn settings(pool: &config::Pool, containers: &config::Containers, changes: &OfPool, config: &Config) -> Settings {
    Settings {
        slots: slot_settings(
            pool,
            (containers.replicas, containers.scaled),
            containers.restart,
            containers.rollout,
            changes,
        ),
        spec: containers.spec.clone(),
        scope: scope(config, containers.network.as_ref()),
        stop_grace: containers.stop_grace,
        resync: config.docker.resync,
    }
}
