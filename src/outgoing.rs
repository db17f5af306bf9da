//! Where connections to backends come from, and how the kernel treats them.
//!
//! A connect needs a source port that no other connection to the same backend has at the same source address. With one
//! address, the kernel has some 28,000 ports per backend; each further address adds as many.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use nix::sys::socket::{setsockopt, sockopt::IpBindAddressNoPort};
use rustix::io::Errno;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpSocket, TcpStream};

/// Settings of the TCP sockets with which Ringway connects to the backends of a pool.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Outgoing {
    /// Source addresses of the machine. For a backend of a family that has none here, the kernel chooses.
    pub sources: Vec<IpAddr>,
    /// Network interface that the packets take (`SO_BINDTODEVICE`); `None`: the route decides.
    pub interface: Option<String>,
    /// Mark of the packets for routing rules and firewalls (`SO_MARK`), at least 1; `None`: no mark.
    pub mark: Option<u32>,
    /// Congestion control (`TCP_CONGESTION`), like `bbr`; `None`: the system's default.
    pub congestion: Option<String>,
}

/// The system refuses a setting of a socket.
#[derive(Debug, thiserror::Error)]
#[error("{value}: {problem}")]
pub struct Refused {
    /// Name of the key in the config.
    pub key: &'static str,
    /// The value that the system refuses.
    pub value: String,
    /// The system's error, and the remedy.
    pub problem: String,
}

impl Refused {
    /// The refusal that an error is about, if it is one.
    pub fn of(error: &io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }
}

impl From<Refused> for io::Error {
    fn from(refused: Refused) -> Self {
        Self::other(refused)
    }
}

impl Outgoing {
    /// Sets everything but the source address on a socket.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn apply(&self, socket: &SockRef<'_>) -> Result<(), Refused> {
        if let Some(interface) = &self.interface {
            use_interface(socket, interface)?;
        }
        if let Some(mark) = self.mark {
            socket.set_mark(mark).map_err(|error| refused_mark(mark, &error))?;
        }
        if let Some(name) = &self.congestion {
            socket.set_tcp_congestion(name.as_bytes()).map_err(|error| refused_congestion(name, &error))?;
        }
        Ok(())
    }

    /// Tries all settings on sockets that connect to nothing.
    ///
    /// # Errors
    /// The first setting that the system refuses.
    pub fn probe(&self) -> io::Result<()> {
        let usual = [IpAddr::from(Ipv4Addr::UNSPECIFIED)];
        for &source in if self.sources.is_empty() { &usual } else { &self.sources[..] } {
            let socket = socket(SocketAddr::new(source, 0))?;
            self.apply(&SockRef::from(&socket))?;
            bind(&socket, source)?;
        }
        Ok(())
    }
}

/// The source addresses for a connection with this key, in the order in which to try them. `None`: the kernel chooses.
pub fn sources<'a>(
    outgoing: Option<&'a Outgoing>,
    key: &[u8],
    is_ipv4: bool,
) -> impl Iterator<Item = Option<IpAddr>> + Clone + use<'a> {
    let all = outgoing.map_or(&[][..], |outgoing| &outgoing.sources);
    let fitting = all.iter().copied().filter(move |source| source.is_ipv4() == is_ipv4);
    let count = fitting.clone().count();
    // The hash has its own seeds: the backend of a key does not decide its source address.
    let first = if count > 1 { seahash::hash_seeded(key, 5, 6, 7, 8) as usize % count } else { 0 };
    fitting.cycle().skip(first).take(count).map(Some).chain((count == 0).then_some(None))
}

/// A TCP socket of the family of `address` that does not block.
///
/// # Errors
/// The system's error.
pub fn socket(address: SocketAddr) -> io::Result<Socket> {
    Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))
}

/// Sets the source address of a socket. The kernel chooses the port only once it knows where the socket connects to. Without
/// this option, a port would be taken for all backends together (ip(7), `IP_BIND_ADDRESS_NO_PORT`).
///
/// # Errors
/// The system's error; [`Refused`] if this machine does not have the address.
pub fn bind(socket: &Socket, source: IpAddr) -> io::Result<()> {
    setsockopt(socket, IpBindAddressNoPort, &true)?;
    socket.bind(&SocketAddr::new(source, 0).into()).map_err(|error| match Errno::from_io_error(&error) {
        Some(Errno::ADDRNOTAVAIL | Errno::INVAL) => refused_source(source, &error).into(),
        _ => error,
    })
}

