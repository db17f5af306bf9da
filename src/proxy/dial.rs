//! One attempt to connect: a socket, its source address and port, and the handshake.
//!
//! The kernel chooses source ports well until about half of them are in use towards one address. From then on it
//! searches them one by one (`__inet_hash_connect` in Linux): a connect takes milliseconds, in which the worker serves
//! nobody. [`PortSearch`] notices that, and [`dial`] then chooses ports itself.

use std::cell::Cell;
use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::OnceLock;
use std::time::Duration;

use rustix::io::Errno;
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::Route;
use super::connect::Want;
use super::socket::TcpOptions;
use crate::address::Address;
use crate::backend::{ConnectFailure, PortSearch};
use crate::outgoing::{self, Outgoing, Refused};
use crate::stream::Stream;

/// Pause between attempts to get a descriptor, and the number of attempts: one second in total.
const PAUSE: Duration = Duration::from_millis(20);
const TRIES: u32 = 50;

/// Ports that Ringway tries before it leaves the choice to the kernel. The first half is odd: the kernel prefers even
/// ones, and a port that the kernel has chosen cannot be shared.
const PORT_TRIES: u32 = 32;

/// Source addresses without a free port at which one attempt lets the kernel search. A full search takes milliseconds.
const MOST_SEARCHES: u32 = 4;

/// Connects to `address`.
///
/// # Errors
/// The system's error, `ETIMEDOUT` after the route's timeout, or [`Refused`].
pub(super) async fn dial(address: &Address, route: &Route, want: Want<'_>, search: &PortSearch) -> io::Result<Stream> {
    let timeout = route.connect_timeout;
    match address {
        Address::Ip(address) => {
            let mut address = *address;
            want.port.into_iter().for_each(|port| address.set_port(port));
            dial_tcp(address, route, want, search).await.map(Stream::Tcp)
        }
        Address::Unix(path) => {
            let connect = async || {
                let connected = tokio::time::timeout(timeout, Stream::connect_unix(path)).await;
                connected.unwrap_or_else(|_elapsed| Err(Errno::TIMEDOUT.into()))
            };
            with_descriptor(connect).await
        }
    }
}

async fn dial_tcp(address: SocketAddr, route: &Route, want: Want<'_>, search: &PortSearch) -> io::Result<TcpStream> {
    // Starts the handshake.
    let stream = with_descriptor(|| std::future::ready(start(address, route, want, search))).await?;
    let connected =
        tokio::time::timeout(route.connect_timeout, stream.ready(Interest::WRITABLE | Interest::ERROR)).await;
    let ready = connected.map_err(|_elapsed| io::Error::from(Errno::TIMEDOUT))??;
    // Without an error event there is no error to fetch.
    if (ready.is_error() || ready.is_write_closed())
        && let Some(error) = stream.take_error()?
    {
        return Err(error);
    }
    // If no socket listens on a local `address`, the kernel may pick its port as the source port. TCP then connects the
    // socket to itself, and the relay would echo the client's bytes.
    if ephemeral_ports().contains(address.port()) && stream.local_addr()? == address {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    Ok(stream)
}

/// Repeats an attempt that fails for lack of a descriptor: a delay is better for the client than a reset.
async fn with_descriptor<T, F: Future<Output = io::Result<T>>>(mut attempt: impl FnMut() -> F) -> io::Result<T> {
    for _ in 1..TRIES {
        match attempt().await {
            Err(error) if ConnectFailure::of(&error) == ConnectFailure::NoDescriptors => {
                tokio::time::sleep(PAUSE).await;
            }
            other => return other,
        }
    }
    attempt().await
}

/// Begins to connect, from the first source address that has a free port.
fn start(address: SocketAddr, route: &Route, want: Want<'_>, search: &PortSearch) -> io::Result<TcpStream> {
    let outgoing = route.outgoing.as_deref();
    let sources = outgoing::sources(outgoing, want.key, address.is_ipv4());
    if search.is_crowded() {
        let tries = PORT_TRIES / outgoing.map_or(1, |outgoing| outgoing.sources.len().clamp(1, 8) as u32);
        for source in sources.clone() {
            for n in 0..tries {
                let port = ephemeral_ports().random(n < tries / 2);
                match connect_from(source, Some(port), address, outgoing, want.tcp) {
                    Err(error) if is_taken(&error) => {}
                    other => return other,
                }
            }
        }
    }
    // One timer for all searches: a quick one at a second address must not hide a slow one at the first.
    let timer = search.begin();
    let started = from_kernels_choice(address, route, want, sources);
    search.end(&timer);
    started
}

/// Begins to connect from the first of these source addresses at which the kernel finds a free port.
fn from_kernels_choice(
    address: SocketAddr,
    route: &Route,
    want: Want<'_>,
    sources: impl Iterator<Item = Option<IpAddr>>,
) -> io::Result<TcpStream> {
    let mut searches = 0;
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for source in sources {
        match (connect_from(source, None, address, route.outgoing.as_deref(), want.tcp), source) {
            (Err(error), Some(source)) if outgoing::is_of_source(&error) => {
                route.stats.skip_source(source);
                searches += u32::from(Refused::of(&error).is_none());
                last = error;
            }
            (other, _) => return other,
        }
        if searches == MOST_SEARCHES {
            break;
        }
    }
    Err(last)
}

/// Begins to connect from this address and port; `None`: the kernel chooses.
fn connect_from(
    source: Option<IpAddr>,
    port: Option<u16>,
    address: SocketAddr,
    outgoing: Option<&Outgoing>,
    tcp: &TcpOptions,
) -> io::Result<TcpStream> {
    let socket = outgoing::socket(address)?;
    tcp.apply_first(&SockRef::from(&socket))?;
    if let Some(outgoing) = outgoing {
        outgoing.apply(&SockRef::from(&socket))?;
    }
    match (source, port) {
        (source, Some(port)) => {
            // Connections to different backends may share a port.
            socket.set_reuse_address(true)?;
            let any =
                if address.is_ipv4() { IpAddr::from(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
            socket.bind(&SocketAddr::new(source.unwrap_or(any), port).into())?;
        }
        (Some(source), None) => outgoing::bind(&socket, source)?,
        (None, None) => {}
    }
    match socket.connect(&address.into()) {
        Err(error) if Errno::from_io_error(&error) != Some(Errno::INPROGRESS) => {
            Err(outgoing::of_connect(error, source, address))
        }
        _ => TcpStream::from_std(socket.into()),
    }
}

fn is_taken(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::ADDRINUSE | Errno::ADDRNOTAVAIL))
}

/// The ports from which the kernel chooses source ports.
struct EphemeralPorts {
    first: u16,
    last: u16,
    /// Ranges that the administrator keeps free.
    reserved: Vec<(u16, u16)>,
}

impl EphemeralPorts {
    fn read() -> Self {
        let read = |name| std::fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap_or_default();
        Self::parse(&read("ip_local_port_range"), &read("ip_local_reserved_ports"))
    }

    fn parse(range: &str, reserved: &str) -> Self {
        let mut bounds = range.split_whitespace().filter_map(|bound| bound.parse().ok());
        // The kernel's default, if it does not tell.
        let (first, last) =
            bounds.next().zip(bounds.next()).filter(|(first, last)| first <= last).unwrap_or((32768, 60999));
        let reserved = reserved.trim().split(',').filter_map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            Some((first.parse().ok()?, last.parse().ok()?))
        });
        Self { first, last, reserved: reserved.collect() }
    }

    fn contains(&self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }

    /// A random port, by preference an odd one.
    fn random(&self, is_odd: bool) -> u16 {
        let port = self.first + (random() % (u64::from(self.last - self.first) + 1)) as u16;
        let port = if is_odd { (port | 1).min(self.last) } else { port };
        let past_reserved = self.reserved.iter().find(|(first, last)| (*first..=*last).contains(&port));
        past_reserved.map_or(port, |(_, last)| last.saturating_add(1).clamp(self.first, self.last))
    }
}

