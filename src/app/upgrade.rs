//! Upgrade: a new process, the successor, takes over the listening sockets, replicas and run-time changes. The old
//! process exits once its connections have ended. If the successor fails, the old process keeps serving.
//!
//! The old process pauses supervision until the successor reports that it is ready. The successor starts supervision at
//! once but accepts connections only when it is ready. Both processes share the sockets, so queued connections survive.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixDatagram};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};
use tokio::sync::{oneshot, watch};

use super::App;
use super::changes::Changes;
use super::pools::Pool;
use crate::backend::State;
use crate::config::Config;
use crate::control::command::CommandError;
use crate::control::supervisor::process::{Handed, Spec};
use crate::handover::{Channel, MOST_DESCRIPTORS};
use crate::table::Table;

/// Maximum time until a successor is ready.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a successor waits for the first check results of the remaining backends.
const LITTLE: Duration = Duration::from_secs(2);

/// Timeout for one message.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum number of config characters in one message.
const FILE_PART: usize = 8 * 1024;

/// The command-line argument that tells a process to take over from an old one.
pub const TAKE_OVER: &str = "--take-over";

/// Identifies the side port in place of a listener name. No listener in a config can have this name.
pub(super) const SIDE_PORT: &str = "";

/// The message that reports that the successor serves.
const READY: &str = "ready";

/// A handover message from the old process to the successor.
#[derive(Debug, Serialize, Deserialize)]
enum Message {
    /// Listening sockets. Further messages for the same listener can follow.
    Sockets { name: String, listen: SocketAddr },
    /// A replica, with the descriptors of its lifeline, its output and its port, in that order.
    Replica {
        pool: String,
        slot: String,
        pid: u32,
        address: SocketAddr,
        command: Vec<String>,
        env: Vec<(String, String)>,
    },
    /// A part of the config of the old process, as YAML.
    File { part: String },
    /// The last message: the run-time changes, the pools that have healthy backends, whether every pool has had one,
    /// and the open-file limit of replicas.
    Rest { changes: Changes, healthy: Vec<String>, is_ready: bool, open_files: Option<u64> },
}

/// What a process inherits at its start, from an old Ringway process or from systemd.
#[derive(Debug, Default)]
pub struct Inheritance {
    sockets: Vec<Inherited>,
    pub(super) replicas: Vec<Handed>,
    changes: Changes,
    /// The config of the old process, as YAML.
    file: String,
    /// Pools that had a healthy backend in the old process.
    healthy: Vec<String>,
    /// Whether every pool in the old process has had a healthy backend.
    pub(super) is_ready: bool,
    /// The open-file limit that the old process gave to replicas.
    pub(super) open_files: Option<u64>,
    predecessor: Option<Channel>,
}

/// Listening sockets of one address.
#[derive(Debug)]
struct Inherited {
    /// Name of the listener; `None` for sockets from systemd.
    name: Option<String>,
    /// Listen address as in the config, where the port can be 0.
    listen: SocketAddr,
    sockets: Vec<TcpListener>,
}

impl Inheritance {
    /// Takes the sockets that the systemd protocol (`LISTEN_FDS`) passes. With `takes_over`, also receives everything
    /// that the old Ringway process hands over on standard input.
    ///
    /// # Errors
    /// Returns an error if a passed descriptor or a handover message is not valid.
    pub fn take(takes_over: bool) -> io::Result<Self> {
        let mut inheritance = if takes_over { Self::receive()? } else { Self::default() };
        let mut passed = listenfd::ListenFd::from_env();
        for n in 0..passed.len() {
            if let Some(socket) = passed.take_tcp_listener(n)? {
                let listen = socket.local_addr()?;
                inheritance.sockets.push(Inherited { name: None, listen, sockets: vec![socket] });
            }
        }
        Ok(inheritance)
    }

    fn receive() -> io::Result<Self> {
        let channel = Channel::from_stdin()?;
        channel.set_timeout(MESSAGE_TIMEOUT)?;
        let mut inheritance = Self::default();
        loop {
            let message = channel.receive()?.ok_or(io::ErrorKind::UnexpectedEof)?;
            let mut descriptors = message.descriptors.into_iter();
            match serde_json::from_str(&message.text).map_err(io::Error::other)? {
                Message::Sockets { name, listen } => {
                    let sockets = descriptors.map(TcpListener::from).collect();
                    inheritance.sockets.push(Inherited { name: Some(name), listen, sockets });
                }
                Message::Replica { pool, slot, pid, address, command, env } => {
                    let mut next = || descriptors.next().ok_or(io::ErrorKind::InvalidData);
                    let (lifeline, output, port) = (next()?, next()?, next()?);
                    let spec = Arc::new(Spec { command, env });
                    inheritance.replicas.push(Handed {
                        pool,
                        slot: slot.into(),
                        pid,
                        address,
                        spec,
                        lifeline: lifeline.into(),
                        output: output.into(),
                        port: port.into(),
                    });
                }
                Message::File { part } => inheritance.file.push_str(&part),
                Message::Rest { changes, healthy, is_ready, open_files } => {
                    (inheritance.changes, inheritance.healthy) = (changes, healthy);
                    (inheritance.is_ready, inheritance.open_files) = (is_ready, open_files);
                    break;
                }
            }
        }
        inheritance.predecessor = Some(channel);
        Ok(inheritance)
    }

