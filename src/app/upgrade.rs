//! Upgrade: a new process takes over listening sockets, replicas and run-time changes, and this one leaves once its
//! connections have ended. If the new one fails, this one goes on as if nothing had been.
//!
//! Until the new one says that it is ready, supervision rests here, and there it begins; the new one accepts no connection
//! before. Both have the same sockets, so nothing that is queued on them is lost.

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
use crate::control::operator::Refusal;
use crate::control::supervisor::process::{Handed, Spec};
use crate::handover::{Line, MOST_DESCRIPTORS};
use crate::table::Table;

/// How long a successor may take until it is ready.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long it waits for checks of backends that it does not need.
const LITTLE: Duration = Duration::from_secs(2);

/// How long one letter may take.
const LETTER: Duration = Duration::from_secs(10);

/// Characters of a config that go into one letter.
const FILE_PART: usize = 8 * 1024;

/// The argument that tells a process to take over.
pub const TAKE_OVER: &str = "--take-over";

/// Stands for the name of a listener: no config can have it.
pub(super) const SIDE_PORT: &str = "";

/// Says that the successor serves.
const READY: &str = "ready";

/// What is handed over, a letter for each.
#[derive(Debug, Serialize, Deserialize)]
enum Letter {
    /// Listening sockets; more of the same listener may follow.
    Sockets { name: String, listen: SocketAddr },
    /// A replica: its lifeline, its output, its port.
    Replica {
        pool: String,
        slot: String,
        pid: u32,
        address: SocketAddr,
        command: Vec<String>,
        env: Vec<(String, String)>,
    },
    /// A part of the config that ran there, as YAML.
    File { part: String },
    /// What was changed at run time, which pools have healthy backends, whether all have had some, and the limit on open
    /// files that replicas get.
    Rest { changes: Changes, healthy: Vec<String>, is_ready: bool, open_files: Option<u64> },
}

/// What a process has at its start from one before it: from an older Ringway, or from systemd.
#[derive(Debug, Default)]
pub struct Inheritance {
    sockets: Vec<Inherited>,
    pub(super) replicas: Vec<Handed>,
    changes: Changes,
    /// The config that ran there, as YAML.
    file: String,
    /// Pools that had a healthy backend there.
    healthy: Vec<String>,
    /// Every pool there has had a healthy backend.
    pub(super) is_ready: bool,
    /// The limit on open files that replicas got there.
    pub(super) open_files: Option<u64>,
    predecessor: Option<Line>,
}

/// Listening sockets of one address.
#[derive(Debug)]
struct Inherited {
    /// The listener's name; none from systemd.
    name: Option<String>,
    /// As in the config, where the port may be 0.
    listen: SocketAddr,
    sockets: Vec<TcpListener>,
}

impl Inheritance {
    /// Takes what the environment offers: sockets by the systemd protocol (`LISTEN_FDS`), and where `takes_over` all that
    /// the older Ringway hands over on standard input.
    ///
    /// # Errors
    /// When that is not what it should be.
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
        let line = Line::from_stdin()?;
        line.set_timeout(LETTER)?;
        let mut inheritance = Self::default();
        loop {
            let letter = line.receive()?.ok_or(io::ErrorKind::UnexpectedEof)?;
            let mut descriptors = letter.descriptors.into_iter();
            match serde_json::from_str(&letter.text).map_err(io::Error::other)? {
                Letter::Sockets { name, listen } => {
                    let sockets = descriptors.map(TcpListener::from).collect();
                    inheritance.sockets.push(Inherited { name: Some(name), listen, sockets });
                }
                Letter::Replica { pool, slot, pid, address, command, env } => {
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
                Letter::File { part } => inheritance.file.push_str(&part),
                Letter::Rest { changes, healthy, is_ready, open_files } => {
                    (inheritance.changes, inheritance.healthy) = (changes, healthy);
                    (inheritance.is_ready, inheritance.open_files) = (is_ready, open_files);
                    break;
                }
            }
        }
        inheritance.predecessor = Some(line);
        Ok(inheritance)
    }

    /// Whether an older Ringway waits for this one to be ready.
    pub(super) fn takes_over(&self) -> bool {
        self.predecessor.is_some()
    }

