//! Parses when replicas are restarted, and how they are replaced: sections that the providers `process` and `docker` share.

use super::reader::{Section, narrow};
use super::{Restart, Rollout};
use crate::control::supervisor::plan::Policy;

pub(super) fn restart(mut section: Section<'_>) -> Restart {
    let policy = Policy {
        backoff: section.duration("backoff"),
        max_backoff: section.duration("max_backoff"),
        stable_after: section.duration("stable_after"),
        crash_loop_after: narrow(section.integer("crash_loop_after")),
        replace_after: section.off_or_duration("replace_after"),
    };
    let start_grace = section.duration("start_grace");
    if policy.max_backoff < policy.backoff {
        section.fault("max_backoff is shorter than backoff: set max_backoff to backoff or longer");
    }
    section.finish();
    Restart { policy, start_grace }
}

pub(super) fn rollout(mut section: Section<'_>) -> Rollout {
    let rollout = Rollout {
        order: section.choice("order"),
        parallel: narrow(section.integer("parallel")),
        pause: section.duration("pause"),
        healthy_for: section.duration("healthy_for"),
        on_failure: section.choice("on_failure"),
        drain: section
            .item("drain")
            .filter(|item| item.value.as_str() != Some("auto"))
            .and_then(|item| item.duration()),
    };
    section.finish();
    rollout
}
