//! The duties of process 1 in a container: runs Ringway as a child, passes signals on to it, and takes care of orphans.
//!
//! The kernel gives process 1 no default actions for signals and every orphan of its container. Waiting for just
//! any child would take those away from whom they belong to, so Ringway itself does not do both.
//!
//! A Ringway that is upgraded leaves a successor, and says so as it would to systemd (`MAINPID=`): then that one is the
//! process whose end is the container's.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::process::{ExitCode, ExitStatus};

use anyhow::Context as _;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, waitpid};
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;

use super::{Failure, runtime};

/// Longest message from a Ringway.
const LONGEST: usize = 4096;

/// Whether this process is to take care of the others.
pub(crate) fn is_needed() -> bool {
    std::process::id() == 1
}

/// Runs the same command line as a child; its exit code, or that of the last of its successors.
pub(crate) fn run() -> Result<ExitCode, Failure> {
    let code = runtime()?.block_on(supervise())?;
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

/// As a shell tells of it.
fn code_of(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt as _;
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1)
}

async fn supervise() -> anyhow::Result<i32> {
    let listen = |kind| signal(kind).context("cannot listen for signals");
    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut hangup = listen(SignalKind::hangup())?;
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
                // Fails only where it has just ended.
                let _ = kill_process(pid, signal);
            }
        };
        tokio::select! {
            // The word of a successor comes before the end of who has said it.
            biased;
            received = messages.recv(&mut message) => {
                let text = String::from_utf8_lossy(&message[..received.unwrap_or_default()]).into_owned();
                if let Some(pid) = main_pid(&text) {
                    main = Main::watched(pid);
                }
            }
            ended = child.wait(), if !has_successor => {
                return Ok(code_of(ended.context("cannot wait for the child")?));
            }
            code = main.wait(), if has_successor => return Ok(code),
            _ = terminate.recv() => pass_on(Signal::TERM),
            _ = interrupt.recv() => pass_on(Signal::INT),
            _ = hangup.recv() => pass_on(Signal::HUP),
            _ = user2.recv() => pass_on(Signal::USR2),
            _ = children.recv() => {
                bury_orphans(&[first, pid]);
                // A predecessor is waited for too, or it would stay a zombie.
                let _ = child.try_wait();
            }
        }
    }
}

/// The process whose end is the container's.
struct Main {
    pid: Option<Pid>,
    /// Of a successor, which may be nobody's child or somebody else's: done once it has ended.
    ended: Option<JoinHandle<()>>,
}

impl Main {
    fn watched(pid: Pid) -> Self {
        let ended = pidfd_open(pid, PidfdFlags::empty()).ok().map(|fd| {
            tokio::task::spawn_blocking(move || {
                // Interrupted by a signal it looks again.
                while poll(&mut [PollFd::new(&fd, PollFlags::IN)], None) == Err(Errno::INTR) {}
            })
        });
        Self { pid: Some(pid), ended }
    }

    /// Waits for its end. Its exit code, where the system tells this process of it, or else 1.
    async fn wait(&mut self) -> i32 {
        match &mut self.ended {
            Some(ended) => drop(ended.await),
            None => std::future::pending().await,
        }
        self.pid.and_then(end_of).unwrap_or(1)
    }
}

/// A socket for messages in the manner of `sd_notify(3)`, and its address for the environment.
fn message_socket() -> std::io::Result<(tokio::net::UnixDatagram, String)> {
    use std::hash::{BuildHasher as _, RandomState};

    // Containers on the host's network share these names.
    let name = format!("ringway-init-{:016x}", RandomState::new().hash_one(std::process::id()));
    let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name)?)?;
    socket.set_nonblocking(true)?;
    Ok((tokio::net::UnixDatagram::from_std(socket)?, format!("@{name}")))
}

fn main_pid(message: &str) -> Option<Pid> {
    let pid = message.lines().find_map(|line| line.strip_prefix("MAINPID="))?;
    Pid::from_raw(pid.trim().parse().ok()?)
}

/// The exit code of a process that has ended. One that is not a child of this process yet has not.
fn end_of(pid: Pid) -> Option<i32> {
    let (_, status) = waitpid(Some(pid), WaitOptions::NOHANG).ok()??;
    status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal))
}

/// Waits for all that have ended but these.
fn bury_orphans(others: &[Option<Pid>]) {
    let Ok(processes) = std::fs::read_dir("/proc") else { return };
    let pids = processes.filter_map(|entry| Pid::from_raw(entry.ok()?.file_name().to_str()?.parse().ok()?));
    for pid in pids.filter(|&pid| !others.contains(&Some(pid))) {
        // Nothing happens to those that live, and to those of others.
        let _ = waitpid(Some(pid), WaitOptions::NOHANG);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_successor_is_told_by_its_process_id() {
        assert_eq!(main_pid("MAINPID=17\n"), Pid::from_raw(17));
        assert_eq!(main_pid("READY=1\nMAINPID=4711\nSTATUS=x"), Pid::from_raw(4711));
        for other in ["READY=1", "MAINPID=", "MAINPID=x", "XMAINPID=3", ""] {
            assert_eq!(main_pid(other), None, "{other}");
        }
    }
}
