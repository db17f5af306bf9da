//! `GET /api/status` on listeners with `answer_status`: one response per connection, with less in it for strangers.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::mpsc;

use super::State;
use super::status::Status;
use crate::proxy::{Intercept, Intercepted};
use crate::stream::{Client, Stream};

/// Maximum number of intercepted connections that wait for a response. Ringway sends further ones to a backend.
const WAITING: usize = 64;

/// Maximum time for one response on a listener. The client has already sent the start of its request.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Creates the [`Intercept`] for listeners with `answer_status`, and the queue of the connections that it intercepts.
pub fn intercept() -> (Intercept, mpsc::Receiver<Intercepted>) {
    let (taker, taken) = mpsc::channel(WAITING);
    (Intercept { first_bytes: &[b"GET /api/status ", b"GET /api/status?"], taker }, taken)
}

/// Responds on the connections that listeners hand over.
pub async fn answer(state: Arc<State>, mut taken: mpsc::Receiver<Intercepted>) {
    while let Some(connection) = taken.recv().await {
        let state = Arc::clone(&state);
        tokio::spawn(async move {
            // A client that does not read its response loses only its own connection.
            let _ = tokio::time::timeout(ANSWER_TIMEOUT, answer_one(&state, connection)).await;
        });
    }
}

/// Sends one response and closes the connection, because the client's next request may be for the backend.
async fn answer_one(state: &State, connection: Intercepted) -> Result<(), hyper::Error> {
    let _permit = connection.permit;
    let Ok(stream) = Stream::try_from(connection.stream) else { return Ok(()) };
    let is_local = match connection.client {
        Client::Ip(peer) => peer.ip().to_canonical().is_loopback(),
        Client::Unix { .. } => true,
    };
    let service = service_fn(|request: Request<hyper::body::Incoming>| async move {
        // A web page can make a browser on this host ask under a name of its own (DNS rebinding).
        let is_local = is_local && state.guard.names_this_host(request.headers());
        let status = Status::of(state);
        let status = if is_local { status } else { status.for_strangers() };
        let body = serde_json::to_vec(&status).unwrap_or_default();
        let mut response = Response::new(Full::new(Bytes::from(body)));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Ok::<_, Infallible>(response)
    });
    hyper::server::conn::http1::Builder::new()
        .keep_alive(false)
        .half_close(true)
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), service)
        .await
}
