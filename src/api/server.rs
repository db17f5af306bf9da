//! The server of the side port: HTTP/1.1 with a limit on connections and a time limit on each step.
//!
//! Nobody may hold what others need. A client has a limited time to send the head of a request, then its body, then to
//! read the answer. When all places are taken, the connection that has been idle for longest makes room for a new one.

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

/// Longest time between two requests of a connection, and for the head of a request. Longer than the interval of most
/// scrapers, which can then keep their connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(20);

/// Longest time for the body of a request.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest body of a request.
const BODY_LIMIT: usize = 1024 * 1024;

/// How long a client may accept none of an answer.
const WRITE_TIMEOUT: Duration = Duration::from_secs(20);

/// Age at which a connection takes no further request. The timeouts above start again with each byte or request.
const LONGEST: Duration = Duration::from_secs(600);

/// How long the last request of a connection may go on.
const LAST_REQUEST: Duration = Duration::from_secs(120);

/// Pause after an accept that failed: no signal announces free descriptors.
const PAUSE: Duration = Duration::from_millis(50);

/// Serves `router` on `listener` until `stop`, with at most `most` open connections. Then it closes the listener and
/// waits for the open requests.
pub async fn serve(listener: TcpListener, router: Router, most: usize, stop: CancellationToken) {
    let router = router.layer(from_fn(receive));
    let (places, connections) = (Arc::new(Semaphore::new(most.max(1))), Connections::default());
    let open = TaskTracker::new();
    while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%error, "cannot accept on the side port");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let Some(permit) = stop.run_until_cancelled(place(&places, &connections)).await else { break };
        let connection = connections.open(permit);
        let router = router.clone().layer(Extension(ConnectInfo(peer))).layer(Extension(Arc::clone(&connection)));
        open.spawn(serve_connection(stream, router, connection, stop.clone()));
    }
    drop(listener);
    open.close();
    open.wait().await;
}

/// Waits for a place. If there is none, ends the connection that has been idle for longest.
async fn place(places: &Arc<Semaphore>, connections: &Connections) -> OwnedSemaphorePermit {
    loop {
        if let Ok(permit) = Arc::clone(places).try_acquire_owned() {
            return permit;
        }
        let has_evicted = connections.evict_idlest();
        // Every connection may be at work, and one may become idle meanwhile.
        let wait = if has_evicted { HEAD_TIMEOUT } else { PAUSE };
        if let Ok(Ok(permit)) = tokio::time::timeout(wait, Arc::clone(places).acquire_owned()).await {
            return permit;
        }
    }
}

async fn serve_connection(stream: TcpStream, router: Router, connection: Arc<Connection>, stop: CancellationToken) {
    // Also ends a connection whose peer acknowledges nothing, or has closed its window (tcp(7)).
    let _ = SockRef::from(&stream).set_tcp_user_timeout(Some(WRITE_TIMEOUT));
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
    let mut serving = pin!(builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)));
    tokio::select! {
        _ = serving.as_mut() => return,
        () = connection.evicted.cancelled() => return,
        () = stop.cancelled() => {}
        () = tokio::time::sleep(LONGEST) => {}
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
    /// Since when it has had no complete request; `None` while it has one.
    idle_since: Mutex<Option<Instant>>,
    evicted: CancellationToken,
}

/// An open connection. Dropping it gives its place back.
#[derive(Debug)]
struct Connection {
    number: u64,
    state: Arc<State>,
    evicted: CancellationToken,
    all: Connections,
    _place: OwnedSemaphorePermit,
}

impl Connections {
    fn open(&self, place: OwnedSemaphorePermit) -> Arc<Connection> {
        let evicted = CancellationToken::new();
        let state = Arc::new(State { idle_since: Mutex::new(Some(Instant::now())), evicted: evicted.clone() });
        let mut all = lock(&self.0);
        all.next += 1;
        let number = all.next;
        all.connections.insert(number, Arc::clone(&state));
        drop(all);
        Arc::new(Connection { number, state, evicted, all: self.clone(), _place: place })
    }

    /// Ends the connection that has been idle for longest. Returns whether there is one.
    fn evict_idlest(&self) -> bool {
        let all = lock(&self.0);
        let idle = all.connections.values().filter(|one| !one.evicted.is_cancelled());
        let idle = idle.filter_map(|one| Some(((*lock(&one.idle_since))?, one)));
        let idlest = idle.min_by_key(|(since, _)| *since);
        if let Some((_, state)) = idlest {
            state.evicted.cancel();
        }
        idlest.is_some()
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
struct AtWork<'a>(&'a State);

impl<'a> AtWork<'a> {
    fn begin(state: &'a State) -> Self {
        *lock(&state.idle_since) = None;
        Self(state)
    }
}

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        *lock(&self.0.idle_since) = Some(Instant::now());
    }
}

/// Middleware: receives the whole body within its limits, then runs the handler.
async fn receive(request: Request, next: Next) -> Response {
    let (mut head, body) = request.into_parts();
    let body = match tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, BODY_LIMIT).collect()).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            let message = "the request body is larger than 1 MiB: send a smaller one";
            return Error::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message).into_response();
        }
        Ok(Err(error)) => return Error::new(StatusCode::BAD_REQUEST, "bad_body", error.to_string()).into_response(),
        Err(_elapsed) => {
            let message = format!("the request body did not arrive within {} s", BODY_TIMEOUT.as_secs());
            return Error::new(StatusCode::REQUEST_TIMEOUT, "body_timeout", message).into_response();
        }
    };
    let connection = head.extensions.remove::<Arc<Connection>>();
    let _at_work = connection.as_ref().map(|connection| AtWork::begin(&connection.state));
    next.run(Request::from_parts(head, body.into())).await
}
