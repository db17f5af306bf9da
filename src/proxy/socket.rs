//! Listening sockets and TCP options.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use rustix::io::Errno;
use socket2::{SockFilter, SockRef, Socket, TcpKeepalive};

use crate::outgoing;

/// TCP options of both sides of a connection. `TCP_NODELAY` is on from the second write at the latest, because the relay
/// writes all bytes at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TcpOptions {
    /// TCP keepalive; `None` leaves it off.
    pub keepalive: Option<Keepalive>,
    /// How long sent data may stay unacknowledged before the connection counts as lost (`TCP_USER_TIMEOUT`); zero keeps
    /// the system's default.
    pub user_timeout: Duration,
}

/// TCP keepalive: when and how often the kernel probes a silent peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// Silence before the first keepalive packet; at least 1 s.
    pub idle: Duration,
    /// Time between keepalive packets; at least 1 s.
    pub interval: Duration,
    /// Unanswered keepalive packets after which the peer counts as lost; 1 to 127.
    pub probes: u32,
}

impl TcpOptions {
    /// Sets all options on a socket. Accepted sockets inherit those of their listening socket.
    fn apply(&self, socket: &SockRef<'_>) -> io::Result<()> {
        socket.set_tcp_nodelay(true)?;
        self.apply_first(socket)?;
        self.enable_keepalive(socket)
    }

    /// Sets the options that apply from the first byte. Keepalive matters only for longer connections:
    /// [`Self::enable_keepalive`] turns it on later, and short connections save its four system calls. The relay sets
    /// `TCP_NODELAY` before its second write.
    pub(crate) fn apply_first(&self, socket: &SockRef<'_>) -> io::Result<()> {
        if !self.user_timeout.is_zero() {
            socket.set_tcp_user_timeout(Some(self.user_timeout))?;
        }
        Ok(())
    }

    /// Turns keepalive on.
    pub(super) fn enable_keepalive(&self, socket: &SockRef<'_>) -> io::Result<()> {
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

/// How a listening socket is bound to its address.
#[derive(Debug, Clone, Copy, Default)]
pub struct Binding<'a> {
    /// The address may overlap with that of other sockets of this process: a listener moves from 127.0.0.1 to 0.0.0.0, or
    /// back. The kernel gives new connections to the socket with the more specific address while both listen. False: an
    /// overlap is an error.
    pub beside_own: bool,
    /// The network interface through which clients come (`SO_BINDTODEVICE`); `None`: all.
    pub interface: Option<&'a str>,
    /// The machine need not have the address yet (`IP_FREEBIND`).
    pub freebind: bool,
}

/// Whether two addresses overlap, so that one of them cannot be bound after the other.
pub fn overlap(one: SocketAddr, other: SocketAddr) -> bool {
    let is_any = one.ip().is_unspecified() || other.ip().is_unspecified();
    let is_same_ip = one.ip() == other.ip() || is_any && one.is_ipv4() == other.is_ipv4();
    one.port() != 0 && one.port() == other.port() && is_same_ip
}

/// Binds `address` once per worker (`count` sockets), and keeps other processes from binding it.
///
/// With `SO_REUSEPORT`, a second process of the same user could bind the same address without an error and take half
/// of the connections. So the first socket listens without the option, which fails if another socket listens there.
/// Only then does it allow its siblings to share the port.
///
/// # Errors
/// The system's error from `bind` or `listen`, or [`Refused`](crate::outgoing::Refused).
pub fn listen(
    address: SocketAddr,
    count: usize,
    backlog: i32,
    options: &TcpOptions,
    binding: Binding<'_>,
) -> io::Result<Vec<TcpListener>> {
    let first = unbound(address, options, binding)?;
    if binding.beside_own {
        first.set_reuse_port(true)?;
    }
    first.bind(&address.into())?;
    first.listen(backlog)?;
    first.set_reuse_port(true)?;
    let address = first.local_addr()?;
    let mut sockets = vec![first.into()];
    for _ in 1..count {
        let sibling = unbound(address.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?, options, binding)?;
        sibling.set_reuse_port(true)?;
        sibling.bind(&address)?;
        sibling.listen(backlog)?;
        sockets.push(sibling.into());
    }
    Ok(sockets)
}

/// Prepares a listening socket that another process has opened.
///
/// # Errors
/// The system's error from a socket call.
pub fn prepare(socket: &TcpListener, backlog: i32, options: &TcpOptions) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    let socket = SockRef::from(socket);
    reset(&socket, options)?;
    // An older Ringway has set it.
    socket.set_linger(None)?;
    take_back(&socket)?;
    socket.listen(backlog)
}

