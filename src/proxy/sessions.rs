//! Lists open connections, and ends those that an operator names. Each worker searches its own connections a few at a time,
//! so that the search hardly delays traffic.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, mpsc, oneshot};
use tokio_util::task::TaskTracker;

use super::Route;
use super::connection::{Connection, ConnectionId};
use super::context::Worker;
use super::deal::Peer;
use super::handover::{Batch, collect};
use super::moving::{Found, schedule};
use super::pick::{Claims, Homes};
use super::stats::EndReason;
use crate::address::Address;
use crate::label_enum;
use crate::networks::Networks;
use crate::stream::Client;

/// Connections that a worker looks at before its other tasks run. That takes a few dozen microseconds.
const PER_TURN: usize = 256;

/// Connections that a worker ends before its other tasks run. The end of each takes a few system calls.
const ENDS_PER_TURN: usize = 16;

label_enum! {
    /// What a connection does.
    pub enum SessionState {
        /// It has no backend yet.
        Connecting => "connecting",
        /// Both sides can send.
        Open => "open",
        /// One side has ended its stream.
        HalfClosed => "half_closed",
        /// Bytes wait for a side that does not take them.
        Blocked => "blocked",
    }
}

/// An open connection.
#[derive(Debug, Clone)]
pub struct Session {
    /// Its id.
    pub id: ConnectionId,
    /// The client: the one in the PROXY header, or the peer itself.
    pub client: Client,
    /// The balancer that has sent a PROXY header.
    pub peer: Option<Client>,
    /// The listener.
    pub listener: Arc<str>,
    /// The rule of the listener that has matched; `None`: not decided yet.
    pub route: Option<Arc<str>>,
    /// The pool; `None`: not decided yet.
    pub pool: Option<Arc<str>>,
    /// The server name for which the client asks, if Ringway has looked for one.
    pub sni: Option<Box<str>>,
    /// The backend, and the address that answered; `None` while Ringway connects.
    pub backend: Option<(Arc<str>, Address)>,
    /// Time since accept.
    pub age: Duration,
    /// Time without a byte, to half a second.
    pub idle: Duration,
    /// Bytes from the client: copied and spliced.
    pub from_client: (u64, u64),
    /// Bytes to the client: copied and spliced.
    pub to_client: (u64, u64),
    /// What it does.
    pub state: SessionState,
}

/// Conditions of a search. A connection matches if it meets all of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// This connection.
    pub id: Option<ConnectionId>,
    /// Connections of this listener.
    pub listener: Option<String>,
    /// Connections to this pool.
    pub pool: Option<String>,
    /// Connections to this backend.
    pub backend: Option<String>,
    /// Connections of clients in one of these networks.
    pub source: Option<Networks>,
    /// Connections for this server name.
    pub sni: Option<Box<str>>,
    /// Connections that are at least this old.
    pub older: Option<Duration>,
    /// Connections on which no byte has moved for this long.
    pub idle: Option<Duration>,
    /// Connections in this state.
    pub state: Option<SessionState>,
}

/// Where a list goes on: a worker, and a position in its list.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cursor {
    /// Number of the worker.
    pub worker: usize,
    /// The first position that the list has not shown.
    pub position: usize,
}

/// A part of the list.
#[derive(Debug, Default)]
pub struct Page {
    /// Connections, in no order. One that opens or ends meanwhile may be missing.
    pub sessions: Vec<Session>,
    /// Where the list goes on; `None`: this is the end.
    pub next: Option<Cursor>,
}

/// What a worker is asked about its connections.
#[derive(Debug)]
pub(super) enum Search {
    /// At most `limit` connections, from this position on, and the position of the next one.
    List { filter: Filter, from: usize, limit: usize, answer: oneshot::Sender<(Vec<Session>, Option<usize>)> },
    /// End them, and count them.
    End { filter: Filter, answer: oneshot::Sender<usize> },
    /// Stop at most `most` connections, from this position on, and offer them to a successor.
    HandOver { from: usize, most: usize, answer: oneshot::Sender<Batch> },
    /// Count the connections of a pool, and those whose keys lead to other backends by these settings of it. They end within `over`, if
    /// it is given. `claimed`: places that connections of other workers get.
    Move { route: Box<Route>, over: Option<Duration>, claimed: Claims, answer: oneshot::Sender<(Away, Claims)> },
}

