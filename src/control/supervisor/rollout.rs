//! The rollout of a pool: what new replicas are started from, and how far the replacement of the others is. Pure except for its
//! status, which others read.

use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::plan::OnFailure;
use crate::label_enum;
use crate::labels::Tally;

#[cfg(test)]
mod tests;

label_enum! {
    /// What the rollout of a pool does now.
    pub enum Stage {
        /// All replicas were started from the current settings.
        Idle => "idle",
        /// It replaces the others.
        Running => "running",
        /// It has failed, and goes back to what the replicas were started from before.
        RollingBack => "rolling_back",
        /// It has failed, and replaces no more replicas.
        Paused => "paused",
        /// It has failed, and all replicas are from the settings before.
        RolledBack => "rolled_back",
    }
}

label_enum! {
    /// How a rollout ended.
    pub enum RolloutResult {
        /// All replicas were replaced.
        Done => "done",
        /// It failed, and all replicas are from the settings before.
        RolledBack => "rolled_back",
        /// It failed, and some replicas may be new.
        Paused => "paused",
    }
}

/// What an operator asks of a rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RolloutOrder {
    /// Replace the replicas that were not started from the current settings and the current image; all, if `is_forced`.
    Begin {
        /// Replace also those that are from the current settings.
        is_forced: bool,
    },
    /// End the rollout as if it had failed.
    Abort,
}

/// An order, and where the state after it goes.
pub type PendingOrder = (RolloutOrder, oneshot::Sender<RolloutView>);

/// The rollouts of one pool, for whoever shows them.
#[derive(Debug)]
pub struct RolloutStatus {
    view: Mutex<RolloutView>,
    /// Rollouts that have ended, by their result.
    pub results: Tally<RolloutResult>,
}

/// How far a rollout is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RolloutView {
    /// What it does now.
    pub stage: Stage,
    /// Slots that the current settings have reached.
    pub updated: usize,
    /// All slots of the pool.
    pub total: usize,
    /// Since when it does so.
    pub since: Instant,
    /// How the last rollout ended, and when.
    pub last: Option<(RolloutResult, Instant)>,
    /// Why the last rollout failed, if it has.
    pub reason: Option<Arc<str>>,
    /// What it has failed with.
    pub refused: Option<Refused>,
    /// It waits until an old Ringway process has no connections any more.
    pub is_held: bool,
}

/// What a rollout has failed with. A successor does not try it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// Identifies it.
    pub digest: u64,
    /// Why it failed.
    pub reason: String,
    /// Its image, if the rollout has gone back to another one.
    #[serde(default)]
    pub image: Option<String>,
}

/// What replicas are started from.
pub(super) trait Target: Clone + Debug + PartialEq {
    /// The name of an image; `None` for processes.
    fn image(&self) -> Option<&str>;
}

fn digest(target: &impl Target) -> u64 {
    seahash::hash(format!("{target:?}").as_bytes())
}

impl RolloutStatus {
    /// The status of a pool that has not had a rollout.
    pub fn new(now: Instant) -> Self {
        let view = RolloutView {
            stage: Stage::Idle,
            updated: 0,
            total: 0,
            since: now,
            last: None,
            reason: None,
            refused: None,
            is_held: false,
        };
        Self { view: Mutex::new(view), results: Tally::default() }
    }

