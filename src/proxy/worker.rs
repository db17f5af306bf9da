//! A worker: one thread, one runtime, its own sockets.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::accept::{AcceptSocket, Acceptor, accept, spawn_connection};
use super::connection::ConnectionId;
use super::context::{Worker, WorkerListener};
use super::deal::{Dealer, Dealt, Peer};
use super::handover::taking::{Arriving, unpack};
use super::limit::Limit;
use super::listening::ListeningSocket;
use super::pipe::PipePool;
use super::session::go_on;
use super::sessions::{Search, answer};
use super::stats::WorkerStats;
use super::write_backlog::WriteBacklog;
use super::{ListenerId, Serving, timeouts};
use crate::stream::Stream;

/// Extra time after the last drain deadline for connections that are still connecting.
const LEAVE: Duration = Duration::from_secs(1);

/// Tasks that run before the worker looks for new events. With few, a short request beside bulk streams waits for fewer
/// turns of theirs. Each look costs a system call.
const TASKS_PER_POLL: u32 = 16;

/// Everything that a worker's thread needs, moved to it at its start.
pub(super) struct Setup {
    pub(super) index: usize,
    pub(super) stats: Arc<WorkerStats>,
    /// All workers, this one among them.
    pub(super) workers: Arc<[Peer]>,
    pub(super) max_pipes: usize,
    pub(super) buffer: usize,
    pub(super) splice_from: usize,
    pub(super) limit: Arc<Limit>,
    pub(super) commands: mpsc::UnboundedReceiver<WorkerCommand>,
    pub(super) searches: mpsc::UnboundedReceiver<Search>,
    /// Cancelled when the worker is to stop accepting.
    pub(super) stop: CancellationToken,
    /// Cancelled when open connections have only the drain times of their routes left.
    pub(super) drain: CancellationToken,
    /// Dropped when the worker does not accept any more.
    pub(super) accepts: TaskTrackerToken,
    pub(super) ended: mpsc::UnboundedSender<usize>,
}

/// A command to a running worker.
pub(super) enum WorkerCommand {
    /// Accept on this socket.
    Open(ListenerId, ListeningSocket, Arc<Serving>),
    /// Serve new connections with these settings; open connections keep theirs.
    Update(ListenerId, Arc<Serving>),
    /// Serve a connection that another worker has accepted.
    Serve(Dealt),
    /// Take over connections of an old process.
    TakeOver(Arriving),
    /// Accept the queued connections, then close the listener.
    Close(ListenerId),
    /// Show that this worker runs.
    Answer(oneshot::Sender<()>),
}

/// The worker's thread: serves until the worker is told to stop and its connections have ended.
pub(super) fn run(setup: Setup) {
    let (index, ended) = (setup.index, setup.ended.clone());
    // The guard also works when the thread panics: the app must learn that the worker has ended.
    let _tell = TellAtEnd { index, ended };
    let runtime = Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .event_interval(TASKS_PER_POLL)
        .build_local(LocalOptions::default());
    match runtime {
        Ok(runtime) => runtime.block_on(serve(setup)),
        Err(error) => tracing::error!(worker = index, %error, "cannot start the worker's runtime"),
    }
}

struct TellAtEnd {
    index: usize,
    ended: mpsc::UnboundedSender<usize>,
}

impl Drop for TellAtEnd {
    fn drop(&mut self) {
        // Sending fails only when the app no longer listens, and then the message is not needed.
        let _ = self.ended.send(self.index);
    }
}

