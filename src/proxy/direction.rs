//! One half of a relay: moves bytes from a source to a sink until the source ends.
//!
//! Two paths. Copy: the worker's scratch buffer, so that a connection holds no buffer; only what a short
//! write leaves over is kept. Splice: through a pooled pipe, without the bytes leaving the kernel; worth it
//! only for a stream of large reads, so a direction switches by what it sees. All state is in the struct:
//! a poll may stop anywhere and nothing is lost.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BytesMut};
use rustix::io::Errno;
use tokio::io::{AsyncRead as _, AsyncWrite as _, Interest, ReadBuf};
use tokio::net::TcpStream;

use super::lane::Traffic;
use super::lane::Worker;
use super::pipe::Pipe;

/// Large reads in a row after which a direction splices.
const LARGE_READS: u8 = 4;

/// Splices in a row of less than half of a large read after which a direction copies again.
const SMALL_READS: u8 = 4;

/// Bytes that one direction moves before the worker's other tasks get their turn.
const TURN: usize = 1024 * 1024;

/// The state of one direction.
#[derive(Debug, Default)]
pub(super) struct Direction {
    path: Path,
    /// Reads in a row that speak for the other path.
    run: u8,
    held: Held,
    ended: bool,
    /// The source is broken: its end of stream must not look like a clean one.
    pub(super) last_words: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Path {
    #[default]
    Copy,
    Splice,
    /// The kernel cannot splice these sockets.
    OnlyCopy,
}

/// Bytes that were read and not yet written.
#[derive(Debug, Default)]
enum Held {
    #[default]
    Nothing,
    Bytes(BytesMut),
    Piped(Pipe),
}

/// Which of the two sockets failed, and how.
#[derive(Debug)]
pub(super) enum Broken {
    Source(io::Error),
    Sink(io::Error),
}

impl Direction {
    /// Whether the source has ended and the sink was told.
    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Whether bytes wait for the sink.
    pub(super) fn is_holding(&self) -> bool {
        !matches!(self.held, Held::Nothing)
    }

    /// Moves bytes until nothing can move, a turn's worth has moved, or the source has ended and everything
    /// before its end is written. Then the sink's stream is ended, but by the last of the two directions, behind which
    /// both sockets are closed.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut TcpStream,
        sink: &mut TcpStream,
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

    /// Gives back what it holds of the worker's. Bytes in it are lost, so only when the relay is over.
    pub(super) fn release(&mut self, worker: &Worker) {
        match std::mem::take(&mut self.held) {
            Held::Nothing => {}
            Held::Bytes(bytes) => worker.remainders.borrow_mut().give(bytes),
            Held::Piped(pipe) => worker.pipes.borrow_mut().give(pipe),
        }
    }

    /// Writes what is held.
    fn flush(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut TcpStream,
        worker: &Worker,
        traffic: &Traffic,
    ) -> Poll<io::Result<()>> {
        match &mut self.held {
            Held::Nothing => return Poll::Ready(Ok(())),
            Held::Bytes(bytes) => {
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
        // A pipe is given back as soon as it is empty: directions that wait hold none.
        self.release(worker);
        Poll::Ready(Ok(()))
    }

    /// One read into the scratch buffer, written at once; what the sink does not take is held.
    fn copy(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut TcpStream,
        sink: &mut TcpStream,
        worker: &Worker,
        traffic: &Traffic,
    ) -> Poll<Result<Read, Broken>> {
        let mut scratch = worker.scratch.borrow_mut();
        let mut buffer = ReadBuf::new(&mut scratch);
        // Unlike a bare `try_io`, this clears readiness after a short read and so saves the read that would
        // only say EAGAIN.
        ready!(Pin::new(source).poll_read(cx, &mut buffer)).map_err(Broken::Source)?;
        let bytes = buffer.filled();
        if bytes.is_empty() {
            return Poll::Ready(Ok(Read::End));
        }
        let written = match Pin::new(sink).poll_write(cx, bytes) {
            Poll::Ready(Ok(written)) => written,
            Poll::Ready(Err(error)) => return Poll::Ready(Err(Broken::Sink(error))),
            Poll::Pending => 0,
        };
        traffic.copied.set(traffic.copied.get() + written as u64);
        if written < bytes.len() {
            self.held = Held::Bytes(worker.remainders.borrow_mut().take(&bytes[written..]));
        }
        if let (Path::Copy, Some(large)) = (self.path, worker.splice_from)
            && self.counts(bytes.len() >= large, LARGE_READS)
        {
            self.path = Path::Splice;
        }
        Poll::Ready(Ok(Read::Bytes(bytes.len())))
    }

    /// One splice into a pipe, which is held until it is drained.
    fn splice(&mut self, cx: &mut Context<'_>, source: &TcpStream, worker: &Worker) -> Poll<io::Result<Read>> {
        ready!(source.poll_read_ready(cx))?;
        let Some(mut pipe) = worker.pipes.borrow_mut().take() else {
            self.path = Path::Copy;
            return Poll::Ready(Ok(Read::Nothing));
        };
        // The pipe is empty, so EAGAIN is the socket's.
        let filled = source.try_io(Interest::READABLE, || match pipe.fill(source) {
            // The readiness stays set: the plain read that follows clears it where the socket is really empty.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            other => other,
        });
        if let Ok(1..) = filled {
            self.held = Held::Piped(pipe);
        } else {
            worker.pipes.borrow_mut().give(pipe);
        }
        Poll::Ready(match filled {
            // An empty socket, the stream's end, or urgent data, at which splice stops as at either: only a
            // plain read can tell.
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

    /// Whether reads that speak for the other path have come `enough` times in a row.
    fn counts(&mut self, speaks_for: bool, enough: u8) -> bool {
        self.run = if speaks_for { self.run + 1 } else { 0 };
        let switches = self.run >= enough;
        if switches {
            self.run = 0;
        }
        switches
    }
}

/// What a read brought.
enum Read {
    Bytes(usize),
    /// Nothing yet; look again, which registers for more.
    Nothing,
    /// Splice alone cannot tell; read plainly.
    Unsure,
    End,
}
