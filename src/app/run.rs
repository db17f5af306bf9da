//! The life of a started app: serves, runs commands, and shuts down in order.

use std::future::IntoFuture as _;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::commands::Planned;
use super::service_manager::notify;
use super::{App, RunError};
use crate::api;
use crate::control::command::{Command, CommandError, Report};

/// How long open calls to the side port may go on after a successor has taken over.
const LAST_ANSWERS: Duration = Duration::from_secs(5);

/// Why [`App::serve`] returned.
enum RunOutcome {
    /// The caller asked for shutdown.
    Stopped,
    /// A successor has taken over.
    Succeeded,
}

impl App {
    /// Serves until `shutdown`, then stops in order: `/readyz` fails, after `shutdown.delay` the listeners close, open
    /// connections finish within their `drain`, and the replicas stop last.
    ///
    /// # Errors
    /// When a part of Ringway ends unexpectedly.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) -> Result<(), RunError> {
        let routes = api::router(Arc::clone(&self.state)).into_make_service_with_connect_info::<SocketAddr>();
        let mut shutdown = std::pin::pin!(shutdown);
        if self.inheritance.takes_over() {
            tokio::select! {
                () = &mut shutdown => return Ok(()),
                () = self.inheritance.wait_for_backends(&self.pools) => {}
            }
            self.open();
            self.show();
            if let Some(settled) = self.settled.take() {
                self.inheritance.tell_ready(settled);
            }
            if self.inheritance.is_ready {
                self.state.ready.store(true, Ordering::Relaxed);
            }
            tracing::info!("took over from the old process");
        }
        notify("READY=1");
        let Some(api) = self.api.take() else { return Ok(()) };
        // A task of its own, so that it answers while a command runs.
        let api_over = CancellationToken::new();
        let api = axum::serve(api, routes).with_graceful_shutdown(api_over.clone().cancelled_owned());
        let mut api = AbortOnDropHandle::new(tokio::spawn(api.into_future()));
        let outcome = self.serve(shutdown, &mut api, &api_over).await;
        self.becoming_ready = None;
        self.state.ready.store(false, Ordering::Relaxed);
        match outcome {
            Ok(RunOutcome::Stopped) => {
                notify("STOPPING=1");
                tokio::time::sleep(self.config.shutdown.delay).await;
            }
            // The successor answers now.
            Ok(RunOutcome::Succeeded) => self.api_socket = None,
            Err(_) => {}
        }
        // Commands that still wait are answered with `Stopping`.
        self.commands.close();
        while self.commands.try_recv().is_ok() {}
        // The copies of their sockets close too, or the kernel would keep accepting connections.
        self.listeners.clear();
        self.proxy.stop();
        // The side port shows meanwhile how the connections drain.
        while self.proxy.worker_ended().await.is_some() {}
        // The predecessor may still have connections to the replicas, until its drain ends.
        let _ = self.is_settled.wait_for(|&settled| settled).await;
        self.tasks.stop_replicas.cancel();
        while self.tasks.supervisors.join_next().await.is_some() {}
        if api_over.is_cancelled() {
            // The answer to the upgrade command may not be sent yet.
            let _ = tokio::time::timeout(LAST_ANSWERS, &mut api).await;
        }
        outcome.map(drop)
    }

    /// Runs commands until `shutdown`, or until a part of Ringway ends.
    async fn serve(
        &mut self,
        mut shutdown: std::pin::Pin<&mut impl Future<Output = ()>>,
        api: &mut AbortOnDropHandle<io::Result<()>>,
        api_over: &CancellationToken,
    ) -> Result<RunOutcome, RunError> {
        loop {
            let (command, outcome) = tokio::select! {
                () = &mut shutdown => return Ok(RunOutcome::Stopped),
                ended = &mut *api => {
                    let error = ended.unwrap_or_else(|_panicked| Err(io::ErrorKind::Other.into()));
                    return Err(RunError::Api(error.err().unwrap_or_else(|| io::ErrorKind::Other.into())));
                }
                ended = self.proxy.worker_ended() => return Err(RunError::WorkerEnded(ended.unwrap_or_default())),
                // Without this task the table would become stale: exit, so that the service manager restarts Ringway.
                () = panicked(&mut self.tasks.others) => return Err(RunError::TaskPanicked),
                () = panicked(&mut self.tasks.supervisors) => return Err(RunError::TaskPanicked),
                Some(pending) = self.commands.recv() => pending,
            };
            // Planning may take long (Ringway resolves names) and has no effect. Applying does not wait for anybody.
            let planned = tokio::select! {
                () = &mut shutdown => return Ok(RunOutcome::Stopped),
                planned = self.plan(command.clone()) => planned,
            };
            let result = match planned {
                Err(error) => Err(error),
                Ok(Planned::Report(report)) => Ok(report),
                Ok(Planned::Reload(plan)) => Ok(self.apply_reload(*plan).await),
                Ok(Planned::Notify { pool, event, changes, summary }) => {
                    Ok(self.apply_event(&pool, event, changes, summary).await)
                }
                Ok(Planned::HandOver) => {
                    let successor = tokio::select! {
                        () = &mut shutdown => return Ok(RunOutcome::Stopped),
                        successor = self.hand_over() => successor,
                    };
                    if let Ok(pid) = successor {
                        // The side port closes before the answer: a caller that asks again reaches the successor.
                        api_over.cancel();
                        tokio::task::yield_now().await;
                        let changes = vec![format!("process {pid} has taken over")];
                        self.answer(&command, Ok(Report { changes, ..Report::default() }), outcome);
                        return Ok(RunOutcome::Succeeded);
                    }
                    successor.map(|_pid| Report::default())
                }
            };
            self.answer(&command, result, outcome);
        }
    }

    /// Answers the sender of a command, and counts and logs the outcome.
    fn answer(
        &self,
        command: &Command,
        result: Result<Report, CommandError>,
        outcome: oneshot::Sender<Result<Report, CommandError>>,
    ) {
        match &result {
            Ok(_) => tracing::info!("command done: {command}"),
            Err(error) => tracing::warn!("command rejected: {command}: {error}"),
        }
        let label = if result.is_ok() { api::Outcome::Ok } else { api::Outcome::Failed };
        match command {
            Command::Reload { is_dry_run: false, .. } => self.state.reloads.count(label),
            Command::Upgrade => self.state.upgrades.count(label),
            _ => {}
        }
        // The sender may have gone.
        let _ = outcome.send(result);
    }
}

/// Returns when one of the tasks panics.
async fn panicked(tasks: &mut JoinSet<()>) {
    while let Some(ended) = tasks.join_next().await {
        if ended.is_err() {
            return;
        }
    }
    std::future::pending::<()>().await;
}
