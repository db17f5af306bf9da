//! Binds the addresses of listeners and of the side port, or adopts sockets that are open already.

use std::io;
use std::net::{SocketAddr, TcpListener};

use super::StartError;
use super::inheritance::Sockets;
use crate::address::Address;
use crate::config::{self, Config};
use crate::outgoing::Refused;
use crate::proxy::listening::{self, ListeningSocket, Wanted};
use crate::proxy::socket::{self, Binding, overlap};

/// Length of the kernel's accept queue for the side port.
const API_BACKLOG: u16 = 1024;

/// A listener that is bound but does not accept connections yet. Dropping it removes the file of a Unix socket that this
/// process has created.
#[derive(Debug, Default)]
pub(super) struct Bound {
    sockets: Vec<ListeningSocket>,
    addresses: Vec<Opened>,
}

/// One address of a listener, with duplicates of its sockets for a handover to a successor.
#[derive(Debug)]
pub(super) struct Opened {
    /// The address as in the config, where the port can be 0.
    pub(super) listen: Address,
    pub(super) copies: Vec<ListeningSocket>,
    /// The service manager keeps the sockets open.
    pub(super) is_managed: bool,
    /// This process has opened them, and does not serve on them yet.
    is_new: bool,
    /// Another listener of this process has them too, and gives them up.
    pub(super) is_shared: bool,
}

impl Drop for Bound {
    fn drop(&mut self) {
        self.addresses.iter().filter(|address| address.is_new).for_each(|new| turn_away(&new.copies, &new.listen));
    }
}

/// The socket of the side port.
pub(super) struct SidePort {
    pub(super) socket: TcpListener,
    /// The service manager keeps it open.
    pub(super) is_managed: bool,
}

impl SidePort {
    /// The bound address.
    pub(super) fn address(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }
}

/// Binds the addresses of a listener, each with one socket per worker, or one socket if there are several. Adopts the sockets
/// that `inherited` has for an address. `own` are addresses on which this process listens, or its predecessor: the new ones may
/// overlap with them. Key paths in errors start with `key_path`.
pub(super) fn bind(
    key_path: &str,
    listener: &config::Listener,
    config: &Config,
    workers: usize,
    mut inherited: impl FnMut(&Address) -> Result<Sockets, StartError>,
    own: &[SocketAddr],
) -> Result<Bound, StartError> {
    let mut bound = Bound::default();
    for address in listener.addresses() {
        let binding = Binding {
            beside_own: address.ip().is_some_and(|ip| own.iter().any(|&own| overlap(own, ip))),
            ..binding(listener)
        };
        let count = if listener.ports > 1 { 1 } else { workers };
        let wanted = Wanted { count, backlog: listener.backlog, tcp: &config.tcp, binding, mode: listener.mode };
        let opened = bound.add(&address, inherited(&address)?, &wanted);
        opened.map_err(|error| cannot_listen(key_path, address, error))?;
    }
    Ok(bound)
}

/// Whether sockets of the service manager can serve a listener with this interface. They stay if their interface is gone:
/// Ringway cannot open others in their place.
pub(super) fn fits_managed(sockets: &[ListeningSocket], interface: Option<&str>) -> bool {
    // A socket unit may name an interface that the config does not.
    interface.is_none() || sockets.iter().all(|socket| socket.is_on(interface).unwrap_or(true))
}

/// How the sockets of a listener are bound.
pub(super) fn binding(listener: &config::Listener) -> Binding<'_> {
    Binding { beside_own: false, interface: listener.interface.as_deref(), freebind: listener.freebind }
}

/// The error of a listener whose key path this is.
pub(super) fn cannot_listen(key_path: &str, address: Address, error: io::Error) -> StartError {
    match Refused::of(&error) {
        Some(refused) => {
            StartError::Unfit { key_path: format!("{key_path}.{}", refused.key), problem: refused.to_string() }
        }
        None => StartError::Listen { key_path: format!("{key_path}.listen"), address, error },
    }
}

