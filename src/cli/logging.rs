//! The log on standard error: its filter and its format. Writing a line never blocks the thread that logs.

use std::io::{self, IsTerminal as _};
use std::sync::Arc;
use std::time::Duration;

use ringway::lossy_writer::{LossyWriter, LostLines};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use super::{Common, Failure, LogFormat};

/// Maximum lines in the queue; further lines are dropped and counted.
const QUEUED_LINES: usize = 4096;

/// Time between two looks for lost lines.
const LOOK: Duration = Duration::from_secs(1);

/// The log of this process. Dropping it writes the queued lines, for at most one second.
pub(super) struct Log(Arc<LossyWriter>);

impl Log {
    /// Starts the log. Panics are logged too.
    pub(super) fn start(common: &Common) -> Result<Self, Failure> {
        let filter = filter(&common.log)?;
        let writer = LossyWriter::start("log", QUEUED_LINES, Box::new(io::stderr()), LostLines::default())
            .map_err(|error| anyhow::anyhow!("cannot start the log: {error}"))?;
        let log = Self(Arc::new(writer));
        let builder = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(Lines(Arc::clone(&log.0)))
            .with_ansi(io::stderr().is_terminal());
        match common.log_format {
            LogFormat::Text => builder.with_target(false).init(),
            LogFormat::Json => builder.json().init(),
        }
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

    /// Prints text in full, between the lines of the log.
    pub(super) fn print(&self, text: String) {
        self.0.write(text.into_bytes());
    }

    /// The counter of lost lines.
    pub(super) fn lost(&self) -> LostLines {
        self.0.lost().clone()
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.0.finish();
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

fn filter(text: &str) -> Result<EnvFilter, Failure> {
    let fault = |error: &dyn std::fmt::Display| Failure::Log { filter: text.to_owned(), error: error.to_string() };
    // `EnvFilter` takes a bare word that is not a level for a module, and would log nothing at all.
    let levels = ["error", "warn", "info", "debug", "trace", "off"];
    if let Some(word) = text
        .split(',')
        .find(|word| !word.contains(['=', ':', '[']) && !levels.contains(&word.to_ascii_lowercase().as_str()))
    {
        return Err(fault(&format_args!("{word:?} is not a level: use one of {}", levels.join(", "))));
    }
    let filter = EnvFilter::try_new(text).map_err(|error| fault(&error))?;
    // bollard logs whole requests, with the environment of replicas in them. hyper logs every slow client of the side
    // port as a warning.
    let quiet = [("bollard", "bollard=info"), ("hyper", "hyper=error")].into_iter();
    let quiet =
        quiet.filter(|(library, _)| !text.contains(library)).filter_map(|(_, directive)| directive.parse().ok());
    Ok(quiet.fold(filter, EnvFilter::add_directive))
}

/// Makes each event one line of the log.
struct Lines(Arc<LossyWriter>);

/// The formatter writes a whole event at once.
struct Event<'a>(&'a LossyWriter);

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Event<'a>;

    fn make_writer(&'a self) -> Event<'a> {
        Event(&self.0)
    }
}

impl io::Write for Event<'_> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        self.0.write(one_line(event));
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
