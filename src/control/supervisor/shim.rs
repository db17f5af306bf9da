//! The process between Ringway and a replica. A replica must keep running while one Ringway takes over from another,
//! and must not outlive the last of them.
//!
//! A shim starts the replica and holds one end of a socket, the lifeline. Ringway holds the other end and hands it over
//! in an upgrade. Over the lifeline the shim reports the replica's process id and how the replica ended, and Ringway
//! tells the shim to stop it. When no process holds Ringway's end any more, for example because Ringway was killed, the
//! shim kills the replica and everything that the replica has started. (containerd has a shim for each container for
//! the same reason.) If the shim itself is killed, the kernel kills the replica: see [`launch`](super::launch).

use std::ffi::OsString;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, kill_process, kill_process_group, pidfd_open, set_child_subreaper,
    wait as wait_for_child, waitpid,
};

/// Arguments of `ringway shim`.
#[derive(Debug, Clone, clap::Args)]
pub struct Shim {
    /// Soft limit on open files to give the program: Ringway has raised its own
    #[arg(long)]
    pub open_files: Option<u64>,
    /// Directory of the program's socket. The shim removes it after the program has ended
    #[arg(long)]
    pub remove: Option<PathBuf>,
    /// The program and its arguments
    #[arg(trailing_var_arg = true, required = true)]
    pub command: Vec<OsString>,
}

/// Ringway sends this byte over the lifeline to stop the replica with SIGTERM.
pub(super) const TERM: u8 = b'T';
/// Ringway sends this byte over the lifeline to kill the replica with SIGKILL.
pub(super) const KILL: u8 = b'K';

/// Time between two looks for orphans that have ended.
const REAP: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// How long the shim waits for the orphans that it has killed. It cannot kill those of another user.
const KILLED: Duration = Duration::from_secs(2);

/// Runs a replica as its shim until the replica has ended. Standard input is the lifeline.
///
/// # Errors
/// When the replica cannot be started, or the system cannot wait for its end.
pub fn run(shim: &Shim) -> io::Result<()> {
    let mut lifeline = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    // Orphans of the replica become children of this process, even if they have left its group and its session
    // (prctl(2), PR_SET_CHILD_SUBREAPER).
    set_child_subreaper(Pid::from_raw(1))?;
    let launcher = std::env::current_exe().ok().filter(|path| path.exists());
    let launcher = launcher.as_deref().unwrap_or(Path::new("/proc/self/exe"));
    let mut command = Command::new(launcher);
    command.args(["launch", "--parent", &std::process::id().to_string()]);
    if let Some(open_files) = shim.open_files {
        command.args(["--open-files", &open_files.to_string()]);
    }
    // A process group of its own: a signal reaches the replica and its children, but not the shim.
    command.arg("--").args(&shim.command).stdin(Stdio::null()).process_group(0);
    let removing = Removing(shim.remove.as_deref());
    let mut child = command.spawn()?;
    let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    // If the other end is closed, the wait below notices.
    let _ = writeln!(lifeline, "pid {}", child.id());
    let ended = wait(&mut child, pid, &mut lifeline);
    // Needed even if the replica has ended: processes it leaves behind would keep its port and answer for its
    // successor.
    signal(pid, Signal::KILL);
    let status = child.wait()?;
    kill_orphans();
    // Before the shim reports the end to Ringway.
    drop(removing);
    let code = status.code().map_or_else(String::new, |code| code.to_string());
    let _ = writeln!(lifeline, "exit {code} {status}");
    ended
}

/// Removes a directory when it is dropped.
struct Removing<'a>(Option<&'a Path>);

impl Drop for Removing<'_> {
    fn drop(&mut self) {
        if let Some(folder) = self.0 {
            // Fails if something else has removed it.
            let _ = std::fs::remove_dir_all(folder);
        }
    }
}

/// Waits until the replica ends or must be killed. Passes on SIGTERM meanwhile.
fn wait(child: &mut Child, pid: Pid, lifeline: &mut UnixStream) -> io::Result<()> {
    let ended: OwnedFd = pidfd_open(pid, PidfdFlags::empty())?;
    loop {
        let ready = {
            let mut fds = [PollFd::new(&ended, PollFlags::IN), PollFd::new(&*lifeline, PollFlags::IN)];
            match poll(&mut fds, Some(&REAP)) {
                Err(Errno::INTR) => continue,
                other => other?,
            };
            fds.map(|fd| !fd.revents().is_empty())
        };
        if ready[0] || child.try_wait()?.is_some() {
            return Ok(());
        }
        reap_orphans(pid);
        if !ready[1] {
            continue;
        }
        let mut word = [0; 1];
        match lifeline.read(&mut word) {
            Ok(1) if word[0] == TERM => signal(pid, Signal::TERM),
            // Ringway sent KILL, or no process holds the other end.
            _ => return Ok(()),
        }
    }
}

/// Reaps the orphans that have ended while the replica runs. The replica itself is left to its waiter.
fn reap_orphans(replica: Pid) {
    for child in children_of(&std::process::id().to_string()).into_iter().filter(|&child| child != replica) {
        // Has no effect on a running process.
        let _ = waitpid(Some(child), WaitOptions::NOHANG);
    }
}

/// Kills the processes that the replica has left behind. Those of a killed process become children of this one in turn.
fn kill_orphans() {
    let own = std::process::id().to_string();
    let deadline = Instant::now() + KILLED;
    while Instant::now() < deadline {
        for child in children_of(&own) {
            // Fails only if it has just ended by itself, or is another user's.
            let _ = kill_process(child, Signal::KILL);
        }
        match wait_for_child(WaitOptions::NOHANG) {
            Ok(Some(_)) | Err(Errno::INTR) => {}
            Ok(None) => std::thread::sleep(Duration::from_millis(5)),
            // No child is left.
            Err(_) => return,
        }
    }
}

/// The processes with this parent.
fn children_of(parent: &str) -> Vec<Pid> {
    // The kernel keeps this list if it was built so (CONFIG_PROC_CHILDREN). This process has one thread.
    if let Ok(list) = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")) {
        return list.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect();
    }
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = processes.filter_map(|entry| Pid::from_raw(entry.ok()?.file_name().to_str()?.parse().ok()?));
    let is_child = |pid: &Pid| {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
        // The name, in parentheses, can contain anything. The state and the parent follow it (proc_pid_stat(5)).
        stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)) == Some(parent)
    };
    pids.filter(is_child).collect()
}

/// Signals the replica's whole process group, which includes the children of a shell.
fn signal(group: Pid, signal: Signal) {
    // Fails only if the group has just ended by itself.
    let _ = kill_process_group(group, signal);
}
