//! Listening sockets and TCP options.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::TcpStream;

/// TCP options of both sides of a connection. `TCP_NODELAY` is always on: the relay writes what it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TcpOptions {
    /// Probes of a silent peer; `None` leaves them off.
    pub keepalive: Option<Keepalive>,
    /// How long sent data may stay unacknowledged before the connection counts as lost
    /// (`TCP_USER_TIMEOUT`); zero leaves it to the system.
    pub user_timeout: Duration,
}

/// When and how often a silent peer is probed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// Silence before the first probe; at least a second.
    pub idle: Duration,
    /// Between probes; at least a second.
    pub interval: Duration,
    /// Unanswered probes after which the peer counts as lost; 1 to 127.
    pub probes: u32,
}

impl TcpOptions {
    /// Sets all options on a socket. Accepted sockets inherit those of their listening socket.
    fn apply(&self, socket: &SockRef<'_>) -> io::Result<()> {
        self.apply_first(socket)?;
        self.probe(socket)
    }

    /// Sets what counts from the first byte on. Probes are for connections that live longer than a moment: they begin with
    /// [`Self::probe`], and short ones are spared its four calls.
    pub(crate) fn apply_first(&self, socket: &SockRef<'_>) -> io::Result<()> {
        socket.set_tcp_nodelay(true)?;
        if !self.user_timeout.is_zero() {
            socket.set_tcp_user_timeout(Some(self.user_timeout))?;
        }
        Ok(())
    }

    /// Begins to probe the peer when it is silent.
    pub(super) fn probe(&self, socket: &SockRef<'_>) -> io::Result<()> {
        if let Some(keepalive) = self.keepalive {
            let options = TcpKeepalive::new()
                .with_time(keepalive.idle)
                .with_interval(keepalive.interval)
                .with_retries(keepalive.probes);
            socket.set_tcp_keepalive(&options)?;
        }
        Ok(())
    }
}

/// How an accepted connection closes that was not handed to [`end_cleanly`] yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unserved {
    /// By RST, as where nothing listens: nobody takes it for a clean end.
    Reset,
    /// By FIN.
    End,
}

/// Binds `address` once for each of `count` workers, and to nobody else.
///
/// With `SO_REUSEPORT` a second process of the same user would bind the same address without an error and
/// take half the connections. So the first socket listens without it, which fails where anyone else
/// listens, and only then opens the port for its siblings.
///
/// # Errors
/// The system's, as from `bind` and `listen`.
pub fn listen(
    address: SocketAddr,
    count: usize,
    backlog: i32,
    options: &TcpOptions,
    unserved: Unserved,
) -> io::Result<Vec<TcpListener>> {
    let first = unbound(address, options, unserved)?;
    first.bind(&address.into())?;
    first.listen(backlog)?;
    first.set_reuse_port(true)?;
    let address = first.local_addr()?;
    let mut sockets = vec![first.into()];
    for _ in 1..count {
        let sibling = unbound(address.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?, options, unserved)?;
        sibling.set_reuse_port(true)?;
        sibling.bind(&address)?;
        sibling.listen(backlog)?;
        sockets.push(sibling.into());
    }
    Ok(sockets)
}

/// Takes listening sockets that somebody else has bound, for each of `count` workers one at least. Workers share where
/// there are fewer: siblings of their own would keep connections that are lost with them.
///
/// # Errors
/// The system's.
pub fn adopt(
    mut sockets: Vec<TcpListener>,
    count: usize,
    backlog: i32,
    options: &TcpOptions,
    unserved: Unserved,
) -> io::Result<Vec<TcpListener>> {
    for socket in &sockets {
        socket.set_nonblocking(true)?;
        let socket = SockRef::from(socket);
        reset(&socket, options)?;
        socket.set_linger((unserved == Unserved::Reset).then_some(Duration::ZERO))?;
        socket.listen(backlog)?;
    }
    let own = sockets.len().max(1);
    for n in sockets.len()..count {
        sockets.push(sockets[n % own].try_clone()?);
    }
    Ok(sockets)
}

