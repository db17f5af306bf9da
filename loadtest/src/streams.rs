//! Streams whose every byte is checked, in the states in which a balancer may find a connection: idle, in an exchange, in a bulk transfer,
//! closed by one side, or blocked by a side that does not read. They last until somebody ends them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// Longest wait for a byte that must come.
const PATIENCE: Duration = Duration::from_secs(30);

/// Bytes of one write of a bulk transfer.
const CHUNK: usize = 256 * 1024;

/// Bytes that a client sends before it reads the first one: more than all buffers between it and the server hold.
const BLOCKING: u64 = 24 * 1024 * 1024;

/// What the client asks of the server, with its first byte.
const ECHO: u8 = b'e';
const SEND: u8 = b's';
const RECEIVE: u8 = b'r';

/// What a stream does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nothing, after one exchange.
    Idle,
    /// A message and its echo, again and again.
    Exchange,
    /// Bytes in both directions, in large writes.
    Bulk,
    /// The client has ended its stream; the server sends.
    ClosedByClient,
    /// The server has ended its stream; the client sends.
    ClosedByServer,
    /// The client sends and reads nothing before the end.
    Blocked,
}

/// Streams that run.
#[derive(Debug)]
pub struct Streams {
    shared: Arc<Shared>,
    clients: JoinSet<(Kind, anyhow::Result<()>)>,
}

/// What clients and servers share.
#[derive(Debug)]
struct Shared {
    /// True when the streams are to end.
    over: watch::Sender<bool>,
    /// Bytes of streams that one side has ended, as counted by both sides.
    sent: AtomicU64,
    received: AtomicU64,
    /// All bytes that were checked.
    checked: AtomicU64,
    pause: Duration,
}

/// The server of streams. It stops when it is dropped.
#[derive(Debug)]
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

