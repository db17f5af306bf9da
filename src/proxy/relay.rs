//! Stage relay: one struct drives both directions of a connection. It closes as transparently as TCP allows: an end of
//! stream follows all bytes before it, and a reset stays a reset.

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use rustix::io::Errno;
use socket2::SockRef;

use super::connection::{Connection, KeepaliveState};
use super::direction::{Broken, Direction};
use super::moving::can_wait;
use super::stats::EndReason;
use crate::stream::Stream;

/// Relays until both sides have ended, one side breaks, or the timeout task ends the connection. The output is the
/// reason. The future is hand-written: an `async fn` would store its arguments twice in every idle connection.
pub(super) struct Relay {
    client: Stream,
    backend: Stream,
    /// Client to backend.
    up: Direction,
    /// Backend to client.
    down: Direction,
    /// Set when one side has broken, while the bytes that it sent before are still delivered to the other side.
    breaking: Option<Breaking>,
    end: EndReason,
    connection: Rc<Connection>,
}

#[derive(Debug, Clone, Copy)]
struct Breaking {
    side: Side,
    end: EndReason,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Client,
    Backend,
}

impl Relay {
    /// `follows_header`: the backend has got a PROXY header before.
    pub(super) fn new(client: Stream, backend: Stream, follows_header: bool, connection: Rc<Connection>) -> Self {
        let (up, down) = (Direction::to_connected(follows_header), Direction::to_accepted());
        Self { client, backend, up, down, breaking: None, end: EndReason::Dropped, connection }
    }

    /// The relay of a connection that an old process has handed over: from client to backend, and back. It belongs to the old process
    /// until it is told to go on.
    pub(super) fn taken_over(
        client: Stream,
        backend: Stream,
        [up, down]: [Direction; 2],
        connection: Rc<Connection>,
    ) -> Self {
        Self { client, backend, up, down, breaking: None, end: EndReason::HandedOver, connection }
    }

    /// The sockets of the client and the backend.
    pub(super) fn streams(&self) -> (&Stream, &Stream) {
        (&self.client, &self.backend)
    }

    /// The directions from client to backend, and back.
    pub(super) fn directions(&self) -> (&Direction, &Direction) {
        (&self.up, &self.down)
    }

    /// Goes on in this process with a connection that was on its way to another.
    pub(super) fn go_on(&mut self) {
        self.end = EndReason::Dropped;
    }

