//! Parses how many replicas there are, when they are restarted, and how they are replaced: what the providers `process` and `docker` share.

use super::reader::{Section, narrow};
use super::{Restart, Rollout, Scaled};
use crate::control::supervisor::plan::Policy;
use crate::control::supervisor::scaling::{ByLoad, Scaling};

/// The number of replicas, or the maximum if the pool scales by itself.
pub(super) fn replicas(section: &mut Section<'_>) -> (u32, Option<Scaled>) {
    let Some(item) = section.required("replicas", "the number of replicas, from 1 to 1000") else { return (1, None) };
    if !item.value.is_mapping() {
        return (narrow(item.integer().unwrap_or(1)), None);
    }
    let mut section = item.section();
    let min = narrow(section.integer("min"));
    let max = section.required("max", "the highest number of replicas, from 1 to 1000").and_then(|item| item.integer());
    let max = max.map(narrow);
    let (idle_stop, wake_timeout) = (section.duration("idle_stop"), section.duration("wake_timeout"));
    let max_waiting = narrow(section.integer("max_waiting"));
    let by_load = section.item("scale_on").map(|item| {
        let mut section = item.section();
        let wanted = section.required("connections_per_replica", "the connections for which one replica is enough");
        let connections_per_replica = narrow(wanted.and_then(|item| item.integer()).unwrap_or(1));
        let cool_down = section.duration("cool_down");
        section.finish();
        ByLoad { connections_per_replica, cool_down }
    });
    if max.is_some_and(|max| min >= max) {
        section.fault(format_args!("min is not less than max: lower min, or write replicas: {}", max.unwrap_or(1)));
    }
    section.finish();
    let scaling = Scaling { min, idle_stop, by_load };
    (max.unwrap_or(1), Some(Scaled { scaling, wake_timeout, max_waiting }))
}

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
