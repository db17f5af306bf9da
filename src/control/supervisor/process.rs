//! The supervisor's adapter for child processes, each behind a [shim](super::shim).
//!
//! # Layout
//!
//! - this file: the loop, and what the plan orders
//! - [`lifeline`]: how a replica is held, waited for and ended
//! - [`ports`]: where replicas listen

use std::collections::{BTreeMap, HashMap};
use std::io::{self, PipeReader};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use socket2::Socket;
use tokio::process::Command;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::plan::{Action, Policy, Slot, Why, plan};
use super::{Ends, LOOK, Resting, drain, drained, joined, tell_of_stop, verdict};
use crate::backend::{Exit, Replica};
use crate::control::Event;
use crate::control::provider::{slot_number, slots};
use crate::table::{Table, TableCell};

mod lifeline;
mod ports;

pub use self::lifeline::let_go;
use self::lifeline::{Held, first_word, wait};
pub use self::ports::Ports;

/// How a pool's replicas are run. All but the pool's name may change while they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The pool's name.
    pub pool: Arc<str>,
    /// How many; with none wanted the supervisor ends once the last has.
    pub replicas: u32,
    /// Weights of slots where they are not 1.
    pub weights: BTreeMap<Arc<str>, u32>,
    /// What each is.
    pub spec: Arc<Spec>,
    /// How long a replica's connections may go on before it is stopped because it is not wanted, or outdated.
    pub drain: Duration,
    /// When a dead one is started again.
    pub policy: Policy,
    /// From SIGTERM to SIGKILL.
    pub stop_grace: Duration,
    /// The Ringway binary.
    pub launcher: PathBuf,
    /// Soft limit on open files for replicas.
    pub open_files: Option<u64>,
}

/// What a replica is. One that was started from another is outdated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// Program and arguments, with `{port}` and `{slot}`; `ringway` as the program is the launcher.
    pub command: Vec<String>,
    /// Added to the environment, with the same placeholders.
    pub env: Vec<(String, String)>,
}

/// The name that stands for Ringway's own binary in a command.
pub const THIS_BINARY: &str = "ringway";

/// A replica as one Ringway hands it over to the next. The sockets are copies.
#[derive(Debug)]
pub struct Handed {
    /// Its pool.
    pub pool: String,
    /// Its slot.
    pub slot: Arc<str>,
    /// Its process id.
    pub pid: u32,
    /// Where it listens.
    pub address: SocketAddr,
    /// What it was started from.
    pub spec: Arc<Spec>,
    /// Ringway's end of its lifeline.
    pub lifeline: UnixStream,
    /// What it writes.
    pub output: PipeReader,
    /// What keeps its port.
    pub port: Socket,
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

/// Keeps a replica in every slot until `stop`, then stops them all. The settings may change meanwhile.
pub async fn supervise(
    mut settings: watch::Receiver<Settings>,
    ports: Ports,
    taken_over: Vec<Handed>,
    resting: Resting,
    table: TableCell,
    events: mpsc::Sender<Event>,
    stop: CancellationToken,
) {
    let Resting { mut settled, mut handovers } = resting;
    let first = settings.borrow_and_update().clone();
    let ends = Ends::new(Arc::clone(&first.pool), first.policy);
    let mut changes = table.watch();
    let mut supervisor = Supervisor {
        settings: first.clone(),
        ports,
        slots: Vec::new(),
        ends,
        table: table.clone(),
        events,
        waiting: JoinSet::new(),
        children: HashMap::new(),
        is_settled: *settled.borrow_and_update(),
    };
    supervisor.configure(first).await;
    supervisor.take_over(taken_over).await;
    while !stop.is_cancelled() && !supervisor.is_done() {
        let wake = supervisor.carry_out().await;
        let due = tokio::time::sleep_until(wake.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600)).into());
        tokio::select! {
            () = stop.cancelled() => {}
            () = due => {}
            Ok(()) = changes.changed() => supervisor.judge(&table.load()),
            Ok(()) = settings.changed() => {
                let changed = settings.borrow_and_update().clone();
                supervisor.configure(changed).await;
            }
            Ok(()) = settled.changed(), if !supervisor.is_settled => supervisor.settle().await,
            Some(handover) = handovers.recv() => {
                let handed = supervisor.handed();
                if handover.decide(handed, &stop).await {
                    // Our ends of the lifelines are closed; the other process has its own.
                    return;
                }
            }
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
    table: TableCell,
    events: mpsc::Sender<Event>,
    /// Waits for each child; gives the slot and how the child ended.
    waiting: JoinSet<(usize, Exit)>,
    /// By slot.
    children: HashMap<usize, Running>,
    /// Until then an older Ringway may have connections to what was taken over: it is neither outdated nor surplus.
    is_settled: bool,
}

/// A replica, as those see it who do not wait for it.
struct Running {
    pid: u32,
    replica: Replica,
    /// What it was started from.
    spec: Arc<Spec>,
    /// What it takes to be its supervisor. Closing the last one of its lifeline's ends kills it.
    held: Held,
    /// SIGTERM and, after the grace, SIGKILL.
    stop: CancellationToken,
}

impl Supervisor {
    /// Takes settings, the first or changed ones.
    async fn configure(&mut self, settings: Settings) {
        self.settings = settings;
        self.ends.policy = self.settings.policy;
        let (now, replicas) = (Instant::now(), self.settings.replicas);
        for name in slots(&self.settings.pool, replicas).into_iter().skip(self.slots.len()) {
            self.slots.push(Slot::new(name, now));
        }
        if let Err(error) = self.ports.extend(replicas as usize) {
            tracing::error!(pool = %self.settings.pool, %error, "not enough free ports for all replicas");
        }
        self.mark_outdated();
        for event in joined(&self.settings.pool, replicas, &self.settings.weights) {
            let _ = self.events.send(event).await;
        }
        // One that was about to leave may have left before it joined again.
        for (&slot, child) in self.children.iter().filter(|(slot, _)| **slot < replicas as usize) {
            let (Some(address), id) = (self.ports.address(slot), Arc::clone(&self.slots[slot].name)) else { continue };
            let replica = Some(child.replica.clone());
            let _ = self.events.send(Event::Started { id, address, replica }).await;
        }
        // What runs is drained first.
        for slot in self.slots.iter().skip(self.wanted()).filter(|slot| !slot.is_running()) {
            let _ = self.events.send(Event::Left { id: Arc::clone(&slot.name) }).await;
        }
    }

