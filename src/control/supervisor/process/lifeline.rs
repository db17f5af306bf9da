//! Ringway's end of a replica's lifeline, over which it talks to the [shim].

use std::io::{self, PipeReader};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::Handed;
use crate::backend::Exit;
use crate::control::supervisor::output::{Tail, log_lines};
use crate::control::supervisor::shim;
use crate::table::TableCell;

/// How long Ringway waits for the remaining output of a replica that has ended.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// How long a shim may take to report the end of a killed replica.
const KILLED: Duration = Duration::from_secs(5);

/// Ringway's end of a replica's lifeline, and the replica's output.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) lifeline: UnixStream,
    pub(super) output: PipeReader,
}

impl Held {
    /// Duplicates both handles.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { lifeline: self.lifeline.try_clone()?, output: self.output.try_clone()? })
    }
}

/// How long Ringway waits for a shim's first line.
const FIRST_WORD: Duration = Duration::from_secs(10);

/// Reads a shim's first line, which holds the replica's process id.
pub(super) async fn first_word(lifeline: &UnixStream) -> io::Result<u32> {
    let mut lines = lines_of(lifeline.try_clone()?)?;
    let line = tokio::time::timeout(FIRST_WORD, lines.read_byte_line()).await;
    let line = line.map_err(|_elapsed| io::Error::from(io::ErrorKind::TimedOut))??;
    let pid = line.as_deref().and_then(|line| line.strip_prefix("pid ")?.parse().ok());
    pid.ok_or_else(|| io::Error::other("the replica ended at once"))
}

/// Reads a lifeline byte by byte: it must not consume any of the next line, which another process may have to read.
struct Lines(tokio::net::UnixStream);

fn lines_of(lifeline: UnixStream) -> io::Result<Lines> {
    lifeline.set_nonblocking(true)?;
    Ok(Lines(tokio::net::UnixStream::from_std(lifeline)?))
}

impl Lines {
    /// The next line; `None` at the end of the stream.
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

/// Waits until the replica has ended, by itself or because of `stop`. The shim kills the processes it leaves behind.
pub(super) async fn wait_for_exit(
    pid: u32,
    name: Arc<str>,
    held: Held,
    table: TableCell,
    stop: CancellationToken,
    grace: Duration,
) -> (u32, Exit) {
    let tail = Tail::default();
    let output = log_output(&name, &tail, held.output, table);
    let (reason, code) = match lines_of(held.lifeline) {
        Ok(lifeline) => tend(lifeline, &stop, grace).await,
        Err(error) => (error.to_string(), None),
    };
    // The pipe stays open until the last process that holds it has ended.
    if let Ok(mut output) = output {
        let _ = tokio::time::timeout(LAST_WORDS, &mut output).await;
    }
    (pid, Exit { reason, code, output: tail.lines(), at: Instant::now() })
}

/// Sends SIGTERM, and SIGKILL after `grace`. Returns the shim's answer.
async fn end(lifeline: &mut Lines, grace: Duration) -> io::Result<Option<String>> {
    // If the shim is gone, so is the replica.
    let _ = lifeline.0.write_all(&[shim::TERM]).await;
    if let Ok(line) = tokio::time::timeout(grace, lifeline.read_byte_line()).await {
        return line;
    }
    let _ = lifeline.0.write_all(&[shim::KILL]).await;
    let line = tokio::time::timeout(KILLED, lifeline.read_byte_line()).await;
    line.unwrap_or_else(|_elapsed| Err(io::Error::other("the shim did not report how the replica ended")))
}

/// Waits for the replica's end. Returns the system's description of it and the exit code.
async fn tend(mut lifeline: Lines, stop: &CancellationToken, grace: Duration) -> (String, Option<i64>) {
    let by_itself = tokio::select! {
        line = lifeline.read_byte_line() => Some(line),
        () = stop.cancelled() => None,
    };
    let line = if let Some(line) = by_itself { line } else { end(&mut lifeline, grace).await };
    let Ok(Some(line)) = line else { return ("the shim is gone".to_owned(), None) };
    let (code, status) = line.strip_prefix("exit ").and_then(|rest| rest.split_once(' ')).unwrap_or(("", &line));
    (status.to_owned(), code.parse().ok())
}

/// Ends a replica that was taken over but is not needed, once the older Ringway has no connections to it any more.
pub async fn let_go(handed: Handed, mut settled: watch::Receiver<bool>, grace: Duration) {
    // If the sender is gone, Ringway is shutting down.
    let _ = settled.wait_for(|&settled| settled).await;
    tracing::info!(pool = handed.pool, slot = %handed.slot, pid = handed.pid,
        "stopping a surplus replica that was taken over");
    let Ok(lifeline) = lines_of(handed.lifeline) else { return };
    let stop = CancellationToken::new();
    stop.cancel();
    tend(lifeline, &stop, grace).await;
}

/// Logs the replica's output, and counts the lines that are not logged for its backend.
/// Dropping the handle ends it: after a handover, only the successor reads.
fn log_output(slot: &Arc<str>, tail: &Tail, output: PipeReader, table: TableCell) -> io::Result<AbortOnDropHandle<()>> {
    let output = tokio::net::unix::pipe::Receiver::from_owned_fd(output.into())?;
    let count = move |slot: &str, lines| {
        let table = table.load();
        if let Some(backend) = table.backends().find(slot) {
            backend.live.counters.output_lost.fetch_add(lines, Ordering::Relaxed);
        }
    };
    Ok(AbortOnDropHandle::new(tokio::spawn(log_lines(Arc::clone(slot), tail.clone(), output, count))))
}
