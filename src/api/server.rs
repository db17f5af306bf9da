//! The server of the side port: HTTP/1.1 with a limit on connections and a time limit on each step.
//!
//! A client has a limited time to send the head of a request, then its body, then to read the answer. When all permits
//! are taken, the connection that has been idle for longest makes room for a new one.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{ConnectInfo, Request};
use axum::http::StatusCode;
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse as _, Response};
use axum::{Extension, Router};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::error::Error;

/// Longest body of a request.
const BODY_LIMIT: usize = 1024 * 1024;

/// The limits of the server.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Maximum open connections; at least 1.
    pub connections: usize,
    /// Longest time between two requests of a connection, and for the head of a request.
    pub head: Duration,
    /// Longest time for the body of a request.
    pub body: Duration,
    /// How long a client may accept none of an answer.
    pub write: Duration,
    /// Age at which a connection takes no further request. The times above start again with each byte or request.
    pub age: Duration,
}

impl Limits {
    /// The usual times, with at most this number of open connections. `head` is longer than the interval of most
    /// scrapers, which can then keep their connection.
    pub fn new(connections: usize) -> Self {
        let seconds = Duration::from_secs;
        Self { connections, head: seconds(20), body: seconds(10), write: seconds(20), age: seconds(600) }
    }
}

/// How long the last request of a connection may go on.
const LAST_REQUEST: Duration = Duration::from_secs(120);

/// How long a request may be on its way when the server stops.
const ON_ITS_WAY: Duration = Duration::from_secs(1);

/// Time until another connection makes room, if all were at work.
const AGAIN: Duration = Duration::from_millis(50);

/// Pause after an accept that failed: no signal announces free descriptors.
const PAUSE: Duration = Duration::from_millis(50);

/// Serves `router` on `listener` within the limits until `stop`, then closes the listener. Returns the connections that
/// are still open; each ends after its last answer.
pub async fn serve(listener: TcpListener, router: Router, limits: Limits, stop: CancellationToken) -> TaskTracker {
    let router = router.layer(from_fn(move |request, next| receive(limits.body, request, next)));
    let (permits, connections) = (Arc::new(Semaphore::new(limits.connections.max(1))), Connections::default());
    let open = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            // First, because the successor answers the connections that wait now.
            biased;
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection on the side port");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let Some(permit) = stop.run_until_cancelled(permit(&permits, &connections)).await else { break };
        let connection = connections.open(permit);
        let router = router.clone().layer(Extension(ConnectInfo(peer))).layer(Extension(Arc::clone(&connection)));
        open.spawn(serve_connection(stream, router, limits, connection, stop.clone()));
    }
    open.close();
    open
}

/// Takes a permit. If all are taken, ends the connection that has been idle for longest.
async fn permit(permits: &Arc<Semaphore>, connections: &Connections) -> OwnedSemaphorePermit {
    loop {
        if let Ok(permit) = Arc::clone(permits).try_acquire_owned() {
            return permit;
        }
        connections.evict_idlest();
        if let Ok(Ok(permit)) = tokio::time::timeout(AGAIN, Arc::clone(permits).acquire_owned()).await {
            return permit;
        }
    }
}

async fn serve_connection(
    stream: TcpStream,
    router: Router,
    limits: Limits,
    connection: Arc<Connection>,
    stop: CancellationToken,
) {
    // Also ends a connection whose peer acknowledges nothing, or has closed its window (tcp(7)).
    let _ = SockRef::from(&stream).set_tcp_user_timeout(Some(limits.write));
    let over = async || {
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(limits.age) => {}
        }
    };
    // When told to stop, hyper closes a connection of which it has read nothing. The request may be on its way.
    let mut first = [0];
    let is_begun = tokio::select! {
        begun = tokio::time::timeout(limits.head, stream.peek(&mut first)) => matches!(begun, Ok(Ok(1))),
        () = connection.state.evicted.cancelled() => false,
        () = async { over().await; tokio::time::sleep(ON_ITS_WAY).await } => false,
    };
    if !is_begun {
        return;
    }
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(limits.head);
    let mut serving = pin!(builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)));
    tokio::select! {
        // First, so hyper reads before it can be told to stop.
        biased;
        _ = serving.as_mut() => return,
        () = connection.state.evicted.cancelled() => return,
        () = over() => {}
    }
    serving.as_mut().graceful_shutdown();
    let _ = tokio::time::timeout(LAST_REQUEST, poll_fn(|cx| serving.as_mut().poll(cx))).await;
}

/// The open connections by number.
#[derive(Debug, Clone, Default)]
struct Connections(Arc<Mutex<Open>>);

#[derive(Debug, Default)]
struct Open {
    next: u64,
    connections: BTreeMap<u64, Arc<State>>,
}

/// What others see of a connection.
#[derive(Debug)]
struct State {
    /// Since when it has had no request to work on; `None` while it has one. A client that still reads its answer has none.
    idle_since: Mutex<Option<Instant>>,
    evicted: CancellationToken,
}

/// An open connection. Dropping it returns its permit.
#[derive(Debug)]
struct Connection {
    number: u64,
    state: Arc<State>,
    all: Connections,
    _permit: OwnedSemaphorePermit,
}

impl Connections {
    fn open(&self, permit: OwnedSemaphorePermit) -> Arc<Connection> {
        let idle_since = Mutex::new(Some(Instant::now()));
        let state = Arc::new(State { idle_since, evicted: CancellationToken::new() });
        let mut all = lock(&self.0);
        all.next += 1;
        let number = all.next;
        all.connections.insert(number, Arc::clone(&state));
        drop(all);
        Arc::new(Connection { number, state, all: self.clone(), _permit: permit })
    }

