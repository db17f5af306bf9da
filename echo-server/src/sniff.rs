//! Distinguishes HTTP/1.x from other protocols by the first bytes of a connection, without consuming them.

use std::io;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::Instant;

/// The protocol of a connection.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub(crate) enum Protocol {
    Http,
    Raw,
}

const METHODS: [&[u8]; 9] =
    [b"GET ", b"POST ", b"PUT ", b"HEAD ", b"DELETE ", b"OPTIONS ", b"PATCH ", b"TRACE ", b"CONNECT "];

/// The longest wait for the rest of a possible request line.
const UNDECIDED: Duration = Duration::from_millis(300);

/// Waits for the first bytes of `stream` and decides. An end of stream counts as raw.
pub(crate) async fn protocol(stream: &TcpStream) -> io::Result<Protocol> {
    let mut first = [0; 16];
    let mut deadline = None;
    loop {
        stream.readable().await?;
        let n = match stream.peek(&mut first).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            other => other?,
        };
        if let Some(protocol) = classify(&first[..n]) {
            return Ok(protocol);
        }
        let now = Instant::now();
        if *deadline.get_or_insert(now + UNDECIDED) <= now {
            return Ok(Protocol::Raw);
        }
        // The peeked bytes stay readable, so readiness does not signal new ones. The loop polls instead.
        tokio::time::sleep(Duration::from_millis(5)).await;
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
