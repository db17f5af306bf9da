//! Fetches a full list of the containers with certain labels whenever something may have changed.
//!
//! An event only triggers a list: a lost, doubled or late event changes when Ringway fetches one, and nothing else.
//! Ringway fetches a list at start, after every event and every reconnect, every `resync`, and on request.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use futures_util::stream::StreamExt as _;
use tokio::sync::{Notify, watch};

use super::container::{Container, State};
use super::engine::{Engine, EngineError};

/// Wait before the first retry of an unreachable engine; doubles with each retry.
const FIRST_RETRY: Duration = Duration::from_millis(250);

/// Longest wait between two tries.
const LONGEST_RETRY: Duration = Duration::from_secs(5);

/// Events within this time cause one list.
const TOGETHER: Duration = Duration::from_millis(10);

/// Waits before the additional lists that follow each event and each reconnect. The engine sends the event of a death
/// before its list shows it (moby 20.10 first frees the network), and it sends no event for changes between the first
/// list and the moment the new subscription takes effect.
const FURTHER: [Duration; 4] =
    [Duration::from_millis(40), Duration::from_millis(160), Duration::from_millis(640), Duration::from_millis(2560)];

/// A full list.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Every container with the labels.
    pub containers: Vec<Container>,
    /// When Ringway requested the list: later changes may be missing from it.
    pub as_of: Instant,
}

/// The state of the engine as Ringway last saw it, for status and metrics.
#[derive(Debug)]
pub struct EngineStatus {
    host: Arc<str>,
    started: Instant,
    /// Milliseconds from `started` to the last full list, plus 1; 0 before the first.
    last: AtomicU64,
    failures: AtomicU64,
    error: ArcSwapOption<String>,
}

impl EngineStatus {
    /// The status before the first list.
    pub fn new(engine: &Engine, now: Instant) -> Self {
        let zero = || AtomicU64::new(0);
        let error = ArcSwapOption::empty();
        Self { host: engine.host().into(), started: now, last: zero(), failures: zero(), error }
    }

    /// The engine's address.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Age of the last full list; the time since the start before the first list.
    pub fn age(&self) -> Duration {
        let last = self.last.load(Ordering::Relaxed).saturating_sub(1);
        self.started.elapsed().saturating_sub(Duration::from_millis(last))
    }

    /// Error of the last try to fetch a list; `None` if it succeeded.
    pub fn error(&self) -> Option<Arc<String>> {
        self.error.load_full()
    }

    /// Whether the engine answered the last request for a list.
    pub fn is_fresh(&self) -> bool {
        self.last.load(Ordering::Relaxed) > 0 && self.error.load().is_none()
    }

    /// Number of failed tries since the start.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    pub(in crate::control) fn succeeded(&self, pool: &str, as_of: Instant) {
        let age = as_of.saturating_duration_since(self.started);
        let millis = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
        self.last.store(millis.saturating_add(1), Ordering::Relaxed);
        if self.error.swap(None).is_some() {
            tracing::info!(pool, host = %self.host, "the Docker engine is reachable again");
        }
    }

    /// Counts a failure. Logs it only if it is the first in a row or its error differs from the previous one.
    pub(in crate::control) fn failed(&self, pool: &str, error: &dyn std::fmt::Display) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        let error = error.to_string();
        if self.error.load().as_ref().is_none_or(|last| **last != error) {
            tracing::error!(pool, "{error}; the last known backends stay in use; Ringway retries");
            self.error.store(Some(Arc::new(error)));
        }
    }
}

/// Backoff between tries to reach an engine.
#[derive(Debug)]
pub struct Retry(Duration);

impl Default for Retry {
    fn default() -> Self {
        Self(FIRST_RETRY)
    }
}

impl Retry {
    /// Waits; each wait is longer than the one before, up to a limit.
    pub async fn wait(&mut self) {
        tokio::time::sleep(self.0).await;
        self.0 = (self.0 * 2).min(LONGEST_RETRY);
    }
}

/// Watches an engine as long as a receiver exists.
#[derive(Debug)]
pub struct Watch {
    /// The engine to watch.
    pub engine: Engine,
    /// The pool's name, for the log.
    pub pool: Arc<str>,
    /// Labels (`name` or `name=value`) that a container must all have.
    pub labels: Vec<String>,
    /// Longest time between two lists.
    pub resync: Duration,
    /// The state of the engine.
    pub engine_status: Arc<EngineStatus>,
    /// Requests a list.
    pub poke: Arc<Notify>,
}

impl Watch {
    /// Sends every list to `seen`. Ends when no receiver is left.
    pub async fn run(self, seen: watch::Sender<Option<Seen>>) {
        let mut retry = Retry::default();
        while !seen.is_closed() {
            match self.follow(&seen, &mut retry).await {
                Ok(()) => tracing::debug!(pool = %self.pool, "the engine's event stream ended"),
                Err(error) => self.engine_status.failed(&self.pool, &error),
            }
            // Wait also after a subscription that ended without an error: the engine may end each one at once.
            tokio::select! {
                () = retry.wait() => {}
                () = seen.closed() => {}
            }
        }
    }

    /// Follows one subscription until it ends.
    async fn follow(&self, seen: &watch::Sender<Option<Seen>>, retry: &mut Retry) -> Result<(), EngineError> {
        let mut events = self.engine.events(&self.labels)?;
        let mut next = Instant::now();
        let mut further = FURTHER.iter();
        let mut is_subscribed = false;
        // The states in the previous list, set while no change is expected.
        let mut unchanged: Option<HashMap<Arc<str>, State>> = None;
        loop {
            tokio::select! {
                // The first poll sends the subscription, so it must come before the first list.
                biased;
                () = seen.closed() => return Ok(()),
                event = events.next() => match event {
                    Some(Ok(event)) => {
                        let action = event.action.unwrap_or_default();
                        tracing::debug!(pool = %self.pool, action, "received an event of the Docker engine");
                        // Each run of a container's health check causes three events.
                        if action.starts_with("exec_") {
                            continue;
                        }
                        next = next.min(Instant::now() + TOGETHER);
                        further = FURTHER.iter();
                        unchanged = None;
                    }
                    // The next subscription shows whether the engine is still reachable.
                    Some(Err(error)) if is_subscribed => {
                        tracing::debug!(pool = %self.pool, %error, "the engine's event stream failed");
                        return Ok(());
                    }
                    Some(Err(error)) => return Err(error),
                    None => return Ok(()),
                },
                () = self.poke.notified() => {
                    next = next.min(Instant::now());
                    unchanged = None;
                }
                () = tokio::time::sleep_until(next.into()) => {
                    let as_of = Instant::now();
                    let containers = self.engine.list(&self.labels).await?;
                    self.engine_status.succeeded(&self.pool, as_of);
                    *retry = Retry::default();
                    let states = containers.iter().map(|container| (Arc::clone(&container.id), container.state));
                    let states: HashMap<_, _> = states.collect();
                    seen.send_replace(Some(Seen { containers, as_of }));
                    is_subscribed = true;
                    if unchanged.as_ref().is_some_and(|before| *before != states) {
                        tracing::info!(pool = %self.pool, "the list changed without an event; resubscribing");
                        return Ok(());
                    }
                    // Events may still arrive until the additional lists are done.
                    unchanged = further.as_slice().is_empty().then_some(states);
                    next = as_of + further.next().copied().unwrap_or(self.resync);
                }
            }
        }
    }
}
