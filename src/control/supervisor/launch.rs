//! The step in a child process before it becomes the replica: ties its life to that of its [shim](super::shim).
//!
//! A parent-death signal must be set in the child and survives `exec`. Setting it between fork and exec would take
//! unsafe code. The child therefore runs this binary first (`ringway launch`), which sets the signal and then executes
//! the replica's program.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use rustix::process::{Pid, Resource, Rlimit, Signal, getppid, getrlimit, set_parent_process_death_signal, setrlimit};

/// Arguments of `ringway launch`.
#[derive(Debug, Clone, clap::Args)]
pub struct Launch {
    /// Process id of the shim that started this
    #[arg(long)]
    pub parent: i32,
    /// Soft limit on open files to give the program: Ringway has raised its own
    #[arg(long)]
    pub open_files: Option<u64>,
    /// The program and its arguments
    #[arg(trailing_var_arg = true, required = true)]
    pub command: Vec<OsString>,
}

/// Replaces this process with the program. Returns only on failure.
#[must_use]
pub fn launch(launch: &Launch) -> io::Error {
    if let Err(error) = set_parent_process_death_signal(Some(Signal::KILL)) {
        return error.into();
    }
    // If the parent died before the signal was set, the kernel never sends it.
    if getppid() != Pid::from_raw(launch.parent) {
        return io::Error::other("the shim is gone");
    }
    if let Some(open_files) = launch.open_files {
        let maximum = getrlimit(Resource::Nofile).maximum;
        // Ignore a failure: the program also works with a higher limit.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(open_files), maximum });
    }
    let Some((program, arguments)) = launch.command.split_first() else {
        return io::ErrorKind::InvalidInput.into();
    };
    Command::new(program).args(arguments).exec()
}
