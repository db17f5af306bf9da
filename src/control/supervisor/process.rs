//! The supervisor's adapter for child processes.
//!
//! A parent-death signal is sent when the *thread* that started a child ends. So children are started here, on
//! the control plane's own thread, and never from a thread pool.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use socket2::{Domain, Socket, Type};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::output::log_lines;
use super::plan::{Action, Policy, Slot, plan};
use crate::backend::Replica;
use crate::control::Event;

/// How a pool's replicas are run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The pool's name, for the log.
    pub pool: Arc<str>,
    /// One replica for each.
    pub slots: Vec<Arc<str>>,
    /// Program and arguments, with `{port}` and `{slot}`; `ringway` as the program is `launcher`.
    pub command: Vec<String>,
    /// Added to the environment, with the same placeholders.
    pub env: Vec<(String, String)>,
    /// When a dead one is started again.
    pub policy: Policy,
    /// From SIGTERM to SIGKILL.
    pub stop_grace: Duration,
    /// The Ringway binary.
    pub launcher: PathBuf,
    /// Soft limit on open files for replicas.
    pub open_files: Option<u64>,
}

/// The name that stands for Ringway's own binary in a command.
pub const THIS_BINARY: &str = "ringway";

/// Ports kept for slots. Bound, but not listening, with `SO_REUSEADDR`: the replica can bind it too, while the
/// system gives it to nobody as a port of its own choice. A slot keeps its port for good.
#[derive(Debug)]
pub struct Ports(Vec<(SocketAddr, Socket)>);

impl Ports {
    /// Reserves one port for each slot.
    ///
    /// # Errors
    /// When the range has not enough free ones.
    pub fn reserve(range: Option<(u16, u16)>, slots: usize) -> io::Result<Self> {
        let mut candidates: Box<dyn Iterator<Item = u16>> = match range {
            Some((first, last)) => Box::new(first..=last),
            None => Box::new(std::iter::repeat_n(0, slots)),
        };
        let mut reserved = Vec::new();
        while reserved.len() < slots {
            let port = candidates.next().ok_or(io::ErrorKind::AddrInUse)?;
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            match socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into()) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AddrInUse && port != 0 => continue,
                Err(error) => return Err(error),
            }
            let address = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?;
            reserved.push((address, socket));
        }
        Ok(Self(reserved))
    }

    fn address(&self, slot: usize) -> SocketAddr {
        self.0[slot].0
    }
}

/// Whether `program` could be run at all: an existing file, or a name in `PATH`.
pub fn is_runnable(program: &str) -> bool {
    use std::os::unix::fs::PermissionsExt as _;

    let is_executable =
        |path: &Path| path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0);
    if program == THIS_BINARY {
        return true;
    }
    if program.contains('/') {
        return is_executable(Path::new(program));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| is_executable(&folder.join(program)))
}

/// Keeps a replica in every slot until `stop`, then stops them all.
pub async fn supervise(settings: Settings, ports: Ports, events: mpsc::Sender<Event>, stop: CancellationToken) {
    let now = Instant::now();
    let slots = settings.slots.iter().map(|name| Slot::new(Arc::clone(name), now)).collect();
    let mut supervisor = Supervisor { settings, ports, slots, events, children: JoinSet::new(), pids: HashMap::new() };
    while !stop.is_cancelled() {
        let wake = supervisor.carry_out().await;
        let due = tokio::time::sleep_until(wake.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600)).into());
        tokio::select! {
            () = stop.cancelled() => {}
            () = due => {}
            Some(ended) = supervisor.children.join_next() => supervisor.ended(ended.ok()).await,
        }
    }
    supervisor.stop_all().await;
}

struct Supervisor {
    settings: Settings,
    ports: Ports,
    slots: Vec<Slot>,
    events: mpsc::Sender<Event>,
    /// Waits for each child; gives the slot and how the child ended.
    children: JoinSet<(usize, String)>,
    pids: HashMap<usize, Pid>,
}

impl Supervisor {
    /// Does what the plan says. Returns when to ask it again.
    async fn carry_out(&mut self) -> Option<Instant> {
        loop {
            let now = Instant::now();
            let plan = plan(self.settings.slots.len(), &self.slots, now);
            if plan.actions.is_empty() {
                return plan.wake;
            }
            for action in plan.actions {
                match action {
                    Action::Start(slot) => self.start(slot, now).await,
                    Action::Stop(slot) => {
                        self.signal(slot, Signal::TERM);
                        self.slots[slot].stopping();
                    }
                }
            }
        }
    }

