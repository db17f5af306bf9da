//! The effect of commands: [`App::plan`] checks one and prepares what it needs, the other functions carry it out.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::App;
use super::changes::Changes;
use super::provider::listed;
use super::reload::ReloadPlan;
use crate::backend::Backend;
use crate::config::{Config, Pool, StaticBackend};
use crate::control::Event;
use crate::control::command::{Command, CommandError, Moved, Report};
use crate::control::provider::{MOST_CONNECTIONS, WEIGHTS};
use crate::control::supervisor::rollout::RolloutOrder;

/// Allowed numbers of replicas of a pool.
const REPLICAS: RangeInclusive<u32> = 1..=1000;

/// A command that passed every check and has no effect yet.
pub(super) enum Planned {
    /// Move to another config.
    Reload(Box<ReloadPlan>),
    /// Drain or undrain one backend.
    Notify { pool: String, event: Event, changes: Changes, summary: String },
    /// End connections of a pool within a time.
    Rebalance { pool: String, over: Duration },
    /// Replace replicas, after the pool has moved to another image if the plan says so.
    RollOut { pool: String, plan: Option<Box<ReloadPlan>>, order: RolloutOrder },
    /// Log something else; `None`: as at the start.
    Log { filter: Option<String>, lasts: Option<Duration>, summary: String },
    /// Open the file of the access log again.
    Reopen(Report),
    /// Only report: a dry run.
    Report(Report),
    /// Hand over to a successor.
    HandOver,
}

impl App {
    /// Checks a command and prepares all that may fail. Changes nothing.
    ///
    /// # Errors
    /// When Ringway rejects the command.
    pub(super) async fn plan(&self, command: Command) -> Result<Planned, CommandError> {
        let mut changes = self.changes.clone();
        match self.with_pool(command) {
            Command::Drain { pool, backend, within } => return self.plan_drain(pool, &backend, within),
            Command::Undrain { pool, backend } => {
                self.check_backend(&pool, &backend)?;
                let other = self.other_drain(&pool, &backend);
                if !changes.of(&pool).drained.remove(&backend) {
                    return other.map_or(Ok(Planned::Report(Report::default())), Err);
                }
                let event = Event::DrainCancelled { id: backend.as_str().into() };
                let summary = match other {
                    Some(other) => format!("no longer drained by a command, but {other}"),
                    None => format!("{pool}/{backend}: accepting connections again"),
                };
                return Ok(Planned::Notify { pool, event, changes, summary });
            }
            Command::Weight { pool, backend, weight } => {
                self.check_backend(&pool, &backend)?;
                check_range(&WEIGHTS, weight, "weight")?;
                if !self.pool(&pool)?.provider.has_weights() {
                    return Err(CommandError::FixedWeight(pool));
                }
                changes.of(&pool).weights.insert(backend, weight);
            }
            Command::Rebalance { pool, over } => return self.plan_rebalance(pool, over),
            Command::Add { pool, backend } => {
                if self.static_backends(&pool)?.iter().any(|known| known.id == *backend.id) {
                    return Err(CommandError::BackendExists { pool, backend: backend.id.to_string() });
                }
                check_range(&WEIGHTS, backend.membership.weight, "weight")?;
                if let Some(most) = backend.membership.max_connections {
                    check_range(&MOST_CONNECTIONS, most, "number of connections")?;
                }
                let added = listed(backend);
                let configured = self.in_file(&pool, &added.id);
                let of_pool = changes.of(&pool);
                of_pool.removed.remove(&added.id);
                of_pool.added.retain(|known| known.id != added.id);
                if configured.as_ref() != Some(&added) {
                    // The new backend replaces the one that the config has under this id.
                    if configured.is_some() {
                        of_pool.removed.insert(added.id.clone());
                    }
                    of_pool.added.push(added);
                }
            }
            Command::Remove { pool, backend } => {
                self.static_backends(&pool)?;
                self.check_backend(&pool, &backend)?;
                let is_configured = self.in_file(&pool, &backend).is_some();
                let of_pool = changes.of(&pool);
                of_pool.added.retain(|known| known.id != backend);
                of_pool.weights.remove(&backend);
                of_pool.drained.remove(&backend);
                if is_configured {
                    of_pool.removed.insert(backend);
                }
            }
            Command::Scale { pool, replicas } => {
                check_range(&REPLICAS, replicas, "number of replicas")?;
                let provider = &self.pool(&pool)?.provider;
                if provider.replicas().is_none() {
                    return Err(CommandError::NotSupervised(pool));
                }
                if provider.scaled().is_some() {
                    return Err(CommandError::ScalesItself(pool));
                }
                if let Some((first, last)) = provider.port_range()
                    && u32::from(last - first) + 1 < replicas
                {
                    return Err(CommandError::TooFewPorts { pool, first, last, replicas });
                }
                changes.of(&pool).replicas = Some(replicas);
            }
            Command::Rollout { pool, image } => return self.plan_rollout(pool, image).await,
            Command::AbortRollout { pool } => return self.plan_abort(pool),
            Command::Reload { text, is_dry_run, is_reset, max_keys_moved } => {
                return self.plan_config(text, is_dry_run, is_reset, max_keys_moved).await;
            }
            Command::Log { filter, lasts } => return self.plan_log(filter, lasts),
            Command::Reopen => return self.plan_reopen(),
            Command::Upgrade => return Ok(Planned::HandOver),
        }
        self.plan_reload(Arc::clone(&self.file), changes).await
    }

