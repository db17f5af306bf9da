//! The reasons why connections end, and the counters that all workers share.

use std::sync::atomic::AtomicU64;

use crate::label_enum;
use crate::labels::Tally;

label_enum! {
    /// Why a served connection ended.
    pub enum EndReason {
        /// Both sides ended their streams, and all bytes were delivered.
        Finished => "finished",
        /// The client reset the connection; Ringway reset the backend's side.
        ClientReset => "client_reset",
        /// The backend reset the connection; Ringway reset the client's side.
        BackendReset => "backend_reset",
        /// The client stopped answering (keepalive or user timeout).
        ClientLost => "client_lost",
        /// The backend stopped answering (keepalive or user timeout).
        BackendLost => "backend_lost",
        /// No bytes moved for the pool's `idle` timeout.
        IdleTimeout => "idle_timeout",
        /// One side had ended its stream, and no bytes moved for the pool's `half_closed` timeout.
        HalfClosedTimeout => "half_closed_timeout",
        /// Ringway stopped, and the pool's `drain` time had passed.
        Shutdown => "shutdown",
        /// The backend was draining, and the drain reached its deadline.
        DrainDeadline => "drain_deadline",
        /// The backend went down, and its pool has `on_down: reset`.
        BackendDown => "backend_down",
        /// The connection reached the pool's `max_connection_age`.
        MaxAge => "max_connection_age",
        /// Ringway answered the connection itself (`answer_status`).
        Answered => "answered",
        /// Local failure: the system had no memory for the connection.
        LocalError => "local_error",
        /// Local failure: the connection's task ended without a reason.
        Dropped => "dropped",
    }
}

impl EndReason {
    /// Whether Ringway itself decided to end the connection.
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
    /// Why an accepted connection was not served. The client gets a reset.
    pub enum RefusalReason {
        /// The pool has no backend that may get connections.
        NoBackend => "no_backend",
        /// Every backend that may get connections has reached its connection limit.
        BackendsFull => "backends_full",
        /// Every backend that was tried failed to connect.
        ConnectFailed => "connect_failed",
        /// The source address has reached its connection limit.
        SourceConnections => "source_connections",
        /// The source address opens connections faster than its rate limit allows.
        SourceRate => "source_rate",
        /// Local failure: no file descriptor for the connection to the backend.
        NoDescriptors => "no_descriptors",
    }
}

label_enum! {
    /// Why an accept failed.
    pub enum AcceptError {
        /// The process or the system is out of file descriptors.
        NoDescriptors => "no_descriptors",
        /// The system is out of memory for sockets.
        NoMemory => "no_memory",
        /// The client closed the connection before it was accepted.
        Aborted => "aborted",
        /// Any other error.
        Other => "other",
    }
}

/// Counters of one listener, shared by all workers. Each connection updates them once or twice.
#[derive(Debug, Default)]
pub struct ListenerStats {
    /// Connections accepted so far: active, ended and refused ones.
    pub accepted: AtomicU64,
    /// Connections open now.
    pub active: AtomicU64,
    /// Connections that ended, by reason.
    pub ended: Tally<EndReason>,
    /// Refused connections, by reason.
    pub refused: Tally<RefusalReason>,
    /// Failed accepts, by error.
    pub accept_errors: Tally<AcceptError>,
}

/// Counters of one pool, shared by all workers.
#[derive(Debug, Default)]
pub struct PoolStats {
    /// Connections whose backend was picked in panic mode, which ignores health checks.
    pub picked_in_panic: AtomicU64,
    /// How often a backend was skipped because it had reached its connection limit.
    pub walked_past_full: AtomicU64,
}

/// Counters of one worker. The alignment keeps those of two workers out of one cache line: processors fetch lines of 64
/// bytes in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct WorkerStats {
    /// Connections that the worker serves now, or will serve in a moment.
    pub connections: AtomicU64,
    /// Connections shorter than an eighth of a second that ended per second, between the last two ticks of the timeout task.
    pub short_per_second: AtomicU64,
    /// Payload bytes that the worker has moved between the last two ticks of the timeout task.
    pub bytes_lately: AtomicU64,
    /// Tasks of the worker's runtime at the last tick of the timeout task.
    pub tasks: AtomicU64,
    /// Pipes that the worker has open, in use or pooled.
    pub pipes: AtomicU64,
    /// How often a stream was copied because the pipe pool was exhausted.
    pub pipe_shortages: AtomicU64,
}
