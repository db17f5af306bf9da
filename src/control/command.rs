//! Commands: what an operator may ask of a running Ringway, and what comes back. The app runs them one at a time.
//!
//! To add a command, add a variant here, its HTTP form in `api/commands.rs`, its effect in `app/commands.rs` and its
//! arguments in `cli/commands.rs`.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

pub use self::error::{CommandError, ErrorKind};
use super::provider::Listed;

mod error;

/// Commands that may wait for their turn. Whoever sends one more waits too.
const QUEUE: usize = 16;

/// A command. `pool` is the name of a pool or of a listener in front of it; `backend` is the id of a backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Stop sending new connections to a backend.
    Drain {
        /// Pool or listener.
        pool: String,
        /// Backend id.
        backend: String,
        /// How long open connections may go on before they are reset; `None`: the pool's `drain`.
        within: Option<Duration>,
    },
    /// Send new connections to a drained backend again.
    Undrain {
        /// Pool or listener.
        pool: String,
        /// Backend id.
        backend: String,
    },
    /// Change the weight of a backend.
    Weight {
        /// Pool or listener.
        pool: String,
        /// Backend id.
        backend: String,
        /// 0 to 1000.
        weight: u32,
    },
    /// Add a backend to a static pool.
    Add {
        /// Pool or listener.
        pool: String,
        /// The new backend.
        backend: Listed,
    },
    /// Drain a backend of a static pool, then remove it.
    Remove {
        /// Pool or listener.
        pool: String,
        /// Backend id.
        backend: String,
    },
    /// End the connections of a pool whose keys lead to other healthy backends.
    Rebalance {
        /// Pool or listener.
        pool: String,
        /// Time in which they end; `None`: the pool's `on_move`, or five minutes.
        over: Option<Duration>,
    },
    /// Change the number of replicas of a supervised pool.
    Scale {
        /// Pool or listener.
        pool: String,
        /// 1 to 1000.
        replicas: u32,
    },
    /// Replace the replicas of a supervised pool.
    Rollout {
        /// Pool or listener.
        pool: String,
        /// Only those that are not from this image, which new replicas are started from; `None`: all, from the same image.
        image: Option<String>,
    },
    /// End a rollout as if it had failed.
    AbortRollout {
        /// Pool or listener.
        pool: String,
    },
    /// Apply another config.
    Reload {
        /// The config as YAML; `None`: Ringway reads the file that it was started with.
        text: Option<String>,
        /// Report what would change, and change nothing.
        is_dry_run: bool,
        /// Drop the run-time changes. Otherwise those stay whose settings the config has not changed.
        is_reset: bool,
        /// The most keys of a pool that may move, in percent; `None`: all.
        max_keys_moved: Option<u8>,
    },
    /// Change what Ringway logs.
    Log {
        /// A level like `debug`, or a filter like `info,ringway::proxy=debug`; `None`: as at the start.
        filter: Option<String>,
        /// How long, then as at the start; `None`: until Ringway ends.
        lasts: Option<Duration>,
    },
    /// Open the file of the access log again, after a rotation has renamed it.
    Reopen,
    /// Hand over to a new process, started from the binary that is on disk now.
    Upgrade,
}

impl Command {
    /// The name of the command, as on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Drain { .. } => "drain",
            Self::Undrain { .. } => "undrain",
            Self::Weight { .. } => "weight",
            Self::Rebalance { .. } => "rebalance",
            Self::Add { .. } => "add",
            Self::Remove { .. } => "remove",
            Self::Scale { .. } => "scale",
            Self::Rollout { .. } | Self::AbortRollout { .. } => "rollout",
            Self::Reload { is_dry_run: true, .. } => "check",
            Self::Reload { .. } => "reload",
            Self::Log { .. } => "log",
            Self::Reopen => "reopen",
            Self::Upgrade => "upgrade",
        }
    }

    /// The pool or listener that the command names.
    pub fn pool(&self) -> Option<&str> {
        match self {
            Self::Drain { pool, .. }
            | Self::Undrain { pool, .. }
            | Self::Weight { pool, .. }
            | Self::Rebalance { pool, .. }
            | Self::Add { pool, .. }
            | Self::Remove { pool, .. }
            | Self::Scale { pool, .. }
            | Self::Rollout { pool, .. }
            | Self::AbortRollout { pool } => Some(pool),
            Self::Reload { .. } | Self::Log { .. } | Self::Reopen | Self::Upgrade => None,
        }
    }

    /// The backend that the command names.
    pub fn backend(&self) -> Option<&str> {
        match self {
            Self::Drain { backend, .. }
            | Self::Undrain { backend, .. }
            | Self::Weight { backend, .. }
            | Self::Remove { backend, .. } => Some(backend),
            Self::Add { backend, .. } => Some(&backend.id),
            Self::Rebalance { .. }
            | Self::Scale { .. }
            | Self::Rollout { .. }
            | Self::AbortRollout { .. }
            | Self::Reload { .. }
            | Self::Log { .. }
            | Self::Reopen
            | Self::Upgrade => None,
        }
    }
}

