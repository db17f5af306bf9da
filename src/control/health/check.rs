//! One health check.

use std::borrow::Cow;
use std::io;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::pin::pin;
use std::time::Duration;

use hyper::Uri;
use rustix::net::sockopt::set_tcp_quickack;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpSocket;

use super::{http, tls};
use crate::address::Address;
use crate::backend::ConnectFailure;
use crate::labels::Label as _;
use crate::proxy_header::OwnHeader;
use crate::stream::Stream;

/// Most bytes of an answer that a check reads.
pub(super) const MOST_READ: usize = 1024 * 1024;

/// How long a server may take to close its side after the check has closed its own. Ringway reads what the server sends
/// meanwhile: closing a socket with unread bytes sends a reset, which servers count against the peer.
const PARTING: Duration = Duration::from_millis(200);

/// Parts of a check's timeout. Each counts once, however long it took: see [`within`].
const PARTS: u32 = 8;

/// A health check: what it does, and on which port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// What the check sends and expects.
    pub kind: Kind,
    /// Port to check; `None`: the backend's own port. A Unix socket has none.
    pub port: Option<u16>,
    /// The PROXY header that a check sends first. A `tcp` check sends nothing.
    pub send_proxy: OwnHeader,
}

/// What a check sends and expects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Lets the kernel connect, and resets the connection before the server accepts it. On a Unix socket, the server
    /// accepts the connection and sees its end.
    Tcp,
    /// Sends an HTTP `GET`.
    Http(Http),
    /// Sends bytes and expects bytes.
    Expect(Expect),
    /// Begins a TLS handshake.
    Tls(Tls),
}

/// An HTTP `GET` and the expected answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Http {
    /// Path and query.
    pub path: Uri,
    /// The header `host`; `None`: the backend's address, or `localhost` for a Unix socket.
    pub host: Option<String>,
    /// Statuses that pass.
    pub status: RangeInclusive<u16>,
    /// Text that the first MiB of the body must contain; `None`: the check does not read the body.
    pub body: Option<String>,
}

/// Bytes to send and the expected answer: for Redis, SMTP, SSH and similar protocols.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expect {
    /// Sent right after the connect; may be empty if the server speaks first.
    pub send: Vec<u8>,
    /// Bytes that the answer must begin with or contain.
    pub expect: Vec<u8>,
    /// True: the answer must begin with `expect`. False: the answer must contain it.
    pub is_prefix: bool,
}

/// The beginning of a TLS handshake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// The server name for which the check asks; `None`: none.
    pub sni: Option<Box<str>>,
    /// The protocols that the check offers, of 1 to 255 bytes each; empty: none.
    pub alpn: Vec<String>,
}

/// Why a check failed, in a few words.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reason {
    text: Cow<'static, str>,
    /// The server answered, but not as the check expects. In an exclusive pool, such a server is on standby.
    pub(super) is_answer: bool,
}

impl Reason {
    /// The server gave this answer in place of the expected one.
    pub(super) fn answer(text: impl Into<Cow<'static, str>>) -> Self {
        Self { text: text.into(), is_answer: true }
    }
}

impl<T: Into<Cow<'static, str>>> From<T> for Reason {
    fn from(text: T) -> Self {
        Self { text: text.into(), is_answer: false }
    }
}

impl std::ops::Deref for Reason {
    type Target = str;

    fn deref(&self) -> &str {
        &self.text
    }
}

/// The result of one check.
#[derive(Debug)]
pub(super) enum Outcome {
    Passed,
    /// A short reason.
    Failed(Reason),
    /// Ringway could not make the check because it lacks descriptors, memory or ports. This is not the backend's fault
    /// and does not count against it.
    NotDone(ConnectFailure),
}

impl Check {
    /// Checks the backend at `address`, for at most `timeout`.
    pub(super) async fn run(&self, address: &Address, timeout: Duration) -> Outcome {
        let elsewhere = address.ip().zip(self.port).map(|(ip, port)| Address::Ip(SocketAddr::new(ip.ip(), port)));
        let checked = within(timeout, self.check(elsewhere.as_ref().unwrap_or(address))).await;
        checked.unwrap_or_else(|| Outcome::Failed(ConnectFailure::Timeout.as_str().into()))
    }

    async fn check(&self, address: &Address) -> Outcome {
        let connected = self.kind.connect(address).await.and_then(|stream| {
            let own = if self.kind == Kind::Tcp { OwnHeader::Absent } else { self.send_proxy };
            let header = own.bytes(|| stream.ends());
            if !header.is_empty() {
                stream.send_first(&header)?;
                // What follows must not wait until the header is acknowledged.
                stream.set_nodelay();
            }
            Ok(stream)
        });
        let stream = match connected {
            Ok(stream) => stream,
            Err(error) => {
                let failure = ConnectFailure::of(&error);
                return match failure {
                    _ if failure.is_ours() => Outcome::NotDone(failure),
                    ConnectFailure::Other => Outcome::Failed(error.to_string().into()),
                    _ => Outcome::Failed(failure.as_str().into()),
                };
            }
        };
        let result = match &self.kind {
            Kind::Tcp => {
                stream.reset_on_close();
                Ok(())
            }
            Kind::Http(http) => http::speak(http, stream, address).await,
            Kind::Expect(expect) => expect.speak(stream).await,
            Kind::Tls(tls) => tls::speak(tls, stream).await,
        };
        match result {
            Ok(()) => Outcome::Passed,
            Err(reason) => Outcome::Failed(reason),
        }
    }
}

