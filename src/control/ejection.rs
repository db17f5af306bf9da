//! Passive ejection: Ringway ejects a backend for a while if connects to it keep failing, regardless of its checks.
//!
//! The data plane counts failures in a row and reports every `after` of them. The duration of an ejection grows with
//! each ejection in a row and shrinks with time, as in Envoy's outlier detection.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};

use super::Event;
use crate::backend::{Failing, State};
use crate::table::{Table, TableCell};

/// Settings of a pool's ejections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Duration of the first ejection. The second in a row lasts twice as long, the third three times, and so on.
    pub base: Duration,
    /// Longest duration of an ejection.
    pub max: Duration,
    /// At most this percentage of a pool's backends is ejected at once. In a pool of two or more, one may always be.
    pub max_share: u8,
}

/// Ejects and readmits backends of `table` until all senders of reports are gone. Without settings no backend is
/// ejected.
pub async fn eject(
    table: TableCell,
    mut settings: watch::Receiver<Option<Settings>>,
    mut reports: mpsc::Receiver<Failing>,
    events: mpsc::Sender<Event>,
) {
    let mut ejections = Ejections::new(*settings.borrow_and_update());
    loop {
        let due = ejections.due();
        let wait = tokio::time::sleep_until(due.unwrap_or_else(Instant::now).into());
        let news = tokio::select! {
            report = reports.recv() => {
                let Some(report) = report else { return };
                ejections.report(&report, Pool::of(&table.load(), &report), Instant::now())
            }
            () = wait, if due.is_some() => ejections.over(Instant::now()),
            Ok(()) = settings.changed() => {
                ejections.settings = *settings.borrow_and_update();
                ejections.over(Instant::now())
            }
        };
        for event in news {
            if events.send(event).await.is_err() {
                return;
            }
        }
    }
}

/// The facts about a pool that decide whether one more backend may be ejected.
#[derive(Debug, Clone, Copy)]
struct Pool {
    /// Backends that get connections, or would if they were healthy.
    backends: usize,
    ejected: usize,
    /// The reported backend is healthy and still has the replica that failed.
    is_in: bool,
}

impl Pool {
    fn of(table: &Table, report: &Failing) -> Self {
        let backends = table.backends();
        let is_in = backends
            .find(&report.backend)
            .is_some_and(|backend| backend.incarnation == report.incarnation && backend.state == State::Healthy);
        Self { backends: table.taking(), ejected: backends.count(State::Ejected), is_in }
    }
}

/// Current and recent ejections. Pure.
#[derive(Debug)]
struct Ejections {
    settings: Option<Settings>,
    records: HashMap<Arc<str>, Record>,
}

#[derive(Debug)]
struct Record {
    incarnation: u64,
    /// Ejections in a row.
    count: u32,
    /// When the last ejection ends or ended.
    until: Instant,
    is_out: bool,
}

impl Ejections {
    fn new(settings: Option<Settings>) -> Self {
        Self { settings, records: HashMap::new() }
    }

    /// Handles a report that connects to a backend keep failing.
    fn report(&mut self, report: &Failing, pool: Pool, now: Instant) -> Vec<Event> {
        let Some(Settings { base, max, max_share }) = self.settings else { return Vec::new() };
        // Drop records whose ejections no longer count.
        self.records.retain(|_, record| record.is_out || record.left(base, now) > 0);
        let most = (pool.backends * usize::from(max_share) / 100).max(1).min(pool.backends.saturating_sub(1));
        // Several reports of one failure may arrive before the table shows the ejection.
        let is_out = |record: &&Record| record.is_out && now < record.until;
        let known = self.records.get(&report.backend).filter(is_out);
        if !pool.is_in || known.is_some_and(|record| record.incarnation == report.incarnation) {
            return Vec::new();
        }
        let ejected = pool.ejected.max(self.records.values().filter(is_out).count());
        if ejected >= most {
            tracing::debug!(backend = %report.backend, ejected, most, "connects keep failing; ejection limit reached");
            return Vec::new();
        }
        let count = self.records.get(&report.backend).map_or(0, |record| record.left(base, now)) + 1;
        let lasts = base.saturating_mul(count).min(max);
        tracing::warn!(backend = %report.backend, count, lasts_seconds = lasts.as_secs_f64(), "connects keep failing; backend ejected");
        let (incarnation, until) = (report.incarnation, now + lasts);
        self.records.insert(Arc::clone(&report.backend), Record { incarnation, count, until, is_out: true });
        vec![Event::Ejected { id: Arc::clone(&report.backend), incarnation }]
    }

    /// When the next ejection ends.
    fn due(&self) -> Option<Instant> {
        self.records.values().filter(|record| record.is_out).map(|record| record.until).min()
    }

