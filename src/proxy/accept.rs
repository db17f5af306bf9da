//! Stage accept: takes a permit, then a connection. An error pauses the loop but never ends it.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::Duration;

use rustix::io::Errno;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::ListenerId;
use super::account::Account;
use super::context::WorkerListener;
use super::deal::Dealer;
use super::limit::{ConnectionPermit, Limit};
use super::session::serve_connection;
use super::stats::AcceptError;
use crate::labels::Label as _;

/// Pause after an error that would repeat at once. It is short because no signal announces free resources.
const PAUSE: Duration = Duration::from_millis(50);

/// Connections accepted before the worker's other tasks run.
const ACCEPTS_PER_TURN: u32 = 16;

/// Accepts connections of one listener on one of its sockets.
#[derive(Debug)]
pub(super) struct Acceptor {
    pub(super) id: ListenerId,
    pub(super) socket: TcpListener,
    /// How the next connection is served; a reload replaces it.
    pub(super) listener: RefCell<Rc<WorkerListener>>,
}

impl Acceptor {
    fn listener(&self) -> Rc<WorkerListener> {
        Rc::clone(&self.listener.borrow())
    }
}

/// Accepts on one socket until `stop`, then accepts the connections that the kernel has already queued.
pub(super) async fn accept(
    acceptor: Rc<Acceptor>,
    dealer: Rc<Dealer>,
    process: Arc<Limit>,
    sessions: TaskTracker,
    stop: CancellationToken,
) {
    let mut turn = 0;
    loop {
        // The permit comes first: connections over a limit wait in the kernel's backlog, not in this process.
        let listener_limit = Arc::clone(&acceptor.listener.borrow().serving.limit);
        let permit = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            permit = ConnectionPermit::acquire(&listener_limit, &process) => permit,
        };
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            accepted = accept_or_wait(&acceptor.socket, permit) => accepted,
        };
        match accepted {
            Some((Ok((client, peer)), permit)) => {
                let listener = acceptor.listener();
                if let Some((client, permit)) = dealer.deal(acceptor.id, &listener, client, peer, permit) {
                    spawn_connection(&sessions, client, peer, permit, listener);
                }
            }
            Some((Err(error), permit)) => {
                drop(permit);
                let kind = classify(&error);
                let listener = acceptor.listener();
                listener.serving.stats.accept_errors.count(kind);
                if kind != AcceptError::Aborted {
                    tracing::debug!(listener = %listener.serving.name, kind = kind.as_str(), %error, "cannot accept");
                    tokio::time::sleep(PAUSE).await;
                }
            }
            None => continue,
        }
        turn += 1;
        if turn == ACCEPTS_PER_TURN {
            turn = 0;
            tokio::task::yield_now().await;
        }
    }
    // Closing the socket would reset the connections queued on it. They arrived before the stop, so serve them.
    let listener = acceptor.listener();
    // Connections without a permit stay queued: a successor process may hold the same socket.
    while let Some(permit) = ConnectionPermit::try_acquire(&listener.serving.limit, &process) {
        let Some((stream, peer)) = queued(&acceptor.socket) else { break };
        if let Ok(stream) = TcpStream::from_std(stream) {
            dealer.keep();
            spawn_connection(&sessions, stream, peer, permit, Rc::clone(&listener));
        }
    }
}

/// Serves a connection on this worker.
pub(super) fn spawn_connection(
    sessions: &TaskTracker,
    client: TcpStream,
    peer: SocketAddr,
    permit: ConnectionPermit,
    listener: Rc<WorkerListener>,
) {
    tokio::task::spawn_local(sessions.track_future(serve_connection(client, Account::open(listener, peer, permit))));
}

type Accepted = (io::Result<(TcpStream, SocketAddr)>, ConnectionPermit);

/// Accepts with the permit, or releases it and waits; returns `None` when a connection may have arrived. A worker
/// that waits for connections must not hold a permit that another worker's connections need.
async fn accept_or_wait(listener: &TcpListener, permit: ConnectionPermit) -> Option<Accepted> {
    let mut permit = Some(permit);
    poll_fn(move |cx| {
        let Some(kept) = permit.take() else { return Poll::Ready(None) };
        let accepted = ready!(listener.poll_accept(cx));
        Poll::Ready(Some((accepted, kept)))
    })
    .await
}

/// The next queued connection; `None` when the queue is empty.
fn queued(listener: &TcpListener) -> Option<(std::net::TcpStream, SocketAddr)> {
    let (stream, peer) = SockRef::from(listener).accept().ok()?;
    stream.set_nonblocking(true).ok()?;
    Some((stream.into(), peer.as_socket()?))
}

fn classify(error: &io::Error) -> AcceptError {
    match Errno::from_io_error(error) {
        Some(Errno::MFILE | Errno::NFILE) => AcceptError::NoDescriptors,
        Some(Errno::NOBUFS | Errno::NOMEM) => AcceptError::NoMemory,
        Some(Errno::CONNABORTED) => AcceptError::Aborted,
        _ => AcceptError::Other,
    }
}