    /// Takes over replicas that run already.
    async fn take_over(&mut self, taken_over: Vec<Handed>) {
        let now = Instant::now();
        for replica in taken_over {
            let number = slot_number(&self.settings.pool, &replica.slot);
            let Some(slot) = number.and_then(|number| (number as usize).checked_sub(1)) else { continue };
            for name in slots(&self.settings.pool, slot as u32 + 1).into_iter().skip(self.slots.len()) {
                self.slots.push(Slot::new(name, now));
            }
            tracing::info!(pool = %self.settings.pool, slot = %replica.slot, pid = replica.pid, "replica taken over");
            let held = Held { lifeline: replica.lifeline, output: replica.output };
            self.runs(slot, replica.pid, replica.address, replica.spec, held, now).await;
        }
    }

    /// Copies of what it takes to supervise the replicas.
    fn handed(&self) -> io::Result<Vec<Handed>> {
        let handed = self.children.iter().map(|(&slot, child)| {
            let (address, port) = self.ports.reserved.get(slot).ok_or(io::ErrorKind::NotFound)?;
            let Held { lifeline, output } = child.held.try_clone()?;
            Ok(Handed {
                pool: self.settings.pool.to_string(),
                slot: Arc::clone(&self.slots[slot].name),
                pid: child.pid,
                address: *address,
                spec: Arc::clone(&child.spec),
                lifeline,
                output,
                port: port.try_clone()?,
            })
        });
        handed.collect()
    }

    /// How many slots are wanted at the moment.
    fn wanted(&self) -> usize {
        let wanted = self.settings.replicas as usize;
        if self.is_settled { wanted } else { wanted.max(self.slots.len()) }
    }

    /// The older Ringway has gone, and with it its connections: what was taken over may be outdated or surplus.
    async fn settle(&mut self) {
        self.is_settled = true;
        let settings = self.settings.clone();
        self.configure(settings).await;
    }

    fn mark_outdated(&mut self) {
        for (&slot, child) in self.children.iter().filter(|_| self.is_settled) {
            self.slots[slot].outdated(child.spec != self.settings.spec);
        }
    }

    /// No replica is wanted any more, and none is left.
    fn is_done(&self) -> bool {
        self.settings.replicas == 0 && self.waiting.is_empty()
    }

