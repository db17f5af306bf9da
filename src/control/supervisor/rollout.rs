//! The rollout of a pool: what new replicas are started from, and how far the replacement of the others is. Pure except for its
//! status, which others read.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::plan::OnFailure;
use crate::label_enum;
use crate::labels::Tally;

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
    /// The image with which it failed, if it has gone back to another one.
    pub refused_image: Option<Arc<str>>,
    /// What it has failed with, for a successor.
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
}

/// What replicas are started from.
pub(super) trait Target: Clone + PartialEq {
    /// The name of an image; `None` for processes.
    fn image(&self) -> Option<&str>;

    /// All that it says, as text.
    fn text(&self) -> String;
}

fn digest(target: &impl Target) -> u64 {
    seahash::hash(target.text().as_bytes())
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
            refused_image: None,
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
            if matches!(self.stage, Stage::Paused | Stage::RolledBack) {
                self.enter(Stage::Idle, now);
            }
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
        self.forget_refused();
        let before = std::mem::replace(&mut self.spec, wanted);
        match self.stage {
            Stage::RollingBack => self.previous = Some(before),
            // What was wanted before may not have been rolled out.
            Stage::Idle | Stage::RolledBack => drop(self.previous.get_or_insert(before)),
            // Whoever mends a rollout still wants to go back to what worked.
            Stage::Running | Stage::Paused => {}
        }
        if self.stage != Stage::Running {
            self.enter(Stage::Idle, now);
        }
        true
    }

    /// An operator asks for a rollout to `wanted`, which may have failed before, or which the replicas may have already.
    pub(super) fn begin(&mut self, wanted: S, now: Instant) {
        self.forget_refused();
        if matches!(self.stage, Stage::Idle | Stage::RolledBack) {
            self.previous.get_or_insert_with(|| self.spec.clone());
        }
        self.configure(wanted, now);
        if matches!(self.stage, Stage::Paused | Stage::RolledBack) {
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
        let shown = Refused { digest: digest(&self.spec), reason: reason.to_owned() };
        self.status.change(|view| view.refused = Some(shown));
        self.end(RolloutResult::Paused, Stage::Paused, now);
        false
    }

    /// Goes back to `previous`.
    fn refuse(&mut self, previous: S, reason: &str) {
        let refused = std::mem::replace(&mut self.spec, previous);
        let image = refused.image().filter(|&image| Some(image) != self.spec.image()).map(Arc::from);
        let shown = Refused { digest: digest(&refused), reason: reason.to_owned() };
        self.status.change(|view| (view.refused_image, view.refused) = (image, Some(shown)));
        self.refused = Some(refused);
    }

    fn forget_refused(&mut self) {
        self.refused = None;
        self.status.change(|view| (view.refused_image, view.refused) = (None, None));
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

#[cfg(test)]
mod tests {
    use super::*;

    impl Target for u32 {
        fn image(&self) -> Option<&str> {
            None
        }

        fn text(&self) -> String {
            self.to_string()
        }
    }

    fn rollout() -> (Rollout<u32>, Arc<RolloutStatus>, Instant) {
        let now = Instant::now();
        let status = Arc::new(RolloutStatus::new(now));
        (Rollout::new("echo".into(), 1, Arc::clone(&status)), status, now)
    }

    fn last(status: &RolloutStatus) -> Option<RolloutResult> {
        status.view().last.map(|(result, _)| result)
    }

    #[test]
    fn a_rollout_ends_when_all_slots_have_a_new_replica_and_nothing_is_under_way() {
        let (mut rollout, status, now) = rollout();
        rollout.follow(3, 3, true, now);
        assert_eq!((status.view().stage, last(&status)), (Stage::Idle, None));
        rollout.configure(2, now);
        rollout.follow(0, 3, true, now);
        assert_eq!(status.view().stage, Stage::Running);
        rollout.follow(3, 3, false, now);
        assert_eq!(status.view().stage, Stage::Running);
        rollout.follow(3, 3, true, now);
        assert_eq!((status.view().stage, last(&status)), (Stage::Idle, Some(RolloutResult::Done)));
        assert_eq!(status.results.of(RolloutResult::Done), 1);
    }

    #[test]
    fn a_failed_rollout_goes_back_and_is_not_tried_again_before_somebody_asks() {
        let (mut rollout, status, now) = rollout();
        rollout.configure(2, now);
        rollout.follow(1, 3, false, now);
        assert!(rollout.fail("it does not start", OnFailure::Rollback, now));
        assert_eq!((*rollout.spec(), status.view().stage), (1, Stage::RollingBack));
        rollout.configure(2, now);
        assert_eq!(*rollout.spec(), 1, "a reload of the same settings");
        rollout.follow(3, 3, true, now);
        assert_eq!((status.view().stage, last(&status)), (Stage::RolledBack, Some(RolloutResult::RolledBack)));
        assert_eq!(status.view().reason.as_deref(), Some("it does not start"));
        rollout.begin(2, now);
        rollout.follow(0, 3, true, now);
        assert_eq!((*rollout.spec(), status.view().stage), (2, Stage::Running));
        assert_eq!(status.view().reason, None);
    }

    #[test]
    fn without_anything_to_go_back_to_a_failed_rollout_is_paused() {
        let (mut rollout, status, now) = rollout();
        // After a restart of Ringway, nobody knows what the replicas were started from.
        rollout.follow(1, 3, true, now);
        assert!(!rollout.fail("no", OnFailure::Rollback, now));
        assert_eq!(rollout.stage(), Stage::Paused);
        assert_eq!(last(&status), Some(RolloutResult::Paused));
        assert!(!rollout.fail("no", OnFailure::Rollback, now), "it fails once");
        assert_eq!(status.results.of(RolloutResult::Paused), 1);
        rollout.configure(3, now);
        assert_eq!(rollout.stage(), Stage::Idle, "other settings may be the remedy");
    }

    /// A command may ask for new replicas from the same settings, which fail for another reason.
    #[test]
    fn a_rollout_of_the_same_settings_that_fails_leaves_the_replicas_alone() {
        let (mut rollout, status, now) = rollout();
        rollout.begin(1, now);
        rollout.follow(0, 3, true, now);
        assert!(rollout.fail("no", OnFailure::Rollback, now));
        rollout.follow(3, 3, true, now);
        assert_eq!((status.view().stage, last(&status)), (Stage::RolledBack, Some(RolloutResult::RolledBack)));
        rollout.configure(2, now);
        assert_eq!(*rollout.spec(), 2);
    }

    #[test]
    fn a_successor_does_not_try_again_what_has_failed() {
        let (mut rollout, status, now) = rollout();
        rollout.configure(2, now);
        rollout.follow(0, 3, true, now);
        rollout.fail("no", OnFailure::Rollback, now);
        rollout.follow(3, 3, true, now);
        let refused = status.view().refused;
        let next = |previous: Option<u32>, wanted: u32| {
            let status = Arc::new(RolloutStatus::new(now));
            let mut next = Rollout::new("echo".into(), wanted, Arc::clone(&status));
            next.go_on(previous, refused.clone(), now);
            (*next.spec(), status.view().stage, status.view().reason.is_some())
        };
        assert_eq!(next(Some(1), 2), (1, Stage::RolledBack, true));
        assert_eq!(next(None, 2), (2, Stage::Paused, true), "nobody knows what the containers are from");
        assert_eq!(next(Some(1), 3), (3, Stage::Idle, false), "the config has changed");
        assert_eq!(next(Some(1), 1), (1, Stage::Idle, false));
    }

    #[test]
    fn whoever_puts_the_old_settings_back_ends_a_pause() {
        let (mut rollout, status, now) = rollout();
        rollout.configure(2, now);
        rollout.follow(0, 3, true, now);
        rollout.fail("a command has aborted it", OnFailure::Rollback, now);
        rollout.fail("a command has aborted it", OnFailure::Rollback, now);
        assert_eq!((*rollout.spec(), status.view().stage), (1, Stage::Paused));
        rollout.configure(2, now);
        assert_eq!(status.view().stage, Stage::Paused, "no change of the settings");
        rollout.configure(1, now);
        assert_eq!((status.view().stage, status.view().refused), (Stage::Idle, None));
    }

    #[test]
    fn settings_that_no_replica_ever_had_are_not_gone_back_to() {
        let (mut rollout, _, now) = rollout();
        // The engine is away meanwhile.
        rollout.configure(2, now);
        rollout.configure(3, now);
        rollout.follow(0, 3, true, now);
        assert!(rollout.fail("no", OnFailure::Rollback, now));
        assert_eq!(*rollout.spec(), 1);
        // No slot had a replica.
        rollout.configure(4, now);
        rollout.follow(3, 3, true, now);
        rollout.configure(5, now);
        rollout.follow(0, 3, true, now);
        assert!(rollout.fail("no", OnFailure::Rollback, now));
        assert_eq!(*rollout.spec(), 4);
    }

    #[test]
    fn a_rollback_that_fails_is_paused_and_a_mended_rollout_can_still_go_back() {
        let (mut rollout, _, now) = rollout();
        rollout.configure(2, now);
        rollout.follow(0, 3, true, now);
        assert!(!rollout.fail("no", OnFailure::Pause, now));
        rollout.configure(3, now);
        rollout.follow(0, 3, true, now);
        assert!(rollout.fail("no", OnFailure::Rollback, now));
        assert_eq!(*rollout.spec(), 1, "what worked last");
        assert!(!rollout.fail("no", OnFailure::Rollback, now));
        assert_eq!(rollout.stage(), Stage::Paused);
    }
}
