use super::*;

impl Target for u32 {
    fn image(&self) -> Option<&str> {
        None
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
fn whoever_puts_the_old_settings_back_on_the_way_there_has_what_is_wanted() {
    let (mut rollout, status, now) = rollout();
    rollout.configure(2, now);
    rollout.follow(1, 3, true, now);
    rollout.fail("no", OnFailure::Rollback, now);
    rollout.configure(1, now);
    rollout.follow(2, 3, false, now);
    assert_eq!((*rollout.spec(), status.view().stage), (1, Stage::Running));
    rollout.follow(3, 3, true, now);
    let view = status.view();
    assert_eq!((view.stage, view.updated, last(&status)), (Stage::Idle, 3, Some(RolloutResult::Done)));
}

#[test]
fn a_command_on_the_way_back_goes_forward_again_and_can_still_go_back() {
    let (mut rollout, status, now) = rollout();
    rollout.configure(2, now);
    rollout.follow(1, 3, true, now);
    rollout.fail("no", OnFailure::Rollback, now);
    rollout.begin(2, now);
    rollout.follow(1, 3, true, now);
    assert_eq!((*rollout.spec(), status.view().stage), (2, Stage::Running));
    assert!(rollout.fail("no", OnFailure::Rollback, now));
    assert_eq!(*rollout.spec(), 1);
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
