//! Listening sockets of both families: TCP, and Unix with a path in the file system.

use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use socket2::{Domain, SockAddr, SockRef, Socket, Type};

use super::socket::{self, Binding, TcpOptions};
use crate::address::Address;

/// A listening socket that no worker has yet, or a duplicate of one.
#[derive(Debug)]
pub enum ListeningSocket {
    /// TCP.
    Tcp(TcpListener),
    /// A Unix stream socket.
    Unix(UnixSocket),
}

/// A listening Unix socket, and its file.
#[derive(Debug)]
pub struct UnixSocket {
    pub(super) listener: UnixListener,
    path: Arc<Path>,
    /// Its file when it was opened; `None`: it had none.
    file: Option<FileId>,
}

/// Device and inode of a file. While a socket is open, no other file gets its inode.
pub type FileId = (u64, u64);

/// Settings of a listener's sockets.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// Number of sockets: one per worker, or one for each port of a range.
    pub count: usize,
    /// Length of the kernel's queue of connections that are not accepted yet.
    pub backlog: u16,
    /// Options of TCP sockets.
    pub tcp: &'a TcpOptions,
    /// How TCP sockets are bound.
    pub binding: Binding<'a>,
    /// Permissions of a Unix socket's file. A user with write permission may connect (unix(7)).
    pub mode: u32,
}

impl ListeningSocket {
    /// Takes a socket that another process has opened on this address. `file` is what [`Self::file`] says in that process;
    /// `None`: the file at the path is the socket's.
    pub fn inherit(descriptor: OwnedFd, address: &Address, file: Option<FileId>) -> Self {
        match address {
            Address::Ip(_) => Self::Tcp(descriptor.into()),
            Address::Unix(path) => {
                let file = file.or_else(|| file_at(path));
                Self::Unix(UnixSocket { listener: descriptor.into(), path: Arc::clone(path), file })
            }
        }
    }

    /// The file of a Unix socket, if it had one.
    pub fn file(&self) -> Option<FileId> {
        if let Self::Unix(socket) = self { socket.file } else { None }
    }

    /// Whether clients can find the socket: the file of a Unix socket is still there.
    pub fn is_reachable(&self) -> bool {
        match self {
            Self::Tcp(_) => true,
            Self::Unix(socket) => socket.has_file(),
        }
    }

    /// Whether clients come through this network interface only; `None`: through all. `Err`: the interface of the socket is
    /// gone, also if there is a new one of its name.
    ///
    /// # Errors
    /// The system's error.
    pub fn is_on(&self, interface: Option<&str>) -> io::Result<bool> {
        Ok(match self {
            Self::Tcp(listener) => SockRef::from(listener).device()?.as_deref() == interface.map(str::as_bytes),
            Self::Unix(_) => interface.is_none(),
        })
    }

    /// The bound address. It has the real port where the wanted one was 0.
    ///
    /// # Errors
    /// The system's error.
    pub fn address(&self) -> io::Result<Address> {
        Ok(match self {
            Self::Tcp(listener) => Address::Ip(listener.local_addr()?),
            Self::Unix(socket) => Address::Unix(Arc::clone(&socket.path)),
        })
    }

    /// Duplicates the socket.
    ///
    /// # Errors
    /// When the process has no free descriptor.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(listener) => Self::Tcp(listener.try_clone()?),
            Self::Unix(socket) => Self::Unix(UnixSocket {
                listener: socket.listener.try_clone()?,
                path: Arc::clone(&socket.path),
                file: socket.file,
            }),
        })
    }

    /// Hides a socket that is about to close from new clients: see [`socket::turn_away`]. Ringway can still accept the
    /// connections in its queue. A Unix socket loses its file.
    ///
    /// # Errors
    /// The system's error.
    pub fn turn_away(&self) -> io::Result<()> {
        match self {
            Self::Tcp(listener) => socket::turn_away(listener),
            Self::Unix(socket) => socket.remove_file(),
        }
    }

    /// Ends the effect of [`Self::turn_away`] on a TCP socket, if there was one.
    ///
    /// # Errors
    /// The system's error.
    pub fn take_back(&self) -> io::Result<()> {
        match self {
            Self::Tcp(listener) => socket::take_back(&SockRef::from(listener)),
            Self::Unix(_) => Ok(()),
        }
    }

    /// Sets the permissions of a Unix socket's file, unless another file has replaced it.
    ///
    /// # Errors
    /// The system's error.
    pub fn set_mode(&self, mode: u32) -> io::Result<()> {
        match self {
            Self::Unix(socket) if socket.has_file() => {
                std::fs::set_permissions(&socket.path, PermissionsExt::from_mode(mode))
            }
            _ => Ok(()),
        }
    }
}

impl AsFd for ListeningSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(socket) => socket.listener.as_fd(),
        }
    }
}