async fn serve(mut setup: Setup) {
    let worker = Rc::new(Worker {
        index: setup.index,
        pipes: RefCell::new(PipePool::new(setup.max_pipes, Arc::clone(&setup.stats))),
        stats: setup.stats,
        scratch: RefCell::new(vec![0; setup.buffer].into_boxed_slice()),
        write_backlog: RefCell::new(WriteBacklog::new(setup.buffer)),
        open: RefCell::default(),
        next_id: Cell::new(ConnectionId::first(setup.index)),
        clock: Cell::new(timeouts::START),
        offers: RefCell::default(),
        tick: Cell::new(timeouts::SLOWEST),
        new_tick: Notify::new(),
        short: Cell::new(0),
        bytes: Cell::new(0),
        moved_out: Cell::new(0),
        splice_from: (setup.max_pipes > 0).then_some(setup.splice_from),
    });
    let mut listeners = Listeners {
        worker: Rc::clone(&worker),
        limit: setup.limit,
        dealer: Rc::new(Dealer::new(setup.index, setup.workers)),
        acceptors: Vec::new(),
        sessions: TaskTracker::new(),
    };
    let accepting = TaskTracker::new();
    let timeout_task = timeouts::watch(Rc::clone(&worker), setup.drain.clone());
    tokio::task::spawn_local(timeout_task);
    tokio::task::spawn_local(answer(Rc::clone(&worker), listeners.sessions.clone(), setup.searches));
    loop {
        let command = tokio::select! {
            biased;
            () = setup.stop.cancelled() => break,
            command = setup.commands.recv() => command,
        };
        let done = match command {
            Some(WorkerCommand::Open(id, socket, serving)) => {
                listeners.open(id, socket, serving, &setup.stop).map(|loops| {
                    tokio::task::spawn_local(accepting.track_future(loops));
                })
            }
            Some(WorkerCommand::Serve(dealt)) => {
                listeners.serve(dealt);
                Ok(())
            }
            Some(WorkerCommand::TakeOver(arriving)) => {
                listeners.take_over(arriving);
                Ok(())
            }
            Some(WorkerCommand::Update(id, serving)) => listeners.update(id, serving),
            Some(WorkerCommand::Close(id)) => {
                listeners.acceptors.retain(|(other, ..)| *other != id);
                listeners.set_tick();
                Ok(())
            }
            Some(WorkerCommand::Answer(answer)) => {
                // The one who asked may have gone.
                let _ = answer.send(());
                Ok(())
            }
            None => break,
        };
        if let Err(error) = done {
            // The kernel would complete connections that no task serves. A restart is better, so the worker ends.
            return tracing::error!(worker = setup.index, %error, "cannot serve a listener");
        }
    }
    // From here on, other workers keep what they accept. What they have handed over is served.
    setup.commands.close();
    // Ends once no worker is in the middle of a handover.
    while let Some(command) = setup.commands.recv().await {
        match command {
            WorkerCommand::Serve(dealt) => listeners.serve(dealt),
            WorkerCommand::TakeOver(arriving) => listeners.take_over(arriving),
            _ => {}
        }
    }
    let drain = listeners.longest_drain();
    let Listeners { acceptors, sessions, .. } = listeners;
    drop(acceptors);
    accepting.close();
    accepting.wait().await;
    drop(setup.accepts);
    sessions.close();
    // The timeout task ends connections that outlive their drain. Connect timeouts and this timeout bound the rest.
    let too_late = async {
        setup.drain.cancelled().await;
        tokio::time::sleep(drain + 2 * worker.tick.get() + LEAVE).await;
    };
    tokio::select! {
        () = sessions.wait() => {}
        () = too_late => {}
    }
}

/// The listeners of one worker.
struct Listeners {
    worker: Rc<Worker>,
    limit: Arc<Limit>,
    dealer: Rc<Dealer>,
    /// The acceptors. Dropping a guard stops its acceptor once the queued connections have been accepted.
    acceptors: Vec<(ListenerId, Rc<Acceptor>, DropGuard)>,
    sessions: TaskTracker,
}

impl Listeners {
    /// Adds a listener and returns its accept loop.
    fn open(
        &mut self,
        id: ListenerId,
        socket: ListeningSocket,
        serving: Arc<Serving>,
        stop: &CancellationToken,
    ) -> io::Result<impl Future<Output = ()> + use<>> {
        let acceptor = Rc::new(Acceptor {
            id,
            socket: AcceptSocket::try_from(socket)?,
            listener: RefCell::new(self.listener(serving)),
        });
        let close = stop.child_token();
        let guard = close.clone().drop_guard();
        self.acceptors.push((id, Rc::clone(&acceptor), guard));
        self.set_tick();
        let dealer = Rc::clone(&self.dealer);
        Ok(accept(acceptor, dealer, Arc::clone(&self.limit), self.sessions.clone(), close))
    }