    /// The sockets for a listener, if there are any: by name and address, or by an address alone that means just one.
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

    /// The replicas of a pool.
    pub(super) fn replicas(&mut self, pool: &str) -> Vec<Handed> {
        let (taken, left) = std::mem::take(&mut self.replicas).into_iter().partition(|one| one.pool == pool);
        self.replicas = left;
        taken
    }

    /// Closes the sockets that no listener has taken. Those of the older Ringway are closed with it.
    pub(super) fn close_leftovers(&mut self) {
        for left in self.sockets.drain(..).filter(|left| left.name.is_none()) {
            tracing::warn!(address = %left.listen,
                "no listener has this address, whose socket was passed by LISTEN_FDS: add one, or take it out of the socket unit");
        }
    }

    /// Waits until every pool that had a healthy backend has one here, and then a little for the others.
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
        // Else their keys would go elsewhere for a moment.
        let _ = tokio::time::timeout(LITTLE, all_judged).await;
    }

    /// The run-time changes that hold with `file` as the config.
    pub(super) fn changes(&self, file: &Config) -> Changes {
        // Of an older version its config may not be one any more: then they are judged by the new one alone.
        let before = Config::parse(&self.file, "the older Ringway's config");
        self.changes.kept(before.as_ref().unwrap_or(file), file)
    }

    /// Tells the older Ringway that this one serves, and `settled` once it has gone.
    pub(super) fn tell_ready(&mut self, settled: watch::Sender<bool>) {
        let Some(line) = self.predecessor.take() else { return };
        if let Err(error) = line.send(READY, &[]) {
            tracing::warn!(%error, "the older Ringway has gone before it was told");
        }
        // Nothing is ever said; the line ends with the process. A thread of its own waits for that, perhaps for long.
        tokio::task::spawn_blocking(move || {
            let _ = line.set_timeout(Duration::ZERO);
            let _ = line.receive();
            tracing::info!("the older Ringway has gone");
            settled.send_replace(true);
        });
    }
}

/// Waits until a pool's table is as it should be.
async fn until(pool: &Pool, is_right: impl Fn(&Table) -> bool) {
    let mut changes = pool.route.table.watch();
    while !is_right(&pool.route.table.load()) {
        if changes.changed().await.is_err() {
            return;
        }
    }
}

impl App {
    /// Starts a successor and waits until it serves. Returns its process id.
    ///
    /// # Errors
    /// When it fails; then this process goes on.
    pub(super) async fn hand_over(&mut self) -> Result<u32, Refusal> {
        let failed = |what: &str, error: &dyn std::fmt::Display| Refusal::Conflict(format!("{what}: {error}"));
        let (line, of_successor) = Line::pair().map_err(|error| failed("no line to a successor", &error))?;
        let program = &self.environment.executable;
        let program = if program.exists() { program.as_path() } else { std::path::Path::new("/proc/self/exe") };
        let mut command = Command::new(program);
        command.args(&self.environment.arguments).stdin(of_successor.into_descriptor());
        let child = command.spawn();
        // With it goes this process's copy of the successor's end.
        drop(command);
        let child = child.map_err(|error| failed(&format!("cannot run {}", program.display()), &error))?;
        let pid = child.id().unwrap_or_default();
        let mut successor = Successor(Some(child));
        tracing::info!(pid, program = %program.display(), "a successor is started");

        let mut decisions = Vec::new();
        let collected = tokio::time::timeout(LETTER, async {
            let mut replicas = Vec::new();
            for pool in &self.pools {
                let (decide, decision) = oneshot::channel();
                replicas.extend(pool.hand_over(decision).await?);
                decisions.push(decide);
            }
            self.letters(&replicas)
        });
        let letters = collected.await.unwrap_or_else(|_elapsed| Err(io::ErrorKind::TimedOut.into()));
        let letters = letters.map_err(|error| failed("cannot hand over", &error))?;
        let correspondence = tokio::task::spawn_blocking(move || correspond(line, letters));
        let outcome = tokio::time::timeout(PATIENCE, correspondence).await;
        let ready = match outcome {
            Err(_elapsed) => Err(format!("it was not ready within {} s", PATIENCE.as_secs())),
            Ok(Err(panicked)) => Err(panicked.to_string()),
            Ok(Ok(Err(error))) => Err(error.to_string()),
            Ok(Ok(Ok(line))) => Ok(line),
        };
        let line = match ready {
            Ok(line) => line,
            Err(why) => {
                let ended = successor.end().await;
                return Err(Refusal::Conflict(format!(
                    "the successor failed, and this process goes on: {why} ({ended}); the log has its words"
                )));
            }
        };
        self.successor = Some(line);
        for decide in decisions {
            // A supervisor that has ended has nothing to let go of.
            let _ = decide.send(true);
        }
        successor.leave_alone();
        notify(&format!("MAINPID={pid}"));
        Ok(pid)
    }

