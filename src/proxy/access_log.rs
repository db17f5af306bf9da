//! The access log: one line per connection. Writing a line never blocks a worker.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use rustix::fs::{Access, access};
use rustix::io::Errno;
use serde::Serialize;

use super::connect::Try;
use super::connection::Connection;
use crate::address::Address;
use crate::client_hello::Hello;
use crate::label_enum;
use crate::labels::Label;
use crate::lossy_writer::{LossyWriter, LostLines, Sink, append};

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

/// Whether a log could be opened for appending. Creates nothing.
///
/// # Errors
/// What the system would report.
pub fn is_writable(path: &Path) -> io::Result<()> {
    if matches!(path.to_str(), Some("stdout" | "stderr")) {
        return Ok(());
    }
    if path.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    match access(path, Access::WRITE_OK) {
        Err(Errno::NOENT) => {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            Ok(access(folder, Access::WRITE_OK | Access::EXEC_OK)?)
        }
        other => Ok(other?),
    }
}

/// The details of an ended connection.
#[derive(Debug)]
pub(super) struct Line<'a> {
    pub(super) connection: &'a Connection,
    /// The backends that Ringway tried without success.
    pub(super) tries: &'a [Try],
    pub(super) outcome: &'static str,
    pub(super) duration: Duration,
}

/// The fields of a line, in the order of both formats. `None` is written as `-` and `null`.
#[derive(Debug, Serialize)]
struct Fields<'a> {
    time: String,
    id: String,
    listener: &'a str,
    route: Option<&'a str>,
    pool: Option<&'a str>,
    client: String,
    peer: Option<String>,
    proxy: Option<&'static str>,
    sni: Option<&'a str>,
    alpn: Option<Vec<String>>,
    backend: Option<&'a str>,
    address: Option<&'a Address>,
    tries: Vec<Tried<'a>>,
    end: &'static str,
    from_client: u64,
    to_client: u64,
    connect_ms: Option<f64>,
    duration_ms: f64,
}

/// A backend that Ringway tried without success.
#[derive(Debug, Serialize)]
struct Tried<'a> {
    backend: &'a str,
    failure: &'static str,
}

impl Line<'_> {
    fn fields(&self) -> Fields<'_> {
        let Self { connection, tries, outcome, duration } = *self;
        let (serving, served) = (&connection.listener.serving, connection.served.get());
        let rule = connection.rule.get().map(|rule| &serving.routing.rules[usize::from(rule)]);
        let tried = |one: &'_ Try| one.failure.map_or("left", |failure| failure.as_str());
        Fields {
            time: now(),
            id: connection.id.to_string(),
            listener: &serving.name,
            route: rule.map(|rule| &*rule.name),
            pool: connection.route().map(|route| &*route.pool),
            client: connection.client().to_string(),
            peer: connection.balancer().map(|peer| peer.to_string()),
            proxy: connection.proxy_header.get().map(Label::as_str),
            sni: connection.server_name(),
            alpn: connection.hello.get().map(|hello| protocols(hello)),
            backend: served.map(|served| &*served.backend),
            address: served.map(|served| &served.address),
            tries: tries.iter().map(|one| Tried { backend: &one.backend, failure: tried(one) }).collect(),
            end: outcome,
            from_client: connection.from_client.total(),
            to_client: connection.to_client.total(),
            connect_ms: served.map(|served| milliseconds(served.connected_after)),
            duration_ms: milliseconds(duration),
        }
    }

    fn text(&self) -> String {
        let Fields {
            time,
            id,
            listener,
            route,
            pool,
            client,
            peer,
            proxy,
            sni,
            alpn,
            backend,
            address,
            tries,
            end,
            from_client,
            to_client,
            connect_ms,
            duration_ms,
        } = self.fields();
        let (route, pool, sni, backend) = (or_dash(route), or_dash(pool), or_dash(sni), or_dash(backend));
        let (peer, proxy, address) = (or_dash(peer), or_dash(proxy), or_dash(address));
        let alpn = or_dash(alpn.filter(|list| !list.is_empty()).map(|list| list.join(",")));
        let tries: Vec<_> = tries.iter().map(|one| format!("{}({})", one.backend, one.failure)).collect();
        let tries = or_dash(Some(tries.join(",")).filter(|list| !list.is_empty()));
        let connect = or_dash(connect_ms.map(|time| format!("{time:.3}")));
        format!(
            "{time} id={id} listener={listener} route={route} pool={pool} client={client} peer={peer} proxy={proxy} \
             sni={sni} alpn={alpn} backend={backend} address={address} tries={tries} end={end} \
             from_client={from_client} to_client={to_client} connect_ms={connect} duration_ms={duration_ms:.3}\n"
        )
    }

    fn json(&self) -> String {
        // Strings, numbers and addresses always serialize. If that failed, an empty line would show it.
        serde_json::to_string(&self.fields()).unwrap_or_default() + "\n"
    }
}

fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// With three digits behind the point: the log does not pretend to know nanoseconds.
fn milliseconds(time: Duration) -> f64 {
    time.as_micros() as f64 / 1000.0
}

/// The protocols that a client offers. `...` stands for those that Ringway did not keep.
fn protocols(hello: &Hello) -> Vec<String> {
    let more = hello.offers_more.then(|| "...".to_owned());
    hello.protocols().map(escaped).chain(more).collect()
}

/// Bytes from the network as text that cannot end a field or a line.
fn escaped(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-_./:+".contains(&byte) {
            text.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

/// The wall-clock time, for people who read the log. It is never used to measure durations.
fn now() -> String {
    humantime::format_rfc3339_millis(SystemTime::now()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_from_the_network_cannot_end_a_field_or_a_line() {
        assert_eq!(escaped(b"http/1.1"), "http/1.1");
        assert_eq!(escaped(b"a b,c\n\"\\\xff="), "a\\x20b\\x2cc\\x0a\\x22\\x5c\\xff\\x3d");
    }
}
