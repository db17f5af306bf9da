//! The command `rollout`: replaces the replicas of a pool.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::App;
use super::changes::Changes;
use super::commands::{Planned, log};
use super::pools::Pool;
use super::reload::ReloadPlan;
use crate::config::Provider;
use crate::control::command::{CommandError, Report};
use crate::control::supervisor::rollout::{RolloutOrder, Stage};

impl App {
    /// Checks the command.
    ///
    /// # Errors
    /// When the pool has no replicas, or no image.
    pub(super) async fn plan_rollout(&self, pool: String, image: Option<String>) -> Result<Planned, CommandError> {
        let provider = &self.pool(&pool)?.provider;
        if provider.replicas().is_none() {
            return Err(CommandError::NotSupervised(pool));
        }
        let order = RolloutOrder::Begin { is_forced: image.is_none() };
        let Some(image) = image else { return Ok(Planned::RollOut { pool, plan: None, order }) };
        if provider.image().is_none() {
            return Err(CommandError::NoImage(pool));
        }
        if !Provider::is_image(&image) {
            return Err(CommandError::BadImage(image));
        }
        let mut changes = self.changes.clone();
        changes.of(&pool).image = Some(image);
        let plan = self.prepare(Arc::clone(&self.file), changes).await;
        let plan = plan.map_err(|error| CommandError::CannotPrepare(error.to_string()))?;
        Ok(Planned::RollOut { pool, plan: Some(Box::new(plan)), order })
    }

    /// Checks the command that aborts a rollout.
    ///
    /// # Errors
    /// When no rollout is under way.
    pub(super) fn plan_abort(&self, pool: String) -> Result<Planned, CommandError> {
        if self.pool(&pool)?.provider.replicas().is_none() {
            return Err(CommandError::NotSupervised(pool));
        }
        let stage = self.running(&pool).and_then(Pool::rollout).map(|view| view.stage);
        if !matches!(stage, Some(Stage::Running | Stage::RollingBack)) {
            return Err(CommandError::NoRollout(pool));
        }
        Ok(Planned::RollOut { pool, plan: None, order: RolloutOrder::Abort })
    }

    /// What a rollout would do.
    pub(super) fn outlook_of_rollout(&self, pool: &str, report: Option<Report>, order: RolloutOrder) -> Report {
        let mut report = report.unwrap_or_default();
        let replicas = self.pool(pool).ok().and_then(|pool| pool.provider.replicas()).unwrap_or_default();
        report.changes.push(match order {
            RolloutOrder::Begin { is_forced: true } => format!("pool {pool}: {replicas} replicas would be replaced"),
            RolloutOrder::Begin { .. } => format!("pool {pool}: replicas from another image would be replaced"),
            RolloutOrder::Abort => format!("pool {pool}: the rollout would end"),
        });
        report
    }

    /// Moves to another image, if there is a plan for it, and gives the order to the supervisor.
    ///
    /// # Errors
    /// When the supervisor has not taken the order. The pool has moved to the other image all the same.
    pub(super) async fn roll_out(
        &mut self,
        pool: &str,
        plan: Option<Box<ReloadPlan>>,
        order: RolloutOrder,
    ) -> Result<Report, CommandError> {
        let mut report = match plan {
            Some(plan) => self.go(*plan, CancellationToken::new()).await,
            None => Report::default(),
        };
        let view = match self.running(pool) {
            Some(running) => running.order(order).await,
            None => None,
        };
        let view = view.ok_or_else(|| CommandError::NotTaken(pool.to_owned()))?;
        let (left, total) = (view.total.saturating_sub(view.updated), view.total);
        report.changes.push(match (order, view.stage) {
            (RolloutOrder::Begin { .. }, _) if left == 0 => format!("pool {pool}: no replica is outdated"),
            (RolloutOrder::Begin { .. }, _) => format!("pool {pool}: replacing {left} of {total} replicas"),
            (RolloutOrder::Abort, Stage::RollingBack) => {
                format!("pool {pool}: rollout aborted; {left} of {total} replicas go back")
            }
            (RolloutOrder::Abort, _) => format!("pool {pool}: rollout aborted; the replicas stay as they are"),
        });
        log(&report);
        Ok(report)
    }

    fn running(&self, pool: &str) -> Option<&Pool> {
        self.pools.iter().find(|known| known.config().name == pool)
    }

    /// The run-time changes for a successor: without images that a rollout has refused, which it would try again.
    pub(super) fn proven_changes(&self) -> Changes {
        let mut changes = self.changes.clone();
        for pool in &self.pools {
            let refused = pool.rollout().and_then(|view| view.refused?.image);
            let name = &pool.config().name;
            if refused.is_some() && changes.get(name).image == refused {
                changes.of(name).image = None;
            }
        }
        changes
    }
}