    /// How far the rollout is.
    pub fn view(&self) -> RolloutView {
        self.view.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change(&self, change: impl FnOnce(&mut RolloutView)) {
        change(&mut self.view.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// The rollout of a pool whose replicas are started from an `S`.
#[derive(Debug)]
pub(super) struct Rollout<S> {
    pool: Arc<str>,
    status: Arc<RolloutStatus>,
    /// What new replicas are started from.
    spec: S,
    /// What they were started from before the rollout began.
    previous: Option<S>,
    /// What the settings wanted last.
    wanted: S,
    /// What a rollout has failed with. It is not tried again before an operator asks for it.
    refused: Option<S>,
    stage: Stage,
    /// When the last replacement ended.
    pub(super) last_step: Option<Instant>,
}

impl<S: Target> Rollout<S> {
    pub(super) fn new(pool: Arc<str>, spec: S, status: Arc<RolloutStatus>) -> Self {
        let wanted = spec.clone();
        Self { pool, status, spec, wanted, previous: None, refused: None, stage: Stage::Idle, last_step: None }
    }

    /// Goes on where a predecessor was, whose replicas are from `previous`, if that is known. It may have failed with what is wanted.
    pub(super) fn go_on(&mut self, previous: Option<S>, refused: Option<Refused>, now: Instant) {
        let has_refused = refused.filter(|refused| refused.digest == digest(&self.spec));
        let previous = previous.filter(|previous| *previous != self.spec);
        let Some(refused) = has_refused else {
            self.previous = previous;
            return;
        };
        self.status.change(|view| view.reason = Some(refused.reason.as_str().into()));
        if let Some(previous) = previous {
            self.refuse(previous, &refused.reason);
            self.enter(Stage::RolledBack, now);
        } else {
            self.status.change(|view| view.refused = Some(refused));
            self.enter(Stage::Paused, now);
        }
    }

    /// What new replicas are started from.
    pub(super) fn spec(&self) -> &S {
        &self.spec
    }

    /// What it does now.
    pub(super) fn stage(&self) -> Stage {
        self.stage
    }

    /// The settings want replicas that are started from `wanted`. Returns whether new replicas are started from something else now.
    pub(super) fn configure(&mut self, wanted: S, now: Instant) -> bool {
        if self.wanted != wanted {
            // Others than those that failed, even if they are what the replicas have.
            self.forget_refused();
            self.start_over(now);
        }
        self.wanted = wanted.clone();
        if self.refused.as_ref() == Some(&wanted) {
            return false;
        }
        if self.spec == wanted {
            // It may be known more exactly.
            self.spec = wanted;
            return false;
        }
        let before = std::mem::replace(&mut self.spec, wanted);
        // Whoever mends a rollout that goes on still wants to go back to what worked, and not to what failed.
        if self.stage == Stage::Idle {
            self.previous.get_or_insert(before);
        }
        true
    }

    /// An operator asks for a rollout to `wanted`, which may have failed before, or which the replicas may have already.
    pub(super) fn begin(&mut self, wanted: S, now: Instant) {
        self.forget_refused();
        if !matches!(self.stage, Stage::Running | Stage::Paused) {
            self.previous.get_or_insert_with(|| self.spec.clone());
        }
        self.start_over(now);
        self.configure(wanted, now);
    }

    /// Forgets that the last rollout has failed. One that goes on does so.
    fn start_over(&mut self, now: Instant) {
        if self.stage != Stage::Running {
            self.enter(Stage::Idle, now);
        }
    }

    /// Follows the replicas: `updated` of `total` slots have one from the current settings, and nothing is under way if `is_quiet`.
    pub(super) fn follow(&mut self, updated: usize, total: usize, is_quiet: bool, now: Instant) {
        let (pool, is_complete) = (&self.pool, updated == total && is_quiet);
        match self.stage {
            Stage::Idle | Stage::RolledBack if updated < total => {
                tracing::info!(%pool, replicas = total - updated, "rollout begins");
                self.status.change(|view| view.reason = None);
                self.enter(Stage::Running, now);
            }
            Stage::Running if is_complete => {
                tracing::info!(%pool, replicas = total, "rollout done");
                self.previous = None;
                self.end(RolloutResult::Done, Stage::Idle, now);
            }
            Stage::RollingBack if is_complete => {
                tracing::warn!(%pool, replicas = total, "rolled back");
                self.end(RolloutResult::RolledBack, Stage::RolledBack, now);
            }
            Stage::Idle if is_complete => self.previous = None,
            Stage::Paused if is_complete => {
                self.previous = None;
                self.enter(Stage::Idle, now);
            }
            _ => {}
        }
        // After a rollback, no replica is from the current settings.
        let shown = if self.stage == Stage::RolledBack { 0 } else { updated };
        self.status.change(|view| (view.updated, view.total) = (shown, total));
    }

    /// Notes whether it waits for the end of an old Ringway process.
    pub(super) fn hold(&mut self, is_held: bool) {
        self.status.change(|view| view.is_held = is_held);
    }

    /// A new replica has failed, or an operator has lost patience. Returns whether new replicas are started from something else now.
    pub(super) fn fail(&mut self, reason: &str, on_failure: OnFailure, now: Instant) -> bool {
        let pool = &self.pool;
        let previous = match (self.stage, on_failure) {
            (Stage::Idle | Stage::Paused | Stage::RolledBack, _) => return false,
            (Stage::Running, OnFailure::Rollback) => self.previous.take(),
            (Stage::RollingBack, _) | (Stage::Running, OnFailure::Pause) => None,
        };
        self.status.change(|view| view.reason = Some(reason.into()));
        if let Some(previous) = previous {
            tracing::error!(%pool, reason, "rollout failed; Ringway goes back to what the replicas were started from before");
            self.refuse(previous, reason);
            self.enter(Stage::RollingBack, now);
            return true;
        }
        tracing::error!(%pool, reason,
            "rollout failed and is paused: the other replicas stay as they are. Mend the settings, or try again with \
             `ringway rollout`");
        let shown = Refused { digest: digest(&self.spec), reason: reason.to_owned(), image: None };
        self.status.change(|view| view.refused = Some(shown));
        self.end(RolloutResult::Paused, Stage::Paused, now);
        false
    }

    /// Goes back to `previous`.
    fn refuse(&mut self, previous: S, reason: &str) {
        let refused = std::mem::replace(&mut self.spec, previous);
        let image = refused.image().filter(|&image| Some(image) != self.spec.image()).map(str::to_owned);
        let shown = Refused { digest: digest(&refused), reason: reason.to_owned(), image };
        self.status.change(|view| view.refused = Some(shown));
        self.refused = Some(refused);
    }

    fn forget_refused(&mut self) {
        self.refused = None;
        self.status.change(|view| view.refused = None);
    }

    fn end(&mut self, result: RolloutResult, stage: Stage, now: Instant) {
        self.status.results.count(result);
        self.status.change(|view| view.last = Some((result, now)));
        self.enter(stage, now);
    }

    fn enter(&mut self, stage: Stage, now: Instant) {
        if std::mem::replace(&mut self.stage, stage) != stage {
            self.status.change(|view| (view.stage, view.since) = (stage, now));
        }
    }
}
