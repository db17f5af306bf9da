//! One health check.

use std::borrow::Cow;
use std::io;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hyper::Uri;
use rustix::net::sockopt::set_tcp_quickack;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpSocket;

use super::{exec, expect, grpc, http, tls};
use crate::address::Address;
use crate::backend::{CheckWay, ConnectFailure, OwnCheck};
use crate::labels::Label as _;
use crate::outgoing::{self, Outgoing};
use crate::proxy_header::OwnHeader;
use crate::stream::Stream;

/// Most bytes of an answer that a check reads.
pub(super) const MOST_READ: usize = 1024 * 1024;

/// How long a server may take to close its side after the check has closed its own. Ringway reads what the server sends
/// meanwhile: closing a socket with unread bytes sends a reset, which servers count against the peer.
pub(super) const PARTING: Duration = Duration::from_millis(200);

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
    /// Where the check comes from; `None`: the kernel decides.
    pub outgoing: Option<Arc<Outgoing>>,
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
    /// Asks the health service of a gRPC server.
    Grpc(Grpc),
    /// Runs a program.
    Exec(Exec),
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

/// Bytes to send and the expected answers: for Redis, SMTP, SSH and similar protocols.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expect {
    /// At least one. All must succeed, in this order.
    pub steps: Vec<Step>,
    /// Sent before the check closes the connection; may be empty.
    pub goodbye: Vec<u8>,
}

/// One exchange of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Sent first; empty if the server speaks first.
    pub send: Vec<u8>,
    /// Bytes that the answer must begin with or contain. Not empty.
    pub expect: Vec<u8>,
    /// True: the answer must begin with `expect`. False: the answer must contain it.
    pub is_prefix: bool,
}

/// A call of the health service of a gRPC server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grpc {
    /// The service to ask for, of at most 127 bytes; empty: the whole server.
    pub service: String,
}

/// A program that checks a backend. Its exit code 0 passes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exec {
    /// The program and its arguments, with `{address}`, `{host}`, `{port}` and `{backend}`. Not empty.
    pub command: Vec<String>,
}

/// The beginning of a TLS handshake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// The server name for which the check asks; `None`: none.
    pub sni: Option<Box<str>>,
    /// The protocols that the check offers, of 1 to 255 bytes each; empty: none.
    pub alpn: Vec<String>,
}

/// Whether the server has given another answer than the one that the last step of a check waits for. More could follow, so that only the timeout
/// tells.
#[derive(Debug, Default)]
pub(super) struct Heard(AtomicBool);

impl Heard {
    pub(super) fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
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

    /// The reason with the number of the step that failed, if there are several. Only the last one can be an answer that says no.
    pub(super) fn of_step(self, number: Option<usize>, is_last: bool) -> Self {
        let text = number.map_or(self.text.clone(), |number| format!("step {number}: {}", self.text).into());
        Self { text, is_answer: self.is_answer && is_last }
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
    /// Ringway could not make the check because it lacks descriptors, memory or ports, or may not use the pool's source
    /// address. This is not the backend's fault
    /// and does not count against it.
    NotDone(ConnectFailure),
}

impl Check {
    /// This check, as a single replica wants it; `None`: none.
    pub(super) fn of(&self, own: &OwnCheck) -> Option<Self> {
        let kind = match (&own.way, &self.kind) {
            (CheckWay::Off, _) => return None,
            (CheckWay::Tcp, _) => Kind::Tcp,
            (CheckWay::Http(path), kind) => {
                // The labels were checked: this is a path.
                let path = path.parse().unwrap_or_default();
                let usual = Http { path: Uri::default(), host: None, status: 200..=399, body: None };
                let http = if let Kind::Http(http) = kind { http.clone() } else { usual };
                Kind::Http(Http { path, ..http })
            }
        };
        Some(Self { kind, port: own.port, ..self.clone() })
    }

