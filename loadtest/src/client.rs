//! A client: a connection and the requests on it. The client uses little CPU time, because it runs on the same machine as
//! the balancer.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

/// The protocol of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Protocol {
    /// HTTP/1.1 with keep-alive, `GET /home`
    Http,
    /// 128 bytes that the server echoes
    Echo,
    /// The first message of a TLS client, which the server echoes
    Hello,
}

/// The server name in the message of [`Protocol::Hello`].
pub(crate) const SERVER_NAME: &str = "b.example.com";

/// Bytes of an echo.
const ECHO: usize = 128;

/// The longest head of an answer.
const LONGEST_HEAD: usize = 16 * 1024;

/// Bytes of one read or write in a transfer.
const CHUNK: usize = 256 * 1024;

/// A client that connects on demand.
#[derive(Debug)]
pub(crate) struct Client {
    target: SocketAddr,
    source: Option<IpAddr>,
    protocol: Protocol,
    stream: Option<TcpStream>,
    buffer: BytesMut,
    /// The request is shared, so a request that times out leaves the client intact.
    request: Arc<[u8]>,
    /// The server of the last answer. It stays the same on one connection.
    server: Option<Arc<str>>,
}

/// The head of an answer.
struct Head {
    status: u16,
    length: usize,
}

impl Client {
    /// Creates a client that connects from `source`, or from an address that the system chooses.
    pub(crate) fn new(target: SocketAddr, source: Option<IpAddr>, protocol: Protocol) -> Self {
        let request = match protocol {
            Protocol::Http => format!("GET /home HTTP/1.1\r\nhost: {target}\r\n\r\n").into_bytes(),
            Protocol::Echo => vec![b'r'; ECHO],
            Protocol::Hello => crate::tls::client_hello(SERVER_NAME, &["h2", "http/1.1"]),
        }
        .into();
        Self { target, source, protocol, stream: None, buffer: BytesMut::new(), request, server: None }
    }

    /// Returns the connection, and makes it if necessary.
    pub(crate) async fn connect(&mut self) -> Result<&mut TcpStream, String> {
        let stream = match self.stream.take() {
            Some(stream) => stream,
            None => connect(self.target, self.source).await.map_err(|error| format!("connect: {error}"))?,
        };
        Ok(self.stream.insert(stream))
    }

    /// Sets the source of the next connection.
    pub(crate) fn come_from(&mut self, source: Option<IpAddr>) {
        self.source = source;
    }

    /// Closes the connection.
    pub(crate) fn close(&mut self) {
        self.stream = None;
        self.buffer.clear();
    }

    /// Sends a request and returns the server that answered. An echo does not name its server.
    pub(crate) async fn request(&mut self) -> Result<Arc<str>, String> {
        let request = Arc::clone(&self.request);
        self.write(&request).await?;
        match self.protocol {
            Protocol::Http => {
                let head = self.head().await?;
                self.body(head.length, |_| {}).await?;
                if !(200..300).contains(&head.status) {
                    return Err(format!("status {}", head.status));
                }
            }
            Protocol::Echo | Protocol::Hello => self.echo().await?,
        }
        Ok(Arc::clone(self.server.get_or_insert_with(|| Arc::from("unnamed"))))
    }

    /// Fetches this number of bytes by HTTP (`GET /bytes/…`) and reports the received bytes to `moved`.
    pub(crate) async fn download(&mut self, bytes: usize, moved: impl FnMut(usize)) -> Result<Arc<str>, String> {
        let request = format!("GET /bytes/{bytes} HTTP/1.1\r\nhost: {}\r\n\r\n", self.target);
        self.write(request.as_bytes()).await?;
        let head = self.head().await?;
        let server = self.answered(&head)?;
        self.body(head.length, moved).await?;
        Ok(server)
    }

    /// Sends this number of bytes by HTTP (`POST /sink`) and reports the sent bytes to `moved`.
    pub(crate) async fn upload(&mut self, bytes: usize, mut moved: impl FnMut(usize)) -> Result<Arc<str>, String> {
        let request = format!("POST /sink HTTP/1.1\r\nhost: {}\r\ncontent-length: {bytes}\r\n\r\n", self.target);
        self.write(request.as_bytes()).await?;
        let chunk = vec![b'u'; CHUNK.min(bytes)];
        let mut left = bytes;
        while left > 0 {
            let stream = self.connect().await?;
            let written = stream.write(&chunk[..left.min(CHUNK)]).await.map_err(|error| error.to_string())?;
            moved(written);
            left -= written;
        }
        let head = self.head().await?;
        self.body(head.length, |_| {}).await?;
        self.answered(&head)
    }

