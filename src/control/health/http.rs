//! The HTTP check: sends a `GET`, and reads as little of the answer as decides.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::check::{Http, MOST_READ, Reason, contains, part, start_of};
use crate::address::Address;
use crate::stream::Stream;

/// Longest status line in bytes.
const LONGEST_STATUS_LINE: usize = 4096;

/// Longest head in bytes; further bytes count as the body.
const LONGEST_HEAD: usize = 64 * 1024;

/// Speaks to the server. The error is a short reason.
pub(super) async fn speak(http: &Http, mut stream: Stream, address: &Address) -> Result<(), Reason> {
    let request = request(http, address);
    // A server may answer and close without reading the request. Its answer counts all the same.
    let written = stream.write_all(request.as_bytes()).await;
    let mut answer = Vec::new();
    let result = loop {
        let before = answer.len();
        let read = stream.read_buf(&mut answer).await;
        let ended = match &read {
            Ok(0) => Some("the connection was closed".to_owned()),
            Ok(_) => None,
            Err(error) => Some(written.as_ref().err().unwrap_or(error).to_string()),
        };
        if let Some(result) = judge(http, &answer, before, ended.as_deref()) {
            break result;
        }
    };
    tokio::spawn(part(stream, Vec::new()));
    result
}

fn request(http: &Http, address: &Address) -> String {
    let host = http.host.clone().unwrap_or_else(|| address.ip().map_or("localhost".to_owned(), |ip| ip.to_string()));
    let (path, version) = (&http.path, env!("CARGO_PKG_VERSION"));
    format!(
        "GET {path} HTTP/1.1\r\nhost: {host}\r\nuser-agent: ringway/{version}\r\naccept: */*\r\nconnection: close\r\n\r\n"
    )
}

/// The result of a check by the bytes received so far; `None`: more bytes must decide. The first `before` bytes did not
/// decide. `ended`: why no more will come.
fn judge(http: &Http, answer: &[u8], before: usize, ended: Option<&str>) -> Option<Result<(), Reason>> {
    let line_end = answer.iter().take(LONGEST_STATUS_LINE).position(|&byte| byte == b'\n');
    let Some(line_end) = line_end else {
        if answer.len() >= LONGEST_STATUS_LINE || !answer.starts_with(b"HTTP/") && answer.len() >= 5 {
            return Some(Err(format!("no HTTP answer: {:?}", start_of(answer)).into()));
        }
        return ended.map(|why| Err(format!("no HTTP answer: {why}").into()));
    };
    let Some(status) = status(&answer[..line_end]) else {
        return Some(Err(format!("no HTTP answer: {:?}", start_of(answer)).into()));
    };
    if !http.status.contains(&status) {
        return Some(Err(Reason::answer(format!("status {status}"))));
    }
    let Some(wanted) = http.body.as_deref().map(str::as_bytes) else { return Some(Ok(())) };
    let most = &answer[..answer.len().min(LONGEST_HEAD)];
    let head_end = most.windows(4).position(|window| window == b"\r\n\r\n").map_or(most.len(), |at| at + 4);
    let (head, body) = answer.split_at(head_end);
    let is_over = ended.is_some() || answer.len() > MOST_READ || is_whole(head, body);
    // Only the new bytes, and the end of the old ones where a match may begin.
    let new = &body[before.saturating_sub(head.len() + wanted.len()).min(body.len())..];
    if contains(new, wanted) || is_over && contains(&unchunked(body).0, wanted) {
        return Some(Ok(()));
    }
    is_over.then(|| Err(Reason::answer("the body lacks the expected text")))
}

/// The code in a status line like `HTTP/1.1 200 OK`.
fn status(line: &[u8]) -> Option<u16> {
    let line = std::str::from_utf8(line).ok()?.trim_end();
    let code = line.strip_prefix("HTTP/1.")?.split(' ').nth(1)?;
    code.parse().ok().filter(|_| code.len() == 3)
}

/// Whether the body has the length that the head announces: a server may keep the connection open.
fn is_whole(head: &[u8], body: &[u8]) -> bool {
    let head = String::from_utf8_lossy(head).to_ascii_lowercase();
    let value = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
    if value("transfer-encoding").is_some() {
        return body.ends_with(b"0\r\n\r\n") && unchunked(body).1;
    }
    value("content-length").and_then(|length| length.parse::<usize>().ok()).is_some_and(|length| body.len() >= length)
}