/// The connections of a pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Away {
    /// Those whose keys lead to other healthy backends.
    pub away: usize,
    /// All that have a backend.
    pub all: usize,
}

/// Searches the open connections of all workers.
#[derive(Debug)]
pub struct Sessions {
    workers: Arc<[Peer]>,
    /// Only one search at a time, however many are asked for.
    one: Mutex<()>,
}

impl Sessions {
    pub(super) fn new(workers: Arc<[Peer]>) -> Self {
        Self { workers, one: Mutex::new(()) }
    }

    /// Returns at most `limit` connections, from `cursor` on. A worker that has ended has none.
    pub async fn list(&self, filter: &Filter, cursor: Cursor, limit: usize) -> Page {
        let _one = self.one.lock().await;
        let mut page = Page::default();
        let Cursor { mut worker, position: mut from } = cursor;
        while let Some(peer) = self.workers.get(worker) {
            if page.sessions.len() == limit {
                page.next = Some(Cursor { worker, position: from });
                break;
            }
            let (answer, answered) = oneshot::channel();
            let filter = filter.clone();
            let limit = limit - page.sessions.len();
            // A worker that has ended drops the question.
            let _ = peer.searches.send(Search::List { filter, from, limit, answer });
            let (sessions, next) = answered.await.unwrap_or_default();
            page.sessions.extend(sessions);
            (worker, from) = next.map_or((worker + 1, 0), |next| (worker, next));
        }
        page
    }

    /// Ends the connections, as a reset on both sides, and returns their number.
    pub async fn end(&self, filter: &Filter) -> usize {
        let _one = self.one.lock().await;
        let mut ended = 0;
        for (n, worker) in self.workers.iter().enumerate() {
            // A connection that was taken over has the number of its worker in the old process, which may have had more workers.
            if filter.id.is_some_and(|id| id.worker() % self.workers.len() != n) {
                continue;
            }
            let (answer, answered) = oneshot::channel();
            let _ = worker.searches.send(Search::End { filter: filter.clone(), answer });
            ended += answered.await.unwrap_or_default();
        }
        ended
    }

    /// Counts the connections of a pool whose keys lead to other healthy backends. With `over`, ends these within that time, each at a
    /// silent moment if there is one.
    pub async fn rebalance(&self, pool: &Route, over: Option<Duration>) -> Away {
        let _one = self.one.lock().await;
        let (mut sum, mut claimed) = (Away::default(), Claims::new());
        for worker in self.workers.iter() {
            let (answer, answered) = oneshot::channel();
            let _ = worker.searches.send(Search::Move { route: Box::new(pool.clone()), over, claimed, answer });
            let found;
            (found, claimed) = answered.await.unwrap_or_default();
            (sum.away, sum.all) = (sum.away + found.away, sum.all + found.all);
        }
        sum
    }
}

/// Answers the searches of a worker, on its thread, until nobody can ask any more. `open` counts the worker's connections.
pub(super) async fn answer(worker: Rc<Worker>, open: TaskTracker, mut searches: mpsc::UnboundedReceiver<Search>) {
    while let Some(search) = searches.recv().await {
        // A worker that stops ends with its last connection, but not before it has answered.
        let _token = open.token();
        match search {
            Search::List { filter, from, limit, answer } => {
                let (mut found, mut position) = (Vec::new(), Some(from));
                // The caller may have gone.
                while let Some(at) = position.filter(|_| found.len() < limit && !answer.is_closed()) {
                    position = turn(&worker, &filter, at, |connection| {
                        found.push(Session::of(connection));
                        found.len() < limit
                    });
                    tokio::task::yield_now().await;
                }
                let _ = answer.send((found, position));
            }
            Search::End { filter, answer } => {
                let (mut ended, mut position) = (0, Some(0));
                while let Some(at) = position {
                    let before = ended;
                    position = turn(&worker, &filter, at, |connection| {
                        connection.end(EndReason::Operator);
                        ended += 1;
                        ended - before < ENDS_PER_TURN
                    });
                    tokio::task::yield_now().await;
                }
                let _ = answer.send(ended);
            }
            Search::HandOver { from, most, answer } => {
                // Without a taker, the connections go on.
                let _ = answer.send(collect(&worker, from, most).await);
            }
            Search::Move { route, over, claimed, answer } => {
                let filter = Filter { pool: Some(route.pool.to_string()), ..Filter::default() };
                let mut found = Found { is_order: over.is_some(), ..Found::default() };
                let mut position = Some(0);
                let table = route.table.load();
                let mut homes = Homes::new(&route, &table).without(claimed);
                while let Some(at) = position {
                    position = turn(&worker, &filter, at, |connection| {
                        found.see(connection, &route, &mut homes);
                        true
                    });
                    tokio::task::yield_now().await;
                }
                if over.is_some() {
                    schedule(&found.away, over, worker.clock.get());
                }
                let _ = answer.send((Away { away: found.away.len(), all: found.all }, homes.into_claims()));
            }
        }
    }
}

