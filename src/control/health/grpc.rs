//! The gRPC check: asks the server's health service (`grpc.health.v1.Health/Check`) over HTTP/2 without TLS.
//!
//! The two messages are small, so this file writes and reads them itself. Their definition:
//! <https://github.com/grpc/grpc/blob/master/doc/health-checking.md>

use std::error::Error as _;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http2;
use hyper::header::HeaderMap;
use hyper::{Request, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio_util::task::AbortOnDropHandle;

use super::check::{Grpc, PARTING, Reason};
use crate::address::Address;
use crate::stream::Stream;

/// Most bytes of an answer that a check reads.
const MOST_READ: usize = 64 * 1024;

/// The status in which a service serves.
const SERVING: &str = "SERVING";

/// The statuses of a service, by number.
const STATUSES: [&str; 4] = ["UNKNOWN", SERVING, "NOT_SERVING", "SERVICE_UNKNOWN"];

/// The codes of gRPC, by number.
const CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// Speaks to the server. The error is a short reason.
pub(super) async fn speak(grpc: &Grpc, stream: Stream, address: &Address) -> Result<(), Reason> {
    let no_answer = |error: hyper::Error| -> Reason {
        let cause = error.source().map_or_else(|| error.to_string(), ToString::to_string);
        format!("no gRPC answer: {cause}").into()
    };
    let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(no_answer)?;
    let connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let host = address.ip().map_or("localhost".to_owned(), |ip| ip.to_string());
    let request = Request::post(format!("http://{host}/grpc.health.v1.Health/Check"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("user-agent", concat!("ringway/", env!("CARGO_PKG_VERSION")))
        .body(Full::new(Bytes::from(message(&grpc.service))));
    // The host is an address, so the request is valid.
    let request = request.map_err(|error| Reason::from(error.to_string()))?;
    let answer = sender.send_request(request).await.map_err(no_answer)?;
    let (head, body) = answer.into_parts();
    if head.status != StatusCode::OK {
        return Err(format!("HTTP status {}", head.status.as_u16()).into());
    }
    let body = Limited::new(body, MOST_READ).collect().await;
    let body = body.map_err(|error| Reason::from(format!("no gRPC answer: {error}")))?;
    // The end of the sender ends the connection, with a goodbye.
    drop(sender);
    tokio::spawn(tokio::time::timeout(PARTING, connection));
    // An answer without a message has its code in the head.
    let code = body.trailers().and_then(code).or_else(|| code(&head.headers));
    judge(code.as_deref(), &body.to_bytes())
}

/// The result of a check, by the code of the call and the message.
fn judge(code: Option<&str>, message: &[u8]) -> Result<(), Reason> {
    match code {
        None => return Err("no gRPC answer: it has no grpc-status".into()),
        Some("0") => {}
        Some(other) => {
            let name = other.parse().ok().and_then(|number: usize| CODES.get(number).copied());
            return Err(format!("gRPC code {}", name.unwrap_or(other)).into());
        }
    }
    match status(message) {
        Some(SERVING) => Ok(()),
        Some(other) => Err(Reason::answer(other)),
        None => Err("the answer is no health message".into()),
    }
}

fn code(headers: &HeaderMap) -> Option<String> {
    headers.get("grpc-status")?.to_str().ok().map(str::to_owned)
}

/// A request with the name of a service, behind its prefix: not compressed, and its length.
fn message(service: &str) -> Vec<u8> {
    let mut request = Vec::new();
    if !service.is_empty() {
        // Field 1, a text. The config allows up to 127 bytes, so the length is one byte.
        request.extend([0x0a, service.len() as u8]);
        request.extend(service.as_bytes());
    }
    let mut message = vec![0];
    message.extend((request.len() as u32).to_be_bytes());
    message.extend(request);
    message
}

/// The status in a response; `None`: the message is not a response.
fn status(message: &[u8]) -> Option<&'static str> {
    let (prefix, response) = message.split_at_checked(5)?;
    let length = u32::from_be_bytes(prefix[1..].try_into().ok()?) as usize;
    if prefix[0] != 0 || response.len() != length {
        return None;
    }
    match response {
        // The number 0 is left out.
        [] => Some(STATUSES[0]),
        // Field 1, a number.
        [0x08, number, ..] => STATUSES.get(usize::from(*number)).copied(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_its_prefix_and_the_name() {
        assert_eq!(message(""), [0, 0, 0, 0, 0]);
        assert_eq!(message("ab"), [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
    }

    #[test]
    fn only_a_service_that_serves_passes() {
        let with =
            |number: u8| judge(Some("0"), &[0, 0, 0, 0, 2, 8, number]).map_err(|why| (why.to_string(), why.is_answer));
        assert_eq!(with(1), Ok(()));
        assert_eq!(with(2), Err(("NOT_SERVING".to_owned(), true)));
        assert_eq!(with(3), Err(("SERVICE_UNKNOWN".to_owned(), true)));
        let failed = |code: Option<&str>, message: &[u8]| judge(code, message).unwrap_err().to_string();
        assert_eq!(failed(Some("0"), &[0, 0, 0, 0, 0]), "UNKNOWN");
        assert_eq!(failed(Some("12"), &[]), "gRPC code UNIMPLEMENTED");
        assert_eq!(failed(Some("5"), &[]), "gRPC code NOT_FOUND");
        assert_eq!(failed(Some("99"), &[]), "gRPC code 99");
        assert_eq!(failed(None, &[]), "no gRPC answer: it has no grpc-status");
        for message in [&[][..], &[0, 0, 0], &[1, 0, 0, 0, 2, 8, 1], &[0, 0, 0, 0, 3, 8, 1], &[0, 0, 0, 0, 2, 8, 9]] {
            assert_eq!(failed(Some("0"), message), "the answer is no health message", "{message:?}");
        }
    }
}
