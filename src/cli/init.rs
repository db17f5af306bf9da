//! Process 1 of a container: runs Ringway as a child, forwards signals to it, and reaps orphans.
//!
//! The kernel gives process 1 no default signal actions, and makes it the parent of every orphan in the container. If
//! Ringway itself reaped any child, it would take exit statuses from the code that waits for them. So it runs as a child.
//!
//! After an upgrade Ringway announces its successor with `MAINPID=`, as it does to systemd. The container then ends when
//! that process ends.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::process::{ExitCode, ExitStatus};

use anyhow::Context as _;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_passcred;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, waitpid};
use tokio::io::Interest;
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;

use super::{Failure, runtime};

/// Longest notification, in bytes.
const LONGEST: usize = 4096;

/// Whether this process is process 1.
pub(crate) fn is_needed() -> bool {
    std::process::id() == 1
}

/// Runs the same command line as a child. Returns its exit code, or that of its last successor.
pub(crate) fn run() -> Result<ExitCode, Failure> {
    let code = runtime()?.block_on(supervise())?;
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

/// The exit code in the convention of shells: 128 plus the signal.
fn code_of(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt as _;
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1)
}

async fn supervise() -> anyhow::Result<i32> {
    let listen = |kind| signal(kind).context("cannot listen for signals");
    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut hangup = listen(SignalKind::hangup())?;
    let mut user1 = listen(SignalKind::user_defined1())?;
    let mut user2 = listen(SignalKind::user_defined2())?;
    let mut children = listen(SignalKind::child())?;
    let (messages, address) = message_socket().context("cannot listen for successors")?;
    let own_name = std::env::args_os().next().unwrap_or_default();
    let program = std::env::current_exe().unwrap_or_else(|_| "/proc/self/exe".into());
    let child =
        Command::new(&program).arg0(own_name).args(std::env::args_os().skip(1)).env("NOTIFY_SOCKET", address).spawn();
    let mut child = child.with_context(|| format!("cannot run {}", program.display()))?;
    let first = child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
    let mut main = Main { pid: first, ended: None };
    let mut message = [0; LONGEST];
    loop {
        let (pid, has_successor) = (main.pid, main.ended.is_some());
        let pass_on = |signal| {
            if let Some(pid) = pid {
                // Fails only if the process has just ended.
                let _ = kill_process(pid, signal);
            }
        };
        tokio::select! {
            // Read the announcement of a successor before the end of the process that sent it.
            biased;
            ready = messages.readable() => {
                ready.context("cannot listen for successors")?;
                let received = messages.try_io(Interest::READABLE, || Ok(receive(&messages, &mut message)?));
                // Every process in the network namespace can send to this socket. Only Ringway names its successor.
                if let Ok((length, sender)) = received
                    && sender.is_some() && sender == pid
                    && let Some(successor) = main_pid(&String::from_utf8_lossy(&message[..length]))
                {
                    main = Main::watched(successor);
                }
            }
            ended = child.wait(), if !has_successor => {
                return Ok(code_of(ended.context("cannot wait for the child")?));
            }
            code = main.wait(), if has_successor => return Ok(code),
            _ = terminate.recv() => pass_on(Signal::TERM),
            _ = interrupt.recv() => pass_on(Signal::INT),
            _ = hangup.recv() => pass_on(Signal::HUP),
            _ = user1.recv() => pass_on(Signal::USR1),
            _ = user2.recv() => pass_on(Signal::USR2),
            _ = children.recv() => {
                bury_orphans(&[first, pid]);
                // Reap the predecessor too, or it stays a zombie.
                let _ = child.try_wait();
            }
        }
    }
}

/// The process that the container lives as long as.
struct Main {
    pid: Option<Pid>,
    /// Completes when a successor has ended. It may not be a child of this process. `None` for the first Ringway.
    ended: Option<JoinHandle<()>>,
}

