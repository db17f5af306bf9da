//! Looks at the first bytes of a connection and leaves them in the socket.

use std::io;

use rustix::net::{RecvFlags, recv};
use tokio::io::Interest;

use super::context::Worker;
use crate::stream::Stream;

/// Waits until `decide` decides by the first bytes. It gets at most `most` bytes. Its second argument says that no more bytes
/// will come. If `decide` does not decide then, the result is an error. The bytes are in the worker's buffer, so a waiting
/// connection holds no memory for them.
///
/// # Errors
/// The system's error, for example after a reset.
pub(super) async fn first_bytes<T>(
    client: &Stream,
    worker: &Worker,
    most: usize,
    mut decide: impl FnMut(&[u8], bool) -> Option<T>,
) -> io::Result<T> {
    let mut seen = 0;
    loop {
        // The runtime never clears the readiness of a stream that has ended, so this returns at once from then on.
        let has_ended = client.ready(Interest::READABLE).await?.is_read_closed();
        let looked = client.try_io(Interest::READABLE, || {
            let mut scratch = worker.scratch.borrow_mut();
            let room = most.min(scratch.len());
            let (length, _) = recv(client, &mut scratch[..room], RecvFlags::PEEK | RecvFlags::DONTWAIT)?;
            let is_last = has_ended || length == 0 || length == room;
            if length == seen && !is_last {
                // Clears the readiness: the next bytes set it again. This is race-free only here.
                return Err(io::ErrorKind::WouldBlock.into());
            }
            seen = length;
            let decided = decide(&scratch[..length], is_last);
            if decided.is_none() && is_last { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(decided) }
        });
        match looked {
            Ok(Some(decided)) => return Ok(decided),
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            Ok(None) | Err(_) => {}
        }
    }
}
