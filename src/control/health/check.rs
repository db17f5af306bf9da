//! One health check.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONNECTION, HOST, USER_AGENT};
use hyper::{Request, Uri};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::backend::ConnectFailure;
use crate::http_client::exchange;
use crate::labels::Label as _;

/// Most bytes of an answer that a check reads.
const MOST_READ: usize = 1024 * 1024;

/// How long a server may take to close its side after the check has closed its own. Ringway reads what the server sends
/// meanwhile: closing a socket with unread bytes sends a reset, which servers count against the peer.
const PARTING: Duration = Duration::from_millis(200);

/// A health check: what it does, and on which port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// What the check sends and expects.
    pub kind: Kind,
    /// Port to check; `None`: the backend's own port.
    pub port: Option<u16>,
}

/// What a check sends and expects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Connects and closes the connection gracefully. Sends nothing.
    Tcp,
    /// Sends an HTTP `GET`.
    Http(Http),
    /// Sends bytes and expects bytes.
    Expect(Expect),
}

/// An HTTP `GET` and the expected answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Http {
    /// Path and query.
    pub path: Uri,
    /// The header `host`; `None`: the backend's address.
    pub host: Option<String>,
    /// Statuses that pass.
    pub status: RangeInclusive<u16>,
    /// Text that the body must contain.
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

/// The result of one check.
#[derive(Debug)]
pub(super) enum Outcome {
    Passed,
    /// A short reason.
    Failed(Arc<str>),
    /// Ringway could not make the check because it lacks descriptors, memory or ports. This is not the backend's fault
    /// and does not count against it.
    NotDone(ConnectFailure),
}

impl Check {
    /// Checks the backend at `address`, for at most `timeout`.
    pub(super) async fn run(&self, address: SocketAddr, timeout: Duration) -> Outcome {
        let address = self.port.map_or(address, |port| SocketAddr::new(address.ip(), port));
        let checked = tokio::time::timeout(timeout, self.check(address)).await;
        checked.unwrap_or_else(|_elapsed| Outcome::Failed(ConnectFailure::Timeout.as_str().into()))
    }

    async fn check(&self, address: SocketAddr) -> Outcome {
        let stream = match TcpStream::connect(address).await {
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
        // The system may pick a port on which nobody listens as our own source port: TCP then connects to itself.
        if stream.local_addr().ok() == Some(address) {
            return Outcome::Failed(ConnectFailure::Refused.as_str().into());
        }
        let result = match &self.kind {
            Kind::Tcp => {
                tokio::spawn(part(stream));
                Ok(())
            }
            Kind::Http(http) => http.speak(stream, address).await,
            Kind::Expect(expect) => expect.speak(stream).await,
        };
        match result {
            Ok(()) => Outcome::Passed,
            Err(reason) => Outcome::Failed(reason),
        }
    }
}

impl Http {
    async fn speak(&self, stream: TcpStream, address: SocketAddr) -> Result<(), Arc<str>> {
        let request = Request::get(self.path.clone())
            .header(HOST, self.host.clone().unwrap_or_else(|| address.to_string()))
            .header(USER_AGENT, concat!("ringway/", env!("CARGO_PKG_VERSION")))
            .header(CONNECTION, "close")
            .body(Full::<Bytes>::default())
            .map_err(|error| Arc::from(error.to_string()))?;
        let answer = exchange(stream, request, MOST_READ).await.map_err(|error| Arc::from(error.to_string()))?;
        let status = answer.status().as_u16();
        if !self.status.contains(&status) {
            return Err(format!("status {status}").into());
        }
        match &self.body {
            Some(text) if !contains(answer.body(), text.as_bytes()) => Err("the body lacks the expected text".into()),
            _ => Ok(()),
        }
    }
}

impl Expect {
    async fn speak(&self, mut stream: TcpStream) -> Result<(), Arc<str>> {
        let broke = |error: std::io::Error| -> Arc<str> { error.to_string().into() };
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
                let begin = String::from_utf8_lossy(&answer[..answer.len().min(40)]).into_owned();
                tokio::spawn(part(stream));
                return Err(format!("unexpected answer {begin:?}").into());
            }
        }
    }
}

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    wanted.is_empty() || bytes.windows(wanted.len()).any(|window| window == wanted)
}

/// Closes gracefully: sends our end of stream, reads what the server still sends, then closes the socket.
async fn part(mut stream: TcpStream) {
    let _ = tokio::time::timeout(PARTING, async {
        stream.shutdown().await?;
        let mut rest = vec![0; 4096];
        while stream.read(&mut rest).await? > 0 {}
        std::io::Result::Ok(())
    })
    .await;
}