    /// Whether an old Ringway process waits for this process to be ready.
    pub(super) fn takes_over(&self) -> bool {
        self.predecessor.is_some()
    }

    /// Takes the inherited sockets of a listener. Ringway matches by name and address, else by the address alone if its
    /// port is not 0.
    pub(super) fn sockets(&mut self, name: &str, listen: SocketAddr) -> Vec<TcpListener> {
        let is_same = |one: &Inherited| one.listen == listen && one.name.as_deref() == Some(name);
        let is_alike = |one: &Inherited| one.listen == listen && listen.port() != 0;
        let of_name = self.sockets.iter().any(is_same);
        let (taken, left) = std::mem::take(&mut self.sockets)
            .into_iter()
            .partition(|one| if of_name { is_same(one) } else { is_alike(one) });
        self.sockets = left;
        let taken: Vec<Inherited> = taken;
        taken.into_iter().flat_map(|one| one.sockets).collect()
    }

    /// Takes the inherited replicas of a pool.
    pub(super) fn replicas(&mut self, pool: &str) -> Vec<Handed> {
        let (taken, left) = std::mem::take(&mut self.replicas).into_iter().partition(|one| one.pool == pool);
        self.replicas = left;
        taken
    }

    /// Closes the sockets that no listener has taken. Logs a warning for each socket that came from systemd.
    pub(super) fn close_leftovers(&mut self) {
        for left in self.sockets.drain(..).filter(|left| left.name.is_none()) {
            tracing::warn!(address = %left.listen,
                "LISTEN_FDS passed a socket with an address that no listener has: add a listener, or remove the address from the socket unit");
        }
    }

    /// Waits until every pool that had a healthy backend in the old process has one here. Then waits up to 2 s for the
    /// first check results of all other backends.
    pub(super) async fn wait_for_backends(&self, pools: &[Pool]) {
        for pool in pools.iter().filter(|pool| self.healthy.iter().any(|name| **name == *pool.route.pool)) {
            until(pool, Table::any_healthy).await;
        }
        let is_judged = |table: &Table| table.backends().iter().all(|backend| backend.state != State::Starting);
        let all_judged = async {
            for pool in pools {
                until(pool, is_judged).await;
            }
        };
        // Without this wait, the keys of these backends would move to other backends for a moment.
        let _ = tokio::time::timeout(LITTLE, all_judged).await;
    }

    /// Returns the run-time changes that still apply with `file` as the config.
    pub(super) fn changes(&self, file: &Config) -> Changes {
        // The config of an older version may no longer be valid. In that case only the new config decides.
        let before = Config::parse(&self.file, "the config of the old process");
        self.changes.kept(before.as_ref().unwrap_or(file), file)
    }

    /// Tells the old process that this process serves. Sets `settled` to true once the old process has exited.
    pub(super) fn tell_ready(&mut self, settled: watch::Sender<bool>) {
        let Some(channel) = self.predecessor.take() else { return };
        if let Err(error) = channel.send(READY, &[]) {
            tracing::warn!(%error, "the old process exited before it learned that this process serves");
        }
        // The old process sends nothing more; the channel closes when it exits. That can take long, so a separate
        // thread waits for it.
        tokio::task::spawn_blocking(move || {
            let _ = channel.set_timeout(Duration::ZERO);
            let _ = channel.receive();
            tracing::info!("the old process has exited");
            settled.send_replace(true);
        });
    }
}