    /// All that is handed over. The descriptors are copies.
    fn letters(&self, replicas: &[Handed]) -> io::Result<Vec<(String, Vec<OwnedFd>)>> {
        let mut letters = Vec::new();
        let text = |letter: &Letter| serde_json::to_string(letter).map_err(io::Error::other);
        let mut sockets = |name: &str, listen: SocketAddr, sockets: &[BorrowedFd<'_>]| -> io::Result<()> {
            for some in sockets.chunks(MOST_DESCRIPTORS) {
                let copies = some.iter().map(BorrowedFd::try_clone_to_owned).collect::<io::Result<_>>()?;
                letters.push((text(&Letter::Sockets { name: name.to_owned(), listen })?, copies));
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
            let letter = Letter::Replica {
                pool: replica.pool.clone(),
                slot: replica.slot.to_string(),
                pid: replica.pid,
                address: replica.address,
                command: replica.spec.command.clone(),
                env: replica.spec.env.clone(),
            };
            let descriptors = [replica.lifeline.as_fd(), replica.output.as_fd(), replica.port.as_fd()];
            let copies = descriptors.iter().map(BorrowedFd::try_clone_to_owned).collect::<io::Result<_>>()?;
            letters.push((text(&letter)?, copies));
        }
        let yaml: Vec<char> = self.file.to_yaml().chars().collect();
        for part in yaml.chunks(FILE_PART) {
            letters.push((text(&Letter::File { part: part.iter().collect() })?, Vec::new()));
        }
        let healthy = self.pools.iter().filter(|pool| pool.route.table.load().any_healthy());
        let rest = Letter::Rest {
            changes: self.changes.clone(),
            healthy: healthy.map(|pool| pool.route.pool.to_string()).collect(),
            is_ready: self.state.ready.load(Ordering::Relaxed),
            open_files: self.environment.replica_open_files,
        };
        letters.push((text(&rest)?, Vec::new()));
        Ok(letters)
    }
}

/// A successor that has not taken over yet. Dropped, it is killed.
struct Successor(Option<Child>);

impl Successor {
    /// Ends it. How it ended.
    async fn end(&mut self) -> String {
        let Some(child) = &mut self.0 else { return String::new() };
        let _ = child.start_kill();
        child.wait().await.map_or_else(|error| error.to_string(), |status| status.to_string())
    }

    /// From now on it is on its own.
    fn leave_alone(mut self) {
        if let Some(mut child) = self.0.take() {
            tokio::spawn(async move { drop(child.wait().await) });
        }
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // Fails where it has ended.
            let _ = child.start_kill();
        }
    }
}

/// Hands over, and waits until the successor serves. The line's end is to tell it that this process has gone.
fn correspond(line: Line, letters: Vec<(String, Vec<OwnedFd>)>) -> io::Result<Line> {
    line.set_timeout(LETTER)?;
    for (text, descriptors) in letters {
        line.send(&text, &descriptors.iter().map(AsFd::as_fd).collect::<Vec<_>>())?;
    }
    line.set_timeout(PATIENCE + LETTER)?;
    match line.receive()? {
        Some(letter) if letter.text == READY => Ok(line),
        _ => Err(io::Error::other("it ended before it was ready")),
    }
}

/// Tells the service manager, if there is one (`sd_notify(3)`): systemd, or our own process 1 in a container, whose
/// address is an abstract one.
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
        tracing::warn!(%error, ?path, "cannot tell the service manager");
    }
}
