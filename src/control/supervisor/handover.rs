//! What one Ringway hands over to the next during an upgrade, and when its supervisors act on it.

use std::io::{self, PipeReader};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use socket2::Socket;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::plan::{Place, Role};
use super::rollout::{PendingOrder, Refused, RolloutStatus};
use super::scaling::ScalingStatus;
use crate::address::Address;

/// Asks a supervisor to pause and to hand its replicas over to another process.
#[derive(Debug)]
pub struct Handover {
    /// Receives copies of the replicas' handles, or the error that prevented the copies.
    pub handed: oneshot::Sender<io::Result<Vec<Handed>>>,
    /// True: the other process has taken over. Otherwise the supervisor continues.
    pub decision: oneshot::Receiver<bool>,
}

/// What reaches a supervisor from outside its pool.
#[derive(Debug)]
pub struct Signals {
    /// True once the older Ringway has no connections to the replicas that this one took over.
    pub settled: watch::Receiver<bool>,
    /// Requests of a newer Ringway to take over.
    pub handovers: mpsc::Receiver<Handover>,
    /// Orders about the rollout.
    pub orders: mpsc::Receiver<PendingOrder>,
    /// What a rollout of an old Ringway has failed with.
    pub refused: Option<Refused>,
    /// Where the supervisor shows its rollouts.
    pub rollout: Arc<RolloutStatus>,
    /// Where the supervisor shows how it scales the pool, and learns of connections that wait.
    pub scaling: Arc<ScalingStatus>,
}

impl Handover {
    /// Hands over the replicas and waits for the decision. Returns whether the other process has taken over.
    pub(super) async fn decide(self, handed: io::Result<Vec<Handed>>, stop: &CancellationToken) -> bool {
        // The requester may have given up.
        let _ = self.handed.send(handed);
        matches!(stop.run_until_cancelled(self.decision).await, Some(Ok(true)))
    }
}

/// What a replica is to its slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// It fills the slot.
    Current,
    /// It comes next.
    Next,
    /// It has filled the slot before, and lets its connections end.
    Former,
}

impl Part {
    /// A slot and a part of it as one text, like `echo-1/next`. An older Ringway knows no slot of such a name, and lets the replica go.
    pub fn of_slot(self, slot: &str) -> String {
        match self {
            Self::Current => slot.to_owned(),
            Self::Next => format!("{slot}/next"),
            Self::Former => format!("{slot}/former"),
        }
    }

    /// Reads the text of [`Part::of_slot`]. Returns the slot too.
    pub fn parse(text: &str) -> (&str, Self) {
        match text.rsplit_once('/') {
            Some((slot, "next")) => (slot, Self::Next),
            Some((slot, "former")) => (slot, Self::Former),
            _ => (text, Self::Current),
        }
    }
}

/// A replica as one Ringway hands it over to the next. The sockets are copies.
#[derive(Debug)]
pub struct Handed {
    /// Its pool.
    pub pool: String,
    /// Its slot.
    pub slot: Arc<str>,
    /// Whether it fills the slot, or stands beside it.
    pub part: Part,
    /// Its process id.
    pub pid: u32,
    /// Where it listens.
    pub address: Address,
    /// The spec that it was started from.
    pub spec: Arc<Spec>,
    /// Ringway's end of its lifeline.
    pub lifeline: UnixStream,
    /// The pipe with its output.
    pub output: PipeReader,
    /// The socket that reserves its port; `None` if it listens on a Unix socket.
    pub port: Option<Socket>,
}

impl Handed {
    /// The seat of the replica, in the slot with this number, from 1.
    pub(super) fn place(&self, number: u32) -> Place {
        let role = if self.part == Part::Current { Role::Front } else { Role::Beside };
        Place { slot: number as usize - 1, role }
    }
}

/// Placeholder for the port on which a replica listens.
pub const PORT: &str = "{port}";

/// Placeholder for the path of the Unix socket on which a replica listens.
pub const SOCKET: &str = "{socket}";

/// Placeholder for the name of a replica's slot.
pub const SLOT: &str = "{slot}";

/// What a replica is started from. A replica with a different spec is outdated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// Program and arguments, with the placeholder [`PORT`] or [`SOCKET`], and [`SLOT`]. The program `ringway` is the
    /// launcher.
    pub command: Vec<String>,
    /// Additional environment variables, with the same placeholders.
    pub env: Vec<(String, String)>,
}

impl Spec {
    /// Whether the command or a variable has this placeholder.
    pub fn mentions(&self, placeholder: &str) -> bool {
        let values = self.env.iter().map(|(_, value)| value);
        self.command.iter().chain(values).any(|text| text.contains(placeholder))
    }

    /// Whether replicas listen on Unix sockets.
    pub fn uses_sockets(&self) -> bool {
        self.mentions(SOCKET)
    }
}
