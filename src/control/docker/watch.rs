//! Fetches a full list of the containers with certain labels whenever something may have changed.
//!
//! An event only triggers a list: a lost, doubled or late event changes when Ringway fetches one, and nothing else. The
//! exception is the signal to stop, which no list shows: Ringway marks the container until it ends, starts again, or has
//! taken too long.
//! Ringway fetches a list at start, after every event and every reconnect, every `resync`, and on request.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use bollard::models::EventMessage;
use futures_util::stream::StreamExt as _;
use rustix::process::Signal;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use super::container::{Container, State};
use super::engine::{Engine, EngineError};
use super::signals;

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

/// How long a container may go on after the signal to stop until Ringway takes the signal for something else, unless the
/// container was created with a longer stop time. By default, the engine kills it after 10 s.
const STOPPING: Duration = Duration::from_secs(60);

/// Longest stop time of a container that Ringway waits for.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// Added to the stop time of a container.
const LATE: Duration = Duration::from_secs(10);

/// Containers that Ringway inspects at the same time. Without an inspection, the usual signals and times count.
const MOST_INSPECTIONS: usize = 32;

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

/// Marks the containers of the last list that have got the signal to stop.
fn tell(seen: &watch::Sender<Option<Seen>>, stopping: &Stopping) {
    seen.send_if_modified(|seen| seen.as_mut().is_some_and(|seen| stopping.mark(&mut seen.containers)));
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
    /// Whether to mark containers that have got the signal to stop.
    pub notices_stops: bool,
}

/// The containers that have got the signal to stop, and until when they may take to do so.
#[derive(Debug, Default)]
struct Stopping(HashMap<Arc<str>, Instant>);

impl Stopping {
    /// A container may take this long.
    fn add(&mut self, id: Arc<str>, time: Duration, now: Instant) {
        let until = self.0.entry(id).or_insert(now);
        *until = (*until).max(now + time);
    }

    /// Forgets a container that starts again.
    fn forget(&mut self, id: &str) {
        self.0.remove(id);
    }

    /// Forgets the containers that have ended, and those that go on in spite of the signal.
    fn follow(&mut self, containers: &[Container], now: Instant) {
        let runs = |id: &Arc<str>| containers.iter().any(|one| one.id == *id && one.state == State::Running);
        self.0.retain(|id, until| runs(id) && now < *until);
    }

    /// When the first of them has taken too long.
    fn next(&self) -> Option<Instant> {
        self.0.values().min().copied()
    }

    /// Marks the containers among these. Returns whether that is news.
    fn mark(&self, containers: &mut [Container]) -> bool {
        let mut is_news = false;
        for container in containers.iter_mut().filter(|one| self.0.contains_key(&one.id)) {
            is_news |= !std::mem::replace(&mut container.is_stopping, true);
        }
        is_news
    }
}

/// The signal of an event that has sent one to a container, and the container's id.
fn signal_of(event: &EventMessage) -> Option<(Arc<str>, i32)> {
    let actor = event.actor.as_ref().filter(|_| event.action.as_deref() == Some("kill"))?;
    Some((actor.id.as_deref()?.into(), actor.attributes.as_ref()?.get("signal")?.parse().ok()?))
}

/// Whether a signal stops a container, and how long the container may take, as it was created.
async fn stop_time(engine: Engine, id: Arc<str>, signal: i32) -> Option<(Arc<str>, i32, Duration)> {
    let config = engine.inspect(&id).await.ok()?.config?;
    let stops = is_usual(signal) || config.stop_signal.as_deref().and_then(signals::number) == Some(signal);
    // Negative: the engine waits without end.
    let time = config.stop_timeout.map(|seconds| Duration::from_secs(seconds.try_into().unwrap_or(u64::MAX)));
    let time = time.map_or(STOPPING, |time| time.min(LONGEST) + LATE);
    stops.then_some((id, signal, STOPPING.max(time)))
}

/// Whether the signal stops a container, whatever its image says.
fn is_usual(signal: i32) -> bool {
    [Signal::TERM, Signal::KILL].map(Signal::as_raw).contains(&signal)
}

