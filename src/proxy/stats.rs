//! The reasons why connections end, and the counters of listeners, pools and workers.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::label_enum;
use crate::labels::Label as _;

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
        /// Its key leads to another backend since a change of the ring, and its pool or an operator wants it to move there.
        Moved => "moved",
        /// An operator ended it (`ringway kill`).
        Operator => "operator",
        /// It goes on in the process that has taken over in an upgrade.
        HandedOver => "handed_over",
        /// Ringway answered the connection itself (`answer_status`).
        Answered => "answered",
        /// Local failure: the system had no memory for the connection.
        LocalError => "local_error",
        /// Local failure: the connection's task ended without a reason.
        Dropped => "dropped",
    }
}

impl EndReason {
    /// Whether Ringway gave up on the connection by itself. The kernel may then still deliver a stream that has ended.
    /// `Operator` is not among these reasons, because it resets both sides.
    pub fn is_by_ringway(self) -> bool {
        matches!(
            self,
            Self::IdleTimeout
                | Self::HalfClosedTimeout
                | Self::Shutdown
                | Self::DrainDeadline
                | Self::BackendDown
                | Self::MaxAge
                | Self::Moved
        )
    }
}

label_enum! {
    /// Why an accepted connection was not served. The client gets a reset.
    pub enum RefusalReason {
        /// The pool has no backend that may get connections.
        NoBackend => "no_backend",
        /// The pool slept, and no backend was healthy in time.
        WakeTimeout => "wake_timeout",
        /// The pool sleeps, and as many connections as may wait for it already do.
        TooManyWaiting => "too_many_waiting",
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
        /// The listener accepts PROXY headers, and resets all clients that may not send one. This client may not.
        ProxyUntrusted => "proxy_untrusted",
        /// The PROXY header is missing.
        ProxyHeaderMissing => "proxy_header_missing",
        /// The PROXY header is wrong.
        ProxyHeaderInvalid => "proxy_header_invalid",
        /// The PROXY header did not arrive in time.
        ProxyHeaderTimeout => "proxy_header_timeout",
        /// The client is on the listener's deny list.
        Denied => "denied",
        /// The client is not on the listener's allow list.
        NotAllowed => "not_allowed",
        /// A route needs the ClientHello, and it is wrong or ends too soon.
        HelloInvalid => "hello_invalid",
        /// A route needs the ClientHello, and it is larger than the listener allows.
        HelloTooLarge => "hello_too_large",
        /// A route needs the ClientHello, and it did not arrive in time.
        HelloTimeout => "hello_timeout",
        /// The route of the connection is `pool: reset`.
        NoRoute => "no_route",
    }
}

impl RefusalReason {
    /// Whether a list of addresses refused the client. Clients that a list refuses must not fill the log.
    pub(super) fn is_by_list(self) -> bool {
        matches!(self, Self::Denied | Self::NotAllowed | Self::ProxyUntrusted)
    }
}

label_enum! {
    /// What Ringway found where it needs a ClientHello.
    pub enum HelloResult {
        /// A ClientHello with a server name.
        Sni => "sni",
        /// A ClientHello without a server name.
        NoSni => "no_sni",
        /// Not TLS, or the end of the stream without a byte before it.
        Plain => "plain",
        /// No byte in time: in this protocol, the server may speak first.
        Silent => "silent",
        /// A wrong ClientHello, or the end of the stream within it.
        Invalid => "invalid",
        /// A ClientHello that is larger than the listener allows.
        TooLarge => "too_large",
        /// Only the beginning of a ClientHello in time.
        Timeout => "timeout",
    }
}

