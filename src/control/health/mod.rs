//! Active health checks: one task per backend, started and stopped as the table changes.
//!
//! # Layout
//!
//! - this file: starts the tasks and times the checks
//! - [`rise_fall`]: turns a series of results into a verdict; pure
//! - [`mod@check`]: one check; [`mod@http`]: the HTTP check
//! - [`not_done`]: logs checks that Ringway could not make

mod check;
mod http;
mod not_done;
mod rise_fall;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;

use self::check::Outcome;
pub use self::check::{Check, Expect, Http, Kind};
pub use self::not_done::NotDone;
use self::rise_fall::RiseFall;
use super::Event;
use crate::backend::{Backend, Live, State};
use crate::table::TableCell;

/// Interval between checks of a backend without a verdict, which should serve as soon as it can.
const EAGER: Duration = Duration::from_millis(100);

/// Settings of a pool's health checks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// What one check does.
    pub check: Check,
    /// Time between checks of one backend.
    pub interval: Duration,
    /// Time between checks while results contradict the backend's state: Ringway then detects a change sooner.
    pub fast_interval: Duration,
    /// Largest random addition to an interval, in percent of it. Keeps checks of different backends out of step.
    pub jitter: u8,
    /// Time limit of one check.
    pub timeout: Duration,
    /// Passes in a row that make an unhealthy backend healthy.
    pub rise: u32,
    /// Failures in a row that make a healthy backend unhealthy.
    pub fall: u32,
    /// How long a new replica may fail its checks and still count as starting.
    pub grace: Duration,
}

/// Checks the backends of `table` until the task is dropped. New settings restart the checks of all backends.
pub async fn check_all(
    table: TableCell,
    mut settings: watch::Receiver<Option<Settings>>,
    events: mpsc::Sender<Event>,
    not_done: NotDone,
) {
    let mut checks: HashMap<Arc<str>, (u64, AbortOnDropHandle<()>)> = HashMap::new();
    let mut changes = table.watch();
    loop {
        let now = table.load();
        let current = settings.borrow_and_update().clone();
        checks.retain(|id, (incarnation, _)| {
            let backend = now.backends().iter().find(|backend| backend.id == *id);
            backend.is_some_and(|backend| backend.address.is_some() && backend.incarnation == *incarnation)
        });
        for backend in now.backends() {
            let address = backend.address.filter(|_| !checks.contains_key(&backend.id));
            if let (Some(address), Some(settings)) = (address, &current) {
                let task = tokio::spawn(check(
                    Subject::of(backend, address),
                    settings.clone(),
                    events.clone(),
                    not_done.clone(),
                ));
                checks.insert(Arc::clone(&backend.id), (backend.incarnation, AbortOnDropHandle::new(task)));
            }
        }
        drop(now);
        tokio::select! {
            changed = changes.changed() => if changed.is_err() {
                return;
            },
            changed = settings.changed() => match changed {
                Ok(()) => checks.clear(),
                Err(_) => return,
            },
        }
    }
}

/// Whether a server accepts connections at this address, found out without a trace in its logs.
pub(super) async fn accepts(address: SocketAddr, timeout: Duration) -> bool {
    matches!(Check { kind: Kind::Tcp, port: None }.run(address, timeout).await, Outcome::Passed)
}

/// A replica under check.
struct Subject {
    id: Arc<str>,
    incarnation: u64,
    address: SocketAddr,
    /// The verdict of earlier checks.
    verdict: Option<bool>,
    live: Arc<Live>,
}

impl Subject {
    fn of(backend: &Backend, address: SocketAddr) -> Self {
        let (id, live) = (Arc::clone(&backend.id), Arc::clone(&backend.live));
        // If checks were off before, a backend that serves counts as healthy.
        let verdict = backend.health.verdict.or_else(|| (backend.state == State::Healthy).then_some(true));
        Self { id, incarnation: backend.incarnation, address, verdict, live }
    }

    /// The interval plus up to `percent` of it. The addition differs by backend and by check.
    fn spread(&self, interval: Duration, percent: u8, number: u64) -> Duration {
        let chance = u32::from(seahash::hash_seeded(self.id.as_bytes(), number, 0, 0, 0).to_le_bytes()[0]);
        interval + interval / 100 * u32::from(percent) * chance / 255
    }
}

async fn check(subject: Subject, settings: Settings, events: mpsc::Sender<Event>, not_done: NotDone) {
    let mut rise_fall = RiseFall::new(settings.rise, settings.fall, subject.verdict);
    let began = Instant::now();
    let mut reported = None;
    for number in 0.. {
        let (passed, result): (bool, Arc<str>) = match settings.check.run(subject.address, settings.timeout).await {
            Outcome::Passed => (true, "ok".into()),
            Outcome::Failed(reason) => (false, reason),
            Outcome::NotDone(why) => {
                not_done.note(why, Instant::now());
                tokio::time::sleep(settings.interval).await;
                continue;
            }
        };
        let counter = if passed { &subject.live.checks_passed } else { &subject.live.checks_failed };
        counter.fetch_add(1, Ordering::Relaxed);
        let forgiven = !passed && rise_fall.verdict().is_none() && began.elapsed() < settings.grace;
        if !forgiven {
            rise_fall.observe(passed);
        }
        let news = (rise_fall.verdict(), result);
        if reported.as_ref() != Some(&news) {
            let event = Event::Checked {
                id: Arc::clone(&subject.id),
                incarnation: subject.incarnation,
                healthy: news.0,
                result: Arc::clone(&news.1),
            };
            if events.send(event).await.is_err() {
                return;
            }
            reported = Some(news);
        }
        let wait = match rise_fall.verdict() {
            None => settings.interval.min(EAGER),
            Some(verdict) if verdict != passed => subject.spread(settings.fast_interval, settings.jitter, number),
            Some(_) => subject.spread(settings.interval, settings.jitter, number),
        };
        tokio::time::sleep(wait).await;
    }
}