impl fmt::Display for Command {
    /// As on the command line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Drain { pool, backend, .. } => write!(f, "drain {pool}/{backend}"),
            Self::Undrain { pool, backend } => write!(f, "undrain {pool}/{backend}"),
            Self::Weight { pool, backend, weight } => write!(f, "weight {pool}/{backend} {weight}"),
            Self::Rebalance { pool, over: Some(over) } => {
                write!(f, "rebalance {pool} --over {}", humantime::format_duration(*over))
            }
            Self::Rebalance { pool, over: None } => write!(f, "rebalance {pool}"),
            Self::Add { pool, backend } => write!(f, "add {pool}/{} {}", backend.id, backend.location),
            Self::Remove { pool, backend } => write!(f, "remove {pool}/{backend}"),
            Self::Scale { pool, replicas } => write!(f, "scale {pool} {replicas}"),
            Self::Rollout { pool, image: Some(image) } => write!(f, "rollout {pool} --image {image}"),
            Self::Rollout { pool, image: None } => write!(f, "rollout {pool}"),
            Self::AbortRollout { pool } => write!(f, "rollout {pool} --abort"),
            Self::Reload { is_dry_run: true, .. } => f.write_str("check"),
            Self::Reload { is_reset: true, .. } => f.write_str("reload --reset"),
            Self::Reload { .. } => f.write_str("reload"),
            Self::Log { filter: Some(filter), .. } => write!(f, "log {filter}"),
            Self::Log { filter: None, .. } => f.write_str("log --reset"),
            Self::Reopen => f.write_str("log --reopen"),
            Self::Upgrade => f.write_str("upgrade"),
        }
    }
}

/// What a command has changed, or would change.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// In words, each with its key path.
    pub changes: Vec<String>,
    /// For each pool whose ring changes, the share of keys that move to another backend.
    pub moved: Vec<Moved>,
    /// Key paths of settings that differ and require a restart.
    pub needs_restart: Vec<String>,
    /// Run-time changes that a reload leaves as they are, in words.
    #[serde(default)]
    pub kept: Vec<String>,
}

/// The share of a pool's keys that move to another backend.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Moved {
    /// The pool.
    pub pool: String,
    /// From 0 to 1.
    pub share: f64,
}

/// Who sent a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller {
    /// A process on this host, with a signal.
    Signal,
    /// A client of the side port.
    SidePort(SocketAddr),
    /// The watch of the config.
    ConfigWatch,
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signal => f.write_str("a signal"),
            Self::ConfigWatch => f.write_str("the watch of the config"),
            Self::SidePort(address) => write!(f, "{address}"),
        }
    }
}

/// A command that waits for its turn.
#[derive(Debug)]
pub struct PendingCommand {
    /// What to do.
    pub command: Command,
    /// Who asked for it.
    pub caller: Caller,
    /// Report what the command would change, and change nothing.
    pub is_dry_run: bool,
    /// Where the outcome goes.
    pub outcome: oneshot::Sender<Result<Report, CommandError>>,
}

/// Sends commands to the app. Cheap to clone.
#[derive(Debug, Clone)]
pub struct CommandSender(mpsc::Sender<PendingCommand>);

impl CommandSender {
    /// A sender, and the queue that the app reads.
    pub fn new() -> (Self, mpsc::Receiver<PendingCommand>) {
        let (sender, queue) = mpsc::channel(QUEUE);
        (Self(sender), queue)
    }

    /// Sends a command and waits until the app has run it.
    ///
    /// # Errors
    /// When the app rejects it.
    pub async fn send(&self, command: Command, caller: Caller) -> Result<Report, CommandError> {
        self.pass(command, caller, false).await
    }

    /// What a command would change. Changes nothing.
    ///
    /// # Errors
    /// When the app would reject it.
    pub async fn dry_run(&self, command: Command, caller: Caller) -> Result<Report, CommandError> {
        self.pass(command, caller, true).await
    }

    async fn pass(&self, command: Command, caller: Caller, is_dry_run: bool) -> Result<Report, CommandError> {
        let (sender, outcome) = oneshot::channel();
        let pending = PendingCommand { command, caller, is_dry_run, outcome: sender };
        self.0.send(pending).await.map_err(|_| CommandError::Stopping)?;
        outcome.await.map_err(|_| CommandError::Stopping)?
    }
}

impl Differs {
    /// The change in a few words, like `weight of echo-1 is 3, not 1`.
    pub fn in_words(&self) -> String {
        let of = self.backend.as_ref().map(|id| format!(" of {id}")).unwrap_or_default();
        match (self.config, self.now, self.what.as_str(), &self.backend) {
            (Some(config), Some(now), what, _) => format!("{what}{of} is {now}, not {config}"),
            (None, Some(now), what, _) => format!("{what}{of} is {now}"),
            (.., "image", _) => format!("image is {}", self.image.as_deref().unwrap_or("another one")),
            (.., "drain", Some(id)) => format!("{id} is drained"),
            (.., what, Some(id)) => format!("{id} was {what}"),
            (.., what, None) => what.to_owned(),
        }
    }
}

/// One run-time change that differs from the config.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Differs {
    /// `replicas`, `image`, `weight`, `drain`, `added` or `removed`.
    pub what: String,
    /// The backend that changed; `None` for a change of the whole pool.
    pub backend: Option<Arc<str>>,
    /// The number in the config, if the config has one.
    pub config: Option<u32>,
    /// The number in use, if it is one.
    pub now: Option<u32>,
    /// The image in use, if it differs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
}
