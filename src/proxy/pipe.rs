//! Pipes for the splice path, and the worker's pool of them.
//!
//! Each rule here prevents a known failure. `splice` returns EAGAIN both when the socket is empty and when the pipe is
//! full. So only an empty pipe is filled, and a pipe with bytes is drained first. The bytes in a pipe can exceed its
//! nominal size, so they are counted and never compared with the size. A pipe that holds bytes never returns to the
//! pool, because another client would receive those bytes.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::BytesMut;
use rustix::io::retry_on_intr;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, splice};

use super::stats::WorkerStats;

/// Pipe size requested from the kernel. If the kernel refuses, its default of 64 KiB is used.
const PIPE_BYTES: usize = 256 * 1024;

/// A pipe with less room than this is not worth its system calls. The kernel gives a user without privileges pipes of
/// one or two pages beyond its quota (`fs.pipe-user-pages-soft`).
const LEAST_BYTES: usize = 64 * 1024;

/// Maximum bytes per splice call: more than a pipe holds, and far below the size that the kernel rejects.
const SPLICE_BYTES: usize = 1024 * 1024;

/// A pipe, and the number of bytes in it.
#[derive(Debug)]
pub(super) struct Pipe {
    reader: OwnedFd,
    writer: OwnedFd,
    held: usize,
}

impl Pipe {
    /// A new pipe, unless the kernel makes it smaller than [`LEAST_BYTES`].
    fn new() -> io::Result<Self> {
        let (reader, writer) = pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC)?;
        // The kernel refuses beyond the user's quota of pipe pages. The pipe then keeps the size that it has.
        if fcntl_setpipe_size(&writer, PIPE_BYTES).is_err() && fcntl_getpipe_size(&writer)? < LEAST_BYTES {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        Ok(Self { reader, writer, held: 0 })
    }

    /// Moves all bytes of the pipe to memory, and leaves the pipe empty. After an error, bytes are missing.
    pub(super) fn read_all(&mut self) -> io::Result<BytesMut> {
        let mut bytes = BytesMut::zeroed(self.held);
        while self.held > 0 {
            let at = bytes.len() - self.held;
            let read = retry_on_intr(|| rustix::io::read(&self.reader, &mut bytes[at..]))?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.held -= read;
        }
        Ok(bytes)
    }

    /// Duplicates of the descriptors, for another process.
    pub(super) fn copies(&self) -> io::Result<[OwnedFd; 2]> {
        Ok([self.reader.try_clone()?, self.writer.try_clone()?])
    }

    /// Number of bytes in the pipe.
    pub(super) fn held(&self) -> usize {
        self.held
    }

    /// Moves bytes from the socket into the empty pipe. 0 means the end of the stream. `WouldBlock` means that the
    /// socket is empty, because the pipe is not full.
    pub(super) fn fill(&mut self, socket: impl AsFd) -> io::Result<usize> {
        debug_assert_eq!(self.held, 0, "only an empty pipe can be filled");
        let moved = splice(socket, None, &self.writer, None, SPLICE_BYTES, FLAGS)?;
        self.held = moved;
        Ok(moved)
    }

    /// Moves bytes from the pipe to the socket. `WouldBlock` means that the socket is full, because the pipe is not
    /// empty.
    pub(super) fn drain(&mut self, socket: impl AsFd) -> io::Result<usize> {
        let moved = splice(&self.reader, None, socket, None, self.held, FLAGS)?;
        if moved == 0 {
            // The kernel does not return 0 here. If it did, the relay would retry forever.
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.held = self.held.saturating_sub(moved);
        Ok(moved)
    }
}

const FLAGS: SpliceFlags = SpliceFlags::MOVE.union(SpliceFlags::NONBLOCK);

/// The pipes of one worker. A direction borrows a pipe while the pipe holds bytes.
#[derive(Debug)]
pub(super) struct PipePool {
    idle: Vec<Pipe>,
    most: usize,
    lent: usize,
    /// The kernel has refused a pipe since the last tick of the timeout task.
    is_refused: bool,
    /// A direction found no pipe since the last tick.
    is_short: bool,
    stats: Arc<WorkerStats>,
}

impl PipePool {
    /// Creates a pool of at most `most` pipes.
    pub(super) fn new(most: usize, stats: Arc<WorkerStats>) -> Self {
        Self { idle: Vec::new(), most, lent: 0, is_refused: false, is_short: false, stats }
    }

