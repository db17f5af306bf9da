//! The control plane: decides which backends there are and in what state, and publishes that as the table.
//!
//! # Layout
//!
//! - [`provider`]: where a pool's backends come from
//! - [`docker`]: how provider and supervisor see a Docker engine
//! - [`supervisor`]: keeps the wanted number of replicas alive
//! - [`health`]: checks backends
//! - [`publisher`]: takes the events of all three; the only writer of the table
//!
//! Drain of single backends, passive ejection and reload belong here too, as further events.

pub mod docker;
pub mod health;
pub mod provider;
pub mod publisher;
pub mod supervisor;

use std::net::SocketAddr;
use std::sync::Arc;

use crate::backend::{Exit, Replica};

/// What providers, supervisor and health checks tell the publisher of one pool.
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
