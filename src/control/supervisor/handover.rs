//! What one Ringway hands over to the next during an upgrade, and when its supervisors act on it.

use std::io::{self, PipeReader};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use socket2::Socket;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

/// Asks a supervisor to pause and to hand its replicas over to another process.
#[derive(Debug)]
pub struct Handover {
    /// Receives copies of the replicas' handles, or the error that prevented the copies.
    pub handed: oneshot::Sender<io::Result<Vec<Handed>>>,
    /// True: the other process has taken over. Otherwise the supervisor continues.
    pub decision: oneshot::Receiver<bool>,
}

/// Signals of upgrades, in which a supervisor must hold back because of another Ringway.
#[derive(Debug)]
pub struct Resting {
    /// True once the older Ringway has no connections to the replicas that this one took over.
    pub settled: watch::Receiver<bool>,
    /// Requests of a newer Ringway to take over.
    pub handovers: mpsc::Receiver<Handover>,
}

impl Handover {
    /// Hands over the replicas and waits for the decision. Returns whether the other process has taken over.
    pub(super) async fn decide(self, handed: io::Result<Vec<Handed>>, stop: &CancellationToken) -> bool {
        // The requester may have given up.
        let _ = self.handed.send(handed);
        matches!(stop.run_until_cancelled(self.decision).await, Some(Ok(true)))
    }
}

/// A replica as one Ringway hands it over to the next. The sockets are copies.
#[derive(Debug)]
pub struct Handed {
    /// Its pool.
    pub pool: String,
    /// Its slot.
    pub slot: Arc<str>,
    /// Its process id.
    pub pid: u32,
    /// Where it listens.
    pub address: SocketAddr,
    /// The spec that it was started from.
    pub spec: Arc<Spec>,
    /// Ringway's end of its lifeline.
    pub lifeline: UnixStream,
    /// The pipe with its output.
    pub output: PipeReader,
    /// The socket that reserves its port.
    pub port: Socket,
}

/// What a replica is started from. A replica with a different spec is outdated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// Program and arguments, with the placeholders `{port}` and `{slot}`. The program `ringway` is the launcher.
    pub command: Vec<String>,
    /// Additional environment variables, with the same placeholders.
    pub env: Vec<(String, String)>,
}