    async fn start(&mut self, slot: usize, now: Instant) {
        let address = self.ports.address(slot);
        let name = Arc::clone(&self.slots[slot].name);
        let child = self.command(&name, address.port()).spawn();
        let (mut child, pid) = match child.map(|child| (child.id(), child)) {
            Ok((Some(pid), child)) => (child, pid),
            Ok((None, _)) => return self.ended(Some((slot, "ended at once".to_owned()))).await,
            Err(error) => return self.ended(Some((slot, format!("cannot be started: {error}")))).await,
        };
        self.slots[slot].started(now);
        self.pids.extend(i32::try_from(pid).ok().and_then(Pid::from_raw).map(|pid| (slot, pid)));
        tracing::debug!(pool = %self.settings.pool, slot = %name, pid, %address, "replica started");
        log_output(&name, &mut child);
        self.children.spawn(async move {
            let ended = child.wait().await;
            (slot, ended.map_or_else(|error| error.to_string(), |status| status.to_string()))
        });
        let event = Event::Started { id: name, address, replica: Some(Replica::Process { pid }) };
        // No publisher: the app is going down.
        let _ = self.events.send(event).await;
    }

    fn command(&self, slot: &str, port: u16) -> Command {
        let fill = |text: &str| text.replace("{port}", &port.to_string()).replace("{slot}", slot);
        let launcher = launcher(&self.settings.launcher);
        let mut words = self.settings.command.iter().map(|word| fill(word));
        let mut command = Command::new(launcher);
        command.args(["launch", "--parent", &std::process::id().to_string()]);
        if let Some(open_files) = self.settings.open_files {
            command.args(["--open-files", &open_files.to_string()]);
        }
        command.arg("--");
        match words.next() {
            Some(program) if program == THIS_BINARY => command.arg(launcher),
            Some(program) => command.arg(program),
            None => &mut command,
        };
        command
            .args(words)
            .envs(self.settings.env.iter().map(|(name, value)| (name, fill(value))))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C goes to a terminal's whole process group; replicas must live on while Ringway drains.
            .process_group(0)
            .kill_on_drop(true);
        command
    }

    async fn ended(&mut self, ended: Option<(usize, String)>) {
        // A wait that was aborted: only when the app is dropped.
        let Some((slot, how)) = ended else { return };
        // What the replica has left behind would keep its port, and answer for its successor.
        self.signal(slot, Signal::KILL);
        self.pids.remove(&slot);
        let (policy, now) = (self.settings.policy, Instant::now());
        let was_crash_loop = self.slots[slot].is_crash_loop(&policy);
        let wait = self.slots[slot].ended(&policy, now);
        let crash_loop = self.slots[slot].is_crash_loop(&policy);
        let name = Arc::clone(&self.slots[slot].name);
        let pool = &self.settings.pool;
        let again_in_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        match (was_crash_loop, crash_loop) {
            (_, false) => tracing::warn!(%pool, slot = %name, how, again_in_ms, "replica ended"),
            (false, true) => {
                tracing::error!(%pool, slot = %name, how, again_in_ms, "replica keeps dying: crash loop");
            }
            (true, true) => tracing::debug!(%pool, slot = %name, how, again_in_ms, "replica ended again"),
        }
        let _ = self.events.send(Event::Stopped { id: name, crash_loop }).await;
    }

    /// To the replica's whole process group, so that the children of a shell go too.
    fn signal(&self, slot: usize, signal: Signal) {
        if let Some(&pid) = self.pids.get(&slot) {
            // Fails only where it has just ended by itself.
            let _ = kill_process_group(pid, signal);
        }
    }

    async fn stop_all(mut self) {
        for slot in 0..self.slots.len() {
            self.signal(slot, Signal::TERM);
        }
        let ended = async { while self.children.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(self.settings.stop_grace, ended).await;
        // Also where all have ended: their own children may not have.
        for slot in 0..self.slots.len() {
            self.signal(slot, Signal::KILL);
        }
        while self.children.join_next().await.is_some() {}
        self.pids.clear();
    }
}

impl Drop for Supervisor {
    /// Children die with their handles, and with this what they have started. After [`Supervisor::stop_all`]
    /// there is nothing left.
    fn drop(&mut self) {
        for slot in 0..self.slots.len() {
            self.signal(slot, Signal::KILL);
        }
    }
}

/// The binary may have been replaced on disk since the start; the running one is still there for its process.
fn launcher(path: &Path) -> &Path {
    if path.exists() { path } else { Path::new("/proc/self/exe") }
}

fn log_output(slot: &Arc<str>, child: &mut Child) {
    if let Some(stdout) = child.stdout.take() {
        tokio::spawn(log_lines(Arc::clone(slot), stdout));
    }
    if let Some(stderr) = child.stderr.take() {
        tokio::spawn(log_lines(Arc::clone(slot), stderr));
    }
}
