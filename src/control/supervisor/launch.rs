//! The step in a child before it becomes the replica: ties its life to that of its [shim](super::shim).
//!
//! A parent-death signal must be set in the child and survives `exec`. Between fork and exec that would take
//! unsafe code, so the child is first this binary (`ringway launch`), which sets it and then becomes the
//! replica's program.

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

/// Becomes the program. Returns only when that fails.
#[must_use]
pub fn launch(launch: &Launch) -> io::Error {
    if let Err(error) = set_parent_process_death_signal(Some(Signal::KILL)) {
        return error.into();
    }
    // The parent may have died before the signal was set; then nobody will ever send it.
    if getppid() != Pid::from_raw(launch.parent) {
        return io::Error::other("its shim is gone");
    }
    if let Some(open_files) = launch.open_files {
        let maximum = getrlimit(Resource::Nofile).maximum;
        // A program with a higher limit than it had asked for works too.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(open_files), maximum });
    }
    let Some((program, arguments)) = launch.command.split_first() else {
        return io::ErrorKind::InvalidInput.into();
    };
    Command::new(program).args(arguments).exec()
}
