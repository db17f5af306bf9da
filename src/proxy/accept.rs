//! Stage accept: takes a permit, then a connection. An error pauses the loop but never ends it.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::io::Errno;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::ListenerId;
use super::account::Account;
use super::context::WorkerListener;
use super::deal::Dealer;
use super::limit::{ConnectionPermit, Limit};
use super::listening::ListeningSocket;
use super::session::serve_connection;
use super::socket::{TcpOptions, reconfigure};
use super::stats::AcceptError;
use crate::labels::Label as _;
use crate::stream::{Client, Stream};

/// Pause after an error that would repeat at once. It is short because no signal announces free resources.
const PAUSE: Duration = Duration::from_millis(50);

/// Connections accepted before the worker's other tasks run.
const ACCEPTS_PER_TURN: u32 = 16;

/// Accepts connections of one listener on one of its sockets.
#[derive(Debug)]
pub(super) struct Acceptor {
    pub(super) id: ListenerId,
    pub(super) socket: AcceptSocket,
    /// How the next connection is served; a reload replaces it.
    pub(super) listener: RefCell<Rc<WorkerListener>>,
}

/// A listening socket that a worker's runtime polls.
#[derive(Debug)]
pub(super) enum AcceptSocket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl TryFrom<ListeningSocket> for AcceptSocket {
    type Error = io::Error;

    fn try_from(socket: ListeningSocket) -> io::Result<Self> {
        Ok(match socket {
            ListeningSocket::Tcp(listener) => Self::Tcp(TcpListener::from_std(listener)?),
            ListeningSocket::Unix(socket) => Self::Unix(UnixListener::from_std(socket.listener)?),
        })
    }
}

impl AcceptSocket {
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<(Stream, Client)>> {
        Poll::Ready(Ok(match self {
            Self::Tcp(listener) => {
                let (stream, peer) = ready!(listener.poll_accept(cx))?;
                (Stream::Tcp(stream), Client::Ip(peer))
            }
            Self::Unix(listener) => accepted_unix(ready!(listener.poll_accept(cx))?.0),
        }))
    }

    /// The next queued connection; `None` when the queue is empty.
    fn queued(&self) -> Option<io::Result<(Stream, Client)>> {
        let socket = match self {
            Self::Tcp(listener) => SockRef::from(listener),
            Self::Unix(listener) => SockRef::from(listener),
        };
        let (stream, peer) = socket.accept().ok()?;
        let registered = || {
            stream.set_nonblocking(true)?;
            Ok(match peer.as_socket() {
                Some(peer) => (Stream::Tcp(TcpStream::from_std(stream.into())?), Client::Ip(peer)),
                None => accepted_unix(UnixStream::from_std(stream.into())?),
            })
        };
        Some(registered())
    }

    /// Changes the options for connections accepted from now on.
    pub(super) fn reconfigure(&self, tcp: &TcpOptions, backlog: u16) -> io::Result<()> {
        match self {
            Self::Tcp(listener) => reconfigure(listener, tcp, backlog),
            // On a socket that already listens, this changes the length of its queue.
            Self::Unix(listener) => SockRef::from(listener).listen(backlog.into()),
        }
    }
}

fn accepted_unix(stream: UnixStream) -> (Stream, Client) {
    let client = Client::of_unix(&stream);
    (Stream::Unix(stream), client)
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
        let listener = acceptor.listener();
        let permit = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            permit = ConnectionPermit::acquire(&listener.serving.limit, &process) => permit,
        };
        // Not held while the acceptor waits: a reload may replace it.
        drop(listener);
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
                listener.share().count_error(kind);
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
        let Some(accepted) = acceptor.socket.queued() else { break };
        if let Ok((stream, peer)) = accepted {
            dealer.keep();
            spawn_connection(&sessions, stream, peer, permit, Rc::clone(&listener));
        }
    }
}

/// Serves a connection on this worker.
pub(super) fn spawn_connection(
    sessions: &TaskTracker,
    client: Stream,
    peer: Client,
    permit: ConnectionPermit,
    listener: Rc<WorkerListener>,
) {
    tokio::task::spawn_local(sessions.track_future(serve_connection(client, Account::open(listener, peer, permit))));
}

type Accepted = (io::Result<(Stream, Client)>, ConnectionPermit);

/// Accepts with the permit, or releases it and waits; returns `None` when a connection may have arrived. A worker
/// that waits for connections must not hold a permit that another worker's connections need.
async fn accept_or_wait(socket: &AcceptSocket, permit: ConnectionPermit) -> Option<Accepted> {
    let mut permit = Some(permit);
    poll_fn(move |cx| {
        let Some(kept) = permit.take() else { return Poll::Ready(None) };
        let accepted = ready!(socket.poll_accept(cx));
        Poll::Ready(Some((accepted, kept)))
    })
    .await
}

fn classify(error: &io::Error) -> AcceptError {
    match Errno::from_io_error(error) {
        Some(Errno::MFILE | Errno::NFILE) => AcceptError::NoDescriptors,
        Some(Errno::NOBUFS | Errno::NOMEM) => AcceptError::NoMemory,
        Some(Errno::CONNABORTED) => AcceptError::Aborted,
        _ => AcceptError::Other,
    }
}
