//! The supervisor: keeps the wanted number of replicas alive.
//!
//! # Layout
//!
//! - this file: what the adapters have in common
//! - [`plan`]: what to do next; pure
//! - [`process`]: carries the plan out with child processes
//! - [`docker`]: carries the plan out with containers
//! - [`shim`]: the process between Ringway and a child process
//! - [`launch`]: the step in a child before it becomes the replica
//! - [`output`]: what child processes say, into the log

pub mod docker;
pub mod launch;
pub mod plan;
pub mod process;
pub mod shim;

mod output;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use self::plan::{Policy, Slot, Why};
use self::process::Handed;
use super::Event;
use super::provider::slots;
use crate::backend::{Exit, Replica};
use crate::labels::Label as _;
use crate::table::Table;

/// Asks a supervisor to rest, and to leave what it has to another process.
#[derive(Debug)]
pub struct Handover {
    /// Takes copies of what it has; or why there can be none.
    pub handed: oneshot::Sender<io::Result<Vec<Handed>>>,
    /// True: the other process has taken over. Else the supervisor goes on.
    pub decision: oneshot::Receiver<bool>,
}

/// When a supervisor rests because of another Ringway.
#[derive(Debug)]
pub struct Resting {
    /// True once an older Ringway has no connections any more to what was taken over.
    pub settled: watch::Receiver<bool>,
    /// A younger one takes over.
    pub handovers: mpsc::Receiver<Handover>,
}

impl Handover {
    /// Hands these over and waits for the decision: whether somebody else has taken over.
    async fn decide(self, handed: io::Result<Vec<Handed>>, stop: &CancellationToken) -> bool {
        // Who asked may have given up.
        let _ = self.handed.send(handed);
        matches!(stop.run_until_cancelled(self.decision).await, Some(Ok(true)))
    }
}

/// Lines of a replica's output that are kept for its [`Exit`].
const LAST_LINES: usize = 10;

/// What the checks say of the replica in a slot. The table may still show its predecessor.
fn verdict(table: &Table, slot: &str, replica: &Replica) -> Option<bool> {
    let backend = table.backends().iter().find(|backend| &*backend.id == slot)?;
    if backend.replica.as_ref() != Some(replica) {
        return None;
    }
    backend.well
}

/// Between looks at a replica that is drained. Also the least time that it is: a worker that picked it before has begun
/// its connect long before.
const LOOK: Duration = Duration::from_millis(100);

/// Tells the publisher of the slots that there are, each with its weight: 1, where nothing else is said.
fn joined<'a>(
    pool: &'a str,
    replicas: u32,
    weights: &'a BTreeMap<Arc<str>, u32>,
) -> impl Iterator<Item = Event> + use<'a> {
    slots(pool, replicas).into_iter().map(|id| {
        let weight = weights.get(&id).copied().unwrap_or(1);
        Event::Joined { id, weight }
    })
}

/// What the publisher is told when a replica is to be drained.
fn drain(slot: &Arc<str>, why: Why, within: Duration) -> Event {
    let id = Arc::clone(slot);
    match why {
        Why::Surplus => Event::Leaving { id, within },
        Why::Outdated | Why::Unhealthy => Event::Retiring { id, within },
    }
}

/// Whether a replica that is drained has no connection any more; `None`: the publisher does not know of the drain, or not
/// any more, because the replica has another address since.
fn drained(table: &Table, slot: &str, why: Why) -> Option<bool> {
    let Some(backend) = table.backends().iter().find(|backend| &*backend.id == slot) else { return Some(true) };
    let drain = backend.drain?;
    let is_unused = backend.address.is_none() || backend.live.active.load(Ordering::Relaxed) == 0;
    // One that leaves the pool is taken out of the table by the publisher.
    Some(why != Why::Surplus && drain.since.elapsed() >= LOOK && is_unused)
}

/// What is not well is louder than what was asked for.
fn tell_of_stop(pool: &str, slot: &str, why: Why) {
    let reason = why.as_str();
    match why {
        Why::Unhealthy => tracing::warn!(pool, slot, reason, "replica is stopped, to be replaced"),
        Why::Outdated => tracing::info!(pool, slot, reason, "replica is stopped, to be replaced"),
        Why::Surplus => tracing::info!(pool, slot, reason, "replica is stopped"),
    }
}

/// Notes ends of replicas, and tells of them in the log: of each step, not of each try.
#[derive(Debug)]
struct Ends {
    pool: Arc<str>,
    policy: Policy,
    /// The gist of why replicas cannot be started, told once for all slots.
    refusal: Option<String>,
}

impl Ends {
    fn new(pool: Arc<str>, policy: Policy) -> Self {
        Self { pool, policy, refusal: None }
    }

    /// A replica was started, or is there.
    fn over(&mut self) {
        self.refusal = None;
    }

    /// A replica ended.
    fn ended(&self, slot: &mut Slot, exit: Exit) -> Event {
        let (was_loop, again_in_ms, is_loop) = self.strike(slot, exit.at);
        let (pool, name, how) = (&self.pool, &slot.name, &exit.reason);
        match (was_loop, is_loop) {
            (_, false) => tracing::warn!(%pool, slot = %name, how, again_in_ms, "replica ended"),
            (false, true) => {
                let last_line = exit.output.last().map_or("", String::as_str);
                tracing::error!(%pool, slot = %name, how, again_in_ms, last_line, "replica keeps dying: crash loop");
            }
            (true, true) => tracing::debug!(%pool, slot = %name, how, again_in_ms, "replica ended again"),
        }
        Event::Stopped { id: Arc::clone(name), crash_loop: is_loop, exit: Some(Arc::new(exit)) }
    }

    /// No replica could be started.
    fn refused(&mut self, slot: &mut Slot, reason: &str, now: Instant) -> Event {
        let (_, again_in_ms, is_loop) = self.strike(slot, now);
        let (pool, name) = (&self.pool, &slot.name);
        let gist = gist(reason);
        if self.refusal.as_ref() == Some(&gist) {
            tracing::debug!(%pool, slot = %name, reason, again_in_ms, "no replica can be started, still");
        } else {
            tracing::error!(%pool, slot = %name, reason, again_in_ms, "no replica can be started");
        }
        let exit = Exit { reason: format!("cannot be started: {reason}"), code: None, output: Vec::new(), at: now };
        self.refusal = Some(gist);
        Event::Stopped { id: Arc::clone(name), crash_loop: is_loop, exit: Some(Arc::new(exit)) }
    }

    /// Whether the slot was in a crash loop before, when it is tried again, and whether it is in one now.
    fn strike(&self, slot: &mut Slot, now: Instant) -> (bool, u64, bool) {
        let was_loop = slot.is_crash_loop(&self.policy);
        let wait = slot.ended(&self.policy, now);
        (was_loop, u64::try_from(wait.as_millis()).unwrap_or(u64::MAX), slot.is_crash_loop(&self.policy))
    }
}

/// Without the words that differ from try to try and from slot to slot: those with a digit.
fn gist(reason: &str) -> String {
    let words = reason.split_whitespace().filter(|word| !word.contains(|c: char| c.is_ascii_digit()));
    words.collect::<Vec<_>>().join(" ")
}
