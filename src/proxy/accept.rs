//! Stage accept: a permit, then a connection; errors pause the loop and never end it.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::Duration;

use rustix::io::Errno;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::lane::Lane;
use super::session::session;
use super::stats::AcceptError;
use crate::labels::Label as _;

/// Pause after an error that would come again at once. Short: room returns without a signal.
const PAUSE: Duration = Duration::from_millis(50);

/// Connections accepted before the worker's other tasks get their turn.
const ACCEPTS_PER_TURN: u32 = 16;

/// Accepts for one lane until `stop`, and then what the kernel has already queued.
pub(super) async fn accept(
    lane: Rc<Lane>,
    listener: TcpListener,
    limit: Arc<Semaphore>,
    sessions: TaskTracker,
    stop: CancellationToken,
) {
    let start = |(client, peer): (TcpStream, SocketAddr), permit: OwnedSemaphorePermit| {
        tokio::task::spawn_local(sessions.track_future(session(client, peer, permit, Rc::clone(&lane))));
    };
    let mut turn = 0;
    loop {
        // The permit first: connections over the limit wait in the backlog, not in here.
        let permit = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            permit = Arc::clone(&limit).acquire_owned() => permit,
        };
        let Ok(permit) = permit else { break };
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            accepted = accept_or_wait(&listener, permit) => accepted,
        };
        match accepted {
            Some((Ok(accepted), permit)) => start(accepted, permit),
            Some((Err(error), permit)) => {
                drop(permit);
                let kind = classify(&error);
                lane.stats.accept_errors.count(kind);
                if kind != AcceptError::Aborted {
                    tracing::debug!(listener = %lane.name, kind = kind.as_str(), %error, "cannot accept");
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
    for queued in queued(listener) {
        let Ok(permit) = Arc::clone(&limit).try_acquire_owned() else { break };
        if let Ok(stream) = TcpStream::from_std(queued.0) {
            start((stream, queued.1), permit);
        }
    }
}

type Accepted = (io::Result<(TcpStream, SocketAddr)>, OwnedSemaphorePermit);

/// Accepts with the permit, or gives it back and waits; `None` when there may be a connection now. A worker
/// that waits for connections must not sit on a permit that another one's connections wait for.
async fn accept_or_wait(listener: &TcpListener, permit: OwnedSemaphorePermit) -> Option<Accepted> {
    let mut permit = Some(permit);
    poll_fn(move |cx| {
        let Some(kept) = permit.take() else { return Poll::Ready(None) };
        let accepted = ready!(listener.poll_accept(cx));
        Poll::Ready(Some((accepted, kept)))
    })
    .await
}

fn queued(listener: TcpListener) -> impl Iterator<Item = (std::net::TcpStream, SocketAddr)> {
    let listener = listener.into_std().ok();
    std::iter::from_fn(move || {
        let (stream, peer) = listener.as_ref()?.accept().ok()?;
        stream.set_nonblocking(true).ok()?;
        Some((stream, peer))
    })
}

fn classify(error: &io::Error) -> AcceptError {
    match Errno::from_io_error(error) {
        Some(Errno::MFILE | Errno::NFILE) => AcceptError::NoDescriptors,
        Some(Errno::NOBUFS | Errno::NOMEM) => AcceptError::NoMemory,
        Some(Errno::CONNABORTED) => AcceptError::Aborted,
        _ => AcceptError::Other,
    }
}
