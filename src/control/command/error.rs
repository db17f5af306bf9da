//! Why Ringway rejected a command.

use std::ops::RangeInclusive;

/// Why Ringway rejected a command. Nothing has changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// No pool has this name.
    #[error("pool {pool:?} does not exist; existing pools: {}", known.join(", "))]
    UnknownPool {
        /// As given.
        pool: String,
        /// The pools that there are.
        known: Vec<String>,
    },
    /// The pool has no backend with this id.
    #[error("pool {pool} has no backend {backend:?}; it has: {}", known.join(", "))]
    UnknownBackend {
        /// The pool.
        pool: String,
        /// As given.
        backend: String,
        /// The backends that there are.
        known: Vec<String>,
    },
    /// The static pool has a backend with this id already.
    #[error("pool {pool} already has a backend {backend:?}")]
    BackendExists {
        /// The pool.
        pool: String,
        /// The id.
        backend: String,
    },
    /// A reload would move too many keys.
    #[error(
        "{moved} % of the keys of pool {pool} would move, and config_watch.max_keys_moved is {most} %: check the change with `ringway check --diff`, and apply it with `ringway reload`"
    )]
    TooManyKeys {
        /// The pool.
        pool: String,
        /// The keys that would move, in percent.
        moved: u8,
        /// The most keys that may move, in percent.
        most: u8,
    },
    /// The agent of the backend drains it.
    #[error("{pool}/{backend} is drained by its agent, which says {said:?}: let the agent say `ready`")]
    DrainedByAgent {
        /// The pool.
        pool: String,
        /// The id.
        backend: String,
        /// What the agent says.
        said: String,
    },
    /// The config or the file of the pool drains the backend.
    #[error("{pool}/{backend} is drained by its entry in the list of backends: remove `state: drained` there")]
    DrainedByList {
        /// The pool.
        pool: String,
        /// The id.
        backend: String,
    },
    /// Only static pools take or give up single backends.
    #[error("pool {0} is not static: its provider decides which backends it has")]
    NotStatic(String),
    /// Only supervised pools have a number of replicas.
    #[error("pool {0} has no replicas: Ringway does not start its backends")]
    NotSupervised(String),
    /// The pool's connections decide.
    #[error("pool {0} scales by itself: change min and max of its `replicas` in the config, and reload")]
    ScalesItself(String),
    /// Only containers have an image.
    #[error("the replicas of pool {0} are processes, which have no image: omit it to replace all of them")]
    NoImage(String),
    /// No image has such a name.
    #[error("{0:?} is not an image name: write it like nginx:1.27")]
    BadImage(String),
    /// The supervisor of the pool waits for something.
    #[error(
        "the supervisor of pool {0} has not taken the order: it may wait for its Docker engine. See `ringway status`, and try again"
    )]
    NotTaken(String),
    /// Only a rollout that goes on can be aborted.
    #[error("no rollout of pool {0} is under way")]
    NoRollout(String),
    /// All backends of a pool of discovered containers have the same weight.
    #[error("cannot set a weight in pool {0}: all its containers have the same weight")]
    FixedWeight(String),
    /// Connections of the pool cannot move to the backends of their keys.
    #[error("cannot rebalance pool {pool}: {why}")]
    CannotRebalance {
        /// The pool.
        pool: String,
        /// Why not.
        why: &'static str,
    },
    /// The port range of the pool is too small.
    #[error("pool {pool} has too few ports ({first}-{last}) for {replicas} replicas: widen process.ports")]
    TooFewPorts {
        /// The pool.
        pool: String,
        /// First port of the range.
        first: u16,
        /// Last port of the range.
        last: u16,
        /// As given.
        replicas: u32,
    },
    /// A number is out of range.
    #[error("{number} is not a valid {what}: use {} to {}", range.start(), range.end())]
    OutOfRange {
        /// What the number is.
        what: &'static str,
        /// As given.
        number: u32,
        /// What is allowed.
        range: RangeInclusive<u32>,
    },
    /// The log takes no such filter; the text says why.
    #[error("{0}")]
    BadFilter(String),
    /// The config has faults; the text names them all.
    #[error("{0}")]
    BadConfig(String),
    /// Something that the change needs is missing; the text names it with its key path.
    #[error("{0}")]
    CannotPrepare(String),
    /// No successor took over; the text says why.
    #[error("{0}")]
    UpgradeFailed(String),
    /// Ringway stops.
    #[error("Ringway is stopping")]
    Stopping,
}

/// Whose fault a [`CommandError`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The command names something that does not exist.
    NotFound,
    /// The command does not fit the current state.
    Conflict,
    /// The command is malformed.
    Invalid,
}

impl CommandError {
    /// Whose fault it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::UnknownPool { .. } | Self::UnknownBackend { .. } => ErrorKind::NotFound,
            Self::OutOfRange { .. } | Self::BadConfig(_) | Self::BadFilter(_) | Self::BadImage(_) => ErrorKind::Invalid,
            Self::BackendExists { .. }
            | Self::DrainedByList { .. }
            | Self::DrainedByAgent { .. }
            | Self::TooManyKeys { .. }
            | Self::NotStatic(_)
            | Self::NotSupervised(_)
            | Self::ScalesItself(_)
            | Self::NoImage(_)
            | Self::NoRollout(_)
            | Self::NotTaken(_)
            | Self::FixedWeight(_)
            | Self::CannotRebalance { .. }
            | Self::TooFewPorts { .. }
            | Self::CannotPrepare(_)
            | Self::UpgradeFailed(_)
            | Self::Stopping => ErrorKind::Conflict,
        }
    }
}
