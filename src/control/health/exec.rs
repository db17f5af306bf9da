//! The check `exec`: runs a program. No shell reads the command.

use std::io;
use std::os::fd::OwnedFd;
use std::process::{ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::check::{Exec, Outcome, Reason};
use crate::address::Address;
use crate::backend::ConnectFailure;
use crate::control::PRIVATE_VARIABLES;
use crate::text::printable;

/// Programs that run at the same time, for all pools together. Others wait for their turn, which does not count as their time.
const MOST: usize = 32;
static TURNS: Semaphore = Semaphore::const_new(MOST);

/// Longest text of a program that the status shows, in bytes.
const LONGEST_TEXT: usize = 200;

/// How often Ringway reads what a program has left in the pipe. A process that stays behind may write on without end.
const MOST_READS: usize = 64;

/// The exit code with which a program says that the backend works, but must not get connections.
const NO: i32 = 1;

/// Waits until one more program may run.
pub(super) async fn turn() -> Option<SemaphorePermit<'static>> {
    // Nobody closes the semaphore.
    TURNS.acquire().await.ok()
}

/// Runs the program. If the future is dropped, the program and everything in its process group are killed.
pub(super) async fn run(exec: &Exec, backend: &str, address: &Address) -> Outcome {
    let mut running = match Running::start(exec, backend, address) {
        Ok(running) => running,
        Err(error) => {
            let failure = ConnectFailure::of(&error);
            return if failure.is_ours() {
                Outcome::NotDone(failure)
            } else {
                Outcome::Failed(format!("cannot run {}: {error}", exec.command[0]).into())
            };
        }
    };
    match running.finish().await {
        Ok((status, _)) if status.success() => Outcome::Passed,
        Ok((status, text)) => {
            let text = if text.is_empty() { status.to_string() } else { format!("{status}: {text}") };
            Outcome::Failed(if status.code() == Some(NO) { Reason::answer(text) } else { text.into() })
        }
        Err(error) => Outcome::Failed(error.to_string().into()),
    }
}

/// A program that runs.
struct Running {
    child: Child,
    output: pipe::Receiver,
    /// The process group, until the program has ended.
    group: Option<Pid>,
}

impl Running {
    fn start(exec: &Exec, backend: &str, address: &Address) -> io::Result<Self> {
        let (output, writer) = io::pipe()?;
        let ip = address.ip();
        let (host, port) = (ip.map(|ip| ip.ip().to_string()), ip.map(|ip| ip.port().to_string()));
        let values = [
            ("address", address.to_string()),
            ("host", host.unwrap_or_default()),
            ("port", port.unwrap_or_default()),
            ("backend", backend.to_owned()),
        ];
        let fill = |word: &String| {
            values.iter().fold(word.clone(), |word, (name, value)| word.replace(&format!("{{{name}}}"), value))
        };
        let words: Vec<_> = exec.command.iter().map(fill).collect();
        let mut command = Command::new(&words[0]);
        for name in PRIVATE_VARIABLES {
            command.env_remove(name);
        }
        let child = command
            .args(&words[1..])
            .envs(values.iter().map(|(name, value)| (format!("RINGWAY_{}", name.to_uppercase()), value)))
            .stdin(Stdio::null())
            .stdout(Stdio::from(writer.try_clone()?))
            .stderr(Stdio::from(writer))
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let group = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        Ok(Self { child, output: pipe::Receiver::from_owned_fd(OwnedFd::from(output))?, group })
    }

    /// Waits for the end of the program. Returns its status and the first line of its output.
    async fn finish(&mut self) -> io::Result<(ExitStatus, String)> {
        let (mut text, mut buffer) = (Vec::new(), [0; 1024]);
        let mut keep = |bytes: &[u8]| text.extend(&bytes[..bytes.len().min(LONGEST_TEXT - text.len())]);
        let mut is_open = true;
        let status = loop {
            tokio::select! {
                status = self.child.wait() => break status?,
                readable = self.output.readable(), if is_open => {
                    readable?;
                    match self.output.try_read(&mut buffer) {
                        Ok(0) => is_open = false,
                        Ok(read) => keep(&buffer[..read]),
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        Err(error) => return Err(error),
                    }
                }
            }
        };
        self.group = None;
        // A process that the program has left behind may hold the pipe open.
        for _ in 0..MOST_READS {
            let Ok(read @ 1..) = self.output.try_read(&mut buffer) else { break };
            keep(&buffer[..read]);
        }
        let text = printable(String::from_utf8_lossy(&text).lines().next().unwrap_or_default());
        Ok((status, text.trim().to_owned()))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(group) = self.group {
            // It may have ended just now.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}
