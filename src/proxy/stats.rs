//! Why connections end, and the counters that all workers share.

use std::sync::atomic::AtomicU64;

use crate::label_enum;
use crate::labels::Tally;

label_enum! {
    /// Why a connection ended that was served.
    pub enum End {
        /// Both sides ended their streams, and everything was delivered.
        Finished => "finished",
        /// The client broke it off; the backend got a reset.
        ClientReset => "client_reset",
        /// The backend broke it off; the client got a reset.
        BackendReset => "backend_reset",
        /// The client stopped answering (keepalive or user timeout).
        ClientLost => "client_lost",
        /// The backend stopped answering (keepalive or user timeout).
        BackendLost => "backend_lost",
        /// Nothing moved for the pool's `idle` timeout.
        IdleTimeout => "idle_timeout",
        /// One side had ended, and nothing moved for the pool's `half_closed` timeout.
        HalfClosedTimeout => "half_closed_timeout",
        /// Ringway stopped and the pool's `drain` had passed.
        Shutdown => "shutdown",
        /// The backend was drained, and the drain had reached its deadline.
        DrainDeadline => "drain_deadline",
        /// The backend went down, and its pool says `on_down: reset`.
        BackendDown => "backend_down",
        /// It was as old as the pool's `max_connection_age` allows.
        MaxAge => "max_connection_age",
        /// Answered by Ringway itself (`answer_status`).
        Answered => "answered",
        /// Our fault: the system had no memory for it.
        LocalError => "local_error",
        /// Our fault: its task ended without saying why.
        Dropped => "dropped",
    }
}

impl End {
    /// Whether Ringway itself ended the connection, whatever its sides wanted.
    pub fn is_by_ringway(self) -> bool {
        matches!(
            self,
            Self::IdleTimeout
                | Self::HalfClosedTimeout
                | Self::Shutdown
                | Self::DrainDeadline
                | Self::BackendDown
                | Self::MaxAge
        )
    }
}

label_enum! {
    /// Why a connection that was accepted was not served; the client got a reset.
    pub enum Refusal {
        /// The pool has no backend that may get connections.
        NoBackend => "no_backend",
        /// Every backend that may get connections has as many as it may have.
        BackendsFull => "backends_full",
        /// Every backend that was tried failed.
        ConnectFailed => "connect_failed",
        /// Its source address has as many connections as it may have.
        SourceConnections => "source_connections",
        /// Its source address opens connections faster than it may.
        SourceRate => "source_rate",
        /// Our fault: no file descriptor for the connection to the backend.
        NoDescriptors => "no_descriptors",
    }
}

label_enum! {
    /// Why accepting failed.
    pub enum AcceptError {
        /// The process or the system is out of file descriptors.
        NoDescriptors => "no_descriptors",
        /// The system is out of memory for sockets.
        NoMemory => "no_memory",
        /// The client had gone before it was accepted.
        Aborted => "aborted",
        /// Anything else.
        Other => "other",
    }
}

/// Counters of one listener, shared by all workers. Written once or twice a connection.
#[derive(Debug, Default)]
pub struct ListenerStats {
    /// Connections accepted so far: those active, ended and refused.
    pub accepted: AtomicU64,
    /// Connections open at the moment.
    pub active: AtomicU64,
    /// Connections that ended, by reason.
    pub ended: Tally<End>,
    /// Connections that were not served, by reason.
    pub refused: Tally<Refusal>,
    /// Failed accepts, by error.
    pub accept_errors: Tally<AcceptError>,
}

/// Counters of one pool, shared by all workers.
#[derive(Debug, Default)]
pub struct PoolStats {
    /// Connections whose backend was picked in panic: whatever the checks said.
    pub picked_in_panic: AtomicU64,
    /// Times that a backend was walked past because it had as many connections as it may have.
    pub walked_past_full: AtomicU64,
}

/// Counters of one worker.
#[derive(Debug, Default)]
pub struct WorkerStats {
    /// Connections that it serves at the moment.
    pub connections: AtomicU64,
    /// Tasks of its runtime, as of its last sweep.
    pub tasks: AtomicU64,
    /// Pipes that it holds, in use or pooled.
    pub pipes: AtomicU64,
    /// Times that a stream was copied because no pipe was to be had.
    pub pipe_shortages: AtomicU64,
}