    /// Sends this number of bytes on a new connection, reads them back at the same time, and compares them. Reports the
    /// received bytes to `moved`.
    pub(crate) async fn exchange(&mut self, bytes: usize, mut moved: impl FnMut(usize)) -> Result<Arc<str>, String> {
        let mut stream = connect(self.target, self.source).await.map_err(|error| format!("connect: {error}"))?;
        let (mut reader, mut writer) = stream.split();
        let pattern: Vec<u8> = (0..CHUNK).map(|n| (n % 251) as u8).collect();
        let writing = async {
            let mut left = bytes;
            while left > 0 {
                let chunk = &pattern[..left.min(CHUNK)];
                writer.write_all(chunk).await?;
                left -= chunk.len();
            }
            writer.shutdown().await
        };
        let reading = async {
            let (mut got, mut buffer) = (0, vec![0; CHUNK]);
            loop {
                let n = reader.read(&mut buffer).await?;
                if n == 0 {
                    break;
                }
                // `at` is the position in the pattern. The pattern repeats.
                let (mut piece, mut at) = (&buffer[..n], got % CHUNK);
                while !piece.is_empty() {
                    let same = piece.len().min(CHUNK - at);
                    if piece[..same] != pattern[at..at + same] {
                        return Err(std::io::Error::other("the response differs from the request"));
                    }
                    (piece, at) = (&piece[same..], 0);
                }
                got += n;
                moved(n);
            }
            if got == bytes { Ok(()) } else { Err(std::io::Error::other(format!("{got} of {bytes} bytes came back"))) }
        };
        tokio::try_join!(writing, reading).map_err(|error| error.to_string())?;
        Ok(Arc::from("transfer"))
    }

    /// Whether the connection is open. Does not wait.
    pub(crate) fn is_open(&self) -> bool {
        let mut byte = [0];
        self.stream.as_ref().is_some_and(|stream| match stream.try_read(&mut byte) {
            Ok(n) => n > 0,
            Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
        })
    }

    fn answered(&self, head: &Head) -> Result<Arc<str>, String> {
        if !(200..300).contains(&head.status) {
            return Err(format!("status {}", head.status));
        }
        Ok(self.server.clone().unwrap_or_else(|| Arc::from("unnamed")))
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.connect().await?.write_all(bytes).await.map_err(|error| error.to_string())
    }

    async fn echo(&mut self) -> Result<(), String> {
        let length = self.request.len();
        while self.buffer.len() < length {
            self.fill().await?;
        }
        let same = self.buffer[..length] == self.request[..];
        self.buffer.advance(length);
        if same { Ok(()) } else { Err("the response differs from the request".to_owned()) }
    }

    /// Reads the head of an answer.
    async fn head(&mut self) -> Result<Head, String> {
        loop {
            let mut fields = [httparse::EMPTY_HEADER; 32];
            let mut answer = httparse::Response::new(&mut fields);
            let parsed = answer.parse(&self.buffer).map_err(|error| format!("invalid HTTP response: {error}"))?;
            if let httparse::Status::Complete(end) = parsed {
                let field = |name: &str| {
                    let field = answer.headers.iter().find(|field| field.name.eq_ignore_ascii_case(name))?;
                    std::str::from_utf8(field.value).ok()
                };
                let length = field("content-length").and_then(|length| length.trim().parse().ok());
                let length = length.ok_or("an answer without a content-length")?;
                let server = field("x-server").unwrap_or("unnamed");
                if self.server.as_deref() != Some(server) {
                    self.server = Some(Arc::from(server));
                }
                let status = answer.code.unwrap_or(0);
                self.buffer.advance(end);
                return Ok(Head { status, length });
            }
            if self.buffer.len() > LONGEST_HEAD {
                return Err("response head is too long".to_owned());
            }
            self.fill().await?;
        }
    }

    /// Reads a body of this length and discards it.
    async fn body(&mut self, length: usize, mut moved: impl FnMut(usize)) -> Result<(), String> {
        let mut left = length;
        loop {
            let here = self.buffer.len().min(left);
            self.buffer.advance(here);
            moved(here);
            left -= here;
            if left == 0 {
                return Ok(());
            }
            self.buffer.reserve(left.min(CHUNK));
            self.fill().await?;
        }
    }

    async fn fill(&mut self) -> Result<(), String> {
        self.buffer.reserve(1024);
        let Some(stream) = &mut self.stream else { return Err("no connection".to_owned()) };
        match stream.read_buf(&mut self.buffer).await {
            Ok(0) => Err("closed before the answer".to_owned()),
            Ok(_) => Ok(()),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// Connects from this address, or from an address that the system chooses.
pub(crate) async fn connect(target: SocketAddr, source: Option<IpAddr>) -> std::io::Result<TcpStream> {
    let stream = match source {
        None => TcpStream::connect(target).await?,
        Some(source) => {
            let socket = if source.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
            socket.bind(SocketAddr::new(source, 0))?;
            socket.connect(target).await?
        }
    };
    stream.set_nodelay(true)?;
    Ok(stream)
}