    /// Readmits backends whose ejection has ended, or all of them if ejection is switched off.
    fn over(&mut self, now: Instant) -> Vec<Event> {
        let is_off = self.settings.is_none();
        let over = self.records.iter_mut().filter(|(_, record)| record.is_out && (is_off || record.until <= now));
        over.map(|(id, record)| {
            record.is_out = false;
            Event::Readmitted { id: Arc::clone(id), incarnation: record.incarnation }
        })
        .collect()
    }
}

impl Record {
    /// Ejections that still count: one less for each `base` of time since the last one ended.
    fn left(&self, base: Duration, now: Instant) -> u32 {
        let passed = now.saturating_duration_since(self.until).as_nanos() / base.as_nanos().max(1);
        self.count.saturating_sub(u32::try_from(passed).unwrap_or(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    const SETTINGS: Settings = Settings { base: Duration::from_secs(10), max: Duration::from_secs(35), max_share: 50 };

    fn failing(id: &str) -> Failing {
        Failing { backend: id.into(), incarnation: 1 }
    }

    fn pool(backends: usize, ejected: usize) -> Pool {
        Pool { backends, ejected, is_in: true }
    }

    #[test]
    fn each_ejection_in_a_row_lasts_longer_and_old_ones_stop_counting() {
        let (mut ejections, mut now) = (Ejections::new(Some(SETTINGS)), Instant::now());
        for lasts in [10, 20, 30, 35, 35] {
            assert_eq!(ejections.report(&failing("a"), pool(3, 0), now).len(), 1);
            let due = ejections.due().unwrap();
            assert_eq!(due - now, lasts * SECOND);
            assert!(ejections.over(now).is_empty());
            assert_eq!(ejections.over(due).len(), 1);
            assert_eq!(ejections.due(), None);
            now = due;
        }
        now += 30 * SECOND;
        ejections.report(&failing("a"), pool(3, 0), now);
        assert_eq!(ejections.due().unwrap() - now, 30 * SECOND, "three of five no longer count, and one is new");
        let before = now;
        now = ejections.due().unwrap();
        assert!(ejections.over(before).is_empty() && ejections.due().is_some());
        ejections.settings = None;
        assert_eq!(ejections.over(before).len(), 1, "switching ejection off readmits all");
        ejections.settings = Some(SETTINGS);
        now += 600 * SECOND;
        ejections.report(&failing("b"), pool(3, 0), now);
        assert_eq!(ejections.records.len(), 1, "the record of a backend without recent ejections is dropped");
    }

    #[test]
    fn a_burst_of_reports_causes_one_ejection_and_unpublished_ejections_count() {
        let (mut ejections, now) = (Ejections::new(Some(SETTINGS)), Instant::now());
        assert_eq!(ejections.report(&failing("a"), pool(4, 0), now).len(), 1);
        for _ in 0..20 {
            assert!(ejections.report(&failing("a"), pool(4, 0), now).is_empty());
        }
        assert_eq!(ejections.due().unwrap() - now, 10 * SECOND);
        assert_eq!(ejections.report(&failing("b"), pool(4, 0), now).len(), 1);
        assert!(ejections.report(&failing("c"), pool(4, 0), now).is_empty());
    }

    #[test]
    fn at_most_max_share_is_ejected_and_never_the_only_backend() {
        let may_eject = |backends, ejected| {
            !Ejections::new(Some(SETTINGS))
                .report(&failing(&format!("{backends}-{ejected}")), pool(backends, ejected), Instant::now())
                .is_empty()
        };
        assert!(!may_eject(1, 0));
        assert!(may_eject(2, 0) && !may_eject(2, 1));
        assert!(may_eject(3, 0) && !may_eject(3, 1));
        assert!(may_eject(10, 4) && !may_eject(10, 5));
        let mut ejections = Ejections::new(Some(SETTINGS));
        assert!(ejections.report(&failing("x"), Pool { is_in: false, ..pool(3, 0) }, Instant::now()).is_empty());
    }

    /// Simulates an hour: a backend that always fails changes state a bounded number of times.
    #[test]
    fn a_backend_that_always_fails_is_ejected_nearly_all_of_the_time() {
        let (mut ejections, begin) = (Ejections::new(Some(SETTINGS)), Instant::now());
        let (mut now, mut changes, mut out) = (begin, 0, Duration::ZERO);
        while now < begin + 3600 * SECOND {
            now += SECOND / 10;
            assert_eq!(ejections.report(&failing("a"), pool(3, 0), now).len(), 1);
            let due = ejections.due().unwrap();
            out += due - now;
            now = due;
            assert_eq!(ejections.over(now).len(), 1);
            changes += 2;
        }
        assert!(changes <= 2 * (3600 / 35 + 3), "{changes}");
        assert!(out >= 3500 * SECOND, "{out:?}");
    }
}
