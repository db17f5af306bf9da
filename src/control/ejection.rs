//! Passive ejection: a backend to which connects keep failing is taken out for a while, whatever its checks say.
//!
//! The data plane counts failures in a row and reports each time there are `after` of them. How long a backend is out
//! grows with each ejection and shrinks with time: Envoy's outlier detection does the same.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};

use super::Event;
use crate::backend::{Backend, Failing, State};
use crate::table::{Table, TableCell};

/// When backends are ejected, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// The first ejection lasts this long, the second in a row twice as long, and so on.
    pub base: Duration,
    /// The longest ejection.
    pub max: Duration,
    /// Most of a pool's backends that may be out, in percent; one may always be, where there is another.
    pub max_share: u8,
}

/// Ejects and readmits backends of `table` until nobody reports any more. With no settings none is out.
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

/// What of a pool decides whether one more backend may be ejected.
#[derive(Debug, Clone, Copy)]
struct Pool {
    /// Backends that get connections, or would if they were well.
    backends: usize,
    ejected: usize,
    /// The reported one gets connections, and is the replica that failed.
    is_in: bool,
}

impl Pool {
    fn of(table: &Table, report: &Failing) -> Self {
        let counts = |backend: &&Backend| backend.address.is_some() && backend.drain.is_none();
        let ejected = table.backends().iter().filter(|backend| backend.state == State::Ejected).count();
        let reported = table.backends().iter().find(|backend| backend.id == report.backend);
        let is_in = reported
            .is_some_and(|backend| backend.incarnation == report.incarnation && backend.state == State::Healthy);
        Self { backends: table.backends().iter().filter(counts).count(), ejected, is_in }
    }
}

/// Who is out, and who has been. Pure.
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
    /// When the last one ends or has ended.
    until: Instant,
    is_out: bool,
}

impl Ejections {
    fn new(settings: Option<Settings>) -> Self {
        Self { settings, records: HashMap::new() }
    }

    /// Connects to a backend have failed once more as often as it takes.
    fn report(&mut self, report: &Failing, pool: Pool, now: Instant) -> Vec<Event> {
        let Some(Settings { base, max, max_share }) = self.settings else { return Vec::new() };
        // Forgotten once they are as good as new.
        self.records.retain(|_, record| record.is_out || record.left(base, now) > 0);
        let most = (pool.backends * usize::from(max_share) / 100).max(1).min(pool.backends.saturating_sub(1));
        // Several reports of one failure may come before the table shows what the first has led to.
        let is_out = |record: &&Record| record.is_out && now < record.until;
        let known = self.records.get(&report.backend).filter(is_out);
        if !pool.is_in || known.is_some_and(|record| record.incarnation == report.incarnation) {
            return Vec::new();
        }
        let ejected = pool.ejected.max(self.records.values().filter(is_out).count());
        if ejected >= most {
            tracing::debug!(backend = %report.backend, ejected, most, "connects fail; no more may be ejected");
            return Vec::new();
        }
        let count = self.records.get(&report.backend).map_or(0, |record| record.left(base, now)) + 1;
        let lasts = base.saturating_mul(count).min(max);
        tracing::warn!(backend = %report.backend, count, ?lasts, "connects keep failing: backend is ejected");
        let (incarnation, until) = (report.incarnation, now + lasts);
        self.records.insert(Arc::clone(&report.backend), Record { incarnation, count, until, is_out: true });
        vec![Event::Ejected { id: Arc::clone(&report.backend), incarnation }]
    }

    /// When the next ejection is over.
    fn due(&self) -> Option<Instant> {
        self.records.values().filter(|record| record.is_out).map(|record| record.until).min()
    }

    /// Readmits those whose time is over, and all of them once there are no settings any more.
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
    /// Ejections that still count: one less for each `base` since the last was over.
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
    fn each_ejection_in_a_row_lasts_longer_and_time_makes_up_for_them() {
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
        assert_eq!(ejections.due().unwrap() - now, 30 * SECOND, "three of five made up for, and one more");
        let before = now;
        now = ejections.due().unwrap();
        assert!(ejections.over(before).is_empty() && ejections.due().is_some());
        ejections.settings = None;
        assert_eq!(ejections.over(before).len(), 1, "switched off, it holds nobody");
        ejections.settings = Some(SETTINGS);
        now += 600 * SECOND;
        ejections.report(&failing("b"), pool(3, 0), now);
        assert_eq!(ejections.records.len(), 1, "one that has been well for long is forgotten");
    }

    #[test]
    fn a_burst_of_reports_is_one_ejection_and_others_count_before_they_are_published() {
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
    fn never_more_than_a_share_of_the_pool_and_never_the_only_one() {
        let may = |backends, ejected| {
            !Ejections::new(Some(SETTINGS))
                .report(&failing(&format!("{backends}-{ejected}")), pool(backends, ejected), Instant::now())
                .is_empty()
        };
        assert!(!may(1, 0));
        assert!(may(2, 0) && !may(2, 1));
        assert!(may(3, 0) && !may(3, 1));
        assert!(may(10, 4) && !may(10, 5));
        let mut ejections = Ejections::new(Some(SETTINGS));
        assert!(ejections.report(&failing("x"), Pool { is_in: false, ..pool(3, 0) }, Instant::now()).is_empty());
    }

    /// Seeded, over hours: a backend that fails whenever it is in changes its state a bounded number of times.
    #[test]
    fn a_backend_that_always_fails_is_out_nearly_all_of_the_time() {
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
