//! The tasks of the control plane, and the threads that they run on.

use std::io;

use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::threads::Thread;
use crate::control::health::NotDone;

/// The tasks of the control plane. Dropping it ends those that have nothing to finish.
pub(super) struct Tasks {
    /// Cancelled when all replicas must stop.
    pub(super) stop_replicas: CancellationToken,
    /// Tasks that must finish their work before the process exits.
    supervisors: TaskTracker,
    /// Counts the health checks that Ringway could not make.
    pub(super) not_done: NotDone,
    /// Where health checks run.
    checks: Thread,
    /// Where the side port runs.
    side_port: Thread,
    over: CancellationToken,
    panicked: mpsc::UnboundedSender<()>,
    _end: DropGuard,
}

impl Tasks {
    /// Starts the threads. The receiver hears of each task that panics.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub(super) fn start() -> io::Result<(Self, mpsc::UnboundedReceiver<()>)> {
        let (panicked, panics) = mpsc::unbounded_channel();
        let over = CancellationToken::new();
        let tasks = Self {
            stop_replicas: CancellationToken::new(),
            supervisors: TaskTracker::new(),
            not_done: NotDone::default(),
            checks: Thread::start("checks")?,
            side_port: Thread::start("side-port")?,
            _end: over.clone().drop_guard(),
            over,
            panicked,
        };
        Ok((tasks, panics))
    }

    /// Runs a task that must finish its work before the process exits.
    pub(super) fn supervise(&self, task: impl Future<Output = ()> + Send + 'static) {
        tokio::spawn(self.supervisors.track_future(self.watched(task)));
    }

    /// Runs a task that has nothing to finish, until it ends or these tasks are dropped.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        tokio::spawn(self.until_over(task));
    }

    /// As [`Tasks::spawn`], on the thread of the health checks.
    pub(super) fn spawn_check(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.checks.runtime().spawn(self.until_over(task));
    }

    /// As [`Tasks::spawn`], on the thread of the side port.
    pub(super) fn spawn_side_port(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.side_port.runtime().spawn(self.until_over(task));
    }

    /// Waits until the supervisors have finished.
    pub(super) async fn finish(&self) {
        self.supervisors.close();
        self.supervisors.wait().await;
    }

    /// The runtimes of the control plane, with their names.
    pub(super) fn runtimes(&self) -> Vec<(&'static str, Handle)> {
        let others = [("checks", &self.checks), ("api", &self.side_port)];
        let others = others.map(|(name, thread)| (name, thread.runtime().clone()));
        Handle::try_current().map(|own| ("control", own)).into_iter().chain(others).collect()
    }

    fn until_over(&self, task: impl Future<Output = ()> + Send + 'static) -> impl Future<Output = ()> + Send + 'static {
        until(self.over.clone(), self.watched(task))
    }

    /// Reports a panic of the task: without the task the table would become stale.
    fn watched(&self, task: impl Future<Output = ()> + Send + 'static) -> impl Future<Output = ()> + Send + 'static {
        let report = ReportPanic(self.panicked.clone());
        // A future that is passed from one async block to the next is stored in each of them. A pool has several tasks.
        let task = Box::pin(task);
        async move {
            task.await;
            drop(report);
        }
    }
}

/// The task, which ends when `over` is cancelled.
pub(super) fn until(over: CancellationToken, task: impl Future<Output = ()> + Send) -> impl Future<Output = ()> + Send {
    // As in `watched`.
    let task = Box::pin(task);
    async move {
        let _ = over.run_until_cancelled_owned(task).await;
    }
}

struct ReportPanic(mpsc::UnboundedSender<()>);

impl Drop for ReportPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Nobody listens any more while Ringway stops.
            let _ = self.0.send(());
        }
    }
}
