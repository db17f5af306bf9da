//! Stream sockets of both families, TCP and Unix, and who is at the other end of an accepted one.
//!
//! A Unix socket has no TCP options and no reset. This module hides the difference from the stages of a connection.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use serde::{Deserialize, Serialize};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, Ready};
use tokio::net::{TcpStream, UnixStream};

use crate::proxy_header::Ends;

/// Pause before the next attempt to connect to a Unix socket whose queue is full. The kernel does not tell when it has
/// room. The pause doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// A connected stream socket.
#[derive(Debug)]
pub enum Stream {
    /// TCP.
    Tcp(TcpStream),
    /// A Unix stream socket.
    Unix(UnixStream),
}

/// A stream socket that is not registered with a runtime. It can go to another thread.
#[derive(Debug)]
pub enum IdleStream {
    /// TCP.
    Tcp(std::net::TcpStream),
    /// A Unix stream socket.
    Unix(std::os::unix::net::UnixStream),
}

/// Runs an expression on the socket of either family.
macro_rules! either {
    ($stream:expr, $socket:ident => $result:expr) => {
        match $stream {
            Self::Tcp($socket) => $result,
            Self::Unix($socket) => $result,
        }
    };
}

impl Stream {
    /// Connects to a Unix socket. While its queue is full, tries again without end: the caller sets the timeout.
    ///
    /// # Errors
    /// The system's error.
    pub async fn connect_unix(path: &Path) -> io::Result<Self> {
        let address = SockAddr::unix(path)?;
        let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
        let mut pause = FIRST_PAUSE;
        while let Err(error) = socket.connect(&address) {
            if Errno::from_io_error(&error) != Some(Errno::AGAIN) {
                return Err(error);
            }
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
        UnixStream::from_std(socket.into()).map(Self::Unix)
    }

    /// Leaves the runtime.
    ///
    /// # Errors
    /// The system's error, when it cannot remove the socket from a set.
    pub fn into_idle(self) -> io::Result<IdleStream> {
        Ok(match self {
            Self::Tcp(socket) => IdleStream::Tcp(socket.into_std()?),
            Self::Unix(socket) => IdleStream::Unix(socket.into_std()?),
        })
    }

    /// Waits until the socket reports an error. A reset or lost connection always reports one.
    ///
    /// # Errors
    /// When the runtime ends.
    pub async fn wait_for_error(&self) -> io::Result<()> {
        self.ready(Interest::ERROR).await.map(drop)
    }

    /// Whether bytes have come that nobody has read. It asks the kernel: the runtime may not know of them yet.
    pub fn has_unread(&self) -> bool {
        rustix::io::ioctl_fionread(self.as_fd()).is_ok_and(|unread| unread > 0)
    }

    /// The error that has broken the connection, if the system has reported one. It is reported only once.
    pub fn broken(&self) -> Option<io::Error> {
        // Without an error event nothing has broken. The check of the event takes no system call.
        self.try_io(Interest::ERROR, || Ok(())).ok()?;
        match self {
            // A socket without a peer may have ended cleanly on both sides while it still holds unread bytes.
            Self::Tcp(socket) => socket.peer_addr().is_err().then(|| socket.take_error().ok().flatten()).flatten(),
            // The bytes that came before the error can still be read. A read, also of none, takes the error.
            Self::Unix(socket) => {
                let read = rustix::net::recv(socket, &mut [0; 1][..], RecvFlags::PEEK | RecvFlags::DONTWAIT);
                read.err().filter(|&error| error != Errno::AGAIN).map(Into::into)
            }
        }
    }

    /// Whether a socket with an error has lost its connection. A TCP socket with a peer is alive: its error is temporary,
    /// and TCP recovers. A Unix socket's error is final.
    pub fn is_cut_off(&self) -> bool {
        match self {
            Self::Tcp(socket) => socket.peer_addr().is_err(),
            Self::Unix(_) => true,
        }
    }

    /// The address to which the peer connected; `None` for a Unix socket.
    pub fn local_ip(&self) -> Option<SocketAddr> {
        if let Self::Tcp(socket) = self { socket.local_addr().ok() } else { None }
    }

    /// Both addresses of the connection; `None` for a Unix socket.
    pub fn ends(&self) -> Option<Ends> {
        let Self::Tcp(socket) = self else { return None };
        Some(Ends { source: socket.local_addr().ok()?, destination: socket.peer_addr().ok()? })
    }

    /// Polls until the socket may have room for bytes.
    ///
    /// # Errors
    /// When the runtime ends.
    pub fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, socket => socket.poll_write_ready(cx))
    }

    /// Polls until the socket may have bytes.
    ///
    /// # Errors
    /// When the runtime ends.
    pub fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, socket => socket.poll_read_ready(cx))
    }

    /// Runs an operation if the socket is ready for it. `WouldBlock` clears the readiness.
    ///
    /// # Errors
    /// The operation's error.
    pub fn try_io<R>(&self, interest: Interest, operation: impl FnOnce() -> io::Result<R>) -> io::Result<R> {
        either!(self, socket => socket.try_io(interest, operation))
    }

    /// Waits until the socket is ready.
    ///
    /// # Errors
    /// When the runtime ends.
    pub async fn ready(&self, interest: Interest) -> io::Result<Ready> {
        either!(self, socket => socket.ready(interest).await)
    }

    /// Sends a few bytes on a new connection, before the runtime knows that it is writable.
    ///
    /// # Errors
    /// The system's error; `WriteZero` if the socket does not take all of them.
    pub fn send_first(&self, bytes: &[u8]) -> io::Result<()> {
        let sent = rustix::net::send(self, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
        if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// Takes bytes from the socket that a peek has found there.
    ///
    /// # Errors
    /// The system's error; `UnexpectedEof` if there are fewer.
    pub fn take_first(&self, bytes: &mut [u8]) -> io::Result<()> {
        let (taken, _) = rustix::net::recv(self, &mut *bytes, RecvFlags::DONTWAIT)?;
        if taken == bytes.len() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// Sends small writes at once. A Unix socket always does.
    pub fn set_nodelay(&self) {
        if let Self::Tcp(socket) = self {
            // Fails only on a socket that is already closed.
            let _ = socket.set_nodelay(true);
        }
    }

    /// Makes closing the socket discard the queued bytes and send RST. A Unix socket has no reset: see [`IdleStream`].
    pub fn reset_on_close(&self) {
        if let Self::Tcp(socket) = self {
            // Fails only on a socket that is already closed.
            let _ = socket.set_zero_linger();
        }
    }
}

impl IdleStream {
    /// Makes closing the socket send RST. A Unix socket has no reset. If this side has not read all bytes,
    /// the peer gets `ECONNRESET`. Otherwise the peer sees the end of the stream.
    pub fn reset_on_close(&self) {
        if let Self::Tcp(socket) = self {
            // Fails only on a socket that is already closed.
            let _ = socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO));
        }
    }
}