    /// Ends the connection that has been idle for longest, if there is one.
    fn evict_idlest(&self) {
        let all = lock(&self.0);
        let idle = all.connections.values().filter(|one| !one.evicted.is_cancelled());
        let idle = idle.filter_map(|one| Some(((*lock(&one.idle_since))?, one)));
        if let Some((_, state)) = idle.min_by_key(|(since, _)| *since) {
            state.evicted.cancel();
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        lock(&self.all.0).connections.remove(&self.number);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Marks a connection as at work.
pub(super) struct AtWork(Arc<State>);

impl AtWork {
    fn begin(state: &Arc<State>) -> Self {
        *lock(&state.idle_since) = None;
        Self(Arc::clone(state))
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        *lock(&self.0.idle_since) = Some(Instant::now());
    }
}

/// Middleware: receives the whole body within its limits, then runs the handler.
async fn receive(timeout: Duration, request: Request, next: Next) -> Response {
    let (mut head, body) = request.into_parts();
    let body = match tokio::time::timeout(timeout, Limited::new(body, BODY_LIMIT).collect()).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            let message = "the request body is larger than 1 MiB: send a smaller one";
            return Error::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message).into_response();
        }
        Ok(Err(error)) => return Error::new(StatusCode::BAD_REQUEST, "bad_body", error.to_string()).into_response(),
        Err(_elapsed) => {
            let message = format!("the request body did not arrive within {timeout:?}");
            return Error::new(StatusCode::REQUEST_TIMEOUT, "body_timeout", message).into_response();
        }
    };
    let connection = head.extensions.remove::<Arc<Connection>>();
    if let Some(connection) = connection {
        // A handler whose answer goes on can keep it.
        head.extensions.insert(Arc::new(AtWork::begin(&connection.state)));
    }
    let at_work = head.extensions.get::<Arc<AtWork>>().cloned();
    let response = next.run(Request::from_parts(head, body.into())).await;
    drop(at_work);
    response
}

#[cfg(test)]
mod tests {
    use axum::routing::{get, post};
    use bytes::Bytes;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio_util::sync::DropGuard;

    use super::*;

    const SHORT: Duration = Duration::from_millis(100);

    async fn start(limits: Limits) -> (std::net::SocketAddr, DropGuard) {
        let router = Router::new()
            .route("/fast", get(|| async { "fast" }))
            .route("/slow", get(|| async { tokio::time::sleep(Duration::from_secs(2)).await }))
            .route("/body", post(|body: Bytes| async move { body.len().to_string() }));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
        tokio::spawn(serve(listener, router, limits, stop.clone()));
        (address, stop.drop_guard())
    }

    async fn send(address: std::net::SocketAddr, text: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
        stream
    }

    /// What the server still sends until it closes the connection.
    async fn rest(mut stream: TcpStream) -> String {
        let mut rest = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(60), stream.read_to_end(&mut rest)).await;
        // A reset is an end too.
        let _ = read.expect("the server keeps the connection open");
        String::from_utf8(rest).unwrap()
    }

    const FAST: &str = "GET /fast HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";

    #[tokio::test]
    async fn a_request_that_is_on_its_way_at_the_end_is_answered() {
        let (address, stop) = start(Limits::new(8)).await;
        let mut early = send(address, "").await;
        // The server accepts connections in their order.
        assert!(rest(send(address, FAST).await).await.ends_with("fast"));
        drop(stop);
        while TcpStream::connect(address).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        early.write_all(FAST.as_bytes()).await.unwrap();
        let answer = rest(early).await;
        assert!(answer.ends_with("fast"), "{answer}");
    }

    #[tokio::test]
    async fn half_a_head_and_an_idle_connection_are_closed() {
        let (address, _stop) = start(Limits { head: SHORT, ..Limits::new(8) }).await;
        assert_eq!(rest(send(address, "GET /fast HTT").await).await, "");
        assert_eq!(rest(send(address, "").await).await, "");
        let kept = rest(send(address, "GET /fast HTTP/1.1\r\nhost: x\r\n\r\n").await).await;
        assert!(kept.ends_with("fast"), "{kept}");
    }

    #[tokio::test]
    async fn half_a_body_is_answered_with_408() {
        let (address, _stop) = start(Limits { body: SHORT, ..Limits::new(8) }).await;
        let answer =
            rest(send(address, "POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\nhalf").await).await;
        assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("body_timeout"), "{answer}");
    }

    #[tokio::test]
    async fn an_old_connection_takes_no_further_request() {
        let (address, _stop) = start(Limits { age: SHORT, ..Limits::new(8) }).await;
        assert_eq!(rest(send(address, "").await).await, "");
        let answer = rest(send(address, "GET /slow HTTP/1.1\r\nhost: x\r\n\r\n").await).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "the open request is finished: {answer}");
    }

    #[tokio::test]
    async fn idle_connections_make_room_and_busy_ones_do_not() {
        let (address, _stop) = start(Limits::new(3)).await;
        let busy = send(address, "GET /slow HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
        let mut idle = Vec::new();
        for _ in 0..20 {
            idle.push(send(address, "GET /fast").await);
        }
        for _ in 0..10 {
            assert!(rest(send(address, FAST).await).await.ends_with("fast"));
        }
        assert!(rest(busy).await.starts_with("HTTP/1.1 200"));
    }
}
