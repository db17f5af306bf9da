//! The control plane: decides which backends there are and in what state, and publishes that as the table.
//!
//! # Layout
//!
//! - [`provider`]: where a pool's backends come from
//! - [`docker`]: how provider and supervisor see a Docker engine
//! - [`supervisor`]: keeps the wanted number of replicas alive
//! - [`health`]: checks backends
//! - [`operator`]: what may be ordered at run time
//! - [`ejection`]: takes backends out that fail connects
//! - [`publisher`]: takes the events of them all; the only writer of the table

pub mod docker;
pub mod ejection;
pub mod health;
pub mod operator;
pub mod provider;
pub mod publisher;
pub mod supervisor;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::backend::{Exit, Replica};

/// What the publisher of one pool is told: by providers, supervisor, health checks, and by the operator.
#[derive(Debug, Clone)]
pub enum Event {
    /// The pool has this backend from now on.
    Joined {
        /// Its identity on the ring.
        id: Arc<str>,
        /// Multiple of the ring's virtual nodes.
        weight: u32,
    },
    /// The backend listens, or will in a moment, at this address.
    Started {
        /// Which backend.
        id: Arc<str>,
        /// Where it listens.
        address: SocketAddr,
        /// What listens there, where Ringway knows.
        replica: Option<Replica>,
    },
    /// The backend's replica is gone.
    Stopped {
        /// Which backend.
        id: Arc<str>,
        /// Its replicas keep dying, and the supervisor waits before the next try.
        crash_loop: bool,
        /// How it ended, once that is known.
        exit: Option<Arc<Exit>>,
    },
    /// The pool does not have this backend any more.
    Left {
        /// Which backend.
        id: Arc<str>,
    },
    /// What runs the replica has an opinion of its own: an engine with a health check in the image.
    Reported {
        /// Which backend.
        id: Arc<str>,
        /// False is enough to be unhealthy; true leaves it to the checks.
        healthy: bool,
    },
    /// The pool's settings are these from now on.
    Configured(publisher::Settings),
    /// Connects to the backend keep failing.
    Ejected {
        /// Which backend.
        id: Arc<str>,
        /// The replica that failed; news of an earlier one is stale.
        incarnation: u64,
    },
    /// It has been out for long enough.
    Readmitted {
        /// Which backend.
        id: Arc<str>,
        /// The replica that was ejected.
        incarnation: u64,
    },
    /// The operator wants the backend to get no new connections.
    Drained {
        /// Which backend.
        id: Arc<str>,
        /// When connections that are still open are reset; `None`: never.
        within: Option<Duration>,
    },
    /// Its replica gets no new connections and will be stopped; its successor may get some again.
    Retiring {
        /// Which backend.
        id: Arc<str>,
        /// When connections that are still open are reset.
        within: Duration,
    },
    /// It may get connections again.
    Undrained {
        /// Which backend.
        id: Arc<str>,
    },
    /// The pool does not have this backend any more once its connections have ended; those that are open after this
    /// time are reset. Until then it may join again.
    Leaving {
        /// Which backend.
        id: Arc<str>,
        /// Zero: at once.
        within: Duration,
    },
    /// A health check was done.
    Checked {
        /// Which backend.
        id: Arc<str>,
        /// The replica that was checked; news of an earlier one is stale.
        incarnation: u64,
        /// Healthy or not, once the checks have made up their mind.
        healthy: Option<bool>,
        /// `ok`, or what was wrong.
        result: Arc<str>,
    },
}

impl Event {
    /// The backend that it is about.
    fn id(&self) -> Option<&Arc<str>> {
        match self {
            Self::Configured(_) => None,
            Self::Joined { id, .. }
            | Self::Started { id, .. }
            | Self::Stopped { id, .. }
            | Self::Left { id }
            | Self::Reported { id, .. }
            | Self::Ejected { id, .. }
            | Self::Readmitted { id, .. }
            | Self::Drained { id, .. }
            | Self::Retiring { id, .. }
            | Self::Undrained { id }
            | Self::Leaving { id, .. }
            | Self::Checked { id, .. } => Some(id),
        }
    }
}
