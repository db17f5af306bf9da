//! Carries out what the operator orders: each order becomes changes beside the config, and then the way there.

use std::sync::Arc;

use super::changes::Changes;
use super::pools::listed;
use super::reload::Way;
use super::{App, StartError};
use crate::config::{Config, Error, Pool, Provider};
use crate::control::Event;
use crate::control::operator::{Order, Refusal, Report};

/// Weights that a backend may have.
const WEIGHTS: std::ops::RangeInclusive<u32> = 1..=1000;

/// Replicas that a pool may have.
const REPLICAS: std::ops::RangeInclusive<u32> = 1..=1000;

/// What an order comes to, before anything has been done.
pub(super) enum Step {
    Go(Box<Way>),
    Tell { pool: String, event: Event, changes: Changes, words: String },
    Nothing(Report),
}

impl App {
    /// Finds out what an order comes to.
    ///
    /// # Errors
    /// When it cannot be carried out.
    pub(super) async fn plan(&self, order: Order) -> Result<Step, Refusal> {
        let mut changes = self.changes.clone();
        match self.with_pool(order) {
            Order::Drain { pool, backend, within } => {
                self.backend(&pool, &backend)?;
                changes.of(&pool).drained.insert(backend.clone());
                let within = within.unwrap_or(self.pool(&pool)?.drain);
                let event = Event::Drained { id: backend.as_str().into(), within: Some(within) };
                let words = format!("{pool}/{backend}: no new connections; what is open after {within:?} is reset");
                return Ok(Step::Tell { pool, event, changes, words });
            }
            Order::Undrain { pool, backend } => {
                self.backend(&pool, &backend)?;
                if !changes.of(&pool).drained.remove(&backend) {
                    return Err(Refusal::Conflict(format!("{pool}/{backend} is not drained")));
                }
                let event = Event::Undrained { id: backend.as_str().into() };
                let words = format!("{pool}/{backend}: connections again");
                return Ok(Step::Tell { pool, event, changes, words });
            }
            Order::Weight { pool, backend, weight } => {
                self.backend(&pool, &backend)?;
                within(&WEIGHTS, weight, "a weight")?;
                if matches!(self.pool(&pool)?.provider, Provider::Discover(_)) {
                    return Err(Refusal::Conflict(format!("the containers of pool {pool} all weigh the same")));
                }
                changes.of(&pool).weights.insert(backend, weight);
            }
            Order::Add { pool, backend } => {
                let backends = self.fixed(&pool)?;
                if backends.iter().any(|known| *known == *backend.id) {
                    return Err(Refusal::Conflict(format!("pool {pool} has a backend {:?} already", backend.id)));
                }
                within(&WEIGHTS, backend.weight, "a weight")?;
                let of = changes.of(&pool);
                of.removed.remove(&*backend.id);
                of.added.retain(|known| known.id != *backend.id);
                let is_configured = self.in_file(&pool, &backend.id) == Some(listed(backend.clone()));
                if !is_configured {
                    // Another one of this name takes the place of the config's.
                    if self.in_file(&pool, &backend.id).is_some() {
                        of.removed.insert(backend.id.to_string());
                    }
                    of.added.push(listed(backend));
                }
            }
            Order::Remove { pool, backend } => {
                let backends = self.fixed(&pool)?;
                self.backend(&pool, &backend)?;
                if backends.len() == 1 {
                    let message = format!("{pool}/{backend} is the pool's last backend; drain it instead");
                    return Err(Refusal::Conflict(message));
                }
                let is_configured = self.in_file(&pool, &backend).is_some();
                let of = changes.of(&pool);
                of.added.retain(|known| known.id != backend);
                of.weights.remove(&backend);
                of.drained.remove(&backend);
                if is_configured {
                    of.removed.insert(backend);
                }
            }
            Order::Scale { pool, replicas } => {
                within(&REPLICAS, replicas, "a number of replicas")?;
                let provider = &self.pool(&pool)?.provider;
                if provider.replicas().is_none() {
                    let message = format!("the backends of pool {pool} are not Ringway's to start: add or remove them");
                    return Err(Refusal::Conflict(message));
                }
                if let Provider::Process(process) = provider
                    && let Some((first, last)) = process.ports
                    && u32::from(last - first) + 1 < replicas
                {
                    let message = format!("pool {pool} has the ports {first}-{last}, which is fewer than {replicas}");
                    return Err(Refusal::Conflict(message));
                }
                changes.of(&pool).replicas = Some(replicas);
            }
            // Not a way to another config.
            Order::Upgrade => return Ok(Step::Nothing(Report::default())),
            Order::Reload { text, is_dry_run } => {
                let file = self.read(text.as_deref()).map_err(|error| Refusal::Invalid(error.to_string()))?;
                changes = changes.kept(&self.file, &file);
                if is_dry_run {
                    return Ok(Step::Nothing(self.target(&file, &changes).1));
                }
                return self.way(file, changes).await;
            }
        }
        self.way(self.file.clone(), changes).await
    }