/// Whether another source address may do where this one fails: all its ports are taken, or the machine does not have it.
pub fn is_of_source(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::ADDRNOTAVAIL)
        || Refused::of(error).is_some_and(|refused| refused.key == SOURCE)
}

/// The error of a connect from a source address. `EINVAL` says that no packet from there can reach `address`, as from
/// 127.0.0.1 to another machine.
pub fn of_connect(error: io::Error, source: Option<IpAddr>, address: SocketAddr) -> io::Error {
    match source.filter(|_| Errno::from_io_error(&error) == Some(Errno::INVAL)) {
        Some(source) => {
            let problem = format!("packets from there cannot reach {}: choose another address", address.ip());
            Refused { key: SOURCE, value: source.to_string(), problem }.into()
        }
        None => error,
    }
}

/// Connects to `address` for Ringway's own questions: checks and agents. `key` chooses the source address. `prepare` is
/// called for each socket before it connects.
///
/// # Errors
/// The system's error, or [`Refused`].
pub async fn connect(
    address: SocketAddr,
    outgoing: Option<&Outgoing>,
    key: &[u8],
    prepare: impl Fn(&TcpSocket),
) -> io::Result<TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for source in sources(outgoing, key, address.is_ipv4()) {
        let socket = socket(address)?;
        let set_up = || {
            outgoing.map_or(Ok(()), |outgoing| outgoing.apply(&SockRef::from(&socket)))?;
            source.map_or(Ok(()), |source| bind(&socket, source))
        };
        let connected = match set_up() {
            Ok(()) => {
                let socket = TcpSocket::from_std_stream(socket.into());
                prepare(&socket);
                socket.connect(address).await.map_err(|error| of_connect(error, source, address))
            }
            Err(error) => Err(error),
        };
        match connected {
            // The system may pick a port on which nobody listens as our own source port: TCP then connects to itself.
            Ok(stream) if stream.local_addr().ok() == Some(address) => {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            Err(error) if source.is_some() && is_of_source(&error) => last = error,
            other => return other,
        }
    }
    Err(last)
}

/// Makes all packets of a socket leave and come in through this network interface.
///
/// # Errors
/// When the machine lacks it, or the system does not allow it.
pub fn use_interface(socket: &SockRef<'_>, interface: &str) -> Result<(), Refused> {
    socket.bind_device(Some(interface.as_bytes())).map_err(|error| {
        let problem = match Errno::from_io_error(&error) {
            Some(Errno::NODEV) => {
                "this machine has no network interface of that name: choose one that `ip link` lists".to_owned()
            }
            _ => error.to_string(),
        };
        Refused { key: "interface", value: interface.to_owned(), problem }
    })
}

const SOURCE: &str = "source";

fn refused_source(source: IpAddr, error: &io::Error) -> Refused {
    let problem = match Errno::from_io_error(error) {
        Some(Errno::INVAL) => {
            "a link-local address needs interface: set it to the name of its network interface".to_owned()
        }
        _ => "this machine does not have that address: choose one that `ip address` lists".to_owned(),
    };
    Refused { key: SOURCE, value: source.to_string(), problem }
}

fn refused_mark(mark: u32, error: &io::Error) -> Refused {
    let problem = match Errno::from_io_error(error) {
        Some(Errno::PERM) => {
            "Ringway may not mark packets: give it CAP_NET_ADMIN (since Linux 5.17, CAP_NET_RAW is enough), or remove \
             this key"
                .to_owned()
        }
        _ => error.to_string(),
    };
    Refused { key: "mark", value: mark.to_string(), problem }
}

