//! Upgrade, the side of the old process: a new process, the successor, takes over the listening sockets, replicas and run-time changes. The old
//! process exits once its connections have ended. If the successor fails, the old process keeps serving.
//!
//! The old process pauses supervision until the successor reports that it is ready. The successor starts supervision at
//! once but accepts connections only when it is ready. Both processes share the sockets, so queued connections survive.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::sync::oneshot;

use super::App;
use super::bound::Opened;
use super::connections::{HandedOver, start_to_hand_over};
use super::inheritance::{FAILED, MESSAGE_TIMEOUT, Message, READY, READY_FOR_CONNECTIONS, SIDE_PORT};
use super::pools::Pool;
use super::service_manager::notify;
use crate::address::Address;
use crate::control::command::CommandError;
use crate::control::supervisor::handover::Handed;
use crate::handover::{Channel, MOST_DESCRIPTORS};
use crate::proxy::listening::ListeningSocket;
use crate::proxy::socket::take_back;

/// Maximum time until a successor is ready.
const PATIENCE: Duration = Duration::from_secs(60);

/// Maximum number of config characters in one message.
const FILE_PART: usize = 8 * 1024;

impl App {
    /// Starts a successor and waits until it serves. Returns its process id.
    ///
    /// # Errors
    /// Returns an error if the successor fails. In that case this process keeps serving.
    pub(super) async fn hand_over(&mut self) -> Result<u32, CommandError> {
        let failed =
            |what: &str, error: &dyn std::fmt::Display| CommandError::UpgradeFailed(format!("{what}: {error}"));
        let (channel, of_successor) =
            Channel::pair().map_err(|error| failed("cannot create a channel to the successor", &error))?;
        let program = &self.environment.executable;
        let program = if program.exists() { program.as_path() } else { std::path::Path::new("/proc/self/exe") };
        let mut command = Command::new(program);
        command.args(&self.environment.arguments).stdin(of_successor.into_descriptor());
        let child = command.spawn();
        // The drop closes this process's copy of the successor's end of the channel.
        drop(command);
        let child = child.map_err(|error| failed(&format!("cannot run {}", program.display()), &error))?;
        let pid = child.id().unwrap_or_default();
        let mut successor = Successor(Some(child));
        tracing::info!(pid, program = %program.display(), "successor started");

        let mut decisions = Vec::new();
        let collected = tokio::time::timeout(MESSAGE_TIMEOUT, async {
            let mut replicas = Vec::new();
            for pool in &self.pools {
                let (decide, decision) = oneshot::channel();
                replicas.extend(pool.hand_over(decision).await?);
                decisions.push(decide);
            }
            let messages = self.messages(&replicas)?;
            io::Result::Ok((messages, replicas))
        });
        let collected = collected.await.unwrap_or_else(|_elapsed| Err(io::ErrorKind::TimedOut.into()));
        let (messages, replicas) = collected.map_err(|error| failed("cannot hand over", &error))?;
        let exchange = tokio::task::spawn_blocking(move || exchange_messages(channel, &messages));
        let outcome = tokio::time::timeout(PATIENCE, exchange).await;
        let ready = match outcome {
            Err(_elapsed) => Err(format!("it was not ready within {} s", PATIENCE.as_secs())),
            Ok(Err(panicked)) => Err(panicked.to_string()),
            Ok(Ok(Err(error))) => Err(error.to_string()),
            Ok(Ok(Ok(ready))) => Ok(ready),
        };
        let ready = match ready {
            Ok(ready) => ready,
            Err(why) => {
                let ended = successor.end().await;
                self.take_back_sockets();
                return Err(CommandError::UpgradeFailed(format!(
                    "the successor failed; this process keeps serving: {why} ({ended}); see the log for its messages"
                )));
            }
        };
        (self.successor, self.handed_over) = (Some(ready), replicas);
        for decide in decisions {
            // A supervisor that has ended has no replicas to release.
            let _ = decide.send(true);
        }
        successor.leave_alone();
        notify(&format!("MAINPID={pid}"));
        Ok(pid)
    }

    /// Begins to hand the open connections over to the successor, if it takes them. They are offered as long as this process runs. The
    /// receiver hears when each has been offered once.
    pub(super) fn hand_over_connections(&self) -> Option<oneshot::Receiver<HandedOver>> {
        let Ready { channel, .. } = self.successor.as_ref().filter(|ready| ready.takes_connections)?;
        // As long as the successor may still answer, nobody else knows who has a connection.
        let started = channel
            .set_timeout(Duration::ZERO)
            .and_then(|()| start_to_hand_over(Arc::clone(channel), self.proxy.hand_over()));
        let failed = |error: &io::Error| {
            tracing::warn!(%error, "cannot hand over open connections: they finish in this process");
        };
        started.inspect_err(failed).ok()
    }

    /// Lets all sockets take clients again: the successor may have turned them away before it failed.
    fn take_back_sockets(&self) {
        let of_listeners =
            self.listeners.iter().flat_map(|listener| listener.sockets().1).flat_map(|address| &address.copies);
        let of_listeners = of_listeners.map(ListeningSocket::take_back);
        let of_side_port = self.api_socket.iter().map(|side_port| take_back(&(&side_port.socket).into()));
        for error in of_listeners.chain(of_side_port).filter_map(io::Result::err) {
            tracing::warn!(%error, "cannot take back a listening socket after a failed upgrade");
        }
    }