label_enum! {
    /// What Ringway found where a PROXY header may be.
    pub enum ProxyResult {
        /// A header of version 1 with the client's address.
        V1 => "v1",
        /// A header of version 2 with the client's address.
        V2 => "v2",
        /// A header without the client's address: a health check, or an unknown client.
        Local => "local",
        /// No header, and none is required.
        Plain => "plain",
        /// The end of the stream, without a byte before it.
        Probe => "probe",
        /// No header, although one is required.
        Missing => "missing",
        /// A wrong header.
        Invalid => "invalid",
        /// No complete header in time, although one is required.
        Timeout => "timeout",
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

/// Counters of one listener. Each worker counts in a share of its own, and readers add the shares up.
#[derive(Debug)]
pub struct ListenerStats {
    shares: Box<[ListenerShare]>,
}

/// One worker's share of a listener's counters. Only that worker writes it. The alignment keeps shares out of one
/// another's cache lines; processors fetch lines in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct ListenerShare {
    accepted: Counter,
    taken_over: Counter,
    ended: [Counter; EndReason::ALL.len()],
    refused: [Counter; RefusalReason::ALL.len()],
    accept_errors: [Counter; AcceptError::ALL.len()],
    proxy_headers: [Counter; ProxyResult::ALL.len()],
    hellos: [Counter; HelloResult::ALL.len()],
    ech: Counter,
}

/// A counter that one thread writes and others read.
#[derive(Debug, Default)]
struct Counter(AtomicU64);

impl Counter {
    /// Adds one. With one writer, this needs no atomic addition.
    fn add_one(&self) {
        self.0.store(self.get() + 1, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl ListenerShare {
    pub(super) fn count_accepted(&self) {
        self.accepted.add_one();
    }

    pub(super) fn count_taken_over(&self) {
        self.taken_over.add_one();
    }

    pub(super) fn count_end(&self, reason: EndReason) {
        self.ended[reason.index()].add_one();
    }

    pub(super) fn count_refusal(&self, reason: RefusalReason) {
        self.refused[reason.index()].add_one();
    }

    pub(super) fn count_header(&self, result: ProxyResult) {
        self.proxy_headers[result.index()].add_one();
    }

    pub(super) fn count_hello(&self, result: HelloResult) {
        self.hellos[result.index()].add_one();
    }

    pub(super) fn count_ech(&self) {
        self.ech.add_one();
    }

    pub(super) fn count_error(&self, error: AcceptError) {
        self.accept_errors[error.index()].add_one();
    }
}

impl ListenerStats {
    /// The counters of a listener that this number of workers serve.
    pub fn new(workers: usize) -> Self {
        Self { shares: (0..workers.max(1)).map(|_| ListenerShare::default()).collect() }
    }

    /// The share of a worker.
    pub(super) fn share(&self, worker: usize) -> &ListenerShare {
        &self.shares[worker]
    }

    /// Connections accepted so far. With those taken over, they are the active, ended and refused ones.
    pub fn accepted(&self) -> u64 {
        self.sum(|share| &share.accepted)
    }

    /// Connections that an old process has handed over in an upgrade.
    pub fn taken_over(&self) -> u64 {
        self.sum(|share| &share.taken_over)
    }

    /// Connections open now.
    pub fn active(&self) -> u64 {
        let over = self.total_ended() + RefusalReason::ALL.iter().map(|&reason| self.refused(reason)).sum::<u64>();
        // Reads `accepted` last. Otherwise a connection that begins and ends meanwhile would make the result negative.
        (self.taken_over() + self.accepted()).saturating_sub(over)
    }

    /// Connections that ended for this reason.
    pub fn ended(&self, reason: EndReason) -> u64 {
        self.sum(|share| &share.ended[reason.index()])
    }

    /// Connections that ended for any reason.
    pub fn total_ended(&self) -> u64 {
        EndReason::ALL.iter().map(|&reason| self.ended(reason)).sum()
    }

    /// Connections that were refused for this reason.
    pub fn refused(&self, reason: RefusalReason) -> u64 {
        self.sum(|share| &share.refused[reason.index()])
    }

    /// Accepts that failed with this error.
    pub fn accept_errors(&self, error: AcceptError) -> u64 {
        self.sum(|share| &share.accept_errors[error.index()])
    }

    /// Connections with this result where a PROXY header may be.
    pub fn proxy_headers(&self, result: ProxyResult) -> u64 {
        self.sum(|share| &share.proxy_headers[result.index()])
    }

    /// Connections with this result where a ClientHello was needed.
    pub fn hellos(&self, result: HelloResult) -> u64 {
        self.sum(|share| &share.hellos[result.index()])
    }

    /// ClientHellos that have the extension for an encrypted ClientHello.
    pub fn hellos_with_ech(&self) -> u64 {
        self.sum(|share| &share.ech)
    }

    fn sum<'a>(&'a self, counter: impl Fn(&'a ListenerShare) -> &'a Counter) -> u64 {
        self.shares.iter().map(|share| counter(share).get()).sum()
    }
}

/// Counters of one pool, shared by all workers.
#[derive(Debug, Default)]
pub struct PoolStats {
    /// Connections whose backend was picked in panic mode, which ignores health checks.
    pub picked_in_panic: AtomicU64,
    /// How often a backend was skipped because it had reached its connection limit.
    pub walked_past_full: AtomicU64,
    /// Connections that Ringway reset at the deadline of a backend's drain, those of backends that have left included.
    pub cut_by_drain: AtomicU64,
    /// Connects that a source address could not make, by address.
    sources_skipped: Mutex<BTreeMap<IpAddr, u64>>,
}

impl PoolStats {
    /// Connects that a source address could not make: all its ports were taken, or the machine did not have it.
    pub fn source_skipped(&self, source: IpAddr) -> u64 {
        let skipped = self.sources_skipped.lock().unwrap_or_else(PoisonError::into_inner);
        skipped.get(&source).copied().unwrap_or_default()
    }

    /// Counts a connect that a source address could not make.
    pub(super) fn skip_source(&self, source: IpAddr) {
        let mut skipped = self.sources_skipped.lock().unwrap_or_else(PoisonError::into_inner);
        *skipped.entry(source).or_default() += 1;
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_add_up_what_each_worker_counts() {
        let stats = ListenerStats::new(3);
        std::thread::scope(|scope| {
            for worker in 0..3 {
                let share = stats.share(worker);
                scope.spawn(move || {
                    for _ in 0..1000 {
                        share.count_accepted();
                        share.count_accepted();
                        share.count_end(EndReason::Finished);
                    }
                    share.count_refusal(RefusalReason::NoBackend);
                    share.count_error(AcceptError::Aborted);
                });
            }
        });
        assert_eq!((stats.accepted(), stats.active(), stats.total_ended()), (6000, 2997, 3000));
        assert_eq!((stats.ended(EndReason::Finished), stats.refused(RefusalReason::NoBackend)), (3000, 3));
        assert_eq!(stats.accept_errors(AcceptError::Aborted), 3);
    }
}
