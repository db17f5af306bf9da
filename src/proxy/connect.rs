//! Stage connect: connects to the first backend of the walk that answers. No client byte has been read yet, so a
//! failed connect loses no data.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use socket2::SockRef;
use tokio::net::{TcpSocket, TcpStream};

use super::Route;
use super::socket::TcpOptions;
use super::stats::RefusalReason;
use crate::backend::{Backend, BackendPermit, ConnectFailure, Failing};
use crate::labels::Label as _;

/// Pause between attempts to get a descriptor, and the number of attempts: one second in total.
const PAUSE: Duration = Duration::from_millis(20);
const TRIES: u32 = 50;

/// An established connection to a backend.
#[derive(Debug)]
pub struct Connected<'a> {
    /// The backend that answered.
    pub backend: &'a Backend,
    /// The address that answered.
    pub address: SocketAddr,
    /// The connection's permit for this backend.
    pub permit: BackendPermit,
    /// The socket to the backend.
    pub stream: TcpStream,
}

/// Tries the candidates in order and makes at most `connect_attempts` attempts. Counts each attempt for its backend. A
/// full backend is skipped and does not count as an attempt.
///
/// # Errors
/// When no backend answers.
pub async fn connect<'a>(
    candidates: impl Iterator<Item = (&'a Backend, SocketAddr)>,
    route: &Route,
    tcp: &TcpOptions,
) -> Result<Connected<'a>, RefusalReason> {
    let mut refusal = RefusalReason::NoBackend;
    let mut left = route.connect_attempts;
    for (backend, address) in candidates {
        if left == 0 {
            break;
        }
        let Some(permit) = BackendPermit::take(&backend.live, route.most_per_backend) else {
            route.stats.walked_past_full.fetch_add(1, Ordering::Relaxed);
            refusal = if refusal == RefusalReason::NoBackend { RefusalReason::BackendsFull } else { refusal };
            continue;
        };
        left -= 1;
        backend.live.attempts.fetch_add(1, Ordering::Relaxed);
        let began = Instant::now();
        let failure = match attempt(address, route.connect_timeout, tcp).await {
            Ok(stream) => {
                route.connect_seconds.record(began.elapsed().as_secs_f64());
                // Store only on a change: all workers share this cache line.
                if backend.live.failed_in_a_row.load(Ordering::Relaxed) > 0 {
                    backend.live.failed_in_a_row.store(0, Ordering::Relaxed);
                }
                return Ok(Connected { backend, address, permit, stream });
            }
            Err(error) => {
                let failure = ConnectFailure::of(&error);
                tracing::debug!(backend = %backend.id, %address, failure = failure.as_str(), %error, "cannot connect");
                failure
            }
        };
        backend.live.failures.count(failure);
        if !failure.is_ours() {
            report(backend, route);
        }
        if failure == ConnectFailure::NoDescriptors {
            // The process is out of descriptors, so another backend would fail too.
            return Err(RefusalReason::NoDescriptors);
        }
        refusal = RefusalReason::ConnectFailed;
    }
    Err(refusal)
}

/// Reports the backend after every `reports.after` consecutive failures.
fn report(backend: &Backend, route: &Route) {
    let in_a_row = backend.live.failed_in_a_row.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
    if let Some(reports) = route.failing.as_ref().filter(|reports| in_a_row.is_multiple_of(reports.after)) {
        let failing = Failing { backend: Arc::clone(&backend.id), incarnation: backend.incarnation };
        let _ = reports.to.try_send(failing);
    }
}

async fn attempt(address: SocketAddr, timeout: Duration, tcp: &TcpOptions) -> io::Result<TcpStream> {
    let socket = socket(address).await?;
    tcp.apply_first(&SockRef::from(&socket))?;
    let connect = tokio::time::timeout(timeout, socket.connect(address));
    let stream = connect.await.map_err(|_elapsed| io::Error::from(Errno::TIMEDOUT))??;
    // If no socket listens on a local `address`, the kernel may pick its port as the source port. TCP then connects the
    // socket to itself, and the relay would echo the client's bytes.
    if stream.local_addr()? == address {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    Ok(stream)
}

/// Opens a socket and waits for a free descriptor if needed: a delay is better for the client than a reset.
async fn socket(address: SocketAddr) -> io::Result<TcpSocket> {
    for _ in 1..TRIES {
        match new_socket(address) {
            Err(error) if ConnectFailure::of(&error) == ConnectFailure::NoDescriptors => {
                tokio::time::sleep(PAUSE).await;
            }
            other => return other,
        }
    }
    new_socket(address)
}

fn new_socket(address: SocketAddr) -> io::Result<TcpSocket> {
    if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }
}
