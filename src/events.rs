//! The last events of this process, in memory: what the log said about backends, replicas, commands and reloads.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::{Debug, Write as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tracing::field::{Field, Visit};
use tracing::{Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// Events that are kept.
pub const KEPT: usize = 200;

/// Longest text, and longest value of a field, in bytes.
const LONGEST: usize = 1024;

/// Logs the output of replicas, which would push the events out.
const OUTPUT: &str = "ringway::replica";

/// Something that happened. Later versions can add fields but never rename one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Counts the events of this process, from 1.
    pub number: u64,
    /// Seconds since 1970.
    pub at: f64,
    /// `info`, `warn` or `error`.
    pub level: String,
    /// What happened.
    pub text: String,
    /// Details, like `pool`, `id` and `caller`.
    pub fields: BTreeMap<String, String>,
}

/// The last events. A subscriber of `tracing` records them.
#[derive(Debug, Default)]
pub struct Events(Mutex<VecDeque<Arc<Event>>>);

impl Events {
    /// The events after this number, the oldest first; 0: all.
    pub fn after(&self, number: u64) -> Vec<Arc<Event>> {
        self.lock().iter().filter(|event| event.number > number).cloned().collect()
    }

    /// The number of the last event; 0 before the first one.
    pub fn last(&self) -> u64 {
        self.lock().back().map_or(0, |event| event.number)
    }

    fn record(&self, level: Level, details: Details) {
        let at = unix_seconds();
        let level = level.as_str().to_ascii_lowercase();
        let mut events = self.lock();
        let number = events.back().map_or(0, |event| event.number) + 1;
        if events.len() == KEPT {
            events.pop_front();
        }
        events.push_back(Arc::new(Event { number, at, level, text: details.text, fields: details.fields }));
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Arc<Event>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The time now, in seconds since 1970.
pub fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// Records what Ringway logs as information, a warning or an error.
#[derive(Debug)]
pub struct Recorder(pub Arc<Events>);

impl<S: Subscriber> Layer<S> for Recorder {
    fn on_event(&self, event: &tracing::Event<'_>, _context: Context<'_, S>) {
        let metadata = event.metadata();
        if *metadata.level() > Level::INFO || !metadata.target().starts_with("ringway") || metadata.target() == OUTPUT {
            return;
        }
        let mut details = Details::default();
        event.record(&mut details);
        self.0.record(*metadata.level(), details);
    }
}

/// The text and the fields of an event.
#[derive(Default)]
struct Details {
    text: String,
    fields: BTreeMap<String, String>,
}

impl Visit for Details {
    fn record_str(&mut self, field: &Field, value: &str) {
        let mut end = value.len().min(LONGEST);
        while !value.is_char_boundary(end) {
            end -= 1;
        }
        let value = value[..end].to_owned();
        if field.name() == "message" {
            self.text = value;
        } else {
            self.fields.insert(field.name().to_owned(), value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = write!(text, "{value:?}");
        self.record_str(field, &text);
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[test]
    fn the_last_events_are_kept_with_their_fields() {
        let events = Arc::new(Events::default());
        let subscriber = tracing_subscriber::registry().with(Recorder(Arc::clone(&events)));
        tracing::subscriber::with_default(subscriber, || {
            for n in 0..KEPT + 5 {
                tracing::info!(pool = "echo", n, caller = %"127.0.0.1:1", "backend is {}", "healthy");
            }
            tracing::warn!(text = "é".repeat(2000), "long");
            tracing::debug!("not kept");
            tracing::info!(target: "hyper", "not kept");
            tracing::info!(target: OUTPUT, "not kept");
        });
        let all = events.after(0);
        assert_eq!((all.len(), all[0].number, events.last()), (KEPT, 7, 206));
        let first = &all[0];
        assert_eq!((first.level.as_str(), first.text.as_str()), ("info", "backend is healthy"));
        assert_eq!(first.fields["pool"], "echo");
        assert_eq!((first.fields["n"].as_str(), first.fields["caller"].as_str()), ("6", "127.0.0.1:1"));
        assert_eq!(events.after(205).len(), 1);
        assert_eq!(events.after(205)[0].fields["text"].len(), LONGEST);
    }
}