    /// What a planned command would change.
    pub(super) async fn forecast(&self, planned: Planned) -> Report {
        match planned {
            Planned::Reload(plan) => plan.report,
            Planned::Report(report) | Planned::Reopen(report) => report,
            Planned::Notify { pool, event, summary, .. } => {
                Report { changes: vec![summary], moved: self.keys_of(&pool, &event), ..Report::default() }
            }
            Planned::Rebalance { pool, over } => self.find_away(&pool, over, true).await,
            Planned::RollOut { pool, plan, order } => {
                self.outlook_of_rollout(&pool, plan.map(|plan| plan.report), order)
            }
            Planned::Log { summary, .. } => Report { changes: vec![summary], ..Report::default() },
            Planned::HandOver => {
                Report { changes: vec!["a new process would take over".to_owned()], ..Report::default() }
            }
        }
    }

    /// The share of the keys that a drain moves away, or that come back after one.
    fn keys_of(&self, pool: &str, event: &Event) -> Vec<Moved> {
        let Some(running) = self.pools.iter().find(|known| known.config().name == pool) else { return Vec::new() };
        let table = running.route.table.load();
        let position = |id: &str| table.backends().iter().position(|backend| *backend.id == *id);
        let share = match event {
            Event::DrainRequested { id, .. } => {
                let takes = |other: &&Backend| {
                    let can_take = other.claims() || !table.is_exclusive();
                    other.id != *id && other.address.is_some() && other.drain.is_none() && can_take
                };
                // Without another backend, the keys have nowhere to go.
                table.backends().iter().find(takes).and_then(|_| position(id)).map(|at| table.shares_now()[at])
            }
            Event::DrainCancelled { id } => position(id).map(|at| {
                // An unhealthy backend gets nothing back.
                let backend = &table.backends()[at];
                if backend.well != Some(false) && !backend.membership.is_drained {
                    table.share_if_it_took(at)
                } else {
                    0.0
                }
            }),
            _ => None,
        };
        share.map(|share| Moved { pool: pool.to_owned(), share: (share * 1e4).round() / 1e4 }).into_iter().collect()
    }

    /// Moves to another config. `hurry` ends the wait for new backends.
    pub(super) async fn apply_reload(&mut self, plan: ReloadPlan, hurry: CancellationToken) -> Report {
        let report = self.go(plan, hurry).await;
        log(&report);
        report
    }

    /// Drains or undrains one backend.
    pub(super) async fn apply_event(&mut self, pool: &str, event: Event, changes: Changes, summary: String) -> Report {
        self.changes = changes;
        let moved = self.keys_of(pool, &event);
        if let Some(pool) = self.pools.iter().find(|known| known.config().name == pool) {
            pool.tell(event).await;
            pool.settle().await;
        }
        self.show();
        let report = Report { changes: vec![summary], moved, ..Report::default() };
        log(&report);
        report
    }

    /// Whether no other backend of the pool is healthy.
    fn is_last_healthy(&self, pool: &str, backend: &str) -> bool {
        let running = self.pools.iter().find(|known| known.config().name == pool);
        let table = running.map(|running| running.route.table.load());
        let is_other = |one: &Backend| *one.id != *backend && one.claims();
        !table.is_some_and(|table| table.backends().iter().any(is_other))
    }

    async fn plan_reload(&self, file: Arc<Config>, changes: Changes) -> Result<Planned, CommandError> {
        let plan = self.prepare(file, changes).await;
        Ok(Planned::Reload(Box::new(plan.map_err(|error| CommandError::CannotPrepare(error.to_string()))?)))
    }

