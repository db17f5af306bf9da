//! Stage connect: to the first backend of the walk that answers. No client byte has been read by then, so a
//! connect that fails loses none.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use socket2::SockRef;
use tokio::net::{TcpSocket, TcpStream};

use super::Route;
use super::account::Refusal;
use super::socket::TcpOptions;
use crate::backend::{Backend, ConnectFailure};
use crate::labels::Label as _;

/// Pause before another try for a descriptor.
const PAUSE: Duration = Duration::from_millis(20);

/// A backend that answered.
#[derive(Debug)]
pub(super) struct Connected<'a> {
    pub(super) backend: &'a Backend,
    pub(super) address: SocketAddr,
    pub(super) stream: TcpStream,
}

/// Tries the candidates in their order, at most `connect_attempts` of them.
pub(super) async fn connect<'a>(
    candidates: impl Iterator<Item = (&'a Backend, SocketAddr)>,
    route: &Route,
    tcp: &TcpOptions,
) -> Result<Connected<'a>, Refusal> {
    let mut refusal = Refusal::NoBackend;
    for (backend, address) in candidates.take(route.connect_attempts) {
        backend.live.attempts.fetch_add(1, Ordering::Relaxed);
        let began = Instant::now();
        let failure = match tokio::time::timeout(route.connect_timeout, open(address, tcp)).await {
            Ok(Ok(stream)) => {
                route.connect_seconds.record(began.elapsed().as_secs_f64());
                return Ok(Connected { backend, address, stream });
            }
            Ok(Err(error)) => {
                let failure = classify(&error);
                tracing::debug!(backend = %backend.id, %address, failure = failure.as_str(), %error, "cannot connect");
                failure
            }
            Err(_elapsed) => {
                tracing::debug!(backend = %backend.id, %address, "connect timed out");
                ConnectFailure::Timeout
            }
        };
        backend.live.failures.count(failure);
        if failure == ConnectFailure::NoDescriptors {
            return Err(Refusal::NoDescriptors);
        }
        refusal = Refusal::ConnectFailed;
    }
    Err(refusal)
}

async fn open(address: SocketAddr, tcp: &TcpOptions) -> io::Result<TcpStream> {
    let socket = socket(address).await?;
    tcp.apply(&SockRef::from(&socket))?;
    let stream = socket.connect(address).await?;
    // A local port on which nobody listens may be picked as our own source port; then TCP connects the
    // socket to itself, and the relay would echo the client.
    if stream.local_addr()? == address {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    Ok(stream)
}

/// A socket, as soon as there is a descriptor for it; the caller's timeout bounds the wait. The client is
/// better served late than reset, and no other backend would be any better.
async fn socket(address: SocketAddr) -> io::Result<TcpSocket> {
    let mut pauses = 0;
    loop {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
        match socket {
            Err(error) if is_shortage(&error) && pauses < 50 => {
                pauses += 1;
                tokio::time::sleep(PAUSE).await;
            }
            other => return other,
        }
    }
}

fn is_shortage(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM))
}

fn classify(error: &io::Error) -> ConnectFailure {
    match Errno::from_io_error(error) {
        _ if is_shortage(error) => ConnectFailure::NoDescriptors,
        _ if error.kind() == io::ErrorKind::ConnectionRefused => ConnectFailure::Refused,
        Some(Errno::CONNRESET | Errno::CONNABORTED) => ConnectFailure::Reset,
        Some(Errno::HOSTUNREACH | Errno::NETUNREACH | Errno::HOSTDOWN | Errno::NETDOWN) => ConnectFailure::Unreachable,
        Some(Errno::TIMEDOUT) => ConnectFailure::Timeout,
        // Also when the ports towards this one address are used up: the next backend may have some.
        Some(Errno::ADDRNOTAVAIL | Errno::AGAIN) => ConnectFailure::NoPorts,
        _ => ConnectFailure::Other,
    }
}
