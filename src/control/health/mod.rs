//! Active health checks: one task per backend, started and stopped as the table says.
//!
//! # Layout
//!
//! - this file: which backends are checked, and when
//! - [`judge`]: rise and fall; pure
//! - [`probe`]: one check

mod judge;
mod probe;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use self::judge::Judge;
use self::probe::Outcome;
pub use self::probe::Probe;
use super::Event;
use crate::backend::{Backend, ConnectFailure, Live};
use crate::labels::Label as _;
use crate::table::TableCell;

/// Between the checks of a backend of which nothing is known yet: it should serve as soon as it can.
const EAGER: Duration = Duration::from_millis(100);

/// How a pool's backends are checked.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What one check does.
    pub probe: Probe,
    /// Between checks of one backend.
    pub interval: Duration,
    /// Longest time for one check.
    pub timeout: Duration,
    /// Passes in a row that make an unhealthy backend healthy.
    pub rise: u32,
    /// Failures in a row that make a healthy backend unhealthy.
    pub fall: u32,
    /// How long a new replica may fail its checks and still count as starting.
    pub grace: Duration,
}

/// Checks the backends of `table` until the task is dropped.
pub async fn check_all(table: TableCell, settings: Settings, events: mpsc::Sender<Event>) {
    let mut checks: HashMap<Arc<str>, (u64, AbortOnDropHandle<()>)> = HashMap::new();
    let mut changes = table.watch();
    loop {
        let now = table.load();
        checks.retain(|id, (incarnation, _)| {
            let backend = now.backends().iter().find(|backend| backend.id == *id);
            backend.is_some_and(|backend| backend.address.is_some() && backend.incarnation == *incarnation)
        });
        for backend in now.backends() {
            if let Some(address) = backend.address.filter(|_| !checks.contains_key(&backend.id)) {
                let task = tokio::spawn(check(Subject::of(backend, address), settings.clone(), events.clone()));
                checks.insert(Arc::clone(&backend.id), (backend.incarnation, AbortOnDropHandle::new(task)));
            }
        }
        drop(now);
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// A backend's replica under check.
struct Subject {
    id: Arc<str>,
    incarnation: u64,
    address: SocketAddr,
    live: Arc<Live>,
}

impl Subject {
    fn of(backend: &Backend, address: SocketAddr) -> Self {
        let (id, live) = (Arc::clone(&backend.id), Arc::clone(&backend.live));
        Self { id, incarnation: backend.incarnation, address, live }
    }

    /// The interval, up to a tenth longer: backends that started together are not checked in step.
    fn spread(&self, interval: Duration) -> Duration {
        let tenth = u32::from(seahash::hash(self.id.as_bytes()).to_le_bytes()[0]);
        interval + interval / 10 * tenth / 255
    }
}

async fn check(subject: Subject, settings: Settings, events: mpsc::Sender<Event>) {
    let mut judge = Judge::new(settings.rise, settings.fall);
    let began = Instant::now();
    let mut told = None;
    loop {
        let outcome = tokio::time::timeout(settings.timeout, settings.probe.run(subject.address)).await;
        let (passed, result): (bool, Arc<str>) = match outcome {
            Ok(Outcome::Passed) => (true, "ok".into()),
            Ok(Outcome::Failed(what)) => (false, what),
            Ok(Outcome::NotDone(why)) => {
                tracing::warn!(backend = %subject.id, why = why.as_str(), "cannot check");
                tokio::time::sleep(settings.interval).await;
                continue;
            }
            Err(_elapsed) => (false, ConnectFailure::Timeout.as_str().into()),
        };
        let counter = if passed { &subject.live.checks_passed } else { &subject.live.checks_failed };
        counter.fetch_add(1, Ordering::Relaxed);
        let forgiven = !passed && judge.verdict().is_none() && began.elapsed() < settings.grace;
        if !forgiven {
            judge.observe(passed);
        }
        let news = (judge.verdict(), result);
        if told.as_ref() != Some(&news) {
            let event = Event::Checked {
                id: Arc::clone(&subject.id),
                incarnation: subject.incarnation,
                healthy: news.0,
                result: Arc::clone(&news.1),
            };
            if events.send(event).await.is_err() {
                return;
            }
            told = Some(news);
        }
        let wait = match judge.verdict() {
            None => settings.interval.min(EAGER),
            Some(_) => subject.spread(settings.interval),
        };
        tokio::time::sleep(wait).await;
    }
}
