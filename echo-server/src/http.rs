//! The echo server's HTTP routes.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Either, Full, Limited};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::Server;

const BODY_LIMIT: usize = 16 * 1024 * 1024;

/// Serves one HTTP connection until it ends. When the server stops, the current request still ends.
pub(crate) async fn serve(server: &Arc<Server>, stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let service = service_fn(|request| {
        let server = Arc::clone(server);
        async move { Ok::<_, std::convert::Infallible>(answer(&server, request).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .half_close(true)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = server.stopping.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    ended.map_err(io::Error::other)
}

type Answer = Response<Either<Full<Bytes>, Filler>>;

/// A body of this number of filler bytes.
struct Filler(u64);

static CHUNK: [u8; 64 * 1024] = [b'd'; 64 * 1024];

impl Body for Filler {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let size = usize::try_from(self.0).map_or(CHUNK.len(), |left| left.min(CHUNK.len()));
        self.0 -= size as u64;
        Poll::Ready((size > 0).then(|| Ok(Frame::data(Bytes::from_static(&CHUNK[..size])))))
    }

    fn is_end_stream(&self) -> bool {
        self.0 == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0)
    }
}

async fn answer(server: &Server, request: Request<Incoming>) -> Answer {
    // Simulated work: the semaphore limits the concurrent requests, and the others wait.
    let turn = server.turns.acquire().await;
    if !server.delay.is_zero() {
        tokio::time::sleep(server.delay).await;
    }
    drop(turn);
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let bytes = path.strip_prefix("/bytes/").and_then(|bytes| bytes.parse::<u64>().ok());
    let allowed = match path.as_str() {
        "/api/request" | "/sink" => Method::POST,
        "/api/status" | "/heartbeat" | "/home" => Method::GET,
        _ if bytes.is_some() => Method::GET,
        _ => {
            return reply(
                server,
                StatusCode::NOT_FOUND,
                &json!({"error": {"code": "not_found", "message": format!("no such path: {path}")}}),
            );
        }
    };
    if method != allowed && !(method == Method::HEAD && allowed == Method::GET) {
        let allow = if allowed == Method::GET { "GET, HEAD" } else { "POST" };
        let message = format!("{path} supports only {allow}");
        let mut refusal = reply(
            server,
            StatusCode::METHOD_NOT_ALLOWED,
            &json!({"error": {"code": "method_not_allowed", "message": message}}),
        );
        refusal.headers_mut().insert(ALLOW, HeaderValue::from_static(allow));
        return refusal;
    }
    match path.as_str() {
        "/api/request" => echo(server, request.into_body()).await,
        "/api/status" => reply(server, StatusCode::OK, &status(server)),
        "/home" => reply(
            server,
            StatusCode::OK,
            &json!({"message": format!("Hello from Server: {}", server.name), "status": "successful"}),
        ),
        "/sink" => sink(server, request.into_body()).await,
        "/heartbeat" => signed(server, Response::new(Either::Left(Full::default()))),
        _ => signed(server, Response::new(Either::Right(Filler(bytes.unwrap_or(0))))),
    }
}

/// Reads a body of any length and answers with its length.
async fn sink(server: &Server, mut body: Incoming) -> Answer {
    let mut length = 0;
    while let Some(frame) = body.frame().await {
        match frame {
            Ok(frame) => length += frame.data_ref().map_or(0, Bytes::len),
            Err(error) => {
                let refusal = json!({"error": {"code": "bad_body", "message": error.to_string()}});
                return reply(server, StatusCode::BAD_REQUEST, &refusal);
            }
        }
    }
    reply(server, StatusCode::OK, &json!({"server": server.name, "bytes": length}))
}

/// The answer to `POST /api/request`, with the fields in this order.
#[derive(Serialize)]
struct Echo<'a> {
    server: &'a str,
    data: Value,
}

/// Answers with the body, as JSON if it is JSON, else as text.
async fn echo(server: &Server, body: Incoming) -> Answer {
    let bytes = match Limited::new(body, BODY_LIMIT).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => {
            let refusal = json!({"error": {"code": "bad_body", "message": error.to_string()}});
            return reply(server, StatusCode::BAD_REQUEST, &refusal);
        }
    };
    let data: Value =
        serde_json::from_slice(&bytes).unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).into_owned()));
    reply(server, StatusCode::OK, &Echo { server: &server.name, data })
}

fn status(server: &Server) -> Value {
    json!({
        "server": server.name,
        "uptime_seconds": server.started.elapsed().as_secs_f64(),
        "connections": {
            "active": server.active.load(Ordering::Relaxed),
            "total": server.total.load(Ordering::Relaxed),
        },
    })
}

fn reply(server: &Server, status: StatusCode, body: &impl Serialize) -> Answer {
    // Text, numbers and maps with text keys always serialize.
    let mut bytes = serde_json::to_vec(body).unwrap_or_default();
    bytes.push(b'\n');
    let mut response = Response::new(Either::Left(Full::new(Bytes::from(bytes))));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    signed(server, response)
}

fn signed(server: &Server, mut response: Answer) -> Answer {
    if let Ok(name) = HeaderValue::from_str(&server.name) {
        response.headers_mut().insert("x-server", name);
    }
    response
}
