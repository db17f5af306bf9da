//! Pulls an image. The client library encodes credentials in plain Base64, but the engine reads the URL-safe form: some passwords
//! would not arrive. So this call is made by hand.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use bollard::auth::DockerCredentials;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::Request;
use hyper::header::HOST;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::{TcpStream, UnixStream};
use tokio_util::either::Either;
use tokio_util::task::AbortOnDropHandle;

use crate::text::encoded;

/// Longest time without progress.
const SILENCE: Duration = Duration::from_secs(120);

/// Longest message of the engine, in bytes.
const LONGEST: usize = 64 * 1024;

/// Why a pull failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The engine is unreachable, or does not go on.
    Away(String),
    /// The engine or the registry refuses.
    Refused { status: u16, message: String },
}

/// A message about the progress, or the answer to a call that is refused.
#[derive(Deserialize)]
struct Message {
    /// Set if the pull has failed.
    error: Option<String>,
    /// Set if the call is refused.
    message: Option<String>,
}

/// Pulls an image through the engine at this address.
pub(super) async fn pull(
    host: &str,
    (name, tag): (&str, &str),
    credentials: Option<&DockerCredentials>,
) -> Result<(), Failure> {
    let away = |error: &dyn std::fmt::Display| Failure::Away(error.to_string());
    let soon = || Failure::Away(format!("the pull makes no progress for {} s", SILENCE.as_secs()));
    let stream =
        tokio::time::timeout(SILENCE, connect(host)).await.map_err(|_| soon())?.map_err(|error| away(&error))?;
    let path = format!("/images/create?fromImage={}&tag={}", encoded(name), encoded(tag));
    let mut request = Request::post(path).header(HOST, "docker");
    if let Some(credentials) = credentials {
        let json = serde_json::to_vec(credentials).map_err(|error| away(&error))?;
        request = request.header("x-registry-auth", URL_SAFE.encode(json));
    }
    let request = request.body(Empty::<Bytes>::new()).map_err(|error| away(&error))?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| away(&error))?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let answer = tokio::time::timeout(SILENCE, sender.send_request(request)).await.map_err(|_| soon())?;
    let (head, mut body) = answer.map_err(|error| away(&error))?.into_parts();
    let (mut text, mut failure) = (Vec::new(), None);
    while let Some(frame) = tokio::time::timeout(SILENCE, body.frame()).await.map_err(|_| soon())? {
        text.extend_from_slice(&frame.map_err(|error| away(&error))?.into_data().unwrap_or_default());
        failure = last_failure(&mut text).or(failure);
    }
    text.push(b'\n');
    failure = last_failure(&mut text).or(failure);
    match (head.status.is_success(), failure) {
        (true, None) => Ok(()),
        (true, Some(message)) => Err(Failure::Refused { status: 500, message }),
        (false, message) => {
            let status = head.status.as_u16();
            Err(Failure::Refused { status, message: message.unwrap_or_else(|| head.status.to_string()) })
        }
    }
}

/// Takes the whole lines out of `text`, and returns the last failure in them.
fn last_failure(text: &mut Vec<u8>) -> Option<String> {
    let end = text.iter().rposition(|&byte| byte == b'\n')? + 1;
    let messages = text[..end].split(|&byte| byte == b'\n').rev().filter_map(|line| serde_json::from_slice(line).ok());
    let failure = messages.into_iter().find_map(|Message { error, message }| error.or(message));
    text.drain(..end);
    // A line that is this long is no message.
    text.truncate(LONGEST);
    failure
}

async fn connect(host: &str) -> std::io::Result<Either<UnixStream, TcpStream>> {
    match host.split_once("://") {
        Some(("unix", path)) => Ok(Either::Left(UnixStream::connect(path).await?)),
        Some((_, address)) => Ok(Either::Right(TcpStream::connect(address.trim_end_matches('/')).await?)),
        None => Ok(Either::Right(TcpStream::connect(host).await?)),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// Answers one call with these bytes. Returns what was asked.
    async fn asked(answer: &'static str, password: &str) -> (String, Result<(), Failure>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = format!("tcp://{}", listener.local_addr().unwrap());
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            stream.write_all(answer.as_bytes()).await.unwrap();
            String::from_utf8(head).unwrap()
        });
        let credentials = DockerCredentials { password: Some(password.to_owned()), ..DockerCredentials::default() };
        let pulled = pull(&host, ("a.example/b c", "1"), Some(&credentials)).await;
        (server.await.unwrap(), pulled)
    }

    #[tokio::test]
    async fn every_password_arrives() {
        const DONE: &str =
            "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{\"status\":\"Pulling\"}\r\n{\"status\":\"Done\"}\r\n";
        for password in ["plain", "??>>~~??>", "?x>y~z", "pässwörd\u{7f}ÿÿÿ", "\"\\"] {
            let (head, pulled) = asked(DONE, password).await;
            assert!(
                pulled.is_ok() && head.starts_with("POST /images/create?fromImage=a.example%2Fb%20c&tag=1 "),
                "{head}"
            );
            let given = head.lines().find_map(|line| line.strip_prefix("x-registry-auth: ")).unwrap();
            assert!(!given.contains(['+', '/']), "{given}");
            let json: serde_json::Value = serde_json::from_slice(&URL_SAFE.decode(given).unwrap()).unwrap();
            assert_eq!(json["password"], password);
        }
    }

    #[tokio::test]
    async fn the_last_error_of_a_pull_is_told() {
        const REFUSED: &str = "HTTP/1.1 404 Not Found\r\nconnection: close\r\n\r\n{\"message\":\"no such image\"}\n";
        const EMPTY: &str = "HTTP/1.1 500 Internal Server Error\r\nconnection: close\r\n\r\n";
        const FAILED: &str =
            "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{\"status\":\"Pulling\"}\r\n{\"error\":\"unauthorized\"}";
        assert!(
            matches!(asked(FAILED, "").await.1, Err(Failure::Refused { message, .. }) if message == "unauthorized")
        );
        let refused = asked(REFUSED, "").await.1;
        assert!(matches!(refused, Err(Failure::Refused { status: 404, message }) if message == "no such image"));
        assert!(matches!(asked(EMPTY, "").await.1, Err(Failure::Refused { status: 500, .. })));
        let gone = pull("unix:///no/such/socket", ("a", "1"), None).await;
        assert!(matches!(gone, Err(Failure::Away(error)) if error.contains("No such file")));
    }
}