fn unbound(address: SocketAddr, options: &TcpOptions, unserved: Unserved) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    // Connections of an earlier run may still be in TIME_WAIT.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // `[::]` and `0.0.0.0` are two listeners, as in nginx: neither takes the other's port in silence.
        socket.set_only_v6(true)?;
    }
    options.apply(&SockRef::from(&socket))?;
    if unserved == Unserved::Reset {
        // Accepted sockets inherit it, those included that the kernel completes before anyone accepts.
        socket.set_linger(Some(Duration::ZERO))?;
    }
    Ok(socket)
}

/// Gives a listening socket other options, for the connections that it accepts from now on. Probes that were on cannot be
/// told apart from the system's own settings, so they are only switched off as a whole.
///
/// # Errors
/// The system's, as from `setsockopt` and `listen`.
pub(super) fn reconfigure(socket: &tokio::net::TcpListener, options: &TcpOptions, backlog: u16) -> io::Result<()> {
    let socket = SockRef::from(socket);
    reset(&socket, options)?;
    // On a socket that listens already this changes the length of its queue.
    socket.listen(backlog.into())
}

/// Sets options on a socket that may have had others.
fn reset(socket: &SockRef<'_>, options: &TcpOptions) -> io::Result<()> {
    if options.keepalive.is_none() {
        socket.set_keepalive(false)?;
    }
    if options.user_timeout.is_zero() {
        socket.set_tcp_user_timeout(None)?;
    }
    options.apply(socket)
}

/// Makes closing the socket send what is queued and then FIN. Until then a client's socket sends RST
/// ([`Unserved::Reset`]): whatever ends a connection that nobody serves yet, a panic or the
/// runtime's end included, it never looks like a clean end.
pub(super) fn end_cleanly(stream: &TcpStream) {
    // Fails only on a socket that is already gone.
    let _ = SockRef::from(stream).set_linger(None);
}

/// Makes closing the socket send RST, and drop what is queued.
pub(super) fn reset_on_close(stream: &TcpStream) {
    // Fails only on a socket that is already gone.
    let _ = stream.set_zero_linger();
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: TcpOptions = TcpOptions {
        keepalive: Some(Keepalive { idle: Duration::from_secs(77), interval: Duration::from_secs(11), probes: 3 }),
        user_timeout: Duration::from_secs(99),
    };

    fn any_port() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 0))
    }

    #[test]
    fn siblings_share_a_port_and_strangers_are_refused() {
        let sockets = listen(any_port(), 3, 16, &OPTIONS, Unserved::Reset).unwrap();
        let address = sockets[0].local_addr().unwrap();
        assert!(sockets.iter().all(|socket| socket.local_addr().unwrap() == address));
        let error = listen(address, 1, 16, &OPTIONS, Unserved::Reset).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        drop(sockets);
        listen(address, 2, 16, &OPTIONS, Unserved::Reset).unwrap();
    }

    #[test]
    fn of_many_at_once_one_gets_the_port() {
        let address = listen(any_port(), 1, 16, &OPTIONS, Unserved::Reset).unwrap()[0].local_addr().unwrap();
        let results: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..8).map(|_| scope.spawn(|| listen(address, 2, 16, &OPTIONS, Unserved::Reset))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1, "{results:?}");
    }

    #[test]
    fn accepted_sockets_inherit_the_options() {
        let sockets = listen(any_port(), 1, 16, &OPTIONS, Unserved::Reset).unwrap();
        sockets[0].set_nonblocking(false).unwrap();
        let _client = std::net::TcpStream::connect(sockets[0].local_addr().unwrap()).unwrap();
        let (accepted, _) = sockets[0].accept().unwrap();
        let accepted = SockRef::from(&accepted);
        assert!(accepted.tcp_nodelay().unwrap() && accepted.keepalive().unwrap());
        assert_eq!(accepted.tcp_keepalive_time().unwrap(), Duration::from_secs(77));
        assert_eq!(accepted.tcp_user_timeout().unwrap(), Some(Duration::from_secs(99)));
    }
}
