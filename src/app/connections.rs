//! Open connections in an upgrade: the messages between the old process, which offers them, and its successor, which takes them over.
//!
//! They begin once the successor serves. The old process offers a batch, and the successor answers what it has taken. Nothing has a timeout:
//! as long as the successor may still answer, the old process cannot know who has a connection. If the successor dies before its answer,
//! the old process goes on with the connections of the batch.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::handover::{Channel, MOST_DESCRIPTORS, Message};
use crate::proxy::{HandOver, Packed, Record, TakeOver};

/// The version of these messages. A successor that does not know the version of a batch takes no connection of it.
const VERSION: u32 = 1;

/// Descriptors of a connection: two sockets, and two ends of a pipe for each direction.
const MOST_OF_ONE: usize = 6;

/// Connections in a batch. Their descriptors fit in one message, with that of their bytes. The old process has closed its listeners and its
/// side port, so it has that many to spare.
const BATCH: usize = (MOST_DESCRIPTORS - 1) / MOST_OF_ONE;

/// Pause before connections that have not been handed over are offered again. It doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A batch of connections. An empty one asks how many the successor has room for.
#[derive(Debug, Serialize, Deserialize)]
struct Offer {
    version: u32,
    connections: Vec<Record>,
    /// Whether the last descriptor is a file with the bytes that the connections hold.
    has_bytes: bool,
}

/// The successor's answer to a batch.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Answer {
    /// Which connections it has taken. Those that are missing stay with the old process.
    taken: Vec<bool>,
    /// For how many more it has room.
    room: usize,
}

/// What has become of the open connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HandedOver {
    /// Those that the successor has taken.
    pub(super) taken: usize,
    /// Those that it has refused.
    pub(super) refused: usize,
}

impl fmt::Display for HandedOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "open connections: {} go on there", self.taken)?;
        if self.refused > 0 { write!(f, ", {} finish in the old process", self.refused) } else { Ok(()) }
    }
}

/// Offers all open connections to the successor, again and again until none is left or the successor ends. `first` gets the result once
/// each has been offered once.
pub(super) fn hand_over(channel: &Channel, proxy: &HandOver, first: oneshot::Sender<HandedOver>) {
    let mut first = Some(first);
    let mut sum = HandedOver { taken: 0, refused: 0 };
    let mut pause = FIRST_PAUSE;
    loop {
        let before = sum.taken;
        match offer_all(channel, proxy) {
            // No worker runs.
            Ok(None) => break,
            Ok(Some(HandedOver { taken, refused })) => sum = HandedOver { taken: sum.taken + taken, refused },
            Err(error) => {
                tracing::warn!(%error, "the successor takes no more connections: the others finish in this process");
                break;
            }
        }
        if let Some(first) = first.take() {
            // The one who waits may have gone.
            let _ = first.send(sum);
        }
        if sum.taken > before {
            pause = FIRST_PAUSE;
        }
        std::thread::sleep(pause);
        pause = (2 * pause).min(LONGEST_PAUSE);
    }
    tracing::info!(connections = sum.taken, "connections handed over");
}

/// Offers each connection once; `None`: no worker runs any more.
fn offer_all(channel: &Channel, proxy: &HandOver) -> io::Result<Option<HandedOver>> {
    let mut sum = HandedOver { taken: 0, refused: 0 };
    let mut room = ask(channel, Vec::new(), &[])?.room;
    let mut runs = false;
    for worker in 0..proxy.workers() {
        let mut from = Some(0);
        while let Some(at) = from
            && room > 0
        {
            let Some(batch) = proxy.offer(worker, at, BATCH.min(room)) else { break };
            runs = true;
            from = batch.next;
            if batch.offered.is_empty() {
                continue;
            }
            // On an error, the connections go on here, because nobody decides.
            let (packed, decisions): (Vec<_>, Vec<_>) =
                batch.offered.into_iter().map(|one| (one.packed, one.is_taken)).unzip();
            let answer = offer(channel, packed)?;
            room = answer.room;
            for (n, decision) in decisions.into_iter().enumerate() {
                let is_taken = answer.taken.get(n).copied().unwrap_or(false);
                *if is_taken { &mut sum.taken } else { &mut sum.refused } += 1;
                // A worker that has ended has closed its connections.
                let _ = decision.send(is_taken);
            }
        }
        // Without room, nobody was asked.
        runs |= room == 0;
    }
    Ok(runs.then_some(sum))
}