/// Waits until the table of a pool meets a condition.
async fn until(pool: &Pool, is_met: impl Fn(&Table) -> bool) {
    let mut changes = pool.route.table.watch();
    while !is_met(&pool.route.table.load()) {
        if changes.changed().await.is_err() {
            return;
        }
    }
}

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
            self.messages(&replicas)
        });
        let messages = collected.await.unwrap_or_else(|_elapsed| Err(io::ErrorKind::TimedOut.into()));
        let messages = messages.map_err(|error| failed("cannot hand over", &error))?;
        let exchange = tokio::task::spawn_blocking(move || exchange_messages(channel, messages));
        let outcome = tokio::time::timeout(PATIENCE, exchange).await;
        let ready = match outcome {
            Err(_elapsed) => Err(format!("it was not ready within {} s", PATIENCE.as_secs())),
            Ok(Err(panicked)) => Err(panicked.to_string()),
            Ok(Ok(Err(error))) => Err(error.to_string()),
            Ok(Ok(Ok(channel))) => Ok(channel),
        };
        let channel = match ready {
            Ok(channel) => channel,
            Err(why) => {
                let ended = successor.end().await;
                return Err(CommandError::UpgradeFailed(format!(
                    "the successor failed; this process keeps serving: {why} ({ended}); see the log for its messages"
                )));
            }
        };
        self.successor = Some(channel);
        for decide in decisions {
            // A supervisor that has ended has no replicas to release.
            let _ = decide.send(true);
        }
        successor.leave_alone();
        notify(&format!("MAINPID={pid}"));
        Ok(pid)
    }

    /// Builds all handover messages. Their descriptors are duplicates.
    fn messages(&self, replicas: &[Handed]) -> io::Result<Vec<(String, Vec<OwnedFd>)>> {
        let mut messages = Vec::new();
        let text = |message: &Message| serde_json::to_string(message).map_err(io::Error::other);
        let mut sockets = |name: &str, listen: SocketAddr, sockets: &[BorrowedFd<'_>]| -> io::Result<()> {
            for some in sockets.chunks(MOST_DESCRIPTORS) {
                let copies = some.iter().map(BorrowedFd::try_clone_to_owned).collect::<io::Result<_>>()?;
                messages.push((text(&Message::Sockets { name: name.to_owned(), listen })?, copies));
            }
            Ok(())
        };
        for listener in &self.listeners {
            let (config, open) = listener.sockets();
            sockets(&config.name, config.listen, &open.iter().map(AsFd::as_fd).collect::<Vec<_>>())?;
        }
        let side_port: Vec<_> = self.api_socket.iter().map(AsFd::as_fd).collect();
        sockets(SIDE_PORT, self.config.api.listen, &side_port)?;
        for replica in replicas {
            let message = Message::Replica {
                pool: replica.pool.clone(),
                slot: replica.slot.to_string(),
                pid: replica.pid,
                address: replica.address,
                command: replica.spec.command.clone(),
                env: replica.spec.env.clone(),
            };
            let descriptors = [replica.lifeline.as_fd(), replica.output.as_fd(), replica.port.as_fd()];
            let copies = descriptors.iter().map(BorrowedFd::try_clone_to_owned).collect::<io::Result<_>>()?;
            messages.push((text(&message)?, copies));
        }
        let yaml: Vec<char> = self.file.to_yaml().chars().collect();
        for part in yaml.chunks(FILE_PART) {
            messages.push((text(&Message::File { part: part.iter().collect() })?, Vec::new()));
        }
        let healthy = self.pools.iter().filter(|pool| pool.route.table.load().any_healthy());
        let rest = Message::Rest {
            changes: self.changes.clone(),
            healthy: healthy.map(|pool| pool.route.pool.to_string()).collect(),
            is_ready: self.state.ready.load(Ordering::Relaxed),
            open_files: self.environment.replica_open_files,
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

/// Sends all handover messages and waits until the successor serves. The returned channel must stay open: its close
/// tells the successor that this process has exited.
fn exchange_messages(channel: Channel, messages: Vec<(String, Vec<OwnedFd>)>) -> io::Result<Channel> {
    channel.set_timeout(MESSAGE_TIMEOUT)?;
    for (text, descriptors) in messages {
        channel.send(&text, &descriptors.iter().map(AsFd::as_fd).collect::<Vec<_>>())?;
    }
    channel.set_timeout(PATIENCE + MESSAGE_TIMEOUT)?;
    match channel.receive()? {
        Some(message) if message.text == READY => Ok(channel),
        _ => Err(io::Error::other("it exited before it was ready")),
    }
}

/// Notifies the service manager, if there is one (`sd_notify(3)`): systemd, or Ringway's own process 1 in a container.
/// The address of the latter is an abstract one.
pub(super) fn notify(message: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let send = || {
        let socket = UnixDatagram::unbound()?;
        match path.as_bytes().strip_prefix(b"@") {
            Some(name) => socket.connect_addr(&UnixAddress::from_abstract_name(name)?)?,
            None => socket.connect(&path)?,
        }
        socket.send(message.as_bytes())
    };
    if let Err(error) = send() {
        tracing::warn!(%error, ?path, "cannot notify the service manager");
    }
}
