//! The life of a started app: serves, runs commands, and shuts down in order.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::commands::Planned;
use super::connections::HandedOver;
use super::listeners::Listener;
use super::reload::ReloadPlan;
use super::service_manager::{keep_alive, notify, watchdog};
use super::tasks::until;
use super::{App, RunError};
use crate::api;
use crate::config::OpenConnections;
use crate::control::command::{Caller, Command, CommandError, PendingCommand, Report};
use crate::limits;
use crate::proxy::WorkersEnded;

/// How long open calls to the side port, and the accepting of connections that are already queued, may go on after a successor has
/// taken over.
const LAST_ANSWERS: Duration = Duration::from_secs(5);

/// Longest time until each open connection has been offered to a successor.
const OFFERS: Duration = Duration::from_secs(60);

/// Why [`App::serve`] returned.
enum RunOutcome {
    /// The caller asked for shutdown.
    Stopped,
    /// A successor has taken over. What has become of the open connections follows, unless that is known already.
    Succeeded(Option<oneshot::Receiver<HandedOver>>),
}

impl App {
    /// Serves until `shutdown`, then stops in order: `/readyz` fails, after `shutdown.delay` the listeners close, open
    /// connections finish within their `drain`, and the replicas stop last.
    ///
    /// # Errors
    /// When a part of Ringway ends unexpectedly.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) -> Result<(), RunError> {
        let mut shutdown = pin!(shutdown);
        let watchdog = watchdog(self.inheritance.takes_over());
        if self.inheritance.takes_over() {
            tokio::select! {
                () = &mut shutdown => return Ok(()),
                () = self.inheritance.wait_for_backends(&self.pools) => {}
            }
            self.open();
            self.show();
            self.catch_up_with_rotation();
            if let Some(settled) = self.settled.take() {
                let taker =
                    (self.config.upgrade.connections == OpenConnections::HandOver).then(|| self.proxy.take_over());
                self.inheritance.tell_ready(settled, taker);
            }
            if self.inheritance.is_ready {
                self.state.ready.store(true, Ordering::Relaxed);
            }
            tracing::info!("took over from the old process");
        }
        notify("READY=1");
        let watched = CancellationToken::new();
        if let Some(interval) = watchdog {
            self.tasks.spawn(until(watched.clone(), self.keep_alive(interval)));
        }
        let (Some((workers, panics)), Some(listener)) = (self.trouble.take(), self.side_port_socket()) else {
            return Err(RunError::SidePort);
        };
        // The side port answers on its own thread while a command runs.
        let side_port = SidePort::default();
        let (over, closed, ended) =
            (side_port.over.clone(), side_port.closed.clone().drop_guard(), side_port.ended.clone().drop_guard());
        let router = api::router(Arc::clone(&self.state));
        let most = usize::try_from(limits::side_port(limits::open_files())).unwrap_or(usize::MAX);
        let limits = api::Limits::new(most);
        self.tasks.spawn_side_port(async move {
            match tokio::net::TcpListener::from_std(listener) {
                Ok(listener) => {
                    let open = api::serve(listener, router, limits, over).await;
                    drop(closed);
                    open.wait().await;
                }
                Err(error) => tracing::error!(%error, "cannot serve the side port"),
            }
            drop(ended);
        });
        self.watch_config();
        let mut trouble = Trouble { workers, panics, side_port: side_port.ended.clone() };
        let mut outcome = self.serve(shutdown, &mut trouble, &side_port).await;
        if matches!(outcome, Ok(RunOutcome::Succeeded(_))) {
            self.watching = None;
            // The service manager watches the successor now. A process that stops or fails shows that it lives while connections drain.
            watched.cancel();
        }
        self.becoming_ready = None;
        self.state.ready.store(false, Ordering::Relaxed);
        match outcome {
            Ok(RunOutcome::Stopped) => {
                notify("STOPPING=1");
                tokio::time::sleep(self.config.shutdown.delay).await;
            }
            // The successor answers now.
            Ok(RunOutcome::Succeeded(_)) => self.api_socket = None,
            Err(_) => {}
        }
        // Commands that still wait are answered with `Stopping`.
        self.commands.close();
        while self.commands.try_recv().is_ok() {}
        // The copies of their sockets close too, or the kernel would keep accepting connections.
        if !matches!(outcome, Ok(RunOutcome::Succeeded(_))) {
            self.listeners.iter().for_each(Listener::remove_file);
        }
        self.listeners.clear();
        self.proxy.stop_accepting();
        if let Ok(RunOutcome::Succeeded(Some(handing_over))) = &mut outcome {
            // The drain times begin when each connection has been offered, unless the successor hangs.
            let _ = tokio::time::timeout(OFFERS, handing_over).await;
        }
        self.proxy.stop();
        // The side port shows meanwhile how the connections drain.
        while trouble.workers.next().await.is_some() {}
        // The predecessor may still have connections to the replicas, until its drain ends.
        let _ = self.is_settled.wait_for(|&settled| settled).await;
        // Until now, streams have shown how the connections drain.
        self.state.stopping.cancel();
        self.tasks.stop_replicas.cancel();
        self.tasks.finish().await;
        if side_port.over.is_cancelled() {
            // The answer to the upgrade command may not be sent yet.
            let _ = tokio::time::timeout(LAST_ANSWERS, side_port.ended.cancelled()).await;
        }
        outcome.map(drop)
    }

    /// Tells the service manager that Ringway works, as long as each of its threads does.
    fn keep_alive(&self, interval: Duration) -> impl Future<Output = ()> + Send + use<> {
        let (pulse, runtimes) = (self.proxy.pulse(), self.tasks.runtimes());
        let all_answer = async move || {
            pulse.beat().await;
            for (_, runtime) in &runtimes {
                let _ = runtime.spawn(async {}).await;
            }
        };
        keep_alive(interval, all_answer, || notify("WATCHDOG=1"))
    }

    /// The socket of the side port; the original stays for a successor.
    fn side_port_socket(&self) -> Option<std::net::TcpListener> {
        self.api_socket.as_ref()?.socket.try_clone().ok()
    }

    /// Runs commands until `shutdown`, or until a part of Ringway ends. It notices both at every step.
    async fn serve(
        &mut self,
        mut shutdown: Pin<&mut impl Future<Output = ()>>,
        trouble: &mut Trouble,
        side_port: &SidePort,
    ) -> Result<RunOutcome, RunError> {
        loop {
            let PendingCommand { command, caller, is_dry_run, outcome } = tokio::select! {
                () = &mut shutdown => return Ok(RunOutcome::Stopped),
                error = trouble.next() => return Err(error),
                Some(pending) = self.commands.recv() => pending,
            };
            // Planning may take long (Ringway resolves names) and has no effect.
            let planned = tokio::select! {
                () = &mut shutdown => return Ok(RunOutcome::Stopped),
                error = trouble.next() => return Err(error),
                planned = self.plan(command.clone()) => planned,
            };
            if is_dry_run {
                let forecast = match planned {
                    Ok(planned) => Ok(self.forecast(planned).await),
                    Err(error) => Err(error),
                };
                // The sender may have gone.
                let _ = outcome.send(forecast);
                continue;
            }
            let result = match planned {
                Err(error) => Err(error),
                Ok(Planned::Report(report)) => Ok(report),
                Ok(Planned::Reload(plan)) => {
                    let (report, ended) = self.reload(*plan, &mut shutdown, trouble).await;
                    if let Some(ended) = ended {
                        self.answer(&command, caller, Ok(report), outcome);
                        return ended;
                    }
                    Ok(report)
                }
                Ok(Planned::Notify { pool, event, changes, summary }) => {
                    Ok(self.apply_event(&pool, event, changes, summary).await)
                }
                Ok(Planned::Rebalance { pool, over }) => Ok(self.rebalance(&pool, over).await),
                Ok(Planned::RollOut { pool, plan, order }) => self.roll_out(&pool, plan, order).await,
                Ok(Planned::Reopen(report)) => self.reopen(report),
                Ok(Planned::Log { filter, lasts, summary }) => Ok(self.apply_log(filter.as_deref(), lasts, summary)),
                Ok(Planned::HandOver) => {
                    let successor = tokio::select! {
                        () = &mut shutdown => return Ok(RunOutcome::Stopped),
                        error = trouble.next() => return Err(error),
                        successor = self.hand_over() => successor,
                    };
                    if let Ok(pid) = successor {
                        // The side port closes before the answer: a caller that asks again reaches the successor.
                        side_port.over.cancel();
                        self.state.stopping.cancel();
                        side_port.closed.cancelled().await;
                        // And only the successor serves who connects after the answer.
                        self.listeners.clear();
                        self.proxy.stop_accepting();
                        if tokio::time::timeout(LAST_ANSWERS, self.proxy.stopped()).await.is_err() {
                            tracing::warn!("this process still accepts connections that were queued before");
                        }
                        let mut changes = vec![format!("process {pid} has taken over")];
                        let mut handing_over = self.hand_over_connections();
                        if let Some(mut result) = handing_over.take() {
                            match tokio::time::timeout(LAST_ANSWERS, &mut result).await {
                                Ok(Ok(handed_over)) => changes.push(handed_over.to_string()),
                                Ok(Err(_)) => changes.push("the new process takes no open connections".to_owned()),
                                Err(_elapsed) => {
                                    changes.push("open connections follow".to_owned());
                                    handing_over = Some(result);
                                }
                            }
                        }
                        self.answer(&command, caller, Ok(Report { changes, ..Report::default() }), outcome);
                        return Ok(RunOutcome::Succeeded(handing_over));
                    }
                    successor.map(|_pid| Report::default())
                }
            };
            self.answer(&command, caller, result, outcome);
        }
    }

    /// Completes a reload. Also returns what ended the app meanwhile: then Ringway does not wait for new backends.
    async fn reload(
        &mut self,
        plan: ReloadPlan,
        shutdown: &mut Pin<&mut impl Future<Output = ()>>,
        trouble: &mut Trouble,
    ) -> (Report, Option<Result<RunOutcome, RunError>>) {
        let hurry = CancellationToken::new();
        let mut reload = pin!(self.apply_reload(plan, hurry.clone()));
        let ended = tokio::select! {
            report = &mut reload => return (report, None),
            () = shutdown => Ok(RunOutcome::Stopped),
            error = trouble.next() => Err(error),
        };
        hurry.cancel();
        (reload.await, Some(ended))
    }

    /// Answers the sender of a command, and counts and logs the outcome.
    fn answer(
        &self,
        command: &Command,
        caller: Caller,
        result: Result<Report, CommandError>,
        outcome: oneshot::Sender<Result<Report, CommandError>>,
    ) {
        let (name, pool, backend) = (command.name(), command.pool(), command.backend());
        match &result {
            // It has changed nothing.
            Ok(_) if matches!(command, Command::Reload { is_dry_run: true, .. }) => {
                tracing::debug!(command = name, %caller, "command done: {command}");
            }
            Ok(_) => tracing::info!(command = name, pool, backend, %caller, "command done: {command}"),
            Err(error) => {
                tracing::warn!(command = name, pool, backend, %caller, "command rejected: {command}: {error}");
            }
        }
        let label = if result.is_ok() { api::Outcome::Ok } else { api::Outcome::Failed };
        match command {
            Command::Reload { is_dry_run: false, text, .. } => {
                self.state.reloads.count(label);
                if text.is_none() {
                    let error = result.as_ref().err().map(|error| Arc::new(error.to_string()));
                    self.state.config_error.store(error);
                }
            }
            Command::Upgrade => self.state.upgrades.count(label),
            _ => {}
        }
        // The sender may have gone.
        let _ = outcome.send(result);
    }
}

/// The end of the side port, step by step.
#[derive(Default)]
struct SidePort {
    /// Cancelled when it is to end.
    over: CancellationToken,
    /// Cancelled when it accepts no more connections.
    closed: CancellationToken,
    /// Cancelled when its last answer has been sent.
    ended: CancellationToken,
}

/// Parts of Ringway without which it cannot serve. The service manager restarts Ringway if one of them ends.
struct Trouble {
    workers: WorkersEnded,
    /// Hears of tasks that panic. Without them the table would become stale.
    panics: mpsc::UnboundedReceiver<()>,
    /// Cancelled when the server of the side port ends.
    side_port: CancellationToken,
}

impl Trouble {
    async fn next(&mut self) -> RunError {
        tokio::select! {
            ended = self.workers.next() => RunError::WorkerEnded(ended.unwrap_or_default()),
            Some(()) = self.panics.recv() => RunError::TaskPanicked,
            () = self.side_port.cancelled() => RunError::SidePort,
        }
    }
}
