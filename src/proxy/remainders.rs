//! Buffers for what short writes left over, reused by the connections of a worker.

use bytes::BytesMut;

/// The pool.
#[derive(Debug)]
pub(super) struct Remainders {
    idle: Vec<BytesMut>,
    /// Bytes of each: those of the buffer that is read into.
    size: usize,
}

impl Remainders {
    /// Of buffers that hold so many bytes.
    pub(super) fn new(size: usize) -> Self {
        Self { idle: Vec::new(), size }
    }

    /// A buffer with these bytes.
    pub(super) fn take(&mut self, bytes: &[u8]) -> BytesMut {
        let mut buffer = self.idle.pop().unwrap_or_else(|| BytesMut::with_capacity(self.size));
        buffer.extend_from_slice(bytes);
        buffer
    }

    /// Takes a buffer back; what is in it is forgotten.
    pub(super) fn give(&mut self, mut buffer: BytesMut) {
        /// Buffers kept for the next short writes: 2 MiB a worker with the default size.
        const KEPT: usize = 32;
        if self.idle.len() < KEPT {
            buffer.clear();
            // An emptied buffer has moved on within its allocation; this takes all of it back.
            if buffer.try_reclaim(self.size) {
                self.idle.push(buffer);
            }
        }
    }
}
