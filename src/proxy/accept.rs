//! Stage accept: a permit, then a connection; errors pause the loop and never end it.

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

use super::account::Account;
use super::lane::Lane;
use super::limit::{Limit, Permit};
use super::session::session;
use super::stats::AcceptError;
use crate::labels::Label as _;

/// Pause after an error that would come again at once. Short: room returns without a signal.
const PAUSE: Duration = Duration::from_millis(50);

/// Connections accepted before the worker's other tasks get their turn.
const ACCEPTS_PER_TURN: u32 = 16;

/// Where a worker accepts for a listener.
#[derive(Debug)]
pub(super) struct Seat {
    pub(super) socket: TcpListener,
    /// How the next connection is served; a reload puts another one in its place.
    pub(super) lane: RefCell<Rc<Lane>>,
}

impl Seat {
    fn lane(&self) -> Rc<Lane> {
        Rc::clone(&self.lane.borrow())
    }
}

/// Accepts on one seat until `stop`, and then what the kernel has already queued.
pub(super) async fn accept(seat: Rc<Seat>, process: Arc<Limit>, sessions: TaskTracker, stop: CancellationToken) {
    let start = |(client, peer): (TcpStream, SocketAddr), permit: Permit, lane: Rc<Lane>| {
        tokio::task::spawn_local(sessions.track_future(session(client, Account::open(lane, peer, permit))));
    };
    let mut turn = 0;
    loop {
        // The permit first: connections over a limit wait in the backlog, not in here.
        let listener = Arc::clone(&seat.lane.borrow().serving.limit);
        let permit = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            permit = Permit::acquire(&listener, &process) => permit,
        };
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            accepted = accept_or_wait(&seat.socket, permit) => accepted,
        };
        match accepted {
            Some((Ok(accepted), permit)) => start(accepted, permit, seat.lane()),
            Some((Err(error), permit)) => {
                drop(permit);
                let kind = classify(&error);
                let lane = seat.lane();
                lane.serving.stats.accept_errors.count(kind);
                if kind != AcceptError::Aborted {
                    tracing::debug!(listener = %lane.serving.name, kind = kind.as_str(), %error, "cannot accept");
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
    // Closing the socket would reset the connections queued on it: they came before the end, serve them.
    let lane = seat.lane();
    // What finds no place stays queued: a successor may have the same socket.
    while let Some(permit) = Permit::try_acquire(&lane.serving.limit, &process) {
        let Some((stream, peer)) = queued(&seat.socket) else { break };
        if let Ok(stream) = TcpStream::from_std(stream) {
            start((stream, peer), permit, Rc::clone(&lane));
        }
    }
}

type Accepted = (io::Result<(TcpStream, SocketAddr)>, Permit);

/// Accepts with the permit, or gives it back and waits; `None` when there may be a connection now. A worker
/// that waits for connections must not sit on a permit that another one's connections wait for.
async fn accept_or_wait(listener: &TcpListener, permit: Permit) -> Option<Accepted> {
    let mut permit = Some(permit);
    poll_fn(move |cx| {
        let Some(kept) = permit.take() else { return Poll::Ready(None) };
        let accepted = ready!(listener.poll_accept(cx));
        Poll::Ready(Some((accepted, kept)))
    })
    .await
}

/// A connection that is queued, if there is one.
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
