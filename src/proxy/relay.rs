//! Stage relay: drives both directions of a connection from one struct, and closes as transparently as TCP
//! allows: an end of stream becomes one after everything before it, a reset becomes a reset.

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use rustix::io::Errno;
use socket2::SockRef;
use tokio::net::TcpStream;

use super::direction::{Broken, Direction};
use super::lane::{Probes, Progress};
use super::socket::{end_cleanly, reset_on_close};
use super::stats::End;

/// Relays until both sides have ended, one breaks, or the sweep says so; the output says which. A future by hand:
/// an `async fn` would keep its arguments twice, in every idle connection.
pub(super) struct Relay {
    client: TcpStream,
    backend: TcpStream,
    /// Client to backend.
    up: Direction,
    /// Backend to client.
    down: Direction,
    /// One side has broken; what it had said before is still being delivered to the other.
    breaking: Option<Breaking>,
    end: End,
    progress: Rc<Progress>,
}

#[derive(Debug, Clone, Copy)]
struct Breaking {
    side: Side,
    end: End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Client,
    Backend,
}

impl Relay {
    pub(super) fn new(client: TcpStream, backend: TcpStream, progress: Rc<Progress>) -> Self {
        end_cleanly(&client);
        let (up, down) = (Direction::default(), Direction::default());
        Self { client, backend, up, down, breaking: None, end: End::Dropped, progress }
    }

    fn advance(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let progress = Rc::clone(&self.progress);
        if let Some(verdict) = progress.verdict.get() {
            return Poll::Ready(verdict);
        }
        if progress.inspect.take()
            && let Some(end) = self.inspect()
        {
            return Poll::Ready(end);
        }
        if progress.probes.get() == Probes::Due {
            progress.probes.set(Probes::On);
            // Fails only on a socket that is already gone.
            let _ = progress.lane.serving.tcp.probe(&SockRef::from(&self.backend));
        }
        let before = self.activity();
        let polled = self.poll_directions(cx);
        if self.activity() != before {
            progress.last_active.set(progress.lane.worker.clock.get());
        }
        progress.half_closed.set(self.up.has_ended() != self.down.has_ended());
        progress.blocked.set(self.up.is_holding() || self.down.is_holding());
        if polled.is_pending() {
            let mut waker = progress.waker.borrow_mut();
            if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                *waker = Some(cx.waker().clone());
            }
        }
        polled
    }

    /// What counts as activity when it changes: bytes moved, and streams ended.
    fn activity(&self) -> (u64, bool, bool) {
        let bytes = self.progress.from_client.total() + self.progress.to_client.total();
        (bytes, self.up.has_ended(), self.down.has_ended())
    }

    /// Looks for a broken side that no read or write would meet: of a stream that has ended, or that waits
    /// for its sink, nothing is read.
    fn inspect(&self) -> Option<End> {
        let of = |side, stream: &TcpStream| {
            // A socket that has a peer lives: an error on it is a passing one, which TCP gets over. One without may
            // have ended cleanly on both sides, with bytes in it that wait to be read.
            stream.peer_addr().err()?;
            stream.take_error().ok().flatten().map(|error| reason(side, &error))
        };
        of(Side::Client, &self.client).or_else(|| of(Side::Backend, &self.backend))
    }

    fn poll_directions(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        if self.breaking.is_none() {
            let up = self.poll_up(cx);
            // A socket tells of a reset once. When a write has met it, a read would find a clean end.
            let down = if matches!(up, Poll::Ready(Err(_))) { Poll::Pending } else { self.poll_down(cx) };
            let (from, to, broken) = match (up, down) {
                (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => return Poll::Ready(End::Finished),
                (Poll::Ready(Err(broken)), _) => (Side::Client, Side::Backend, broken),
                (_, Poll::Ready(Err(broken))) => (Side::Backend, Side::Client, broken),
                _ => return Poll::Pending,
            };
            match broken {
                // A read meets a reset behind all bytes that came before it: they are through.
                Broken::Source(error) => return Poll::Ready(reason(from, &error)),
                Broken::Sink(error) => self.breaking = Some(Breaking { side: to, end: reason(to, &error) }),
            }
        }
        let Some(Breaking { side, end }) = self.breaking else { return Poll::Pending };
        let last_words = match side {
            Side::Client => {
                self.up.last_words = true;
                self.poll_up(cx)
            }
            Side::Backend => {
                self.down.last_words = true;
                self.poll_down(cx)
            }
        };
        // However their delivery ends, the connection ends as it broke.
        last_words.map(|_| end)
    }

    fn poll_up(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        let progress = &self.progress;
        let is_last = self.down.has_ended();
        self.up.poll(cx, &mut self.client, &mut self.backend, &progress.lane.worker, &progress.from_client, is_last)
    }

    fn poll_down(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        let progress = &self.progress;
        let is_last = self.up.has_ended();
        self.down.poll(cx, &mut self.backend, &mut self.client, &progress.lane.worker, &progress.to_client, is_last)
    }
}

impl Future for Relay {
    type Output = End;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<End> {
        self.end = ready!(self.advance(cx));
        Poll::Ready(self.end)
    }
}

impl Drop for Relay {
    /// Neither side may take what it got for all there was, so an abnormal end is a reset on both. Only where a
    /// stream had ended before Ringway itself gave up waiting, the kernel may finish delivering it.
    fn drop(&mut self) {
        let worker = &self.progress.lane.worker;
        self.up.release(worker);
        self.down.release(worker);
        let gave_up = self.end.is_by_ringway();
        let is_whole = |direction: &Direction| self.end == End::Finished || gave_up && direction.has_ended();
        if !is_whole(&self.up) {
            reset_on_close(&self.backend);
        }
        if !is_whole(&self.down) {
            reset_on_close(&self.client);
        }
    }
}

fn reason(side: Side, error: &io::Error) -> End {
    match (side, Errno::from_io_error(error)) {
        (_, Some(Errno::NOMEM | Errno::NOBUFS)) => End::LocalError,
        (Side::Client, Some(Errno::TIMEDOUT | Errno::HOSTUNREACH | Errno::NETUNREACH)) => End::ClientLost,
        (Side::Backend, Some(Errno::TIMEDOUT | Errno::HOSTUNREACH | Errno::NETUNREACH)) => End::BackendLost,
        (Side::Client, _) => End::ClientReset,
        (Side::Backend, _) => End::BackendReset,
    }
}
