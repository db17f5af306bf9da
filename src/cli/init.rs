//! As process 1 of a container: runs Ringway as a child, passes signals on to it, and takes care of orphans.
//!
//! The kernel gives process 1 no default actions for signals and every orphan of its container. Waiting for just
//! any child would take those away from whom they belong to, so Ringway itself does not do both.

use std::process::{ExitCode, ExitStatus};

use anyhow::Context as _;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};

use super::{Failure, runtime};

/// Whether this process is to take care of the others.
pub(crate) fn is_needed() -> bool {
    std::process::id() == 1
}

/// Runs the same command line as a child; its exit code.
pub(crate) fn run() -> Result<ExitCode, Failure> {
    let status = runtime()?.block_on(supervise())?;
    // As a shell tells of it.
    let code = status.code().or_else(|| {
        use std::os::unix::process::ExitStatusExt as _;
        status.signal().map(|signal| 128 + signal)
    });
    Ok(ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)))
}

async fn supervise() -> anyhow::Result<ExitStatus> {
    let listen = |kind| signal(kind).context("cannot listen for signals");
    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut hangup = listen(SignalKind::hangup())?;
    let mut children = listen(SignalKind::child())?;
    let own_name = std::env::args_os().next().unwrap_or_default();
    let program = std::env::current_exe().unwrap_or_else(|_| "/proc/self/exe".into());
    let child = Command::new(&program).arg0(own_name).args(std::env::args_os().skip(1)).spawn();
    let mut child = child.with_context(|| format!("cannot run {}", program.display()))?;
    let pid = child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
    let pass_on = |signal| {
        if let Some(pid) = pid {
            // Fails only where it has just ended.
            let _ = kill_process(pid, signal);
        }
    };
    loop {
        tokio::select! {
            ended = child.wait() => return ended.context("cannot wait for the child"),
            _ = terminate.recv() => pass_on(Signal::TERM),
            _ = interrupt.recv() => pass_on(Signal::INT),
            _ = hangup.recv() => pass_on(Signal::HUP),
            _ = children.recv() => bury_orphans(pid),
        }
    }
}

/// Waits for all that have ended but `child`.
fn bury_orphans(child: Option<Pid>) {
    let Ok(processes) = std::fs::read_dir("/proc") else { return };
    let pids = processes.filter_map(|entry| Pid::from_raw(entry.ok()?.file_name().to_str()?.parse().ok()?));
    for pid in pids.filter(|&pid| Some(pid) != child) {
        // Nothing happens to those that live, and to those of others.
        let _ = waitpid(Some(pid), WaitOptions::NOHANG);
    }
}
