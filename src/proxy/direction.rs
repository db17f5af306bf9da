//! One half of a relay: moves bytes from a source to a sink until the source ends.
//!
//! There are two paths. The copy path uses the worker's scratch buffer, so a connection holds no buffer of its own. It
//! keeps only the rest of a short write. The splice path uses a pooled pipe, and the bytes never leave the kernel.
//! Splicing pays off only for streams of large reads, so each direction picks its path by the reads that it sees. All
//! state is in the struct, so a poll can stop at any point without losing bytes.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BytesMut};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead as _, AsyncWrite as _, Interest, ReadBuf};

use super::connection::Traffic;
use super::context::Worker;
use super::handover::Luggage;
use super::handover::record::{Half, Holds};
use super::handover::taking::Unpacking;
use super::pipe::Pipe;
use crate::stream::Stream;

/// Consecutive large reads after which a direction starts splicing.
const LARGE_READS: u8 = 4;

/// Consecutive splices below half of a large read after which a direction copies again.
const SMALL_READS: u8 = 4;

/// Bytes that one direction moves before the worker's other tasks run.
const TURN: usize = 256 * 1024;

/// Maximum pipes of a worker whose bytes are in memory: 64 MiB. Beyond that, pipes stay where they are.
const MOST_MOVED_OUT: usize = 256;

/// The state of one direction.
#[derive(Debug, Default)]
pub(super) struct Direction {
    path: Path,
    /// Consecutive reads that favor the other path.
    run: u8,
    held: Held,
    ended: bool,
    nodelay: Nodelay,
    /// The source has broken: the sink must not see a clean end of stream.
    pub(super) last_words: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Path {
    #[default]
    Copy,
    Splice,
    /// The kernel cannot splice these sockets.
    OnlyCopy,
}

/// When the sink gets `TCP_NODELAY`. It matters from the second write: only a small write that follows another
/// unacknowledged small one waits (Minshall's version of the Nagle algorithm, as in Linux).
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Nodelay {
    #[default]
    BeforeSecondWrite,
    /// A PROXY header was the first write.
    BeforeNextWrite,
    Set,
}

/// Bytes that have been read but not yet written.
#[derive(Debug, Default)]
enum Held {
    #[default]
    Nothing,
    Bytes(BytesMut),
    Piped(Pipe),
    /// The bytes of a pipe that was given up.
    MovedOut(BytesMut),
}

/// The socket that failed, and its error.
#[derive(Debug)]
pub(super) enum Broken {
    Source(io::Error),
    Sink(io::Error),
}

impl Direction {
    /// A direction to a new connection.
    pub(super) fn to_connected(follows_header: bool) -> Self {
        let nodelay = if follows_header { Nodelay::BeforeNextWrite } else { Nodelay::BeforeSecondWrite };
        Self { nodelay, ..Self::default() }
    }

    /// A direction to a sink that has inherited `TCP_NODELAY`.
    pub(super) fn to_accepted() -> Self {
        Self { nodelay: Nodelay::Set, ..Self::default() }
    }

    /// Packs the direction for a successor: what it holds goes into the luggage. It stays as it is.
    ///
    /// # Errors
    /// When the process has no free descriptor.
    pub(super) fn pack(&self, traffic: &Traffic, luggage: &mut Luggage) -> io::Result<Half> {
        let holds = match &self.held {
            Held::Nothing => Holds::Nothing,
            Held::Bytes(bytes) => Holds::Bytes(bytes.len()),
            Held::MovedOut(bytes) => Holds::MovedOut(bytes.len()),
            Held::Piped(pipe) => Holds::Piped(pipe.held()),
        };
        match &self.held {
            Held::Nothing => {}
            Held::Bytes(bytes) | Held::MovedOut(bytes) => luggage.bytes.extend_from_slice(bytes),
            Held::Piped(pipe) => luggage.descriptors.extend(pipe.copies()?),
        }
        Ok(Half {
            copied: traffic.copied.get(),
            spliced: traffic.spliced.get(),
            path: self.path,
            run: self.run,
            nodelay: self.nodelay,
            ended: self.ended,
            holds,
        })
    }

