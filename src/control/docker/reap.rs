//! Removes an owner's containers that are no longer needed.

use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::container::State;
use super::engine::{Engine, EngineError};
use super::label;
use super::scope::{COMPOSE_ONEOFF, COMPOSE_PROJECT, COMPOSE_SERVICE};

/// How long Ringway waits for a stopped container to start again. `docker compose restart` stops and starts it within a
/// moment; `docker compose down` stops all containers of a project first.
const RETURN: Duration = Duration::from_secs(3);

/// Interval between two lists during that wait.
const LOOK: Duration = Duration::from_millis(200);

/// Stops and removes every container of this owner. Returns how many there were.
///
/// # Errors
/// When the engine is unreachable or refuses to remove a container.
pub async fn remove_all(engine: &Engine, owner: &str, grace: Duration) -> Result<usize, EngineError> {
    let found = engine.list(&[format!("{}={owner}", label::OWNER), label::SLOT.to_owned()]).await?;
    let count = found.len();
    let mut work = JoinSet::new();
    for container in found {
        let engine = engine.clone();
        work.spawn(async move { engine.end(&container.id, grace).await });
    }
    let mut outcome = Ok(count);
    while let Some(ended) = work.join_next().await {
        if let Ok(Err(error)) = ended {
            outcome = Err(error);
        }
    }
    outcome
}

/// Whether the containers of a compose service have ended for good.
///
/// # Errors
/// When the engine does not answer.
pub async fn has_ended(engine: &Engine, project: &str, service: &str) -> Result<bool, EngineError> {
    let labels = [
        format!("{COMPOSE_PROJECT}={project}"),
        format!("{COMPOSE_SERVICE}={service}"),
        format!("{COMPOSE_ONEOFF}=False"),
    ];
    let until = Instant::now() + RETURN;
    loop {
        let found = engine.list(&labels).await?;
        if found.iter().any(|container| container.state == State::Running) {
            return Ok(false);
        }
        if found.is_empty() || Instant::now() >= until {
            return Ok(true);
        }
        tokio::time::sleep(LOOK).await;
    }
}