    /// Serves a connection that another worker has accepted.
    fn serve(&self, dealt: Dealt) {
        let own = self.acceptors.iter().find(|(id, ..)| *id == dealt.listener);
        let own = own.map(|(_, acceptor, _)| Rc::clone(&acceptor.listener.borrow()));
        let known = own.filter(|listener| Arc::ptr_eq(&listener.serving, &dealt.serving));
        let listener = known.unwrap_or_else(|| self.listener(Arc::clone(&dealt.serving)));
        let peer = dealt.peer;
        let Some((client, permit)) = dealt.serve() else { return };
        match Stream::try_from(client) {
            Ok(client) => spawn_connection(&self.sessions, client, peer, permit, listener),
            Err(error) => {
                tracing::debug!(%error, "cannot serve a connection that was handed over");
                self.worker.stats.connections.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    /// Takes over connections of an old process, and answers which ones.
    fn take_over(&self, arriving: Arriving) {
        let Arriving { packed, go, answer } = arriving;
        let taken = packed.into_iter().map(|packed| {
            let (id, name) = (packed.record.id(), packed.record.listener.clone());
            let listeners = self.acceptors.iter().map(|(_, acceptor, _)| acceptor.listener.borrow());
            let own = listeners.map(|listener| Rc::clone(&listener)).find(|listener| *listener.serving.name == *name);
            let unpacked = own.ok_or(io::ErrorKind::NotFound.into()).and_then(|own| unpack(packed, &own, &self.limit));
            match unpacked {
                Ok((relay, account)) => {
                    self.dealer.keep();
                    tokio::task::spawn_local(self.sessions.track_future(go_on(relay, account, go.clone())));
                    true
                }
                Err(error) => {
                    tracing::debug!(id = id.map(tracing::field::display), listener = name, %error,
                        "a connection stays with the old process");
                    false
                }
            }
        });
        // The old process keeps them if nobody waits for the answer.
        let _ = answer.send(taken.collect());
    }

    fn update(&mut self, id: ListenerId, serving: Arc<Serving>) -> io::Result<()> {
        let listener = self.listener(serving);
        for (_, acceptor, _) in self.acceptors.iter().filter(|(other, ..)| *other == id) {
            acceptor.socket.reconfigure(&listener.serving.tcp, listener.serving.backlog)?;
            acceptor.listener.replace(Rc::clone(&listener));
        }
        self.set_tick();
        Ok(())
    }

    fn listener(&self, serving: Arc<Serving>) -> Rc<WorkerListener> {
        let routes = &serving.routing.routes;
        let tick = routes.iter().map(timeouts::tick).min().unwrap_or(timeouts::SLOWEST);
        let tables = routes.iter().map(|route| RefCell::new(route.table.reader())).collect();
        Rc::new(WorkerListener { worker: Rc::clone(&self.worker), serving, tables, tick })
    }

    /// Sets the interval that the shortest timeout of the listeners needs.
    fn set_tick(&self) {
        let ticks = self.acceptors.iter().map(|(_, acceptor, _)| acceptor.listener.borrow().tick);
        self.worker.tick.set(ticks.min().unwrap_or(timeouts::SLOWEST));
        // Otherwise the clock would lag by the old interval, and a short timeout would fire too early.
        self.worker.new_tick.notify_one();
    }

    /// The longest drain time of all open connections, and of all acceptors, for connections that are still connecting.
    fn longest_drain(&self) -> Duration {
        let open = self.worker.open.borrow();
        let of_open = open.iter().map(|(_, connection)| connection.listener.serving.longest_drain());
        let of_acceptors =
            self.acceptors.iter().map(|(_, acceptor, _)| acceptor.listener.borrow().serving.longest_drain());
        of_open.chain(of_acceptors).max().unwrap_or_default()
    }
}
