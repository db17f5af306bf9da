//! `ringway rollout --wait`: follows a rollout to its end.

use std::time::Duration;

use ringway::api::status::{Rollout, Status};
use ringway::control::command::Command;

use super::side_port::{self, Port};
use super::table::clean;
use super::{Common, Failure, commands, print};

/// Time between two reads of the status.
const LOOK: Duration = Duration::from_millis(250);

/// Sends the command, and prints a line for each replica until the rollout has ended. Fails unless all replicas were replaced.
pub(super) async fn run_and_wait(
    common: &Common,
    port: &Port,
    pool: String,
    image: Option<String>,
) -> Result<(), Failure> {
    let status = side_port::status(common, port).await?;
    let (process, before) = (status.pid, of(&status, &pool)?.ended);
    commands::send(common, port, &Command::Rollout { pool: pool.clone(), image }).await?;
    let mut shown = None;
    loop {
        let status = side_port::status(common, port).await?;
        if status.pid != process {
            let what = "another Ringway process serves now, and goes on with the rollout: see `ringway status`";
            return Err(anyhow::anyhow!(what).into());
        }
        let rollout = of(&status, &pool)?;
        let goes_on = matches!(rollout.state.as_str(), "running" | "rolling_back");
        let line = match rollout.state.as_str() {
            "rolling_back" => format!("{pool}: rolling back, {} of {} replicas", rollout.updated, rollout.total),
            _ => format!("{pool}: {} of {} replicas", rollout.updated, rollout.total),
        };
        // After a rollback, the numbers are about the settings that have failed.
        let is_done = !goes_on && rollout.state == "idle";
        if shown.as_ref() != Some(&line) && (goes_on || is_done) {
            print(&format!("{line}\n"))?;
            shown = Some(line);
        }
        if !goes_on {
            return result(&pool, &rollout, before);
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn result(pool: &str, rollout: &Rollout, before: u64) -> Result<(), Failure> {
    let last = rollout.last.as_ref().filter(|_| rollout.ended > before);
    match last.map(|last| last.result.as_str()) {
        // Without an outdated replica, there was nothing to do.
        None | Some("done") => Ok(()),
        Some(result) => {
            let what = if result == "paused" { "failed and is paused" } else { "failed and was rolled back" };
            let reason = rollout.reason.as_deref().map(|reason| format!(": {}", clean(reason))).unwrap_or_default();
            Err(anyhow::anyhow!("the rollout of pool {pool} {what}{reason}").into())
        }
    }
}

/// The rollout of a pool, which may be named by a listener in front of it.
fn of(status: &Status, name: &str) -> Result<Rollout, Failure> {
    let rollout = status.pool(name).and_then(|pool| pool.provider.rollout.clone());
    rollout.ok_or_else(|| anyhow::anyhow!("there is no pool {name:?} with replicas that Ringway starts").into())
}