    /// Does what the plan says. Returns when to ask it again.
    async fn carry_out(&mut self) -> Option<Instant> {
        loop {
            let now = Instant::now();
            let looks_again = self.look_at_drains().then(|| now + LOOK);
            let plan = plan(self.wanted(), &self.slots, &self.settings.policy, now);
            if plan.actions.is_empty() {
                return plan.wake.into_iter().chain(looks_again).min();
            }
            for action in plan.actions {
                match action {
                    Action::Start(slot) => self.start(slot, now).await,
                    Action::Drain(slot, why) => {
                        self.slots[slot].draining(why);
                        let event = drain(&self.slots[slot].name, why, self.settings.drain);
                        let _ = self.events.send(event).await;
                    }
                    // `configure` has told the publisher.
                    Action::Keep(slot) => {
                        let child = self.children.get(&slot);
                        let is_outdated = child.is_some_and(|child| child.spec != self.settings.spec);
                        self.slots[slot].kept(is_outdated);
                    }
                    Action::Stop(slot, why) => self.stop(slot, why),
                }
            }
        }
    }

    /// Whether there are any that go on.
    fn look_at_drains(&mut self) -> bool {
        let mut any = false;
        for slot in &mut self.slots {
            let Some(why) = slot.drains_for() else { continue };
            match drained(&self.table.load(), &slot.name, why) {
                Some(true) => slot.drained(),
                _ => any = true,
            }
        }
        any
    }

    async fn start(&mut self, slot: usize, now: Instant) {
        let name = Arc::clone(&self.slots[slot].name);
        self.slots[slot].starting();
        let Some(address) = self.ports.address(slot) else { return self.refused(slot, "no free port").await };
        match self.spawn(&name, address.port()).await {
            Ok((pid, held)) => {
                self.ends.over();
                tracing::debug!(pool = %self.settings.pool, slot = %name, pid, %address, "replica started");
                let spec = Arc::clone(&self.settings.spec);
                self.runs(slot, pid, address, spec, held, now).await;
            }
            Err(error) => self.refused(slot, &error.to_string()).await,
        }
    }

    /// Starts a shim, and has it start the replica.
    async fn spawn(&self, slot: &str, port: u16) -> io::Result<(u32, Held)> {
        let (lifeline, of_shim) = UnixStream::pair()?;
        let (output, of_replica) = std::io::pipe()?;
        let mut command = self.command(slot, port);
        let shim = command.stdin(OwnedFd::from(of_shim)).stdout(of_replica.try_clone()?).stderr(of_replica).spawn();
        // Its copies of our ends go with the command.
        drop(command);
        let mut shim = shim?;
        tokio::spawn(async move { drop(shim.wait().await) });
        let held = Held { lifeline, output };
        let pid = first_word(&held.lifeline).await?;
        Ok((pid, held))
    }

    /// A replica runs in the slot: waits for it from now on, and tells of it.
    async fn runs(&mut self, slot: usize, pid: u32, address: SocketAddr, spec: Arc<Spec>, held: Held, now: Instant) {
        let name = Arc::clone(&self.slots[slot].name);
        let waiter = match held.try_clone() {
            Ok(waiter) => waiter,
            Err(error) => return self.refused(slot, &error.to_string()).await,
        };
        self.slots[slot].running(false, now);
        let (replica, stop) = (Replica::Process { pid }, CancellationToken::new());
        let grace = self.settings.stop_grace;
        self.waiting.spawn(wait(slot, Arc::clone(&name), waiter, stop.clone(), grace));
        self.children.insert(slot, Running { pid, replica: replica.clone(), spec, held, stop });
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
        let mut words = self.settings.spec.command.iter().map(|word| fill(word));
        let mut command = Command::new(launcher);
        command.arg("shim");
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
            .envs(self.settings.spec.env.iter().map(|(name, value)| (name, fill(value))))
            // What is meant for Ringway alone.
            .env_remove("RINGWAY_TOKEN")
            .env_remove("NOTIFY_SOCKET")
            .env_remove("LISTEN_FDS")
            .env_remove("LISTEN_PID")
            // Ctrl-C goes to a terminal's whole process group; replicas must live on while Ringway drains.
            .process_group(0);
        command
    }

    async fn ended(&mut self, slot: usize, exit: Exit) {
        self.children.remove(&slot);
        let event = self.ends.ended(&mut self.slots[slot], exit);
        let _ = self.events.send(event).await;
        if slot >= self.wanted() {
            let _ = self.events.send(Event::Left { id: Arc::clone(&self.slots[slot].name) }).await;
        }
    }

    async fn stop_all(mut self) {
        for child in self.children.values() {
            child.stop.cancel();
        }
        while self.waiting.join_next().await.is_some() {}
        self.children.clear();
    }
}

/// The binary may have been replaced on disk since the start; the running one is still there for its process.
fn launcher(path: &Path) -> &Path {
    if path.exists() { path } else { Path::new("/proc/self/exe") }
}
