//! Stage connect: picks a backend and connects to it, until one answers. No client byte has been read yet, so a failed connect
//! loses no data.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::Route;
use super::dial::dial;
use super::pick::{Picked, pick};
use super::socket::TcpOptions;
use super::stats::RefusalReason;
use super::wake::is_asleep;
use crate::address::Address;
use crate::backend::{Backend, BackendPermit, ConnectFailure, Failing};
use crate::labels::Label as _;
use crate::stream::Stream;
use crate::table::Table;

/// A backend that Ringway tried without success.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Try {
    /// Its id.
    pub backend: Arc<str>,
    /// Its incarnation at that time.
    pub incarnation: u64,
    /// Why it was not used; `None`: it had left its pool meanwhile.
    pub failure: Option<ConnectFailure>,
}

/// What a connection to a backend is for.
#[derive(Debug, Clone, Copy)]
pub struct Want<'a> {
    /// The key that chooses the backend and the source address.
    pub key: &'a [u8],
    /// The port of the backend; `None`: that of its address.
    pub port: Option<u16>,
    /// Options of the socket.
    pub tcp: &'a TcpOptions,
}

/// An established connection to a backend.
#[derive(Debug)]
pub struct Connected {
    /// The id of the backend that answered.
    pub backend: Arc<str>,
    /// The address that answered.
    pub address: Address,
    /// The connection's permit for this backend.
    pub permit: BackendPermit,
    /// The socket to the backend.
    pub stream: Stream,
}

/// Tries one backend after the other, in the order in which the pool picks them, and makes at most `connect_attempts` attempts.
/// Counts each attempt for its backend. A full backend is skipped and does not count as an attempt.
///
/// `header` makes the bytes that Ringway sends first; empty: none. If Ringway cannot send them, the attempt fails.
///
/// An attempt can take seconds, in which backends leave and others join. So each attempt uses the current table, and a
/// connection to a backend that has left meanwhile is not used. `tries` gets each backend that was tried without
/// success, also when the caller drops the future.
///
/// # Errors
/// When no backend answers.
pub async fn connect<'a, T: AsRef<Table>>(
    route: &Route,
    mut current: impl FnMut() -> T,
    want: Want<'_>,
    header: impl Fn(&Stream) -> Cow<'a, [u8]>,
    tries: &mut Vec<Try>,
) -> Result<Connected, RefusalReason> {
    let mut refusal = None;
    for attempts in 0..route.connect_attempts {
        if let Some(wake) = route.wake.as_ref().filter(|_| is_asleep(current().as_ref())) {
            // Boxed: all other connections need no room for it.
            Box::pin(wake.wait(&route.table, &mut current)).await?;
            // One that was about to leave may be the one that stays.
            tries.retain(|tried| tried.failure.is_some());
        }
        let table = current();
        let table = table.as_ref();
        if attempts == 0 && table.is_panic() {
            route.stats.picked_in_panic.fetch_add(1, Ordering::Relaxed);
        }
        let picked = pick(route, table, want.key, tries);
        let Picked { backend, address, permit } = picked.map_err(|nobody| refusal.unwrap_or(nobody))?;
        let attempt = attempt(backend, address, route, want, &header).await;
        let now = current();
        let is_stale = now.as_ref().generation() != table.generation();
        let failure = match attempt {
            Ok(stream) if !is_stale || now.as_ref().still_takes(&backend.id, backend.incarnation) => {
                let (backend, address) = (Arc::clone(&backend.id), address.at_port(want.port));
                return Ok(Connected { backend, address, permit, stream });
            }
            Ok(_to_one_that_has_left) => None,
            Err(failure) => {
                refusal = Some(RefusalReason::ConnectFailed);
                Some(failure)
            }
        };
        tries.push(Try { backend: Arc::clone(&backend.id), incarnation: backend.incarnation, failure });
        // The process is out of descriptors, so another backend would fail too.
        if failure == Some(ConnectFailure::NoDescriptors) {
            return Err(RefusalReason::NoDescriptors);
        }
    }
    Err(refusal.unwrap_or(RefusalReason::NoBackend))
}

/// Makes one attempt, and counts and reports its outcome.
async fn attempt<'a>(
    backend: &Backend,
    address: &Address,
    route: &Route,
    want: Want<'_>,
    header: &impl Fn(&Stream) -> Cow<'a, [u8]>,
) -> Result<Stream, ConnectFailure> {
    let live = &backend.live;
    live.counters.attempts.fetch_add(1, Ordering::Relaxed);
    let began = Instant::now();
    let dialed = dial(address, route, want, &live.port_search).await;
    let sent = dialed.map_err(|error| (ConnectFailure::of(&error), error)).and_then(|stream| {
        let header = header(&stream);
        let sent = if header.is_empty() { Ok(()) } else { stream.send_first(&header) };
        sent.map(|()| stream).map_err(|error| match ConnectFailure::of(&error) {
            ours @ ConnectFailure::NoDescriptors => (ours, error),
            _ => (ConnectFailure::ProxyHeader, error),
        })
    });
    match sent {
        Ok(stream) => {
            route.connect_seconds.record(began.elapsed().as_secs_f64());
            // Store only on a change: all workers share this cache line.
            if live.failed_in_a_row.load(Ordering::Relaxed) > 0 {
                live.failed_in_a_row.store(0, Ordering::Relaxed);
            }
            Ok(stream)
        }
        Err((failure, error)) => {
            tracing::debug!(backend = %backend.id, %address, failure = failure.as_str(), %error, "cannot connect");
            live.counters.failures.count(failure);
            // That one port of several refuses says nothing about the others.
            let is_of_port = matches!(failure, ConnectFailure::Refused | ConnectFailure::Reset) && want.port.is_some();
            if !failure.is_ours() && !is_of_port {
                report(backend, route);
            }
            Err(failure)
        }
    }
}

/// Reports the backend after every `reports.after` consecutive failures.
fn report(backend: &Backend, route: &Route) {
    let in_a_row = backend.live.failed_in_a_row.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
    if let Some(reports) = route.failing.as_ref().filter(|reports| in_a_row.is_multiple_of(reports.after)) {
        let failing = Failing { backend: Arc::clone(&backend.id), incarnation: backend.incarnation };
        let _ = reports.to.try_send(failing);
    }
}