/// Looks at some connections, from a position on. Calls `found` for each one that matches, until it returns false. Returns
/// the next position, or `None` at the end of the list.
fn turn(
    worker: &Worker,
    filter: &Filter,
    from: usize,
    mut found: impl FnMut(&Rc<Connection>) -> bool,
) -> Option<usize> {
    let open = worker.open.borrow();
    let mut position = from;
    let end = from.saturating_add(PER_TURN).min(open.capacity());
    while position < end {
        let connection = open.get(position);
        position += 1;
        if let Some(connection) = connection.filter(|connection| filter.takes(connection))
            && !found(connection)
        {
            break;
        }
    }
    (position < open.capacity()).then_some(position)
}

impl Filter {
    /// Whether the filter has no condition, so that it means all connections.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn takes(&self, connection: &Connection) -> bool {
        fn is<T: PartialEq>(wanted: Option<&T>, found: impl FnOnce() -> T) -> bool {
            wanted.is_none_or(|wanted| *wanted == found())
        }
        fn named(wanted: Option<&str>, found: Option<&str>) -> bool {
            wanted.is_none() || wanted == found
        }
        let route = || connection.route();
        let backend = || connection.served.get().map(|served| &*served.backend);
        is(self.id.as_ref(), || connection.id)
            && named(self.listener.as_deref(), Some(&connection.listener.serving.name))
            && named(self.pool.as_deref(), route().map(|route| &*route.pool))
            && named(self.backend.as_deref(), backend())
            && named(self.sni.as_deref(), connection.server_name())
            && self.source.as_ref().is_none_or(|source| source.contains(connection.client()))
            && is(self.state.as_ref(), || state(connection))
            && self.older.is_none_or(|older| connection.opened.elapsed() >= older)
            && self.idle.is_none_or(|least| idle(connection) >= least)
    }
}

impl Session {
    fn of(connection: &Connection) -> Self {
        let (serving, served) = (&connection.listener.serving, connection.served.get());
        let rule = connection.rule.get().map(|rule| &serving.routing.rules[usize::from(rule)]);
        let both = |traffic: &super::connection::Traffic| (traffic.copied.get(), traffic.spliced.get());
        Self {
            id: connection.id,
            client: connection.client(),
            peer: connection.balancer(),
            listener: Arc::clone(&serving.name),
            route: rule.map(|rule| Arc::clone(&rule.name)),
            pool: connection.route().map(|route| Arc::clone(&route.pool)),
            sni: connection.server_name().map(Into::into),
            backend: served.map(|served| (Arc::clone(&served.backend), served.address.clone())),
            age: connection.opened.elapsed(),
            idle: idle(connection),
            from_client: both(&connection.from_client),
            to_client: both(&connection.to_client),
            state: state(connection),
        }
    }
}

fn state(connection: &Connection) -> SessionState {
    match connection.served.get() {
        None => SessionState::Connecting,
        Some(_) if connection.blocked.get() => SessionState::Blocked,
        Some(_) if connection.half_closed.get() => SessionState::HalfClosed,
        Some(_) => SessionState::Open,
    }
}

/// The time without a byte, by the worker's clock.
fn idle(connection: &Connection) -> Duration {
    if connection.served.get().is_none() {
        return connection.opened.elapsed();
    }
    if connection.is_active.get() {
        return Duration::ZERO;
    }
    connection.listener.worker.clock.get().saturating_sub(connection.last_active.get())
}
