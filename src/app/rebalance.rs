//! The command `rebalance`: ends connections whose keys lead to other backends.

use std::time::Duration;

use super::App;
use super::commands::{Planned, log};
use crate::control::command::{CommandError, Report};
use crate::proxy::sessions::Away;

/// Time in which connections move if nobody says another one.
const USUAL_OVER: Duration = Duration::from_secs(300);

impl App {
    /// Checks the command.
    ///
    /// # Errors
    /// When the pool has nothing to move.
    pub(super) fn plan_rebalance(&self, pool: String, over: Option<Duration>) -> Result<Planned, CommandError> {
        let settings = self.pool(&pool)?;
        if let Some(why) = settings.cannot_move() {
            return Err(CommandError::CannotRebalance { pool, why });
        }
        let over = over.or(settings.on_move).unwrap_or(USUAL_OVER);
        Ok(Planned::Rebalance { pool, over })
    }

    /// Ends the connections of a pool whose keys lead to other backends.
    pub(super) async fn rebalance(&self, pool: &str, over: Duration) -> Report {
        let report = self.find_away(pool, over, false).await;
        log(&report);
        report
    }

    /// Counts the connections of a pool whose keys lead to other backends, and ends them unless it is a dry run.
    pub(super) async fn find_away(&self, pool: &str, over: Duration, is_dry_run: bool) -> Report {
        let Some(running) = self.pools.iter().find(|known| known.config().name == pool) else {
            return Report::default();
        };
        let Away { away, all } = self.state.sessions.rebalance(&running.route, (!is_dry_run).then_some(over)).await;
        let what = format!("pool {pool}: the keys of {away} of {all} connections lead to other backends");
        let over = humantime::format_duration(over);
        let end = if away == 0 { String::new() } else { format!("; Ringway resets these connections within {over}") };
        Report { changes: vec![what + &end], ..Report::default() }
    }
}
