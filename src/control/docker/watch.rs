//! Full lists of the containers with certain labels, whenever something may have changed.
//!
//! Events are only a reason to look: an event that is lost, doubled or late changes nothing but when. Lists are
//! made at start, after every event and every reconnect, every `resync`, and when asked for.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use futures_util::stream::StreamExt as _;
use tokio::sync::{Notify, watch};

use super::container::{Container, State};
use super::engine::{Engine, EngineError};

/// Between the first two tries to reach an engine that is away; doubled with each more.
const FIRST_RETRY: Duration = Duration::from_millis(250);

/// The longest wait between two tries.
const LONGEST_RETRY: Duration = Duration::from_secs(5);

/// Events that come within this time make one list.
const TOGETHER: Duration = Duration::from_millis(10);

/// Lists that follow the one after an event or a reconnect, each after this much more time. The engine tells of a
/// death before its list shows it (moby 20.10 first frees the network); and of what happens between the first
/// list and the moment at which it has taken a new subscription it tells nobody.
const FURTHER: [Duration; 4] =
    [Duration::from_millis(40), Duration::from_millis(160), Duration::from_millis(640), Duration::from_millis(2560)];

/// What a list has shown.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Every container with the labels.
    pub containers: Vec<Container>,
    /// When the list was asked for: what was done later is not in it.
    pub as_of: Instant,
}

/// How fresh the view of an engine is, for status and metrics.
#[derive(Debug)]
pub struct Freshness {
    host: Arc<str>,
    started: Instant,
    /// Milliseconds from `started` to the last full list, plus 1; 0 before the first.
    last: AtomicU64,
    failures: AtomicU64,
    error: ArcSwapOption<String>,
}

impl Freshness {
    /// Nothing seen yet.
    pub fn new(engine: &Engine, now: Instant) -> Self {
        let zero = || AtomicU64::new(0);
        let error = ArcSwapOption::empty();
        Self { host: engine.host().into(), started: now, last: zero(), failures: zero(), error }
    }

    /// The engine's address.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// How old the last full list is; since the start where there is none yet.
    pub fn age(&self) -> Duration {
        let last = self.last.load(Ordering::Relaxed).saturating_sub(1);
        self.started.elapsed().saturating_sub(Duration::from_millis(last))
    }

    /// Why the last try to make one failed; `None` where it did not.
    pub fn error(&self) -> Option<Arc<String>> {
        self.error.load_full()
    }

    /// Whether the engine answered when it was asked last.
    pub fn is_fresh(&self) -> bool {
        self.last.load(Ordering::Relaxed) > 0 && self.error.load().is_none()
    }

    /// How many tries have failed.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    pub(in crate::control) fn succeeded(&self, pool: &str, as_of: Instant) {
        let age = as_of.saturating_duration_since(self.started);
        let millis = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
        self.last.store(millis.saturating_add(1), Ordering::Relaxed);
        if self.error.swap(None).is_some() {
            tracing::info!(pool, host = %self.host, "the Docker engine is back");
        }
    }

    /// Tells of the first failure in a row, and of another kind; each further one is no news.
    pub(in crate::control) fn failed(&self, pool: &str, error: &dyn std::fmt::Display) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        let error = error.to_string();
        if self.error.load().as_ref().is_none_or(|last| **last != error) {
            tracing::error!(pool, "{error}; serving what was seen last, and trying again");
            self.error.store(Some(Arc::new(error)));
        }
    }
}

/// The waits between tries to reach an engine.
#[derive(Debug)]
pub struct Retry(Duration);

impl Default for Retry {
    fn default() -> Self {
        Self(FIRST_RETRY)
    }
}

impl Retry {
    /// Waits, each time longer.
    pub async fn wait(&mut self) {
        tokio::time::sleep(self.0).await;
        self.0 = (self.0 * 2).min(LONGEST_RETRY);
    }
}

/// Looks at an engine for as long as somebody wants to see.
#[derive(Debug)]
pub struct Watch {
    /// The engine.
    pub engine: Engine,
    /// The pool that it is for, in the log.
    pub pool: Arc<str>,
    /// Which containers: `name` or `name=value`, all of them.
    pub labels: Vec<String>,
    /// The longest time between two lists.
    pub resync: Duration,
    /// How fresh the view is.
    pub freshness: Arc<Freshness>,
    /// Asks for a list.
    pub poke: Arc<Notify>,
}

impl Watch {
    /// Sends every list to `seen`. Ends when nobody receives any more.
    pub async fn run(self, seen: watch::Sender<Option<Seen>>) {
        let mut retry = Retry::default();
        while !seen.is_closed() {
            match self.follow(&seen, &mut retry).await {
                Ok(()) => tracing::debug!(pool = %self.pool, "the engine's events have ended"),
                Err(error) => self.freshness.failed(&self.pool, &error),
            }
            // A subscription that ends at once, again and again, is not asked for in a row either.
            tokio::select! {
                () = retry.wait() => {}
                () = seen.closed() => {}
            }
        }
    }

    /// One subscription, until it ends.
    async fn follow(&self, seen: &watch::Sender<Option<Seen>>, retry: &mut Retry) -> Result<(), EngineError> {
        let mut events = self.engine.events(&self.labels)?;
        let mut next = Instant::now();
        let mut further = FURTHER.iter();
        let mut is_subscribed = false;
        // What the list before has shown, until there is a reason for it to change.
        let mut unchanged: Option<HashMap<Arc<str>, State>> = None;
        loop {
            tokio::select! {
                // The subscription is sent when it is first polled: before the first list.
                biased;
                () = seen.closed() => return Ok(()),
                event = events.next() => match event {
                    Some(Ok(event)) => {
                        let action = event.action.unwrap_or_default();
                        tracing::debug!(pool = %self.pool, action, "event of the Docker engine");
                        // Programs run in a container for its health check make three events each time.
                        if action.starts_with("exec_") {
                            continue;
                        }
                        next = next.min(Instant::now() + TOGETHER);
                        further = FURTHER.iter();
                        unchanged = None;
                    }
                    // Whether the engine has gone with them the next subscription will tell.
                    Some(Err(error)) if is_subscribed => {
                        tracing::debug!(pool = %self.pool, %error, "the engine's events");
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
                    self.freshness.succeeded(&self.pool, as_of);
                    *retry = Retry::default();
                    let states = containers.iter().map(|container| (Arc::clone(&container.id), container.state));
                    let states: HashMap<_, _> = states.collect();
                    seen.send_replace(Some(Seen { containers, as_of }));
                    is_subscribed = true;
                    if unchanged.as_ref().is_some_and(|before| *before != states) {
                        tracing::info!(pool = %self.pool, "no event told of what the list shows: asking for events anew");
                        return Ok(());
                    }
                    // Until then events may be under way.
                    unchanged = further.as_slice().is_empty().then_some(states);
                    next = as_of + further.next().copied().unwrap_or(self.resync);
                }
            }
        }
    }
}
