//! Open connections in an upgrade: the messages between the old process, which offers them, and its successor, which takes them over.
//!
//! They begin once the successor serves. The old process offers a batch, and the successor answers what it has taken. Nothing has a timeout:
//! as long as the successor may still answer, the old process cannot know who has a connection. If the successor dies before its answer,
//! the old process goes on with the connections of the batch.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::ops::RangeInclusive;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::handover::{Channel, MOST_DESCRIPTORS, Message};
use crate::proxy::{HandOver, Packed, Record, TakeOver};

/// The version of these messages. A successor that does not know the version of a batch takes no connection of it.
const VERSION: u32 = 1;

/// Descriptors of a connection: two sockets, and two ends of a pipe for each direction.
const MOST_OF_ONE: usize = 6;

/// Connections in a batch. Their descriptors fit in one message, with that of their bytes. If the old process has not enough free descriptors
/// for their duplicates, some of them are offered later.
const BATCH: usize = (MOST_DESCRIPTORS - 1) / MOST_OF_ONE;

/// Pauses before connections that have not been handed over are offered again: a part of the time since the first offer. What the successor
/// has refused for a minute, it will hardly take, and an offer lets a connection stand still.
const PAUSES: RangeInclusive<Duration> = Duration::from_millis(20)..=Duration::from_secs(30);
const PART: u32 = 8;

/// Longest pause if the successor has no room. Then it is only asked for room.
const WITHOUT_ROOM: Duration = Duration::from_secs(1);

/// A batch of connections. An empty one asks how many the successor has room for.
#[derive(Debug, Serialize, Deserialize)]
struct Offer {
    version: u32,
    /// Counts the batches.
    number: u64,
    connections: Vec<Record>,
    /// Whether the last descriptor is a file with the bytes that the connections hold.
    has_bytes: bool,
}

/// The successor's answer to a batch.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Answer {
    /// The number of the batch.
    number: u64,
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
    /// Those that are still open in the old process.
    pub(super) left: usize,
}

impl fmt::Display for HandedOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "open connections: {} go on there", self.taken)?;
        if self.left > 0 { write!(f, ", {} are in the old process", self.left) } else { Ok(()) }
    }
}

/// Offers all open connections to the successor, again and again until none is left or the successor ends. `first` gets the result once
/// each has been offered once.
pub(super) fn hand_over(channel: &Channel, proxy: &HandOver, first: oneshot::Sender<HandedOver>) {
    let mut first = Some(first);
    let mut line = Line { channel, number: 0, room: 0 };
    let began = Instant::now();
    loop {
        let open = proxy.open();
        let taken = match offer_all(&mut line, proxy) {
            Ok(taken) => taken,
            Err(error) => {
                tracing::warn!(%error, "the successor takes no more connections: the others finish in this process");
                return;
            }
        };
        if let Some(first) = first.take() {
            let result = HandedOver { taken, left: open.saturating_sub(taken) };
            tracing::info!(taken, left = result.left, "open connections handed over");
            // The one who waits may have gone.
            let _ = first.send(result);
        }
        let pause = (began.elapsed() / PART).clamp(*PAUSES.start(), *PAUSES.end());
        std::thread::sleep(if line.room == 0 { pause.min(WITHOUT_ROOM) } else { pause });
        if proxy.has_ended() {
            return;
        }
    }
}

/// Offers each connection once, as long as the successor has room. Returns the number that it has taken.
fn offer_all(line: &mut Line<'_>, proxy: &HandOver) -> io::Result<usize> {
    let mut taken = 0;
    line.ask(Vec::new(), &[])?;
    for worker in 0..proxy.workers() {
        let mut from = Some(0);
        while let Some(at) = from
            && line.room > 0
        {
            // Unless the worker has ended.
            let Some(batch) = proxy.offer(worker, at, BATCH.min(line.room)) else { break };
            from = batch.next;
            if batch.offered.is_empty() {
                continue;
            }
            // On an error, the connections go on here, because nobody decides.
            let (packed, decisions): (Vec<_>, Vec<_>) =
                batch.offered.into_iter().map(|one| (one.packed, one.is_taken)).unzip();
            let answers = line.offer(packed)?;
            for (n, decision) in decisions.into_iter().enumerate() {
                let is_taken = answers.get(n).copied().unwrap_or(false);
                taken += usize::from(is_taken);
                // A worker that has ended has closed its connections.
                let _ = decision.send(is_taken);
            }
        }
    }
    Ok(taken)
}

/// The line to the successor.
struct Line<'a> {
    channel: &'a Channel,
    /// Batches so far.
    number: u64,
    /// For how many connections the successor had room when it answered last.
    room: usize,
}

impl Line<'_> {
    /// Offers connections. Returns which of them the successor has taken.
    fn offer(&mut self, packed: Vec<Packed>) -> io::Result<Vec<bool>> {
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
                    return Ok(Vec::new());
                }
            }
        }
        // The descriptors are dropped only after the answer: they keep the sockets open on their way.
        self.ask(connections, &descriptors)
    }

    fn ask(&mut self, connections: Vec<Record>, descriptors: &[OwnedFd]) -> io::Result<Vec<bool>> {
        self.number += 1;
        let in_all: usize = connections.iter().map(Record::descriptors).sum();
        let has_bytes = descriptors.len() > in_all;
        let offer = Offer { version: VERSION, number: self.number, connections, has_bytes };
        let text = serde_json::to_string(&offer).map_err(io::Error::other)?;
        self.channel.send(&text, &descriptors.iter().map(|descriptor| descriptor.as_fd()).collect::<Vec<_>>())?;
        let ended = || io::Error::new(io::ErrorKind::UnexpectedEof, "it has ended");
        let message = self.channel.answer()?.ok_or_else(ended)?;
        let answer: Answer = serde_json::from_str(&message.text).map_err(io::Error::other)?;
        if answer.number != self.number {
            return Err(io::Error::other(format!("batch {} is answered as {}", self.number, answer.number)));
        }
        self.room = answer.room;
        Ok(answer.taken)
    }
}

/// A file in memory with these bytes.
fn file_with(bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create("held bytes", MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file.into())
}

/// Takes over the connections that the old process offers, until it ends. Returns their number.
pub(super) fn take_over(channel: &Channel, proxy: &TakeOver) -> usize {
    let (mut sum, mut number) = (0, 0);
    loop {
        let packed = match channel.receive() {
            Ok(Some(message)) => unpack(message),
            // Not all of its descriptors fit in this process.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(error),
            Ok(None) | Err(_) => return sum,
        };
        // A message that this process does not understand is a batch too.
        number += 1;
        let packed = packed.unwrap_or_else(|error| {
            tracing::warn!(%error, "connections stay with the old process");
            Vec::new()
        });
        let arrived = proxy.take(packed);
        let taken = arrived.taken.iter().filter(|&&taken| taken).count();
        let answer = Answer { number, taken: arrived.taken.clone(), room: proxy.room() };
        let text = serde_json::to_string(&answer).unwrap_or_default();
        // If the old process has ended meanwhile, nobody else has the connections.
        let _ = channel.send(&text, &[]);
        arrived.go();
        sum += taken;
    }
}

/// The connections of a message.
fn unpack(message: Message) -> io::Result<Vec<Packed>> {
    let Offer { version, connections, has_bytes, .. } =
        serde_json::from_str(&message.text).map_err(io::Error::other)?;
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
