//! Where the server listens: a TCP address or the path of a Unix socket.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt as _;
use std::path::PathBuf;
use std::str::FromStr;

use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

/// Where the server listens. Its text is `127.0.0.1:9000` or `unix:/path`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// TCP.
    Ip(SocketAddr),
    /// The path of a Unix stream socket.
    Unix(PathBuf),
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some("") => Err("unix: needs a path, like unix:/run/echo.sock".to_owned()),
            Some(path) => Ok(Self::Unix(path.into())),
            None => text.parse().map(Self::Ip).map_err(|_| {
                "the address is neither ip:port nor unix:/path: write it like 127.0.0.1:9000 or unix:/run/echo.sock"
                    .to_owned()
            }),
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A listening socket of either family.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A Unix stream socket.
    Unix(UnixListener),
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        Self::Tcp(listener)
    }
}

impl From<UnixListener> for Listener {
    fn from(listener: UnixListener) -> Self {
        Self::Unix(listener)
    }
}

/// An accepted connection.
pub(crate) enum Accepted {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Listener {
    /// Opens a socket with a backlog for a burst of connections.
    pub(crate) fn bind(listen: &Listen) -> io::Result<Self> {
        let address = match listen {
            Listen::Ip(address) => *address,
            Listen::Unix(path) => {
                let is_stale = || {
                    let probe = std::os::unix::net::UnixStream::connect(path);
                    let is_socket = path.symlink_metadata().is_ok_and(|file| file.file_type().is_socket());
                    is_socket && probe.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
                };
                if is_stale() {
                    std::fs::remove_file(path)?;
                }
                return UnixListener::bind(path).map(Self::Unix);
            }
        };
        let socket =
            if address.is_ipv4() { tokio::net::TcpSocket::new_v4()? } else { tokio::net::TcpSocket::new_v6()? };
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(4096).map(Self::Tcp)
    }

    /// The bound address.
    pub(crate) fn address(&self) -> io::Result<Listen> {
        Ok(match self {
            Self::Tcp(listener) => Listen::Ip(listener.local_addr()?),
            Self::Unix(listener) => Listen::Unix(listener.local_addr()?.as_pathname().unwrap_or("".as_ref()).into()),
        })
    }

    pub(crate) async fn accept(&self) -> io::Result<Accepted> {
        Ok(match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                let _ = stream.set_nodelay(true);
                Accepted::Tcp(stream)
            }
            Self::Unix(listener) => Accepted::Unix(listener.accept().await?.0),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_ip_and_port_or_a_path() {
        for text in ["127.0.0.1:9000", "[::1]:1", "unix:/run/echo.sock"] {
            assert_eq!(text.parse::<Listen>().unwrap().to_string(), text);
        }
        assert!("unix:".parse::<Listen>().is_err() && "localhost:1".parse::<Listen>().is_err());
    }
}
