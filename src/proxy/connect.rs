//! Stage connect: to the first backend of the walk that answers. No client byte has been read by then, so a
//! connect that fails loses none.

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
use super::stats::Refusal;
use crate::backend::{Backend, ConnectFailure, Failing, Place};
use crate::labels::Label as _;

/// Pause before another try for a descriptor, and how many there are: a second in all.
const PAUSE: Duration = Duration::from_millis(20);
const TRIES: u32 = 50;

/// A backend that answered.
#[derive(Debug)]
pub struct Connected<'a> {
    /// Which one.
    pub backend: &'a Backend,
    /// Where it answered.
    pub address: SocketAddr,
    /// The connection's place there.
    pub place: Place,
    /// The connection.
    pub stream: TcpStream,
}

/// Tries the candidates in their order, at most `connect_attempts` of them. Counts each try for its backend. One that is
/// full is walked past, which is no try.
///
/// # Errors
/// When none answers.
pub async fn connect<'a>(
    candidates: impl Iterator<Item = (&'a Backend, SocketAddr)>,
    route: &Route,
    tcp: &TcpOptions,
) -> Result<Connected<'a>, Refusal> {
    let mut refusal = Refusal::NoBackend;
    let mut left = route.connect_attempts;
    for (backend, address) in candidates {
        if left == 0 {
            break;
        }
        let Some(place) = Place::take(&backend.live, route.most_per_backend) else {
            route.stats.walked_past_full.fetch_add(1, Ordering::Relaxed);
            refusal = if refusal == Refusal::NoBackend { Refusal::BackendsFull } else { refusal };
            continue;
        };
        left -= 1;
        backend.live.attempts.fetch_add(1, Ordering::Relaxed);
        let began = Instant::now();
        let failure = match attempt(address, route.connect_timeout, tcp).await {
            Ok(stream) => {
                route.connect_seconds.record(began.elapsed().as_secs_f64());
                // Written only where it changes: the line is shared by all workers.
                if backend.live.failed_in_a_row.load(Ordering::Relaxed) > 0 {
                    backend.live.failed_in_a_row.store(0, Ordering::Relaxed);
                }
                return Ok(Connected { backend, address, place, stream });
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
            // No other backend would be any better.
            return Err(Refusal::NoDescriptors);
        }
        refusal = Refusal::ConnectFailed;
    }
    Err(refusal)
}

/// Tells of every so many failures in a row.
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
    // A local port on which nobody listens may be picked as our own source port; then TCP connects the
    // socket to itself, and the relay would echo the client.
    if stream.local_addr()? == address {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    Ok(stream)
}

/// A socket, as soon as there is a descriptor for it: a client is better served late than reset.
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