    /// Checks the backend `id` at `address`, for at most `timeout`.
    pub(super) async fn run(&self, id: &str, address: &Address, timeout: Duration) -> Outcome {
        let elsewhere = address.ip().zip(self.port).map(|(ip, port)| Address::Ip(SocketAddr::new(ip.ip(), port)));
        let address = elsewhere.as_ref().unwrap_or(address);
        let heard = Heard::default();
        let checked = if let Kind::Exec(exec) = &self.kind {
            let _turn = exec::turn().await;
            within(timeout, exec::run(exec, id, address)).await
        } else {
            within(timeout, self.check(id, address, &heard)).await
        };
        let late = ConnectFailure::Timeout.as_str();
        checked.unwrap_or_else(|| Outcome::Failed(if heard.get() { Reason::answer(late) } else { late.into() }))
    }

    async fn check(&self, id: &str, address: &Address, heard: &Heard) -> Outcome {
        let connected = self.connect(id, address).await.and_then(|stream| {
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
            Kind::Expect(expect) => expect::speak(expect, stream, heard).await,
            Kind::Tls(tls) => tls::speak(tls, stream).await,
            Kind::Grpc(grpc) => grpc::speak(grpc, stream, address).await,
            // It needs no connection: see `run`.
            Kind::Exec(_) => Ok(()),
        };
        match result {
            Ok(()) => Outcome::Passed,
            Err(reason) => Outcome::Failed(reason),
        }
    }

    async fn connect(&self, id: &str, address: &Address) -> io::Result<Stream> {
        let address = match address {
            Address::Ip(address) => *address,
            Address::Unix(path) => return Stream::connect_unix(path).await,
        };
        let prepare = |socket: &TcpSocket| {
            if self.kind == Kind::Tcp {
                // The kernel then delays the last packet of the handshake (tcp(7), TCP_QUICKACK), and the check's reset
                // comes first. The server never accepts the connection: it logs nothing, and MariaDB does not count it as
                // aborted. HAProxy's checks do the same.
                let _ = set_tcp_quickack(socket, false);
            }
        };
        outgoing::connect(address, self.outgoing.as_deref(), id.as_bytes(), prepare).await.map(Stream::Tcp)
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

pub(super) fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    wanted.is_empty() || bytes.windows(wanted.len()).any(|window| window == wanted)
}

/// The start of an answer, for a message.
pub(super) fn start_of(answer: &[u8]) -> String {
    String::from_utf8_lossy(&answer[..answer.len().min(40)]).into_owned()
}

/// Closes gracefully: says goodbye, sends our end of stream, reads what the server still sends, then closes the socket.
pub(super) async fn part(mut stream: Stream, goodbye: Vec<u8>) {
    let _ = tokio::time::timeout(PARTING, async {
        stream.write_all(&goodbye).await?;
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
        let step = Step { send: b"PING".to_vec(), expect: b"PONG".to_vec(), is_prefix: true };
        let expect = Expect { steps: vec![step], goodbye: Vec::new() };
        let check = Check { kind: Kind::Expect(expect), port: None, send_proxy: OwnHeader::Absent, outgoing: None };
        let starve = async {
            tokio::task::yield_now().await;
            std::thread::sleep(Duration::from_secs(1));
        };
        let (outcome, ()) = tokio::join!(check.run("b", &address, Duration::from_millis(400)), starve);
        assert!(matches!(outcome, Outcome::Passed), "{outcome:?}");
    }

    #[tokio::test]
    async fn a_check_fails_after_its_timeout() {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let step = Step { send: Vec::new(), expect: b"x".to_vec(), is_prefix: true };
        let expect = Expect { steps: vec![step], goodbye: Vec::new() };
        let check = Check { kind: Kind::Expect(expect), port: None, send_proxy: OwnHeader::Absent, outgoing: None };
        let began = std::time::Instant::now();
        let outcome = check.run("b", &Address::Ip(silent.local_addr().unwrap()), Duration::from_millis(80)).await;
        assert!(matches!(outcome, Outcome::Failed(ref reason) if **reason == *"timeout"), "{outcome:?}");
        assert!(began.elapsed() >= Duration::from_millis(80));
    }
}
