//! Upgrade, the side of the new process: what it inherits from an old Ringway, or from systemd, and the messages in which
//! the old process sends it.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use socket2::SockRef;
use tokio::sync::watch;

use super::bound::{fits_managed, turn_away};
use super::changes::Changes;
use super::pools::Pool;
use super::{StartError, connections};
use crate::address::Address;
use crate::backend::{Membership, State};
use crate::config::{Config, StaticBackend};
use crate::control::provider::Location;
use crate::control::provider::names::Resolve;
use crate::control::supervisor::handover::{Handed, Part, Spec};
use crate::control::supervisor::rollout::Refused;
use crate::handover::Channel;
use crate::proxy::TakeOver;
use crate::proxy::listening::{FileId, ListeningSocket};
use crate::table::Table;

/// How long a successor waits for the first check results of the remaining backends.
const LITTLE: Duration = Duration::from_secs(2);

/// Timeout for one message.
pub(super) const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// The command-line argument that tells a process to take over from an old one.
pub const TAKE_OVER: &str = "--take-over";

/// Identifies the side port in place of a listener name. No listener in a config can have this name.
pub(super) const SIDE_PORT: &str = "";

/// The message that reports that the successor serves.
pub(super) const READY: &str = "ready";

/// The message that reports that the successor serves and takes over open connections. It goes only to an old process that can hand them over.
pub(super) const READY_FOR_CONNECTIONS: &str = "ready for connections";

/// Begins the message that reports why the successor does not serve.
pub(super) const FAILED: &str = "failed ";

/// Tells the old process why this one, its successor, does not start.
pub fn report_failure(why: &str) {
    if let Ok(channel) = Channel::from_stdin() {
        let _ = channel.set_timeout(MESSAGE_TIMEOUT);
        // The old process may have given up.
        let _ = channel.send(&format!("{FAILED}{why}"), &[]);
    }
}

/// A handover message from the old process to the successor.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Message {
    /// Listening sockets. Further messages for the same listener can follow.
    Sockets {
        name: String,
        listen: Address,
        /// The service manager has opened them, and keeps them open.
        #[serde(default)]
        is_managed: bool,
        /// The file of a Unix socket.
        #[serde(default)]
        file: Option<FileId>,
    },
    /// A replica, with the descriptors of its lifeline, its output and, if it listens on one, its port, in that order.
    Replica { pool: String, slot: String, pid: u32, address: Address, command: Vec<String>, env: Vec<(String, String)> },
    /// A part of the config of the old process, as YAML.
    File { part: String },
    /// The last message: the run-time changes, the pools that have healthy backends, whether every pool has had one, the
    /// open-file limit of replicas, and the backends whose addresses came from a name server.
    Rest {
        changes: Changes,
        healthy: Vec<String>,
        is_ready: bool,
        open_files: Option<u64>,
        #[serde(default)]
        named: Vec<Named>,
        /// By pool: what a rollout has failed with.
        #[serde(default)]
        refused: BTreeMap<String, Refused>,
        /// The old process can hand over open connections.
        #[serde(default)]
        has_connections: bool,
    },
}

/// A backend whose address came from a name server or a file. The successor keeps it even if no name server answers, or the file has
/// faults.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Named {
    pub(super) pool: String,
    pub(super) id: Arc<str>,
    /// What was looked up.
    pub(super) name: String,
    pub(super) address: SocketAddr,
    #[serde(flatten)]
    pub(super) membership: Membership,
}

impl Named {
    /// The backend as a list would have it.
    pub(super) fn listed(&self) -> StaticBackend {
        let location = Location::Host { host: self.address.ip().to_string(), port: self.address.port() };
        StaticBackend { id: self.id.to_string(), location, membership: self.membership, resolve: Resolve::Refresh }
    }
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
    /// Backends of the old process whose addresses came from a name server.
    named: Vec<Named>,
    /// By pool: what a rollout of the old process has failed with.
    refused: BTreeMap<String, Refused>,
    /// The old process can hand over open connections.
    has_connections: bool,
    predecessor: Option<Channel>,
}

/// Listening sockets of one address.
#[derive(Debug)]
struct Inherited {
    /// Name of the listener; `None` for sockets from systemd.
    name: Option<String>,
    /// Listen address as in the config, where the port can be 0.
    listen: Address,
    /// The service manager has opened them, and keeps them open.
    is_managed: bool,
    sockets: Vec<ListeningSocket>,
}

