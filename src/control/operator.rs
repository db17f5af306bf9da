//! What an operator may order while Ringway runs, and what comes of it. The app carries the orders out, one at a time.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use super::provider::Listed;

/// Orders that may wait; who gives one more waits too.
const QUEUE: usize = 16;

/// An order.
#[derive(Debug, Clone)]
pub enum Order {
    /// No new connections for a backend.
    Drain {
        /// Its pool.
        pool: String,
        /// Which backend.
        backend: String,
        /// When connections that are still open are reset; `None`: after the pool's `drain`.
        within: Option<Duration>,
    },
    /// Connections again.
    Undrain {
        /// Its pool.
        pool: String,
        /// Which backend.
        backend: String,
    },
    /// Another weight.
    Weight {
        /// Its pool.
        pool: String,
        /// Which backend.
        backend: String,
        /// 1 to 1000.
        weight: u32,
    },
    /// One more backend of a static pool.
    Add {
        /// The pool.
        pool: String,
        /// The backend.
        backend: Listed,
    },
    /// One less; it is drained first.
    Remove {
        /// The pool.
        pool: String,
        /// Which backend.
        backend: String,
    },
    /// Another number of replicas.
    Scale {
        /// The pool.
        pool: String,
        /// 1 to 1000.
        replicas: u32,
    },
    /// Another config.
    Reload {
        /// The config; `None`: what the file says that Ringway was started with.
        text: Option<String>,
        /// Only say what it would change.
        is_dry_run: bool,
    },
    /// Another process, from the binary as it is on disk now.
    Upgrade,
}

impl fmt::Display for Order {
    /// As on the command line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Drain { pool, backend, .. } => write!(f, "drain {pool}/{backend}"),
            Self::Undrain { pool, backend } => write!(f, "undrain {pool}/{backend}"),
            Self::Weight { pool, backend, weight } => write!(f, "weight {pool}/{backend} {weight}"),
            Self::Add { pool, backend } => write!(f, "add {pool}/{} {}:{}", backend.id, backend.host, backend.port),
            Self::Remove { pool, backend } => write!(f, "remove {pool}/{backend}"),
            Self::Scale { pool, replicas } => write!(f, "scale {pool} {replicas}"),
            Self::Reload { is_dry_run: true, .. } => f.write_str("check"),
            Self::Reload { .. } => f.write_str("reload"),
            Self::Upgrade => f.write_str("upgrade"),
        }
    }
}

/// What an order has changed, or would.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// In words, each with its key path.
    pub changes: Vec<String>,
    /// For each pool whose ring changes, the share of keys that get another backend, from 0 to 1.
    pub moved: Vec<Moved>,
    /// Key paths of what differs and takes another process.
    pub needs_restart: Vec<String>,
}

/// The share of a pool's keys that get another backend.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Moved {
    /// The pool.
    pub pool: String,
    /// From 0 to 1.
    pub share: f64,
}

/// Why an order is not carried out; nothing has changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// What it names is not there.
    #[error("{0}")]
    NotFound(String),
    /// It does not go with what there is.
    #[error("{0}")]
    Conflict(String),
    /// It is none.
    #[error("{0}")]
    Invalid(String),
}

/// An order and where its outcome goes.
pub type Ordered = (Order, oneshot::Sender<Result<Report, Refusal>>);

/// Gives orders. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Operator(mpsc::Sender<Ordered>);

impl Operator {
    /// One that gives orders, and the queue to take them from.
    pub fn new() -> (Self, mpsc::Receiver<Ordered>) {
        let (sender, queue) = mpsc::channel(QUEUE);
        (Self(sender), queue)
    }

    /// Gives an order and waits until it is carried out.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn order(&self, order: Order) -> Result<Report, Refusal> {
        let gone = || Refusal::Conflict("Ringway is stopping".to_owned());
        let (sender, outcome) = oneshot::channel();
        self.0.send((order, sender)).await.map_err(|_| gone())?;
        outcome.await.map_err(|_| gone())?
    }
}

/// One thing that was changed at run time and differs from the config.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Differs {
    /// `replicas`, `weight`, `drain`, `added` or `removed`.
    pub what: String,
    /// The backend, where it is about one.
    pub backend: Option<Arc<str>>,
    /// What the config says, where it says a figure.
    pub config: Option<u32>,
    /// What holds, where that is a figure.
    pub now: Option<u32>,
}