/// The body without the sizes of its chunks (RFC 9112, section 7.1), between which the wanted text may be split, and
/// whether it has the last chunk. Bytes that are no chunks end it.
fn unchunked(mut body: &[u8]) -> (Vec<u8>, bool) {
    let mut content = Vec::new();
    while let Some(end) = body.windows(2).position(|window| window == b"\r\n") {
        let size = std::str::from_utf8(&body[..end]).ok().and_then(|line| line.split(';').next());
        let Some(size) = size.and_then(|size| usize::from_str_radix(size.trim(), 16).ok()) else { break };
        if size == 0 {
            return (content, true);
        }
        let chunk = &body[end + 2..];
        content.extend_from_slice(&chunk[..size.min(chunk.len())]);
        let Some(rest) = size.checked_add(2).and_then(|skip| chunk.get(skip..)) else { break };
        body = rest;
    }
    (content, false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn http(body: Option<&str>) -> Http {
        Http { path: "/".parse().unwrap(), host: None, status: 200..=299, body: body.map(str::to_owned) }
    }

    fn verdict(body: Option<&str>, answer: &str, ended: Option<&str>) -> Option<Result<(), String>> {
        judge(&http(body), answer.as_bytes(), 0, ended).map(|result| result.map_err(|reason| reason.to_string()))
    }

    fn failed(reason: &str) -> Result<(), String> {
        Err(reason.to_owned())
    }

    #[test]
    fn the_status_line_decides_as_soon_as_it_is_there() {
        assert_eq!(verdict(None, "HTTP/1.1 20", None), None);
        assert_eq!(verdict(None, "HTTP/1.1 204 No Content\r\n", None), Some(Ok(())));
        assert_eq!(verdict(None, "HTTP/1.0 200\n", None), Some(Ok(())));
        assert_eq!(verdict(None, "HTTP/1.1 503 Busy\r\n", None), Some(failed("status 503")));
    }

    #[test]
    fn an_answer_that_is_not_http_fails() {
        assert_eq!(verdict(None, "SSH-2.0-x", None), Some(failed(r#"no HTTP answer: "SSH-2.0-x""#)));
        assert_eq!(
            verdict(None, "HTTP/1.1 2000 x\r\n", None),
            Some(failed(r#"no HTTP answer: "HTTP/1.1 2000 x\r\n""#))
        );
        assert_eq!(verdict(None, "", Some("reset")), Some(failed("no HTTP answer: reset")));
        assert!(verdict(None, &format!("HTTP/1.1 200 {}", "x".repeat(5000)), None).unwrap().is_err());
    }

    #[test]
    fn the_body_is_read_until_it_decides() {
        let head = "HTTP/1.1 200 OK\r\n";
        assert_eq!(verdict(Some("up"), &format!("{head}\r\nall is u"), None), None);
        assert_eq!(verdict(Some("up"), &format!("{head}\r\nall is up and"), None), Some(Ok(())));
        let lacks = Some(failed("the body lacks the expected text"));
        assert_eq!(verdict(Some("up"), &format!("{head}\r\ndown"), Some("closed")), lacks);
        assert_eq!(verdict(Some("OK"), &format!("{head}content-length: 4\r\n\r\ndown"), None), lacks);
        assert_eq!(verdict(Some("up"), &format!("{head}\r\n{}", "x".repeat(MOST_READ)), None), lacks);
        let chunked = format!("{head}Transfer-Encoding: chunked\r\n\r\n1\r\nu\r\n1;x\r\np\r\n0\r\n\r\n");
        assert_eq!(verdict(Some("up"), &chunked, None), Some(Ok(())));
        assert_eq!(verdict(Some("down"), &chunked, None), lacks);
    }

    #[test]
    fn a_text_is_found_wherever_the_reads_divide_it() {
        let answer = b"HTTP/1.1 200 OK\r\n\r\nall is up and running";
        for first in 0..answer.len() {
            let judged = |end: usize, before: usize| judge(&http(Some("is up")), &answer[..end], before, None);
            assert!(judged(first, 0).is_some() || judged(answer.len(), first).is_some_and(|it| it.is_ok()), "{first}");
        }
    }

    #[test]
    fn the_end_of_a_chunk_in_the_content_is_not_the_end_of_the_body() {
        let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
        assert_eq!(verdict(Some("up"), &format!("{head}9\r\nabc0\r\n\r\n"), None), None);
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn no_bytes_break_a_check(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            let mut answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
            answer.extend_from_slice(&bytes);
            proptest::prop_assert!(judge(&http(Some("wanted")), &answer, 0, Some("closed")).is_some());
            unchunked(&bytes);
        }
    }
}
