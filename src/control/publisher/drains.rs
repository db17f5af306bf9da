//! The reasons for which a backend drains. Pure: the time is an argument.

use std::time::{Duration, Instant};

use crate::backend::Drain;

/// The drains of a backend. With any of them it gets no new connections.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Drains {
    /// The backend leaves the pool.
    pub(super) leaving: Option<Drain>,
    /// This replica will be stopped. The drain ends with the next replica.
    pub(super) retiring: Option<Drain>,
    /// A command drains the backend.
    pub(super) ordered: Option<Drain>,
    /// The provider says that the backend is drained.
    pub(super) listed: Option<Drain>,
    /// The agent says so.
    pub(super) advised: Option<Drain>,
}

impl Drains {
    fn all(self) -> [Option<Drain>; 5] {
        let Self { leaving, listed, ordered, retiring, advised } = self;
        [leaving, listed, ordered, retiring, advised]
    }

    /// The drain to publish: the one that an operator cares about most.
    pub(super) fn shown(self) -> Option<Drain> {
        self.all().into_iter().flatten().next()
    }

    /// When Ringway resets the remaining connections: the earliest deadline of all drains.
    pub(super) fn deadline(self) -> Option<Instant> {
        self.all().into_iter().flatten().filter_map(|drain| drain.deadline).min()
    }
}

/// A drain that begins now, or an existing drain with a new deadline.
pub(super) fn begin_drain(before: Option<Drain>, within: Option<Duration>, leaves: bool, now: Instant) -> Drain {
    Drain { since: before.map_or(now, |before| before.since), deadline: within.map(|within| now + within), leaves }
}