impl Watch {
    /// Sends every list to `seen`. Ends when no receiver is left.
    pub async fn run(self, seen: watch::Sender<Option<Seen>>) {
        let (mut retry, mut stopping) = (Retry::default(), Stopping::default());
        while !seen.is_closed() {
            match self.follow(&seen, &mut stopping, &mut retry).await {
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
    async fn follow(
        &self,
        seen: &watch::Sender<Option<Seen>>,
        stopping: &mut Stopping,
        retry: &mut Retry,
    ) -> Result<(), EngineError> {
        let mut events = self.engine.events(&self.labels)?;
        let mut next = Instant::now();
        let mut further = FURTHER.iter();
        let mut is_subscribed = false;
        let mut inspections = JoinSet::new();
        // The states in the previous list, set while no change is expected.
        let mut unchanged: Option<HashMap<Arc<str>, State>> = None;
        loop {
            tokio::select! {
                // The first poll sends the subscription, so it must come before the first list.
                biased;
                () = seen.closed() => return Ok(()),
                event = events.next() => match event {
                    Some(Ok(event)) => {
                        let action = event.action.as_deref().unwrap_or_default();
                        tracing::debug!(pool = %self.pool, action, "received an event of the Docker engine");
                        // Each run of a container's health check causes three events.
                        if action.starts_with("exec_") {
                            continue;
                        }
                        next = next.min(Instant::now() + TOGETHER);
                        further = FURTHER.iter();
                        unchanged = None;
                        let id = event.actor.as_ref().and_then(|actor| actor.id.as_deref());
                        if let (Some("start"), Some(id)) = (event.action.as_deref(), id) {
                            stopping.forget(id);
                        }
                        if let Some((id, signal)) = signal_of(&event).filter(|_| self.notices_stops) {
                            if is_usual(signal) {
                                stopping.add(Arc::clone(&id), STOPPING, Instant::now());
                                // A list would come too late: the container may stop accepting at once.
                                tell(seen, stopping);
                            }
                            if inspections.len() < MOST_INSPECTIONS {
                                inspections.spawn(stop_time(self.engine.clone(), id, signal));
                            }
                        }
                    }
                    // The next subscription shows whether the engine is still reachable.
                    Some(Err(error)) if is_subscribed => {
                        tracing::debug!(pool = %self.pool, %error, "the engine's event stream failed");
                        return Ok(());
                    }
                    Some(Err(error)) => return Err(error),
                    None => return Ok(()),
                },
                Some(Ok(Some((id, signal, time)))) = inspections.join_next() => {
                    // The container may have started again meanwhile.
                    if !is_usual(signal) || stopping.0.contains_key(&id) {
                        stopping.add(id, time, Instant::now());
                        tell(seen, stopping);
                    }
                }
                () = self.poke.notified() => {
                    next = next.min(Instant::now());
                    unchanged = None;
                }
                () = tokio::time::sleep_until(next.into()) => {
                    let as_of = Instant::now();
                    let mut containers = self.engine.list(&self.labels).await?;
                    stopping.follow(&containers, as_of);
                    stopping.mark(&mut containers);
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
                    next = stopping.next().map_or(next, |until| next.min(until));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(id: &str, state: State) -> Container {
        Container {
            image: "sha256:1".into(),
            id: id.into(),
            name: id.into(),
            labels: HashMap::new(),
            state,
            healthy: None,
            addresses: HashMap::new(),
            ports: Vec::new(),
            is_stopping: false,
        }
    }

    #[test]
    fn a_container_stops_until_it_ends_starts_again_or_has_taken_too_long() {
        let begin = Instant::now();
        let after = |seconds| begin + Duration::from_secs(seconds);
        let mut list = ["a", "b", "c", "d"].map(|id| container(id, State::Running));
        let mut stopping = Stopping::default();
        assert!(!stopping.mark(&mut list) && stopping.next().is_none());
        stopping.add("a".into(), STOPPING, begin);
        stopping.add("b".into(), STOPPING, begin);
        stopping.add("c".into(), STOPPING, begin);
        assert!(stopping.mark(&mut list));
        assert!(!stopping.mark(&mut list), "it is no news any more");
        assert_eq!(list.each_ref().map(|one| one.is_stopping), [true, true, true, false]);
        // Its stop time is longer than usual.
        stopping.add("a".into(), Duration::from_secs(310), begin);
        stopping.add("a".into(), STOPPING, begin);
        stopping.forget("b");
        assert_eq!(stopping.next(), Some(after(60)));
        let left = |stopping: &Stopping| {
            let mut left: Vec<_> = stopping.0.keys().map(ToString::to_string).collect();
            left.sort();
            left
        };
        stopping.follow(&list, after(59));
        assert_eq!(left(&stopping), ["a", "c"]);
        list[2].state = State::Dead;
        stopping.follow(&list, after(59));
        assert_eq!((left(&stopping), stopping.next()), (vec!["a".to_owned()], Some(after(310))));
        stopping.follow(&list, after(310));
        assert!(left(&stopping).is_empty());
    }

    #[test]
    fn only_a_kill_event_has_a_signal() {
        let event = |action: &str, signal: &str| -> EventMessage {
            let json = serde_json::json!({ "Type": "container", "Action": action,
                "Actor": { "ID": "c1", "Attributes": { "signal": signal } } });
            serde_json::from_value(json).unwrap()
        };
        assert_eq!(signal_of(&event("kill", "15")), Some(("c1".into(), 15)));
        assert_eq!(signal_of(&event("die", "15")), None);
        assert_eq!(signal_of(&event("kill", "TERM")), None);
        assert_eq!(signal_of(&EventMessage::default()), None);
    }
}