/// Binds the side port, or adopts the inherited socket if there is one.
pub(super) fn side_port(config: &Config, inherited: Sockets) -> Result<SidePort, StartError> {
    let (key_path, address) = ("api.listen", config.api.listen);
    let Sockets { list: inherited, is_managed, .. } = inherited;
    let tcp = |socket| if let ListeningSocket::Tcp(socket) = socket { Some(socket) } else { None };
    let open = || {
        if let Some(socket) = inherited.into_iter().find_map(tcp) {
            socket::prepare(&socket, API_BACKLOG.into(), &config.tcp).map(|()| socket)
        } else {
            let sockets = socket::listen(address, 1, API_BACKLOG.into(), &config.tcp, Binding::default())?;
            sockets.into_iter().next().ok_or_else(|| io::ErrorKind::NotFound.into())
        }
    };
    let failed = |error| StartError::Listen { key_path: key_path.to_owned(), address: address.into(), error };
    Ok(SidePort { socket: open().map_err(failed)?, is_managed })
}

impl Bound {
    /// Adds the sockets of an address.
    fn add(&mut self, listen: &Address, inherited: Sockets, wanted: &Wanted<'_>) -> io::Result<()> {
        let Sockets { list: mut inherited, is_managed, is_shared } = inherited;
        // A socket without its file gets no more clients. The old process accepts those that wait on it.
        inherited.retain(|socket| is_managed || socket.is_reachable());
        let is_new = inherited.is_empty();
        let sockets = if is_new {
            listening::listen(listen, wanted)?
        } else if is_shared {
            // If the reload fails, the other listener goes on with them as they are.
            listening::share(inherited, wanted.count)?
        } else {
            listening::adopt(inherited, wanted)?
        };
        let mut opened = Opened { listen: listen.clone(), copies: Vec::new(), is_managed, is_new, is_shared };
        let copies = sockets.iter().map(ListeningSocket::try_clone).collect::<io::Result<_>>();
        match copies {
            Ok(copies) => opened.copies = copies,
            Err(error) => {
                if is_new {
                    turn_away(&sockets, listen);
                }
                return Err(error);
            }
        }
        self.sockets.extend(sockets);
        self.addresses.push(opened);
        Ok(())
    }

    /// The addresses whose sockets another listener gives up.
    pub(super) fn shared(&self) -> impl Iterator<Item = &Address> {
        self.addresses.iter().filter(|address| address.is_shared).map(|address| &address.listen)
    }

    /// The sockets and the addresses, which this process serves from now on. `mode`: the permissions of a Unix socket's file.
    pub(super) fn into_parts(mut self, mode: u32) -> (Vec<ListeningSocket>, Vec<Opened>) {
        for address in &mut self.addresses {
            if !address.is_new && !address.is_managed {
                // Not before this process serves: the old one may have to go on.
                address.set_mode(mode);
            }
            address.is_new = false;
        }
        (std::mem::take(&mut self.sockets), std::mem::take(&mut self.addresses))
    }
}

impl Opened {
    /// Whether clients find the sockets, through this interface.
    pub(super) fn serves(&self, interface: Option<&str>) -> bool {
        if self.is_managed {
            return fits_managed(&self.copies, interface);
        }
        let fits = |socket: &ListeningSocket| socket.is_reachable() && socket.is_on(interface).unwrap_or(false);
        self.copies.iter().all(fits)
    }

    /// The bound address. It has the real port where the config says port 0.
    pub(super) fn bound(&self) -> Address {
        let bound = self.copies.first().and_then(|socket| socket.address().ok());
        bound.unwrap_or_else(|| self.listen.clone())
    }

    /// Sets the permissions of a Unix socket's file.
    pub(super) fn set_mode(&self, mode: u32) {
        if let Some(Err(error)) = self.copies.first().map(|socket| socket.set_mode(mode)) {
            tracing::warn!(address = %self.listen, %error, "cannot set the permissions of a Unix socket's file");
        }
    }
}

/// Turns clients away from sockets that are about to close.
pub(super) fn turn_away(sockets: &[ListeningSocket], address: &Address) {
    for socket in sockets {
        if let Err(error) = socket.turn_away() {
            match socket {
                ListeningSocket::Tcp(_) => {
                    tracing::debug!(%address, %error, "cannot turn clients away from a socket that closes");
                }
                ListeningSocket::Unix(_) => tracing::warn!(%address, %error, "cannot remove the file of a Unix socket"),
            }
        }
    }
}
