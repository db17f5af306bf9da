//! The echo sends every byte back, and the end of the stream too.

use std::io;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const BUFFER: usize = 64 * 1024;

/// Echoes until the peer ends its side, then ends its own side.
///
/// The buffer is allocated at the first bytes, so an idle connection has no buffer.
pub(crate) async fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.readable().await?;
    let mut buffer = vec![0; BUFFER];
    loop {
        match stream.read(&mut buffer).await? {
            0 => return stream.shutdown().await,
            n => stream.write_all(&buffer[..n]).await?,
        }
    }
}