    /// An empty pipe; `None` when the pool is exhausted or the kernel refuses a new pipe.
    pub(super) fn take(&mut self) -> Option<Pipe> {
        let pipe = match self.idle.pop() {
            Some(pipe) => Some(pipe),
            // A refused pipe costs system calls, so the next try comes later.
            None if self.lent < self.most && !self.is_refused => {
                let pipe = Pipe::new().ok();
                self.is_refused = pipe.is_none();
                pipe
            }
            None => None,
        };
        if pipe.is_some() {
            self.lent += 1;
        } else {
            self.is_short = true;
            self.stats.pipe_shortages.fetch_add(1, Ordering::Relaxed);
        }
        self.count();
        pipe
    }

    /// A pipe of another process, with this number of bytes in it. It counts as lent, even beyond the maximum.
    pub(super) fn adopt(&mut self, [reader, writer]: [OwnedFd; 2], held: usize) -> Pipe {
        self.lent += 1;
        self.count();
        Pipe { reader, writer, held }
    }

    /// Starts the next tick. Returns whether a direction found no pipe in this one.
    pub(super) fn tick(&mut self) -> bool {
        self.is_refused = false;
        std::mem::take(&mut self.is_short)
    }

    /// Takes a pipe back. A pipe that still holds bytes is closed.
    pub(super) fn give(&mut self, pipe: Pipe) {
        /// Maximum idle pipes kept for reuse; surplus pipes after a peak are closed.
        const KEPT: usize = 64;
        self.lent -= 1;
        if pipe.held == 0 && self.idle.len() < KEPT && self.idle.len() + self.lent < self.most {
            self.idle.push(pipe);
        }
        self.count();
    }

    fn count(&self) {
        self.stats.pipes.store((self.idle.len() + self.lent) as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_pipe_with_bytes_is_never_reused() {
        let mut pool = PipePool::new(1, Arc::default());
        let (mut near, far) = UnixStream::pair().unwrap();
        near.write_all(b"secret").unwrap();
        let mut pipe = pool.take().unwrap();
        assert_eq!(pipe.fill(&far).unwrap(), 6);
        pool.give(pipe);
        let fresh = pool.take().unwrap();
        assert_eq!(fresh.held(), 0);
        let (mut out, into) = UnixStream::pair().unwrap();
        out.set_nonblocking(true).unwrap();
        splice(&fresh.reader, None, &into, None, 100, FLAGS).unwrap_err();
        assert_eq!(out.read(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn the_pool_respects_its_maximum_and_counts_shortages() {
        let stats = Arc::new(WorkerStats::default());
        let mut pool = PipePool::new(2, Arc::clone(&stats));
        let (one, two) = (pool.take().unwrap(), pool.take().unwrap());
        assert!(pool.take().is_none());
        assert_eq!((stats.pipes.load(Ordering::Relaxed), stats.pipe_shortages.load(Ordering::Relaxed)), (2, 1));
        pool.give(one);
        assert!(pool.take().is_some());
        drop(two);
    }

    #[test]
    fn a_full_pipe_can_be_given_up_without_losing_a_byte() {
        let mut pool = PipePool::new(1, Arc::default());
        let (mut near, far) = UnixStream::pair().unwrap();
        near.write_all(&vec![7; 100_000]).unwrap();
        let mut pipe = pool.take().unwrap();
        let filled = pipe.fill(&far).unwrap();
        assert!(pool.take().is_none() && pool.tick() && !pool.tick());
        let bytes = pipe.read_all().unwrap();
        assert_eq!((bytes.len(), pipe.held()), (filled, 0));
        assert!(bytes.iter().all(|&byte| byte == 7));
        pool.give(pipe);
        assert!(pool.take().is_some(), "the pipe is not reused");
    }
}