/// Offers connections, and waits for the answer.
fn offer(channel: &Channel, packed: Vec<Packed>) -> io::Result<Answer> {
    let (mut connections, mut descriptors, mut bytes) = (Vec::new(), Vec::new(), Vec::new());
    for one in packed {
        connections.push(one.record);
        descriptors.extend(one.descriptors);
        bytes.extend(one.bytes);
    }
    if !bytes.is_empty() {
        match file_with(&bytes) {
            Ok(file) => descriptors.push(file),
            Err(error) => {
                // They are offered again later.
                tracing::debug!(%error, "no file for the held bytes of connections");
                return Ok(Answer { taken: Vec::new(), room: BATCH });
            }
        }
    }
    // Dropped only after the answer: the copies keep the sockets open on their way.
    ask(channel, connections, &descriptors)
}

/// A file in memory with these bytes.
fn file_with(bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create("held bytes", MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file.into())
}

fn ask(channel: &Channel, connections: Vec<Record>, descriptors: &[OwnedFd]) -> io::Result<Answer> {
    let in_all: usize = connections.iter().map(Record::descriptors).sum();
    let offer = Offer { version: VERSION, connections, has_bytes: descriptors.len() > in_all };
    let text = serde_json::to_string(&offer).map_err(io::Error::other)?;
    channel.send(&text, &descriptors.iter().map(|descriptor| descriptor.as_fd()).collect::<Vec<_>>())?;
    let mut received = channel.receive();
    // If the successor has ended without reading all, the first read reports that, and the next one its last answer.
    if received.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset) {
        received = channel.receive();
    }
    let message = received?.ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "it has ended"))?;
    serde_json::from_str(&message.text).map_err(io::Error::other)
}

/// Takes over the connections that the old process offers, until it ends. Returns their number.
pub(super) fn take_over(channel: &Channel, proxy: &TakeOver) -> usize {
    let mut sum = 0;
    loop {
        let packed = match channel.receive() {
            Ok(Some(message)) => unpack(message),
            // Not all of its descriptors fit in this process.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(error),
            Ok(None) | Err(_) => return sum,
        };
        let packed = packed.unwrap_or_else(|error| {
            tracing::warn!(%error, "connections stay with the old process");
            Vec::new()
        });
        let arrived = proxy.take(packed);
        let taken = arrived.taken.iter().filter(|&&taken| taken).count();
        let answer = Answer { taken: arrived.taken.clone(), room: proxy.room() };
        let text = serde_json::to_string(&answer).unwrap_or_default();
        // If the old process has ended meanwhile, nobody else has the connections.
        let _ = channel.send(&text, &[]);
        arrived.go();
        sum += taken;
    }
}

/// The connections of a message.
fn unpack(message: Message) -> io::Result<Vec<Packed>> {
    let Offer { version, connections, has_bytes } = serde_json::from_str(&message.text).map_err(io::Error::other)?;
    if version != VERSION {
        return Err(io::Error::other(format!(
            "the old process offers them in version {version}, and this one knows version {VERSION}"
        )));
    }
    let mut descriptors = message.descriptors;
    let mut bytes = Vec::new();
    if has_bytes {
        let file = descriptors.pop().ok_or(io::ErrorKind::InvalidData)?;
        File::from(file).read_to_end(&mut bytes)?;
    }
    let (mut descriptors, mut bytes) = (descriptors.into_iter(), bytes.into_iter());
    let packed = connections.into_iter().map(|record| {
        let (of_one, held) = (record.descriptors(), record.bytes());
        let descriptors = descriptors.by_ref().take(of_one).collect();
        Packed { record, descriptors, bytes: bytes.by_ref().take(held).collect() }
    });
    Ok(packed.collect())
}

/// Starts [`hand_over`] on a thread of its own.
///
/// # Errors
/// When the system has no thread.
pub(super) fn start_to_hand_over(channel: Arc<Channel>, proxy: HandOver) -> io::Result<oneshot::Receiver<HandedOver>> {
    let (first, result) = oneshot::channel();
    std::thread::Builder::new().name("hand-over".to_owned()).spawn(move || hand_over(&channel, &proxy, first))?;
    Ok(result)
}
