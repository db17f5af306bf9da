//! The supervisor's adapter for child processes.
//!
//! A parent-death signal is sent when the *thread* that started a child ends. So children are started here, on
//! the control plane's own thread, and never from a thread pool.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use socket2::{Domain, Socket, Type};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::output::{Tail, log_lines};
use super::plan::{Action, Policy, Slot, Why, plan};
use super::{Ends, tell_of_stop, verdict};
use crate::backend::{Exit, Replica};
use crate::control::Event;
use crate::table::{Table, TableCell};

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

/// How long the output of a child that has ended may still come in.
const LAST_WORDS: Duration = Duration::from_millis(200);

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
pub async fn supervise(
    settings: Settings,
    ports: Ports,
    table: TableCell,
    events: mpsc::Sender<Event>,
    stop: CancellationToken,
) {
    let now = Instant::now();
    let slots = settings.slots.iter().map(|name| Slot::new(Arc::clone(name), now)).collect();
    let ends = Ends::new(Arc::clone(&settings.pool), settings.policy);
    let mut changes = table.watch();
    let mut supervisor =
        Supervisor { settings, ports, slots, ends, events, waiting: JoinSet::new(), children: HashMap::new() };
    while !stop.is_cancelled() {
        let wake = supervisor.carry_out().await;
        let due = tokio::time::sleep_until(wake.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600)).into());
        tokio::select! {
            () = stop.cancelled() => {}
            () = due => {}
            Ok(()) = changes.changed() => supervisor.judge(&table.load()),
            Some(ended) = supervisor.waiting.join_next() => match ended {
                Ok((slot, exit)) => supervisor.ended(slot, exit).await,
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            },
        }
    }
    supervisor.stop_all().await;
}

struct Supervisor {
    settings: Settings,
    ports: Ports,
    slots: Vec<Slot>,
    ends: Ends,
    events: mpsc::Sender<Event>,
    /// Waits for each child; gives the slot and how the child ended.
    waiting: JoinSet<(usize, Exit)>,
    /// By slot.
    children: HashMap<usize, Running>,
}

/// A child, as those see it who do not wait for it.
struct Running {
    pid: Pid,
    replica: Replica,
    /// SIGTERM and, after the grace, SIGKILL.
    stop: CancellationToken,
}

impl Supervisor {
    /// Does what the plan says. Returns when to ask it again.
    async fn carry_out(&mut self) -> Option<Instant> {
        loop {
            let now = Instant::now();
            let plan = plan(self.settings.slots.len(), &self.slots, &self.settings.policy, now);
            if plan.actions.is_empty() {
                return plan.wake;
            }
            for action in plan.actions {
                match action {
                    Action::Start(slot) => self.start(slot, now).await,
                    Action::Stop(slot, why) => self.stop(slot, why),
                }
            }
        }
    }

    async fn start(&mut self, slot: usize, now: Instant) {
        let address = self.ports.address(slot);
        let name = Arc::clone(&self.slots[slot].name);
        self.slots[slot].starting();
        let child = self.command(&name, address.port()).spawn();
        let (child, id) = match child.map(|child| (child.id(), child)) {
            Ok((Some(id), child)) => (child, id),
            Ok((None, _)) => return self.refused(slot, "it ended at once").await,
            Err(error) => return self.refused(slot, &error.to_string()).await,
        };
        // A process that was just started has an id above zero.
        let Some(pid) = i32::try_from(id).ok().and_then(Pid::from_raw) else { return };
        self.ends.over();
        self.slots[slot].running(false, now);
        let (replica, stop) = (Replica::Process { pid: id }, CancellationToken::new());
        tracing::debug!(pool = %self.settings.pool, slot = %name, pid = id, %address, "replica started");
        let grace = self.settings.stop_grace;
        self.waiting.spawn(wait(slot, Arc::clone(&name), child, pid, stop.clone(), grace));
        self.children.insert(slot, Running { pid, replica: replica.clone(), stop });
        let event = Event::Started { id: name, address, replica: Some(replica) };
        // No publisher: the app is going down.
        let _ = self.events.send(event).await;
    }

    async fn refused(&mut self, slot: usize, reason: &str) {
        let event = self.ends.refused(&mut self.slots[slot], reason, Instant::now());
        let _ = self.events.send(event).await;
    }

    fn stop(&mut self, slot: usize, why: Why) {
        if let Some(child) = self.children.get(&slot) {
            tell_of_stop(&self.settings.pool, &self.slots[slot].name, why);
            child.stop.cancel();
        }
        self.slots[slot].stopping(why);
    }

    fn judge(&mut self, table: &Table) {
        let now = Instant::now();
        for (&slot, child) in &self.children {
            let slot = &mut self.slots[slot];
            slot.judged(verdict(table, &slot.name, &child.replica), now);
        }
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

    async fn ended(&mut self, slot: usize, exit: Exit) {
        self.children.remove(&slot);
        let event = self.ends.ended(&mut self.slots[slot], exit);
        let _ = self.events.send(event).await;
    }

    async fn stop_all(mut self) {
        for child in self.children.values() {
            child.stop.cancel();
        }
        while self.waiting.join_next().await.is_some() {}
        self.children.clear();
    }
}

impl Drop for Supervisor {
    /// Children die with their handles, and with this what they have started. After [`Supervisor::stop_all`]
    /// there is nothing left.
    fn drop(&mut self) {
        for child in self.children.values() {
            signal(child.pid, Signal::KILL);
        }
    }
}

/// Waits until the child has ended, by itself or because it was told to, and ends what it leaves behind.
async fn wait(
    slot: usize,
    name: Arc<str>,
    mut child: Child,
    pid: Pid,
    stop: CancellationToken,
    grace: Duration,
) -> (usize, Exit) {
    let tail = Tail::default();
    let mut output = log_output(&name, &tail, &mut child);
    let told = tokio::select! {
        _ = child.wait() => false,
        () = stop.cancelled() => true,
    };
    if told {
        signal(pid, Signal::TERM);
        let _ = tokio::time::timeout(grace, child.wait()).await;
    }
    // Also where it has ended: what it leaves behind would keep its port, and answer for its successor.
    signal(pid, Signal::KILL);
    let ended = child.wait().await;
    // The pipes end with the last process that has them.
    let _ = tokio::time::timeout(LAST_WORDS, async { while output.join_next().await.is_some() {} }).await;
    output.detach_all();
    let code = ended.as_ref().ok().and_then(ExitStatus::code).map(i64::from);
    let reason = ended.map_or_else(|error| error.to_string(), |status| status.to_string());
    (slot, Exit { reason, code, output: tail.lines(), at: Instant::now() })
}

/// To a child's whole process group, so that the children of a shell go too.
fn signal(group: Pid, signal: Signal) {
    // Fails only where it has just ended by itself.
    let _ = kill_process_group(group, signal);
}

/// The binary may have been replaced on disk since the start; the running one is still there for its process.
fn launcher(path: &Path) -> &Path {
    if path.exists() { path } else { Path::new("/proc/self/exe") }
}

fn log_output(slot: &Arc<str>, tail: &Tail, child: &mut Child) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    if let Some(stdout) = child.stdout.take() {
        tasks.spawn(log_lines(Arc::clone(slot), tail.clone(), stdout));
    }
    if let Some(stderr) = child.stderr.take() {
        tasks.spawn(log_lines(Arc::clone(slot), tail.clone(), stderr));
    }
    tasks
}
