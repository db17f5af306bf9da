//! Simple servers that act as backends.

use std::net::SocketAddr;
use std::process::Command;

use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::{Random, seed};

/// A server that handles every connection with one function. It stops when it is dropped.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    task: JoinHandle<()>,
}

impl Server {
    /// Listens on a free port and runs `handle` for each connection.
    pub(crate) async fn start<F>(handle: impl Fn(TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        Self::on(TcpListener::bind("127.0.0.1:0").await.unwrap(), handle)
    }

    /// Runs `handle` for each connection to this socket.
    pub(crate) fn on<F>(listener: TcpListener, handle: impl Fn(TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(handle(stream));
            }
        });
        Self { address, task }
    }

    /// The demo backend.
    pub(crate) async fn echo(name: &str) -> Self {
        Self::echo_on("127.0.0.1:0", name).await
    }

    /// Several demo backends.
    pub(crate) async fn echoes(count: usize) -> Vec<Self> {
        let mut servers = Vec::new();
        for n in 0..count {
            servers.push(Self::echo(&format!("b{n}")).await);
        }
        servers
    }

    /// The demo backend at this address.
    pub(crate) async fn echo_at(address: &str) -> Self {
        Self::echo_on(address, "echo").await
    }

    async fn echo_on(address: &str, name: &str) -> Self {
        use clap::Parser as _;

        let options = echo_server::Options::parse_from(["echo-server", "--name", name, "--grace-ms", "0"]);
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(echo_server::run(listener, options, std::future::pending()));
        Self { address, task }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Ports that nothing uses now. The system does not choose them for clients or for port 0.
pub(crate) fn free_ports<const N: usize>() -> [u16; N] {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap();
    let first: u16 = range.split_whitespace().next().unwrap().parse().unwrap();
    let mut random = Random(seed());
    let mut taken: Vec<std::net::TcpListener> = Vec::new();
    while taken.len() < N {
        let port = 1024 + u16::try_from(random.below(usize::from(first - 1024))).unwrap();
        taken.extend(std::net::TcpListener::bind(("127.0.0.1", port)));
    }
    std::array::from_fn(|n| taken[n].local_addr().unwrap().port())
}

/// An address that refuses connections. It stays reserved until this is dropped.
pub(crate) struct Refusing {
    pub(crate) address: SocketAddr,
    _socket: socket2::Socket,
}

impl Refusing {
    pub(crate) fn new() -> Self {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        let address = socket.local_addr().unwrap().as_socket().unwrap();
        Self { address, _socket: socket }
    }
}

/// An address that answers no SYN: a listening socket with a full backlog that accepts nothing.
pub(crate) struct Silent {
    pub(crate) address: SocketAddr,
    _socket: socket2::Socket,
    _queued: Vec<socket2::Socket>,
}

impl Silent {
    pub(crate) fn new() -> Self {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        socket.listen(0).unwrap();
        let address = socket.local_addr().unwrap().as_socket().unwrap();
        let mut queued = Vec::new();
        // A backlog of 0 takes one or two connections. Four clients fill it.
        for _ in 0..4 {
            let client = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            client.set_nonblocking(true).unwrap();
            let _ = client.connect(&address.into());
            queued.push(client);
        }
        Self { address, _socket: socket, _queued: queued }
    }
}

/// A key and a certificate for all names, in a folder of its own.
pub(crate) fn certificate() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=example.com", "-keyout", "key.pem", "-out", "cert.pem"])
        .current_dir(folder.path())
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    folder
}
