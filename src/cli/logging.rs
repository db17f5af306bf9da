//! The log on standard error: its filter and its format. Writing a line never blocks the thread that logs.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use ringway::app::LogFilter;
use ringway::events::{Events, Recorder};
use ringway::lossy_writer::{LossyWriter, LostLines};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{self, MakeWriter};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, Registry, reload};

use super::{Common, Failure, LogFormat, terminal};

/// Maximum lines in the queue; further lines are dropped and counted.
const QUEUED_LINES: usize = 4096;

/// Time between two looks for lost lines.
const LOOK: Duration = Duration::from_secs(1);

/// The log of this process. Dropping it writes the queued lines, for at most one second.
pub(super) struct Log {
    writer: Arc<LossyWriter>,
    filter: Arc<Filter>,
    events: Arc<Events>,
}

/// The filter of the log, which a command can change.
#[derive(Debug)]
struct Filter {
    first: String,
    current: reload::Handle<EnvFilter, Registry>,
}

impl Log {
    /// Starts the log. Panics are logged too.
    pub(super) fn start(common: &Common) -> Result<Self, Failure> {
        let fault = |error: String| Failure::Log { filter: common.log.clone(), error };
        let (filter, current) = reload::Layer::new(filter(&common.log).map_err(fault)?);
        let writer = LossyWriter::start("log", QUEUED_LINES, Box::new(io::stderr()), LostLines::default())
            .map_err(|error| anyhow::anyhow!("cannot start the log: {error}"))?;
        let writer = Arc::new(writer);
        let is_json = common.log_format == LogFormat::Json;
        let lines = Lines { writer: Arc::clone(&writer), is_json };
        let layer = fmt::layer().with_writer(lines).with_ansi(terminal::has_colours(&io::stderr()));
        let layer = if is_json {
            layer.json().with_filter(filter).boxed()
        } else {
            layer.with_target(false).with_timer(Stamp).with_filter(filter).boxed()
        };
        // Whatever the log shows, the side port has the last events.
        let events = Arc::new(Events::default());
        let recorder = Recorder(Arc::clone(&events)).with_filter(LevelFilter::INFO);
        tracing_subscriber::registry().with(layer).with(recorder).init();
        let log = Self { writer, filter: Arc::new(Filter { first: common.log.clone(), current }), events };
        // The default hook writes to standard error, where nobody may be reading.
        std::panic::set_hook(Box::new(|panic| {
            let at = panic.location().map(ToString::to_string);
            let payload = panic.payload();
            let text = payload.downcast_ref::<&str>().copied();
            let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no text");
            tracing::error!(at, "Ringway has a bug, please report it: {text}");
        }));
        Ok(log)
    }

    /// The last events.
    pub(super) fn events(&self) -> Arc<Events> {
        Arc::clone(&self.events)
    }

    /// What the log shows.
    pub(super) fn filter(&self) -> Arc<dyn LogFilter> {
        Arc::clone(&self.filter) as Arc<dyn LogFilter>
    }

    /// Prints text in full, between the lines of the log.
    pub(super) fn print(&self, text: String) {
        self.writer.write(text.into_bytes());
    }

    /// The counter of lost lines.
    pub(super) fn lost(&self) -> LostLines {
        self.writer.lost().clone()
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.writer.finish();
    }
}

impl LogFilter for Filter {
    fn first(&self) -> &str {
        &self.first
    }

    fn check(&self, text: &str) -> Result<(), String> {
        filter(text).map(drop)
    }

    fn set(&self, text: Option<&str>) {
        // The subscriber lives as long as the process.
        if let Ok(new) = filter(text.unwrap_or(&self.first)) {
            let _ = self.current.reload(new);
        }
    }
}

/// The time and the process id: during an upgrade, two processes write to the same log.
struct Stamp;

impl FormatTime for Stamp {
    fn format_time(&self, to: &mut Writer<'_>) -> std::fmt::Result {
        SystemTime.format_time(to)?;
        write!(to, " [{}]", std::process::id())
    }
}

/// Logs how many lines were lost, once the log accepts lines again.
pub(super) async fn report_lost(lost: LostLines) {
    let mut reported = 0;
    loop {
        tokio::time::sleep(LOOK).await;
        let now = lost.count();
        if now > reported {
            tracing::warn!(lines = now - reported, "log lines were lost because standard error was not read in time");
            // Otherwise this line was lost too.
            if lost.count() == now {
                reported = now;
            }
        }
    }
}

/// Parses a filter, or says what is wrong with it.
fn filter(text: &str) -> Result<EnvFilter, String> {
    // `EnvFilter` takes a bare word that is not a level for a module, and would log nothing at all.
    let levels = ["error", "warn", "info", "debug", "trace", "off"];
    if let Some(word) = text
        .split(',')
        .find(|word| !word.contains(['=', ':', '[']) && !levels.contains(&word.to_ascii_lowercase().as_str()))
    {
        return Err(format!("{word:?} is not a level: use one of {}", levels.join(", ")));
    }
    let filter = EnvFilter::try_new(text).map_err(|error| error.to_string())?;
    // bollard logs whole requests, with the environment of replicas in them. hyper logs every slow client of the side
    // port as a warning.
    let quiet = [("bollard", "bollard=info"), ("hyper", "hyper=error")].into_iter();
    let quiet =
        quiet.filter(|(library, _)| !text.contains(library)).filter_map(|(_, directive)| directive.parse().ok());
    Ok(quiet.fold(filter, EnvFilter::add_directive))
}

/// Makes each event one line of the log.
struct Lines {
    writer: Arc<LossyWriter>,
    is_json: bool,
}

/// The formatter writes a whole event at once.
struct Event<'a>(&'a Lines);

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Event<'a>;

    fn make_writer(&'a self) -> Event<'a> {
        Event(self)
    }
}

impl io::Write for Event<'_> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let line = one_line(event);
        // The formatter of JSON has no place for the process id.
        self.0.writer.write(match line.strip_prefix(b"{") {
            Some(rest) if self.0.is_json => [format!("{{\"pid\":{},", std::process::id()).as_bytes(), rest].concat(),
            _ => line,
        });
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Indents the further lines of an event, and escapes control characters, so that no text in an event (a backend's id,
/// an answer of a server) looks like another event. The formatter has escaped the characters that move a cursor.
fn one_line(event: &[u8]) -> Vec<u8> {
    let text = event.strip_suffix(b"\n").unwrap_or(event);
    let mut line = Vec::with_capacity(event.len());
    for &byte in text {
        match byte {
            b'\n' => line.extend_from_slice(b"\n    "),
            b'\t' | b'\x1b' | b' '.. => line.push(byte),
            _ => line.extend(byte.escape_ascii()),
        }
    }
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_cannot_look_like_two() {
        assert_eq!(one_line(b"plain \xc3\xa9\n"), b"plain \xc3\xa9\n");
        assert_eq!(one_line(b"one\n2026-01-01 INFO two\r\0\n"), b"one\n    2026-01-01 INFO two\\r\\x00\n");
    }
}