    /// Builds all handover messages. Their descriptors are duplicates.
    fn messages(&self, replicas: &[Handed]) -> io::Result<Vec<(String, Vec<OwnedFd>)>> {
        let mut messages = Vec::new();
        let text = |message: &Message| serde_json::to_string(message).map_err(io::Error::other);
        let mut sockets =
            |name: &str, listen: &Address, sockets: &[BorrowedFd<'_>], is_managed, file| -> io::Result<()> {
                for some in sockets.chunks(MOST_DESCRIPTORS) {
                    let copies = some.iter().map(BorrowedFd::try_clone_to_owned).collect::<io::Result<_>>()?;
                    messages.push((
                        text(&Message::Sockets { name: name.to_owned(), listen: listen.clone(), is_managed, file })?,
                        copies,
                    ));
                }
                Ok(())
            };
        for listener in &self.listeners {
            let (config, addresses) = listener.sockets();
            for Opened { listen, copies, is_managed, .. } in addresses {
                let file = copies.first().and_then(ListeningSocket::file);
                sockets(&config.name, listen, &copies.iter().map(AsFd::as_fd).collect::<Vec<_>>(), *is_managed, file)?;
            }
        }
        if let Some(side_port) = &self.api_socket {
            let listen = self.config.api.listen.into();
            sockets(SIDE_PORT, &listen, &[side_port.socket.as_fd()], side_port.is_managed, None)?;
        }
        for replica in replicas {
            let message = Message::Replica {
                pool: replica.pool.clone(),
                slot: replica.part.of_slot(&replica.slot),
                pid: replica.pid,
                address: replica.address.clone(),
                command: replica.spec.command.clone(),
                env: replica.spec.env.clone(),
            };
            let port = replica.port.as_ref().map(AsFd::as_fd);
            let descriptors = [replica.lifeline.as_fd(), replica.output.as_fd()].into_iter().chain(port);
            let copies = descriptors.map(|descriptor| descriptor.try_clone_to_owned()).collect::<io::Result<_>>()?;
            messages.push((text(&message)?, copies));
        }
        let yaml: Vec<char> = self.file.to_yaml_without_files().chars().collect();
        for part in yaml.chunks(FILE_PART) {
            messages.push((text(&Message::File { part: part.iter().collect() })?, Vec::new()));
        }
        let healthy = self.pools.iter().filter(|pool| pool.route.table.load().any_healthy());
        let rest = Message::Rest {
            changes: self.proven_changes(),
            healthy: healthy.map(|pool| pool.route.pool.to_string()).collect(),
            is_ready: self.state.ready.load(Ordering::Relaxed),
            open_files: self.environment.replica_open_files,
            named: self.pools.iter().flat_map(Pool::named).collect(),
            refused: self
                .pools
                .iter()
                .filter_map(|pool| Some((pool.config().name.clone(), pool.rollout()?.refused?)))
                .collect(),
            has_connections: true,
        };
        messages.push((text(&rest)?, Vec::new()));
        Ok(messages)
    }
}

/// A successor that has not taken over yet. Dropping it kills the process.
struct Successor(Option<Child>);

impl Successor {
    /// Kills the successor and returns its exit status as text.
    async fn end(&mut self) -> String {
        let Some(child) = &mut self.0 else { return String::new() };
        let _ = child.start_kill();
        child.wait().await.map_or_else(|error| error.to_string(), |status| status.to_string())
    }

    /// Lets the successor run on its own. Dropping no longer kills it.
    fn leave_alone(mut self) {
        if let Some(mut child) = self.0.take() {
            tokio::spawn(async move { drop(child.wait().await) });
        }
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // The kill fails if the process has already ended.
            let _ = child.start_kill();
        }
    }
}

/// A successor that serves.
#[derive(Debug)]
pub(super) struct Ready {
    /// Stays open until this process exits: the close tells the successor.
    channel: Arc<Channel>,
    /// Whether the successor takes over open connections.
    takes_connections: bool,
}

/// Sends all handover messages and waits until the successor serves.
fn exchange_messages(channel: Channel, messages: &[(String, Vec<OwnedFd>)]) -> io::Result<Ready> {
    channel.set_timeout(MESSAGE_TIMEOUT)?;
    let sent = messages.iter().try_for_each(|(text, descriptors)| {
        channel.send(text, &descriptors.iter().map(AsFd::as_fd).collect::<Vec<_>>())
    });
    channel.set_timeout(PATIENCE + MESSAGE_TIMEOUT)?;
    match channel.answer().ok().flatten().map(|message| message.text) {
        Some(text) if text == READY || text == READY_FOR_CONNECTIONS => {
            Ok(Ready { channel: Arc::new(channel), takes_connections: text == READY_FOR_CONNECTIONS })
        }
        Some(text) if text.starts_with(FAILED) => Err(io::Error::other(text[FAILED.len()..].to_owned())),
        _ => Err(sent.err().unwrap_or_else(|| io::Error::other("it exited before it was ready"))),
    }
}