/// Makes a listening socket ignore new clients, while the connections that wait on it can still be accepted. A client tries
/// again after a second, and reaches the socket that then listens on the address. Without this, a client that connects
/// between the last accept and the close is reset. A handshake that is half done at the close is still reset.
///
/// # Errors
/// The system's error from `setsockopt`.
pub fn turn_away(socket: &TcpListener) -> io::Result<()> {
    // Classic BPF (socket(7), SO_ATTACH_FILTER). The filter of a TCP socket sees a segment from its TCP header on.
    const LOAD_BYTE: u16 = 0x30;
    const JUMP_IF_SET: u16 = 0x45;
    const RETURN: u16 = 0x06;
    const FLAGS: u32 = 13;
    const SYN: u32 = 0x02;
    SockRef::from(socket).attach_filter(&[
        SockFilter::new(LOAD_BYTE, 0, 0, FLAGS),
        SockFilter::new(JUMP_IF_SET, 0, 1, SYN),
        SockFilter::new(RETURN, 0, 0, 0),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
    ])
}

/// Ends the effect of [`turn_away`], if it was called for the socket.
///
/// # Errors
/// The system's error from `setsockopt`.
pub fn take_back(socket: &SockRef<'_>) -> io::Result<()> {
    match socket.detach_filter() {
        // A socket of MPTCP has no filters.
        Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::NOENT | Errno::OPNOTSUPP)) => Ok(()),
        other => other,
    }
}

/// Opens a socket for this address that is not bound yet.
///
/// # Errors
/// The system's error, or [`Refused`](crate::outgoing::Refused).
pub fn unbound(address: SocketAddr, options: &TcpOptions, binding: Binding<'_>) -> io::Result<Socket> {
    let socket = outgoing::socket(address)?;
    if let Some(interface) = binding.interface {
        outgoing::use_interface(&SockRef::from(&socket), interface)?;
    }
    match address {
        _ if !binding.freebind => {}
        SocketAddr::V4(_) => socket.set_freebind_v4(true)?,
        SocketAddr::V6(_) => socket.set_freebind_v6(true)?,
    }
    // Connections of a previous run may still be in TIME_WAIT.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // `[::]` and `0.0.0.0` are two separate listeners, as in nginx. Neither silently takes the other's port.
        socket.set_only_v6(true)?;
    }
    options.apply(&SockRef::from(&socket))?;
    Ok(socket)
}

/// Changes the options of a listening socket for connections accepted from now on. Ringway cannot tell keepalive values
/// that it set earlier from the system's own, so it only turns keepalive off as a whole.
///
/// # Errors
/// The system's error from `setsockopt` or `listen`.
pub(super) fn reconfigure(socket: &tokio::net::TcpListener, options: &TcpOptions, backlog: u16) -> io::Result<()> {
    let socket = SockRef::from(socket);
    reset(&socket, options)?;
    // On a socket that already listens, this changes the length of its queue.
    socket.listen(backlog.into())
}

