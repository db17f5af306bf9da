//! What the last look-ups of a pool's name led to, for status and metrics.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use super::answer::{Answer, Outcome};
use super::members::Changes;
use crate::control::provider::ChangeKind;
use crate::labels::Tally;

/// The look-ups of a pool. One task writes; others read at any time.
#[derive(Debug)]
pub struct DnsStatus {
    /// Look-ups, by how they ended.
    pub lookups: Tally<Outcome>,
    /// Changes of backends, by kind.
    pub changes: Tally<ChangeKind>,
    last: ArcSwap<Last>,
    began: Instant,
}

/// The last look-ups.
#[derive(Debug, Clone)]
pub struct Last {
    /// The name that Ringway looks up, with `srv` or the port.
    pub question: Arc<str>,
    /// When the last complete answer came; `None`: there was none.
    pub answered: Option<Instant>,
    /// How the last look-up ended; `None`: there was none.
    pub outcome: Option<Outcome>,
    /// How long the last complete answer said that it is valid.
    pub ttl: Option<Duration>,
    /// Backends that the name has led to.
    pub backends: usize,
    /// Backends of the last answer that found no room.
    pub ignored: usize,
    /// Why the last look-up failed; `None`: it did not.
    pub error: Option<Arc<str>>,
    /// When the next look-up is due.
    pub next: Instant,
}

impl DnsStatus {
    /// The status before the first look-up.
    pub fn new(question: &str, backends: usize, now: Instant) -> Self {
        let last = Last {
            question: question.into(),
            answered: None,
            outcome: None,
            ttl: None,
            backends,
            ignored: 0,
            error: None,
            next: now,
        };
        Self { lookups: Tally::default(), changes: Tally::default(), last: ArcSwap::from_pointee(last), began: now }
    }

    /// The last look-ups.
    pub fn last(&self) -> Arc<Last> {
        self.last.load_full()
    }

    /// Age of the last complete answer; before the first one, the time since the pool began.
    pub fn age(&self) -> Duration {
        self.last.load().answered.unwrap_or(self.began).elapsed()
    }

    /// Counts a look-up and logs a failure, unless the one before it failed in the same way.
    pub(super) fn note(&self, pool: &str, answer: &Answer, changes: &Changes, backends: usize, now: Instant) {
        self.lookups.count(answer.outcome());
        for (kind, count) in [
            (ChangeKind::Joined, changes.joined),
            (ChangeKind::Changed, changes.changed),
            (ChangeKind::Left, changes.left),
        ] {
            self.changes.add(kind, count);
        }
        let before = self.last();
        let mut last = Last { backends, outcome: Some(answer.outcome()), ..Last::clone(&before) };
        let name = &before.question;
        if answer.is_complete {
            (last.answered, last.ttl) = (Some(now), answer.ttl);
        }
        last.error = answer.fault.as_ref().map(|fault| fault.text.as_str().into());
        // Servers that fail in turn have texts in turn: the first one is enough.
        match (&before.error, &last.error) {
            (None, Some(error)) => {
                tracing::warn!(%pool, %name, backends, %error, "the look-up failed; the known backends stay, and Ringway asks again");
            }
            (Some(_), None) => tracing::info!(%pool, %name, backends, "the look-up succeeded again"),
            _ => {}
        }
        if last.outcome == Some(Outcome::Empty) && before.outcome != last.outcome {
            tracing::warn!(%pool, %name, backends, "the look-up found no address");
        }
        last.ignored = changes.too_many;
        if last.ignored > before.ignored {
            tracing::warn!(%pool, %name, backends, ignored = last.ignored, "the look-up found more addresses than the pool may have backends");
        }
        self.last.store(Arc::new(last));
    }

    /// Notes when the next look-up is due.
    pub(super) fn plan(&self, next: Instant) {
        self.last.rcu(|last| Last { next, ..Last::clone(last) });
    }
}
