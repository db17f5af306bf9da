//! The keys that the providers `process` and `docker` share: how many replicas there are, when they are restarted, and how they are
//! replaced.

use std::time::Duration;

use super::{Form, Key, days, hours, minutes, ms, names, seconds};
use crate::control::supervisor::plan::{OnFailure, Order};

/// Section `restart` of the providers `process` and `docker`.
pub(super) const RESTART: &[Key] = &[
    Key::duration(
        "backoff",
        ms(1)..=hours(1),
        ms(200),
        "the first restart is immediate. Ringway waits this long before the second consecutive restart, and twice as long before each further one",
    ),
    Key::duration("max_backoff", ms(1)..=hours(1), seconds(30), "longest wait"),
    Key::duration(
        "stable_after",
        ms(1)..=days(1),
        minutes(1),
        "if a replica ran for at least this long before it ended, Ringway resets the count of consecutive restarts",
    ),
    Key::integer("crash_loop_after", 1..=1000, 5, "consecutive restarts after which the state is `crash_loop`"),
    Key::duration(
        "start_grace",
        Duration::ZERO..=days(1),
        minutes(1),
        "how long a new replica may fail its checks and still count as starting",
    ),
    Key::usual_time(
        "replace_after",
        Form::Any(&[Form::Off, Form::Duration(seconds(1)..=days(1))]),
        seconds(30),
        "Ringway replaces a replica that runs but has been unhealthy for this long, one at a time. `off`: never",
    ),
];

/// `replicas` of the providers `process` and `docker`.
pub(super) const NUMBER: Form = Form::Any(&[Form::Integer(1..=1000), Form::Section(SCALED, "{ min: 0, max: 3 }")]);

/// Section `replicas` of the providers `process` and `docker`.
const SCALED: &[Key] = &[
    Key::integer(
        "min",
        0..=1000,
        0,
        "replicas without connections. 0: the pool sleeps, and its first connection wakes it",
    ),
    Key::required("max", Form::Integer(1..=1000), "the highest number of replicas"),
    Key::duration(
        "idle_stop",
        seconds(1)..=days(30),
        minutes(15),
        "time without connections after which only `min` replicas stay",
    ),
    Key::duration(
        "wake_timeout",
        ms(100)..=minutes(10),
        seconds(20),
        "how long a connection waits for a healthy replica while the pool wakes. Then Ringway resets it",
    ),
    Key::integer("max_waiting", 1..=1_000_000, 1000, "connections that may wait. Ringway resets further ones"),
    Key::section(
        "scale_on",
        SCALE_ON,
        "{ connections_per_replica: 100 }",
        "how the number follows the connections. Without this section, the pool has `max` replicas as soon as it has a connection",
    ),
];

/// Section `scale_on` of `replicas`.
const SCALE_ON: &[Key] = &[
    Key::required(
        "connections_per_replica",
        Form::Integer(1..=1_000_000),
        "connections for which one replica is enough",
    ),
    Key::duration(
        "cool_down",
        seconds(1)..=days(1),
        minutes(5),
        "how long a lower number must have been enough before the number falls. It rises at once",
    ),
];

/// Section `rollout` of the providers `process` and `docker`.
pub(super) const ROLLOUT: &[Key] = &[
    Key::choice(
        "order",
        names::<Order>,
        "start_first",
        "`start_first`: the new replica starts beside the old one, and takes the slot when it is healthy. No key moves. `stop_first`: the old replica drains and stops before the new one starts. A pool with `tiers.exclusive` always uses `stop_first`",
    ),
    Key::integer("parallel", 1..=1000, 1, "replicas that are replaced at the same time"),
    Key::duration(
        "pause",
        Duration::ZERO..=days(1),
        Duration::ZERO,
        "wait between the end of one replacement and the start of the next. After a failure, the way back does not wait",
    ),
    Key::duration(
        "healthy_for",
        Duration::ZERO..=hours(1),
        seconds(5),
        "how long a new replica must have been healthy before it takes the slot, or before the next replica is replaced",
    ),
    Key::choice(
        "on_failure",
        names::<OnFailure>,
        "rollback",
        "what happens if a new replica becomes unhealthy or keeps ending. `rollback`: Ringway goes back to what the replicas were started from before. `pause`: the replicas stay as they are. In both cases, Ringway removes a new replica that stands beside an old one",
    ),
    Key::usual(
        "drain",
        Form::Any(&[Form::Word("auto"), Form::Duration(Duration::ZERO..=days(1))]),
        "auto",
        "how long the open connections of a replaced replica may go on. auto: `drain` of the pool",
    ),
];