    fn advance(&mut self, cx: &mut Context<'_>) -> Poll<EndReason> {
        let connection = Rc::clone(&self.connection);
        if let Some(verdict) = connection.verdict.get() {
            if !self.can_wait_with(verdict) {
                return Poll::Ready(verdict);
            }
            connection.verdict.set(None);
        }
        if connection.give_up_pipes.take() {
            let worker = &connection.listener.worker;
            if self.up.give_up_pipe(worker).and_then(|()| self.down.give_up_pipe(worker)).is_err() {
                return Poll::Ready(EndReason::LocalError);
            }
        }
        if connection.inspect.take()
            && let Some(end) = self.inspect()
        {
            return Poll::Ready(end);
        }
        if connection.keepalive.get() == KeepaliveState::Due {
            connection.keepalive.set(KeepaliveState::On);
            if let Stream::Tcp(backend) = &self.backend {
                // Fails only on a socket that is already closed.
                let _ = connection.listener.serving.tcp.enable_keepalive(&SockRef::from(backend));
            }
        }
        let before = self.activity();
        let polled = self.poll_directions(cx);
        if self.activity() != before {
            connection.is_active.set(true);
        }
        connection.half_closed.set(self.up.has_ended() != self.down.has_ended());
        connection.blocked.set(self.up.is_holding() || self.down.is_holding());
        if polled.is_pending() {
            let mut waker = connection.waker.borrow_mut();
            if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                *waker = Some(cx.waker().clone());
            }
        }
        polled
    }

    /// Whether the relay goes on despite this verdict.
    fn can_wait_with(&self, verdict: EndReason) -> bool {
        match verdict {
            EndReason::Moved => self.begins_exchange(),
            // The socket that has broken does not tell the successor why.
            EndReason::HandedOver => self.breaking.is_some(),
            _ => false,
        }
    }

    /// Whether bytes have come since the timeout task found the connection silent, so that it may wait for another silent moment.
    fn begins_exchange(&self) -> bool {
        can_wait(&self.connection) && (self.client.has_unread() || self.backend.has_unread())
    }

    /// The values that change with every activity: bytes moved, and streams ended.
    fn activity(&self) -> (u64, bool, bool) {
        let bytes = self.connection.from_client.total() + self.connection.to_client.total();
        (bytes, self.up.has_ended(), self.down.has_ended())
    }

    /// Checks for a broken side that no read or write would notice: the relay does not read a stream that has ended or
    /// that waits for its sink.
    fn inspect(&self) -> Option<EndReason> {
        let of = |side, stream: &Stream, from: &Direction| {
            // The bytes that a Unix socket has sent survive its error. Once they are delivered, a read finds the error.
            let has_more = from.is_holding() && matches!(stream, Stream::Unix(_));
            if has_more { None } else { stream.broken().map(|error| reason(side, &error)) }
        };
        of(Side::Client, &self.client, &self.up).or_else(|| of(Side::Backend, &self.backend, &self.down))
    }

    fn poll_directions(&mut self, cx: &mut Context<'_>) -> Poll<EndReason> {
        if self.breaking.is_none() {
            let up = self.poll_up(cx);
            // A socket reports a reset only once. After a write has seen it, a read would find a clean end of stream.
            let down = if matches!(up, Poll::Ready(Err(_))) { Poll::Pending } else { self.poll_down(cx) };
            let (from, to, broken) = match (up, down) {
                (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => return Poll::Ready(EndReason::Finished),
                (Poll::Ready(Err(broken)), _) => (Side::Client, Side::Backend, broken),
                (_, Poll::Ready(Err(broken))) => (Side::Backend, Side::Client, broken),
                _ => return Poll::Pending,
            };
            match broken {
                // A read sees a reset only after all bytes before it, so those bytes have been relayed.
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
        // The end reason is the original failure, whether or not the last bytes were delivered.
        last_words.map(|_| end)
    }

    fn poll_up(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        let connection = &self.connection;
        let is_last = self.down.has_ended();
        self.up.poll(
            cx,
            &mut self.client,
            &mut self.backend,
            &connection.listener.worker,
            &connection.from_client,
            is_last,
        )
    }

    fn poll_down(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        let connection = &self.connection;
        let is_last = self.up.has_ended();
        self.down.poll(
            cx,
            &mut self.backend,
            &mut self.client,
            &connection.listener.worker,
            &connection.to_client,
            is_last,
        )
    }
}

impl Future for Relay {
    type Output = EndReason;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<EndReason> {
        self.end = ready!(self.advance(cx));
        Poll::Ready(self.end)
    }
}

impl Drop for Relay {
    /// A truncated stream must never look complete, so an abnormal end resets both sides. There is one exception: when
    /// Ringway gives up on a stream that has already ended, the kernel may finish delivering it.
    fn drop(&mut self) {
        let worker = &self.connection.listener.worker;
        self.up.release(worker);
        self.down.release(worker);
        let gave_up = self.end.is_by_ringway();
        // Another process goes on with the sockets of a connection that is handed over.
        let is_over_here = matches!(self.end, EndReason::Finished | EndReason::HandedOver);
        let is_whole = |direction: &Direction| is_over_here || gave_up && direction.has_ended();
        if !is_whole(&self.up) {
            self.backend.reset_on_close();
        }
        if !is_whole(&self.down) {
            self.client.reset_on_close();
        }
    }
}

fn reason(side: Side, error: &io::Error) -> EndReason {
    match (side, Errno::from_io_error(error)) {
        (_, Some(Errno::NOMEM | Errno::NOBUFS)) => EndReason::LocalError,
        (Side::Client, Some(Errno::TIMEDOUT | Errno::HOSTUNREACH | Errno::NETUNREACH)) => EndReason::ClientLost,
        (Side::Backend, Some(Errno::TIMEDOUT | Errno::HOSTUNREACH | Errno::NETUNREACH)) => EndReason::BackendLost,
        (Side::Client, _) => EndReason::ClientReset,
        (Side::Backend, _) => EndReason::BackendReset,
    }
}