    /// The direction that an old process has packed.
    pub(super) fn unpack(half: &Half, luggage: &mut Unpacking, worker: &Worker) -> Self {
        let held = match half.holds {
            Holds::Nothing => Held::Nothing,
            Holds::Bytes(length) => Held::Bytes(worker.write_backlog.borrow_mut().take(&luggage.bytes(length))),
            Holds::MovedOut(length) => {
                worker.moved_out.set(worker.moved_out.get() + 1);
                Held::MovedOut(luggage.bytes(length).as_slice().into())
            }
            Holds::Piped(held) => {
                luggage.pipe().map_or(Held::Nothing, |ends| Held::Piped(worker.pipes.borrow_mut().adopt(ends, held)))
            }
        };
        // Without pipes of its own, this process copies.
        let path = if half.path == Path::Splice && worker.splice_from.is_none() { Path::Copy } else { half.path };
        Self { path, run: half.run, held, ended: half.ended, nodelay: half.nodelay, last_words: false }
    }

    /// Whether the source has ended and the end was passed on to the sink.
    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Whether bytes wait for the sink.
    pub(super) fn is_holding(&self) -> bool {
        !matches!(self.held, Held::Nothing)
    }

    /// Moves bytes until no more can move, one turn's bytes have moved, or the source has ended and all its bytes are
    /// written. Then it shuts down the sink's stream. The last of the two directions skips the shutdown, because both
    /// sockets are closed right after it.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut Stream,
        sink: &mut Stream,
        worker: &Worker,
        traffic: &Traffic,
        is_last: bool,
    ) -> Poll<Result<(), Broken>> {
        if self.ended {
            return Poll::Ready(Ok(()));
        }
        let mut turn = 0;
        loop {
            ready!(self.flush(cx, sink, worker, traffic)).map_err(Broken::Sink)?;
            if turn >= TURN {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let read = if self.path == Path::Splice {
                ready!(self.splice(cx, source, worker)).map_err(Broken::Source)?
            } else {
                ready!(self.copy(cx, source, sink, worker, traffic))?
            };
            let read = match read {
                Read::Unsure => ready!(self.copy(cx, source, sink, worker, traffic))?,
                sure => sure,
            };
            match read {
                Read::Bytes(n) => turn += n,
                Read::Nothing | Read::Unsure => {}
                Read::End => {
                    self.ended = true;
                    if !self.last_words && !is_last {
                        ready!(Pin::new(sink).poll_shutdown(cx)).map_err(Broken::Sink)?;
                    }
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }

    /// Returns the held buffer or pipe to the worker's pools. Bytes in it are lost, so call it only after a flush or
    /// when the relay is over.
    pub(super) fn release(&mut self, worker: &Worker) {
        match std::mem::take(&mut self.held) {
            Held::Nothing => {}
            Held::Bytes(bytes) => worker.write_backlog.borrow_mut().give(bytes),
            Held::MovedOut(_) => worker.moved_out.set(worker.moved_out.get() - 1),
            Held::Piped(pipe) => worker.pipes.borrow_mut().give(pipe),
        }
    }

    /// Moves the bytes of a held pipe to memory, so that others can use the pipe. After an error, the stream has a gap.
    pub(super) fn give_up_pipe(&mut self, worker: &Worker) -> io::Result<()> {
        if worker.moved_out.get() >= MOST_MOVED_OUT {
            return Ok(());
        }
        if let Held::Piped(pipe) = &mut self.held {
            let bytes = pipe.read_all()?;
            self.release(worker);
            worker.moved_out.set(worker.moved_out.get() + 1);
            (self.held, self.path, self.run) = (Held::MovedOut(bytes), Path::Copy, 0);
        }
        Ok(())
    }

    /// Writes the held bytes to the sink.
    fn flush(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut Stream,
        worker: &Worker,
        traffic: &Traffic,
    ) -> Poll<io::Result<()>> {
        match &mut self.held {
            Held::Nothing => return Poll::Ready(Ok(())),
            Held::Bytes(bytes) | Held::MovedOut(bytes) => {
                while bytes.has_remaining() {
                    let written = ready!(Pin::new(&mut *sink).poll_write(cx, bytes))?;
                    bytes.advance(written);
                    traffic.copied.set(traffic.copied.get() + written as u64);
                }
            }
            Held::Piped(pipe) => {
                while pipe.held() > 0 {
                    ready!(sink.poll_write_ready(cx))?;
                    match sink.try_io(Interest::WRITABLE, || pipe.drain(&*sink)) {
                        Ok(moved) => traffic.spliced.set(traffic.spliced.get() + moved as u64),
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        Err(error) => return Poll::Ready(Err(error)),
                    }
                }
            }
        }
        // Return the pipe as soon as it is empty, so waiting directions hold no pipe.
        self.release(worker);
        Poll::Ready(Ok(()))
    }

    /// Reads once into the scratch buffer and writes at once; holds the bytes that the sink does not accept.
    fn copy(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut Stream,
        sink: &mut Stream,
        worker: &Worker,
        traffic: &Traffic,
    ) -> Poll<Result<Read, Broken>> {
        let mut scratch = worker.scratch.borrow_mut();
        let mut buffer = ReadBuf::new(&mut scratch);
        // Unlike a bare `try_io`, this clears readiness after a short read. That saves a second read that would only
        // return EAGAIN.
        ready!(Pin::new(source).poll_read(cx, &mut buffer)).map_err(Broken::Source)?;
        let bytes = buffer.filled();
        if bytes.is_empty() {
            return Poll::Ready(Ok(Read::End));
        }
        let is_due = match self.nodelay {
            Nodelay::BeforeSecondWrite => traffic.total() > 0,
            Nodelay::BeforeNextWrite => true,
            Nodelay::Set => false,
        };
        if is_due {
            self.nodelay = Nodelay::Set;
            sink.set_nodelay();
        }
        let written = match Pin::new(sink).poll_write(cx, bytes) {
            Poll::Ready(Ok(written)) => written,
            Poll::Ready(Err(error)) => return Poll::Ready(Err(Broken::Sink(error))),
            Poll::Pending => 0,
        };
        traffic.copied.set(traffic.copied.get() + written as u64);
        if written < bytes.len() {
            self.held = Held::Bytes(worker.write_backlog.borrow_mut().take(&bytes[written..]));
        }
        if let (Path::Copy, Some(large)) = (self.path, worker.splice_from)
            && self.counts(bytes.len() >= large, LARGE_READS)
        {
            self.path = Path::Splice;
        }
        Poll::Ready(Ok(Read::Bytes(bytes.len())))
    }

    /// Splices once into a pipe, which is held until it is drained.
    fn splice(&mut self, cx: &mut Context<'_>, source: &Stream, worker: &Worker) -> Poll<io::Result<Read>> {
        ready!(source.poll_read_ready(cx))?;
        let Some(mut pipe) = worker.pipes.borrow_mut().take() else {
            self.path = Path::Copy;
            return Poll::Ready(Ok(Read::Nothing));
        };
        // The pipe is empty, so EAGAIN means that the socket is empty.
        let filled = source.try_io(Interest::READABLE, || match pipe.fill(source) {
            // The readiness stays set. If the socket is really empty, the plain read that follows clears it.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            other => other,
        });
        if let Ok(1..) = filled {
            self.held = Held::Piped(pipe);
        } else {
            worker.pipes.borrow_mut().give(pipe);
        }
        Poll::Ready(match filled {
            // The socket is empty, the stream has ended, or urgent data stopped the splice. Only a plain read can
            // distinguish these cases.
            Ok(0) => Ok(Read::Unsure),
            Ok(moved) => {
                if self.counts(moved < worker.splice_from.unwrap_or(0) / 2, SMALL_READS) {
                    self.path = Path::Copy;
                }
                Ok(Read::Bytes(moved))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Read::Nothing),
            Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::INVAL | Errno::NOSYS)) => {
                self.path = Path::OnlyCopy;
                Ok(Read::Nothing)
            }
            Err(error) => Err(error),
        })
    }

    /// Whether `enough` consecutive reads have favored the other path.
    fn counts(&mut self, favors_other: bool, enough: u8) -> bool {
        self.run = if favors_other { self.run + 1 } else { 0 };
        let switches = self.run >= enough;
        if switches {
            self.run = 0;
        }
        switches
    }
}

/// The result of one read.
enum Read {
    Bytes(usize),
    /// No bytes yet; the next read registers for readiness.
    Nothing,
    /// The splice result is ambiguous; a plain read must decide.
    Unsure,
    End,
}
