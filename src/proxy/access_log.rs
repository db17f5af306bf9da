//! The access log: one line per connection. Writing a line never blocks a worker.

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use serde::Serialize;
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};

use crate::label_enum;

label_enum! {
    /// The format of a log line.
    pub enum Format {
        /// `key=value` pairs.
        Text => "text",
        /// One JSON object per line.
        Json => "json",
    }
}

/// Maximum lines in the writer's queue; further lines are dropped and counted.
const QUEUED_LINES: usize = 16_384;

/// The access log. Clones share one writer.
#[derive(Clone)]
pub struct AccessLog {
    is_json: Arc<AtomicBool>,
    file: Arc<Mutex<File>>,
    writer: NonBlocking,
    lost: LostLines,
}

type File = Box<dyn io::Write + Send>;

/// Counts lines that did not reach the log.
#[derive(Debug, Clone)]
pub struct LostLines {
    queue_full: ErrorCounter,
    not_written: Arc<AtomicU64>,
}

impl LostLines {
    /// Lines lost because the writer's queue was full or a write to the file failed.
    pub fn count(&self) -> u64 {
        self.queue_full.dropped_lines() as u64 + self.not_written.load(Ordering::Relaxed)
    }
}

/// Writes to the file on the writer's own thread. Every failed line is counted; only the first is logged.
struct Sink {
    file: Arc<Mutex<File>>,
    not_written: Arc<AtomicU64>,
}

impl io::Write for Sink {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Err(error) = lock(&self.file).write_all(line) {
            let before = self.not_written.fetch_add(1, Ordering::Relaxed);
            if before == 0 {
                tracing::error!(%error, "cannot write to the access log; lost lines are counted");
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        // A failed write has already been counted. Lines lost by a flush cannot be counted.
        let _ = lock(&self.file).flush();
        Ok(())
    }
}

impl std::fmt::Debug for AccessLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AccessLog")
    }
}

impl AccessLog {
    /// Opens the log at `path`: `stdout`, `stderr`, or a file, to which lines are appended. Dropping the guard writes
    /// the queued lines.
    ///
    /// # Errors
    /// When the file cannot be opened for appending.
    pub fn open(path: &Path, format: Format) -> io::Result<(Self, WorkerGuard)> {
        let file = Arc::new(Mutex::new(open(path)?));
        let not_written = Arc::new(AtomicU64::new(0));
        let sink = Sink { file: Arc::clone(&file), not_written: Arc::clone(&not_written) };
        let (writer, guard) =
            NonBlockingBuilder::default().buffered_lines_limit(QUEUED_LINES).thread_name("access-log").finish(sink);
        let lost = LostLines { queue_full: writer.error_counter(), not_written };
        let is_json = Arc::new(AtomicBool::new(format == Format::Json));
        Ok((Self { is_json, file, writer, lost }, guard))
    }

    /// Reopens the log after a rotation or a change of its path or format. No line is lost.
    ///
    /// # Errors
    /// When the file cannot be opened for appending. The log then continues in the old file.
    pub fn reopen(&self, path: &Path, format: Format) -> io::Result<()> {
        let file = open(path)?;
        *lock(&self.file) = file;
        self.is_json.store(format == Format::Json, Ordering::Relaxed);
        Ok(())
    }

    /// The counter of lines that did not reach the log.
    pub fn lost(&self) -> LostLines {
        self.lost.clone()
    }

    pub(super) fn write(&self, line: &Line<'_>) {
        let text = if self.is_json.load(Ordering::Relaxed) { line.json() } else { line.text() };
        // Never fails: a line that does not fit into the queue is dropped and counted.
        let _ = self.writer.clone().write_all(text.as_bytes());
    }
}

fn open(path: &Path) -> io::Result<File> {
    Ok(match path.to_str() {
        Some("stdout") => Box::new(io::stdout()),
        Some("stderr") => Box::new(io::stderr()),
        _ => Box::new(std::fs::OpenOptions::new().create(true).append(true).open(path)?),
    })
}

fn lock(file: &Mutex<File>) -> MutexGuard<'_, File> {
    file.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The details of an ended connection.
#[derive(Debug)]
pub(super) struct Line<'a> {
    pub(super) listener: &'a str,
    pub(super) pool: &'a str,
    pub(super) client: SocketAddr,
    pub(super) backend: Option<(&'a str, SocketAddr)>,
    pub(super) outcome: &'static str,
    pub(super) from_client: u64,
    pub(super) to_client: u64,
    /// Time from accept until the connection to the backend was established.
    pub(super) connect: Option<Duration>,
    pub(super) duration: Duration,
}

impl Line<'_> {
    fn text(&self) -> String {
        let (id, address) = self.backend.map_or(("-", "-".to_owned()), |(id, address)| (id, address.to_string()));
        let connect = self.connect.map_or("-".to_owned(), |time| format!("{:.6}", time.as_secs_f64()));
        format!(
            "{} listener={} pool={} client={} backend={id} address={address} end={} from_client={} to_client={} \
             connect={connect} duration={:.6}\n",
            now(),
            self.listener,
            self.pool,
            self.client,
            self.outcome,
            self.from_client,
            self.to_client,
            self.duration.as_secs_f64(),
        )
    }

    fn json(&self) -> String {
        #[derive(Serialize)]
        struct Json<'a> {
            time: String,
            listener: &'a str,
            pool: &'a str,
            client: SocketAddr,
            backend: Option<&'a str>,
            address: Option<SocketAddr>,
            end: &'static str,
            from_client: u64,
            to_client: u64,
            connect_seconds: Option<f64>,
            duration_seconds: f64,
        }
        let json = serde_json::to_string(&Json {
            time: now(),
            listener: self.listener,
            pool: self.pool,
            client: self.client,
            backend: self.backend.map(|(id, _)| id),
            address: self.backend.map(|(_, address)| address),
            end: self.outcome,
            from_client: self.from_client,
            to_client: self.to_client,
            connect_seconds: self.connect.map(|time| time.as_secs_f64()),
            duration_seconds: self.duration.as_secs_f64(),
        });
        // Strings, numbers and addresses always serialize. If that failed, an empty line would show it.
        json.unwrap_or_default() + "\n"
    }
}

/// The wall-clock time, for people who read the log. It is never used to measure durations.
fn now() -> String {
    humantime::format_rfc3339_millis(SystemTime::now()).to_string()
}
