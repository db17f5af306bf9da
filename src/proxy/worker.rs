//! A worker: one thread, one runtime, its own sockets.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ::metrics::Histogram;
use tokio::net::TcpListener;
use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::accept::accept;
use super::access_log::AccessLog;
use super::lane::{Lane, Worker};
use super::pipe::PipePool;
use super::remainders::SCRATCH;
use super::socket::TcpOptions;
use super::stats::{ListenerStats, WorkerStats};
use super::sweep;
use super::{Intercept, Route, Settings};

/// After the last drain deadline, how long connections that are still connecting may take to end.
const LEAVE: Duration = Duration::from_secs(1);

/// All that a worker's thread needs, ready to cross to it.
pub(super) struct Setup {
    pub(super) index: usize,
    pub(super) stats: Arc<WorkerStats>,
    tcp: TcpOptions,
    access_log: Option<AccessLog>,
    max_pipes: usize,
    lanes: Vec<LaneSetup>,
    limit: Arc<Semaphore>,
    stop: CancellationToken,
    ended: mpsc::UnboundedSender<usize>,
}

struct LaneSetup {
    name: Arc<str>,
    socket: std::net::TcpListener,
    route: Route,
    stats: Arc<ListenerStats>,
    intercept: Option<Intercept>,
    connection_seconds: Histogram,
}

/// Deals the settings out to the workers: to each one socket of each listener.
pub(super) fn setups(
    settings: Settings,
    limit: &Arc<Semaphore>,
    stop: &CancellationToken,
    ended: &mpsc::UnboundedSender<usize>,
) -> Vec<Setup> {
    let workers = settings.workers.max(1);
    let mut setups: Vec<_> = (0..workers)
        .map(|index| Setup {
            index,
            stats: Arc::default(),
            tcp: settings.tcp,
            access_log: settings.access_log.clone(),
            max_pipes: settings.max_pipes / workers + usize::from(index < settings.max_pipes % workers),
            lanes: Vec::new(),
            limit: Arc::clone(limit),
            stop: stop.clone(),
            ended: ended.clone(),
        })
        .collect();
    for listener in settings.listeners {
        for (setup, socket) in setups.iter_mut().zip(listener.sockets) {
            setup.lanes.push(LaneSetup {
                name: Arc::clone(&listener.name),
                socket,
                route: listener.route.clone(),
                stats: Arc::clone(&listener.stats),
                intercept: listener.intercept.clone(),
                connection_seconds: listener.connection_seconds.clone(),
            });
        }
    }
    setups
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

async fn serve(setup: Setup) {
    let worker = Rc::new(Worker {
        pipes: RefCell::new(PipePool::new(setup.max_pipes, Arc::clone(&setup.stats))),
        stats: setup.stats,
        tcp: setup.tcp,
        access_log: setup.access_log,
        scratch: RefCell::new(vec![0; SCRATCH].into_boxed_slice()),
        remainders: RefCell::default(),
        open: RefCell::default(),
        clock: Cell::default(),
        splices: setup.max_pipes > 0,
    });
    let (sessions, accepting) = (TaskTracker::new(), TaskTracker::new());
    let (mut tick, mut drain) = (sweep::SLOWEST, Duration::ZERO);
    for lane in setup.lanes {
        tick = tick.min(sweep::tick(&lane.route));
        drain = drain.max(lane.route.drain);
        let listener = match TcpListener::from_std(lane.socket) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::error!(listener = %lane.name, %error, "cannot accept on this worker");
                return;
            }
        };
        let lane = Rc::new(Lane {
            name: lane.name,
            table: RefCell::new(lane.route.table.reader()),
            route: lane.route,
            stats: lane.stats,
            intercept: lane.intercept,
            connection_seconds: lane.connection_seconds,
            worker: Rc::clone(&worker),
        });
        let (limit, stop) = (Arc::clone(&setup.limit), setup.stop.clone());
        let accept = accept(lane, listener, limit, sessions.clone(), stop);
        tokio::task::spawn_local(accepting.track_future(accept));
    }
    tokio::task::spawn_local(sweep::sweep(Rc::clone(&worker), tick, setup.stop.clone()));

    setup.stop.cancelled().await;
    accepting.close();
    accepting.wait().await;
    sessions.close();
    // The sweep ends what outlives its drain; the rest is bounded by its connect timeouts, or cut off here.
    let _ = tokio::time::timeout(drain + 2 * tick + LEAVE, sessions.wait()).await;
}
