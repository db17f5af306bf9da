//! Records and logs ends of replicas and failed starts. Logs repeated failures at debug level.

use std::sync::Arc;
use std::time::Instant;

use super::plan::{Policy, Seat, Why};
use crate::backend::Exit;
use crate::control::Event;
use crate::labels::Label as _;

/// Records and logs ends of replicas and failed starts.
#[derive(Debug)]
pub(super) struct Ends {
    pool: Arc<str>,
    pub(super) policy: Policy,
    /// The reason why replicas cannot be started, without varying words. Logged once for all slots.
    refusal: Option<String>,
}

impl Ends {
    pub(super) fn new(pool: Arc<str>, policy: Policy) -> Self {
        Self { pool, policy, refusal: None }
    }

    /// Records that a replica runs: Ringway then logs the next failed start as an error again.
    pub(super) fn started(&mut self) {
        self.refusal = None;
    }

    /// Records that a replica ended.
    pub(super) fn ended(&self, seat: &mut Seat, exit: Exit) -> Event {
        let planned = seat.stops_for().filter(|why| *why != Why::Unhealthy);
        let (was_loop, again_in_seconds, is_loop) = self.strike(seat, exit.at);
        let (pool, name, how) = (&self.pool, &seat.id, &exit.reason);
        match (was_loop, is_loop) {
            _ if planned.is_some() => {
                let why = planned.map(|why: Why| why.as_str());
                tracing::info!(%pool, slot = %name, how, why, "replica stopped");
            }
            (_, false) => tracing::warn!(%pool, slot = %name, how, again_in_seconds, "replica ended"),
            (false, true) => {
                // A program often ends with a hint that says less than its error.
                let is_error = |line: &&String| line.to_ascii_lowercase().contains("error");
                let line = exit.output.iter().find(is_error).or(exit.output.last()).map_or("", String::as_str);
                tracing::error!(%pool, slot = %name, how, again_in_seconds, line, "replica keeps exiting (crash loop)");
            }
            (true, true) => tracing::debug!(%pool, slot = %name, how, again_in_seconds, "replica ended again"),
        }
        Event::Stopped { id: Arc::clone(name), crash_loop: is_loop, exit: Some(Arc::new(exit)) }
    }

    /// Records that a replica could not be started.
    pub(super) fn refused(&mut self, seat: &mut Seat, reason: &str, now: Instant) -> Event {
        let (_, again_in_seconds, is_loop) = self.strike(seat, now);
        let (pool, name) = (&self.pool, &seat.id);
        let gist = gist(reason);
        if self.refusal.as_ref() == Some(&gist) {
            tracing::debug!(%pool, slot = %name, reason, again_in_seconds, "replica still cannot be started");
        } else {
            tracing::error!(%pool, slot = %name, reason, again_in_seconds, "replica cannot be started");
        }
        let exit = Exit { reason: format!("cannot be started: {reason}"), code: None, output: Vec::new(), at: now };
        self.refusal = Some(gist);
        Event::Stopped { id: Arc::clone(name), crash_loop: is_loop, exit: Some(Arc::new(exit)) }
    }

    /// Counts a failure of the slot. Returns whether it was in a crash loop before, the wait before the next try in
    /// seconds, and whether it is in a crash loop now.
    fn strike(&self, seat: &mut Seat, now: Instant) -> (bool, f64, bool) {
        let was_loop = seat.is_crash_loop(&self.policy);
        let wait = seat.ended(&self.policy, now);
        (was_loop, wait.as_secs_f64(), seat.is_crash_loop(&self.policy))
    }
}

/// Drops the words with a digit, which differ from try to try and from slot to slot.
fn gist(reason: &str) -> String {
    let words = reason.split_whitespace().filter(|word| !word.contains(|c: char| c.is_ascii_digit()));
    words.collect::<Vec<_>>().join(" ")
}
