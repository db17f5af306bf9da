//! Active health checks: one task per pool, and one more for each check that runs.
//!
//! # Layout
//!
//! - this file: starts checks and reports their results
//! - [`schedule`]: when to check which replica; pure
//! - [`rise_fall`]: turns a series of results into a verdict; pure
//! - [`mod@check`]: one check, and the kind `tcp`; [`mod@http`], [`mod@expect`], [`mod@tls`], [`mod@grpc`], [`mod@exec`]: the other kinds
//! - [`not_done`]: logs checks that Ringway could not make

mod check;
mod exec;
mod expect;
mod grpc;
mod http;
mod not_done;
mod rise_fall;
mod schedule;
mod tls;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use self::check::Outcome;
pub use self::check::{Check, Exec, Expect, Grpc, Http, Kind, Step, Tls};
pub use self::not_done::NotDone;
use self::schedule::{Schedule, Ticket};
use super::Event;
use crate::address::Address;
use crate::backend::OwnCheck;
use crate::outgoing::Outgoing;
use crate::proxy_header::OwnHeader;
use crate::table::TableCell;

/// Checks that start in one turn.
const STARTS_PER_TURN: usize = 64;

/// While at least this many checks run, turns are [`PAUSE`] apart. Most checks end within one pause. So few checks have a
/// socket at the same time, even with thousands of backends.
const MANY: usize = 4 * STARTS_PER_TURN;

/// Pause between two turns while many checks run.
const PAUSE: Duration = Duration::from_millis(5);

/// Settings of a pool's health checks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// What one check does.
    pub check: Check,
    /// Time between checks of one backend.
    pub interval: Duration,
    /// Time between checks while results contradict the backend's state: Ringway then detects a change sooner.
    pub fast_interval: Duration,
    /// Largest random addition to an interval, in percent of it. Keeps checks of different backends out of step.
    pub jitter: u8,
    /// Time limit of one check.
    pub timeout: Duration,
    /// Passes in a row that make an unhealthy backend healthy.
    pub rise: u32,
    /// Failures in a row that make a healthy backend unhealthy.
    pub fall: u32,
    /// How long a new replica may fail its checks and still count as starting.
    pub grace: Duration,
    /// At most one backend of the pool gets connections: the one whose check passes.
    pub is_exclusive: bool,
}

impl Settings {
    /// Whether what is known of the backends holds under these settings until the checks say otherwise. Other checks do not tell who
    /// the primary of an exclusive pool is.
    fn trust(&self, before: Option<&Self>) -> bool {
        !self.is_exclusive || before.is_some_and(|before| before.is_exclusive && before.check == self.check)
    }
}

/// Checks the backends of `table` until the task is dropped. New settings restart the checks of all backends.
pub async fn check_all(
    table: TableCell,
    mut settings: watch::Receiver<Option<Settings>>,
    events: mpsc::Sender<Event>,
    not_done: NotDone,
) {
    let mut changes = table.watch();
    let mut current = settings.borrow_and_update().clone().map(Arc::new);
    let mut trusts = current.as_ref().is_some_and(|settings| settings.trust(None));
    let mut schedule = Schedule::default();
    let mut running = JoinSet::new();
    let mut not_before = Instant::now();
    loop {
        if current.is_some() {
            schedule.follow(table.load().backends(), trusts, Instant::now());
        }
        let next = schedule.next().map(|at| at.max(not_before));
        let is_due = tokio::time::sleep_until(next.unwrap_or_else(Instant::now).into());
        tokio::select! {
            changed = changes.changed() => if changed.is_err() {
                return;
            },
            changed = settings.changed() => {
                if changed.is_err() {
                    return;
                }
                let before = current;
                current = settings.borrow_and_update().clone().map(Arc::new);
                trusts = current.as_ref().is_some_and(|settings| settings.trust(before.as_deref()));
                // Dropping the running checks ends them.
                (schedule, running) = (Schedule::default(), JoinSet::new());
            }
            Some(done) = running.join_next() => {
                // A check that panicked is a bug, and ends this task too.
                let (ticket, outcome) = done.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
                let Some(settings) = &current else { continue };
                let now = Instant::now();
                if let Outcome::NotDone(why) = outcome {
                    not_done.note(why, now);
                }
                if let Some(event) = schedule.finish(&ticket, outcome, settings, now)
                    && events.send(event).await.is_err()
                {
                    return;
                }
            }
            () = is_due, if next.is_some() => {
                let now = Instant::now();
                for _ in 0..STARTS_PER_TURN {
                    let Some((ticket, address, own)) = schedule.start(now) else { break };
                    let Some(settings) = current.clone() else { break };
                    running.spawn(check(ticket, address, own, settings));
                }
                if running.len() >= MANY {
                    not_before = now + PAUSE;
                }
                tokio::task::yield_now().await;
            }
        }
    }
}

async fn check(ticket: Ticket, address: Address, own: Option<OwnCheck>, settings: Arc<Settings>) -> (Ticket, Outcome) {
    // In an exclusive pool, only the pool's check tells who the primary is.
    let own = own.filter(|_| !settings.is_exclusive).map(|own| settings.check.of(&own));
    let outcome = match own.as_ref().map_or(Some(&settings.check), Option::as_ref) {
        Some(check) => check.run(ticket.id(), &address, settings.timeout).await,
        None => Outcome::Passed,
    };
    (ticket, outcome)
}

/// Whether a server accepts connections at this address, found out without a trace in its logs.
pub(super) async fn accepts(address: &Address, outgoing: Option<Arc<Outgoing>>, timeout: Duration) -> bool {
    let check = Check { kind: Kind::Tcp, port: None, send_proxy: OwnHeader::Absent, outgoing };
    matches!(check.run("", address, timeout).await, Outcome::Passed)
}
