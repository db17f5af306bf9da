//! One health check.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONNECTION, HOST, USER_AGENT};
use hyper::{Request, Uri};
use tokio::net::TcpStream;

use crate::backend::ConnectFailure;
use crate::http_client::exchange;
use crate::labels::Label as _;

/// Most of an answer that is read; what a heartbeat says does not matter.
const BODY_LIMIT: usize = 1024 * 1024;

/// What one check does.
#[derive(Debug, Clone)]
pub enum Probe {
    /// Connects and closes politely.
    Tcp,
    /// `GET`s this path and expects a status from 200 to 399.
    Http(Uri),
}

/// What one check came to.
#[derive(Debug)]
pub(super) enum Outcome {
    Passed,
    /// What was wrong, in a few words.
    Failed(Arc<str>),
    /// It could not be done for lack of descriptors, memory or ports: our fault, which says nothing about the
    /// backend.
    NotDone(ConnectFailure),
}

impl Probe {
    /// Sets no timeout.
    pub(super) async fn run(&self, address: SocketAddr) -> Outcome {
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
        match self.speak(stream, address).await {
            Ok(()) => Outcome::Passed,
            Err(what) => Outcome::Failed(what),
        }
    }

    async fn speak(&self, stream: TcpStream, address: SocketAddr) -> Result<(), Arc<str>> {
        // A port on which nobody listens may be picked as our own source port: TCP then meets itself.
        if stream.local_addr().ok() == Some(address) {
            return Err(ConnectFailure::Refused.as_str().into());
        }
        let Self::Http(path) = self else { return Ok(()) };
        let request = Request::get(path.clone())
            .header(HOST, address.to_string())
            .header(USER_AGENT, concat!("ringway/", env!("CARGO_PKG_VERSION")))
            .header(CONNECTION, "close")
            .body(Full::<Bytes>::default())
            .map_err(|error| Arc::from(error.to_string()))?;
        let answer = exchange(stream, request, BODY_LIMIT).await.map_err(|error| Arc::from(error.to_string()))?;
        let status = answer.status();
        if status.is_success() || status.is_redirection() {
            Ok(())
        } else {
            Err(format!("status {}", status.as_u16()).into())
        }
    }
}
