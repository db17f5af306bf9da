//! The control plane: decides which backends a pool has and what state each is in, and publishes the result as a table.
//!
//! # Layout
//!
//! - [`provider`]: lists a pool's backends
//! - [`docker`]: how the provider and the supervisor see a Docker engine
//! - [`supervisor`]: keeps the configured number of replicas running
//! - [`health`]: checks backends
//! - [`agent`]: asks programs beside the backends how many connections those should get
//! - [`command`]: the commands that Ringway accepts at run time
//! - [`ejection`]: ejects backends that fail connects
//! - [`publisher`]: receives the events of all the others; the only writer of the table

pub mod agent;
pub mod command;
pub mod docker;
pub mod ejection;
pub mod health;
pub mod provider;
pub mod publisher;
pub mod supervisor;

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::address::Address;
use crate::backend::{Advice, Exit, Membership, Replica};

/// Environment variables that are meant for Ringway alone, and not for the programs that it starts.
const PRIVATE_VARIABLES: [&str; 6] =
    ["RINGWAY_TOKEN", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID"];

/// One input to the publisher of a pool, from a provider, the supervisor, the health checks, ejection, or a command.
///
/// In every variant `id` is the backend's identity on the ring. `incarnation` numbers the replicas and addresses that
/// the pool's backends have had; the publisher ignores an event about an earlier one.
#[derive(Debug, Clone)]
pub enum Event {
    /// The pool has this backend from now on.
    Joined {
        /// Ring identity.
        id: Arc<str>,
        /// How the backend takes part in the pool.
        membership: Membership,
    },
    /// Another incarnation of a slot comes to stand beside it, without points on the ring.
    Beside {
        /// Its id as long as it is beside the slot.
        id: Arc<str>,
        /// The slot.
        slot: Arc<str>,
    },
    /// The incarnation beside a slot fills the slot from now on. The other one stands beside it, and leaves once its connections have
    /// ended.
    Flipped {
        /// The slot.
        id: Arc<str>,
        /// The id beside it.
        beside: Arc<str>,
        /// The replica that fills the slot from now on.
        next: Replica,
        /// The replica that leaves, if there is one.
        former: Option<Replica>,
        /// Time until Ringway resets the connections of the one that leaves.
        within: Duration,
    },
    /// The backend listens at this address, or will in a moment.
    Started {
        /// Ring identity.
        id: Arc<str>,
        /// Address that workers connect to.
        address: Address,
        /// The process or container that listens there, if Ringway knows it.
        replica: Option<Replica>,
    },
    /// The replica has another name. It is the same one.
    Renamed {
        /// Ring identity.
        id: Arc<str>,
        /// The replica under its name.
        replica: Replica,
    },
    /// The backend's replica is gone.
    Stopped {
        /// Ring identity.
        id: Arc<str>,
        /// True if replicas keep dying and the supervisor waits before it tries again.
        crash_loop: bool,
        /// How the replica ended, once known.
        exit: Option<Arc<Exit>>,
    },
    /// The pool no longer has this backend.
    Left {
        /// Ring identity.
        id: Arc<str>,
    },
    /// The container engine reported the result of the image's own health check.
    Reported {
        /// Ring identity.
        id: Arc<str>,
        /// False makes the backend unhealthy; true leaves the decision to Ringway's own checks.
        healthy: bool,
    },
    /// The pool has these settings from now on.
    Configured(publisher::Settings),
    /// Changes nothing. The publisher cancels the token once the table shows all events before this one.
    Awaited(CancellationToken),
    /// Connects to the backend keep failing, so it is ejected.
    Ejected {
        /// Ring identity.
        id: Arc<str>,
        /// The replica that failed.
        incarnation: u64,
    },
    /// The ejection is over.
    Readmitted {
        /// Ring identity.
        id: Arc<str>,
        /// The replica that was ejected.
        incarnation: u64,
    },
    /// A command drains the backend: it gets no new connections.
    DrainRequested {
        /// Ring identity.
        id: Arc<str>,
        /// Time until Ringway resets the connections that are still open; `None`: never.
        within: Option<Duration>,
    },
    /// The replica will be stopped and gets no new connections. Its successor may get connections again.
    Retiring {
        /// Ring identity.
        id: Arc<str>,
        /// Time until Ringway resets the connections that are still open; `None`: never.
        within: Option<Duration>,
    },
    /// The replica that was to be stopped stays.
    Spared {
        /// Ring identity.
        id: Arc<str>,
    },
    /// A command ends the drain: the backend may get connections again.
    DrainCancelled {
        /// Ring identity.
        id: Arc<str>,
    },
    /// The backend leaves the pool once its connections have ended. It may join again until then.
    Leaving {
        /// Ring identity.
        id: Arc<str>,
        /// Time until Ringway resets the connections that are still open; zero: at once.
        within: Duration,
    },
    /// The agent of the backend says something else than before.
    Advised {
        /// Ring identity.
        id: Arc<str>,
        /// The replica that the agent speaks for.
        incarnation: u64,
        /// What it says; `None`: it has been silent for too long, or Ringway no longer asks.
        advice: Option<Arc<Advice>>,
    },
    /// A health check finished.
    Checked {
        /// Ring identity.
        id: Arc<str>,
        /// The replica that was checked.
        incarnation: u64,
        /// The verdict of rise and fall; `None` while undecided.
        healthy: Option<bool>,
        /// The backend has answered lately: if it is unhealthy, then because its answers say no.
        has_declined: bool,
        /// `ok`, or a short reason for the failure.
        result: Arc<str>,
    },
}

impl Event {
    /// The backend that the event is about; `None` for an event about the whole pool.
    fn id(&self) -> Option<&Arc<str>> {
        match self {
            Self::Configured(_) | Self::Awaited(_) => None,
            Self::Joined { id, .. }
            | Self::Beside { id, .. }
            | Self::Flipped { id, .. }
            | Self::Started { id, .. }
            | Self::Renamed { id, .. }
            | Self::Stopped { id, .. }
            | Self::Left { id }
            | Self::Reported { id, .. }
            | Self::Ejected { id, .. }
            | Self::Readmitted { id, .. }
            | Self::DrainRequested { id, .. }
            | Self::Retiring { id, .. }
            | Self::Spared { id }
            | Self::DrainCancelled { id }
            | Self::Leaving { id, .. }
            | Self::Advised { id, .. }
            | Self::Checked { id, .. } => Some(id),
        }
    }
}
