//! Buffers for what short writes left over, reused by the connections of a worker.

use bytes::BytesMut;

/// The copy path's buffer: one read moves up to this much.
pub(super) const SCRATCH: usize = 64 * 1024;

/// The pool.
#[derive(Debug, Default)]
pub(super) struct Remainders(Vec<BytesMut>);

impl Remainders {
    /// A buffer with these bytes.
    pub(super) fn take(&mut self, bytes: &[u8]) -> BytesMut {
        let mut buffer = self.0.pop().unwrap_or_else(|| BytesMut::with_capacity(SCRATCH));
        buffer.extend_from_slice(bytes);
        buffer
    }

    /// Takes a buffer back; what is in it is forgotten.
    pub(super) fn give(&mut self, mut buffer: BytesMut) {
        /// Buffers kept for the next short writes: 2 MiB a worker.
        const KEPT: usize = 32;
        if self.0.len() < KEPT {
            buffer.clear();
            // An emptied buffer has moved on within its allocation; this takes all of it back.
            if buffer.try_reclaim(SCRATCH) {
                self.0.push(buffer);
            }
        }
    }
}