    /// Does it.
    pub(super) async fn carry_out(&mut self, step: Step) -> Report {
        let report = match step {
            Step::Nothing(report) => return report,
            Step::Tell { pool, event, changes, words } => {
                self.changes = changes;
                if let Some(pool) = self.pools.iter().find(|known| known.config().name == pool) {
                    pool.tell(event).await;
                }
                self.show();
                Report { changes: vec![words], ..Report::default() }
            }
            Step::Go(way) => self.go(*way).await,
        };
        for change in &report.changes {
            tracing::info!("{change}");
        }
        for moved in &report.moved {
            tracing::info!(pool = moved.pool, share = moved.share, "keys move");
        }
        if !report.needs_restart.is_empty() {
            tracing::warn!(keys = report.needs_restart.join(", "), "these take a restart, and stay as they are");
        }
        report
    }

    async fn way(&self, file: Config, changes: Changes) -> Result<Step, Refusal> {
        let way = self.prepare(file, changes).await;
        Ok(Step::Go(Box::new(way.map_err(|error: StartError| Refusal::Conflict(error.to_string()))?)))
    }

    fn read(&self, text: Option<&str>) -> Result<Config, Error> {
        match text {
            Some(text) => Config::parse(text, "the config given"),
            None => self.environment.source.load(),
        }
    }

    /// The order, for the pool behind the listener where it names one.
    fn with_pool(&self, mut order: Order) -> Order {
        match &mut order {
            Order::Drain { pool, .. }
            | Order::Undrain { pool, .. }
            | Order::Weight { pool, .. }
            | Order::Add { pool, .. }
            | Order::Remove { pool, .. }
            | Order::Scale { pool, .. } => *pool = self.named(std::mem::take(pool)),
            Order::Reload { .. } | Order::Upgrade => {}
        }
        order
    }

    /// A pool's name, for its own or for that of a listener in front of it.
    fn named(&self, name: String) -> String {
        let is_pool = self.config.pools.iter().any(|pool| pool.name == name);
        let listener = self.config.listeners.iter().find(|listener| listener.name == name && !is_pool);
        listener.map_or(name, |listener| listener.pool.clone())
    }

    /// A pool as it runs.
    fn pool(&self, name: &str) -> Result<&Pool, Refusal> {
        let found = self.config.pools.iter().find(|pool| pool.name == name);
        found.ok_or_else(|| {
            let names: Vec<_> = self.config.pools.iter().map(|pool| pool.name.as_str()).collect();
            Refusal::NotFound(format!("there is no pool {name:?}; there are: {}", names.join(", ")))
        })
    }

    /// Whether the pool has the backend, and it does not leave already.
    fn backend(&self, pool: &str, id: &str) -> Result<(), Refusal> {
        self.pool(pool)?;
        let running = self.pools.iter().find(|known| known.config().name == pool);
        let table = running.map(|running| running.route.table.load());
        let stays = |backend: &&crate::backend::Backend| !backend.drain.is_some_and(|drain| drain.leaves);
        let ids: Vec<Arc<str>> = table
            .iter()
            .flat_map(|table| table.backends().iter().filter(stays))
            .map(|one| Arc::clone(&one.id))
            .collect();
        if ids.iter().any(|known| **known == *id) {
            return Ok(());
        }
        Err(Refusal::NotFound(format!("pool {pool} has no backend {id:?}; it has: {}", ids.join(", "))))
    }

    /// The backends of a static pool.
    fn fixed(&self, pool: &str) -> Result<Vec<String>, Refusal> {
        match &self.pool(pool)?.provider {
            Provider::Static(backends) => Ok(backends.iter().map(|backend| backend.id.clone()).collect()),
            _ => Err(Refusal::Conflict(format!("pool {pool} is not a static one: its provider says what is in it"))),
        }
    }

    /// A static backend as the file has it.
    fn in_file(&self, pool: &str, id: &str) -> Option<crate::config::StaticBackend> {
        let pool = self.file.pools.iter().find(|known| known.name == pool)?;
        match &pool.provider {
            Provider::Static(backends) => backends.iter().find(|backend| backend.id == id).cloned(),
            _ => None,
        }
    }
}

fn within(range: &std::ops::RangeInclusive<u32>, number: u32, what: &str) -> Result<(), Refusal> {
    if range.contains(&number) {
        return Ok(());
    }
    Err(Refusal::Invalid(format!("{number} is not {what}: take {} to {}", range.start(), range.end())))
}
