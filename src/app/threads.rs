//! Threads of the control plane. Health checks and the side port have a thread each, so that neither waits for the other
//! or for the thread that supervises.

use std::io;

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::{CancellationToken, DropGuard};

/// A thread with a runtime. Dropping it ends the thread and its tasks.
#[derive(Debug)]
pub(super) struct Thread {
    runtime: Handle,
    _end: DropGuard,
}

impl Thread {
    /// Starts a thread.
    ///
    /// # Errors
    /// When the system refuses the thread or the descriptors of its runtime.
    pub(super) fn start(name: &str) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().thread_name(name).build()?;
        let (handle, end) = (runtime.handle().clone(), CancellationToken::new());
        let guard = end.clone().drop_guard();
        std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            runtime.block_on(end.cancelled());
            // Without waiting for blocking work.
            runtime.shutdown_background();
        })?;
        Ok(Self { runtime: handle, _end: guard })
    }

    /// The runtime, to spawn tasks on.
    pub(super) fn runtime(&self) -> &Handle {
        &self.runtime
    }
}
