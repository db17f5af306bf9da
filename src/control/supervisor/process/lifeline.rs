//! Ringway's end of a replica's lifeline: what its [shim](crate::control::supervisor::shim) says, and is told.

use std::io::{self, PipeReader};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::Handed;
use crate::backend::Exit;
use crate::control::supervisor::output::{Tail, log_lines};
use crate::control::supervisor::shim;

/// How long the output of a replica that has ended may still come in.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// How long a shim may take to end a replica that was killed.
const KILLED: Duration = Duration::from_secs(5);

/// The other end of a replica's lifeline, and what it writes.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) lifeline: UnixStream,
    pub(super) output: PipeReader,
}

impl Held {
    /// Another one of the same.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { lifeline: self.lifeline.try_clone()?, output: self.output.try_clone()? })
    }
}

/// How a shim's first word is waited for: it says which process the replica is.
const FIRST_WORD: Duration = Duration::from_secs(10);

pub(super) async fn first_word(lifeline: &UnixStream) -> io::Result<u32> {
    let mut lines = lines_of(lifeline.try_clone()?)?;
    let line = tokio::time::timeout(FIRST_WORD, lines.read_byte_line()).await;
    let line = line.map_err(|_elapsed| io::Error::from(io::ErrorKind::TimedOut))??;
    let pid = line.as_deref().and_then(|line| line.strip_prefix("pid ")?.parse().ok());
    pid.ok_or_else(|| io::Error::other("it ended at once"))
}

/// Reads a lifeline byte by byte: nothing of the next line may be taken, it may be another process's to read.
struct Lines(tokio::net::UnixStream);

fn lines_of(lifeline: UnixStream) -> io::Result<Lines> {
    lifeline.set_nonblocking(true)?;
    Ok(Lines(tokio::net::UnixStream::from_std(lifeline)?))
}

impl Lines {
    /// The next line; `None` at the end.
    async fn read_byte_line(&mut self) -> io::Result<Option<String>> {
        let mut line = Vec::new();
        loop {
            match self.0.read_u8().await {
                Ok(b'\n') => return Ok(Some(String::from_utf8_lossy(&line).into_owned())),
                Ok(byte) => line.push(byte),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }
}

/// Waits until the replica has ended, by itself or because it was told to. Its shim ends what it leaves behind.
pub(super) async fn wait(
    slot: usize,
    name: Arc<str>,
    held: Held,
    stop: CancellationToken,
    grace: Duration,
) -> (usize, Exit) {
    let tail = Tail::default();
    let output = log_output(&name, &tail, held.output);
    let (reason, code) = match lines_of(held.lifeline) {
        Ok(lifeline) => tend(lifeline, &stop, grace).await,
        Err(error) => (error.to_string(), None),
    };
    // The pipe ends with the last process that has it.
    if let Ok(mut output) = output {
        let _ = tokio::time::timeout(LAST_WORDS, &mut output).await;
        output.abort();
    }
    (slot, Exit { reason, code, output: tail.lines(), at: Instant::now() })
}

/// SIGTERM, and after the grace SIGKILL. What the shim then says.
async fn end(lifeline: &mut Lines, grace: Duration) -> io::Result<Option<String>> {
    // Where the shim has gone, so has the replica.
    let _ = lifeline.0.write_all(&[shim::TERM]).await;
    if let Ok(line) = tokio::time::timeout(grace, lifeline.read_byte_line()).await {
        return line;
    }
    let _ = lifeline.0.write_all(&[shim::KILL]).await;
    let line = tokio::time::timeout(KILLED, lifeline.read_byte_line()).await;
    line.unwrap_or_else(|_elapsed| Err(io::Error::other("its shim does not say how it ended")))
}

/// How the replica ended, in the system's words, and its exit code.
async fn tend(mut lifeline: Lines, stop: &CancellationToken, grace: Duration) -> (String, Option<i64>) {
    let by_itself = tokio::select! {
        line = lifeline.read_byte_line() => Some(line),
        () = stop.cancelled() => None,
    };
    let line = if let Some(line) = by_itself { line } else { end(&mut lifeline, grace).await };
    let Ok(Some(line)) = line else { return ("its shim is gone".to_owned(), None) };
    let (code, status) = line.strip_prefix("exit ").and_then(|rest| rest.split_once(' ')).unwrap_or(("", &line));
    (status.to_owned(), code.parse().ok())
}

/// Ends a replica that nobody wants, once the older Ringway has gone, which may have connections to it.
pub async fn let_go(handed: Handed, mut settled: watch::Receiver<bool>, grace: Duration) {
    // Nobody tells any more: the app is going down.
    let _ = settled.wait_for(|&settled| settled).await;
    tracing::info!(pool = handed.pool, slot = %handed.slot, pid = handed.pid, "a replica that was taken over is not wanted");
    let Ok(lifeline) = lines_of(handed.lifeline) else { return };
    let stop = CancellationToken::new();
    stop.cancel();
    tend(lifeline, &stop, grace).await;
}

/// What the replica writes, into the log.
fn log_output(slot: &Arc<str>, tail: &Tail, output: PipeReader) -> io::Result<JoinHandle<()>> {
    let output = tokio::net::unix::pipe::Receiver::from_owned_fd(output.into())?;
    Ok(tokio::spawn(log_lines(Arc::clone(slot), tail.clone(), output)))
}