/// The inherited sockets of one listener; empty if there are none.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    pub(super) list: Vec<ListeningSocket>,
    /// The service manager has opened them, and keeps them open.
    pub(super) is_managed: bool,
    /// Another listener of this process has them too.
    pub(super) is_shared: bool,
}

impl Inherited {
    /// Whether the sockets are from systemd and accept IPv4 clients too.
    fn is_dual_stack(&self) -> bool {
        let is_dual = |socket: &ListeningSocket| SockRef::from(socket).only_v6().is_ok_and(|only_v6| !only_v6);
        self.name.is_none() && self.sockets.iter().all(is_dual)
    }
}

/// The error of a listener whose interface is not that of the service manager's socket.
pub(super) fn other_interface(name: &str, listen: &Address, interface: &str) -> StartError {
    StartError::Unfit {
        key_path: format!("listeners[{name}].interface"),
        problem: format!(
            "the service manager has opened {listen} for other interfaces: write BindToDevice={interface} in the socket \
             unit, or remove this key"
        ),
    }
}

/// A listening socket that the service manager has opened, and its address.
fn of_service_manager(passed: &mut listenfd::ListenFd, n: usize) -> io::Result<(Address, ListeningSocket)> {
    // If the descriptor is not a Unix socket, it stays there for the next call.
    if let Ok(Some(socket)) = passed.take_unix_listener(n) {
        let bound = socket.local_addr()?;
        let no_path = || io::Error::other("a Unix socket without a path: write the path in ListenStream=");
        let path = bound.as_pathname().and_then(Path::to_str).ok_or_else(no_path)?;
        let address = Address::of_path(path).map_err(io::Error::other)?;
        return Ok((address.clone(), ListeningSocket::inherit(socket.into(), &address, None)));
    }
    let socket = passed.take_tcp_listener(n)?.ok_or(io::ErrorKind::NotFound)?;
    Ok((socket.local_addr()?.into(), ListeningSocket::Tcp(socket)))
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
            let (listen, socket) = of_service_manager(&mut passed, n).map_err(|error| {
                let what = format!(
                    "descriptor {n} of LISTEN_FDS is not a listening TCP or Unix stream socket ({error}): use \
                     ListenStream= in the socket unit"
                );
                io::Error::new(io::ErrorKind::InvalidInput, what)
            })?;
            inheritance.sockets.push(Inherited { name: None, listen, is_managed: true, sockets: vec![socket] });
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
                Message::Sockets { name, listen, is_managed, file } => {
                    let sockets =
                        descriptors.map(|descriptor| ListeningSocket::inherit(descriptor, &listen, file)).collect();
                    inheritance.sockets.push(Inherited { name: Some(name), listen, is_managed, sockets });
                }
                Message::Replica { pool, slot, pid, address, command, env } => {
                    let mut next = || descriptors.next().ok_or(io::ErrorKind::InvalidData);
                    let (lifeline, output) = (next()?, next()?);
                    let spec = Arc::new(Spec { command, env });
                    let (slot, part) = Part::parse(&slot);
                    inheritance.replicas.push(Handed {
                        pool,
                        slot: slot.into(),
                        part,
                        pid,
                        address,
                        spec,
                        lifeline: lifeline.into(),
                        output: output.into(),
                        port: descriptors.next().map(Into::into),
                    });
                }
                Message::File { part } => inheritance.file.push_str(&part),
                Message::Rest { changes, healthy, is_ready, open_files, named, refused, has_connections } => {
                    (inheritance.refused, inheritance.has_connections) = (refused, has_connections);
                    (inheritance.changes, inheritance.healthy, inheritance.named) = (changes, healthy, named);
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

    /// The addresses of inherited sockets that no listener has taken yet.
    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        self.sockets.iter().filter_map(|one| one.sockets.first()?.address().ok()?.ip()).collect()
    }

    /// Takes the inherited sockets of an address of a listener. Ringway matches by name and address, else by the address
    /// alone if its port is not 0.
    ///
    /// # Errors
    /// When the service manager has opened the address for other interfaces than the listener has.
    pub(super) fn sockets(
        &mut self,
        name: &str,
        listen: &Address,
        interface: Option<&str>,
    ) -> Result<Sockets, StartError> {
        let is_same = |one: &Inherited| one.listen == *listen && one.name.as_deref() == Some(name);
        // systemd's `ListenStream=8000` is a socket for both families.
        let unspecified = listen.ip().filter(|listen| listen.ip().is_unspecified());
        let any = unspecified.map(|listen| Address::Ip((Ipv6Addr::UNSPECIFIED, listen.port()).into()));
        let is_any = |one: &Inherited| any.as_ref() == Some(&one.listen) && one.is_dual_stack();
        let is_alike = |one: &Inherited| !listen.is_any_port() && (one.listen == *listen || is_any(one));
        let fits = |one: &Inherited| {
            let is_on = |socket: &ListeningSocket| socket.is_on(interface).unwrap_or(false);
            if one.is_managed { fits_managed(&one.sockets, interface) } else { one.sockets.iter().all(is_on) }
        };
        let of_name = self.sockets.iter().any(|one| is_same(one) && fits(one));
        let is_wanted = |one: &Inherited| if of_name { is_same(one) } else { is_alike(one) };
        let mut sockets = Sockets::default();
        for taken in self.sockets.extract_if(.., |one| is_wanted(one) && fits(one)) {
            sockets.is_managed |= taken.is_managed;
            sockets.list.extend(taken.sockets);
        }
        let is_elsewhere = || self.sockets.iter().any(|one| one.is_managed && is_wanted(one));
        match interface.filter(|_| sockets.list.is_empty() && is_elsewhere()) {
            Some(interface) => Err(other_interface(name, listen, interface)),
            None => Ok(sockets),
        }
    }

    /// Takes what the old process knew: backends that had their addresses from a name server, and by pool what a rollout has failed with.
    pub(super) fn known(&mut self) -> (Vec<Named>, BTreeMap<String, Refused>) {
        (std::mem::take(&mut self.named), std::mem::take(&mut self.refused))
    }

    /// Takes the inherited replicas of a pool.
    pub(super) fn replicas(&mut self, pool: &str) -> Vec<Handed> {
        let (taken, left) = std::mem::take(&mut self.replicas).into_iter().partition(|one| one.pool == pool);
        self.replicas = left;
        taken
    }

    /// Closes the sockets from systemd that no listener has taken, with a warning for each. Those of the old process stay
    /// open until this process serves.
    pub(super) fn close_leftovers(&mut self) {
        for left in self.sockets.extract_if(.., |left| left.name.is_none()) {
            tracing::warn!(address = %left.listen,
                "a socket from LISTEN_FDS matches no listener's address: add a listener, or remove the address from the \
                 socket unit");
        }
    }

    /// Waits until every pool that had a healthy backend in the old process has one here. Then waits up to 2 s for the
    /// first check results of all other backends.
    pub(super) async fn wait_for_backends(&self, pools: &[Pool]) {
        for pool in pools.iter().filter(|pool| self.healthy.iter().any(|name| **name == *pool.route.pool)) {
            until(pool, Table::any_healthy).await;
        }
        let is_judged = |table: &Table| table.backends().count(State::Starting) == 0;
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
        if let (Err(error), true) = (&before, self.takes_over()) {
            tracing::warn!(%error, "cannot compare the config with that of the old process: all run-time changes stay");
        }
        self.changes.kept(before.as_ref().unwrap_or(file), file)
    }

    /// Tells the old process that this process serves. Then takes over its open connections with `taker`, if there is one and the old
    /// process can hand them over. Sets `settled` to true once the old process has exited.
    pub(super) fn tell_ready(&mut self, settled: watch::Sender<bool>, taker: Option<TakeOver>) {
        let Some(channel) = self.predecessor.take() else { return };
        // The old process accepts the connections that wait on the sockets of a listener that has moved or is removed.
        let left = self.sockets.drain(..).filter(|left| !left.is_managed);
        let (on_unix, on_ip): (Vec<_>, Vec<_>) = left.partition(|left| left.listen.ip().is_none());
        for left in &on_ip {
            turn_away(&left.sockets, &left.listen);
        }
        let taker = taker.filter(|_| self.has_connections);
        match channel.send(if taker.is_some() { READY_FOR_CONNECTIONS } else { READY }, &[]) {
            // The old process cannot take back a file. So it loses the file only now.
            Ok(()) => on_unix.iter().for_each(|left| turn_away(&left.sockets, &left.listen)),
            Err(error) => {
                tracing::warn!(%error, "the old process exited before this process could report that it is ready");
            }
        }
        // The channel closes when the old process exits. That can take long, so a separate thread waits for it.
        tokio::task::spawn_blocking(move || {
            let _ = channel.set_timeout(Duration::ZERO);
            if let Some(taker) = taker {
                let taken = connections::take_over(&channel, &taker);
                tracing::info!(taken_over = taken, "the old process has exited");
            } else {
                let _ = channel.receive();
                tracing::info!("the old process has exited");
            }
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