impl Kind {
    async fn connect(&self, address: &Address) -> io::Result<Stream> {
        let address = match address {
            Address::Ip(address) => *address,
            Address::Unix(path) => return Stream::connect_unix(path).await,
        };
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        if *self == Self::Tcp {
            // The kernel then delays the last packet of the handshake (tcp(7), TCP_QUICKACK), and the check's reset comes
            // first. The server never accepts the connection: it logs nothing, and MariaDB does not count it as aborted.
            // HAProxy's checks do the same.
            let _ = set_tcp_quickack(&socket, false);
        }
        let stream = socket.connect(address).await?;
        // The system may pick a port on which nobody listens as our own source port: TCP then connects to itself.
        if stream.local_addr().ok() == Some(address) {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        Ok(Stream::Tcp(stream))
    }
}

/// Runs a check for at most `timeout` of the time in which this thread runs when it should. While Ringway is late (its
/// machine was paused, its processors are busy), an answer may have arrived that it could not read: a late part counts
/// only once, and each part begins with a look at the connection.
async fn within<T>(timeout: Duration, check: impl Future<Output = T>) -> Option<T> {
    let mut check = pin!(check);
    for _ in 0..PARTS {
        if let Ok(done) = tokio::time::timeout(timeout / PARTS, check.as_mut()).await {
            return Some(done);
        }
    }
    None
}

impl Expect {
    async fn speak(&self, mut stream: Stream) -> Result<(), Reason> {
        let broke = |error: std::io::Error| -> Reason { error.to_string().into() };
        stream.write_all(&self.send).await.map_err(broke)?;
        let mut answer = Vec::new();
        loop {
            let before = answer.len();
            let read = stream.read_buf(&mut answer).await.map_err(broke)?;
            let is_right = if self.is_prefix {
                answer.starts_with(&self.expect)
            } else {
                // Search only the new bytes, plus the end of the old ones where a match may begin.
                contains(&answer[before.saturating_sub(self.expect.len())..], &self.expect)
            };
            let can_become_right = !self.is_prefix || self.expect.starts_with(&answer);
            if is_right {
                tokio::spawn(part(stream));
                return Ok(());
            }
            if read == 0 || answer.len() > MOST_READ || !can_become_right {
                tokio::spawn(part(stream));
                let text = format!("unexpected answer {:?}", start_of(&answer));
                return Err(if answer.is_empty() { text.into() } else { Reason::answer(text) });
            }
        }
    }
}

pub(super) fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    wanted.is_empty() || bytes.windows(wanted.len()).any(|window| window == wanted)
}

/// The start of an answer, for a message.
pub(super) fn start_of(answer: &[u8]) -> String {
    String::from_utf8_lossy(&answer[..answer.len().min(40)]).into_owned()
}

/// Closes gracefully: sends our end of stream, reads what the server still sends, then closes the socket.
pub(super) async fn part(mut stream: Stream) {
    let _ = tokio::time::timeout(PARTING, async {
        stream.shutdown().await?;
        let mut rest = vec![0; 4096];
        while stream.read(&mut rest).await? > 0 {}
        std::io::Result::Ok(())
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both timers of a check are due when the thread runs again, but the server has had no time to answer.
    #[tokio::test]
    async fn a_check_is_not_late_because_its_thread_was() {
        let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::Ip(server.local_addr().unwrap());
        std::thread::spawn(move || {
            use std::io::{Read as _, Write as _};
            let (mut stream, _) = server.accept().unwrap();
            let mut request = [0; 4];
            stream.read_exact(&mut request).unwrap();
            std::thread::sleep(Duration::from_millis(20));
            stream.write_all(b"PONG").unwrap();
        });
        let expect = Expect { send: b"PING".to_vec(), expect: b"PONG".to_vec(), is_prefix: true };
        let check = Check { kind: Kind::Expect(expect), port: None, send_proxy: OwnHeader::Absent };
        let starve = async {
            tokio::task::yield_now().await;
            std::thread::sleep(Duration::from_secs(1));
        };
        let (outcome, ()) = tokio::join!(check.run(&address, Duration::from_millis(400)), starve);
        assert!(matches!(outcome, Outcome::Passed), "{outcome:?}");
    }

    #[tokio::test]
    async fn a_check_fails_after_its_timeout() {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let expect = Expect { send: Vec::new(), expect: b"x".to_vec(), is_prefix: true };
        let check = Check { kind: Kind::Expect(expect), port: None, send_proxy: OwnHeader::Absent };
        let began = std::time::Instant::now();
        let outcome = check.run(&Address::Ip(silent.local_addr().unwrap()), Duration::from_millis(80)).await;
        assert!(matches!(outcome, Outcome::Failed(ref reason) if **reason == *"timeout"), "{outcome:?}");
        assert!(began.elapsed() >= Duration::from_millis(80));
    }
}
