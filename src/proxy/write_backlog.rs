//! Buffers for the unwritten rest of short writes. The connections of a worker share and reuse them.

use bytes::BytesMut;

/// The pool of buffers.
#[derive(Debug)]
pub(super) struct WriteBacklog {
    idle: Vec<BytesMut>,
    /// Size of each buffer in bytes; equals the size of the worker's read buffer.
    size: usize,
}

impl WriteBacklog {
    /// Creates an empty pool; each buffer holds `size` bytes.
    pub(super) fn new(size: usize) -> Self {
        Self { idle: Vec::new(), size }
    }

    /// Returns a buffer that contains `bytes`.
    pub(super) fn take(&mut self, bytes: &[u8]) -> BytesMut {
        let mut buffer = self.idle.pop().unwrap_or_else(|| BytesMut::with_capacity(self.size));
        buffer.extend_from_slice(bytes);
        buffer
    }

    /// Takes a buffer back and discards its contents.
    pub(super) fn give(&mut self, mut buffer: BytesMut) {
        /// Maximum idle buffers kept for reuse: 2 MiB per worker with the default size.
        const KEPT: usize = 32;
        if self.idle.len() < KEPT {
            buffer.clear();
            // Consuming bytes moves a buffer's start forward in its allocation; reclaiming moves it back to the start.
            if buffer.try_reclaim(self.size) {
                self.idle.push(buffer);
            }
        }
    }
}
