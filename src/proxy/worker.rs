//! A worker: one thread, one runtime, its own sockets.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::accept::{Seat, accept};
use super::lane::{Lane, Worker};
use super::limit::Limit;
use super::pipe::PipePool;
use super::remainders::Remainders;
use super::socket::reconfigure;
use super::stats::WorkerStats;
use super::{ListenerId, Serving, sweep};

/// After the last drain deadline, how long connections that are still connecting may take to end.
const LEAVE: Duration = Duration::from_secs(1);

/// All that a worker's thread needs, ready to cross to it.
pub(super) struct Setup {
    pub(super) index: usize,
    pub(super) stats: Arc<WorkerStats>,
    pub(super) max_pipes: usize,
    pub(super) buffer: usize,
    pub(super) splice_from: usize,
    pub(super) limit: Arc<Limit>,
    pub(super) commands: mpsc::UnboundedReceiver<Command>,
    pub(super) stop: CancellationToken,
    pub(super) ended: mpsc::UnboundedSender<usize>,
}

/// What a worker is told while it runs.
pub(super) enum Command {
    /// Accept on this socket.
    Open(ListenerId, std::net::TcpListener, Serving),
    /// Serve connections from now on like this; those that are open go on as they began.
    Update(ListenerId, Serving),
    /// Accept what is queued, and then no more.
    Close(ListenerId),
}

/// The worker's thread: serves until it is told to stop and its connections have ended.
pub(super) fn run(setup: Setup) {
    let (index, ended) = (setup.index, setup.ended.clone());
    // Also when the thread panics: the app must hear of it.
    let _tell = TellAtEnd { index, ended };
    let runtime = Builder::new_current_thread().enable_io().enable_time().build_local(LocalOptions::default());
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
        // Nobody listens any more: the app is gone, and so is the need to tell.
        let _ = self.ended.send(self.index);
    }
}

async fn serve(mut setup: Setup) {
    let worker = Rc::new(Worker {
        pipes: RefCell::new(PipePool::new(setup.max_pipes, Arc::clone(&setup.stats))),
        stats: setup.stats,
        scratch: RefCell::new(vec![0; setup.buffer].into_boxed_slice()),
        remainders: RefCell::new(Remainders::new(setup.buffer)),
        open: RefCell::default(),
        clock: Cell::default(),
        tick: Cell::new(sweep::SLOWEST),
        splice_from: (setup.max_pipes > 0).then_some(setup.splice_from),
    });
    let mut listeners =
        Listeners { worker: Rc::clone(&worker), limit: setup.limit, seats: Vec::new(), sessions: TaskTracker::new() };
    let accepting = TaskTracker::new();
    let sweeping = sweep::sweep(Rc::clone(&worker), setup.stop.clone());
    tokio::task::spawn_local(sweeping);
    loop {
        let command = tokio::select! {
            biased;
            () = setup.stop.cancelled() => break,
            command = setup.commands.recv() => command,
        };
        let done = match command {
            Some(Command::Open(id, socket, serving)) => listeners.open(id, socket, serving, &setup.stop).map(|loops| {
                tokio::task::spawn_local(accepting.track_future(loops));
            }),
            Some(Command::Update(id, serving)) => listeners.update(id, serving),
            Some(Command::Close(id)) => {
                listeners.seats.retain(|(other, ..)| *other != id);
                Ok(())
            }
            None => break,
        };
        if let Err(error) = done {
            // Its socket would take connections that nobody serves: better to be started anew.
            return tracing::error!(worker = setup.index, %error, "cannot serve a listener");
        }
    }
    let drain = listeners.longest_drain();
    let Listeners { seats, sessions, .. } = listeners;
    drop(seats);
    accepting.close();
    accepting.wait().await;
    sessions.close();
    // The sweep ends what outlives its drain; the rest is bounded by its connect timeouts, or cut off here.
    let _ = tokio::time::timeout(drain + 2 * worker.tick.get() + LEAVE, sessions.wait()).await;
}

/// The listeners of a worker.
struct Listeners {
    worker: Rc<Worker>,
    limit: Arc<Limit>,
    /// Where each accepts. Dropping the guard ends that, once what is queued has been accepted.
    seats: Vec<(ListenerId, Rc<Seat>, DropGuard)>,
    sessions: TaskTracker,
}

impl Listeners {
    /// The loop that accepts on the socket.
    fn open(
        &mut self,
        id: ListenerId,
        socket: std::net::TcpListener,
        serving: Serving,
        stop: &CancellationToken,
    ) -> io::Result<impl Future<Output = ()> + use<>> {
        let seat = Rc::new(Seat { socket: TcpListener::from_std(socket)?, lane: RefCell::new(self.lane(serving)) });
        let close = stop.child_token();
        let guard = close.clone().drop_guard();
        self.seats.push((id, Rc::clone(&seat), guard));
        Ok(accept(seat, Arc::clone(&self.limit), self.sessions.clone(), close))
    }

    fn update(&mut self, id: ListenerId, serving: Serving) -> io::Result<()> {
        let lane = self.lane(serving);
        for (_, seat, _) in self.seats.iter().filter(|(other, ..)| *other == id) {
            reconfigure(&seat.socket, &lane.serving.tcp, lane.serving.backlog)?;
            seat.lane.replace(Rc::clone(&lane));
        }
        Ok(())
    }

    fn lane(&self, serving: Serving) -> Rc<Lane> {
        let tick = sweep::tick(&serving.route);
        self.worker.tick.set(self.worker.tick.get().min(tick));
        let (table, worker) = (RefCell::new(serving.route.table.reader()), Rc::clone(&self.worker));
        Rc::new(Lane { serving, worker, table })
    }

    /// Of the connections that are open, and of those that are being made.
    fn longest_drain(&self) -> Duration {
        let open = self.worker.open.borrow();
        let of_open = open.iter().map(|(_, progress)| progress.lane.serving.route.drain);
        let of_seats = self.seats.iter().map(|(_, seat, _)| seat.lane.borrow().serving.route.drain);
        of_open.chain(of_seats).max().unwrap_or_default()
    }
}
