//! Notifications to the service manager.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixDatagram};

/// Notifies the service manager, if there is one (`sd_notify(3)`): systemd, or Ringway's own process 1 in a container.
/// The address of the latter is an abstract one.
pub(super) fn notify(message: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let send = || {
        let socket = UnixDatagram::unbound()?;
        match path.as_bytes().strip_prefix(b"@") {
            Some(name) => socket.connect_addr(&UnixAddress::from_abstract_name(name)?)?,
            None => socket.connect(&path)?,
        }
        socket.send(message.as_bytes())
    };
    if let Err(error) = send() {
        tracing::warn!(%error, ?path, "cannot notify the service manager");
    }
}