impl UnixSocket {
    /// Whether the file at the path is the socket's.
    fn has_file(&self) -> bool {
        self.file.is_some() && file_at(&self.path) == self.file
    }

    fn remove_file(&self) -> io::Result<()> {
        if self.has_file() { std::fs::remove_file(&self.path) } else { Ok(()) }
    }
}

fn file_at(path: &Path) -> Option<FileId> {
    std::fs::symlink_metadata(path).ok().map(|file| (file.dev(), file.ino()))
}

/// Opens the sockets of an address, one per worker. Several workers share one Unix socket.
///
/// # Errors
/// The system's error from `bind` or `listen`; `AddrInUse` if another process listens there.
pub fn listen(address: &Address, wanted: &Wanted<'_>) -> io::Result<Vec<ListeningSocket>> {
    match address {
        Address::Ip(ip) => {
            let sockets = socket::listen(*ip, wanted.count, wanted.backlog.into(), wanted.tcp, wanted.binding)?;
            Ok(sockets.into_iter().map(ListeningSocket::Tcp).collect())
        }
        Address::Unix(path) => {
            let listener = listen_on_path(path, wanted.backlog, wanted.mode)?;
            let socket = ListeningSocket::inherit(listener.into(), address, None);
            let spare = socket.try_clone();
            share(vec![socket], wanted.count).inspect_err(|_no_descriptor| {
                // Nobody would remove the file later.
                let _ = spare.and_then(|socket| socket.turn_away());
            })
        }
    }
}

/// Adopts listening sockets that another process has opened, and returns at least one per worker. If there are fewer
/// sockets than workers, workers share them. A new sibling would get its own queue, and the connections in it would be
/// lost when the sibling closes.
///
/// # Errors
/// The system's error from a socket call.
pub fn adopt(mut sockets: Vec<ListeningSocket>, wanted: &Wanted<'_>) -> io::Result<Vec<ListeningSocket>> {
    if let Some(ListeningSocket::Unix(_)) = sockets.first() {
        // The others are duplicates of it.
        sockets.truncate(1);
    }
    for socket in &sockets {
        match socket {
            ListeningSocket::Tcp(listener) => socket::prepare(listener, wanted.backlog.into(), wanted.tcp)?,
            ListeningSocket::Unix(unix) => {
                unix.listener.set_nonblocking(true)?;
                SockRef::from(&unix.listener).listen(wanted.backlog.into())?;
            }
        }
    }
    share(sockets, wanted.count)
}

/// Duplicates sockets until there are `count`.
///
/// # Errors
/// When the process has no free descriptor.
pub fn share(mut sockets: Vec<ListeningSocket>, count: usize) -> io::Result<Vec<ListeningSocket>> {
    let own = sockets.len().max(1);
    for n in sockets.len()..count {
        sockets.push(sockets[n % own].try_clone()?);
    }
    Ok(sockets)
}

/// Binds a path. Replaces a stale socket file, which a killed process left behind. Does not replace the file of a socket
/// that listens, or a file that is not a socket.
fn listen_on_path(path: &Path, backlog: u16, mode: u32) -> io::Result<UnixListener> {
    // Otherwise two Ringways could find the same stale file, and one would remove the other's new one.
    let _lock = lock_directory_of(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    let address = SockAddr::unix(path)?;
    if let Err(error) = socket.bind(&address) {
        if error.kind() != io::ErrorKind::AddrInUse || !is_stale(path)? {
            return Err(error);
        }
        std::fs::remove_file(path)?;
        tracing::info!(path = %path.display(), "removed a stale socket file");
        socket.bind(&address)?;
    }
    // Nobody can connect before the socket listens, so the permissions apply to everybody.
    let listens = std::fs::set_permissions(path, PermissionsExt::from_mode(mode));
    if let Err(error) = listens.and_then(|()| socket.listen(backlog.into())) {
        std::fs::remove_file(path)?;
        return Err(error);
    }
    Ok(socket.into())
}

/// Locks the directory of a path among Ringways, until the result is dropped.
fn lock_directory_of(path: &Path) -> io::Result<File> {
    const TRIES: u32 = 100;
    let directory = File::open(path.parent().ok_or(io::ErrorKind::NotFound)?)?;
    for _ in 0..TRIES {
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => std::thread::sleep(Duration::from_millis(5)),
            other => return Ok(other.map(|()| directory)?),
        }
    }
    Err(io::Error::new(io::ErrorKind::ResourceBusy, "another process holds a lock on the directory"))
}

/// Whether the path is a stale socket file: a socket on which no process listens.
fn is_stale(path: &Path) -> io::Result<bool> {
    if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
        return Ok(false);
    }
    // Does not wait for room in the queue of a socket that listens.
    let probe = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
    Ok(probe.connect(&SockAddr::unix(path)?).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused))
}

#[cfg(test)]
mod tests;
