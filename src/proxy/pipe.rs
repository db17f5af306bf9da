//! Pipes for the splice path, and the worker's pool of them.
//!
//! Every rule here has cost someone an outage. `splice` says EAGAIN both when the socket is empty and when
//! the pipe is full, so only an empty pipe is filled and a pipe with bytes is drained first. The bytes in a
//! pipe may exceed its nominal size, so they are counted and never compared with it. A pipe that is not empty
//! is never pooled: its bytes would reach another client.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

use super::stats::WorkerStats;

/// Asked of the kernel for each pipe; where it refuses, its default of 64 KiB does too.
const PIPE_BYTES: usize = 256 * 1024;

/// Most that one splice is asked to move: all that a pipe holds, and far below what the kernel takes as an error.
const SPLICE_BYTES: usize = 1024 * 1024;

/// A pipe and how many bytes are in it.
#[derive(Debug)]
pub(super) struct Pipe {
    reader: OwnedFd,
    writer: OwnedFd,
    held: usize,
}

impl Pipe {
    fn new() -> io::Result<Self> {
        let (reader, writer) = pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC)?;
        // Past the user's share of pipe pages the kernel refuses; the pipe works all the same.
        let _ = fcntl_setpipe_size(&writer, PIPE_BYTES);
        Ok(Self { reader, writer, held: 0 })
    }

    /// How many bytes are in it.
    pub(super) fn held(&self) -> usize {
        self.held
    }

    /// Moves what the socket has into the empty pipe. 0 is the end of the stream; `WouldBlock` means that the
    /// socket is empty, as the pipe is not full.
    pub(super) fn fill(&mut self, socket: impl AsFd) -> io::Result<usize> {
        debug_assert_eq!(self.held, 0, "only an empty pipe is filled");
        let moved = splice(socket, None, &self.writer, None, SPLICE_BYTES, FLAGS)?;
        self.held = moved;
        Ok(moved)
    }

    /// Moves bytes out to the socket. `WouldBlock` means that the socket is full, as the pipe is not empty.
    pub(super) fn drain(&mut self, socket: impl AsFd) -> io::Result<usize> {
        let moved = splice(&self.reader, None, socket, None, self.held, FLAGS)?;
        if moved == 0 {
            // The kernel does not do that; if it did, the relay would try for ever.
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.held = self.held.saturating_sub(moved);
        Ok(moved)
    }
}

const FLAGS: SpliceFlags = SpliceFlags::MOVE.union(SpliceFlags::NONBLOCK);

/// The pipes of one worker, lent to directions while bytes are in them.
#[derive(Debug)]
pub(super) struct PipePool {
    idle: Vec<Pipe>,
    most: usize,
    lent: usize,
    stats: Arc<WorkerStats>,
}

impl PipePool {
    /// At most `most` pipes at a time.
    pub(super) fn new(most: usize, stats: Arc<WorkerStats>) -> Self {
        Self { idle: Vec::new(), most, lent: 0, stats }
    }

    /// An empty pipe, or `None` where none is to be had.
    pub(super) fn take(&mut self) -> Option<Pipe> {
        let pipe = match self.idle.pop() {
            Some(pipe) => Some(pipe),
            None if self.lent < self.most => Pipe::new().ok(),
            None => None,
        };
        if pipe.is_some() {
            self.lent += 1;
        } else {
            self.stats.pipe_shortages.fetch_add(1, Ordering::Relaxed);
        }
        self.count();
        pipe
    }

    /// Takes a pipe back. One with bytes in it is closed.
    pub(super) fn give(&mut self, pipe: Pipe) {
        /// Pipes kept for the next streams; those of a past peak are closed.
        const KEPT: usize = 64;
        self.lent -= 1;
        if pipe.held == 0 && self.idle.len() < KEPT {
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
    fn a_pipe_with_bytes_in_it_is_never_lent_again() {
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
    fn the_pool_keeps_its_bound_and_counts_shortages() {
        let stats = Arc::new(WorkerStats::default());
        let mut pool = PipePool::new(2, Arc::clone(&stats));
        let (one, two) = (pool.take().unwrap(), pool.take().unwrap());
        assert!(pool.take().is_none());
        assert_eq!((stats.pipes.load(Ordering::Relaxed), stats.pipe_shortages.load(Ordering::Relaxed)), (2, 1));
        pool.give(one);
        assert!(pool.take().is_some());
        drop(two);
    }
}