impl TryFrom<OwnedFd> for IdleStream {
    type Error = io::Error;

    /// The stream socket of a descriptor. It has to be in non-blocking mode.
    fn try_from(socket: OwnedFd) -> io::Result<Self> {
        let socket = Socket::from(socket);
        Ok(if socket.domain()? == Domain::UNIX { Self::Unix(socket.into()) } else { Self::Tcp(socket.into()) })
    }
}

impl TryFrom<IdleStream> for Stream {
    type Error = io::Error;

    fn try_from(stream: IdleStream) -> io::Result<Self> {
        Ok(match stream {
            IdleStream::Tcp(socket) => Self::Tcp(TcpStream::from_std(socket)?),
            IdleStream::Unix(socket) => Self::Unix(UnixStream::from_std(socket)?),
        })
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        either!(self, socket => socket.as_fd())
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        either!(self.get_mut(), socket => Pin::new(socket).poll_read(cx, buffer))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        either!(self.get_mut(), socket => Pin::new(socket).poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        either!(self.get_mut(), socket => Pin::new(socket).poll_write_vectored(cx, bytes))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self.get_mut(), socket => Pin::new(socket).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self.get_mut(), socket => Pin::new(socket).poll_shutdown(cx))
    }
}

/// Who is at the other end of an accepted connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Client {
    /// The client's address and port.
    Ip(SocketAddr),
    /// A process on this host.
    Unix {
        /// Its user.
        user: u32,
        /// Its process id; 0 if it is in another namespace.
        pid: i32,
        /// Number of the connection in this Ringway. It separates connections as the port does for TCP.
        number: u64,
    },
}

impl Client {
    /// Who is at the other end of an accepted Unix socket.
    pub fn of_unix(socket: &UnixStream) -> Self {
        static ACCEPTED: AtomicU64 = AtomicU64::new(0);
        let number = ACCEPTED.fetch_add(1, Ordering::Relaxed);
        // The kernel keeps the peer's credentials for every connected socket (unix(7), SO_PEERCRED).
        let peer = socket.peer_cred();
        let (user, pid) = peer.map_or((u32::MAX, 0), |peer| (peer.uid(), peer.pid().unwrap_or_default()));
        Self::Unix { user, pid, number }
    }
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Unix { user, pid, .. } => write!(f, "unix:user={user},pid={pid}"),
        }
    }
}