    fn plan_drain(&self, pool: String, backend: &str, within: Option<Duration>) -> Result<Planned, CommandError> {
        self.check_backend(&pool, backend)?;
        let within = within.unwrap_or(self.pool(&pool)?.drain);
        let mut changes = self.changes.clone();
        changes.of(&pool).drained.insert(backend.to_owned());
        let event = Event::DrainRequested { id: backend.into(), within: Some(within) };
        let note = if self.is_last_healthy(&pool, backend) {
            "No other backend of the pool is healthy. "
        } else if self.pool(&pool)?.is_exclusive {
            "The pool is exclusive: no other backend gets connections before the last one of this backend has ended. "
        } else {
            ""
        };
        let summary = format!(
            "{note}{pool}/{backend}: no new connections; after {}, Ringway resets those that are still open",
            humantime::format_duration(within)
        );
        Ok(Planned::Notify { pool, event, changes, summary })
    }

    /// The command, with the name of a listener replaced by the name of its pool.
    fn with_pool(&self, mut command: Command) -> Command {
        match &mut command {
            Command::Drain { pool, .. }
            | Command::Undrain { pool, .. }
            | Command::Weight { pool, .. }
            | Command::Rebalance { pool, .. }
            | Command::Add { pool, .. }
            | Command::Remove { pool, .. }
            | Command::Scale { pool, .. }
            | Command::Rollout { pool, .. }
            | Command::AbortRollout { pool } => *pool = self.pool_name(std::mem::take(pool)),
            Command::Reload { .. } | Command::Log { .. } | Command::Reopen | Command::Upgrade => {}
        }
        command
    }

    /// The name of the pool that `name` stands for. A pool comes before a listener of the same name.
    fn pool_name(&self, name: String) -> String {
        let is_pool = self.config.pools.iter().any(|pool| pool.name == name);
        let listener = self.config.listeners.iter().find(|listener| listener.name == name && !is_pool);
        listener.and_then(|listener| listener.main_pool()).map_or(name, str::to_owned)
    }

    /// A pool under the running config.
    pub(super) fn pool(&self, name: &str) -> Result<&Pool, CommandError> {
        let found = self.config.pools.iter().find(|pool| pool.name == name);
        found.ok_or_else(|| CommandError::UnknownPool {
            pool: name.to_owned(),
            known: self.config.pools.iter().map(|pool| pool.name.clone()).collect(),
        })
    }

    /// Fails unless the pool has the backend. A backend that is leaving does not count.
    fn check_backend(&self, pool: &str, id: &str) -> Result<(), CommandError> {
        self.pool(pool)?;
        let running = self.pools.iter().find(|known| known.config().name == pool);
        let table = running.map(|running| running.route.table.load());
        let stays = |backend: &&Backend| backend.beside.is_none() && !backend.drain.is_some_and(|drain| drain.leaves);
        if table.as_ref().and_then(|table| table.backends().find(id)).as_ref().is_some_and(stays) {
            return Ok(());
        }
        let backends = table.iter().flat_map(|table| table.backends().iter().filter(stays));
        let known: Vec<String> = backends.map(|backend| backend.id.to_string()).collect();
        Err(CommandError::UnknownBackend { pool: pool.to_owned(), backend: id.to_owned(), known })
    }

    /// Who else drains a backend, if anyone. No command can end that.
    fn other_drain(&self, pool: &str, id: &str) -> Option<CommandError> {
        let running = self.pools.iter().find(|known| known.config().name == pool)?;
        let table = running.route.table.load();
        let found = table.backends().find(id)?;
        let (pool, backend) = (pool.to_owned(), id.to_owned());
        if found.membership.is_drained {
            return Some(CommandError::DrainedByList { pool, backend });
        }
        let advice = found.advice.as_ref().filter(|advice| advice.is_drained)?;
        Some(CommandError::DrainedByAgent { pool, backend, said: advice.text.to_string() })
    }

    /// The backends of a static pool.
    fn static_backends(&self, pool: &str) -> Result<&[StaticBackend], CommandError> {
        let backends = self.pool(pool)?.provider.static_backends();
        backends.ok_or_else(|| CommandError::NotStatic(pool.to_owned()))
    }

    /// A static backend as the config file has it.
    fn in_file(&self, pool: &str, id: &str) -> Option<StaticBackend> {
        let pool = self.file.pools.iter().find(|known| known.name == pool)?;
        pool.provider.static_backends()?.iter().find(|backend| backend.id == id).cloned()
    }
}

fn check_range(range: &RangeInclusive<u32>, number: u32, what: &'static str) -> Result<(), CommandError> {
    if range.contains(&number) {
        return Ok(());
    }
    Err(CommandError::OutOfRange { what, number, range: range.clone() })
}

pub(super) fn log(report: &Report) {
    for change in &report.changes {
        tracing::info!("{change}");
    }
    for moved in &report.moved {
        tracing::info!(pool = moved.pool, share = moved.share, "keys moved");
    }
    if !report.needs_restart.is_empty() {
        tracing::warn!(
            keys = report.needs_restart.join(", "),
            "these keys require an upgrade or a restart and were not applied"
        );
    }
}
