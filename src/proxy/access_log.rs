//! The access log: one line per connection. Writing a line never blocks a worker.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use serde::Serialize;

use crate::address::Address;
use crate::label_enum;
use crate::lossy_writer::{LossyWriter, LostLines, Sink, append};
use crate::stream::Client;

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
#[derive(Debug, Clone)]
pub struct AccessLog(Arc<ArcSwap<Output>>);

#[derive(Debug)]
struct Output {
    path: PathBuf,
    is_json: bool,
    writer: Arc<LossyWriter>,
}

/// Dropping it writes the queued lines, for at most one second.
#[derive(Debug)]
pub struct FlushGuard(AccessLog);

impl Drop for FlushGuard {
    fn drop(&mut self) {
        self.0.0.load().writer.finish();
    }
}

impl AccessLog {
    /// Opens the log at `path`: `stdout`, `stderr`, or a file, to which lines are appended.
    ///
    /// # Errors
    /// When the file cannot be opened for appending.
    pub fn open(path: &Path, format: Format) -> io::Result<(Self, FlushGuard)> {
        let writer = start(path, LostLines::default())?;
        let output = Output { path: path.to_owned(), is_json: format == Format::Json, writer };
        let log = Self(Arc::new(ArcSwap::from_pointee(output)));
        Ok((log.clone(), FlushGuard(log)))
    }

    /// Reopens the log after a rotation or a change of its path or format. Every queued line is still written. Does not
    /// wait for the writer, which may be blocked by its reader.
    ///
    /// # Errors
    /// When the file cannot be opened for appending. The log then continues in the old file.
    pub fn reopen(&self, path: &Path, format: Format) -> io::Result<()> {
        let current = self.0.load_full();
        let is_same = current.path == path;
        let writer = if is_same && current.writer.replace(open(path)?) {
            Arc::clone(&current.writer)
        } else if is_same && !path.is_file() {
            // One more writer for each reload while a FIFO is stalled would be too many.
            tracing::warn!(path = %path.display(), "the access log was not reopened: its reader has stopped reading");
            Arc::clone(&current.writer)
        } else {
            // The old writer may never finish its queue.
            start(path, current.writer.lost().clone())?
        };
        self.0.store(Arc::new(Output { path: path.to_owned(), is_json: format == Format::Json, writer }));
        Ok(())
    }

    /// The counter of lines that did not reach the log.
    pub fn lost(&self) -> LostLines {
        self.0.load().writer.lost().clone()
    }

    pub(super) fn write(&self, line: &Line<'_>) {
        let output = self.0.load();
        output.writer.write(if output.is_json { line.json() } else { line.text() }.into_bytes());
    }
}

fn start(path: &Path, lost: LostLines) -> io::Result<Arc<LossyWriter>> {
    Ok(Arc::new(LossyWriter::start("access-log", QUEUED_LINES, open(path)?, lost)?))
}

fn open(path: &Path) -> io::Result<Sink> {
    Ok(match path.to_str() {
        Some("stdout") => Box::new(io::stdout()),
        Some("stderr") => Box::new(io::stderr()),
        _ => Box::new(append(path)?),
    })
}

/// The details of an ended connection.
#[derive(Debug)]
pub(super) struct Line<'a> {
    pub(super) listener: &'a str,
    pub(super) pool: &'a str,
    pub(super) client: Client,
    /// Who sent the PROXY header with the client's address.
    pub(super) peer: Option<Client>,
    pub(super) backend: Option<(&'a str, &'a Address)>,
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
        let peer = self.peer.map_or("-".to_owned(), |peer| peer.to_string());
        format!(
            "{} listener={} pool={} client={} peer={peer} backend={id} address={address} end={} from_client={} \
             to_client={} connect={connect} duration={:.6}\n",
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
            client: String,
            peer: Option<String>,
            backend: Option<&'a str>,
            address: Option<&'a Address>,
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
            client: self.client.to_string(),
            peer: self.peer.map(|peer| peer.to_string()),
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