fn refused_congestion(name: &str, error: &io::Error) -> Refused {
    let problem = match Errno::from_io_error(error) {
        Some(Errno::NOENT) => format!(
            "the kernel does not have it: choose one from /proc/sys/net/ipv4/tcp_available_congestion_control, or load \
             its module with modprobe tcp_{name}"
        ),
        Some(Errno::PERM) => {
            "Ringway may not use it: add it to net.ipv4.tcp_allowed_congestion_control, or give Ringway CAP_NET_ADMIN"
                .to_owned()
        }
        _ => error.to_string(),
    };
    Refused { key: "congestion", value: name.to_owned(), problem }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    fn outgoing(sources: &[&str]) -> Outgoing {
        Outgoing { sources: sources.iter().map(|source| source.parse().unwrap()).collect(), ..Outgoing::default() }
    }

    #[test]
    fn a_key_begins_with_one_source_of_the_family_and_then_tries_all_others() {
        let outgoing = outgoing(&["127.0.0.2", "::1", "127.0.0.3", "127.0.0.4"]);
        let mut firsts = BTreeMap::new();
        for key in 0_u32..3000 {
            let key = key.to_le_bytes();
            let tried: Vec<_> = sources(Some(&outgoing), &key, true).map(Option::unwrap).collect();
            assert_eq!(tried.iter().collect::<BTreeSet<_>>().len(), 3);
            assert!(tried.iter().all(IpAddr::is_ipv4));
            assert!(sources(Some(&outgoing), &key, true).map(Option::unwrap).eq(tried.iter().copied()), "sticky");
            *firsts.entry(tried[0]).or_insert(0) += 1;
        }
        assert!(firsts.values().all(|&count| (850..1150).contains(&count)), "{firsts:?}");
        assert!(sources(Some(&outgoing), b"key", false).eq([Some("::1".parse().unwrap())]));
        assert!(sources(Some(&self::outgoing(&["::1"])), b"key", true).eq([None]), "no source of the family");
        assert!(sources(None, b"key", true).eq([None]));
    }

    #[tokio::test]
    async fn a_connection_comes_from_the_first_source_that_the_machine_has() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        // Documentation addresses, which no machine has (RFC 5737).
        let partly = outgoing(&["198.51.100.1", "127.0.0.9", "198.51.100.2"]);
        for key in 0..20_u8 {
            let stream = connect(address, Some(&partly), &[key], |_| ()).await.unwrap();
            assert_eq!(stream.local_addr().unwrap().ip(), "127.0.0.9".parse::<IpAddr>().unwrap());
        }
        let error = connect(address, Some(&outgoing(&["198.51.100.1"])), b"key", |_| ()).await.unwrap_err();
        assert!(error.to_string().starts_with("198.51.100.1: this machine does not have"), "{error}");
        assert_eq!(crate::backend::ConnectFailure::of(&error), crate::backend::ConnectFailure::Local);
    }

    #[test]
    fn a_source_from_which_nothing_reaches_the_backend_is_not_the_backend_s_fault() {
        let (source, address) = (Some(Ipv4Addr::LOCALHOST.into()), ([198, 51, 100, 1], 80).into());
        let invalid = || io::Error::from(Errno::INVAL);
        let error = of_connect(invalid(), source, address);
        assert!(is_of_source(&error) && error.to_string().contains("cannot reach 198.51.100.1"), "{error}");
        assert!(!is_of_source(&of_connect(invalid(), None, address)));
        assert!(!is_of_source(&of_connect(Errno::CONNREFUSED.into(), source, address)));
    }

    #[test]
    fn a_port_is_chosen_only_when_the_backend_is_known() {
        let bound = socket(([127, 0, 0, 1], 1).into()).unwrap();
        bind(&bound, Ipv4Addr::LOCALHOST.into()).unwrap();
        assert_eq!(bound.local_addr().unwrap().as_socket().unwrap().port(), 0);
    }

    #[test]
    fn a_probe_names_the_key_that_the_system_refuses() {
        let refused = |outgoing: Outgoing| {
            let error = outgoing.probe().unwrap_err().into_inner().unwrap();
            let refused = error.downcast::<Refused>().unwrap();
            (refused.key, refused.to_string())
        };
        assert!(outgoing(&["127.0.0.1", "127.0.0.2"]).probe().is_ok());
        let (key, text) = refused(outgoing(&["127.0.0.1", "198.51.100.1"]));
        assert!(key == "source" && text.contains("198.51.100.1: this machine does not have"), "{text}");
        let (key, text) = refused(Outgoing { interface: Some("no-such-link".to_owned()), ..Outgoing::default() });
        assert!(key == "interface" && text.contains("`ip link` lists"), "{text}");
        let (key, text) = refused(Outgoing { congestion: Some("warp".to_owned()), ..Outgoing::default() });
        assert!(key == "congestion" && text.contains("modprobe tcp_warp"), "{text}");
        let (key, text) = refused(outgoing(&["fe80::1"]));
        assert!(key == "source" && text.contains("link-local"), "{text}");
    }
}