impl Main {
    fn watched(pid: Pid) -> Self {
        let ended = pidfd_open(pid, PidfdFlags::empty()).ok().map(|fd| {
            tokio::task::spawn_blocking(move || {
                // A signal interrupts the wait.
                while poll(&mut [PollFd::new(&fd, PollFlags::IN)], None) == Err(Errno::INTR) {}
            })
        });
        Self { pid: Some(pid), ended }
    }

    /// Waits until a successor ends. Returns its exit code, or 1 if the system gives it to another process.
    async fn wait(&mut self) -> i32 {
        match &mut self.ended {
            Some(ended) => drop(ended.await),
            None => std::future::pending().await,
        }
        self.pid.and_then(end_of).unwrap_or(1)
    }
}

/// A socket for `sd_notify(3)` messages, and its address for the environment.
fn message_socket() -> std::io::Result<(tokio::net::UnixDatagram, String)> {
    use std::hash::{BuildHasher as _, RandomState};

    // Containers on the host network share the abstract namespace, so the name is random.
    let name = format!("ringway-init-{:016x}", RandomState::new().hash_one(std::process::id()));
    let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name)?)?;
    socket.set_nonblocking(true)?;
    set_socket_passcred(&socket, true)?;
    Ok((tokio::net::UnixDatagram::from_std(socket)?, format!("@{name}")))
}

/// Receives a message. Returns its length and the sender's process id, from the kernel (`SCM_CREDENTIALS`, unix(7)).
fn receive(socket: impl AsFd, message: &mut [u8]) -> Result<(usize, Option<Pid>), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(socket, &mut [IoSliceMut::new(message)], &mut control, RecvFlags::DONTWAIT)?;
    let sender = control.drain().find_map(|part| match part {
        RecvAncillaryMessage::ScmCredentials(sender) => Some(sender.pid),
        _ => None,
    });
    Ok((received.bytes, sender))
}

fn main_pid(message: &str) -> Option<Pid> {
    let pid = message.lines().find_map(|line| line.strip_prefix("MAINPID="))?;
    Pid::from_raw(pid.trim().parse().ok()?)
}

/// The exit code of a child that has ended; `None` if it runs, or is not a child of this process.
fn end_of(pid: Pid) -> Option<i32> {
    let (_, status) = waitpid(Some(pid), WaitOptions::NOHANG).ok()??;
    status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal))
}

/// Reaps all children that have ended, except `others`.
fn bury_orphans(others: &[Option<Pid>]) {
    let Ok(processes) = std::fs::read_dir("/proc") else { return };
    let pids = processes.filter_map(|entry| Pid::from_raw(entry.ok()?.file_name().to_str()?.parse().ok()?));
    for pid in pids.filter(|&pid| !others.contains(&Some(pid))) {
        // Has no effect on running processes and on children of other processes.
        let _ = waitpid(Some(pid), WaitOptions::NOHANG);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notification_names_the_successor() {
        assert_eq!(main_pid("MAINPID=17\n"), Pid::from_raw(17));
        assert_eq!(main_pid("READY=1\nMAINPID=4711\nSTATUS=x"), Pid::from_raw(4711));
        for other in ["READY=1", "MAINPID=", "MAINPID=x", "XMAINPID=3", ""] {
            assert_eq!(main_pid(other), None, "{other}");
        }
    }

    #[test]
    fn a_message_comes_with_the_process_id_of_its_sender() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _entered = runtime.enter();
        let (socket, address) = message_socket().unwrap();
        let name = address.strip_prefix('@').unwrap();
        let sender = UnixDatagram::unbound().unwrap();
        sender.send_to_addr(b"MAINPID=17", &SocketAddr::from_abstract_name(name).unwrap()).unwrap();
        let mut message = [0; 64];
        let own = Pid::from_raw(i32::try_from(std::process::id()).unwrap());
        assert_eq!(receive(&socket, &mut message), Ok((10, own)));
    }
}
