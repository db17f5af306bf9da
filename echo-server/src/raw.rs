//! The echo sends every byte back, and the end of the stream too.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

const BUFFER: usize = 64 * 1024;

/// Echoes until the peer ends its side, then ends its own side. `first`: the bytes read so far.
pub(crate) async fn echo(mut stream: impl AsyncRead + AsyncWrite + Unpin, first: &[u8]) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    let held = first.len();
    buffer[..held].copy_from_slice(first);
    // Sends back the bytes that arrived with the first ones in the same write.
    let more = tokio::time::timeout(Duration::ZERO, stream.read(&mut buffer[held..])).await;
    let mut read = held + more.unwrap_or(Ok(0))?;
    // Zero bytes mean the end of the stream. If bytes came before the end, the next read returns zero.
    while read > 0 {
        stream.write_all(&buffer[..read]).await?;
        read = stream.read(&mut buffer).await?;
    }
    stream.shutdown().await
}
