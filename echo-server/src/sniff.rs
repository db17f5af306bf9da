//! Distinguishes HTTP/1.x from other protocols by the first bytes of a connection.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::time::Instant;

/// The protocol of a connection.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub(crate) enum Protocol {
    Http,
    Raw,
}

const METHODS: [&[u8]; 9] =
    [b"GET ", b"POST ", b"PUT ", b"HEAD ", b"DELETE ", b"OPTIONS ", b"PATCH ", b"TRACE ", b"CONNECT "];

/// The longest wait for the rest of a possible method.
const UNDECIDED: Duration = Duration::from_millis(300);

/// The first bytes of a connection.
pub(crate) struct First {
    bytes: [u8; 16],
    length: usize,
}

impl First {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// Reads the first bytes of `stream` and decides. An end of stream counts as raw.
pub(crate) async fn protocol(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<(Protocol, First)> {
    let mut first = First { bytes: [0; 16], length: 0 };
    first.length = stream.read(&mut first.bytes).await?;
    let deadline = Instant::now() + UNDECIDED;
    loop {
        if let Some(protocol) = classify(first.bytes()) {
            return Ok((protocol, first));
        }
        let more = tokio::time::timeout_at(deadline, stream.read(&mut first.bytes[first.length..])).await;
        match more.unwrap_or(Ok(0))? {
            0 => return Ok((Protocol::Raw, first)),
            n => first.length += n,
        }
    }
}

/// A stream whose first bytes were read before.
pub(crate) struct Resumed<S> {
    first: First,
    /// Number of first bytes that the reader has received.
    read: usize,
    stream: S,
}

impl<S> Resumed<S> {
    pub(crate) fn new(first: First, stream: S) -> Self {
        Self { first, read: 0, stream }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Resumed<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let rest = &self.first.bytes()[self.read..];
        if rest.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buffer);
        }
        let some = &rest[..rest.len().min(buffer.remaining())];
        buffer.put_slice(some);
        self.read += some.len();
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Resumed<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// `None` while the bytes can still become a request line.
fn classify(first: &[u8]) -> Option<Protocol> {
    if first.is_empty() {
        return Some(Protocol::Raw);
    }
    for method in METHODS {
        let seen = first.len().min(method.len());
        if first[..seen] != method[..seen] {
            continue;
        }
        // A path, `*`, or an absolute address follows the method.
        return match first.get(method.len()) {
            None => None,
            Some(b'/' | b'*' | b'h') => Some(Protocol::Http),
            Some(_) => Some(Protocol::Raw),
        };
    }
    Some(Protocol::Raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_lines_are_http() {
        for line in ["GET / HTTP/1.1\r\n", "POST /api/request HTTP/1.1", "OPTIONS * HTTP/1.1", "GET http://x/ HTTP/1.1"]
        {
            assert_eq!(classify(&line.as_bytes()[..line.len().min(16)]), Some(Protocol::Http), "{line}");
        }
    }

    #[test]
    fn other_bytes_are_raw() {
        for bytes in ["hello", "", "GETTING ON", "GET lost", "\0\x01\x02", "get / HTTP/1.1", "POSTER"] {
            assert_eq!(classify(bytes.as_bytes()), Some(Protocol::Raw), "{bytes:?}");
        }
    }

    #[test]
    fn the_beginning_of_a_method_is_undecided() {
        for bytes in ["G", "GET", "GET ", "P", "DELET"] {
            assert_eq!(classify(bytes.as_bytes()), None, "{bytes:?}");
        }
    }
}