fn ephemeral_ports() -> &'static EphemeralPorts {
    static PORTS: OnceLock<EphemeralPorts> = OnceLock::new();
    PORTS.get_or_init(EphemeralPorts::read)
}

/// A random number; differs between threads and processes.
fn random() -> u64 {
    thread_local! {
        static LAST: Cell<u64> = Cell::new(RandomState::new().hash_one(0));
    }
    LAST.with(|last| {
        last.set(last.get().wrapping_add(1));
        seahash::hash(&last.get().to_le_bytes())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::{Parameters, Ring};
    use crate::table::{Members, Rules, Table, TableCell};

    #[test]
    fn random_ports_are_in_the_range_and_not_reserved() {
        let ports = EphemeralPorts::parse("32768\t60999\n", "40000-49999,50001\n");
        let drawn: Vec<u16> = (0..20_000).map(|_| ports.random(true)).collect();
        assert!(drawn.iter().all(|&port| ports.contains(port)));
        assert!(drawn.iter().all(|port| !(40_000..=49_999).contains(port) && *port != 50_001));
        let odd = drawn.iter().filter(|port| *port % 2 == 1).count();
        assert!(odd > 11_000, "{odd}");
        let distinct: std::collections::BTreeSet<_> = drawn.iter().collect();
        assert!(distinct.len() > 5000, "{}", distinct.len());
        let fallback = EphemeralPorts::parse("", "");
        assert_eq!((fallback.first, fallback.last), (32768, 60999));
    }

    #[tokio::test]
    async fn a_crowded_search_connects_from_ports_of_its_own_choice() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::Ip(listener.local_addr().unwrap());
        let search = PortSearch::default();
        while !search.is_crowded() {
            let timer = search.begin();
            let began = std::time::Instant::now();
            while began.elapsed() < Duration::from_millis(2) {}
            search.end(&timer);
        }
        let ring = Ring::build(Parameters { virtual_nodes: 1, probes: 1, seed: 0 }, &[]);
        let rules = Rules { panic_below: 0, spill_below: 0, is_exclusive: false };
        let table = TableCell::new(Table::new(0, ring.into(), Members::new(Vec::new(), 0), rules));
        let route = Route {
            connect_timeout: Duration::from_secs(5),
            ..Route::new("p".into(), table, ::metrics::Histogram::noop())
        };
        let want = Want { key: b"key", port: None, tcp: &TcpOptions::default() };
        let mut streams = Vec::new();
        for _ in 0..50 {
            let dialed = dial(&address, &route, want, &search).await;
            let Stream::Tcp(stream) = dialed.unwrap() else { unreachable!() };
            streams.push(stream);
        }
        let odd = streams.iter().filter(|stream| stream.local_addr().unwrap().port() % 2 == 1).count();
        assert!(odd >= 45, "{odd} of 50 ports are odd");
    }
}