/// Sets options on a listening socket that may already have other options. A socket of MPTCP, which systemd can open, has no
/// `TCP_USER_TIMEOUT`.
fn reset(socket: &SockRef<'_>, options: &TcpOptions) -> io::Result<()> {
    if options.keepalive.is_none() {
        socket.set_keepalive(false)?;
    }
    match socket.set_tcp_user_timeout(Some(options.user_timeout).filter(|timeout| !timeout.is_zero())) {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::NOPROTOOPT) => {}
        other => other?,
    }
    socket.set_tcp_nodelay(true)?;
    options.enable_keepalive(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: TcpOptions = TcpOptions {
        keepalive: Some(Keepalive { idle: Duration::from_secs(77), interval: Duration::from_secs(11), probes: 3 }),
        user_timeout: Duration::from_secs(99),
    };

    const BESIDE_OWN: Binding<'_> = Binding { beside_own: true, interface: None, freebind: false };

    fn any_port() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 0))
    }

    #[test]
    fn workers_share_a_port_and_other_sockets_cannot_bind_it() {
        let sockets = listen(any_port(), 3, 16, &OPTIONS, Binding::default()).unwrap();
        let address = sockets[0].local_addr().unwrap();
        assert!(sockets.iter().all(|socket| socket.local_addr().unwrap() == address));
        let error = listen(address, 1, 16, &OPTIONS, Binding::default()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        drop(sockets);
        listen(address, 2, 16, &OPTIONS, Binding::default()).unwrap();
    }

    #[test]
    fn only_one_of_several_concurrent_binds_succeeds() {
        let address = listen(any_port(), 1, 16, &OPTIONS, Binding::default()).unwrap()[0].local_addr().unwrap();
        let results: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..8).map(|_| scope.spawn(|| listen(address, 2, 16, &OPTIONS, Binding::default()))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1, "{results:?}");
    }

    #[test]
    fn accepted_sockets_inherit_the_options() {
        let sockets = listen(any_port(), 1, 16, &OPTIONS, Binding::default()).unwrap();
        sockets[0].set_nonblocking(false).unwrap();
        let _client = std::net::TcpStream::connect(sockets[0].local_addr().unwrap()).unwrap();
        let (accepted, _) = sockets[0].accept().unwrap();
        let accepted = SockRef::from(&accepted);
        assert!(accepted.tcp_nodelay().unwrap() && accepted.keepalive().unwrap());
        assert_eq!(accepted.tcp_keepalive_time().unwrap(), Duration::from_secs(77));
        assert_eq!(accepted.tcp_user_timeout().unwrap(), Some(Duration::from_secs(99)));
    }

    #[test]
    fn a_socket_that_turns_clients_away_still_has_those_that_wait() {
        let sockets = listen(any_port(), 1, 16, &OPTIONS, Binding::default()).unwrap();
        let address = sockets[0].local_addr().unwrap();
        let waiting = std::net::TcpStream::connect(address).unwrap();
        turn_away(&sockets[0]).unwrap();
        let late = std::net::TcpStream::connect_timeout(&address, Duration::from_millis(200)).unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
        sockets[0].set_nonblocking(false).unwrap();
        assert_eq!(sockets[0].accept().unwrap().1, waiting.local_addr().unwrap());
        sockets[0].set_nonblocking(true).unwrap();
        assert_eq!(sockets[0].accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        // Who adopts the socket gets clients.
        prepare(&sockets[0], 16, &OPTIONS).unwrap();
        let again = std::net::TcpStream::connect(address).unwrap();
        sockets[0].set_nonblocking(false).unwrap();
        assert_eq!(sockets[0].accept().unwrap().1, again.local_addr().unwrap());
    }

    #[test]
    fn addresses_overlap_if_one_port_has_the_same_or_any_address_of_one_family() {
        let overlap = |one: &str, other: &str| overlap(one.parse().unwrap(), other.parse().unwrap());
        assert!(overlap("127.0.0.1:80", "0.0.0.0:80") && overlap("0.0.0.0:80", "127.0.0.1:80"));
        assert!(overlap("127.0.0.1:80", "127.0.0.1:80") && overlap("[::1]:80", "[::]:80"));
        assert!(!overlap("127.0.0.1:80", "127.0.0.2:80") && !overlap("127.0.0.1:80", "0.0.0.0:81"));
        assert!(!overlap("127.0.0.1:80", "[::]:80") && !overlap("127.0.0.1:0", "0.0.0.0:0"));
    }

    #[test]
    fn own_sockets_may_overlap_and_others_may_not() {
        // The system chooses a port that no other socket has on any address.
        let any = listen(SocketAddr::from(([0, 0, 0, 0], 0)), 2, 16, &OPTIONS, Binding::default()).unwrap();
        let on_any = any[0].local_addr().unwrap();
        let on_loopback = SocketAddr::from(([127, 0, 0, 1], on_any.port()));
        assert!(listen(on_loopback, 2, 16, &OPTIONS, Binding::default()).is_err());
        let loopback = listen(on_loopback, 2, 16, &OPTIONS, BESIDE_OWN).unwrap();
        drop(any);
        assert!(listen(on_any, 2, 16, &OPTIONS, Binding::default()).is_err());
        listen(on_any, 2, 16, &OPTIONS, BESIDE_OWN).unwrap();
        drop(loopback);
    }
}