impl Server {
    /// Listens on a free port. `pause`: time between two messages or two bulk writes of a stream.
    ///
    /// # Errors
    /// When it cannot listen.
    pub async fn start(pause: Duration) -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let shared = Arc::new(Shared {
            over: watch::Sender::new(false),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            checked: AtomicU64::new(0),
            pause,
        });
        let address = listener.local_addr()?;
        let of_clients = Arc::clone(&shared);
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let shared = Arc::clone(&of_clients);
                tokio::spawn(async move { shared.serve(stream).await });
            }
        });
        Ok(Self { address, shared, accepting })
    }

    /// Opens streams by way of a balancer, and waits until each has begun.
    ///
    /// # Errors
    /// The first one that does not begin.
    pub async fn open(&self, balancer: SocketAddr, counts: &[(Kind, usize)]) -> anyhow::Result<Streams> {
        let mut clients = JoinSet::new();
        for &(kind, count) in counts {
            for _ in 0..count {
                let (shared, mut stream) = (Arc::clone(&self.shared), TcpStream::connect(balancer).await?);
                tokio::time::timeout(PATIENCE, begin(kind, &mut stream)).await.context("a stream does not begin")??;
                clients.spawn(async move { (kind, shared.run(kind, stream).await) });
            }
        }
        Ok(Streams { shared: Arc::clone(&self.shared), clients })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Streams {
    /// Ends the streams and checks their last bytes. Returns the number of all bytes that were checked.
    ///
    /// # Errors
    /// The first stream that had ended before, or had a wrong byte.
    pub async fn finish(mut self) -> anyhow::Result<u64> {
        self.shared.over.send_replace(true);
        let mut problems = Vec::new();
        while let Some(ended) = self.clients.join_next().await {
            let (kind, result) = ended?;
            problems.extend(result.err().map(|error| format!("{kind:?}: {error:#}")));
        }
        ensure!(problems.is_empty(), "{} streams failed, the first: {}", problems.len(), problems[0]);
        let counted = async {
            while self.shared.sent.load(Ordering::Relaxed) != self.shared.received.load(Ordering::Relaxed) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let all = tokio::time::timeout(PATIENCE, counted).await;
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ensure!(all.is_ok(), "{} of {} bytes arrived", of(&self.shared.received), of(&self.shared.sent));
        Ok(of(&self.shared.checked))
    }
}

/// Begins a stream: the first exchange shows that it has reached the server.
async fn begin(kind: Kind, stream: &mut TcpStream) -> anyhow::Result<()> {
    match kind {
        Kind::Idle | Kind::Exchange | Kind::Bulk | Kind::Blocked => {
            stream.write_all(&[ECHO]).await?;
            ensure!(stream.read_u8().await? == ECHO, "a wrong first byte");
        }
        Kind::ClosedByClient => {
            stream.write_all(&[SEND]).await?;
            stream.shutdown().await?;
            ensure!(stream.read_u8().await? == SEND, "a wrong first byte");
        }
        Kind::ClosedByServer => {
            stream.write_all(&[RECEIVE]).await?;
            ensure!(stream.read_u8().await? == RECEIVE && stream.read(&mut [0]).await? == 0, "no end of the stream");
        }
    }
    Ok(())
}

impl Shared {
    fn is_over(&self) -> bool {
        *self.over.borrow()
    }

    /// Waits for the end, at most this long.
    async fn rest(&self, most: Duration) {
        let mut over = self.over.subscribe();
        let _ = tokio::time::timeout(most, over.wait_for(|&over| over)).await;
    }

    /// The side of the client.
    async fn run(&self, kind: Kind, mut stream: TcpStream) -> anyhow::Result<()> {
        match kind {
            Kind::Idle => {
                self.rest(Duration::MAX).await;
                self.exchange(&mut stream, 0).await
            }
            Kind::Exchange => {
                let mut at = 0;
                while !self.is_over() {
                    self.exchange(&mut stream, at).await?;
                    at += 64;
                    self.rest(self.pause).await;
                }
                Ok(())
            }
            Kind::Bulk => {
                let (mut from, mut to) = stream.split();
                let send = async {
                    let mut at = 0;
                    while !self.is_over() {
                        to.write_all(&pattern(at, CHUNK)).await?;
                        at += CHUNK as u64;
                        self.rest(self.pause).await;
                    }
                    to.shutdown().await?;
                    anyhow::Ok(at)
                };
                let (sent, back) = tokio::try_join!(send, self.check(&mut from))?;
                ensure!(sent == back, "{back} of {sent} bytes came back");
                Ok(())
            }
            Kind::ClosedByClient => {
                let count = self.check(&mut stream).await?;
                ensure!(self.is_over(), "the server's stream ended after {count} bytes");
                self.received.fetch_add(count, Ordering::Relaxed);
                Ok(())
            }
            Kind::ClosedByServer => {
                self.send(&mut stream).await?;
                Ok(stream.shutdown().await?)
            }
            Kind::Blocked => {
                let (mut from, mut to) = stream.split();
                let send = async {
                    let mut at = 0;
                    while at < BLOCKING {
                        to.write_all(&pattern(at, CHUNK)).await?;
                        at += CHUNK as u64;
                    }
                    to.shutdown().await?;
                    anyhow::Ok(at)
                };
                let receive = async {
                    self.rest(Duration::MAX).await;
                    self.check(&mut from).await
                };
                let (sent, back) = tokio::try_join!(send, receive)?;
                ensure!(sent == back, "{back} of {sent} bytes came back");
                Ok(())
            }
        }
    }

    /// Sends 64 bytes and reads their echo.
    async fn exchange(&self, stream: &mut TcpStream, at: u64) -> anyhow::Result<()> {
        let (sent, mut back) = (pattern(at, 64), [0; 64]);
        stream.write_all(&sent).await?;
        tokio::time::timeout(PATIENCE, stream.read_exact(&mut back)).await.context("no echo")??;
        ensure!(sent == back, "a wrong echo at byte {at}");
        self.checked.fetch_add(64, Ordering::Relaxed);
        Ok(())
    }

    /// Sends the pattern until the streams are to end, on a stream whose other direction has ended.
    async fn send(&self, stream: &mut TcpStream) -> anyhow::Result<()> {
        let mut at = 0;
        while !self.is_over() {
            stream.write_all(&pattern(at, 1000)).await?;
            at += 1000;
            self.sent.fetch_add(1000, Ordering::Relaxed);
            self.rest(self.pause).await;
        }
        Ok(())
    }

    /// Reads the pattern until the end of the stream, and returns the number of its bytes.
    async fn check(&self, from: &mut (impl tokio::io::AsyncRead + Unpin)) -> anyhow::Result<u64> {
        let (mut at, mut buffer) = (0, vec![0; CHUNK]);
        loop {
            let read = tokio::time::timeout(PATIENCE, from.read(&mut buffer)).await.context("no byte comes")??;
            if read == 0 {
                return Ok(at);
            }
            ensure!(buffer[..read] == pattern(at, read), "a wrong byte between {at} and {}", at + read as u64);
            at += read as u64;
            self.checked.fetch_add(read as u64, Ordering::Relaxed);
        }
    }

    /// The side of the server.
    async fn serve(&self, mut stream: TcpStream) {
        let served = async {
            let wanted = stream.read_u8().await?;
            stream.write_all(&[wanted]).await?;
            match wanted {
                ECHO => {
                    let mut buffer = vec![0; 64 * 1024];
                    loop {
                        let read = stream.read(&mut buffer).await?;
                        if read == 0 {
                            break;
                        }
                        stream.write_all(&buffer[..read]).await?;
                    }
                }
                SEND => {
                    ensure!(stream.read(&mut [0]).await? == 0, "the client sends");
                    self.send(&mut stream).await?;
                }
                _ => {
                    stream.shutdown().await?;
                    let (mut at, mut buffer) = (0, vec![0; 64 * 1024]);
                    loop {
                        let read = stream.read(&mut buffer).await?;
                        if read == 0 {
                            break;
                        }
                        // A wrong byte is missing in the sum.
                        ensure!(
                            buffer[..read] == pattern(at, read),
                            "a wrong byte between {at} and {}",
                            at + read as u64
                        );
                        at += read as u64;
                        self.received.fetch_add(read as u64, Ordering::Relaxed);
                        self.checked.fetch_add(read as u64, Ordering::Relaxed);
                    }
                }
            }
            anyhow::Ok(stream.shutdown().await?)
        };
        if let Err(error) = served.await {
            eprintln!("a server's side of a stream failed: {error:#}");
        }
    }
}

/// The bytes of a stream from a position on. Each byte depends on its position, so a gap, a repeat or an exchange shows.
fn pattern(from: u64, length: usize) -> Vec<u8> {
    (from..from + length as u64).map(|at| (at.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8).collect()
}
